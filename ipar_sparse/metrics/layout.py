"""Gauge-free metrics of a layout, exact where that is cheap and sampled elsewhere.

A layout is known up to rotation, reflection, translation and scale, and no metric here depends on
any of them. Positions come as tensors or arrays, results are plain floats. A sampled value is
accompanied by ``<name>_se``: the standard error of sampling, not of the prediction. An exact value
has none.
"""

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist
from scipy.stats import rankdata
from torch import Tensor

from ..geometry.alignment import align, two_layouts
from ..geometry.gauge import gauge_fix
from ..geometry.neighborhoods import (
    TrueNeighborhoods,
    as_layout,
    jitter,
    nearest,
    sample_pairs,
    unit_gauge,
)
from .correlation import pearson, spearman, stress_1
from .descriptions import METRICS, MetricInfo, metric_info
from .shape import collapse_diagnostics

__all__ = [
    "METRICS",
    "MetricInfo",
    "distance_metrics",
    "evaluate_layout",
    "metric_info",
    "neighborhood_metrics",
    "procrustes_metrics",
]

_EXACT_PAIRS = 1500  # cells up to which all pairs are used
_EXACT_RANKS = 2000  # cells up to which every row's ranks are counted


def distance_metrics(
    pred: Tensor | np.ndarray,
    true: Tensor | np.ndarray,
    *,
    seed: int = 0,
    num_pairs: int = 200_000,
    max_exact: int = _EXACT_PAIRS,
) -> dict[str, float]:
    r"""Agreement of pairwise distances: Spearman, Pearson, and Kruskal's Stress-1.

    .. math::
        \text{stress}_1 = \min_b \sqrt{
            \frac{\sum_{i<j} (d_{ij} - b\,\delta_{ij})^2}{\sum_{i<j} d_{ij}^2}}

    with predicted distances :math:`d` and true ones :math:`\delta`. Stress-1 lies in [0, 1] and
    does not depend on either scale. All pairs are used up to ``max_exact`` cells. Beyond,
    ``num_pairs`` pairs are drawn independently. The standard error is then
    :math:`\mathrm{sd}(\mathrm{IF})/\sqrt m`, with the influence functions IF in closed form (Croux
    and Dehon, 2010).

    A layout collapsed to a point has correlations of 0 and a Stress-1 of 1.

    Args:
        pred: predicted layout (n, 2).
        true: true layout (n, 2).
        seed: of the drawn pairs.
        num_pairs: pairs to draw where n > ``max_exact``.
        max_exact: number of cells up to which all pairs are used.

    Returns:
        ``distance_spearman``, ``distance_pearson``, ``stress_1``, each with ``_se`` if sampled.

    Raises:
        ValueError: on layouts that :func:`evaluate_layout` refuses.
    """
    x, y = two_layouts(pred, true)
    x, y = unit_gauge(x), unit_gauge(y)
    sampled = len(x) > max_exact
    if sampled:
        first, second = sample_pairs(len(x), num_pairs, np.random.default_rng([seed, 1]))
        d = np.sqrt(np.square(x[first] - x[second]).sum(axis=1))
        delta = np.sqrt(np.square(y[first] - y[second]).sum(axis=1))
    else:
        d, delta = pdist(x), pdist(y)
    # Equal distances on a regular grid differ by rounding, which must not decide ranks.
    d, delta = np.round(d, 10), np.round(delta, 10)
    results = {
        "distance_spearman": spearman(d, delta),
        "distance_pearson": pearson(d, delta),
        "stress_1": stress_1(d, delta),
    }
    out = {}
    for name, (value, influence) in results.items():
        out[name] = value
        if sampled:
            out[f"{name}_se"] = float(influence.std() / np.sqrt(len(d)))
    return out


def distance_spearman(pred: Tensor | np.ndarray, true: Tensor | np.ndarray) -> float:
    """Spearman correlation of all pairwise distances, as :func:`distance_metrics` has it."""
    x, y = two_layouts(pred, true)
    return pearson(distance_ranks(x), distance_ranks(y))[0]


def distance_ranks(layout: Tensor | np.ndarray) -> np.ndarray:
    """Mid-ranks of all pairwise distances (pairs,): Pearson correlation of two is Spearman's.

    Those of a layout on a GPU are found there.
    """
    if isinstance(layout, Tensor) and layout.is_cuda:
        return mid_ranks(torch.pdist(gauge_fix(layout.double())).round(decimals=10)).cpu().numpy()
    return rankdata(np.round(pdist(unit_gauge(as_layout(layout))), 10))


