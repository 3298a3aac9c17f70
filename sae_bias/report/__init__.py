"""The report of a run folder: words, parts, sections, page."""
