"""Does the toolkit recover what was planted? Grammar, marks, populations, power."""
