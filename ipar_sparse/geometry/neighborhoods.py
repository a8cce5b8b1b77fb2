"""Points in the plane: checked, centred and scaled, sampled, and their nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

if TYPE_CHECKING:
    from scipy.spatial import cKDTree

# Relative. Distances this close count as equal: float32 positions, spots on a regular grid.
_TIE = 1e-6
_QUERY_ROWS = 1 << 17  # points whose neighbours are held in memory at once


def as_layout(pos: Tensor | ArrayLike, what: str = "positions", min_points: int = 1) -> np.ndarray:
    """A layout as float64 (n, 2) on the host.

    Args:
        pos: positions (n, 2), tensor or array, any units.
        what: what errors call it.
        min_points: least number of points that the caller accepts.

    Raises:
        ValueError: if the shape is not (n, 2), there are too few points, or one is not finite.
    """
    array = pos.detach().cpu().double().numpy() if torch.is_tensor(pos) else np.asarray(pos)
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"{what} must be (n, 2); given shape {tuple(array.shape)}")
    if array.shape[0] < min_points:
        raise ValueError(f"{what} must have at least {min_points} points; given {array.shape[0]}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise ValueError(
            f"{what} must be finite; row {row} has NaN or infinity: drop or mend it first"
        )
    return array


def unit_gauge(pos: np.ndarray) -> np.ndarray:
    """Centre and scale to unit root-mean-square radius; a layout of one point becomes zeros.

    :func:`ipar_sparse.geometry.gauge.gauge_fix` does the same with gradients. This one also
    works on very large units, and does not scale up the rounding noise of a constant layout.

    Args:
        pos: positions (n, 2), finite, any units.

    Returns:
        Positions (n, 2), float64.
    """
    largest = np.abs(pos).max(initial=0.0)
    if largest == 0:
        return np.zeros_like(pos)
    scaled = pos / largest
    scaled = scaled - scaled.mean(axis=0)
    largest = np.abs(scaled).max()
    if largest <= 64 * np.finfo(np.float64).eps:
        return np.zeros_like(pos)
    scaled = scaled / largest
    return scaled / np.sqrt(np.square(scaled).sum(axis=1).mean())


def sample_pairs(n: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random pairs of different points, drawn uniformly with replacement.

    Args:
        n: number of points, at least 2.
        count: number of pairs.
        rng: source of the draw.

    Returns:
        Point numbers (count,) and (count,).
    """
    first = rng.integers(0, n, count)
    second = rng.integers(0, n - 1, count)
    return first, second + (second >= first)


def jitter(n: int, seed: int) -> np.ndarray:
    """Displacements (n, 2) of 1e-9, which break ties of a unit-gauge layout at random.

    Without them the row number breaks a tie, and cells are often stored in spatial order.
    """
    return 1e-9 * np.random.default_rng([seed, 7]).uniform(-1.0, 1.0, (n, 2))


