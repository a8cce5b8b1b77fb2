"""What scores a layout: gauge-free metrics, exact where that is cheap, sampled elsewhere.

A layout is known up to rotation, reflection, translation and scale, and no metric here sees any
of them. Positions come as tensors or arrays, results are plain floats. A sampled value is
accompanied by ``<name>_se``, its standard error *with respect to the sampling* (how far the full
computation may be away); an exact value has none.
"""

import re
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist
from scipy.stats import rankdata

from ..geometry.alignment import align, two_layouts
from ..geometry.neighborhoods import (
    TrueNeighborhoods,
    jitter,
    nearest,
    sample_pairs,
    unit_gauge,
)
from .diagnostics import collapse_diagnostics

_EXACT_PAIRS = 1500  # cells up to which all pairs are used
_EXACT_RANKS = 2000  # cells up to which every row's ranks are counted


@dataclass(frozen=True)
class MetricInfo:
    """How a metric is to be read.

    Args:
        label: for tables and axes.
        better: ``"higher"``, ``"lower"`` or ``""`` where neither is better in itself.
        perfect: the value of a perfect map; None where it depends on the slide.
        explanation: one sentence for a reader who knows tissues, not metrics.
    """

    label: str
    better: str
    perfect: float | None
    explanation: str


METRICS: dict[str, MetricInfo] = {
    "distance_spearman": MetricInfo(
        "Distance correlation (Spearman)",
        "higher",
        1.0,
        "Do pairs of cells that are far apart in the tissue lie far apart on the map?",
    ),
    "distance_pearson": MetricInfo(
        "Distance correlation (Pearson)",
        "higher",
        1.0,
        "The same, in proportion and not only in order.",
    ),
    "stress_1": MetricInfo(
        "Stress-1",
        "lower",
        0.0,
        "Relative error of the distances between cells after the best common scale.",
    ),
    "procrustes": MetricInfo(
        "Procrustes error",
        "lower",
        0.0,
        "Share of the tissue's extent left unexplained after laying the map onto it.",
    ),
    "rssd": MetricInfo(
        "RSSD",
        "lower",
        0.0,
        "Typical misplacement of a cell, in tissue radii, after laying the map onto the tissue.",
    ),
    "neighbor_hit": MetricInfo(
        "Neighbour hit",
        "higher",
        1.0,
        "Share of a cell's nearest cells on the map that are its nearest cells in the tissue.",
    ),
    "neighbor_hit_chance": MetricInfo(
        "Neighbour hit by chance",
        "",
        None,
        "What a random map would reach.",
    ),
    "trustworthiness": MetricInfo(
        "Trustworthiness",
        "higher",
        1.0,
        "Are neighbours on the map at least not far apart in the tissue? Chance is about 0.5.",
    ),
    "continuity": MetricInfo(
        "Continuity",
        "higher",
        1.0,
        "Are neighbours in the tissue at least not far apart on the map? Chance is about 0.5.",
    ),
    "lambda_ratio": MetricInfo(
        "Shape ratio λ₂/λ₁",
        "",
        None,
        "Short against long axis of the map; below 0.01 it has collapsed to a line.",
    ),
    "median_distance": MetricInfo(
        "Median distance",
        "",
        None,
        "Median distance between cells in tissue radii; below 0.01 the map is a point.",
    ),
    "E_geo": MetricInfo(
        "E_geo",
        "lower",
        None,
        "The training criterion without its regularisers; compare only within this table.",
    ),
    "L_RW": MetricInfo("L_RW", "lower", None, "Random-walk part of E_geo: neighbourhoods."),
    "L_stress": MetricInfo("L_stress", "lower", None, "Stress part of E_geo: distances."),
    "candidate_recall": MetricInfo(
        "Candidate recall",
        "higher",
        1.0,
        "Share of a cell's true neighbours that are among its candidates in expression space.",
    ),
}

