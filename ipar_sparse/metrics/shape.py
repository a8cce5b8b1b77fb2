"""The shape of a layout: collapse, boundary, density, and movement from recycle to recycle."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.spatial import cKDTree
from torch import Tensor

from ..geometry.neighborhoods import as_layout, sample_pairs, unit_gauge
from .correlation import mean_row_spearman


def collapse_diagnostics(
    pos: Tensor | np.ndarray, *, seed: int = 0, num_pairs: int = 200_000, max_exact: int = 1500
) -> dict[str, float]:
    r"""Whether a layout has collapsed to a line or to a point, measured in the unit-RMS gauge.

    ``lambda_ratio`` is :math:`\lambda_2/\lambda_1` of the coordinate covariance: below 0.01 the
    layout is a line, tissues lie at 0.2 to 0.5, a disc at 1. ``median_distance`` is the median
    pairwise distance: below 0.01 the layout is a point, about 1.2 is healthy. It is exact up to
    ``max_exact`` cells and taken over drawn pairs beyond. Its standard error then is half the
    gap between the order statistics one binomial standard deviation around the median.

    Args:
        pos: layout (n, 2), tensor or array, any units, n >= 1.
        seed: of the drawn pairs.
        num_pairs: pairs to draw.
        max_exact: number of cells up to which all pairs are used.

    Returns:
        ``lambda_ratio``, ``median_distance`` and, where sampled, ``median_distance_se``. The
        first two are 0 for a layout of one point.
    """
    x = unit_gauge(as_layout(pos, min_points=1))
    n = len(x)
    small, large = np.linalg.eigvalsh(x.T @ x / n)
    out = {"lambda_ratio": float(max(small, 0.0) / large) if large > 0 else 0.0}
    if n < 2:
        return {**out, "median_distance": 0.0}
    sampled = n > max_exact
    if sampled:
        first, second = sample_pairs(n, num_pairs, np.random.default_rng([seed, 3]))
    else:
        first, second = np.triu_indices(n, 1)
    distance = np.sqrt(np.square(x[first] - x[second]).sum(axis=1))
    half_width = 0.5 / math.sqrt(len(distance))
    low, median, high = np.quantile(
        distance, [max(0.0, 0.5 - half_width), 0.5, min(1.0, 0.5 + half_width)]
    )
    out["median_distance"] = float(median)
    if sampled:
        out["median_distance_se"] = float((high - low) / 2)
    return out


def boundary_mass(pos: Tensor | np.ndarray) -> float:
    """Fraction of cells in the outer tenth of the layout's radius; large where a ring forms.

    The radius is the 99th percentile of the distances from the centre, so that single outliers
    do not set it. A filled disc has 0.20, a square 0.06, a ring about 1, a single point 0.

    Args:
        pos: layout (n, 2), any units.
    """
    x = unit_gauge(as_layout(pos, min_points=1))
    radius = np.sqrt(np.square(x).sum(axis=1))
    edge = 0.9 * np.quantile(radius, 0.99)
    return float((radius > edge).mean()) if edge > 0 else 0.0


def density_correlation(
    pred: Tensor | np.ndarray, true: Tensor | np.ndarray, *, k: int = 15
) -> float:
    """Spearman correlation of the cells' local densities on two layouts.

    Args:
        pred: predicted layout (n, 2).
        true: true layout (n, 2).
        k: the density of a cell is measured by the distance to its k-th neighbour, k < n.

    Returns:
        In [-1, 1]; 0 where one layout has one density everywhere (a regular grid, a point).

    Raises:
        ValueError: if the layouts are of different numbers of cells, or of fewer than 3.
    """
    x, y = as_layout(pred, "predicted positions", 3), as_layout(true, "true positions", 3)
    if len(x) != len(y):
        raise ValueError(f"density_correlation: {len(x)} predicted and {len(y)} true positions")
    k = min(k, len(x) - 1)
    reach = []
    for pos in (unit_gauge(x), unit_gauge(y)):
        distance, _ = cKDTree(pos).query(pos, k=[k + 1], workers=-1)
        reach.append(np.round(distance[:, 0], 10))
    return mean_row_spearman(reach[0][None], reach[1][None], np.ones((1, len(x)), bool))


def step_sizes(trajectory: Sequence[Tensor | np.ndarray]) -> list[float]:
    r"""Movement of each recycle, :math:`\|X^{(r+1)} - X^{(r)}\|_F / \sqrt n`, in the unit gauge.

    Layouts are not rotated onto one another: the model's frame does not turn between recycles.

    Args:
        trajectory: layouts (n, 2), the first one before the first recycle.

    Returns:
        One value a recycle.
    """
    layouts = [unit_gauge(as_layout(pos, min_points=1)) for pos in trajectory]
    return [
        float(np.sqrt(np.square(after - before).sum(axis=1).mean()))
        for before, after in pairwise(layouts)
    ]
