"""How far a cell lies from its place, in the size of errors that were seen.

An atlas tells which cells are uncertain, and by how much if it is right; noise tells which cells
are moved by it, and nothing of how far off they are. Donors left out tell the size of either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from ..geometry.alignment import align

_MOVED = 0.15  # of a cell's square error goes with how far noise moves it, the rest is common


def square_errors(pred, true) -> np.ndarray:
    """Squared distance of every cell from its true place, layouts aligned (n,).

    Args:
        pred: layout (n, 2).
        true: positions (n, 2).

    Returns:
        In squared RMS radii of the tissue.
    """
    true = np.asarray(true, dtype=np.float64)
    radius = np.square(true - true.mean(0)).sum(1).mean()
    aligned, _ = align(pred, true)
    return np.square(aligned - true).sum(1) / max(radius, 1e-300)


def fit_error_model(
    donors: Sequence[Sequence[tuple[np.ndarray, np.ndarray | None]]],
) -> tuple[float, float]:
    r"""How the square error of a cell follows what was said of it.

    .. math::
        \min_{a, b \ge 0} \sum_i w_i \bigl(e_i - a - b\, v_i\bigr)^2

    Donors count alike, so do the slides of one. Where nothing is said of a cell, b is 0 and a the
    mean.

    Args:
        donors: of each, its slides: square errors e (n,) and doubts v (n,), or None.

    Returns:
        a and b.
    """
    rows, wanted = [], []
    for slides in donors:
        for error, doubt in slides:
            weight = 1 / np.sqrt(len(donors) * len(slides) * max(len(error), 1))
            said = np.zeros(len(error)) if doubt is None else np.asarray(doubt, dtype=np.float64)
            rows.append(weight * np.stack([np.ones(len(error)), said], axis=1))
            wanted.append(weight * np.asarray(error, dtype=np.float64))
    (a, b), _ = nnls(np.concatenate(rows), np.concatenate(wanted))
    return float(a), float(b)


def predict_rmse(
    law: tuple[float, float], doubt: np.ndarray | None, moved: np.ndarray | None = None
) -> np.ndarray | None:
    r"""How far cells are to be expected from their places (n,), root mean square.

    .. math::
        u_i^2 = (a + b\, v_i)\, \bigl(0.85 + 0.15\, s_i / \bar s\bigr)

    Args:
        law: a and b of :func:`fit_error_model`.
        doubt: v (n,), or None where nothing tells cells apart; then the first factor is a.
        moved: mean square distance s (n,) by which noise moves each cell, or None: then the second
            factor is 1.

    Returns:
        In RMS radii of the tissue; None without either.
    """
    if doubt is None and moved is None:
        return None
    a, b = law
    square = a if doubt is None else a + b * np.asarray(doubt, dtype=np.float64)
    if moved is not None and (mean := moved.mean()) > 0:
        square = square * (1 - _MOVED + _MOVED * moved / mean)
    return np.sqrt(np.broadcast_to(square, np.shape(doubt if moved is None else moved)))


def calibration_metrics(uncertainty, error) -> dict[str, float]:
    """Is an uncertainty as large as the error?

    Args:
        uncertainty: of every cell (n,).
        error: distance from its true place (n,), same unit.

    Returns:
        Root mean square uncertainty over root mean square error: ``uncertainty_error_ratio`` of all
        cells, ``..._low`` of the fifth that is called least uncertain, ``..._high`` of that called
        most; and ``uncertainty_coverage``, the share of cells no further off than it says (0.63 of
        errors that are Gaussian in the plane).
    """
    said, seen = np.square(uncertainty), np.square(error)
    fifths = np.array_split(np.argsort(said, kind="stable"), 5)
    parts = {"": slice(None), "_low": fifths[0], "_high": fifths[-1]}
    out = {
        f"uncertainty_error_ratio{name}": float(np.sqrt(said[part].mean() / seen[part].mean()))
        for name, part in parts.items()
        if len(said[part]) and seen[part].mean() > 0
    }
    return out | {"uncertainty_coverage": float((seen <= said).mean())}