def nearest(
    tree: cKDTree, pos: np.ndarray, rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distances to the k nearest other points, and their numbers.

    Args:
        tree: of ``pos``.
        pos: points (n, 2).
        rows: numbers of the points asked about (m,).
        k: at most n - 1.

    Returns:
        Distances (m, k), nearest first, and point numbers (m, k).
    """
    distance, index = tree.query(pos[rows], k=k + 1, workers=-1)
    own = index == rows[:, None]
    own[:, -1] |= ~own.any(axis=1)  # duplicates may push a point off its own list
    shape = (len(rows), k)
    return distance[~own].reshape(shape), index[~own].reshape(shape)


class TrueNeighborhoods:
    r"""The spatial neighbours of a cell: all cells no farther away than its k-th nearest.

    .. math::
        S_i = \{ j \ne i : \|x_i - x_j\| \le r_i (1 + 10^{-6}) \}, \quad
        r_i = \text{distance from i to its k-th nearest cell}

    On cells in general position :math:`|S_i| = k`. On a regular grid several cells share the
    k-th distance, and rounding decides which of them a search returns. Here all of them count.

    Args:
        pos: true positions (n, 2), finite.
        ks: neighbourhood sizes; each is lowered to n - 1 where there are fewer cells.

    Attributes:
        k: the lowered size of each k.
        size: number of cells in S_i (n,) for each k. At most k + 8 ties are counted.
    """

    def __init__(self, pos: np.ndarray, ks: tuple[int, ...]):
        self.pos = unit_gauge(pos)
        n = len(pos)
        self.k = {k: min(k, n - 1) for k in ks}
        self.size = {k: np.zeros(n, dtype=np.int64) for k in ks}
        self._reach = {k: np.zeros(n) for k in ks}
        widest = max(self.k.values(), default=0)
        width = min(n - 1, 2 * widest + 8)
        if width < 1:
            return
        from scipy.spatial import cKDTree  # loads much, which a prediction does without

        tree = cKDTree(self.pos)
        for start in range(0, n, _QUERY_ROWS):
            rows = np.arange(start, min(n, start + _QUERY_ROWS))
            distance, _ = nearest(tree, self.pos, rows, width)
            for k, effective in self.k.items():
                reach = distance[:, effective - 1] * (1 + _TIE)
                self._reach[k][rows] = reach
                self.size[k][rows] = (distance <= reach[:, None]).sum(axis=1)

    def contains(self, rows: np.ndarray, others: np.ndarray, k: int) -> np.ndarray:
        """Whether cells are spatial neighbours of others.

        Args:
            rows: cells (m,).
            others: cells compared with each of them (m, c), padded with -1.
            k: one of ``ks``.

        Returns:
            (m, c) bool; False for padding and for the cell itself.
        """
        offset = self.pos[others] - self.pos[rows][:, None, :]
        distance = np.sqrt(np.square(offset).sum(axis=-1))
        near = distance <= self._reach[k][rows][:, None]
        return near & (others >= 0) & (others != rows[:, None])

    def chance(self, k: int) -> float:
        """Probability that a random other cell is a neighbour: k / (n - 1), more with ties."""
        n = len(self.pos)
        return float(self.size[k].mean() / (n - 1)) if n > 1 else 1.0


class Shifts:
    """The shifts of one step of many, at a place that stays the same on a GPU.

    Args:
        values: of all steps (steps, m), int64.
        device: where they are needed.
        as_list: on the host, give numbers rather than a tensor.
    """

    def __init__(self, values: Tensor, device: torch.device, as_list: bool = True) -> None:
        self._host = values.tolist() if as_list and device.type != "cuda" else None
        self._values = values.to(device)
        self.now: Any = self._values[0].clone()

    def take(self, step: int) -> None:
        """Go to a step."""
        if self._host is not None:
            self.now = self._host[step]
        else:
            self.now.copy_(self._values[step])


def opposite(shifts: list[int] | Tensor, n: int) -> list[int] | Tensor:
    """The shifts of n points that undo these."""
    return n - shifts if isinstance(shifts, Tensor) else [n - s for s in shifts]


def rows_at(values: Tensor, rows: Tensor) -> Tensor:
    """``values[rows]`` (n, m, ...) of rows (n, m), in a quarter of the time on a CPU."""
    return values.index_select(0, rows.flatten()).view(*rows.shape, *values.shape[1:])


def square_length(gap: Tensor) -> Tensor:
    """Squared lengths (...) of vectors (..., 2): the bits of a sum, in a fifth of its time."""
    square = gap.square()
    return square[..., 0] + square[..., 1]


def rolled(values: Sequence[Tensor] | Tensor, shifts: list[int] | Tensor) -> Tensor:
    """Values of points, each set rolled by its own shift, in one copy.

    Args:
        values: as many tensors (n, ...) as shifts, or one tensor (shifts, n, ...).
        shifts: numbers of points, each 1 to n - 1; a list, or a tensor that is read on its device.

    Returns:
        (shifts, n, ...).
    """
    if isinstance(shifts, Tensor):
        n = values[0].size(0)
        source = (torch.arange(n, device=shifts.device) - shifts.unsqueeze(1)).remainder_(n)
        if not isinstance(values, Tensor):
            return values[0][source]  # the same values for every shift
        first = n * torch.arange(len(shifts), device=shifts.device)
        return values.flatten(0, 1)[source + first.unsqueeze(1)]
    parts = [(x[-s:], x[:-s]) for x, s in zip(values, shifts, strict=True)]
    flat = torch.cat([part for pair in parts for part in pair])
    return flat.view(len(shifts), -1, *flat.shape[1:])
