"""Outputs that a recomputation in the backward pass takes up instead of making them again."""

import threading
from collections.abc import Callable

from torch import Tensor

_active = threading.local()  # the backward pass of a GPU runs in a thread of its own


def keep_attention() -> tuple["_Keeping", "_Recalling"]:
    """The ``context_fn`` of a checkpoint that recomputes everything but edge attention.

    Attention is most of a block's time and its outputs a seventh of what a block leaves behind,
    so that with them kept, a recomputation costs the linear layers only.

    Returns:
        Contexts for the forward pass and for its recomputation.
    """
    kept: list[tuple[Tensor, ...]] = []
    return _Keeping(kept), _Recalling(kept)


def kept_or(make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What the forward pass made at this place, in a recomputation; else what ``make`` returns."""
    phase = getattr(_active, "phase", None)
    return make() if phase is None else phase.take(make)


class _Phase:
    def __init__(self, kept: list):
        self.kept = kept

    def __enter__(self):
        self.before, _active.phase = getattr(_active, "phase", None), self
        return self

    def __exit__(self, *error):
        _active.phase = self.before


class _Keeping(_Phase):
    def take(self, make):
        self.kept.append(make())
        return tuple(t.detach() for t in self.kept[-1])


class _Recalling(_Phase):
    def __enter__(self):
        self.calls = iter(self.kept)
        return super().__enter__()

    def take(self, make):
        return tuple(t.detach() for t in next(self.calls))
