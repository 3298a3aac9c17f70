"""Prompts and texts: pairs, grids, banks, scenarios, and the files they come from."""
