"""Other systems: Inspect and Ray."""
