"""Small helpers on points, shared by what draws layouts, scores them and diagnoses the model."""

import numpy as np
import torch
from scipy.spatial import cKDTree

_TIE = 1e-6  # relative; distances this close are equal (float32 positions, regular spot grids)
_QUERY_ROWS = 1 << 17  # rows of a tree query held at once


def as_layout(pos, what: str = "positions", min_points: int = 1) -> np.ndarray:
    """A layout as float64 (n, 2) on the host.

    Args:
        pos: (n, 2), tensor or array, any units.
        what: the name to use in errors.
        min_points: the fewest points that make sense to the caller.

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

    Unlike :func:`ipar_sparse.geometry.gauge.gauge_fix`, which has to keep gradients finite, this must not
    blow rounding noise of a constant layout up into a shape, nor overflow on large units.
    """
    largest = np.abs(pos).max(initial=0.0)
    if largest == 0:
        return np.zeros_like(pos)
    scaled = pos / largest
    scaled = scaled - scaled.mean(axis=0)
    spread = np.abs(scaled).max()
    if spread <= 64 * np.finfo(np.float64).eps:
        return np.zeros_like(pos)
    scaled = scaled / spread
    return scaled / np.sqrt(np.square(scaled).sum(axis=1).mean())


def sample_pairs(n: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """``count`` independent uniform draws (with replacement) of two different points."""
    first = rng.integers(0, n, count)
    second = rng.integers(0, n - 1, count)
    return first, second + (second >= first)


def jitter(n: int, seed: int) -> np.ndarray:
    """Displacements (n, 2) of 1e-9 that break ties in a unit-gauge layout at random.

    Without them a tie is broken by row number, and row numbers are often spatial.
    """
    return 1e-9 * np.random.default_rng([seed, 7]).uniform(-1.0, 1.0, (n, 2))


def nearest(
    tree: cKDTree, pos: np.ndarray, rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distances and numbers (len(rows), k) of the k nearest points, self left out."""
    distance, index = tree.query(pos[rows], k=k + 1, workers=-1)
    own = index == rows[:, None]
    own[:, -1] |= ~own.any(axis=1)  # duplicates of the point have displaced it from its own list
    shape = (len(rows), k)
    return distance[~own].reshape(shape), index[~own].reshape(shape)


class TrueNeighborhoods:
    r"""Who counts as a spatial neighbour: every cell no farther than the k-th nearest one.

    .. math::
        S_i = \{ j \ne i : \|x_i - x_j\| \le r_i (1 + 10^{-6}) \}, \quad
        r_i = \text{distance from i to its k-th nearest cell}

    On cells in general position :math:`|S_i| = k`. On a regular grid the k-th place is shared
    by several cells, and which of them a search returns is rounding noise; all of them count.

    Args:
        pos: true positions (n, 2), finite.
        ks: the neighbourhood sizes wanted; each is lowered to n - 1 where there are fewer cells.

    Attributes:
        size: dict k -> (n,) number of cells in S_i. Ties beyond k + 8 more cells are not counted.
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
        tree = cKDTree(self.pos)
        for start in range(0, n, _QUERY_ROWS):
            rows = np.arange(start, min(n, start + _QUERY_ROWS))
            distance, _ = nearest(tree, self.pos, rows, width)
            for k, effective in self.k.items():
                reach = distance[:, effective - 1] * (1 + _TIE)
                self._reach[k][rows] = reach
                self.size[k][rows] = (distance <= reach[:, None]).sum(axis=1)

    def contains(self, rows: np.ndarray, others: np.ndarray, k: int) -> np.ndarray:
        """Whether ``others`` (m, c) are in S of ``rows`` (m,); padding (-1) and self never are."""
        offset = self.pos[others] - self.pos[rows][:, None, :]
        distance = np.sqrt(np.square(offset).sum(axis=-1))
        near = distance <= self._reach[k][rows][:, None]
        return near & (others >= 0) & (others != rows[:, None])

    def chance(self, k: int) -> float:
        """Probability that a random other cell is a neighbour: k / (n - 1), more with ties."""
        n = len(self.pos)
        return float(self.size[k].mean() / (n - 1)) if n > 1 else 1.0


def rolled(values, shifts: list[int]) -> torch.Tensor:
    """Values of points (n, ...), each rolled by its shift (1 to n - 1), in one copy.

    Args:
        values: as many tensors (n, ...) as shifts, or one (shifts, n, ...).
        shifts: by how many points.

    Returns:
        (shifts, n, ...).
    """
    parts = [(x[-s:], x[:-s]) for x, s in zip(values, shifts, strict=True)]
    flat = torch.cat([part for pair in parts for part in pair])
    return flat.view(len(shifts), -1, *flat.shape[1:])