MEASURES: dict[str, MetricInfo] = {
    "candidate_recall_chance": MetricInfo(
        "Candidate recall by chance",
        "",
        None,
        "What as many random candidates would reach.",
    ),
    "candidate_recall_lift": MetricInfo(
        "Candidate recall over chance",
        "",
        None,
        "1 if expression told nothing of neighbours.",
    ),
    "candidate_precision": MetricInfo(
        "Candidate precision",
        "",
        None,
        "Share of a cell's candidates that are true neighbours.",
    ),
    "gate_precision": MetricInfo(
        "Gate precision",
        "",
        None,
        "Share of true neighbours among the candidates that the gate favours.",
    ),
    "gate_recall": MetricInfo(
        "Gate recall",
        "",
        None,
        "Share of the true neighbours that are among those.",
    ),
    "gate_lift": MetricInfo(
        "Gate lift",
        "",
        None,
        "Gate precision over candidate precision; 1 if it chose at random.",
    ),
    "embedding_hit": MetricInfo(
        "Neighbour hit of the embedding",
        "",
        None,
        "Share of a cell's nearest cells in the embedding that are its nearest in the tissue.",
    ),
    "boundary_mass": MetricInfo(
        "Cells at the boundary",
        "",
        None,
        "Share of cells in the outer tenth of the map's radius: 0.2 of a full disc, 1 of a ring.",
    ),
    "density_correlation": MetricInfo(
        "Density correlation",
        "",
        None,
        "Do cells that lie close together on the map do so in the tissue?",
    ),
    "uncertainty_error_spearman": MetricInfo(
        "Uncertainty against error",
        "",
        None,
        "Rank correlation over cells; 0 if the uncertainty told nothing.",
    ),
    "uncertainty_error_ratio": MetricInfo(
        "Uncertainty over error",
        "",
        None,
        "Root mean squares; 1 if it is as large as the error.",
    ),
    "uncertainty_error_ratio_low": MetricInfo(
        "Uncertainty over error, least uncertain",
        "",
        None,
        "Of that fifth of the cells.",
    ),
    "uncertainty_error_ratio_high": MetricInfo(
        "Uncertainty over error, most uncertain",
        "",
        None,
        "Of that fifth of the cells.",
    ),
    "uncertainty_coverage": MetricInfo(
        "Uncertainty coverage",
        "",
        None,
        "Share of cells no further off than it says; 0.63 if errors are Gaussian.",
    ),
}
"""Of a model or its graph, where METRICS are of any layout."""

_BY_LOWER_NAME = {name.lower(): info for name, info in (METRICS | MEASURES).items()}
_SUFFIX = {
    "hgate": "gated candidates",
    "tedge": "true neighbours",
    "nogate": "without the gate",
    "unexpected": "without expected distances",
    "unrefined": "without the last step",
    "first": "first layout",
    "floor": "true coordinates",
}


def metric_info(name: str) -> MetricInfo:
    """The reading of a metric or measure by its flat name; ``@k`` and what it was computed on,
    as ``_hgate``, are understood.

    Args:
        name: for example ``"neighbor_hit@15"`` or ``"E_geo_hgate"``.
    """
    stem, _, k = name.partition("@")
    match = re.fullmatch(rf"(.+)_({'|'.join(_SUFFIX)})", stem)
    base = _BY_LOWER_NAME.get((match[1] if match else stem).lower())
    if base is None:
        return MetricInfo(name, "", None, "")
    label = f"{base.label}, {_SUFFIX[match[2]]}" if match else base.label
    label = f"{label} @{k}" if k else label
    return MetricInfo(label, base.better, base.perfect, base.explanation)


