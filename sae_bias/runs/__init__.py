"""Run folders: writing, reading, copies of the inputs, the manifest, the summary."""
