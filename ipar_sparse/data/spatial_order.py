"""Whether the expression of a slide follows the positions of its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .expression import mean_and_variance, normalized_expression
from .notes import Warned
from .slide import Slide

_CELLS = 1000  # that are compared with their neighbours
_GENES = 100  # of most variance
_NEIGHBORS = 6
_SHUFFLES = 20
_FEW = 100  # fewer cells tell nothing
_LEAST = 4.0  # standard deviations above shuffled positions; slides in order have many more


def neighbor_agreement(slide: Slide, genes: Sequence[str], total: float = 1e4) -> float:
    r"""How much more alike neighbours in the tissue are than cells of shuffled positions.

    Moran's :math:`I = \sum_i z_i \bar z_{N(i)} / n`, summed over the most variable genes, less its
    mean over shuffled positions, in their standard deviations.

    Args:
        slide: n cells with positions and expression in memory.
        genes: that are looked at.
        total: that counts are scaled to.

    Returns:
        Infinity where too little is known to tell.
    """
    from scipy.spatial import cKDTree

    cells = np.flatnonzero(~slide.empty)
    if slide.pos is None or len(cells) < _FEW:
        return np.inf
    slide = slide.take(cells)
    variance = mean_and_variance(slide, genes, total)[1]
    top = [genes[i] for i in np.argsort(-variance, kind="stable")[:_GENES] if variance[i] > 0]
    if not top:
        return np.inf
    rng = np.random.default_rng(0)
    some = np.sort(rng.permutation(len(cells))[:_CELLS])
    near = cKDTree(slide.pos).query(slide.pos[some], _NEIGHBORS + 1)[1]
    gathered, place = np.unique(near, return_inverse=True)
    z = normalized_expression(slide.take(gathered), top, total).toarray().astype(np.float64)
    z = (z - z.mean(axis=0)) / np.maximum(z.std(axis=0), 1e-12)
    own, near = np.searchsorted(gathered, some), place.reshape(near.shape)

    def moran(z: np.ndarray) -> float:
        around = z[near].mean(axis=1) - z[own] / near.shape[1]  # the nearest is the cell itself
        return float((z[own] * around).sum())

    shuffled = [moran(z[rng.permutation(len(z))]) for _ in range(_SHUFFLES)]
    return (moran(z) - float(np.mean(shuffled))) / max(float(np.std(shuffled)), 1e-12)


def told_of_order(slide: Slide, genes: Sequence[str], total: float) -> Slide:
    """A slide with a warning if its expression does not follow its positions."""
    if neighbor_agreement(slide, genes, total) >= _LEAST:
        return slide
    said = Warned(
        "neighbours in the tissue are no more alike than any two cells: positions may be in "
        "another order than the cells, and a map learned from them is wrong"
    )
    return replace(slide, notes=[*slide.notes, said])