def mid_ranks(values: Tensor) -> Tensor:
    """Ranks of values (m,), counted from 1; those of equal ones are their mean. float64."""
    rising, order = values.sort()
    _, group, count = torch.unique_consecutive(rising, return_inverse=True, return_counts=True)
    middle = count.cumsum(0) - (count - 1).double() / 2
    return middle.new_empty(len(values)).index_copy_(0, order, middle[group])


def procrustes_metrics(pred: Tensor | np.ndarray, true: Tensor | np.ndarray) -> dict[str, float]:
    r"""What is left after laying the map onto the tissue, reflection allowed.

    .. math::
        \text{procrustes} = \frac{\min_{s,R,t} \sum_i \|s\,x_i R + t - y_i\|^2}
                                 {\sum_i \|y_i - \bar y\|^2} \in [0, 1], \qquad
        \text{misplacement} = \sqrt{\text{procrustes}}

    ``misplacement`` is the root-mean-square
    misplacement of a cell in units of the tissue's root-mean-square radius.

    Args:
        pred: predicted layout (n, 2).
        true: true layout (n, 2).

    Returns:
        ``procrustes`` and ``misplacement``; both are 1 for a collapsed prediction.

    Raises:
        ValueError: on layouts that :func:`evaluate_layout` refuses.
    """
    x, y = two_layouts(pred, true)
    x, y = unit_gauge(x), unit_gauge(y)
    aligned, _ = align(x, y)
    share = float(min(1.0, np.square(aligned - y).sum() / np.square(y).sum()))
    return {"procrustes": share, "misplacement": float(np.sqrt(share))}


