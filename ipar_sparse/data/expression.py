"""From counts to the encoder's input, without ever densifying a slide."""

import numpy as np
from scipy import sparse
from scipy.stats import rankdata

from ..errors import UserError

_LEAST_MORAN = 0.01  # what noise reaches on a thousand cells


def log_normalize(counts, target_sum=1e4, totals=None):
    """Scale every cell to the same total, then take log(1 + x).

        y_ig = log(1 + target_sum * c_ig / sum_g c_ig)

    Args:
        counts: (n, G) sparse matrix of non-negative counts; left unchanged.
        target_sum: total every cell is scaled to.
        totals: (n,) library sizes; the row sums of `counts` by default. Give them when `counts`
            holds only some of the genes.

    Returns:
        (n, G) float32 CSR with the sparsity of `counts`; cells with no counts stay zero.
    """
    counts = sparse.csr_matrix(counts)
    if totals is None:
        totals = counts.sum(axis=1)
    totals = np.asarray(totals, dtype=np.float64).ravel()
    scale = np.divide(target_sum, totals, out=np.zeros_like(totals), where=totals > 0)
    data = counts.data.astype(np.float32)
    data *= np.repeat(scale.astype(np.float32), np.diff(counts.indptr))
    np.log1p(data, out=data)
    return sparse.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)


def match_genes(slides, genes=None):
    """Genes to use over several slides, matched by name.

    Args:
        slides: list of `Slide`.
        genes: the genes of a trained run; without it, the genes all slides share.

    Returns:
        genes: the shared genes in the first slide's order, or the given list itself.
        missing: with `genes`, those that some slide lacks; without, those of the first slide that
            some other slide lacks.

    Raises:
        UserError: if some slide has none of the genes, or no gene is on all slides.
    """
    wanted = [str(g) for g in (slides[0].genes if genes is None else genes)]
    partner = slides[0].name if genes is None else "the trained model"
    shared = set(wanted)
    for slide in slides:
        own = {str(g) for g in slide.genes}
        if not own & set(wanted):
            raise UserError(_no_shared_genes(partner, wanted, slide))
        shared &= own
    if genes is None and not shared:
        names = ", ".join(slide.name for slide in slides)
        raise UserError(
            f"no gene is present in all of {names}, though some pairs share genes; "
            "leave out the slide that was measured with another panel"
        )
    missing = [g for g in wanted if g not in shared]
    return [g for g in wanted if g in shared] if genes is None else wanted, missing


def _no_shared_genes(partner, wanted, slide):
    own = [str(g) for g in slide.genes]
    message = (
        f"{slide.name}: shares no gene with {partner} "
        f"(genes such as {', '.join(own[:3]) or 'none'} against {', '.join(wanted[:3]) or 'none'})"
    )
    folded = {g.lower(): g for g in wanted}
    same = next((g for g in own if g.lower() in folded), None)
    if same is not None:
        return f"{message}; {same} and {folded[same.lower()]} differ in letter case: make it equal"
    stems = {g.split(".")[0]: g for g in wanted}
    same = next((g for g in own if g.split(".")[0] in stems), None)
    if same is not None:
        return f"{message}; {same} differs in its version suffix: strip it from var_names"
    return f"{message}; put the same kind of gene name (symbols or Ensembl ids) into var_names"


def select_genes(slides, genes, n_top):
    """The genes that vary most in log-normalised expression.

    A gene's score is the rank of its variance, averaged over slides, so that no slide dominates.
    On breast-tumour sections across donors this keeps more of the spatial neighbourhoods (0.157 of
    15 neighbours with 2000 genes) than variance standardised by mean, by bins (0.136) or by a
    fitted trend of the counts (0.136), and as many as the variance of Pearson residuals (0.157),
    which need counts.

    Args:
        slides: training slides, raw or log-normalised.
        genes: candidate genes, present on every slide.
        n_top: how many to keep; all are kept if there are no more than that.

    Returns:
        The chosen genes, most variable first. Ties keep the order of `genes`.
    """
    if n_top < 1:
        raise ValueError(f"n_top is {n_top}, expected at least 1")
    score = sum(rankdata(-_variance(normalized_expression(s, genes))) for s in slides)
    chosen = np.argsort(score, kind="stable")[:n_top]
    return [str(genes[i]) for i in chosen]


