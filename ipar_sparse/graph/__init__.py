"""Neighbour tables, the one representation of a graph, and nearest-neighbour search."""

from .knn import KNN_BACKENDS, knn, knn_candidates, nearest_of, pooled_candidates
from .table import NeighborTable, validate_table

__all__ = [
    "KNN_BACKENDS",
    "NeighborTable",
    "knn",
    "knn_candidates",
    "nearest_of",
    "pooled_candidates",
    "validate_table",
]