def neighborhood_metrics(
    pred: Tensor | np.ndarray,
    true: Tensor | np.ndarray,
    *,
    ks: tuple[int, ...] = (10, 15),
    trust_k: int = 15,
    seed: int = 0,
    num_rows: int = 1000,
    max_exact: int = _EXACT_RANKS,
) -> dict[str, float]:
    r"""Agreement of neighbourhoods: neighbour hit, trustworthiness and continuity.

    .. math::
        \text{hit@}k = \frac1n \sum_i
            \frac{|\mathrm{kNN}_{pred}(i) \cap \mathrm{kNN}_{true}(i)|}{k}, \qquad
        T(k) = 1 - \frac{2}{n k (2n - 3k - 1)} \sum_i
               \sum_{j \in \mathrm{kNN}_{pred}(i)} \max(0,\, r_{true}(i, j) - k)

    with :math:`r_{true}(i,j)` the rank of j among the cells nearest to i in the tissue.
    Continuity is trustworthiness with the layouts exchanged (Venna and Kaski, 2001). The
    neighbour hit uses all cells. Ranks are counted for all cells up to ``max_exact``, and beyond
    for ``num_rows`` cells drawn without replacement. Their standard error is that of a mean over
    drawn cells with the finite-population correction.

    Cells tied for the k-th place in the tissue all count as true neighbours. Ties in the
    prediction are broken at random, so that a collapsed map scores what chance scores. k is
    lowered to n - 1 for the neighbour hit. For the other two it is lowered to (n - 1) // 2, the
    largest k their normalisation allows.

    Args:
        pred: predicted layout (n, 2), n >= 3.
        true: true layout (n, 2).
        ks: neighbourhood sizes of the neighbour hit.
        trust_k: neighbourhood size of trustworthiness and continuity.
        seed: of the drawn cells and of the order of ties.
        num_rows: cells whose ranks are counted on large slides.
        max_exact: number of cells up to which every cell's ranks are counted.

    Returns:
        ``neighbor_hit@k`` and ``neighbor_hit_chance@k`` for each k, ``trustworthiness@k`` and
        ``continuity@k``, the latter two with ``_se`` if sampled.

    Raises:
        ValueError: on layouts that :func:`evaluate_layout` refuses.
    """
    x, y = two_layouts(pred, true)
    n = len(x)
    y = unit_gauge(y)
    # The same jitter on layouts in one frame: a perfect map then breaks ties as the tissue does.
    noise = jitter(n, seed)
    x = _rotate_onto(unit_gauge(x), y) + noise
    tree_x = cKDTree(x)
    out = _neighbor_hits(x, tree_x, y, ks)

    k = min(trust_k, (n - 1) // 2)
    y_jittered = y + noise
    tree_y = cKDTree(y_jittered)
    sampled = n > max_exact and num_rows < n
    rows = np.arange(n)
    if sampled:
        rows = np.sort(np.random.default_rng([seed, 2]).choice(n, num_rows, replace=False))
    worst = k * (2 * n - 3 * k - 1) / 2
    for name, near, near_tree, far, far_tree in (
        ("trustworthiness", x, tree_x, y_jittered, tree_y),
        ("continuity", y_jittered, tree_y, x, tree_x),
    ):
        _, neighbors = nearest(near_tree, near, rows, k)
        excess = np.maximum(0, _ranks(far_tree, far, rows, neighbors) - k).sum(axis=1)
        score = 1 - excess / worst
        out[f"{name}@{trust_k}"] = float(score.mean())
        if sampled:
            error = score.std(ddof=1) / np.sqrt(num_rows)
            out[f"{name}@{trust_k}_se"] = float(error * np.sqrt(1 - num_rows / n))
    return out


def evaluate_layout(
    pred: Tensor | np.ndarray,
    true: Tensor | np.ndarray,
    *,
    seed: int = 0,
    ks: tuple[int, ...] = (10, 15),
    trust_k: int = 15,
    num_pairs: int = 200_000,
    num_rows: int = 1000,
) -> dict[str, float]:
    """Score a predicted layout against the true one, free of the gauge, for n from 3 to millions.

    Args:
        pred: predicted layout (n, 2), tensor or array, any units.
        true: true layout (n, 2), any units.
        seed: of everything drawn.
        ks: neighbourhood sizes of the neighbour hit.
        trust_k: neighbourhood size of trustworthiness and continuity.
        num_pairs: pairs of cells drawn on slides of more than 1500 cells.
        num_rows: cells drawn for trustworthiness and continuity beyond 2000 cells.

    Returns:
        Flat names to floats: those of :func:`distance_metrics`, :func:`procrustes_metrics`,
        :func:`neighborhood_metrics` and
        :func:`~ipar_sparse.metrics.shape.collapse_diagnostics` of the prediction. No value is
        NaN: a collapsed prediction has correlations of 0, errors of 1 and neighbour hits at
        chance.

    Raises:
        ValueError: if the shapes differ, n < 3, a position is not finite, or all true positions
            are one point.
    """
    return {
        **distance_metrics(pred, true, seed=seed, num_pairs=num_pairs),
        **procrustes_metrics(pred, true),
        **neighborhood_metrics(pred, true, ks=ks, trust_k=trust_k, seed=seed, num_rows=num_rows),
        **collapse_diagnostics(pred, seed=seed),
    }


def _rotate_onto(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rotate or reflect one centred layout onto another (orthogonal Procrustes)."""
    u, _, vt = np.linalg.svd(x.T @ y)
    return x @ (u @ vt)


def _neighbor_hits(
    x: np.ndarray, tree_x: cKDTree, y: np.ndarray, ks: tuple[int, ...]
) -> dict[str, float]:
    n = len(x)
    truth = TrueNeighborhoods(y, tuple(ks))
    hits = dict.fromkeys(ks, 0)
    widest = max(truth.k.values(), default=0)
    chunk = 1 << 17
    for start in range(0, n if widest else 0, chunk):
        rows = np.arange(start, min(n, start + chunk))
        _, found = nearest(tree_x, x, rows, widest)
        for k, effective in truth.k.items():
            hits[k] += int(truth.contains(rows, found[:, :effective], k).sum())
    out = {}
    for k, effective in truth.k.items():
        out[f"neighbor_hit@{k}"] = hits[k] / (n * effective)
        out[f"neighbor_hit_chance@{k}"] = truth.chance(k)
    return out


def _ranks(tree: cKDTree, pos: np.ndarray, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Rank of ``others`` (m, k) by distance from ``rows`` (m,), 1 for the nearest."""
    centre = np.repeat(pos[rows], others.shape[1], axis=0)
    distance = np.sqrt(np.square(pos[others.ravel()] - centre).sum(axis=1))
    # The count of the point itself and everything strictly nearer is the rank, counted from 1.
    count = tree.query_ball_point(centre, distance * (1 - 1e-12), return_length=True, workers=-1)
    return np.maximum(count, 1).reshape(others.shape)
