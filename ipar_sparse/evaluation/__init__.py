"""Scores of predictions, baselines, and studies on held-out slides."""
