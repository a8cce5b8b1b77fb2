"""The cells of a slide as another assay would measure them, dissociated."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from .simulation import TISSUES, simulate
from .slide import Slide

FOREIGN, DOUBLET = "foreign", "doublet"
"""obs columns that flag cells from outside the tissue, and pairs of cells taken for one."""


def dissociate(
    slide: Slide,
    *,
    depth: float = 0.3,
    dropout: float = 0.1,
    batch: float = 0.5,
    panel: int | None = None,
    doublets: float = 0.05,
    foreign: float = 0.0,
    seed: int = 0,
) -> Slide:
    r"""Cells of a simulated slide, measured again without positions.

    A count c of gene g becomes

    .. math::
        c' \sim \mathrm{Poisson}(\text{depth} \cdot b_g \cdot c) \cdot
        \mathrm{Bernoulli}(1 - \text{dropout}), \qquad \log b_g \sim N(0, \text{batch}^2)

    after each doublet has been given the counts of another cell, too. Cells from outside come from
    another tissue, whose genes have the same names.

    Args:
        slide: n cells with counts; ``obs["tissue_x"]`` and ``obs["tissue_y"]``, their true places,
            are kept, and are NaN for cells from outside.
        depth: counts in units of those of the slide.
        dropout: probability that a count is lost whole.
        batch: standard deviation of the log factor of each gene.
        panel: number of genes, drawn at random; all if left out.
        doublets: share of cells to which another cell is added.
        foreign: cells from outside, as a share of all cells of the result.
        seed: of everything random.

    Returns:
        Cells in random order, with obs columns ``foreign`` and ``doublet``.

    Raises:
        ValueError: a share outside [0, 1), a depth that is not positive, a negative batch effect,
            or a panel of no genes or more than there are.
    """
    shares = {"dropout": dropout, "doublets": doublets, "foreign": foreign}
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}, expected a share of at least 0 and below 1")
    if depth <= 0 or batch < 0:
        raise ValueError(f"depth {depth} and batch {batch}, expected above 0 and not below 0")
    num_genes = len(slide.genes)
    if panel is not None and not 1 <= panel <= num_genes:
        raise ValueError(f"panel is {panel}, expected 1 to {num_genes} genes")
    rng = np.random.default_rng([seed, slide.num_cells, num_genes])
    counts, outside = slide.expression, round(slide.num_cells * foreign / (1 - foreign))
    names = slide.cell_names
    obs = {name: np.asarray(values) for name, values in slide.obs.items()}
    if outside:
        other = _another_tissue(slide, outside, seed)
        counts = sparse.vstack([counts, other.expression], format="csr")
        names = np.concatenate([names, [f"outside_{i + 1:07d}" for i in range(outside)]])
        obs = {name: _extended(values, outside) for name, values in obs.items()}
    n = len(names)
    obs[FOREIGN], obs[DOUBLET] = np.arange(n) >= slide.num_cells, rng.random(n) < doublets
    pair = np.flatnonzero(obs[DOUBLET])
    partner = sparse.csr_matrix(
        (np.ones(len(pair), np.float32), (pair, rng.integers(0, n, len(pair)))), shape=(n, n)
    )
    counts = _measured((counts + partner @ counts).tocsr(), depth, dropout, batch, rng)
    genes = np.sort(rng.choice(num_genes, panel or num_genes, replace=False))
    order = rng.permutation(n)
    counts = counts[order][:, genes]
    return Slide(
        name=f"{slide.name}_cells",
        expression=counts,
        genes=slide.genes[genes],
        cell_names=names[order],
        empty=np.diff(counts.indptr) == 0,
        obs={name: values[order] for name, values in obs.items()},
    )


def _measured(
    counts: sparse.csr_matrix, depth: float, dropout: float, batch: float, rng: np.random.Generator
) -> sparse.csr_matrix:
    factor = depth * np.exp(rng.normal(0, batch, counts.shape[1]))
    found = rng.poisson(counts.data * factor[counts.indices])
    found[rng.random(len(found)) < dropout] = 0
    measured = sparse.csr_matrix(
        (found.astype(np.float32), counts.indices, counts.indptr), shape=counts.shape
    )
    measured.eliminate_zeros()
    return measured


def _another_tissue(slide: Slide, cells: int, seed: int) -> Slide:
    """Cells of a tissue that has other gene programs than any that is simulated for training."""
    # a tissue depends on its kind and number of genes: one more gene is another tissue
    num_genes = len(slide.genes)
    kind = list(TISSUES)[seed % len(TISSUES)]
    (other,) = simulate(kind, slides=1, spots=cells, genes=num_genes + 1, seed=seed + 1)
    return other.with_genes(other.expression[:, :num_genes].tocsr(), slide.genes)


def _extended(values: np.ndarray, rows: int) -> np.ndarray:
    kind = values.dtype.kind
    fill = np.full(rows, np.nan if kind == "f" else "none" if kind in "OU" else 0)
    return np.concatenate([values, fill.astype(object if kind == "O" else fill.dtype)])
