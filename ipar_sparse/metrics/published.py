"""The measures that papers on this task report, as they define them.

Both layouts are first centred and divided by their root-mean-square radius, since a prediction has
no scale of its own. On large slides values come from a stated sample; ``<name>_se`` is then its
standard error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import pdist
from scipy.stats import rankdata
from torch import Tensor

from ..geometry.alignment import two_layouts
from ..geometry.neighborhoods import sample_pairs, unit_gauge

_EXACT_CELLS = 1500  # up to which all pairs are used
_COLUMNS = 5_000  # other cells that the distances of one cell are taken to, at most
_BLOCK = 1 << 22  # distances held at once


def cell_spearman(
    pred: Tensor | ArrayLike,
    true: Tensor | ArrayLike,
    *,
    seed: int = 0,
    num_rows: int = 500,
    max_exact: int = 500,
) -> dict[str, float]:
    r"""Spearman correlation of each cell's distances to all others, over cells.

    .. math::
        \rho_i = \mathrm{Spearman}_{j \ne i}
            \bigl( \|x_i - x_j\|,\, \|y_i - y_j\| \bigr)

    It is another number than the Spearman correlation of all pairs of cells. A cell whose
    distances are all equal counts as 0. Beyond ``max_exact`` cells, ``num_rows`` cells are drawn,
    and their distances are taken to 5,000 others at most.

    Args:
        pred: predicted layout (n, 2), n >= 3.
        true: true layout (n, 2).
        seed: of the drawn cells.
        num_rows: cells drawn.
        max_exact: number of cells up to which all are used.

    Returns:
        ``cell_spearman``, the median, and ``cell_spearman_mean``, each with ``_se`` if sampled.

    Raises:
        ValueError: on layouts that :func:`~ipar_sparse.metrics.layout.evaluate_layout` refuses.
    """
    x, y = (unit_gauge(layout) for layout in two_layouts(pred, true))
    n, rng = len(x), np.random.default_rng([seed, 21])
    sampled = n > max_exact and num_rows < n
    rows = rng.permutation(n)[:num_rows] if sampled else np.arange(n)
    columns = rng.permutation(n)[:_COLUMNS] if sampled and n > _COLUMNS else np.arange(n)
    values = []
    for part in np.array_split(rows, -(-len(rows) * len(columns) // _BLOCK)):
        ranks = []
        for layout in (x, y):
            distance = np.hypot(*(layout[part, None] - layout[columns]).transpose(2, 0, 1))
            # equal distances on a regular grid differ by rounding, which must not decide ranks
            distance = np.round(distance, 10)
            distance[part[:, None] == columns] = -1  # itself has the first rank in both
            rank = rankdata(distance, axis=1)
            present = distance >= 0
            mean = (rank * present).sum(1, keepdims=True) / present.sum(1, keepdims=True)
            ranks.append((rank - mean) * present)
        norm = np.sqrt(np.square(ranks[0]).sum(1) * np.square(ranks[1]).sum(1))
        values.append((ranks[0] * ranks[1]).sum(1) / np.where(norm > 0, norm, 1.0))
    rho = np.sort(np.concatenate(values))
    found = {"cell_spearman": float(np.median(rho)), "cell_spearman_mean": float(rho.mean())}
    if sampled:
        m = len(rho)
        half = np.sqrt(m) / 2  # order statistics one standard error of a median away
        low, high = rho[[int(m / 2 - half), int(min(m / 2 + half, m - 1))]]
        share = np.sqrt(1 - m / n)
        found["cell_spearman_se"] = float((high - low) / 2 * share)
        found["cell_spearman_mean_se"] = float(rho.std(ddof=1) / np.sqrt(m) * share)
    return found


def contact_f1(
    pred: Tensor | ArrayLike,
    true: Tensor | ArrayLike,
    *,
    quantiles: Sequence[float] = (0.01, 0.1),
    seed: int = 0,
    num_pairs: int = 200_000,
    max_exact: int = _EXACT_CELLS,
) -> dict[str, float]:
    r"""F1 of predicted against true contacts.

    .. math::
        C = \{ i < j : 0 < \|y_i - y_j\| < q\text{-quantile of all true distances} \}, \qquad
        F_1 = \frac{2\, |C \cap \hat C|}{|C| + |\hat C|}

    with :math:`\hat C` the same of the predicted layout. Chance is about q.

    Args:
        pred: predicted layout (n, 2), n >= 3.
        true: true layout (n, 2).
        quantiles: q, each in (0, 1).
        seed: of the drawn pairs.
        num_pairs: pairs drawn where n > ``max_exact``.
        max_exact: number of cells up to which all pairs are used.

    Returns:
        ``contact_f1@q`` for each q, with ``_se`` if sampled: that of a share of the drawn contacts.

    Raises:
        ValueError: on layouts that :func:`~ipar_sparse.metrics.layout.evaluate_layout` refuses.
    """
    x, y = (unit_gauge(layout) for layout in two_layouts(pred, true))
    sampled = len(x) > max_exact
    if sampled:
        first, second = sample_pairs(len(x), num_pairs, np.random.default_rng([seed, 22]))
        d, delta = (np.hypot(*(layout[first] - layout[second]).T) for layout in (x, y))
    else:
        d, delta = pdist(x), pdist(y)
    d, delta = np.round(d, 10), np.round(delta, 10)
    found = {}
    for q in quantiles:
        predicted, actual = ((0 < one) & (one < np.quantile(one, q)) for one in (d, delta))
        total = int(predicted.sum() + actual.sum())
        f1 = 2 * int((predicted & actual).sum()) / total if total else 0.0
        found[f"contact_f1@{q:g}"] = f1
        if sampled:
            found[f"contact_f1@{q:g}_se"] = float(np.sqrt(f1 * (1 - f1) / max(total / 2, 1)))
    return found


def rssd(
    pred: Tensor | ArrayLike, true: Tensor | ArrayLike, classes: ArrayLike | None = None
) -> dict[str, float]:
    r"""Root of the summed squared distances after a rotation alone.

    .. math::
        \mathrm{rssd} = \min_{R^\top R = I,\, \det R = 1}
            \sqrt{\textstyle\sum_i \|x_i R - y_i\|^2}

    A mirrored map scores badly, and the value grows with the square root of the number of cells.
    ``rssd_by_class`` centres and rotates the cells of each class alone, and sums over classes.

    Args:
        pred: predicted layout (n, 2), n >= 3.
        true: true layout (n, 2).
        classes: label of each cell (n,).

    Returns:
        ``rssd``, and ``rssd_by_class`` where there are labels.

    Raises:
        ValueError: on layouts that :func:`~ipar_sparse.metrics.layout.evaluate_layout` refuses.
    """
    x, y = (unit_gauge(layout) for layout in two_layouts(pred, true))
    found = {"rssd": _rotated_distance(x, y)}
    if classes is not None:
        labels = np.asarray(classes)
        members = [labels.astype(str) == label for label in np.unique(labels.astype(str))]
        found["rssd_by_class"] = float(sum(_rotated_distance(x[own], y[own]) for own in members))
    return found


def published_metrics(
    pred: Tensor | ArrayLike, true: Tensor | ArrayLike, classes: ArrayLike | None = None
) -> dict[str, float]:
    """All measures of this module.

    Args:
        pred: predicted layout (n, 2).
        true: true layout (n, 2).
        classes: label of each cell (n,), for ``rssd_by_class``.
    """
    return {**cell_spearman(pred, true), **contact_f1(pred, true), **rssd(pred, true, classes)}


def _rotated_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Root of the summed squared distances (Kabsch 1976: centred, rotated, not mirrored)."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    u, _, vt = np.linalg.svd(x.T @ y)
    turn = np.diag([1.0, np.sign(np.linalg.det(u @ vt)) or 1.0])
    return float(np.sqrt(np.square(x @ (u @ turn @ vt) - y).sum()))
