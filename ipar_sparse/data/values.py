"""What kind of values an expression matrix holds, told from the values themselves.

Counts that were scaled, or whose logarithm was taken, keep two marks: the counts of one cell stand
in whole-number ratios to each other, or all cells have one total. An inverse transformation that
brings a mark out is the one that was applied.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import sparse

from .notes import Warned
from .on_disk import changed_values, take_rows

Scale = Literal["counts", "total", "cells"] | None

_SAMPLE = 1000  # cells that are looked at
_VALUES = 1 << 21  # of them, at most so many values
_CELLS = 10  # fewer tell nothing by their totals
_RATIOS = 200  # fewer tell nothing
_SOME = 0.02  # of the cells; fewer are not a kind of their own
_CONSTANT = 0.02  # spread of totals, relative to their median
_LARGEST_LOG = 40.0  # no logarithm of counts reaches it
_LOG_CEILING = 20.0  # log1p of anything countable stays below this
_VARYING = 1.0  # if totals behind the logarithm vary more than this, it is none


def _exp10m1(y: np.ndarray) -> np.ndarray:
    return np.expm1(y * math.log(10))


def _exp2m1(y: np.ndarray) -> np.ndarray:
    return np.expm1(y * math.log(2))


INVERSES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda y: y,
    "log1p": np.expm1,
    "log2": _exp2m1,
    "log10": _exp10m1,
    "sqrt": np.square,
}
"""Transformation to its inverse; log2 and log10 are of 1 + x."""

LOG_OF = {"log1p": 1.0, "log2": math.log(2), "log10": math.log(10)}
"""Transformation to the natural logarithm of its base."""

_WORDS = {
    "none": "values",
    "log1p": "log1p",
    "log2": "log2(1 + x)",
    "log10": "log10(1 + x)",
    "sqrt": "square roots",
    "unknown": "values below zero",
}


@dataclass(frozen=True)
class Values:
    """The kind of the values of one matrix.

    Args:
        transform: a name of :data:`INVERSES`, or ``"unknown"`` for negative values.
        scale: what the inverse gives: ``"counts"``, counts scaled to one ``"total"``, counts that
            were scaled cell by cell (``"cells"``), or nothing known.
        total: median sum of a cell, once inverted.
        whole: whether all values are whole numbers as they are.
        guessed: whether the transformation is a guess.
    """

    transform: str
    scale: Scale = None
    total: float | None = None
    whole: bool = False
    guessed: bool = False

    @property
    def logged(self) -> bool:
        """Whether the values are logarithms of 1 + x."""
        return self.transform.startswith("log")

    @property
    def counted(self) -> bool:
        """Whether totals of cells are numbers of counts, and not what these were scaled to."""
        return self.scale == "counts" or (self.transform == "none" and self.scale is None)

    def __str__(self) -> str:
        if self.transform == "none" and self.scale == "counts":
            return "counts"
        what = _WORDS[self.transform]
        if self.transform == "unknown":
            return what
        how = {
            "counts": "counts",
            "total": f"counts scaled to {self.total or 0:,.5g} a cell",
            "cells": "counts scaled by a factor a cell",
        }
        if self.scale is not None:
            counts = how[self.scale]
            return counts if self.transform == "none" else f"{what} of {counts}"
        return f"{what}, by their size" if self.guessed else what


def recognize_values(matrix: sparse.csr_matrix) -> Values:
    """The transformation that was applied to counts, and what it was applied to.

    Args:
        matrix: expression (n, G) without stored zeros; up to 1,000 of its cells are looked at.
    """
    rows = _sample(matrix)
    if not len(rows.data):
        return Values("none", "counts", whole=True)
    if rows.data.min() < 0:
        return Values("unknown")
    data, starts = rows.data.astype(np.float64), rows.indptr[:-1]
    if np.array_equal(data, np.rint(data)):
        return Values("none", "counts", float(np.median(_sums(data, starts))), whole=True)
    inverted = {
        name: inverse(data)
        for name, inverse in INVERSES.items()
        if not name.startswith("log") or data.max() < _LARGEST_LOG
    }
    sums = {name: _sums(values, starts) for name, values in inverted.items()}
    totals = {name: float(np.median(values)) for name, values in sums.items()}
    for name, values in inverted.items():
        if _whole(values):
            return Values(name, "counts", totals[name])
    constant = [name for name in inverted if _is_constant(sums[name])]
    ratios = {name: _whole_ratios(values, rows.indptr) for name, values in inverted.items()}
    best = max(ratios, key=lambda name: ratios[name])
    if ratios[best] > 0.6:
        return Values(best, "total" if best in constant else "cells", totals[best])
    if constant:
        return Values(constant[0], "total", totals[constant[0]])
    if data.max() > _LOG_CEILING or np.std(sums["log1p"]) > _VARYING * np.mean(sums["log1p"]):
        return Values("none", None, totals["none"], guessed=True)
    return Values("log1p", None, totals["log1p"], guessed=True)


def _of_two_kinds(matrix: sparse.csr_matrix) -> list[str]:
    """A warning where some cells hold logarithms and others whole numbers."""
    rows = _sample(matrix)
    if not len(rows.data):
        return []
    broken = np.add.reduceat(rows.data != np.rint(rows.data), rows.indptr[:-1], dtype=np.int64) > 0
    if not _SOME < broken.mean() < 1 - _SOME:
        return []
    found = recognize_values(take_rows(rows, np.flatnonzero(broken)))
    if not found.logged or found.guessed:
        return []
    kinds = f"some cells hold whole numbers and others {found}"
    return [Warned(f"{kinds}: give values of one kind, or they are placed wrongly")]


def _sample(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """Evenly spaced cells, of those that hold anything."""
    filled = np.flatnonzero(np.diff(matrix.indptr))
    per_cell = max(len(matrix.data) // max(len(filled), 1), 1)
    most = max(min(_SAMPLE, _VALUES // per_cell), _CELLS)
    if len(filled) > most:
        filled = filled[np.linspace(0, len(filled) - 1, most).astype(np.int64)]
    return take_rows(matrix, filled)


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values, starts)


def _whole(values: np.ndarray) -> bool:
    """Whether values are whole numbers but for what a way through logarithms leaves behind."""
    small = values[values < 200]
    if len(small) < len(values) / 2 or not len(small):
        return False
    close = np.abs(small - np.rint(small)) <= 1e-3 + 1e-4 * small
    return bool(np.mean(close & (small > 0.5)) > 0.995)  # what is near zero is no count


def _is_constant(sums: np.ndarray) -> bool:
    if len(sums) < _CELLS:
        return False
    low, middle, high = np.quantile(sums, [0.05, 0.5, 0.95])
    return bool(high - low < _CONSTANT * middle)


def _whole_ratios(values: np.ndarray, indptr: np.ndarray) -> float:
    """Share of values that are a whole multiple of the smallest value of their cell."""
    smallest = np.minimum.reduceat(values, indptr[:-1])
    ratio = values / np.repeat(smallest, np.diff(indptr))
    ratio = ratio[(ratio > 1.5) & (ratio < 20)]
    if len(ratio) < _RATIOS:
        return 0.0
    return float(np.mean(np.abs(ratio - np.rint(ratio)) < 0.02))


def interpret(
    matrix: sparse.csr_matrix, asked: bool | None
) -> tuple[sparse.csr_matrix, bool, Values, list[str]]:
    """Values as counts or as logarithms of 1 + x, whichever they are nearer to.

    Args:
        matrix: expression (n, G), finite; left unchanged.
        asked: True if the user says they are logarithms, False for counts; both are then used as
            they are. None decides by :func:`recognize_values`.

    Returns:
        The matrix, whether it is log-normalised, what the values were, and lines that say so.
    """
    found, kinds = recognize_values(matrix), _of_two_kinds(matrix)
    if asked is not None:
        return matrix, asked, found, [*kinds, *_contradiction(found, asked)]
    if found.transform == "none":
        return matrix, False, found, [*kinds, *_said_of_counts(found)]
    if found.scale == "counts" or found.transform == "sqrt":
        how = "squared" if found.transform == "sqrt" else "turned back to counts"
        return (
            changed_values(matrix, INVERSES[found.transform]),
            False,
            found,
            [*kinds, f"values are {found}: {how} (--normalized uses them as they are)"],
        )
    if found.guessed:
        return (
            matrix,
            True,
            found,
            [
                *kinds,
                "values are not whole numbers: taken as log-normalised (--counts if they are "
                "counts)",
            ],
        )
    return matrix, True, found, [*kinds, f"values are {found}: taken as log-normalised"]


def _said_of_counts(found: Values) -> list[str]:
    if found.guessed:
        return [
            "values are not whole numbers, and vary too much for logarithms: taken as counts that "
            "were corrected (--normalized uses them as they are)"
        ]
    if found.scale in ("total", "cells"):
        return [f"values are {found}: taken as counts"]
    return [] if found.whole else ["values are whole numbers but for rounding: taken as counts"]


def _contradiction(found: Values, normalized: bool) -> list[str]:
    if normalized and found.whole:
        return ["values are whole numbers: used as they are, without a logarithm (--normalized)"]
    if not normalized and found.logged and not found.guessed:
        return [f"values are {found}, but taken as counts (--counts)"]
    return []


def inverted(matrix: sparse.csr_matrix, values: Values) -> sparse.csr_matrix:
    """Logarithms of 1 + x as x; natural ones where nobody knows."""
    return changed_values(matrix, INVERSES[values.transform if values.logged else "log1p"])


def rescaled(matrix: sparse.csr_matrix, transform: str) -> sparse.csr_matrix:
    """Natural logarithms as those that a transformation takes."""
    factor = LOG_OF.get(transform, 1.0)
    return matrix if factor == 1.0 else changed_values(matrix, lambda y: y / factor)
