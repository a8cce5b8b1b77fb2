"""Refinement: nearest candidates in the embedding become neighbours in the layout.

The recycles average over neighbours, and training minisets are too sparse to show where a cell
lies within its neighbourhood. The layout of the model is right at large distances and blurred at
the distance of a few cells. A short descent with attraction and repulsion sharpens it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..distributed import all_rows, rows_of, shares_rows
from ..geometry.gauge import gauge_fix
from ..geometry.neighborhoods import Shifts, opposite, rolled, rows_at, square_length
from ..graph import NeighborTable, knn, nearest_of
from ..ops.recording import Recorder
from ..ticks import counted
from .descent import Descent

_MIN_CELLS = 4  # per neighbour; with fewer, most cells are neighbours of each other
_UNIT = 0.5  # scale of the kernel, in sqrt(k / n)
_LR = 0.8  # first step size of Adam, in units: a misplaced cell has to pass between others
_NEAR = 32  # nearest cells in the layout whose repulsion is exact
_SEARCH_EVERY = 20  # steps between two searches for them
_SHIFTS = 5  # random partners of a cell, in each direction, that represent all farther cells
_OVERLAP_NEIGHBORS = 15  # nearest candidates compared with those of the layout
_OVERLAP_CELLS = 2000  # cells on which they are compared


@torch.no_grad()
def refine_layout(
    pos: Tensor,
    graph: NeighborTable,
    *,
    steps: int = 400,
    neighbors: int = 15,
    anchor_weight: float = 5.0,
    skip_if_overlap: float = 0.5,
    seed: int = 0,
) -> Tensor:
    r"""Pull nearest candidates together, without moving cells far from where they were.

    .. math::
        L = -\frac1n \sum_i \frac1k \sum_{j \in N_k(i)} \log q_{ij}
            + \log \operatorname*{mean}_{i \ne j} q_{ij}
            + \frac{\alpha}{n} \sum_i \|\mathbf{x}_i - \mathbf{x}_i^0\|^2,
        \qquad q_{ij} = \frac{1}{1 + \|\mathbf{x}_i - \mathbf{x}_j\|^2 / u^2}

    Up to a constant, the first two terms are a divergence: that of the random walk over the k
    nearest candidates from a Cauchy kernel on the layout. This is t-SNE without perplexities
    (Böhm, Berens and Kobak 2022, "Attraction-repulsion spectrum in neighbor embeddings"). The unit
    :math:`u = \tfrac12 \sqrt{k/n}` is the radius of k/8 neighbours if cells spread evenly over a
    disc.

    Repulsion is exact between a cell and its 32 nearest cells in the layout, which are searched
    again every 20 steps. Ten cells of a random order represent all others. Random cells alone
    would seldom be near, and the force between near cells would be noise. Adam with a step size
    that falls linearly from 0.8 u to 0. Time and memory O(n k) per step, O(n log n) per search;
    deterministic on every device.

    Args:
        pos: layout (n, 2), any scale.
        graph: candidates of each cell, nearest first.
        steps: number of optimiser steps; 0 returns ``pos`` as it is.
        neighbors: k, nearest candidates that attract a cell.
        anchor_weight: :math:`\alpha`, weight of staying near ``pos``.
        skip_if_overlap: no refinement where this fraction of the 15 nearest candidates are among
            the 15 nearest cells of the layout already. Candidates could not improve such a layout.
            Compared on 2,000 cells at most; above 1, every layout is refined.
        seed: of the order and the shifts.

    Returns:
        Layout (n, 2) in the unit-RMS gauge. Fewer than 4 k cells, and layouts with values that
        are not finite, are returned as they are.

    Raises:
        ValueError: if the graph has another number of cells.
    """
    n, k = pos.size(0), min(neighbors, graph.k)
    if graph.num_nodes != n:
        raise ValueError(f"a layout of {n} cells and a graph of {graph.num_nodes}")
    if steps < 1 or k < 1 or n < _MIN_CELLS * k or not pos.isfinite().all():
        return pos
    if _overlap(pos, graph.index[:, :_OVERLAP_NEIGHBORS]) >= skip_if_overlap:
        return pos
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator).to(pos.device)
    candidates = NeighborTable(graph.index[:, :k].contiguous(), padded=graph.padded).permute(order)
    unit = _UNIT * math.sqrt(k / n)
    anchor = gauge_fix(pos.float())[order]
    x = anchor.clone()
    forces = _forces(x, unit, candidates)
    # ranks that split the rows exchange forces, which is not recorded
    descent, recorder = Descent(x), Recorder(x.device, enabled=not shares_rows())
    draws = Shifts(torch.randint(1, n, (steps, _SHIFTS), generator=generator), x.device)
    near = reach = None

    def move() -> None:
        push, pull = forces(near, reach, draws.now)
        gradient = pull * (2 / k) - push * (4 / unit**2)
        descent.step(gradient + 2 * anchor_weight * (x - anchor))

    for step in counted(range(steps)):
        if step % _SEARCH_EVERY == 0:
            near, reach = _surroundings(x, near, reach)
        draws.take(step)
        descent.set_lr(_LR * unit * (1 - step / steps))
        recorder("move", move)
    return gauge_fix(torch.empty_like(x).index_copy_(0, order, x).to(pos.dtype))


def _surroundings(x: Tensor, near: Tensor | None, reach: Tensor | None) -> tuple[Tensor, Tensor]:
    """The nearest cells in the layout, and how far they reach, in place of what was known."""
    found = knn(x, _NEAR).index
    span = (x - x[found[:, -1].long()]).square().sum(1)
    if not _fused(x):
        found = found.long()
    if near is None or reach is None:
        return found, span
    return near.copy_(found), reach.copy_(span)


def repulsion(
    x: Tensor, unit: float, near: Tensor, reach: Tensor, shifts: list[int] | Tensor
) -> Tensor:
    r"""The repulsive force on every cell, :math:`-n u^2 / 4` times the gradient of the second term
    of :func:`refine_layout`.

    .. math::
        \sum_j q_{ij}^2 (\mathbf{x}_i - \mathbf{x}_j)
        \Big/ \operatorname*{mean}_i \sum_j q_{ij}

    Args:
        x: layout (n, 2).
        unit: u.
        near: cells whose repulsion is exact (n, m); each counts within ``reach``.
        reach: squared distance (n,) up to which they are all the cells there are.
        shifts: the partners i - s and i + s of cell i represent all cells beyond ``reach``.

    Returns:
        (n, 2).
    """
    n, own = len(x), rows_of(len(x))
    gap = rows_at(x, near[own])
    torch.sub(x[own].unsqueeze(1), gap, out=gap)
    square = square_length(gap)
    q = (square <= reach[own].unsqueeze(1)) / square.div_(unit**2).add_(1)
    push, total = gap.mul_(q.square().unsqueeze(-1)).sum(1), q.sum(1)
    both: Any = [*shifts, *opposite(shifts, n)]  # a pair may be beyond the reach of one cell only
    if isinstance(shifts, Tensor):
        both = torch.stack(both)
    gap = x[own] - rolled([x] * len(both), both)[:, own]  # (shifts, n, 2)
    square = square_length(gap)
    q = (square > reach[own]) / square.div_(unit**2).add_(1)
    factor = (n - 1) / len(both)
    # one by one, in an order that does not depend on the number of rows
    for far, weight in zip(gap.mul_(q.square().unsqueeze(-1)), q, strict=True):
        push.add_(far, alpha=factor)
        total.add_(weight, alpha=factor)
    push, total = all_rows(push, n), all_rows(total, n)
    return push * (n / total.sum())


def _fused(x: Tensor) -> bool:
    """Whether forces are computed by one kernel."""
    return x.is_cuda and find_spec("triton") is not None


def _forces(x: Tensor, unit: float, graph: NeighborTable) -> Callable[..., tuple[Tensor, Tensor]]:
    """Repulsion, and the gradient of the first term times n k / 2, for whatever x is then.

    Each (n, 2), as functions of near cells, their reach and shifts; see :func:`repulsion`.
    """
    n, own = len(x), rows_of(len(x))
    rowptr, edge, target = graph.reverse()
    offsets = rowptr[own.start : own.stop + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    target, offsets = target[first:last], offsets - first
    if _fused(x):
        from ..ops.triton_forces import forces

        given, index = (offsets.contiguous(), target.contiguous()), graph.index[own].contiguous()

        def fused(near: Tensor, reach: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
            push, total, pull = forces(x, own, unit, near, reach, shifts, index, given)
            both = all_rows(torch.cat([push, total.unsqueeze(1), pull], 1), n)
            return both[:, :2] * (n / both[:, 2].sum()), both[:, 3:]

        return fused
    attraction = _attraction(x, unit, graph, own, edge, target, offsets)
    return lambda near, reach, shifts: (repulsion(x, unit, near, reach, shifts), attraction())


def _attraction(
    x: Tensor,
    unit: float,
    graph: NeighborTable,
    own: slice,
    edge: Tensor,
    target: Tensor,
    offsets: Tensor,
) -> Callable[[], Tensor]:
    """The attraction of :func:`_forces`, in torch."""
    n = len(x)
    source = graph.index[own].long().clamp(min=0)  # 0 in padding
    mask = graph.mask[own]
    origin = torch.arange(n, device=x.device)[own].repeat_interleave(offsets.diff())

    def force() -> Tensor:
        gap = rows_at(x, source)
        torch.sub(x[own].unsqueeze(1), gap, out=gap)
        pull = gap.mul_((mask / square_length(gap).add_(unit**2)).unsqueeze(-1))
        if not shares_rows():
            by_source = graph.from_table(pull).index_select(0, edge)
        else:  # edges that leave own rows may end in those of other ranks
            gap = x[target] - x[origin]
            by_source = gap * (1 / (unit**2 + square_length(gap))).unsqueeze(-1)
        outgoing = torch.segment_reduce(by_source, "sum", offsets=offsets, axis=0, initial=0.0)
        return all_rows(pull.sum(1) - outgoing, n)

    return force


def _overlap(pos: Tensor, near: Tensor) -> float:
    """Fraction of candidates (n, k), of some cells, that are among the k nearest in a layout."""
    rows = torch.randperm(len(pos), generator=torch.Generator().manual_seed(0))[:_OVERLAP_CELLS]
    wanted = near[rows.to(near.device)]
    found = nearest_of(pos.double(), rows.to(pos.device), near.size(1))
    hit = (wanted.unsqueeze(2) == found.unsqueeze(1)).any(2)
    return float(hit.sum()) / max(1, int((wanted >= 0).sum()))
