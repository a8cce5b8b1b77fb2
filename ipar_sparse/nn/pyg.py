"""What is used of PyTorch Geometric, imported without what is not.

``import torch_geometric`` loads torch's compiler and PyG's collection of data sets, and with it
pandas and language models where they are installed. Together they take nine tenths of its time.
Here both are left to load when they are first named. The standard library's ``LazyLoader`` keeps
the place of each while PyG loads, and no longer: whoever looks through all modules, as torch's
compiler does, would load them, and before Python 3.12.3 it is not for several threads at once.
Nor is the text of PyG's overloads parsed, by which torch checks only that they have no body.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

import torch

_LATER = ("torch._dynamo", "torch_geometric.datasets")


class _Postponing:
    """Finds some modules so that they load when an attribute of theirs is first read."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in _LATER else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


@contextmanager
def _postponed() -> Iterator[None]:
    sys.meta_path.insert(0, _Postponing)
    # torch's own, and in no way promised: where it is not, texts are parsed
    jit, check = getattr(torch, "_jit_internal", None), "_check_overload_body"
    parsing = getattr(jit, check, None)
    if parsing is not None:
        setattr(jit, check, lambda _: None)
    try:
        yield
    finally:
        if parsing is not None:
            setattr(jit, check, parsing)
        sys.meta_path.remove(_Postponing)
        for name in _LATER:
            if type(sys.modules.get(name, sys)) is not ModuleType:  # not loaded yet
                package, _, part = name.rpartition(".")
                del sys.modules[name]
                if package in sys.modules:  # it is not where ctrl-C ended its import
                    delattr(sys.modules[package], part)


def _named(part: str) -> ModuleType:
    """A part of PyG that was left out; torch does the same for its compiler."""
    if f"torch_geometric.{part}" not in _LATER:
        raise AttributeError(f"module 'torch_geometric' has no attribute {part!r}")
    return import_module(f"torch_geometric.{part}")


with _postponed():
    from torch_geometric.nn import MessagePassing, inits
    from torch_geometric.nn.aggr import SumAggregation
    from torch_geometric.typing import Adj, SparseTensor
    from torch_geometric.utils import is_sparse, to_edge_index

vars(sys.modules["torch_geometric"]).setdefault("__getattr__", _named)

__all__ = [
    "Adj",
    "MessagePassing",
    "SparseTensor",
    "SumAggregation",
    "inits",
    "is_sparse",
    "to_edge_index",
]
