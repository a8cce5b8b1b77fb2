"""Node orders in which neighbours are close in memory.

Edge attention reads k rows for every node, and its speed depends on how many of them a cache
holds. In an order that follows the points, consecutive nodes read the same rows. An order is found
once a graph. Results do not depend on it beyond rounding.
"""

import torch
from torch import Tensor

from .table import NeighborTable

_COMPONENTS = 16  # principal components in which points are ordered
_LEAF = 32  # points; within so few, the order does not matter to a cache


def bisection_order(points: Tensor, *, leaf: int = _LEAF) -> Tensor:
    """Order points by recursive halving along the local principal direction.

    Every part is cut at its median into two consecutive halves, as in a principal-axis tree. The
    direction of a part is signed to point from the part before it to the part after it. All parts
    of one level are handled at once: O(n log n), without synchronisation with the host.

    Args:
        points: (n, d), floating point.
        leaf: parts are halved until they hold at most this many points (default: 32).

    Returns:
        A permutation (n,), int64: new node i is old node ``perm[i]``.
    """
    n = points.size(0)
    levels = max(0, (max(n - 1, 0) // leaf).bit_length())
    device = points.device
    if levels == 0:
        return torch.arange(n, device=device)
    x = _components(points)
    # Copies of evenly spaced points pad to equal halves; they are dropped at the end.
    size = -(-n // (1 << levels)) << levels
    copies = torch.arange(size - n, device=device) * n // max(size - n, 1)
    order = torch.cat([torch.arange(n, device=device), copies])
    ids = torch.arange(size, device=device)
    x = x[order]
    for level in range(levels):
        parts = x.view(1 << level, -1, x.size(1))
        mean = parts.mean(dim=1, keepdim=True)
        direction = _principal_direction(parts - mean)
        along = torch.cat([mean[1:], mean[-1:]]) - torch.cat([mean[:1], mean[:-1]])
        flip = (along.squeeze(1) * direction).sum(-1, keepdim=True) < 0
        direction = torch.where(flip, -direction, direction)
        key = torch.bmm(parts, direction.unsqueeze(-1)).squeeze(-1)
        rank = key.argsort(dim=1, stable=True)
        rank += torch.arange(1 << level, device=device).unsqueeze(-1) * parts.size(1)
        x, ids = x[rank.flatten()], ids[rank.flatten()]
    return ids[ids < n]


def reorder(graph: NeighborTable, points: Tensor) -> tuple[NeighborTable, Tensor, Tensor]:
    """The graph with its nodes renumbered by :func:`bisection_order`; found once and cached.

    Fused attention over a graph that has been reordered runs in the new order internally; inputs
    and outputs stay in the user's. It is faster from 40,000 nodes on.

    Per-node values go in as ``value[perm]`` and come back as ``value[inverse]``. Slots keep their
    place in a row, so per-edge values (n, k, ...) follow their rows in the same way.

    Args:
        graph: a graph on one node set.
        points: points in which the neighbours were found, usually embeddings (n, d).

    Returns:
        The renumbered graph, ``perm`` and ``inverse`` (n,), int64.
    """

    def build():
        with torch.autocast(points.device.type, enabled=False):
            perm = bisection_order(points.detach())
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.numel(), device=perm.device)
        local = graph.permute(perm)
        if "joined" not in graph._cache:
            local._cache["local"] = True
        return local, perm, inverse

    return graph._cached("reordered", build)


def is_local(graph: NeighborTable) -> bool:
    """Whether a graph is the result of :func:`reorder`, and not of graphs joined for a step."""
    return "local" in graph._cache


def local_order(graph: NeighborTable) -> tuple[NeighborTable, Tensor, Tensor] | None:
    """The result of :func:`reorder` on this graph; None if it was not called."""
    return graph._cache.get("reordered")


def source_reuse(graph: NeighborTable, tile: int = 1024) -> float:
    """Mean number of uses of a gathered row within a tile of consecutive destinations.

    The number of edges over that of distinct sources in a tile: 1 where no two rows share a
    neighbour, ``tile`` where all rows share all of them.
    """
    distinct = 0
    tiles = max(1, (1 << 24) // max(1, tile * graph.k))
    for rows in graph.index.split(tile * tiles):
        number = torch.arange(rows.size(0), device=rows.device) // tile
        key = number.unsqueeze(-1) * graph.num_src_nodes + rows.long()
        distinct += torch.unique(key[rows >= 0]).numel()
    return graph.num_edges / max(distinct, 1)


def _components(points: Tensor) -> Tensor:
    """Leading principal components, float32."""
    x = points.float()
    x = x - x.mean(dim=0, keepdim=True)
    if x.size(1) <= _COMPONENTS:
        return x
    covariance = x.T @ x / x.size(0)
    return x @ torch.linalg.eigh(covariance).eigenvectors[:, -_COMPONENTS:]


def _principal_direction(centred: Tensor, squarings: int = 6) -> Tensor:
    """Unit leading eigenvector of every part's covariance: (S, m, p) to (S, p)."""
    covariance = torch.bmm(centred.transpose(1, 2), centred)
    variance = torch.diagonal(covariance, dim1=1, dim2=2)
    axis = torch.nn.functional.one_hot(variance.argmax(dim=1), centred.size(2)).to(centred.dtype)
    # Each squaring doubles the number of power iterations done.
    trace = variance.sum(-1)[:, None, None].clamp(min=torch.finfo(centred.dtype).tiny)
    power = covariance / trace
    for _ in range(squarings):
        power = torch.bmm(power, power)
        norm = torch.linalg.matrix_norm(power, keepdim=True)
        power = power / norm.clamp(min=torch.finfo(centred.dtype).tiny)
    direction = torch.bmm(power, axis.unsqueeze(-1)).squeeze(-1)
    norm = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    return torch.where(norm > 0, direction / norm.clamp(min=1e-30), axis)
