"""One module for each layout in which SAEs are published."""