def distance_metrics(
    pred, true, *, seed: int = 0, num_pairs: int = 200_000, max_exact: int = _EXACT_PAIRS
) -> dict[str, float]:
    r"""Agreement of pairwise distances: Spearman, Pearson, and Kruskal's Stress-1.

    .. math::
        \text{stress}_1 = \min_b \sqrt{
            \frac{\sum_{i<j} (d_{ij} - b\,\delta_{ij})^2}{\sum_{i<j} d_{ij}^2}}

    with predicted distances :math:`d` and true ones :math:`\delta`; it lies in [0, 1] and does
    not depend on either scale. All pairs are used up to ``max_exact`` cells. Beyond,
    ``num_pairs`` pairs are drawn independently, so each statistic is a smooth function of an
    empirical distribution of m independent draws, and its standard error is
    :math:`\mathrm{sd}(\mathrm{IF})/\sqrt m` with the statistic's influence function, in closed
    form: :math:`z_x z_y - \tfrac r2 (z_x^2 + z_y^2)` for Pearson; for Spearman the same delta
    method on mid-ranks, with the terms for the ranks being estimated themselves (Croux and
    Dehon, 2010). No resampling is needed.

    A layout whose distances are all equal (collapsed to a point) has no correlation: 0, and
    Stress-1 of 1.

    Args:
        pred: predicted layout (n, 2).
        true: true layout (n, 2).
        seed: of the drawn pairs.
        num_pairs: pairs to draw where n > ``max_exact``.
        max_exact: number of cells up to which all pairs are used.

    Returns:
        ``distance_spearman``, ``distance_pearson``, ``stress_1``, each with ``_se`` if sampled.
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
    # equal distances on a regular grid differ by rounding, which must not decide ranks
    d, delta = np.round(d, 10), np.round(delta, 10)
    results = {
        "distance_spearman": _spearman(d, delta),
        "distance_pearson": _pearson(d, delta),
        "stress_1": _stress(d, delta),
    }
    out = {}
    for name, (value, influence) in results.items():
        out[name] = value
        if sampled:
            out[f"{name}_se"] = float(influence.std() / np.sqrt(len(d)))
    return out


def procrustes_metrics(pred, true) -> dict[str, float]:
    r"""What is left after laying the map onto the tissue, reflection allowed.

    .. math::
        \text{procrustes} = \frac{\min_{s,R,t} \sum_i \|s\,x_i R + t - y_i\|^2}
                                 {\sum_i \|y_i - \bar y\|^2} \in [0, 1], \qquad
        \text{rssd} = \sqrt{\text{procrustes}}

    ``rssd``, the root of the relative sum of squared distances, is the root-mean-square
    misplacement of a cell in units of the tissue's root-mean-square radius.

    Returns:
        ``procrustes`` and ``rssd``; both are 1 for a collapsed prediction.
    """
    x, y = two_layouts(pred, true)
    x, y = unit_gauge(x), unit_gauge(y)
    aligned, _ = align(x, y)
    share = float(min(1.0, np.square(aligned - y).sum() / np.square(y).sum()))
    return {"procrustes": share, "rssd": float(np.sqrt(share))}


def neighborhood_metrics(
    pred,
    true,
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

    with :math:`r_{true}(i,j)` the rank of j among the cells nearest to i in the tissue;
    continuity is the same with the layouts exchanged (Venna and Kaski, 2001). The neighbour hit
    uses all cells. Ranks are counted with a k-d tree, for all cells up to ``max_exact`` and
    else for ``num_rows`` cells drawn without replacement; the standard error is that of a mean
    over drawn cells with the finite-population correction.

    Ties in the true distances count as neighbours alike (:class:`~ipar_sparse.geometry.neighborhoods.\
TrueNeighborhoods`); ties in the prediction are broken at random, so that a collapsed map scores
    what chance scores. k is lowered to n - 1 for the neighbour hit, and to (n - 1) // 2 for the
    other two, where their normalisation ends.

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
    """
    x, y = two_layouts(pred, true)
    n = len(x)
    y = unit_gauge(y)
    # one jitter in one frame: a perfect map then breaks its ties as the tissue does
    shake = jitter(n, seed)
    x = _rotate_onto(unit_gauge(x), y) + shake
    tree_x = cKDTree(x)
    out = _neighbor_hits(x, tree_x, y, ks)

    k = min(trust_k, (n - 1) // 2)
    shaken = y + shake
    tree_y = cKDTree(shaken)
    sampled = n > max_exact and num_rows < n
    rows = np.arange(n)
    if sampled:
        rows = np.sort(np.random.default_rng([seed, 2]).choice(n, num_rows, replace=False))
    worst = k * (2 * n - 3 * k - 1) / 2
    for name, near, near_tree, far, far_tree in (
        ("trustworthiness", x, tree_x, shaken, tree_y),
        ("continuity", shaken, tree_y, x, tree_x),
    ):
        _, neighbors = nearest(near_tree, near, rows, k)
        excess = np.maximum(0, _ranks(far_tree, far, rows, neighbors) - k).sum(axis=1)
        score = 1 - excess / worst
        out[f"{name}@{trust_k}"] = float(score.mean())
        if sampled:
            spread = score.std(ddof=1) / np.sqrt(num_rows)
            out[f"{name}@{trust_k}_se"] = float(spread * np.sqrt(1 - num_rows / n))
    return out


def evaluate_layout(
    pred,
    true,
    *,
    seed: int = 0,
    ks: tuple[int, ...] = (10, 15),
    trust_k: int = 15,
    num_pairs: int = 200_000,
    num_rows: int = 1000,
) -> dict[str, float]:
    """Score a predicted layout against the true one, free of the gauge; n from 3 to millions.

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
        :func:`~ipar_sparse.metrics.layout.diagnostics.collapse_diagnostics` (of the prediction). No value is
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
    u, _, vt = np.linalg.svd(x.T @ y)
    return x @ (u @ vt)


def _neighbor_hits(x, tree_x, y, ks) -> dict[str, float]:
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


def _ranks(tree, pos, rows, others) -> np.ndarray:
    """Rank of ``others`` (m, k) by distance from ``rows`` (m,), 1 for the nearest."""
    centre = np.repeat(pos[rows], others.shape[1], axis=0)
    distance = np.sqrt(np.square(pos[others.ravel()] - centre).sum(axis=1))
    # counts the point itself and everything strictly nearer: the rank, counted from 1
    count = tree.query_ball_point(centre, distance * (1 - 1e-12), return_length=True, workers=-1)
    return np.maximum(count, 1).reshape(others.shape)


def _pearson(x, y) -> tuple[float, np.ndarray]:
    return _correlation(x - x.mean(), y - y.mean())


def _correlation(x, y) -> tuple[float, np.ndarray]:
    """Correlation of centred samples and its influence function."""
    sd_x, sd_y = np.sqrt(np.square(x).mean()), np.sqrt(np.square(y).mean())
    if min(sd_x, sd_y) < 1e-9:  # all distances equal, in the unit gauge
        return 0.0, np.zeros_like(x)
    zx, zy = x / sd_x, y / sd_y
    r = float(np.clip((zx * zy).mean(), -1.0, 1.0))
    return r, zx * zy - 0.5 * r * (np.square(zx) + np.square(zy))


def _spearman(x, y) -> tuple[float, np.ndarray]:
    m = len(x)
    u, v = (rankdata(x) - 0.5) / m, (rankdata(y) - 0.5) / m
    a, b = np.square(u).mean() - 0.25, np.square(v).mean() - 0.25
    if a <= 1e-15 or b <= 1e-15:
        return 0.0, np.zeros(m)
    covariance = (u * v).mean() - 0.25
    rho = float(np.clip(covariance / np.sqrt(a * b), -1.0, 1.0))
    d_cov = u * v + _mean_above(x, v) + _mean_above(y, u)
    d_a = np.square(u) + 2 * _mean_above(x, u)
    d_b = np.square(v) + 2 * _mean_above(y, v)
    d_cov, d_a, d_b = d_cov - d_cov.mean(), d_a - d_a.mean(), d_b - d_b.mean()
    return rho, d_cov / np.sqrt(a * b) - 0.5 * rho * (d_a / a + d_b / b)


def _mean_above(key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """For each sample t: mean over samples s of value_s [key_s > key_t], ties counted half."""
    _, group = np.unique(key, return_inverse=True)
    total = np.bincount(group, weights=value)
    above = total[::-1].cumsum()[::-1] - 0.5 * total
    return above[group] / len(key)


def _stress(d, delta) -> tuple[float, np.ndarray]:
    a, b = np.sqrt(np.square(d).mean()), np.sqrt(np.square(delta).mean())
    if a == 0 or b == 0:
        return 1.0, np.zeros_like(d)
    p, q = d / a, delta / b
    cosine = float(min(1.0, (p * q).mean()))
    stress = float(np.sqrt(np.square(p - cosine * q).mean()))
    if stress == 0:
        return 0.0, np.zeros_like(d)
    influence = p * q - 0.5 * cosine * (np.square(p) + np.square(q))
    return min(1.0, stress), -cosine / stress * influence
