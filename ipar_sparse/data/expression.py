"""From counts to the encoder's input; a slide stays sparse all the way."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from ..errors import UserError
from .held import Holders, of_each, of_slides
from .on_disk import is_on_disk, row_blocks, row_sums, take_columns
from .slide import Slide

Genes = Sequence[str] | np.ndarray

_MIN_MORANS_I = 0.01  # noise reaches it on a thousand cells
_BLOCK = 1 << 22  # stored values converted to float64 at a time


def log_normalize(
    counts: sparse.spmatrix, target_sum: float = 1e4, totals: ArrayLike | None = None
) -> sparse.csr_matrix:
    """Scales every cell to the same total, then takes log(1 + x).

        y_ig = log(1 + target_sum * c_ig / sum_g c_ig)

    Args:
        counts: non-negative counts (n, G); left unchanged.
        target_sum: total that every cell is scaled to.
        totals: library sizes (n,); row sums of `counts` if left out. Give them where `counts`
            holds only some of the genes.

    Returns:
        (n, G) float32 CSR with the sparsity of `counts`; cells without counts stay zero.
    """
    counts = sparse.csr_matrix(counts)
    totals = counts.sum(axis=1) if totals is None else totals
    size = np.asarray(totals, dtype=np.float64).ravel()
    scale = np.divide(target_sum, size, out=np.zeros_like(size), where=size > 0)
    data = counts.data.astype(np.float32)
    data *= np.repeat(scale.astype(np.float32), np.diff(counts.indptr))
    np.log1p(data, out=data)
    return sparse.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)


def match_genes(slides: Sequence[Slide], genes: Genes | None = None) -> tuple[list[str], list[str]]:
    """Genes to use over several slides, matched by name.

    Args:
        slides: the slides.
        genes: the genes of a trained run; without them, those that all slides share are found.

    Returns:
        The given genes, or the shared ones in the order of the first slide. Beside them, those of
        the given genes, or of the first slide, that some slide lacks.

    Raises:
        UserError: if some slide has none of the genes, or no gene is on all slides.
    """
    wanted = [str(g) for g in (slides[0].genes if genes is None else genes)]
    shared = set(wanted)
    for slide in slides:
        own = {str(g) for g in slide.genes}
        if not own & set(wanted):
            raise UserError(
                f"{slide.name}: shares no gene with "
                f"{slides[0].name if genes is None else 'the trained model'}; put the same kind of "
                "gene name (symbols or Ensembl ids) into var_names"
            )
        shared &= own
    if genes is None and not shared:
        names = ", ".join(slide.name for slide in slides)
        raise UserError(
            f"no gene is present in all of {names}, though some pairs share genes; "
            "leave out the slide that was measured with another panel"
        )
    missing = [g for g in wanted if g not in shared]
    return [g for g in wanted if g in shared] if genes is None else wanted, missing


def select_genes(slides: Sequence[Slide], genes: Genes, n_top: int) -> list[str]:
    """The genes of largest variance in log-normalised expression.

    Genes are ranked by variance on each slide, and ranks are averaged, so that slides have equal
    weight.

    Args:
        slides: training slides, counts or log-normalised.
        genes: candidate genes, present on every slide.
        n_top: number of genes to select; all if there are fewer.

    Returns:
        The selected genes, most variable first. Ties keep the order of `genes`.

    Raises:
        ValueError: if `n_top` is below 1.
    """
    if n_top < 1:
        raise ValueError(f"n_top is {n_top}, expected at least 1")
    ranks = sum(of_slides(slides, lambda s: average_ranks(-_moments(s, genes)[1])))
    selected = np.argsort(ranks, kind="stable")[:n_top]
    return [str(genes[i]) for i in selected]


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 of finite values (n,), float64; equal values share the mean of theirs."""
    _, own, times = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(times) - (times - 1) / 2)[own]