def _column_sums(x, power=1, block=1 << 22):
    # scipy adds float32 columns in float32, which loses digits over a million rows
    total = np.zeros(x.shape[1])
    for start in range(0, len(x.data), block):
        part = slice(start, start + block)
        values = x.data[part].astype(np.float64) ** power
        total += np.bincount(x.indices[part], weights=values, minlength=x.shape[1])
    return total


def _variance(x):
    n = max(x.shape[0], 1)
    return _column_sums(x, power=2) / n - (_column_sums(x) / n) ** 2


def normalized_expression(slide, genes, target_sum=1e4):
    """Log-normalised expression of some genes; library sizes count all genes of the slide.

    Args:
        slide: a `Slide` with expression.
        genes: G gene names; those the slide lacks become zero columns.
        target_sum: total that raw counts are scaled to.

    Returns:
        (n, G) float32 CSR.
    """
    if slide.expression is None:
        raise UserError(f"{slide.name}: has no expression, only an embedding")
    matrix = take_genes(slide, genes)
    if slide.normalized:
        return matrix
    return log_normalize(matrix, target_sum, totals=slide.expression.sum(axis=1))


def take_genes(slide, genes):
    """A slide's expression of some genes, as it is.

    Args:
        slide: a `Slide` with expression.
        genes: G gene names; those the slide lacks become zero columns.

    Returns:
        (n, G) CSR.
    """
    return _take_columns(slide.expression, slide.genes, genes)


def median_total(slides):
    """What a cell of these slides has in counts: the median over slides of their median cell's.

    Args:
        slides: list of `Slide`; those that came log-normalised, and cells without counts, say
            nothing.

    Returns:
        The total, or 1e4 where no slide has counts.
    """
    medians = []
    for slide in slides:
        if slide.normalized or slide.expression is None:
            continue
        totals = np.asarray(slide.expression.sum(axis=1), dtype=np.float64).ravel()
        if (totals > 0).any():
            medians.append(np.median(totals[totals > 0]))
    return float(np.median(medians)) if medians else 1e4


def morans_i(matrix, neighbors, rows=None):
    """Moran's I of every gene: how alike it is in a cell and in the cells around.

        I_g = cov_i(x_ig, mean_j x_jg) / var_i(x_ig),  j in neighbors(i)

    Args:
        matrix: (n, G) CSR.
        neighbors: (n, k) row numbers.
        rows: of the cells whose surroundings are looked at; all by default.

    Returns:
        (G,) float64; 0 where a gene does not vary.
    """
    n, k = neighbors.shape
    rows = np.arange(n) if rows is None else np.asarray(rows)
    share = sparse.csr_matrix(
        (np.full(len(rows) * k, 1 / k), neighbors[rows].ravel(), np.arange(len(rows) + 1) * k),
        shape=(len(rows), n),
    )
    own, around = matrix[rows], (share @ matrix).tocsr()
    count = max(len(rows), 1)
    product = _column_sums(own.multiply(around).tocsr()) / count
    covariance = product - _column_sums(own) * _column_sums(around) / count**2
    variance = _variance(own)
    some = variance > 1e-12 * max(variance.max(initial=0.0), 1e-300)
    return np.where(some, covariance / np.where(some, variance, 1.0), 0.0)


def gene_weights(slides, power, morans=None, spatial_power=0.0):
    """Weights that bring genes of large and of small variance nearer to one another, and those
    that tell of the place forward.

        w_g = c * s_g^(-power) * max(I_g, 0.01)^spatial_power

    with s_g the standard deviation of a gene within slides, each slide counted alike, and c such
    that the weighted genes have a mean variance of one. Power 0 leaves genes as they are, 1 gives
    each the same variance, 0.5 is Pareto scaling. Genes that hardly vary are weighted as if they
    had a tenth of the root mean square of s.

    Args:
        slides: list of `Expression` of the same G genes.
        power: 0 to 1.
        morans: (G,) Moran's I, for the second factor.
        spatial_power: 0 to 1.

    Returns:
        (G,) float32; ones if nothing varies.
    """
    variance = np.maximum(sum(_variance(slide.matrix) for slide in slides) / len(slides), 0.0)
    typical = variance.mean()
    if typical == 0:
        return np.ones(len(variance), dtype=np.float32)
    weight = np.maximum(variance, 0.01 * typical) ** (-power / 2)
    if morans is not None:
        weight = weight * np.maximum(morans, _LEAST_MORAN) ** spatial_power
    return (weight / np.sqrt((weight**2 * variance).mean())).astype(np.float32)


