"""Measured positions: which columns hold them, and which cells cannot lie where they say."""

from __future__ import annotations

import numpy as np

from .anndata_store import some_names

_STRETCH = 3.0  # a few cells that widen the tissue so many times lie elsewhere
_FEW = 0.1  # of the cells
_HEAP = 10  # a place of so many times more cells than others is no place
_SAME = 0.02  # of the cells; so many at one point are not placed there
_FLAT = 1e-6  # width of a line, relative to its length


def as_positions(
    value: object, key: str, cell_names: np.ndarray
) -> tuple[np.ndarray | None, str | None, list[str]]:
    """Positions (n, 2), float64, of what a file holds under a key.

    Returns:
        The positions or None; what is wrong with them and what to do, or None; and lines on what
        was made of them.
    """
    values = np.asarray(value)
    if values.dtype.kind == "O":
        try:
            values = values.astype(np.float64)
        except (TypeError, ValueError):
            pass
    if values.ndim != 2 or values.shape[1] not in (2, 3) or values.dtype.kind not in "fiu":
        shape = " x ".join(str(size) for size in values.shape)
        expected = f"expected {len(cell_names)} x 2 numbers; put x and y there"
        return None, f'obsm["{key}"] is {shape} of {values.dtype}, {expected}', []
    values = values.astype(np.float64)
    said = []
    if values.shape[1] == 3:
        varies = np.array([not _tells_nothing(column) for column in values.T])
        constant = np.flatnonzero(~varies)
        left_out = constant[-1] if len(constant) else 2
        known = np.unique(values[:, left_out])
        kind = "constant" if np.isfinite(known).sum() < 2 else "counting"
        values = np.delete(values, left_out, axis=1)
        what = (
            f"the {kind} one (number {left_out + 1}) was left out"
            if len(constant)
            else "the first two were used; a slide is flat: give sections one by one (--slide-key)"
        )
        said = [f'obsm["{key}"] has three columns: {what}']
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        return (
            None,
            (
                f'obsm["{key}"] is NaN or infinite for {bad.sum()} of {len(values)} cells '
                f"({some_names(cell_names[bad])}); remove these cells or give them positions"
            ),
            said,
        )
    return np.ascontiguousarray(values), None, said


def _tells_nothing(column: np.ndarray) -> bool:
    """Whether a column is constant, or numbers the cells."""
    known = np.unique(column[np.isfinite(column)])
    return len(known) < 2 or (len(known) == len(column) > 9 and bool((np.diff(known) == 1).all()))


def flatness(pos: np.ndarray) -> str | None:
    """``"one point"`` or ``"one line"`` if that is all that positions (n, 2) are."""
    if len(pos) < 3:
        return None
    centred = pos - pos.mean(axis=0)
    largest = np.abs(centred).max()
    if largest <= 1e-12 * max(np.abs(pos).max(), 1e-300):
        return "one point"
    length, width = np.linalg.svd(centred / largest, compute_uv=False)
    return "one line" if width <= _FLAT * length else None


def stray_cells(pos: np.ndarray) -> np.ndarray:
    """Cells that are not where the tissue is (n,): few far from all others, or many at one point.

    Args:
        pos: positions (n, 2).
    """
    n = len(pos)
    stray = np.zeros(n, dtype=bool)
    if n < 20:
        return stray
    centre = np.median(pos, axis=0)
    reach = np.linalg.norm(pos - centre, axis=1)
    ordered = np.sort(reach)
    usual = ordered[int((1 - _FEW) * n) - 1]
    stray |= reach > _STRETCH * max(usual, 1e-300)
    _, place, count = np.unique(pos, axis=0, return_inverse=True, return_counts=True)
    heaped = count >= max(5, _SAME * n)
    if count[heaped].sum() > _FEW * n:  # where many share a place, places are coarse
        heaped &= count > _HEAP * np.median(count)
    stray |= heaped[place.ravel()]
    return stray


def stretch(pos: np.ndarray, stray: np.ndarray) -> float:
    """How many times wider the tissue is with some cells than without them."""
    return float(np.ptp(pos, axis=0).max() / max(np.ptp(pos[~stray], axis=0).max(), 1e-300))