def _column_sums(x: sparse.csr_matrix, power: int = 1) -> np.ndarray:
    # scipy adds float32 columns in float32, which loses digits over a million rows
    total = np.zeros(x.shape[1])
    for start in range(0, len(x.data), _BLOCK):
        part = slice(start, start + _BLOCK)
        values = x.data[part].astype(np.float64) ** power
        total += np.bincount(x.indices[part], weights=values, minlength=x.shape[1])
    return total


def _variance(x: sparse.csr_matrix) -> np.ndarray:
    n = max(x.shape[0], 1)
    return _column_sums(x, power=2) / n - (_column_sums(x) / n) ** 2


def normalized_expression(slide: Slide, genes: Genes, target_sum: float = 1e4) -> sparse.csr_matrix:
    """Log-normalised expression of some genes; cells are scaled by `slide.totals`.

    Args:
        slide: the slide.
        genes: names of G genes; those that the slide lacks become columns of zeros.
        target_sum: total that raw counts are scaled to.

    Returns:
        (n, G) float32 CSR.

    Raises:
        UserError: if the slide has no expression.
    """
    if slide.expression is None:
        raise UserError(f"{slide.name}: has no expression, only an embedding")
    matrix = _take_columns(slide.expression, slide.genes, genes)
    if slide.normalized:
        return matrix
    return log_normalize(matrix, target_sum, totals=cell_totals(slide))


def cell_totals(slide: Slide) -> np.ndarray:
    """Counts of each cell (n,) by which it is scaled: `slide.totals`, or those of all its genes."""
    if slide.totals is not None:
        return slide.totals
    return row_sums(slide.expression)


