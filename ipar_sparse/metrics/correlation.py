"""Correlations and Stress-1 of samples of distances, with their influence functions.

The standard error of a statistic of m independent samples is the standard deviation of its
influence function over sqrt(m). Every function here returns the statistic and the values (m,) of
its influence function.
"""

import numpy as np
from scipy.stats import rankdata


def pearson(x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    r"""Pearson correlation; its influence is :math:`z_x z_y - \tfrac r2 (z_x^2 + z_y^2)`.

    0 where all values of one sample are equal.
    """
    x, y = x - x.mean(), y - y.mean()
    sd_x, sd_y = np.sqrt(np.square(x).mean()), np.sqrt(np.square(y).mean())
    if min(sd_x, sd_y) < 1e-9:  # distances in the unit gauge, equal up to rounding
        return 0.0, np.zeros_like(x)
    zx, zy = x / sd_x, y / sd_y
    r = float(np.clip((zx * zy).mean(), -1.0, 1.0))
    return r, zx * zy - 0.5 * r * (np.square(zx) + np.square(zy))


def spearman(x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Spearman correlation on mid-ranks.

    The influence function has terms for the ranks, which are estimated too (Croux and Dehon,
    2010). 0 where all values of one sample are equal.
    """
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


def stress_1(d: np.ndarray, delta: np.ndarray) -> tuple[float, np.ndarray]:
    """Kruskal's Stress-1 of predicted distances against true ones; 1 where one sample is zero."""
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


def mean_row_spearman(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    """Mean over rows (m, k) of Spearman's correlation within the mask.

    Rows in which one side is constant are left out; 0 if none remains.
    """
    ranks = []
    for values in (a, b):
        rank = rankdata(np.where(mask, values, np.inf), axis=1)
        count = np.maximum(mask.sum(axis=1, keepdims=True), 1)
        mean = (rank * mask).sum(axis=1, keepdims=True) / count
        ranks.append((rank - mean) * mask)
    norm = np.sqrt(np.square(ranks[0]).sum(axis=1) * np.square(ranks[1]).sum(axis=1))
    varies = norm > 0
    if not varies.any():
        return 0.0
    return float(((ranks[0] * ranks[1]).sum(axis=1)[varies] / norm[varies]).mean())


def _mean_above(key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """For each sample t: mean over samples s of value_s [key_s > key_t], ties counted half."""
    _, group = np.unique(key, return_inverse=True)
    total = np.bincount(group, weights=value)
    above = total[::-1].cumsum()[::-1] - 0.5 * total
    return above[group] / len(key)
