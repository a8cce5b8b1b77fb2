"""Fused random walks on CUDA: transition, and the divergence of two walks from probe rows.

A walk from one row stays sparse for a few steps: rows of the state that no walk has reached yet
are marked and not read. The predicted and the reference walk are stored side by side, so that one
gather serves both. Their divergence is summed where the states are computed. The backward pass
runs from the last step to the first over the same rows, and overwrites the reference states with
gradients. Rows are processed in an order that follows the tissue, so that concurrent programs read
the same rows. Every sum has one writer and a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..graph.order import bisection_order

STATE_BYTES = 3 << 30  # states of all steps held at once


def transition(pos: Tensor, walk) -> Tensor:
    """``WalkTarget.transition`` of :mod:`ipar_sparse.supervision.walk`, of float32 on CUDA."""
    return _Transition.apply(pos, walk)


def probe_divergence(values: Tensor, walk, rows: Tensor, weight: Tensor) -> Tensor:
    r"""Weighted divergence of reference from predicted walks that start in some rows.

    .. math::
        \sum_{s,c} w_{sc} \,
        \mathrm{KL}\!\left(T_\mathrm{ref}^s[r_c,:] \,\|\, T^s[r_c,:]\right)

    Args:
        values: entries of the predicted T (2P,), float32.
        walk: the ``WalkTarget`` whose pattern and reference are used.
        rows: distinct rows r (m,).
        weight: weights w (steps, m), float32.

    Returns:
        A scalar. Logarithms are clamped at 1e-8.
    """
    return _ProbeDivergence.apply(values, walk, rows, weight)


def _cached(walk, name: str, build) -> Tensor:
    if name not in walk._cache:
        walk._cache[name] = build()
    return walk._cache[name]


def _order(walk) -> Tensor:
    """Rows in an order in which neighbours follow each other, (n,), int32."""
    return _cached(walk, "order", lambda: bisection_order(walk.pos.float()).int())


def _columns(walk) -> Tensor:
    return _cached(walk, "col_int32", walk.col.int)


class _Transition(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pos, walk):
        pos = pos.contiguous()
        values = torch.empty(walk.col.numel(), dtype=torch.float32, device=pos.device)
        bias, precision = (
            _cached(
                walk,
                f"entry_{name}",
                lambda name=name: getattr(walk, name).float()[walk.entry_pair],
            )
            for name in ("log_multiplicity", "precision")
        )
        _transition_kernel[(walk.num_nodes,)](
            pos,
            walk.rowptr,
            _columns(walk),
            bias,
            precision,
            values,
            0,
            values,
            values,
            HELD=False,
            BLOCK=64,
            num_warps=1,
        )
        ctx.save_for_backward(pos, values, precision)
        ctx.walk = walk
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, d_values):
        pos, values, precision = ctx.saved_tensors
        walk = ctx.walk
        d_logit, d_pos = torch.empty_like(values), torch.empty_like(pos)
        tile = {"BLOCK": 64, "num_warps": 1}
        rows = (walk.num_nodes,)
        _softmax_backward_kernel[rows](walk.rowptr, values, d_values.contiguous(), d_logit, **tile)
        _transition_backward_kernel[rows](
            pos, walk.rowptr, _columns(walk), precision, walk.transposed, d_logit, d_pos, **tile
        )
        return d_pos, None


class _ProbeDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, walk, rows, weight):
        learns, steps, n = ctx.needs_input_grad[0], walk.steps, walk.num_nodes
        values = values.contiguous()
        rowptr, col, order = walk.rowptr, _columns(walk), _order(walk)
        reference = walk.reference(torch.float32)
        # T^T in the pattern of T, so that a step reads its values in order
        turned = values.index_select(0, walk.transposed)
        turned_reference = _cached(
            walk, "reference_transposed", lambda: reference.index_select(0, walk.transposed)
        )
        d_values = torch.zeros_like(values) if learns else None
        width = _width(n, steps if learns else 2, rows.numel())
        tile, grad_tile = _tile(2 * width), _tile(width)
        partial = torch.zeros(n, dtype=torch.float32, device=values.device)
        first = torch.empty(rows.numel(), dtype=torch.float32, device=values.device)
        held = [
            (
                torch.empty(n, 2, width, dtype=torch.float32, device=values.device),
                torch.empty(n, dtype=torch.uint8, device=values.device),
            )
            for _ in range(steps if learns else min(steps, 2))
        ]
        states = [held[s % len(held)] for s in range(steps)]
        for start in range(0, rows.numel(), width):
            part = rows[start : start + width]
            w = torch.nn.functional.pad(weight[:, start : start + width], (0, width - len(part)))
            w = w.contiguous()
            for buffer in states[0]:
                buffer.zero_()
            _start_kernel[(len(part),)](
                part,
                rowptr,
                col,
                values,
                reference,
                *states[0],
                w,
                first[start:],
                WIDTH=width,
                LAST=steps == 1 and learns,
                BLOCK=64,
                num_warps=1,
            )
            for s in range(1, steps):
                _step_kernel[(n,)](
                    order,
                    *states[s - 1],
                    *states[s],
                    partial,
                    rowptr,
                    col,
                    turned,
                    turned_reference,
                    w[s],
                    WIDTH=width,
                    LAST=s == steps - 1,
                    LEARNS=learns,
                    **tile,
                )
            if not learns:
                continue
            for s in range(steps - 1, 0, -1):
                _step_backward_kernel[(n,)](
                    order,
                    *states[s - 1],
                    states[s][0][:, 1],
                    states[s][1],
                    rowptr,
                    col,
                    values,
                    d_values,
                    w[s - 1],
                    WIDTH=width,
                    STRIDE=2 * width,
                    **grad_tile,
                )
            _end_kernel[(len(part),)](
                part, rowptr, col, states[0][0], d_values, WIDTH=width, BLOCK=64, num_warps=1
            )
        ctx.save_for_backward(d_values)
        return partial.sum() + first.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, None, None, None


def _width(n: int, steps: int, count: int) -> int:
    """Walks carried at once: as many as the memory for their states allows, 16 to 128."""
    width = 128
    while width > 16 and (
        width // 2 >= count or (width > 32 and 8 * n * steps * width > STATE_BYTES)
    ):
        width //= 2
    return width


def _tile(floats: int) -> dict:
    """Edges a warp holds side by side (P) and one behind the other (R), for rows so wide."""
    side = max(128 // floats, 1)
    return {"R": 4, "P": side, "num_warps": max(floats // 128, 1)}


@triton.jit
def _transition_kernel(
    pos_ptr,
    rowptr_ptr,
    col_ptr,
    bias_ptr,
    precision_ptr,
    values_ptr,
    first,
    logit_ptr,
    norm_ptr,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(rowptr_ptr + row)
    end = tl.load(rowptr_ptr + row + 1)
    x0 = tl.load(pos_ptr + 2 * (row + first))
    x1 = tl.load(pos_ptr + 2 * (row + first) + 1)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        logit = _logit(pos_ptr, col_ptr, bias_ptr, precision_ptr, entry, entry < end, x0, x1)
        new_top = tl.maximum(top, logit)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.exp(logit - shift)
        top = new_top
    highest = tl.max(top, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    norm = tl.sum(total * tl.exp(top - highest), 0)
    norm = tl.where(norm == 0.0, 1.0, norm)
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        logit = _logit(pos_ptr, col_ptr, bias_ptr, precision_ptr, entry, entry < end, x0, x1)
        tl.store(values_ptr + entry, tl.exp(logit - highest) / norm, mask=entry < end)
        if HELD:
            tl.store(logit_ptr + entry, logit, mask=entry < end)
    if HELD:
        tl.store(norm_ptr + row, highest + tl.log(norm))


@triton.jit
def _logit(pos_ptr, col_ptr, bias_ptr, precision_ptr, entry, valid, x0, x1):
    other = tl.load(col_ptr + entry, mask=valid, other=0).to(tl.int64)
    d0 = x0 - tl.load(pos_ptr + 2 * other, mask=valid, other=0.0)
    d1 = x1 - tl.load(pos_ptr + 2 * other + 1, mask=valid, other=0.0)
    precision = tl.load(precision_ptr + entry, mask=valid, other=0.0)
    bias = tl.load(bias_ptr + entry, mask=valid, other=float("-inf"))
    return bias - (d0 * d0 + d1 * d1) * precision


@triton.jit
def _softmax_backward_kernel(
    rowptr_ptr, values_ptr, d_values_ptr, d_logit_ptr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(rowptr_ptr + row)
    end = tl.load(rowptr_ptr + row + 1)
    mean = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        value = tl.load(values_ptr + entry, mask=entry < end, other=0.0)
        mean += value * tl.load(d_values_ptr + entry, mask=entry < end, other=0.0)
    mean = tl.sum(mean, 0)
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        value = tl.load(values_ptr + entry, mask=entry < end, other=0.0)
        d_value = tl.load(d_values_ptr + entry, mask=entry < end, other=0.0)
        tl.store(d_logit_ptr + entry, value * (d_value - mean), mask=entry < end)


@triton.jit
def _transition_backward_kernel(
    pos_ptr,
    rowptr_ptr,
    col_ptr,
    precision_ptr,
    transposed_ptr,
    d_logit_ptr,
    d_pos_ptr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(rowptr_ptr + row)
    end = tl.load(rowptr_ptr + row + 1)
    x0 = tl.load(pos_ptr + 2 * row)
    x1 = tl.load(pos_ptr + 2 * row + 1)
    sum0 = tl.zeros([BLOCK], tl.float32)
    sum1 = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        valid = entry < end
        other = tl.load(col_ptr + entry, mask=valid, other=0).to(tl.int64)
        turned = tl.load(transposed_ptr + entry, mask=valid, other=0)
        slope = tl.load(d_logit_ptr + entry, mask=valid, other=0.0)
        slope += tl.load(d_logit_ptr + turned, mask=valid, other=0.0)
        slope *= tl.load(precision_ptr + entry, mask=valid, other=0.0)
        sum0 += slope * (x0 - tl.load(pos_ptr + 2 * other, mask=valid, other=0.0))
        sum1 += slope * (x1 - tl.load(pos_ptr + 2 * other + 1, mask=valid, other=0.0))
    tl.store(d_pos_ptr + 2 * row, -2.0 * tl.sum(sum0, 0))
    tl.store(d_pos_ptr + 2 * row + 1, -2.0 * tl.sum(sum1, 0))


@triton.jit
def _term(target, predicted):
    low = tl.maximum(predicted, 1e-8)
    return target * (tl.log(tl.maximum(target, 1e-8)) - tl.log(low))


@triton.jit
def _slope(target, predicted, weight):
    """Gradient of the weighted divergence in the predicted state."""
    safe = tl.maximum(predicted, 1e-8)
    return tl.where(predicted >= 1e-8, -weight * target / safe, 0.0)


@triton.jit
def _start_kernel(
    rows_ptr,
    rowptr_ptr,
    col_ptr,
    values_ptr,
    reference_ptr,
    state_ptr,
    reached_ptr,
    weight_ptr,
    loss_ptr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    probe = tl.program_id(0)
    row = tl.load(rows_ptr + probe)
    begin = tl.load(rowptr_ptr + row)
    end = tl.load(rowptr_ptr + row + 1)
    weight = tl.load(weight_ptr + probe)
    loss = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        valid = entry < end
        node = tl.load(col_ptr + entry, mask=valid, other=0).to(tl.int64)
        predicted = tl.load(values_ptr + entry, mask=valid, other=0.0)
        target = tl.load(reference_ptr + entry, mask=valid, other=0.0)
        loss += _term(target, predicted)
        if LAST:
            target = _slope(target, predicted, weight)
        to = state_ptr + node * (2 * WIDTH) + probe
        tl.store(to, predicted, mask=valid)
        tl.store(to + WIDTH, target, mask=valid)
        tl.store(reached_ptr + node, tl.full([BLOCK], 1, tl.uint8), mask=valid)
    tl.store(loss_ptr + probe, weight * tl.sum(loss, 0))


@triton.jit
def _step_kernel(
    order_ptr,
    before_ptr,
    before_reached_ptr,
    state_ptr,
    reached_ptr,
    partial_ptr,
    rowptr_ptr,
    col_ptr,
    values_ptr,
    reference_ptr,
    weight_ptr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
    LEARNS: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
):
    EDGES: tl.constexpr = R * P
    row = tl.load(order_ptr + tl.program_id(0)).to(tl.int64)
    begin = tl.load(rowptr_ptr + row)
    end = tl.load(rowptr_ptr + row + 1)
    both = tl.arange(0, 2 * WIDTH)
    total = tl.zeros([P, 2 * WIDTH], tl.float32)
    for start in range(begin, end, EDGES):
        entry = start + tl.arange(0, EDGES)
        valid = entry < end
        node = tl.load(col_ptr + entry, mask=valid, other=0).to(tl.int64)
        valid &= tl.load(before_reached_ptr + node, mask=valid, other=0) > 0
        predicted = tl.load(values_ptr + entry, mask=valid, other=0.0)
        target = tl.load(reference_ptr + entry, mask=valid, other=0.0)
        state = tl.load(
            before_ptr + node[:, None] * (2 * WIDTH) + both[None, :],
            mask=valid[:, None],
            other=0.0,
        )
        state *= tl.where(both[None, :] < WIDTH, predicted[:, None], target[:, None])
        total += tl.sum(tl.reshape(state, [R, P, 2 * WIDTH]), 0)
    sides = tl.reshape(tl.sum(total, 0), [2, WIDTH])
    side = tl.arange(0, 2)[:, None]
    predicted = tl.sum(tl.where(side == 0, sides, 0.0), 0)
    target = tl.sum(tl.where(side == 1, sides, 0.0), 0)
    reached = tl.maximum(tl.max(predicted, 0), tl.max(target, 0)) > 0.0
    tl.store(reached_ptr + row, reached.to(tl.uint8))
    if reached:
        one = tl.arange(0, WIDTH)
        weight = tl.load(weight_ptr + one)
        loss = tl.sum(weight * _term(target, predicted), 0)
        tl.store(partial_ptr + row, tl.load(partial_ptr + row) + loss)
        to = state_ptr + row * (2 * WIDTH) + one
        if LEARNS or not LAST:
            if LAST:
                target = _slope(target, predicted, weight)
            else:
                tl.store(to, predicted)
            tl.store(to + WIDTH, target)


@triton.jit
def _step_backward_kernel(
    order_ptr,
    state_ptr,
    reached_ptr,
    after_ptr,
    after_reached_ptr,
    rowptr_ptr,
    col_ptr,
    values_ptr,
    d_values_ptr,
    weight_ptr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
):
    EDGES: tl.constexpr = R * P
    row = tl.load(order_ptr + tl.program_id(0)).to(tl.int64)
    if tl.load(reached_ptr + row) > 0:
        begin = tl.load(rowptr_ptr + row)
        end = tl.load(rowptr_ptr + row + 1)
        one = tl.arange(0, WIDTH)
        own = state_ptr + row * (2 * WIDTH) + one
        predicted = tl.load(own)
        total = tl.zeros([P, WIDTH], tl.float32)
        for start in range(begin, end, EDGES):
            entry = start + tl.arange(0, EDGES)
            valid = entry < end
            node = tl.load(col_ptr + entry, mask=valid, other=0).to(tl.int64)
            valid &= tl.load(after_reached_ptr + node, mask=valid, other=0) > 0
            value = tl.load(values_ptr + entry, mask=valid, other=0.0)
            grad = tl.load(
                after_ptr + node[:, None] * STRIDE + one[None, :],
                mask=valid[:, None],
                other=0.0,
            )
            share = tl.sum(grad * predicted[None, :], 1)
            share += tl.load(d_values_ptr + entry, mask=valid, other=0.0)
            tl.store(d_values_ptr + entry, share, mask=valid)
            total += tl.sum(tl.reshape(value[:, None] * grad, [R, P, WIDTH]), 0)
        grad = _slope(tl.load(own + WIDTH), predicted, tl.load(weight_ptr + one))
        tl.store(own + WIDTH, grad + tl.sum(total, 0))


@triton.jit
def _end_kernel(
    rows_ptr,
    rowptr_ptr,
    col_ptr,
    state_ptr,
    d_values_ptr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    probe = tl.program_id(0)
    row = tl.load(rows_ptr + probe)
    begin = tl.load(rowptr_ptr + row)
    end = tl.load(rowptr_ptr + row + 1)
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        valid = entry < end
        node = tl.load(col_ptr + entry, mask=valid, other=0).to(tl.int64)
        grad = tl.load(state_ptr + node * (2 * WIDTH) + WIDTH + probe, mask=valid, other=0.0)
        grad += tl.load(d_values_ptr + entry, mask=valid, other=0.0)
        tl.store(d_values_ptr + entry, grad, mask=valid)
