"""The predicted error of each cell, calibrated on errors of left-out donors.

The predictive variance of an atlas is the size of errors only if its model is right. Noise on the
embedding moves some cells more than others, which shows which are uncertain, but not by how much.
Leave-one-donor-out cross-validation measures how large errors are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
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


_REACH = 1.5  # at most, by which a slide's fitted mean square error is moved


class ErrorModel(NamedTuple):
    r"""Square error of a cell as a linear function of predictive variance.

    .. math::
        u_i^2 = a + c\, \bar v + b\, v_i

    with the mean :math:`\bar v` over the slide. The coefficients are fitted on slides placed by
    short trainings on few donors, which lie farther off than those of the run itself. The variance
    tells how much farther: on four public sets the mean square error of a slide is

    .. math::
        m = 1 - (1 - \bar v)^\kappa, \qquad \kappa = 1.8

    within a tenth, whatever the training. So the mean of :math:`u_i^2` is moved towards m, by a
    factor of 1.5 at most: what left-out donors show of a tissue of another kind counts more.

    Args:
        intercept: a, for slides without predictive variance.
        slide_slope: c.
        slope: b.
    """

    intercept: float
    slide_slope: float
    slope: float

    def square(
        self,
        variance: ArrayLike | None,
        cells: int,
        prior_weight: float = 0.0,
        exponent: float = 1.8,
    ) -> np.ndarray:
        """u^2 (n,).

        Args:
            variance: v (n,) relative to the tissue, or None.
            cells: n.
            prior_weight: 0 takes the mean of u^2 as fitted, 1 takes m, values between are weights
                of their logarithms.
            exponent: of m.
        """
        if variance is None:
            return np.full(cells, self.intercept)
        v = np.asarray(variance, dtype=np.float64)
        fitted = self.intercept + self.slide_slope * v.mean() + self.slope * v
        prior = 1 - max(1 - v.mean(), 0.0) ** exponent
        ratio = max(prior, 1e-12) / max(fitted.mean(), 1e-12)
        return fitted * min(max(ratio, 1 / _REACH), _REACH) ** prior_weight


Donors = Sequence[Sequence[tuple[ArrayLike, ArrayLike | None]]]


def fit_error_model(donors: Donors) -> ErrorModel:
    r"""Least squares with coefficients of at least 0.

    .. math::
        \min_{a, b, c \ge 0} \sum_i w_i (e_i - u_i^2)^2

    Donors have equal weight, and so have the slides of a donor. a is 0 where all slides have a
    predictive variance.

    Args:
        donors: for each donor its slides, each a pair: square errors e (n,), and predictive
            variance v (n,) relative to the tissue, or None.
    """
    rows, targets = [], []
    for errors, variance, weight in _weighted(donors):
        root = np.sqrt(weight)
        columns = np.zeros((len(errors), 3))
        if variance is None:
            columns[:, 0] = root
        else:
            columns[:, 1], columns[:, 2] = root * variance.mean(), root * variance
        rows.append(columns)
        targets.append(root * errors)
    from scipy.optimize import nnls  # loads much, for training alone

    found, _ = nnls(np.concatenate(rows), np.concatenate(targets))
    return ErrorModel(*map(float, found))


def disc_radius(model: ErrorModel, donors: Donors, probability: float = 0.8) -> float:
    """Radius of the disc that holds a cell with some probability, in units of its uncertainty.

    Args:
        model: of :func:`fit_error_model`.
        donors: as there.
        probability: that a cell lies in its disc.
    """
    ratios, weights = [], []
    for errors, variance, weight in _weighted(donors):
        square = model.square(variance, len(errors))
        ratios.append(np.sqrt(errors / np.maximum(square, 1e-12)))
        weights.append(np.full(len(errors), weight))
    ratio, share = np.concatenate(ratios), np.concatenate(weights)
    order = np.argsort(ratio, kind="stable")
    reached = np.cumsum(share[order])
    return float(ratio[order][np.searchsorted(reached, probability * reached[-1])])


def _weighted(donors: Donors) -> Iterator[tuple[np.ndarray, np.ndarray | None, float]]:
    """Square errors, predictive variance and weight of a cell, for each slide."""
    for slides in donors:
        for errors, variance in slides:
            e = np.asarray(errors, dtype=np.float64)
            v = None if variance is None else np.asarray(variance, dtype=np.float64)
            yield e, v, 1 / (len(donors) * len(slides) * max(len(e), 1))


def predict_rmse(
    square: np.ndarray, displacement: np.ndarray | None = None, noise_share: float = 0.15
) -> np.ndarray:
    r"""Expected distance of each cell from its place, root mean square.

    .. math::
        u_i \leftarrow u_i \sqrt{1 - \eta + \eta\, s_i / \bar s}

    Args:
        square: u^2 (n,), of :meth:`ErrorModel.square`.
        displacement: mean square distance s (n,) by which noise moves each cell. None: then the
            factor is 1.
        noise_share: :math:`\eta`, the share of the square error that follows s, 0 to 1.

    Returns:
        u (n,) in RMS radii of the tissue.
    """
    if displacement is not None and (mean := displacement.mean()) > 0:
        square = square * (1 - noise_share + noise_share * displacement / mean)
    return np.sqrt(square)


def widen(rmse: ArrayLike, p_value: ArrayLike, below: float, unlike: bool = False) -> np.ndarray:
    r"""Uncertainty of cells that may be unlike the training cells.

    .. math::
        u_i^2 \leftarrow u_i^2 \left(1 + \max(0, 1 - p_i / q)\, (1 - f_i)
        \max(0, 1 / \overline{u^2} - 1)\right)

    f is the false discovery rate (Benjamini and Hochberg 1995): of cells with p-values as small,
    the share that a slide like the training slides has as well. 1 is the mean square error of a
    map in which all cells lie at the centre of the tissue.

    Args:
        rmse: u (n,), in RMS radii of the tissue.
        p_value: p (n,); of cells where it is NaN nothing is known.
        below: q. Cells of larger p stay as they are.
        unlike: whether the whole slide is unlike the training slides: nothing is known of any cell.
    """
    square = np.square(np.asarray(rmse, dtype=np.float64))
    p = np.full_like(square, np.nan) if unlike else np.asarray(p_value, dtype=np.float64)
    nothing, known = np.maximum(square, 1), np.isfinite(p)
    if not known.any():
        return np.sqrt(nothing)
    weight = np.maximum(0, 1 - p[known] / below) * (1 - false_discovery_rate(p[known]))
    grown = square[known] * (1 + weight * max(0, 1 / max(square[known].mean(), 1e-12) - 1))
    nothing[known] = grown
    return np.sqrt(nothing)


def false_discovery_rate(p: np.ndarray) -> np.ndarray:
    """The p-values (n,) adjusted by Benjamini and Hochberg (1995).

    As ``scipy.stats.false_discovery_control``, which takes longer to load than a prediction.
    """
    order = np.argsort(p)[::-1]
    found = np.empty_like(p)
    found[order] = np.minimum.accumulate(p[order] * len(p) / np.arange(len(p), 0, -1))
    return np.minimum(found, 1.0)


def calibration_metrics(
    uncertainty: ArrayLike, error: ArrayLike, disc_radius: float | None = None
) -> dict[str, float]:
    """Whether uncertainties are as large as errors.

    Args:
        uncertainty: predicted root mean square error of every cell (n,).
        error: distance of the cell from its true place (n,), same unit.
        disc_radius: of :func:`disc_radius`.

    Returns:
        ``uncertainty_error_ratio``, the root mean square uncertainty over that of the errors.
        The same with ``_low`` and ``_high`` for the fifths of least and most uncertainty.
        ``uncertainty_coverage``, the share of cells whose error is at most their uncertainty
        (0.63 if errors are Gaussian in the plane). With ``disc_radius``, ``disc_coverage``, the
        share of cells in their disc of probability 0.8.
    """
    predicted, seen = np.square(uncertainty), np.square(error)
    fifths = np.array_split(np.argsort(predicted, kind="stable"), 5)
    parts = {"": np.arange(len(predicted)), "_low": fifths[0], "_high": fifths[-1]}
    ratios = {
        f"uncertainty_error_ratio{name}": float(np.sqrt(predicted[part].mean() / seen[part].mean()))
        for name, part in parts.items()
        if len(part) and seen[part].mean() > 0
    }
    found = ratios | {"uncertainty_coverage": float((seen <= predicted).mean())}
    if disc_radius is not None:
        found["disc_coverage"] = float((seen <= disc_radius**2 * predicted).mean())
    return found
