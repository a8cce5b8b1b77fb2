"""Linear components of expression: those of largest variance, and those that tell of the place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.linalg
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from ..data.expression import Expression
from ..graph import knn

_ROWS = 8192  # cells of dense expression at once
_CELLS = 20_000  # a slide; more do not move the leading components
_DENSE_GENES = 4096  # beyond, the covariance of genes is not formed
_AROUND = 15  # nearest cells of the tissue that a cell is compared with
_RIDGE = 0.5  # of the mean variance of the principal components
_RANGE = 1e-4, 0.999  # of correlations; none is told from 0 or from 1


def spatial_axes(
    slides: Sequence[Expression], positions: Sequence, count: int
) -> tuple[Tensor, float]:
    r"""Directions of expression along which a cell is like the cells around it.

    Of all directions in the leading principal components, those that maximise

    .. math::
        \mu = \frac{v^\top S v}{v^\top (C + \lambda I) v}, \qquad
        S = \operatorname{cov}\Bigl(x_i, \tfrac1k \textstyle\sum_{j \in N_k(i)} x_j\Bigr), \quad
        C = \operatorname{cov}(x_i)

    (spatially constrained components, Wartenberg 1985; Dray, Saïd and Débias 2008; here within
    slides, relative to the variance). If expression is a field of the place plus noise of each
    cell, mu is the field's share of the variance, and each direction, scaled to unit variance, is
    multiplied by its signal-to-noise ratio sqrt(mu / (1 - mu)): distances between cells then count
    what the places differ in by how well it is measured.

    Args:
        slides: mean-centred expression of the same genes.
        positions: (n, 2) of each slide.
        count: components, at most as many as genes.

    Returns:
        Axes (genes, count), largest mu first, with these factors, the largest loading of each
        positive, and the factor that gives the components of a cell, all together, unit variance.
    """
    axes = principal_axes(slides, count)[0].double().numpy()
    size = axes.shape[1]
    variance, alike = np.zeros((size, size)), np.zeros((size, size))
    for number, (slide, pos) in enumerate(zip(slides, positions, strict=True)):
        n = slide.shape[0]
        if n < 2:
            continue
        around = knn(torch.from_numpy(np.asarray(pos, dtype=np.float64)), min(_AROUND, n - 1))
        rows = np.sort(np.random.default_rng([number, 7]).permutation(n)[:_CELLS])
        near = around.index.numpy()[rows]
        needed = np.unique(np.concatenate([rows, near.ravel()]))
        place = project(slide, axes, needed)
        own, beside = place[np.searchsorted(needed, rows)], np.zeros((len(rows), size))
        for column in near.T:
            beside += place[np.searchsorted(needed, column)] / near.shape[1]
        own, beside = own - own.mean(0), beside - beside.mean(0)
        product = own.T @ beside / len(rows) / len(slides)
        alike += (product + product.T) / 2
        variance += own.T @ own / len(rows) / len(slides)
    mean = max(np.trace(variance) / size, 1e-12)
    mu, turn = scipy.linalg.eigh(alike, variance + _RIDGE * mean * np.eye(size))
    mu, turn = mu[::-1].clip(*_RANGE), turn[:, ::-1]
    turn = turn * np.sqrt(mu / (1 - mu))
    power = float(((turn.T @ variance) * turn.T).sum())
    return svd_flip(axes @ turn), 1.0 / math.sqrt(power) if power > 0 else 1.0


def principal_axes(slides: Sequence[Expression], count: int) -> tuple[Tensor, float]:
    """Principal components of the expression of several slides, each slide counted alike.

    Args:
        slides: mean-centred expression of the same genes.
        count: components, at most as many as genes.

    Returns:
        Axes (genes, count), largest variance first, the largest loading of each positive, and
        the factor that gives the components of a cell, all together, unit variance.
    """
    samples = []
    for number, slide in enumerate(slides):
        rng = np.random.default_rng([number, 7])
        samples.append((slide, rng.permutation(slide.shape[0])[:_CELLS]))
    genes = slides[0].shape[1]
    count = min(count, genes)
    if genes <= _DENSE_GENES or count > genes // 4:
        last = genes - count, genes - 1
        variance, axes = scipy.linalg.eigh(_covariance_matrix(samples), subset_by_index=last)
    else:
        operator = LinearOperator(
            (genes, genes), matvec=lambda v: _covariance_product(samples, v), dtype=np.float64
        )
        variance, axes = eigsh(operator, k=count, v0=np.ones(genes))
    variance, axes = variance[::-1], axes[:, ::-1]
    power = float(np.clip(variance, 0.0, None).sum())
    scale = 1.0 / math.sqrt(power) if power > 0 else 1.0
    return svd_flip(axes), scale


def project(expression: Expression, axes, rows=None) -> np.ndarray:
    """Cells along some axes (m, r), never all of them dense at once.

    Args:
        expression: n cells.
        axes: (genes, r).
        rows: (m,) row numbers; all n by default.
    """
    axes = np.asarray(axes)
    rows = np.arange(expression.shape[0]) if rows is None else rows
    blocks = np.array_split(rows, len(rows) // _ROWS + 1)
    return np.concatenate([expression.rows(block) @ axes for block in blocks])


def svd_flip(axes: np.ndarray) -> Tensor:
    """Axes whose largest loadings are positive; an eigenvector's sign is nobody's choice."""
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    return torch.from_numpy(np.ascontiguousarray(axes)).float()


def _covariance_matrix(samples) -> np.ndarray:
    total = 0.0
    for slide, cells in samples:
        for rows in np.array_split(cells, max(1, len(cells) // _ROWS)):
            x = slide.rows(rows).astype(np.float64)
            total = total + x.T @ x / len(cells)
    return total / len(samples)


def _covariance_product(samples, v: np.ndarray) -> np.ndarray:
    """The covariance matrix times a vector, without either of the dense matrices."""
    total = np.zeros(v.size)
    for slide, cells in samples:
        counted = slide.matrix[cells[~slide.empty[cells]]]
        mean = slide.mean.astype(np.float64)
        along = counted @ v.ravel() - mean @ v.ravel()
        total += (counted.T @ along - mean * along.sum()) / len(cells)
    return total / len(samples)