def mean_and_variance(
    slide: Slide, genes: Genes, target_sum: float = 1e4
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (G,) of the log-normalised expression of some genes."""
    mean, variance = _moments(slide, genes, target_sum)
    return mean, np.maximum(variance, 0.0)


def _moments(slide: Slide, genes: Genes, target_sum: float = 1e4) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (G,), from blocks of rows."""
    totals = None if slide.normalized else cell_totals(slide)
    columns = _columns_of(slide.genes, genes)
    sums, squares = np.zeros(len(genes)), np.zeros(len(genes))
    for rows, block in row_blocks(slide.expression):
        part = _place_columns(block, columns, len(genes))
        if totals is not None:
            part = log_normalize(part, target_sum, totals[rows])
        sums += _column_sums(part)
        squares += _column_sums(part, power=2)
    n = max(slide.num_cells, 1)
    return sums / n, squares / n - (sums / n) ** 2


def in_memory(slide: Slide, genes: Genes) -> Slide:
    """A slide with those of some genes that it has, read from the disk if it lies there.

    Its cells are scaled by the totals of all its genes, as before.
    """
    if slide.expression is None or not is_on_disk(slide.expression):
        return slide
    keep = np.flatnonzero(np.isin(slide.genes.astype(str), np.asarray(genes, dtype=str)))
    totals = slide.totals if slide.normalized else cell_totals(slide)
    taken = take_columns(slide.expression, keep)
    return replace(slide.with_genes(taken, slide.genes[keep]), totals=totals)


def median_total(slides: Sequence[Slide]) -> float:
    """Median counts per cell of each slide, and the median of these over slides.

    Args:
        slides: the slides. Cells without counts are left out. Scaled counts, and logarithms of
            them, decide only where no slide has plain counts.

    Returns:
        Counts per cell; 1e4 where no slide has any.
    """
    plain: list[float] = []
    scaled: list[float] = []
    for slide, median in zip(slides, of_slides(slides, _median_total), strict=True):
        values = slide.values
        if slide.normalized:
            if values is not None and values.logged and values.total:
                scaled.append(values.total)
        elif median is not None:
            (plain if values is None or values.counted else scaled).append(median)
    return float(np.median(plain or scaled)) if plain or scaled else 1e4


def _median_total(slide: Slide) -> float | None:
    if slide.expression is None or slide.normalized:
        return None
    totals = cell_totals(slide)
    return float(np.median(totals[totals > 0])) if (totals > 0).any() else None


def morans_i(
    matrix: sparse.csr_matrix, neighbors: np.ndarray, rows: np.ndarray | None = None
) -> np.ndarray:
    """Moran's I of every gene: correlation of a cell's expression with that of its neighbours.

        I_g = cov_i(x_ig, mean_j x_jg) / var_i(x_ig),  j in neighbors(i)

    Args:
        matrix: expression (n, G).
        neighbors: row numbers of the neighbours of the first m cells (m, k), m <= n.
        rows: row numbers of the cells i; all m if left out.

    Returns:
        (G,) float64; 0 for genes that do not vary.
    """
    n, k = matrix.shape[0], neighbors.shape[1]
    rows = np.arange(len(neighbors)) if rows is None else np.asarray(rows)
    average = sparse.csr_matrix(
        (np.full(len(rows) * k, 1 / k), neighbors[rows].ravel(), np.arange(len(rows) + 1) * k),
        shape=(len(rows), n),
    )
    own, around = matrix[rows], (average @ matrix).tocsr()
    count = max(len(rows), 1)
    product = _column_sums(own.multiply(around).tocsr()) / count
    covariance = product - _column_sums(own) * _column_sums(around) / count**2
    variance = _variance(own)
    varies = variance > 1e-12 * max(variance.max(initial=0.0), 1e-300)
    return np.where(varies, covariance / np.where(varies, variance, 1.0), 0.0)


def gene_weights(
    slides: Sequence[Expression | None],
    scale_power: float,
    morans: np.ndarray | None = None,
    morans_i_power: float = 0.0,
    holders: Holders = None,
) -> np.ndarray:
    """Weights of genes by their variance and their spatial autocorrelation.

        w_g = c * s_g^(-scale_power) * max(I_g, 0.01)^morans_i_power

    with s_g the standard deviation of a gene within slides, which have equal weight, and I_g its
    Moran's I. The constant c brings the mean variance of weighted genes to 1. Scale power 0 leaves
    genes as they are, 1 gives each the same variance, and 0.5 is Pareto scaling. s_g is at least a
    tenth of the root mean square over genes.

    Args:
        slides: expression of the same G genes.
        scale_power: 0 to 1.
        morans: Moran's I (G,); without it the last factor is 1.
        morans_i_power: 0 to 1.
        holders: of the slides, where ranks divide them.

    Returns:
        (G,) float32; ones if no gene varies.
    """
    found = of_each(slides, lambda slide: _variance(slide.matrix), holders)
    variance = np.maximum(sum(found) / len(slides), 0.0)
    typical = variance.mean()
    if typical == 0:
        return np.ones(len(variance), dtype=np.float32)
    weight = np.maximum(variance, 0.01 * typical) ** (-scale_power / 2)
    if morans is not None:
        weight = weight * np.maximum(morans, _MIN_MORANS_I) ** morans_i_power
    return (weight / np.sqrt((weight**2 * variance).mean())).astype(np.float32)


def _take_columns(matrix: sparse.csr_matrix, own: Genes, wanted: Genes) -> sparse.csr_matrix:
    return _place_columns(matrix, _columns_of(own, wanted), len(wanted))


def _columns_of(own: Genes, wanted: Genes) -> np.ndarray:
    """For each own gene its number among those wanted, or -1."""
    target = {str(g): j for j, g in enumerate(wanted)}
    if len(target) != len(wanted):
        raise ValueError(f"genes has {len(wanted) - len(target)} repeated names, expected unique")
    return np.array([target.get(str(g), -1) for g in own], dtype=np.int64)


def _place_columns(matrix: sparse.csr_matrix, column: np.ndarray, width: int) -> sparse.csr_matrix:
    present = np.flatnonzero(column >= 0)
    taken = take_columns(matrix, present)
    taken = sparse.csr_matrix(
        (taken.data, column[present].astype(taken.indices.dtype)[taken.indices], taken.indptr),
        shape=(matrix.shape[0], width),
    )
    taken.sort_indices()
    return taken


def _weighted(matrix: sparse.csr_matrix, weight: ArrayLike | None) -> sparse.csr_matrix:
    if weight is None:
        return matrix
    data = matrix.data * np.asarray(weight, dtype=np.float32)[matrix.indices]
    return sparse.csr_matrix((data, matrix.indices, matrix.indptr), shape=matrix.shape)


class Expression:
    """Log-normalised expression of one slide, returned as centred dense rows.

        x_ig = y_ig - mean_i y_ig

    The mean runs over cells with counts. Cells without counts and missing genes become zero, the
    mean cell. Uncentred, they would look like a cell in which every gene is off.

    Args:
        matrix: log-normalised values (n, G), float32 CSR.
        genes: names of its G columns.
        empty: True for cells without counts (n,); none if left out.
        mix: sparse (n, n) with row sums 1; each returned cell is this average of cells. Left out,
            it is the cell itself.
    """

    def __init__(
        self,
        matrix: ArrayLike | sparse.spmatrix,
        genes: Genes,
        empty: ArrayLike | None = None,
        mix: sparse.csr_matrix | None = None,
    ):
        self.matrix = sparse.csr_matrix(matrix)
        self.genes = [str(g) for g in genes]
        n, num_genes = self.matrix.shape
        if num_genes != len(self.genes):
            raise ValueError(f"matrix has {num_genes} columns but {len(self.genes)} genes named")
        self.empty = np.zeros(n, dtype=bool) if empty is None else np.asarray(empty, dtype=bool)
        filled = max(int((~self.empty).sum()), 1)
        self.mean = (_column_sums(self.matrix) / filled).astype(np.float32)
        self.mix = mix
        self.resident: dict[Any, Any] = {}  # by device, see :mod:`ipar_sparse.data.resident`

    @classmethod
    def from_slide(
        cls, slide: Slide, genes: Genes, target_sum: float = 1e4, weight: ArrayLike | None = None
    ) -> Expression:
        """The expression of some genes of a slide, in their order.

        Args:
            slide: the slide.
            genes: names of G genes.
            target_sum: total that raw counts are scaled to before the logarithm.
            weight: factor of each gene after the logarithm (G,); 1 if left out.

        Raises:
            UserError: if the slide has none of the genes, or no expression.
        """
        matrix = normalized_expression(slide, genes, target_sum)
        match_genes([slide], genes)
        return cls(_weighted(matrix, weight), genes, slide.empty)

    def weighted(self, weight: ArrayLike) -> Expression:
        """The same cells, each gene multiplied by its weight (G,)."""
        return Expression(_weighted(self.matrix, weight), self.genes, self.empty)

    def smoothed(self, neighbors: np.ndarray) -> Expression:
        """The same slide, every cell averaged with its neighbours.

            x_i <- 1/2 x_i + 1/2 mean_j x_j,  j in neighbors(i) with counts

        Args:
            neighbors: row numbers (n, k), none of them the cell itself.
        """
        n = self.shape[0]
        share = (~self.empty)[neighbors].astype(np.float32)
        count = share.sum(axis=1, keepdims=True)
        share *= 0.5 / np.maximum(count, 1)
        own = np.where(count > 0, 0.5, 1.0).astype(np.float32)
        columns = np.concatenate([np.arange(n)[:, None], neighbors], axis=1)
        values = np.concatenate([own, share], axis=1)
        starts = np.arange(n + 1) * columns.shape[1]
        mix = sparse.csr_matrix((values.ravel(), columns.ravel(), starts), shape=(n, n))
        smoothed = copy(self)
        smoothed.mix, smoothed.resident = mix, {}
        return smoothed

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes (n, G)."""
        return self.matrix.shape

    def rows(self, index: ArrayLike | None = None) -> np.ndarray:
        """Dense, centred rows; memory m * G * 4 bytes.

        Args:
            index: row numbers (m,); all n if left out.

        Returns:
            (m, G) float32.
        """
        index = np.arange(self.shape[0]) if index is None else np.asarray(index)
        taken = self.matrix[index] if self.mix is None else self.mix[index] @ self.matrix
        dense = taken.toarray()
        dense -= self.mean
        dense[self.empty[index]] = 0.0
        return dense

    def __repr__(self) -> str:
        return f"Expression({self.shape[0]} cells, {self.shape[1]} genes)"
