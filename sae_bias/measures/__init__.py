"""What an intervention costs and what else it moves."""
