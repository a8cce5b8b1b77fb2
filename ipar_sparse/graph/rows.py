"""One graph over several ranks: each holds some rows, and fetches the sources that they point at.

Rows are dealt in an order in which neighbours are close (:mod:`.order`), so that most sources of
a rank's rows are its own. Only the others are moved, which is never more than a gather of all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from ..distributed import gathered, rank, rank_losses, size, summed
from .order import bisection_order
from .table import NeighborTable

_ROWS = 1 << 20  # rows renumbered at once


class HeldRows:
    """The rows of a graph that this rank holds.

    Args:
        graph: all rows, the same on all ranks; one node set.
        points: in which the neighbours were found (n, d).

    Attributes:
        own: numbers of the rows that are held (m,).
        nodes: these, and the sources of their edges that other ranks hold (m + h,).
        graph: their rows (m, k), with sources numbered as in ``nodes``.
        rowptr: first edge of each row of the whole graph (n + 1,), where rows are padded.
    """

    def __init__(self, graph: NeighborTable, points: Tensor):
        n = graph.num_nodes
        perm = bisection_order(points.detach())
        with rank_losses():
            dist.broadcast(perm, src=0)
        ends = [n * number // size() for number in range(size() + 1)]
        start, end = ends[rank()], ends[rank() + 1]
        self.total, self.own = n, perm[start:end]
        index, outside, halo = dealt_rows(graph, perm, start, end)
        number = end - start + torch.searchsorted(halo, index[outside])
        index = torch.where(index >= 0, index - start, -1)
        index[outside] = number
        self.nodes = torch.cat([self.own, perm[halo]])
        self.graph = NeighborTable(index.int(), len(self.nodes), padded=graph.padded)
        self.rowptr = graph.rowptr if graph.padded else None
        self._plan(halo, ends)

    def _plan(self, halo: Tensor, ends: list[int]) -> None:
        """Which rows go to which rank, from what each asks for."""
        bounds = torch.searchsorted(halo, torch.tensor(ends, device=halo.device))
        self.fetched = bounds.diff().tolist()
        self.sent = [asked[rank()] for asked in gathered(self.fetched)]
        self.rows = _moved(halo, self.sent, self.fetched) - ends[rank()]

    def sources(self, values: Tensor) -> Tensor:
        """Values of the held rows (m, ...) as those of all ``nodes`` (m + h, ...)."""
        given = values.index_select(0, self.rows)
        return torch.cat([values, _Exchange.apply(given, self.fetched, self.sent)])

    def whole(self, values: Tensor) -> Tensor:
        """Values of the held rows (m, ...) as those of all rows (n, ...), on every rank."""
        empty = values.new_zeros(self.total, *values.shape[1:])
        return _Sum.apply(empty.index_copy(0, self.own, values))

    def gauge_fix(self, pos: Tensor) -> Tensor:
        """As :func:`ipar_sparse.gauge_fix` of all rows; takes and gives those that are held."""
        centred = pos - _Sum.apply(pos.sum(0, keepdim=True)) / self.total
        mean_square = _Sum.apply(centred.square().sum()) / self.total
        return centred * mean_square.clamp(min=1e-12).rsqrt()


def dealt_rows(
    graph: NeighborTable, perm: Tensor, start: int, end: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a graph that lie next to each other in an order of its nodes, and their halo.

    Args:
        graph: n rows of k sources.
        perm: the order (n,).
        start, end: the first row, and the one after the last.

    Returns:
        Sources (m, k), numbered in that order, -1 for none; which of them lie outside (m, k); and
        these, each once.
    """
    place = torch.empty_like(perm)
    place[perm] = torch.arange(len(perm), device=graph.device)
    index = torch.empty(end - start, graph.k, dtype=torch.int64, device=graph.device)
    for rows, part in zip(perm[start:end].split(_ROWS), index.split(_ROWS), strict=True):
        source = graph.index[rows].long()
        part.copy_(torch.where(source >= 0, place[source], -1))
    outside = (index >= 0) & ((index < start) | (index >= end))
    return index, outside, index[outside].unique()


class _Sum(torch.autograd.Function):
    """The sum over ranks; a gradient of it is summed, too, since the losses of all depend on it."""

    @staticmethod
    def forward(ctx, values):
        return summed(values.detach().clone())

    @staticmethod
    def backward(ctx, grad):
        return summed(grad.clone())


class _Exchange(torch.autograd.Function):
    """Sends rows to the ranks that asked for them; their gradients come back."""

    @staticmethod
    def forward(ctx, given, fetched, sent):
        ctx.counts = fetched, sent
        return _moved(given, fetched, sent)

    @staticmethod
    def backward(ctx, grad):
        fetched, sent = ctx.counts
        return _moved(grad, sent, fetched), None, None


def _moved(given: Tensor, fetched: list[int], sent: list[int]) -> Tensor:
    taken = given.new_empty(sum(fetched), *given.shape[1:])
    with rank_losses():
        dist.all_to_all_single(taken, given.contiguous(), fetched, sent)
    return taken
