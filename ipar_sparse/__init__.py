"""Sparse invariant point attention: from gene expression to 2D tissue positions.

Names are resolved on first use, so that importing the layer costs torch and PyG and nothing else.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("ipar_sparse")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0.0.0"

_HOME = {
    "EdgeGateSoft": "nn",
    "IPALiteConv": "nn",
    "IPALiteModel": "nn",
    "SharedEncoder": "nn",
    "NeighborTable": "graph",
    "knn": "graph",
    "knn_candidates": "graph",
    "edge_attention": "ops",
    "edge_gate": "ops",
    "build_target": "supervision",
    "gauge_fix": "geometry",
    "refine_layout": "layout",
    "RunConfig": "config",
    "load_config": "config",
    "fit": "train.fit",
    "Predictor": "inference.predictor",
    "composition": "inference.mapping",
    "expected_expression": "inference.mapping",
    "UserError": "errors",
    "IPAR": "api",
}
"""Public name -> the module that holds it."""

__all__ = [*_HOME, "pl", "__version__"]


def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name == "pl":
        return import_module(f"{__name__}.pl")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
