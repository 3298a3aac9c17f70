"""The bias probe: words, readings, results, checks."""
