"""Training of the model organisms and their SAEs, and the calibration that trains: outside the installed package."""
