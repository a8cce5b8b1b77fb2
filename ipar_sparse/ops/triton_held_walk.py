"""Fused random walks on CUDA whose rows several ranks hold: each computes the states of its own.

The kernels are those of :mod:`.triton_walk`. A step reads the states of all rows, which ranks
exchange before it, and writes those that are held. Only the gradient in positions adds to rows of
others, so its order of sums may differ from run to run.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..distributed import gathered_rows, size
from ..graph.order import bisection_order
from .triton_walk import (
    _cached,
    _columns,
    _softmax_backward_kernel,
    _step_backward_kernel,
    _step_kernel,
    _tile,
    _transition_kernel,
)


def transition(pos: Tensor, walk) -> tuple[Tensor, Tensor, Tensor]:
    """Held entries (e,) of a walk between positions (n, 2), their logits (e,), and the logarithm
    of the sum of each row (m,); all float32."""
    values = torch.empty(walk.col.numel(), dtype=torch.float32, device=pos.device)
    logit, norm = torch.empty_like(values), values.new_empty(walk.num_rows)
    given = (walk.rowptr, _columns(walk), *_weights(walk), values, walk.start, logit, norm)
    _transition_kernel[(walk.num_rows,)](pos.contiguous(), *given, HELD=True, BLOCK=64, num_warps=1)
    return values, logit, norm


def transition_backward(pos: Tensor, values: Tensor, grad: Tensor, walk) -> Tensor:
    """The gradient in all positions (n, 2) of what the held entries give."""
    d_logit, d_pos = torch.empty_like(values), torch.zeros_like(pos)
    tile, rows = {"BLOCK": 64, "num_warps": 1}, (walk.num_rows,)
    _softmax_backward_kernel[rows](walk.rowptr, values, grad.contiguous(), d_logit, **tile)
    given = (pos.contiguous(), walk.rowptr, _columns(walk), _weights(walk)[1], d_logit)
    _held_backward_kernel[rows](*given, d_pos, walk.start, **tile)
    return d_pos


def divergence(
    values: Tensor, turned: Tensor, reference: Tensor, walk, rows: Tensor, width: int, learns: bool
) -> tuple[Tensor, Tensor]:
    """Divergence of walks from probe rows, summed over the held columns, and its slope.

    Args:
        values: held entries of the predicted walk (e,).
        turned: those of the transposed walk at their places (e,).
        reference: those of the transposed reference walk (e,).
        walk: a ``HeldWalk``.
        rows: probe rows (c,), the same on all ranks.
        width: walks carried at once, a power of two from 16 to 128.
        learns: whether the slope is wanted; else it is zero.
    """
    m, steps, device = walk.num_rows, walk.steps, values.device
    order = _cached(walk, "order", lambda: _own_order(walk))
    graph = walk.rowptr, _columns(walk)
    d_values, partial = torch.zeros_like(values), values.new_zeros(m)
    weight = 0.5 ** torch.arange(-1.0, steps, device=device)  # the first is not used
    weight = weight.unsqueeze(-1).repeat(1, width)
    weight[0] = 0.0
    states = [values.new_empty(m, 2, width) for _ in range(steps + 1)]
    reached = [torch.empty(m, dtype=torch.uint8, device=device) for _ in states]
    own = slice(walk.start, walk.start + m)
    for part in rows.split(width):
        # all ranks know where walks start
        before = values.new_zeros(walk.each * size(), 2, width)
        before[part, :, torch.arange(len(part), device=device)] = 1.0
        known = torch.zeros_like(before[:, 0, 0], dtype=torch.uint8)
        known[part] = 1
        states[0].copy_(before[own])
        reached[0].copy_(known[own])
        for s in range(1, steps + 1):
            if s > 1:
                before = gathered_rows(states[s - 1], walk.each)
                known = gathered_rows(reached[s - 1], walk.each)
            given = (order, before, known, states[s], reached[s], partial, *graph)
            given += (turned, reference, weight[s])
            last = s == steps
            _step_kernel[(m,)](*given, WIDTH=width, LAST=last, LEARNS=learns, **_tile(2 * width))
        del before
        for s in range(steps, 0, -1) if learns else ():
            slope = gathered_rows(states[s][:, 1], walk.each)
            given = (order, states[s - 1], reached[s - 1], slope)
            given += (gathered_rows(reached[s], walk.each), *graph, values, d_values)
            tile = {"WIDTH": width, "STRIDE": width, **_tile(width)}
            _step_backward_kernel[(m,)](*given, weight[s - 1], **tile)
    return partial.sum(), d_values


def _own_order(walk) -> Tensor:
    """The held rows, in an order in which neighbours follow each other (m,), int32."""
    own = walk.pos[walk.start : walk.start + walk.num_rows]
    return bisection_order(own.float()).int()


def _weights(walk) -> tuple[Tensor, Tensor]:
    """Logarithm of the multiplicity of each held entry, and its precision; float32."""
    bias = _cached(walk, "bias", lambda: walk.once * math.log(0.5))
    return bias, walk.precision(torch.float32)


@triton.jit
def _held_backward_kernel(
    pos_ptr,
    rowptr_ptr,
    col_ptr,
    precision_ptr,
    d_logit_ptr,
    d_pos_ptr,
    first,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(rowptr_ptr + row)
    end = tl.load(rowptr_ptr + row + 1)
    row += first
    x0 = tl.load(pos_ptr + 2 * row)
    x1 = tl.load(pos_ptr + 2 * row + 1)
    sum0 = tl.zeros([BLOCK], tl.float32)
    sum1 = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        valid = entry < end
        other = tl.load(col_ptr + entry, mask=valid, other=0).to(tl.int64)
        slope = tl.load(d_logit_ptr + entry, mask=valid, other=0.0)
        slope *= -2.0 * tl.load(precision_ptr + entry, mask=valid, other=0.0)
        pull0 = slope * (x0 - tl.load(pos_ptr + 2 * other, mask=valid, other=0.0))
        pull1 = slope * (x1 - tl.load(pos_ptr + 2 * other + 1, mask=valid, other=0.0))
        sum0 += pull0
        sum1 += pull1
        tl.atomic_add(d_pos_ptr + 2 * other, -pull0, mask=valid, sem="relaxed")
        tl.atomic_add(d_pos_ptr + 2 * other + 1, -pull1, mask=valid, sem="relaxed")
    tl.atomic_add(d_pos_ptr + 2 * row, tl.sum(sum0, 0), sem="relaxed")
    tl.atomic_add(d_pos_ptr + 2 * row + 1, tl.sum(sum1, 0), sem="relaxed")
