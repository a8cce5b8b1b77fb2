"""Slides that hold the same cells, whatever their files, cells or slides are called."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .notes import Warned
from .slide import Slide

_SKETCH = 256  # cells of a slide by which another slide is compared with it
_GENES = 5  # cells of fewer genes may be alike by chance
_ROOM = 100  # crossings of rows and columns a cell; with fewer, grids of two slides coincide
SOME, MOST = 0.05, 0.5
"""Shares of cells in common that are told, and that make a slide a copy."""


def identified(slide: Slide) -> Slide:
    """A slide with what it and its cells are known by, whatever is changed of them later."""
    if slide.digest is not None:
        return slide
    rows = _cell_signatures(slide)
    telling = rows
    if slide.expression is not None:
        telling = rows[np.diff(slide.expression.indptr) >= _GENES]
    if slide.pos is not None:
        for column in np.ascontiguousarray(slide.pos, dtype=np.float64).T:
            rows = _mixed(rows ^ _mixed(np.ascontiguousarray(column).view(np.uint64)))
    digest = hashlib.sha256(np.sort(rows).tobytes()).hexdigest()[:16]
    places = np.empty(0, np.uint64) if slide.pos is None else _place_signatures(slide.pos)
    signatures = _unique(telling)
    repeated = len(telling) - len(signatures)
    notes = list(slide.notes)
    if repeated > SOME * len(telling):
        said = (
            f"{repeated} of {slide.num_cells} cells hold exactly what another cell holds: the "
            "slide may have been joined with itself; keep one of each"
        )
        notes += [] if said in notes else [Warned(said)]
    return replace(slide, digest=digest, signatures=signatures, places=places, notes=notes)


def slide_digest(slide: Slide) -> str:
    """A digest of what the cells of a slide held when it was read: expression by gene, position.

    Neither names nor the order of cells and genes matter.

    Returns:
        16 hexadecimal digits.
    """
    return identified(slide).digest


def telling_cells(slide: Slide) -> np.ndarray:
    """Numbers of the cells that held enough to be told apart when they were read, sorted."""
    return identified(slide).signatures


def _place_signatures(pos: np.ndarray) -> np.ndarray:
    """Numbers of the positions of a slide, sorted; none of a grid."""
    columns, rows = (len(_unique(column)) for column in pos.T)
    if columns * rows < _ROOM * len(pos):
        return np.empty(0, np.uint64)
    x, y = (_bits(column) for column in pos.T)
    return _unique(_mixed(_mixed(x) ^ y))


def _cell_signatures(slide: Slide) -> np.ndarray:
    """A number for what each cell holds (n,), uint64: of its expression, or of its embedding."""
    rows = np.zeros(slide.num_cells, dtype=np.uint64)
    matrix = slide.expression
    if matrix is None:
        for column in [] if slide.embedding is None else slide.embedding.T:
            rows = _mixed(rows ^ _bits(column))
        return rows
    from .on_disk import row_blocks  # scipy, which plans of studies do without

    genes = np.array([_hash(str(gene)) for gene in slide.genes], dtype=np.uint64)
    for cells, block in row_blocks(matrix):
        values = _mixed(genes[block.indices] ^ _bits(block.data))
        filled = np.flatnonzero(np.diff(block.indptr))
        if len(filled):  # a sum, so that the order of genes does not matter
            rows[cells.start + filled] = np.add.reduceat(values, block.indptr[filled])
    return rows


def sketch(slide: Slide) -> list[str]:
    """Signatures of some cells of a slide, the smallest ones, as hexadecimal digits."""
    return _listed(telling_cells(slide))


def _listed(numbers: np.ndarray) -> list[str]:
    return [f"{number:016x}" for number in numbers[:_SKETCH]]


def record_of(slide: Slide) -> dict[str, Any]:
    """What a run writes of a slide, to know it again."""
    slide = identified(slide)
    return {
        "name": slide.name,
        "path": slide.path,
        "digest": slide.digest,
        "cells": slide.num_cells,
        "sketch": _listed(slide.signatures),
        "places": _listed(slide.places),
    }


def overlap(sketched: Sequence[str], signatures: np.ndarray) -> float:
    """Share of the cells behind a sketch that are among sorted signatures; of those looked at."""
    if not sketched or not len(signatures):
        return 0.0
    known = np.array([int(one, 16) for one in sketched], dtype=np.uint64)
    place = np.searchsorted(signatures, known).clip(max=len(signatures) - 1)
    return float((signatures[place] == known).mean())


def find_copies(slides: Sequence[Slide]) -> list[tuple[int, int]]:
    """Pairs of slides, by number, of which one holds most cells of the other."""
    known, found = [identified(slide) for slide in slides], []
    for j, other in enumerate(known):
        for i, own in enumerate(known[:j]):
            alike = _share(own.signatures, other.signatures), _share(own.places, other.places)
            if own.digest == other.digest or max(alike) >= MOST:
                found.append((i, j))
    return found


def _share(own: np.ndarray, other: np.ndarray) -> float:
    """Signatures that two slides share, of those of the one that has fewer."""
    least = min(len(own), len(other))
    return len(np.intersect1d(own, other, assume_unique=True)) / least if least else 0.0


def _unique(values: np.ndarray) -> np.ndarray:
    """As numpy.unique, which hashes first: ten times slower for a million numbers."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]]


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), on uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
