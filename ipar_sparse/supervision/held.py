"""Targets of a whole slide of which each of several ranks holds a part.

Positions of all cells are on every rank. A loss of a held walk is this rank's part of it times
the number of ranks, so that the mean over ranks is the loss; its gradient adds up in the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..distributed import gathered_rows, rank, size, summed
from ..ops import resolve_backend
from ..ops.segment import segment_softmax
from .neighbors import touching_pairs
from .record import TensorRecord
from .stress import StressTarget
from .walk import LOG_FLOOR, csr, order_of, sigma_of

STATE_BYTES = 3 << 30  # of the states of walks that are carried at once
_ENTRIES = 1 << 24  # of a walk, whose differences of positions are held at once


@dataclass(frozen=True)
class HeldWalk(TensorRecord):
    """Consecutive rows of the random walk of one slide.

    Args:
        pos: reference positions of all nodes (n, 2).
        sigma: distance of each to its last neighbour (n,).
        row: rows of the held entries (e,), counted from ``start``; int32.
        col: their columns (e,); int32.
        rowptr: first entry of each held row (m + 1,).
        once: whether only one node of a pair is a neighbour of the other (e,).
        start: number of the first row.
        each: rows of every rank; the last have fewer.
        steps: longest walk compared.
        sampled: whether the neighbours are a sample of those within ``sigma``.
    """

    pos: Tensor
    sigma: Tensor
    row: Tensor
    col: Tensor
    rowptr: Tensor
    once: Tensor
    start: int
    each: int
    steps: int
    sampled: bool
    _cache: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_nodes(self) -> int:
        """Number of nodes n of the whole walk."""
        return self.pos.size(0)

    @property
    def num_rows(self) -> int:
        """Number of rows m that are held."""
        return self.rowptr.numel() - 1

    def transition(self, pos: Tensor) -> Tensor:
        """Held entries (e,) of one step of the walk between other positions (n, 2)."""
        return _Transition.apply(pos, self)[0]

    def both_ways(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Held entries (e,), and those of the transposed walk at their places, which have no
        gradient."""
        values, logit, norm = _Transition.apply(pos, self)
        norms = gathered_rows(norm, self.each)
        return values, (logit - norms.index_select(0, self.col)).exp_()

    def reference(self, dtype: torch.dtype) -> Tensor:
        """Entries of the transposed reference walk (e,)."""
        if dtype not in self._cache:
            self._cache[dtype] = self.both_ways(self.pos.to(dtype))[1]
        return self._cache[dtype]

    def precision(self, dtype: torch.dtype) -> Tensor:
        """One over the product of the widths of each entry (e,)."""
        if ("precision", dtype) not in self._cache:
            found = self._cache["precision", dtype] = self.once.to(dtype)
            for part in self.parts():
                own, other = self.sigma[self.row[part] + self.start], self.sigma[self.col[part]]
                found[part] = 1 / (own * other + 1e-10)
        return self._cache["precision", dtype]

    def parts(self) -> list[slice]:
        """Entries in parts, see ``_ENTRIES``."""
        count = self.row.numel()
        return [slice(i, min(i + _ENTRIES, count)) for i in range(0, count, _ENTRIES)]

    def spans(self, pos: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Differences of the positions of some entries (p, 2), and their precision (p,)."""
        own = pos.index_select(0, self.row[part] + self.start)
        return own - pos.index_select(0, self.col[part]), self.precision(pos.dtype)[part]

    def entropy(self, pos: Tensor) -> Tensor:
        """See :func:`~ipar_sparse.supervision.losses.walk_entropy_loss`."""
        values = self.transition(pos)
        total = (values * values.clamp(min=LOG_FLOOR).log()).sum()
        return size() * total / self.num_nodes

    def divergence(self, pos: Tensor, rows: Tensor) -> Tensor:
        """See :func:`~ipar_sparse.supervision.losses.rw_kl_loss`.

        Args:
            pos: positions (n, 2).
            rows: probe rows (c,), the same on all ranks.
        """
        values, turned = self.both_ways(pos)
        total = _Divergence.apply(values, turned, self.reference(pos.dtype), self, rows)
        return size() * total / rows.numel()


def held_walk(pos: Tensor, index: Tensor, steps: int, sampled: bool) -> HeldWalk:
    """This rank's rows of :func:`~ipar_sparse.supervision.walk.walk_from_neighbors`.

    Args:
        pos: positions (n, 2) float64, already in the unit-RMS gauge.
        index: neighbours of all nodes (n, k).
        steps: longest walk.
        sampled: whether the lists are a sample of the nodes within sigma.
    """
    n, sigma = len(pos), sigma_of(pos, index)
    each = -(-n // size())
    start, end = (min(each * number, n) for number in (rank(), rank() + 1))
    low, high, count = touching_pairs(index, start, end)
    row, col = torch.cat([low, high]), torch.cat([high, low])
    held = ((row >= start) & (row < end)).nonzero().squeeze(-1)
    row, col, pair = row[held] - start, col[held], held % max(len(low), 1)
    order = order_of(row * n + col)
    row, col, pair = row[order], col[order], pair[order]
    rowptr = torch.zeros(end - start + 1, dtype=torch.int64, device=pos.device)
    torch.cumsum(torch.bincount(row, minlength=end - start), 0, out=rowptr[1:])
    return HeldWalk(
        pos=pos,
        sigma=sigma,
        row=row.int(),
        col=col.int(),
        rowptr=rowptr,
        once=count[pair] == 1,
        start=start,
        each=each,
        steps=steps,
        sampled=sampled,
    )


class _Transition(torch.autograd.Function):
    """Softmax of the rows of a walk; differences of positions are computed again in backward."""

    @staticmethod
    def forward(ctx, pos, walk):
        ctx.walk, ctx.kernels = walk, _kernels(pos)
        if ctx.kernels is None:
            logit = walk.once.to(pos.dtype) * math.log(0.5)
            for part in walk.parts():
                span, precision = walk.spans(pos, part)
                logit[part] -= span.square().sum(-1) * precision
            values, norm = segment_softmax(logit, walk.row.long(), walk.num_rows)
        else:
            values, logit, norm = ctx.kernels.transition(pos, walk)
        ctx.save_for_backward(pos, values)
        ctx.mark_non_differentiable(logit, norm)
        return values, logit, norm

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        walk, (pos, values) = ctx.walk, ctx.saved_tensors
        if ctx.kernels is not None:
            return ctx.kernels.transition_backward(pos, values, grad, walk), None
        slope = values * grad
        mean = slope.new_zeros(walk.num_rows).index_add_(0, walk.row, slope)
        slope -= values * mean.index_select(0, walk.row)
        d_pos = torch.zeros_like(pos)
        for part in walk.parts():
            span, precision = walk.spans(pos, part)
            pull = span.mul_((-2 * slope[part] * precision).unsqueeze(-1))
            d_pos.index_add_(0, walk.row[part] + walk.start, pull)
            d_pos.index_add_(0, walk.col[part], pull, alpha=-1)
        return d_pos, None


class _Divergence(torch.autograd.Function):
    """Divergence of walks from probe rows, summed over the columns that are held.

    The slope in the held entries is that of the sum over all ranks. A step of all ranks needs the
    states of all rows, a few walks at a time, forward as backward.
    """

    @staticmethod
    def forward(ctx, values, turned, reference, walk, rows):
        learns, m, dtype = ctx.needs_input_grad[0], walk.num_rows, values.dtype
        kernels, width = _kernels(values), _width(walk, values.element_size())
        if kernels is not None:
            given = (values, turned, reference, walk, rows)
            total, d_values = kernels.divergence(*given, width, learns)
            ctx.save_for_backward(d_values)
            return total
        ahead, true, back = (_matrix(walk, one) for one in (turned, reference, values))
        d_values, total = torch.zeros_like(values), values.new_zeros(())
        own = torch.arange(walk.start, walk.start + m, device=rows.device).unsqueeze(-1)
        for part in rows.split(width):
            q = p = (own == part).to(dtype)
            states, slopes = [q], []
            for s in range(walk.steps):
                q = ahead @ gathered_rows(q, walk.each)
                p = true @ gathered_rows(p, walk.each)
                safe, weight = q.clamp(min=LOG_FLOOR), 0.5**s
                total += weight * (p * (p.clamp(min=LOG_FLOOR).log() - safe.log())).sum()
                if learns:
                    states.append(q)
                    slopes.append((p / safe).mul_(-weight).masked_fill_(q < LOG_FLOOR, 0.0))
            if not learns:
                continue
            slope = slopes.pop()
            for state in states[-2::-1]:
                there = gathered_rows(slope, walk.each)
                d_values += torch.sparse.sampled_addmm(back, state, there.T, beta=0.0).values()
                if slopes:
                    slope = slopes.pop().add_(back @ there)
        ctx.save_for_backward(d_values)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, None, None, None, None


def _matrix(walk: HeldWalk, values: Tensor) -> Tensor:
    return csr(walk.rowptr, walk.col.long(), values, (walk.num_rows, walk.each * size()))


def _width(walk: HeldWalk, bytes_each: int) -> int:
    """Walks carried at once: as many as the memory for their states allows, 16 to 128."""
    numbers, width = 3 * walk.each * size() + 2 * walk.steps * walk.each, 128
    while width > 16 and bytes_each * numbers * width > STATE_BYTES:
        width //= 2
    return width


def _kernels(values: Tensor) -> ModuleType | None:
    """Fused kernels for such values, where there are any."""
    if values.dtype != torch.float32 or resolve_backend("auto", values) != "triton":
        return None
    from ..ops import triton_held_walk

    return triton_held_walk


@dataclass(frozen=True)
class HeldStress(TensorRecord):
    """Consecutive pairs of a stress target on one slide, of which a step draws a few.

    Args:
        edge_index: pairs that are held (2, c), int32.
        dist, softening: of these, as in :class:`StressTarget` (c,).
        start: number of the first of them.
        total: pairs that all ranks hold.
    """

    edge_index: Tensor
    dist: Tensor
    softening: Tensor | None
    start: int
    total: int

    def drawn(self, numbers: Tensor) -> StressTarget:
        """Some pairs of all, on every rank, by their numbers (m,), the same on all."""
        place = numbers - self.start
        held = (place >= 0) & (place < self.dist.numel())
        place = place.clamp(0, self.dist.numel() - 1)

        def taken(values: Tensor) -> Tensor:
            return summed(values[..., place].masked_fill(~held, 0))

        return StressTarget(
            edge_index=taken(self.edge_index).long(),
            dist=taken(self.dist),
            edge_batch=torch.zeros_like(numbers),
            softening=None if self.softening is None else taken(self.softening),
        )


def held_stress(stress: StressTarget | HeldStress, drawn: int) -> StressTarget | HeldStress:
    """This rank's part of the pairs of one slide; all of them where a step sees them all.

    Args:
        stress: all pairs.
        drawn: pairs that a step draws.
    """
    if isinstance(stress, HeldStress) or stress.dist.numel() <= max(drawn, size()):
        return stress
    total, soft = stress.dist.numel(), stress.softening
    start, end = (total * number // size() for number in (rank(), rank() + 1))
    pairs, dist = stress.edge_index[:, start:end].int(), stress.dist[start:end].clone()
    return HeldStress(pairs, dist, None if soft is None else soft[start:end].clone(), start, total)
