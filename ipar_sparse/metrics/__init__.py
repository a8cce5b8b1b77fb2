"""Measures of a layout against measured positions, and diagnostics of the model inside."""
