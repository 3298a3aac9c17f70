"""Sparse autoencoders: names, releases, files, encoding."""
