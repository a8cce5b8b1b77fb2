"""Slides that ranks divide among themselves: one holds the expression of each.

The others know all else of it. What follows from a slide's expression is computed by the rank that
holds it, and told to all. So ranks compute what one computes, and none holds all expression.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from ..distributed import agree, rank, shared_out, size, summed
from .copies import identified
from .slide import Slide

T = TypeVar("T")
Holders = Sequence[int] | None
"""The rank that holds each slide; None where every rank holds all."""


@dataclass(frozen=True)
class Elsewhere:
    """What is known of expression that another rank holds.

    Args:
        shape: cells and genes (n, G).
        nnz: number of stored values.
    """

    shape: tuple[int, int]
    nnz: int


def _known(slide: Slide) -> Slide:
    """A slide as ranks know it that do not hold it."""
    if slide.expression is None:
        return slide
    matrix = slide.expression
    return replace(slide, expression=Elsewhere(matrix.shape, int(matrix.nnz)))


def read_divided(sources: Sequence[Any], read: Callable[[Any], list[Slide]]) -> list[Slide]:
    """The slides of some sources, read by the ranks in turn; each holds those that it has read.

    Of fewer sources than ranks each rank reads all, one after another, and holds some slides.

    Args:
        sources: the same on all ranks.
        read: gives the slides of one.

    Raises:
        UserError: the files of the ranks differ, or what one of them cannot read.
    """
    agree("slides", " ".join(map(_told, sources)))
    if len(sources) < size():
        slides: list[Slide] = []
        for source in sources:
            for slide in map(identified, read(source)):
                slide.holder = len(slides) % size()
                slides.append(slide if slide.holder == rank() else _known(slide))
        return slides
    own, holder = {}, rank()

    def compute(number: int) -> list[Slide]:
        own[number] = [replace(identified(s), holder=holder) for s in read(sources[number])]
        return [_known(slide) for slide in own[number]]

    found = shared_out(range(len(sources)), compute)
    return [slide for n, slides in enumerate(found) for slide in own.get(n, slides)]


def _told(source: Any) -> str:
    path = source[0] if isinstance(source, tuple) else source
    if not isinstance(path, str | os.PathLike):
        return "object"
    return f"{path}:{os.path.getsize(path) if os.path.isfile(path) else 0}"


def holders_of(slides: Sequence[Slide]) -> Holders:
    """The rank that holds each of some slides; None where every rank holds all."""
    found = [slide.holder for slide in slides]
    if size() == 1 or all(one is None for one in found):
        return None
    return [one or 0 for one in found]


def held_here(count: int, holders: Holders) -> list[int]:
    """Numbers of the slides, of so many, that this rank holds."""
    return [i for i in range(count) if holders is None or holders[i] == rank()]


def of_held(items: Iterable[Any], compute: Callable[[Any], T], holders: Holders) -> list[T | None]:
    """``compute(item)`` of the items that this rank holds, None in place of the others."""
    return [
        compute(item) if holders is None or holders[i] == rank() else None
        for i, item in enumerate(items)
    ]


def of_each(items: Sequence[Any], compute: Callable[[Any], T], holders: Holders) -> list[T]:
    """``compute(item)`` of each item, by the rank that holds it, on all ranks."""
    if holders is None:
        return [compute(item) for item in items]
    return shared_out(items, compute, holders)


def of_slides(slides: Sequence[Slide], compute: Callable[[Slide], T]) -> list[T]:
    """:func:`of_each` of slides."""
    return of_each(slides, compute, holders_of(slides))


def changed(slides: Sequence[Slide], change: Callable[[Slide], Slide]) -> list[Slide]:
    """``change(slide)`` of each; it stays with the rank that holds the slide."""
    holders, own = holders_of(slides), {}
    if holders is None:
        return [change(slide) for slide in slides]

    def compute(number: int) -> Slide:
        own[number] = change(slides[number])
        return _known(own[number])

    found = shared_out(range(len(slides)), compute, holders)
    return [own.get(number, slide) for number, slide in enumerate(found)]


def added(values: np.ndarray, holders: Holders) -> np.ndarray:
    """The sum over ranks of what each found on the slides that it holds."""
    if holders is None:
        return values
    import torch

    return summed(torch.from_numpy(values)).numpy()
