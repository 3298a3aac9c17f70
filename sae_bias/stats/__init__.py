"""Statistics on numpy and scipy: means over templates × entities, reductions, tests over many features, designs and splits."""
