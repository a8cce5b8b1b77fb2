"""Activation checkpointing that saves the outputs of edge attention and recomputes the rest."""

import threading
from collections.abc import Callable

from torch import Tensor

_active = threading.local()  # the backward pass of a GPU runs in a thread of its own


def keep_attention() -> tuple["_Saving", "_Restoring"]:
    """The ``context_fn`` of a checkpoint that recomputes everything but edge attention.

    Attention takes most of a block's time, and its outputs are a seventh of the tensors that a
    block saves. With them saved, the recomputation costs the linear layers only.

    Returns:
        Contexts for the forward pass and for its recomputation.
    """
    saved: list[tuple[Tensor, ...]] = []
    return _Saving(saved), _Restoring(saved)


def saved_or(compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The saved outputs of this call in a recomputation; else those of ``compute``."""
    phase = getattr(_active, "phase", None)
    return compute() if phase is None else phase.outputs(compute)


class _Phase:
    """The forward pass of a checkpoint, or its recomputation, as a context."""

    def __init__(self, saved: list[tuple[Tensor, ...]]):
        self.saved = saved

    def __enter__(self):
        self.before, _active.phase = getattr(_active, "phase", None), self
        return self

    def __exit__(self, *error):
        _active.phase = self.before


class _Saving(_Phase):
    def outputs(self, compute):
        self.saved.append(compute())
        return tuple(t.detach() for t in self.saved[-1])


class _Restoring(_Phase):
    def __enter__(self):
        self.calls = iter(self.saved)
        return super().__enter__()

    def outputs(self, compute):
        return tuple(t.detach() for t in next(self.calls))
