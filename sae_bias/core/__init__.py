"""Errors, types, sites, files, numbers as text: what every other package may use."""