def _take_columns(matrix, own, wanted):
    target = {str(g): j for j, g in enumerate(wanted)}
    if len(target) != len(wanted):
        raise ValueError(f"genes has {len(wanted) - len(target)} repeated names, expected unique")
    place = np.array([target.get(str(g), -1) for g in own], dtype=np.int64)
    keep = np.flatnonzero(place >= 0)
    taken = matrix[:, keep]
    taken = sparse.csr_matrix(
        (taken.data, place[keep].astype(taken.indices.dtype)[taken.indices], taken.indptr),
        shape=(matrix.shape[0], len(wanted)),
    )
    taken.sort_indices()
    return taken


def _weighted(matrix, weight):
    if weight is None:
        return matrix
    data = matrix.data * np.asarray(weight, dtype=np.float32)[matrix.indices]
    return sparse.csr_matrix((data, matrix.indices, matrix.indptr), shape=matrix.shape)


class Expression:
    """One slide's log-normalised expression of a gene list, handed out as centred dense rows.

        x_ig = y_ig - mean_i y_ig

    The mean runs over the cells that have counts. Empty cells and missing genes come out as zero,
    the average cell, rather than as a cell that switched every gene off.

    Args:
        matrix: (n, G) float32 CSR of log-normalised values.
        genes: the G gene names of its columns.
        empty: (n,) bool, cells without counts; none by default.
        mix: (n, n) sparse, rows adding up to one: every cell handed out is this average of
            cells; each by itself by default.
    """

    def __init__(self, matrix, genes, empty=None, mix=None):
        self.matrix = sparse.csr_matrix(matrix)
        self.genes = [str(g) for g in genes]
        n, num_genes = self.matrix.shape
        if num_genes != len(self.genes):
            raise ValueError(f"matrix has {num_genes} columns but {len(self.genes)} genes named")
        self.empty = np.zeros(n, dtype=bool) if empty is None else np.asarray(empty, dtype=bool)
        filled = max(int((~self.empty).sum()), 1)
        self.mean = (_column_sums(self.matrix) / filled).astype(np.float32)
        self.mix = mix

    @classmethod
    def from_slide(cls, slide, genes, target_sum=1e4, weight=None):
        """Restrict a slide to `genes`, in that order.

        Args:
            slide: with expression.
            genes: G names.
            target_sum: total that raw counts are scaled to before the logarithm.
            weight: (G,) factor of each gene after it; none by default.

        Raises:
            UserError: if the slide has none of them, or no expression.
        """
        matrix = normalized_expression(slide, genes, target_sum)
        match_genes([slide], genes)
        return cls(_weighted(matrix, weight), genes, slide.empty)

    def smoothed(self, neighbors):
        """The same slide with every cell averaged half and half with other cells of it.

            x_i <- 1/2 x_i + 1/2 mean_j x_j,  j in neighbors(i) with counts

        Args:
            neighbors: (n, k) row numbers, none of them the cell itself.
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
        return Expression(self.matrix, self.genes, self.empty, mix)

    @property
    def shape(self):
        return self.matrix.shape

    def rows(self, index=None):
        """Dense, centred rows.

        Args:
            index: (m,) row numbers, or None for all rows: then memory is n * G * 4 bytes.

        Returns:
            (m, G) float32.
        """
        index = np.arange(self.shape[0]) if index is None else np.asarray(index)
        taken = self.matrix[index] if self.mix is None else self.mix[index] @ self.matrix
        dense = taken.toarray()
        dense -= self.mean
        dense[self.empty[index]] = 0.0
        return dense

    def __repr__(self):
        return f"Expression({self.shape[0]} cells, {self.shape[1]} genes)"
