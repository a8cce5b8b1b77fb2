"""Linear components of expression: of largest variance, or of largest spatial autocorrelation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..data.expression import Expression
from ..data.held import Holders, added, held_here
from ..data.resident import resident
from ..distributed import largest
from ..geometry.gauge import svd_flip
from ..graph import knn

DENSE_GENES = 4096  # with more genes their covariance matrix is not formed
_ROWS = 8192  # cells of dense expression in memory at once
_CELLS = 20_000  # cells used of a slide; more do not change the leading components
_MU_RANGE = 1e-4, 0.999  # keeps mu / (1 - mu) finite and above zero


def spatial_axes(
    slides: Sequence[Expression | None],
    positions: Sequence[Tensor | ArrayLike],
    count: int,
    *,
    neighbors: int = 15,
    ridge: float = 0.5,
    device: torch.device | str = "cpu",
    holders: Holders = None,
) -> tuple[Tensor, float]:
    r"""Directions of expression in which a cell resembles its spatial neighbours.

    Of all directions in the leading principal components, those that maximise

    .. math::
        \mu = \frac{v^\top S v}{v^\top (C + \lambda I) v}, \qquad
        S = \operatorname{cov}\Bigl(x_i, \tfrac1k \textstyle\sum_{j \in N_k(i)} x_j\Bigr), \quad
        C = \operatorname{cov}(x_i)

    within slides. These are spatially constrained components (Wartenberg 1985; Dray, Saïd and
    Débias 2008), relative to the variance. If expression is a smooth function of the place plus
    noise, :math:`\mu` is the share of variance that the place explains. Each direction is scaled
    to variance 1, then multiplied by its signal-to-noise ratio :math:`\sqrt{\mu / (1 - \mu)}`.

    Args:
        slides: mean-centred expression of the same G genes.
        positions: positions (n, 2) of each slide, any units.
        count: number of components, at most G.
        neighbors: k.
        ridge: :math:`\lambda`, relative to the mean variance of the principal components.
        device: where cells are projected.
        holders: of the slides, where ranks divide them; None stands for those of others.

    Returns:
        Axes (G, count), largest :math:`\mu` first, the largest loading of each positive; and the
        factor that brings the total variance of a cell's components to 1.
    """
    import scipy.linalg  # loads much, for training alone

    device = torch.device(device)
    axes = principal_axes(slides, count, device, holders)[0].double().numpy()
    size = axes.shape[1]
    variance, shared = np.zeros((size, size)), np.zeros((size, size))
    for number in held_here(len(slides), holders):
        slide, pos = slides[number], positions[number]
        n = slide.shape[0]
        if n < 2:
            continue
        place = torch.from_numpy(np.asarray(pos, dtype=np.float64)).to(device)
        cells = np.sort(np.random.default_rng([number, 7]).permutation(n)[:_CELLS])
        near = knn(place, min(neighbors, n - 1)).index[torch.from_numpy(cells).to(device)]
        near = near.cpu().numpy()
        needed = np.unique(np.concatenate([cells, near.ravel()]))
        scores = project(slide, axes, needed, device)
        own, around = scores[np.searchsorted(needed, cells)], np.zeros((len(cells), size))
        for column in near.T:
            around += scores[np.searchsorted(needed, column)] / near.shape[1]
        own, around = own - own.mean(0), around - around.mean(0)
        product = own.T @ around / len(cells) / len(slides)
        shared += (product + product.T) / 2
        variance += own.T @ own / len(cells) / len(slides)
    variance, shared = added(variance, holders), added(shared, holders)
    mean = max(np.trace(variance) / size, 1e-12)
    mu, directions = scipy.linalg.eigh(shared, variance + ridge * mean * np.eye(size))
    mu, directions = mu[::-1].clip(*_MU_RANGE), directions[:, ::-1]
    directions = directions * np.sqrt(mu / (1 - mu))
    total = float(((directions.T @ variance) * directions.T).sum())
    return _fixed_signs(axes @ directions), _to_unit_variance(total)


def principal_axes(
    slides: Sequence[Expression | None],
    count: int,
    device: torch.device | str = "cpu",
    holders: Holders = None,
) -> tuple[Tensor, float]:
    """Principal components of the expression of several slides, which have equal weight.

    Args:
        slides: mean-centred expression of the same G genes.
        count: number of components, at most G.
        device: where products of expression are formed.
        holders: of the slides, where ranks divide them; None stands for those of others.

    Returns:
        Axes (G, count), largest variance first, the largest loading of each positive; and the
        factor that brings the total variance of a cell's components to 1.
    """
    import scipy.linalg
    from scipy.sparse.linalg import LinearOperator, eigsh

    samples = []
    for number in held_here(len(slides), holders):
        slide, rng = slides[number], np.random.default_rng([number, 7])
        samples.append((slide, rng.permutation(slide.shape[0])[:_CELLS]))
    genes = samples[0][0].shape[1] if samples else 0
    genes = genes if holders is None else largest(genes)[0]
    count = min(count, genes)
    if genes <= DENSE_GENES or count > genes // 4:
        own = _covariance_matrix(samples, genes, torch.device(device))
        matrix = added(own, holders) / len(slides)
        if torch.device(device).type == "cuda":
            found = torch.linalg.eigh(torch.from_numpy(matrix).to(device))
            variance, axes = (values[..., -count:].cpu().numpy() for values in found)
        else:
            last = genes - count, genes - 1
            variance, axes = scipy.linalg.eigh(matrix, subset_by_index=last)
    else:

        def product(v: np.ndarray) -> np.ndarray:
            return added(_covariance_product(samples, v), holders) / len(slides)

        operator = LinearOperator((genes, genes), matvec=product, dtype=np.float64)
        variance, axes = eigsh(operator, k=count, v0=np.ones(genes))
    variance, axes = variance[::-1], axes[:, ::-1]
    return _fixed_signs(axes), _to_unit_variance(float(np.clip(variance, 0.0, None).sum()))


def project(
    expression: Expression,
    axes: Tensor | ArrayLike,
    rows: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Scores of cells along axes (m, r), computed in blocks of dense expression.

    Args:
        expression: n cells of G genes.
        axes: (G, r).
        rows: row numbers (m,); all n if left out.
        device: where they are computed.
    """
    axes, device = np.asarray(axes), torch.device(device)
    rows = np.arange(expression.shape[0]) if rows is None else rows
    blocks = np.array_split(rows, len(rows) // _ROWS + 1)
    if device.type != "cuda":
        return np.concatenate([expression.rows(block) @ axes for block in blocks])
    there, along = resident(expression, device), torch.from_numpy(axes).to(device)
    parts = (there.rows(torch.from_numpy(block).to(device)).to(along) for block in blocks)
    return torch.cat([part @ along for part in parts]).cpu().numpy()


def _fixed_signs(axes: np.ndarray) -> Tensor:
    return svd_flip(torch.from_numpy(np.array(axes, order="C"))).float()


def _to_unit_variance(total: float) -> float:
    return 1.0 / math.sqrt(total) if total > 0 else 1.0


def _covariance_matrix(
    samples: list[tuple[Expression, np.ndarray]], genes: int, device: torch.device
) -> np.ndarray:
    """Covariance matrices of the samples (G, G), added up."""
    total = np.zeros((genes, genes))
    for slide, cells in samples:
        for rows in np.array_split(cells, max(1, len(cells) // _ROWS)):
            if device.type == "cuda":
                x = resident(slide, device).rows(torch.from_numpy(rows).to(device)).double()
                total = total + (x.T @ x).cpu().numpy() / len(cells)
            else:
                x = slide.rows(rows).astype(np.float64)
                total = total + x.T @ x / len(cells)
    return total


def _covariance_product(samples: list[tuple[Expression, np.ndarray]], v: np.ndarray) -> np.ndarray:
    """The sum of covariance matrices times a vector; they, and dense expression, are not formed."""
    total = np.zeros(v.size)
    for slide, cells in samples:
        counted = slide.matrix[cells[~slide.empty[cells]]]
        mean = slide.mean.astype(np.float64)
        along = counted @ v.ravel() - mean @ v.ravel()
        total += (counted.T @ along - mean * along.sum()) / len(cells)
    return total
