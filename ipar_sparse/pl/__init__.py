"""Figures. Every function takes data, draws on the axes it is given (or new ones), returns Axes.

Colours stay apart for colour-blind readers, and aspect is equal wherever axes are tissue. Beyond
1,000,000 cells a random part is drawn, and the figure says so.
"""

from ..metrics.diagnostics import AttentionFocus
from .curves import loss_curves, recycle_curves
from .layouts import (
    attention_focus,
    compare,
    layout,
    layout_pair,
    position_colors,
    trajectory,
    uncertainty_map,
)
from .scores import distance_density, metric_dots, uncertainty_calibration

__all__ = [
    "AttentionFocus",
    "attention_focus",
    "compare",
    "distance_density",
    "layout",
    "layout_pair",
    "loss_curves",
    "metric_dots",
    "position_colors",
    "recycle_curves",
    "trajectory",
    "uncertainty_calibration",
    "uncertainty_map",
]
