"""The predicted error of each cell, calibrated on errors of left-out donors.

The predictive variance of an atlas is the size of errors only if its model is right. Noise on the
embedding moves some cells more than others, which shows which are uncertain, but not by how much.
Leave-one-donor-out cross-validation measures how large errors are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import nnls
from torch import Tensor

from ..geometry.alignment import align


def square_errors(pred: Tensor | ArrayLike, true: ArrayLike) -> np.ndarray:
    """Squared distance of every cell from its true place, after alignment.

    Args:
        pred: layout (n, 2), any scale.
        true: positions (n, 2), any units.

    Returns:
        (n,), in squared RMS radii of the tissue.
    """
    true = np.asarray(true, dtype=np.float64)
    radius = np.square(true - true.mean(0)).sum(1).mean()
    aligned, _ = align(pred, true)
    return np.square(aligned - true).sum(1) / max(radius, 1e-300)


def fit_error_model(
    donors: Sequence[Sequence[tuple[ArrayLike, ArrayLike | None]]],
) -> tuple[float, float]:
    r"""Square error of a cell as a linear function of its predictive variance.

    .. math::
        \min_{a, b \ge 0} \sum_i w_i \bigl(e_i - a - b\, v_i\bigr)^2

    Donors have equal weight, and so have the slides of a donor. Without predictive variance b is 0
    and a is the mean error.

    Args:
        donors: for each donor its slides, each a pair: square errors e (n,), and predictive
            variance v (n,) relative to the tissue, or None.

    Returns:
        Intercept a and slope b.
    """
    rows, targets = [], []
    for slides in donors:
        for errors, variance in slides:
            e = np.asarray(errors, dtype=np.float64)
            weight = 1 / np.sqrt(len(donors) * len(slides) * max(len(e), 1))
            v = np.zeros(len(e)) if variance is None else np.asarray(variance, dtype=np.float64)
            rows.append(weight * np.stack([np.ones(len(e)), v], axis=1))
            targets.append(weight * e)
    (a, b), _ = nnls(np.concatenate(rows), np.concatenate(targets))
    return float(a), float(b)


def predict_rmse(
    model: tuple[float, float],
    variance: ArrayLike | None,
    displacement: np.ndarray | None = None,
    noise_share: float = 0.15,
) -> np.ndarray | None:
    r"""Expected distance of each cell from its place, root mean square.

    .. math::
        u_i^2 = (a + b\, v_i)\, \bigl(1 - \eta + \eta\, s_i / \bar s\bigr)

    Args:
        model: a and b, see :func:`fit_error_model`.
        variance: predictive variance v (n,) relative to the tissue. None where there is none:
            then the first factor is a.
        displacement: mean square distance s (n,) by which noise moves each cell. None: then the
            second factor is 1.
        noise_share: :math:`\eta`, the share of the square error that follows s, 0 to 1.

    Returns:
        u (n,) in RMS radii of the tissue; None without ``variance`` and ``displacement``.
    """
    a, b = model
    if variance is not None:
        square = a + b * np.asarray(variance, dtype=np.float64)
    elif displacement is not None:
        square = np.full(len(displacement), a)
    else:
        return None
    if displacement is not None and (mean := displacement.mean()) > 0:
        square = square * (1 - noise_share + noise_share * displacement / mean)
    return np.sqrt(square)


def calibration_metrics(uncertainty: ArrayLike, error: ArrayLike) -> dict[str, float]:
    """Whether uncertainties are as large as errors.

    Args:
        uncertainty: predicted root mean square error of every cell (n,).
        error: distance of the cell from its true place (n,), same unit.

    Returns:
        ``uncertainty_error_ratio``, the root mean square uncertainty over that of the errors.
        The same with ``_low`` and ``_high`` for the fifths of least and most uncertainty.
        ``uncertainty_coverage``, the share of cells whose error is at most their uncertainty
        (0.63 if errors are Gaussian in the plane).
    """
    predicted, seen = np.square(uncertainty), np.square(error)
    fifths = np.array_split(np.argsort(predicted, kind="stable"), 5)
    parts = {"": np.arange(len(predicted)), "_low": fifths[0], "_high": fifths[-1]}
    ratios = {
        f"uncertainty_error_ratio{name}": float(np.sqrt(predicted[part].mean() / seen[part].mean()))
        for name, part in parts.items()
        if len(part) and seen[part].mean() > 0
    }
    return ratios | {"uncertainty_coverage": float((seen <= predicted).mean())}
