"""Supervision of training: frozen targets from true positions, and the losses on them."""

from .losses import e_geo, gate_loss, geometry_terms
from .targets import SlideTarget, build_target, collate, gate_target, target_graph

__all__ = [
    "SlideTarget",
    "build_target",
    "collate",
    "e_geo",
    "gate_loss",
    "gate_target",
    "geometry_terms",
    "target_graph",
]
