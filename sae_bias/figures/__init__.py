"""Plotly figures: data frames in, figures out."""
