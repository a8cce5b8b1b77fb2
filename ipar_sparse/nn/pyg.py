"""What is used of PyTorch Geometric, imported without what is not.

``import torch_geometric`` loads torch's compiler and PyG's collection of data sets, and with it
pandas and language models where they are installed. Together they take nine tenths of its time.
Here both are left to load when something of theirs is first used. The standard library's
``LazyLoader`` does so, but before Python 3.12.3 not for several threads at once, all of which may
make an optimiser. torch imports its compiler itself where it is named, so that is left to torch.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
    try:
        yield
    finally:
        sys.meta_path.remove(_Postponing)
        if type(sys.modules.get("torch._dynamo", sys)) is not ModuleType:  # not loaded yet
            del sys.modules["torch._dynamo"], torch._dynamo


with _postponed():
    from torch_geometric.nn import MessagePassing, inits
    from torch_geometric.nn.aggr import SumAggregation
    from torch_geometric.typing import Adj, SparseTensor
    from torch_geometric.utils import is_sparse, to_edge_index

__all__ = [
    "Adj",
    "MessagePassing",
    "SparseTensor",
    "SumAggregation",
    "inits",
    "is_sparse",
    "to_edge_index",
]
