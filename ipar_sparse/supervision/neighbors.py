"""Spatial neighbour lists and undirected pairs, from which targets are built."""

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from ..geometry.gauge import gauge_fix
from ..graph import knn

EXACT_LIMIT = 4096  # nodes; beyond, all neighbours within 0.15 n would be O(n^2) pairs


def default_k(num_nodes: int) -> int:
    """Neighbours of the target graph of a miniset: max(20, 0.15 n), at most n - 1."""
    return max(0, min(num_nodes - 1, max(20, 15 * num_nodes // 100)))


def reference_positions(pos: Tensor | np.ndarray) -> Tensor:
    """True positions (n, 2) as float64 on the CPU, in the unit-RMS gauge.

    Raises:
        ValueError: on positions that are not a finite (n, 2) matrix with n >= 1.
    """
    pos = torch.as_tensor(pos).detach().to("cpu", torch.float64)
    if pos.dim() != 2 or pos.size(1) != 2 or not len(pos):
        raise ValueError(f"positions must be (n, 2) with n >= 1; given {tuple(pos.shape)}")
    if not bool(torch.isfinite(pos).all()):
        row = int((~torch.isfinite(pos)).any(-1).nonzero()[0])
        raise ValueError(f"positions must be finite; node {row} has NaN or infinity")
    return gauge_fix(pos)


def refuse_large(num_nodes: int) -> None:
    """Raise a ValueError where all neighbours within 0.15 n are too many."""
    if num_nodes > EXACT_LIMIT:
        raise ValueError(
            f"an exact target of {num_nodes} nodes needs O(n^2) pairs; use "
            f"build_target(mode='sketch') beyond {EXACT_LIMIT}"
        )


def spatial_neighbors(pos: Tensor, k: int | None = None) -> np.ndarray:
    """The k nearest of every node (n, k), by default :func:`default_k` of them."""
    k = default_k(len(pos)) if k is None else min(k, len(pos) - 1)
    if k < 1:
        return np.empty((len(pos), 0), dtype=np.int64)
    return knn(pos, k, backend="kdtree").index.numpy()


def sketch_neighbors(pos: Tensor, partners: int, seed: int) -> np.ndarray:
    """A random sample of each node's 0.15 n nearest, about ``partners`` of them.

    All of the 0.15 n nearest where n is small.
    """
    n = len(pos)
    groups = 15 * n // (100 * max(partners, 1)) if default_k(n) > 20 else 1
    groups = max(1, groups)
    rng = np.random.default_rng([seed, 1])
    return sampled_neighbors(pos.numpy(), default_k(n) // groups, groups, rng)


def sampled_neighbors(xy: np.ndarray, k: int, groups: int, rng: np.random.Generator) -> np.ndarray:
    """For each node its k nearest in one of ``groups`` random parts of the slide, (n, k).

    The k nearest of a random n / groups nodes are a random k of the k * groups nearest.
    """
    if groups == 1:
        return spatial_neighbors(torch.from_numpy(xy), k)
    n = len(xy)
    index = np.empty((n, k), dtype=np.int64)
    members = np.array_split(rng.permutation(n), groups)
    queries = np.array_split(rng.permutation(n), groups)
    for member, query in zip(members, queries, strict=True):
        found = member[cKDTree(xy[member]).query(xy[query], k + 1)[1]]
        own = found == query[:, None]
        own[:, -1] |= ~own.any(-1)
        index[query] = found[~own].reshape(len(query), k)
    return index


def directed_pairs(index: np.ndarray) -> np.ndarray:
    """Neighbour lists (n, k) as pairs (2, n k): neighbour, node."""
    n, k = index.shape
    return np.stack([index.reshape(-1).astype(np.int64), np.repeat(np.arange(n), k)])


def unique_pairs(pairs: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Undirected pairs low < high, each once in ascending order, and how often each occurred."""
    key = pairs.min(axis=0) * n + pairs.max(axis=0)
    key.sort()
    start = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])[: len(key)])
    low, high = np.divmod(key[start], max(n, 1))
    return low, high, np.diff(start, append=len(key))
