"""Exact nearest neighbours of points in two or three dimensions, in torch alone.

Points are put in Morton order and cut into leaves of equal size, over which stands a binary tree
of bounding boxes. The k-th distance among the points of a leaf and its two neighbours bounds how
far the leaf has to look. Leaves within that bound are found from the root down, all at once, and
searched by brute force. Time O(n log n) on points of bounded density, memory O(n k).
"""

import math

import torch
from torch import Tensor

from ..distributed import added_rows, rank, shares_rows, size

_LEAF = 64  # points; at least k + 1
_PAIRS = 1 << 26  # distances held at once
_BITS = {1: 62, 2: 31, 3: 20}  # of a coordinate in a Morton code, by dimension


def search(points: Tensor, k: int) -> Tensor:
    """The k nearest of every point among the others, nearest first; ties in no fixed order.

    Args:
        points: (n, d), finite, d at most 3.
        k: 1 to n - 1.

    Returns:
        Numbers of the points (n, k), int32.
    """
    n = points.size(0)
    leaf = max(_LEAF, 32 * math.ceil((k + 1) / 32))
    number = _morton(points).argsort()
    x, boxes = _leaves(points[number], leaf)
    pairs = _pairs(boxes, _reach(x, k, n))
    queries, count = pairs[0].unique_consecutive(return_counts=True)
    first = count.cumsum(0) - count
    out = torch.zeros(n, k, dtype=torch.int32, device=points.device)
    order = count.argsort()
    if shares_rows():
        order = order[rank() :: size()]
    sizes = count[order].tolist()
    start = 0
    while start < len(sizes):
        stop = start + 1
        while stop < len(sizes) and (stop + 1 - start) * leaf**2 * sizes[stop] <= _PAIRS:
            stop += 1
        here = order[start:stop]
        slot = torch.arange(sizes[stop - 1], device=points.device)
        known = slot < count[here].unsqueeze(1)
        other = pairs[1][(first[here].unsqueeze(1) + slot).clamp(max=len(pairs[1]) - 1)]
        _search_leaves(x, queries[here], other, known, k, number, out)
        start = stop
    return added_rows(out)


def _search_leaves(
    x: Tensor, own: Tensor, other: Tensor, known: Tensor, k: int, number: Tensor, out: Tensor
) -> None:
    """Write the neighbours of the points of some leaves (q,), sought in others (q, m)."""
    n, leaf = len(number), x.size(1)
    inside = torch.arange(leaf, device=x.device)
    place = own.unsqueeze(1) * leaf + inside  # of queries in Morton order (q, leaf)
    seen = (other.unsqueeze(-1) * leaf + inside).flatten(1)
    square = _square(x[own], x[other].flatten(1, 2))
    valid = (known.unsqueeze(-1).expand(*known.shape, leaf).flatten(1)) & (seen < n)
    square.masked_fill_(~valid.unsqueeze(1), math.inf)
    square.masked_fill_(seen.unsqueeze(1) == place.unsqueeze(2), math.inf)
    nearest = square.topk(k, dim=-1, largest=False).indices
    found = seen.unsqueeze(1).expand(-1, leaf, -1).gather(2, nearest)
    real = place < n
    out[number[place[real]]] = number[found[real]].int()


def _morton(points: Tensor) -> Tensor:
    """Morton codes (n,) of points."""
    d = points.size(1)
    bits = min(21, _BITS[d])
    low, high = points.aminmax(dim=0)
    unit = (points - low) / (high - low).clamp(min=torch.finfo(points.dtype).tiny)
    cell = (unit.double() * (2**bits - 1)).long()
    code = torch.zeros_like(cell[:, 0])
    for bit in range(bits):
        for axis in range(d):
            code |= ((cell[:, axis] >> bit) & 1) << (bit * d + axis)
    return code


def _leaves(x: Tensor, leaf: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Leaves (L, leaf, d) of points in order, and corners of boxes, from the root to the leaves.

    The last leaf is filled up with copies of its last point, which are told by their place.
    """
    count = math.ceil(len(x) / leaf)
    x = torch.cat([x, x[-1:].expand(count * leaf - len(x), -1)]).view(count, leaf, -1)
    boxes = [(x.amin(1), x.amax(1))]
    while len(boxes[0][0]) > 1:
        low, high = boxes[0]
        if len(low) % 2:
            low, high = torch.cat([low, low[-1:]]), torch.cat([high, high[-1:]])
        boxes.insert(0, (low.view(-1, 2, low.size(1)).amin(1), high.view(-1, 2, x.size(2)).amax(1)))
    return x, boxes


def _reach(x: Tensor, k: int, n: int) -> Tensor:
    """A bound on the squared distance of a leaf's points from their k-th nearest (L,)."""
    count, leaf, _ = x.shape
    inside = torch.arange(leaf, device=x.device)
    parts = []
    for rows in torch.arange(count, device=x.device).split(max(1, _PAIRS // (3 * leaf**2))):
        around = torch.stack([rows - 1, rows, rows + 1], 1)
        there = (around >= 0).unsqueeze(-1) & (around.unsqueeze(-1) * leaf + inside < n)
        around = around.clamp(0, count - 1)
        square = _square(x[rows], x[around].flatten(1, 2))
        square.masked_fill_(~there.flatten(1).unsqueeze(1), math.inf)
        parts.append(square.topk(k + 1, dim=-1, largest=False).values[..., -1].amax(1))
    # A little more, for the rounding of corners and differences.
    return torch.cat(parts) * (1 + 1e-4)


def _square(x: Tensor, others: Tensor) -> Tensor:
    """Squared distances (q, a, b) of points (q, a, d) from others (q, b, d)."""
    total = x.new_zeros(len(x), x.size(1), others.size(1))
    for axis in range(x.size(2)):
        gap = x[..., axis].unsqueeze(2) - others[..., axis].unsqueeze(1)
        total.addcmul_(gap, gap)
    return total


def _pairs(boxes: list[tuple[Tensor, Tensor]], reach: Tensor) -> tuple[Tensor, Tensor]:
    """Leaves and the leaves within their reach, (P,) each, in the order of the first."""
    low, high = boxes[-1]
    query = torch.arange(len(reach), device=reach.device)
    node = torch.zeros_like(query)
    for level, (node_low, node_high) in enumerate(boxes):
        if level:
            query = query.repeat_interleave(2)
            node = torch.stack([2 * node, 2 * node + 1], 1).flatten()
            real = node < len(node_low)
            query, node = query[real], node[real]
        gap = torch.maximum(node_low[node] - high[query], low[query] - node_high[node])
        near = gap.clamp(min=0).square().sum(-1) <= reach[query]
        query, node = query[near], node[near]
    return query, node
