"""Files and AnnData objects to slides and back, expression, splits and simulation."""
