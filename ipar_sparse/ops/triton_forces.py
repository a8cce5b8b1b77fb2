"""The forces of a refinement on CUDA: one launch a step, without an array of cells x neighbours.

In torch a step writes the gaps of 32 near cells, 15 candidates and 10 shifts, and reads them back
several times: 29 ms for 3 million cells. Here they stay in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ROWS = 64  # cells of a program
_EDGES = 8  # edges to a cell that are read at once


def forces(
    x: Tensor,
    rows: slice,
    unit: float,
    near: Tensor,
    reach: Tensor,
    shifts: Tensor,
    candidates: Tensor,
    attracted: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Repulsion and attraction of some cells; see :mod:`ipar_sparse.layout.refinement`.

    Args:
        x: layout (n, 2), float32.
        rows: of the m cells whose forces are wanted.
        unit: u.
        near: cells whose repulsion is exact (n, c), int32.
        reach: squared distance (n,) up to which they are all the cells there are.
        shifts: the partners i - s and i + s of cell i represent all cells beyond ``reach`` (s,).
        candidates: those of the m cells (m, k), int32, -1 in padding.
        attracted: offsets (m + 1,), int64, into the cells whose candidates the m cells are, int64.

    Returns:
        Push (m, 2) and its normaliser (m,), as in ``repulsion``; and pull (m, 2).
    """
    count, k = candidates.shape
    push, pull = x.new_empty(count, 2), x.new_empty(count, 2)
    total, (offsets, target) = x.new_empty(count), attracted
    if count:
        _forces_kernel[(triton.cdiv(count, _ROWS),)](
            x,
            near,
            reach,
            shifts,
            candidates,
            offsets,
            target,
            push,
            total,
            pull,
            rows.start,
            count,
            len(x),
            unit**2,
            (len(x) - 1) / (2 * len(shifts)),
            NEAR=near.size(1),
            NEAR_PADDED=triton.next_power_of_2(near.size(1)),
            K=k,
            K_PADDED=triton.next_power_of_2(k),
            SHIFTS=len(shifts),
            ROWS=_ROWS,
            EDGES=_EDGES,
        )
    return push, total, pull


@triton.jit
def _gap(x_ptr, x0, x1, other, mask):
    """From other cells to a row's, and the square of the distance."""
    gap0 = x0[:, None] - tl.load(x_ptr + 2 * other, mask=mask, other=0.0)
    gap1 = x1[:, None] - tl.load(x_ptr + 2 * other + 1, mask=mask, other=0.0)
    return gap0, gap1, gap0 * gap0 + gap1 * gap1


@triton.jit(do_not_specialize=["first", "count", "n"])
def _forces_kernel(
    x_ptr,
    near_ptr,
    reach_ptr,
    shift_ptr,
    candidate_ptr,
    offset_ptr,
    target_ptr,
    push_ptr,
    total_ptr,
    pull_ptr,
    first,
    count,
    n,
    square_unit,
    factor,
    NEAR: tl.constexpr,
    NEAR_PADDED: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    SHIFTS: tl.constexpr,
    ROWS: tl.constexpr,
    EDGES: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = place < count
    cell = place + first
    x0 = tl.load(x_ptr + 2 * cell, mask=real, other=0.0)
    x1 = tl.load(x_ptr + 2 * cell + 1, mask=real, other=0.0)
    # The farthest near cell lies at the reach, and squares round otherwise here than in torch.
    reach = tl.load(reach_ptr + cell, mask=real, other=0.0) * 1.000001

    slot = tl.arange(0, NEAR_PADDED)[None, :]
    mask = real[:, None] & (slot < NEAR)
    other = tl.load(near_ptr + cell[:, None] * NEAR + slot, mask=mask, other=0).to(tl.int64)
    gap0, gap1, square = _gap(x_ptr, x0, x1, other, mask)
    q = tl.where(mask & (square <= reach[:, None]), 1 / (1 + square / square_unit), 0.0)
    push0, push1, total = tl.sum(gap0 * q * q, 1), tl.sum(gap1 * q * q, 1), tl.sum(q, 1)
    for number in tl.static_range(2 * SHIFTS):
        shift = tl.load(shift_ptr + number % SHIFTS)
        if number >= SHIFTS:
            shift = n - shift
        far = cell - shift
        far = tl.where(far < 0, far + n, far)
        far0 = x0 - tl.load(x_ptr + 2 * far, mask=real, other=0.0)
        far1 = x1 - tl.load(x_ptr + 2 * far + 1, mask=real, other=0.0)
        square_far = far0 * far0 + far1 * far1
        weight = tl.where(square_far > reach, 1 / (1 + square_far / square_unit), 0.0)
        push0 += factor * far0 * weight * weight
        push1 += factor * far1 * weight * weight
        total += factor * weight
    tl.store(push_ptr + 2 * place, push0, mask=real)
    tl.store(push_ptr + 2 * place + 1, push1, mask=real)
    tl.store(total_ptr + place, total, mask=real)

    slot = tl.arange(0, K_PADDED)[None, :]
    mask = real[:, None] & (slot < K)
    other = tl.load(candidate_ptr + place[:, None] * K + slot, mask=mask, other=-1).to(tl.int64)
    mask = mask & (other >= 0)
    gap0, gap1, square = _gap(x_ptr, x0, x1, other, mask)
    weight = tl.where(mask, 1 / (square_unit + square), 0.0)
    pull0, pull1 = tl.sum(gap0 * weight, 1), tl.sum(gap1 * weight, 1)
    begin = tl.load(offset_ptr + place, mask=real, other=0)
    end = tl.load(offset_ptr + place + 1, mask=real, other=0)
    most = tl.max(end - begin, 0)
    for at in range(0, most, EDGES):
        edge = begin[:, None] + at + tl.arange(0, EDGES)[None, :]
        there = edge < end[:, None]
        origin = tl.load(target_ptr + edge, mask=there, other=0)
        from0, from1, square_in = _gap(x_ptr, x0, x1, origin, there)
        weight_in = tl.where(there, 1 / (square_unit + square_in), 0.0)
        pull0 += tl.sum(from0 * weight_in, 1)
        pull1 += tl.sum(from1 * weight_in, 1)
    tl.store(pull_ptr + 2 * place, pull0, mask=real)
    tl.store(pull_ptr + 2 * place + 1, pull1, mask=real)
