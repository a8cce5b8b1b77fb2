"""What is done to a layout after the recycles: distance correction, refinement, uncertainty."""

from .distance_correction import correct_distances, relative_variance
from .refinement import refine_layout

__all__ = ["correct_distances", "refine_layout", "relative_variance"]
