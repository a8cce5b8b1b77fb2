"""Which genes a placement rests on: those that cells express where the reference does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from ..data.expression import normalized_expression
from ..data.slide import Slide
from ..inference.predictor import Predictor
from .cells import pattern

MOST_NAMED = 8
"""Genes that are named, of those that came out and of those that did not."""

_AROUND = 10  # spots of the reference nearest to a cell, whose mean it is compared with
_SAMPLED = 5000  # cells that this is done for
_AT_ONCE = 500  # genes, dense
_PATTERNED = 0.1  # Moran's I on the reference from which a gene has a pattern there
_AGREES = 0.1  # correlation from which the pattern came out on the cells


@dataclass(frozen=True)
class Carried:
    """Which genes of a reference came out where cells were placed.

    Args:
        genes: that carried the placement, with the correlation of each; the strongest first.
        lost: genes with a pattern on the reference that did not come out, likewise.
    """

    genes: dict[str, float]
    lost: dict[str, float]

    def sentence(self) -> str:
        """Both, in words."""
        if not self.genes:
            return "No gene came out on the cells as on the reference: do not rely on the places. "
        text = f"These genes carried the placement: {_listed(self.genes)}. "
        if self.lost:
            text += "These have a pattern on the reference that did not come out: "
            text += f"{_listed(self.lost)}. "
        return text + (
            "In brackets is how far a cell's expression goes with that of the reference around "
            "its place (correlation). "
        )


def carrying_genes(
    own: sparse.csr_matrix,
    pos: np.ndarray,
    known: sparse.csr_matrix,
    spots: np.ndarray,
    genes: Sequence[str],
) -> Carried:
    r"""Genes that cells express where the reference does.

    .. math::
        r_g = \operatorname{corr}_i\Bigl(x_{ig},\ \frac1{10} \sum_{j \in N(i)} y_{jg}\Bigr)

    with the expression x of the cells, that of the reference y, and the ten spots N(i) nearest to
    the place of cell i. Genes are ordered by :math:`r_g I_g`, with Moran's I on the reference: a
    gene without a pattern there cannot carry anything.

    Args:
        own: log-normalised expression of the cells (n, G).
        pos: their places in the frame of the reference (n, 2).
        known: log-normalised expression of the reference (m, G).
        spots: its positions (m, 2).
        genes: their names (G,).
    """
    rows = np.arange(len(pos))
    if len(pos) > _SAMPLED:
        rows = np.sort(np.random.default_rng(0).choice(len(pos), _SAMPLED, replace=False))
    near = cKDTree(spots).query(pos[rows], min(_AROUND, len(spots)))[1].reshape(len(rows), -1)
    expected = sum(known[near[:, k]] for k in range(near.shape[1]))
    found = np.zeros(len(genes))
    for start in range(0, len(genes), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        found[part] = _correlations(own[rows][:, part].toarray(), expected[:, part].toarray())
    patterned = pattern(known, spots)
    agree, has = found >= _AGREES, patterned >= _PATTERNED
    first = np.argsort(-found * patterned, kind="stable")
    strong = np.argsort(-patterned, kind="stable")
    return Carried(
        {genes[g]: float(found[g]) for g in first if agree[g] and has[g]},
        {genes[g]: float(found[g]) for g in strong if has[g] and not agree[g]},
    )


def _correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation of each column; 0 where one does not vary."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    norm = np.sqrt(np.square(x).sum(axis=0) * np.square(y).sum(axis=0))
    return np.divide((x * y).sum(axis=0), norm, out=np.zeros(len(norm)), where=norm > 0)


def _listed(genes: dict[str, float]) -> str:
    named = [f"{gene} ({value:.2f})" for gene, value in list(genes.items())[:MOST_NAMED]]
    more = len(genes) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def carried(
    predictor: Predictor, slide: Slide, pos: np.ndarray, shown: np.ndarray, spots: Slide
) -> Carried | None:
    """Genes of a run that carried the placement of a slide; None if there are none to compare.

    Args:
        predictor: the trained run.
        slide: n cells.
        pos: their places in the frame of the reference (n, 2).
        shown: which cells have one (n,).
        spots: the reference.
    """
    run_genes = predictor.meta["genes"]
    if not run_genes or slide.expression is None or spots.expression is None:
        return None
    held = {str(gene) for gene in slide.genes} & {str(gene) for gene in spots.genes}
    genes = [gene for gene in run_genes if gene in held]
    if not genes or shown.sum() < _AROUND:
        return None
    total = predictor.config.data.target_sum or 1e4
    own, known = (normalized_expression(one, genes, total) for one in (slide, spots))
    return carrying_genes(own[shown], pos[shown], known, spots.pos, genes)
