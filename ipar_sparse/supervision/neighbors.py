"""Spatial neighbour lists and undirected pairs, from which targets are built."""

from collections.abc import Iterable

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from ..geometry.gauge import gauge_fix
from ..graph import knn

_ROWS = 1 << 16  # nodes whose pairs are told apart at once
_PAIRS = 1 << 25  # distances held at once on a GPU
EXACT_LIMIT = 4096  # nodes; beyond, all neighbours within 0.15 n would be O(n^2) pairs


def default_k(num_nodes: int) -> int:
    """Neighbours of the target graph of a miniset: max(20, 0.15 n), at most n - 1."""
    return max(0, min(num_nodes - 1, max(20, 15 * num_nodes // 100)))


def reference_positions(pos: Tensor | np.ndarray) -> Tensor:
    """True positions (n, 2) as float64 where they are, in the unit-RMS gauge.

    Raises:
        ValueError: on positions that are not a finite (n, 2) matrix with n >= 1.
    """
    pos = torch.as_tensor(pos).detach().double()
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


def spatial_neighbors(pos: Tensor, k: int | None = None) -> Tensor:
    """The k nearest of every node (n, k), int64, by default :func:`default_k` of them."""
    k = default_k(len(pos)) if k is None else min(k, len(pos) - 1)
    if k < 1:
        return torch.empty(len(pos), 0, dtype=torch.int64, device=pos.device)
    return knn(pos, k, backend="auto" if pos.is_cuda else "kdtree").index.long()


def sketch_neighbors(pos: Tensor, partners: int, seed: int) -> Tensor:
    """A random sample of each node's 0.15 n nearest, about ``partners`` of them.

    All of the 0.15 n nearest where n is small.
    """
    n = len(pos)
    groups = 15 * n // (100 * max(partners, 1)) if default_k(n) > 20 else 1
    groups = max(1, groups)
    rng = np.random.default_rng([seed, 1])
    return sampled_neighbors(pos, default_k(n) // groups, groups, rng)


def sampled_neighbors(pos: Tensor, k: int, groups: int, rng: np.random.Generator) -> Tensor:
    """For each node its k nearest in one of ``groups`` random parts of the slide, (n, k), int64.

    The k nearest of a random n / groups nodes are a random k of the k * groups nearest.
    """
    if groups == 1:
        return spatial_neighbors(pos, k)
    n = len(pos)
    members, queries = rng.permutation(n), rng.permutation(n)
    if pos.is_cuda and (n // groups + 1) ** 2 <= _PAIRS:
        return _nearest_in_parts(pos, k, groups, members, queries)
    xy, index = pos.cpu().numpy(), np.empty((n, k), dtype=np.int64)
    parts = np.array_split(members, groups), np.array_split(queries, groups)
    for member, query in zip(*parts, strict=True):
        found = member[cKDTree(xy[member]).query(xy[query], k + 1, workers=-1)[1]]
        own = found == query[:, None]
        own[:, -1] |= ~own.any(-1)
        index[query] = found[~own].reshape(len(query), k)
    return torch.from_numpy(index).to(pos.device)


def _nearest_in_parts(
    pos: Tensor, k: int, groups: int, members: np.ndarray, queries: np.ndarray
) -> Tensor:
    """The k nearest of the queries of each part among its members, parts side by side."""
    n, device = len(pos), pos.device
    longer, width = n % groups, -(-n // groups)  # the first parts have one node more
    part = torch.arange(groups, device=device).unsqueeze(1)
    slot = torch.arange(width, device=device)
    real = slot < width - (part >= longer).long() * (longer > 0)
    place = (part * (n // groups) + part.clamp(max=longer) + slot).clamp(max=n - 1)
    member, query = (torch.from_numpy(x).to(device)[place] for x in (members, queries))
    index = torch.empty(n, k, dtype=torch.int64, device=device)
    for rows in torch.arange(groups, device=device).split(max(1, _PAIRS // width**2)):
        own, other, valid = query[rows], member[rows], real[rows]
        square = (pos[own].unsqueeze(2) - pos[other].unsqueeze(1)).square().sum(-1)
        square.masked_fill_(own.unsqueeze(2) == other.unsqueeze(1), torch.inf)
        square.masked_fill_(~valid.unsqueeze(1), torch.inf)
        nearest = square.topk(k, dim=-1, largest=False).indices
        found = other.unsqueeze(1).expand(-1, width, -1).gather(2, nearest)
        index[own[valid]] = found[valid]
    return index


def directed_pairs(index: Tensor) -> Tensor:
    """Neighbour lists (n, k) as pairs (2, n k): neighbour, node."""
    n, k = index.shape
    node = torch.arange(n, device=index.device).unsqueeze(1).expand(n, k)
    return torch.stack([index.reshape(-1), node.reshape(-1)])


def touching_pairs(index: Tensor, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`unique_pairs` of neighbour lists (n, k), of which a node lies from start to end."""
    pairs = []
    for first in range(0, len(index), _ROWS):
        part = directed_pairs(index[first : first + _ROWS])
        part[1] += first
        pairs.append(part[:, ((part >= start) & (part < end)).any(0)])
    return unique_pairs(pairs, len(index))


def unique_pairs(parts: Iterable[Tensor], n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Undirected pairs low < high, each once in ascending order, and how often each occurred.

    Args:
        parts: pairs (2, m), which are needed one after the other.
        n: number of nodes.
    """
    keys = [torch.minimum(*pairs) * n + torch.maximum(*pairs) for pairs in parts]
    key = torch.cat(keys) if len(keys) > 1 else keys[0]
    del keys
    # NumPy sorts integers several times faster than torch does on the host
    key = key.sort().values if key.is_cuda else torch.from_numpy(np.sort(key.numpy()))
    key, count = key.unique_consecutive(return_counts=True)
    n = max(n, 1)
    return key.div(n, rounding_mode="floor"), key.remainder(n), count
