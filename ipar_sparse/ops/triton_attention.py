"""Fused edge attention on CUDA: online softmax over the neighbour table, two-pass backward.

Every kernel gathers node rows in place and accumulates in registers. The only per-edge tensors are
the bias and its gradient. The backward pass runs once by destination (queries, bias) and once over
the reverse lists by source (keys, values, positions). Every output has one writer, so that results
are bitwise reproducible. Long reverse lists are cut into chunks of fixed size, whose partial sums
a last kernel adds in order.

Logits are in units of log 2. A row's largest bias is subtracted before the products are added, so
that large biases (1e4) lose no digits.
"""

import math
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..graph import NeighborTable
from ..graph.order import local_order
from . import triton_shared
from .selective_checkpoint import saved_or

_LOG2E = tl.constexpr(1.4426950408889634)
# Edges that a lane holds in registers. Fewer leave registers for more warps; the source pass needs
# its registers for sums and gains from more edges (measured, docs/kernels.md).
_DEPTH, _SOURCE_DEPTH = 2, 4
_CHUNK = 256  # out-edges of a task of the source pass: about twice the mean at k = 100


def unsupported(q: Tensor, x: Tensor) -> str | None:
    """Why these inputs cannot run here, or None if they can."""
    if wrong := wrong_device(q):
        return wrong
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"float32, bfloat16 or float16 queries (given {q.dtype})"
    if q.size(-1) not in (8, 16, 32, 64, 128):
        return f"8, 16, 32, 64 or 128 channels a head (given {q.size(-1)})"
    if q.size(-2) * q.size(-1) > 2048:
        return f"at most 2048 channels in all (given {q.size(-2) * q.size(-1)})"
    if x.size(-1) != 2:
        return f"positions in two dimensions (given {x.size(-1)})"
    return None


def wrong_device(x: Tensor) -> str | None:
    """Why kernels cannot run where a tensor lies; Triton's interpreter runs them on the CPU."""
    if x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"tensors on a CUDA device (given {x.device})"


def edge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x_src: Tensor,
    x_dst: Tensor,
    bias: Tensor | None,
    graph: NeighborTable,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`ipar_sparse.ops.edge_attention`.

    A graph that :func:`~ipar_sparse.graph.order.reorder` has been called on runs in its local
    order. Node rows are then copied once each way, which costs less than the cache misses saved.

    Raises:
        ValueError: on dtypes or shapes that the kernels do not take.
    """
    if reason := unsupported(q, x_src):
        raise ValueError(f"the triton backend takes {reason}; use backend='chunked'")
    if bias is not None:
        bias = graph.to_table(bias, fill=-math.inf)
    dtype = x_src.dtype
    tensors: list[Tensor | None] = [q, k, v, x_src.float(), x_dst.float(), bias]
    order = local_order(graph)
    if order is not None:
        graph, perm, inverse = order
        tensors = [None if t is None else Reorder.apply(t, perm, inverse) for t in tensors]
    bias = None if tensors[5] is None else tensors[5].flatten(0, 1)
    out, displacement, lse = _EdgeAttention.apply(*tensors[:5], bias, graph)
    if order is not None:
        out, displacement, lse = (Reorder.apply(t, inverse, perm) for t in (out, displacement, lse))
    return out, displacement.to(dtype), lse


class Reorder(torch.autograd.Function):
    """Rows in another order, whose gradient is a gather by the inverse and not a scatter."""

    @staticmethod
    def forward(ctx, x, perm, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, perm)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _EdgeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, x_src, x_dst, bias, graph):
        q, k, v = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v)
        x_src, x_dst = x_src.contiguous(), x_dst.contiguous()
        bias = None if bias is None else bias.contiguous()
        if any(ctx.needs_input_grad):  # sorts take memory, so they come before anything is saved
            by_source = any(ctx.needs_input_grad[1:4])
            edge = SourcePlan.of(graph).edge if by_source else None
            triton_shared.find_tiles(q, graph, edge)
        out, displacement, lse, norm = saved_or(
            lambda: _EdgeAttention._forward(q, k, v, x_src, x_dst, bias, graph)
        )
        ctx.save_for_backward(q, k, v, x_src, x_dst, bias, out, displacement, norm)
        ctx.graph = graph
        return out, displacement, lse

    @staticmethod
    def _forward(q, k, v, x_src, x_dst, bias, graph):
        n, heads, channels = q.shape
        out = torch.empty(n, heads, channels, dtype=q.dtype, device=q.device)
        displacement = torch.empty(n, heads, 2, dtype=torch.float32, device=q.device)
        lse = torch.empty(n, heads, dtype=torch.float32, device=q.device)
        # Log-sum-exp in base 2 relative to the row's bias offset, and the offset itself.
        norm = torch.empty(n, heads, 2, dtype=torch.float32, device=q.device)
        shared = triton_shared.tiles_of(q, graph)
        if shared is not None:
            outputs = (out, displacement, lse, norm)
            triton_shared.forward(q, k, v, x_src, x_dst, bias, shared, outputs, graph.k)
        elif n:
            shape = _Shape.of(q, bias)
            _forward_kernel[(n,)](
                q,
                k,
                v,
                x_src,
                x_dst,
                graph.index,
                bias,
                out,
                displacement,
                lse,
                norm,
                graph.k,
                q.stride(0),
                k.stride(0),
                v.stride(0),
                channels**-0.5,
                **shape.tile,
            )
        return out, displacement, lse, norm

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_displacement, d_lse):
        q, k, v, x_src, x_dst, bias, out, displacement, norm = ctx.saved_tensors
        graph: NeighborTable = ctx.graph
        n, heads, channels = q.shape
        device, scale = q.device, channels**-0.5
        shape = _Shape.of(q, bias)
        d_q = torch.empty(n, heads, channels, dtype=q.dtype, device=device)
        d_k = torch.empty(k.shape, dtype=k.dtype, device=device)
        d_v = torch.empty(v.shape, dtype=v.dtype, device=device)
        d_x_src = torch.empty_like(x_src)
        d_x_dst = torch.empty_like(x_dst)
        shared = triton_shared.tiles_of(q, graph)
        d_bias = None
        if ctx.needs_input_grad[5]:
            empty = torch.zeros_like if shared is not None and graph.padded else torch.empty_like
            d_bias = empty(bias)
        # What an edge needs of its destination beside q and d_out, in one aligned row: (norm,
        # delta) per head, d_displacement per head, the position, the bias offset per head.
        info = torch.empty(n, shape.info, dtype=torch.float32, device=device)
        d_out = contiguous_rows(d_out)
        if n:
            _prepare_kernel[(triton.cdiv(n, shape.prepare["ROWS"]),)](
                d_out,
                out,
                d_displacement.contiguous(),
                displacement,
                d_lse.contiguous(),
                norm,
                x_dst,
                info,
                d_x_dst,
                n,
                d_out.stride(0),
                INFO=shape.info,
                **shape.prepare,
            )
        shared_src = triton_shared.tiles_of(q, graph, "source_tiles")
        if shared is not None or shared_src is not None:
            parts = triton_shared.destination_parts(info, x_src, heads, scale * _LOG2E.value)
            given = (q, k, v, (triton_shared.source_parts(x_src), *parts), d_out, bias)
        if shared is not None:
            triton_shared.backward_dst(*given, shared, d_q, d_bias, graph.k)
        elif n:
            _backward_dst_kernel[(n,)](
                q,
                k,
                v,
                x_src,
                graph.index,
                bias,
                d_out,
                info,
                d_q,
                d_bias,
                graph.k,
                q.stride(0),
                k.stride(0),
                v.stride(0),
                d_out.stride(0),
                scale,
                INFO=shape.info,
                NEED_BIAS=d_bias is not None,
                **shape.tile,
            )
        if not any(ctx.needs_input_grad[1:4]):
            pass
        elif shared_src is not None:
            triton_shared.backward_src(*given, shared_src, d_k, d_v, d_x_src, graph.k)
        elif k.size(0):
            plan = SourcePlan.of(graph)
            partial = torch.empty(
                plan.num_partials, 2 * heads * channels + 2, dtype=torch.float32, device=device
            )
            _backward_src_kernel[(plan.num_tasks,)](
                q,
                k,
                v,
                x_src,
                plan.edge,
                bias,
                d_out,
                info,
                plan.task,
                d_k,
                d_v,
                d_x_src,
                partial,
                *division(max(graph.k, 1)),
                q.stride(0),
                k.stride(0),
                v.stride(0),
                d_out.stride(0),
                scale,
                INFO=shape.info,
                **{**shape.tile, "R": _SOURCE_DEPTH},
            )
            if plan.num_heavy:
                _combine_kernel[(plan.num_heavy,)](
                    partial,
                    plan.heavy,
                    d_k,
                    d_v,
                    d_x_src,
                    WIDTH=heads * channels,
                    BLOCK=triton.next_power_of_2(heads * channels),
                )
        return d_q, d_k, d_v, d_x_src, d_x_dst, d_bias, None


@dataclass
class SourcePlan:
    """The out-edges of every source cut into tasks of bounded length, made once a graph.

    Args:
        edge: positions in the flat table, sorted by source (E,), int32.
        task: (tasks, 4) int32: source, first and end position in ``edge``, and the row of the
            partial sums, or -1 where the task is the source's only one.
        heavy: (sources with several tasks, 3) int32: source, first partial row, number of rows.
    """

    edge: Tensor
    task: Tensor
    heavy: Tensor
    num_partials: int

    @property
    def num_tasks(self) -> int:
        return self.task.size(0)

    @property
    def num_heavy(self) -> int:
        return self.heavy.size(0)

    @classmethod
    def of(cls, graph: NeighborTable, chunk: int = _CHUNK) -> "SourcePlan":
        """The plan of a graph, built at first use and cached with it."""
        return graph._cached(f"source_plan_{chunk}", lambda: cls._build(graph, chunk))

    @classmethod
    def _build(cls, graph: NeighborTable, chunk: int) -> "SourcePlan":
        edge, degree = graph._cached("edges_by_source", lambda: cls._sorted(graph))
        device = edge.device
        end = degree.cumsum(0)
        pieces = ((degree + chunk - 1) // chunk).clamp(min=1)
        last = pieces.cumsum(0)
        owner = torch.repeat_interleave(pieces)
        number = torch.arange(owner.numel(), device=device) - (last - pieces)[owner]
        begin = (end - degree)[owner] + number * chunk
        split = pieces[owner] > 1
        partial = torch.where(split, split.cumsum(0) - 1, -1)
        task = torch.stack([owner, begin, torch.minimum(begin + chunk, end[owner]), partial], -1)
        heavy = (pieces > 1).nonzero().squeeze(-1)
        first = partial[(last - pieces)[heavy]]
        heavy = torch.stack([heavy, first, pieces[heavy]], -1)
        return cls(edge, task.int(), heavy.int(), int(split.sum()))

    @staticmethod
    def _sorted(graph: NeighborTable) -> tuple[Tensor, Tensor]:
        """The table's positions sorted by source, and the edges of each source (n,)."""
        source = graph.index.flatten()
        edge = torch.sort(source, stable=True).indices.int()
        degree = torch.bincount(
            source[source >= 0] if graph.padded else source, minlength=graph.num_src_nodes
        )
        return edge[edge.numel() - int(degree.sum()) :], degree


@dataclass
class _Shape:
    """Tile sizes for one head layout and dtype."""

    tile: dict
    prepare: dict
    info: int

    @classmethod
    def of(cls, q: Tensor, bias: Tensor | None) -> "_Shape":
        heads, channels = q.shape[1:]
        padded = triton.next_power_of_2(heads)
        width, vector = padded * channels, 16 // q.element_size()
        warps = min(max(width // (32 * vector), 1), 8)
        # Edges that a warp holds side by side. Each has its own running sums, so that lanes are
        # reduced once a row and not once a tile.
        side = max(32 * warps * vector // width, 1)
        kind = 0 if bias is None else bias.dim()
        layout = {"HEADS": heads, "H": padded, "C": channels}
        tile = {**layout, "R": _DEPTH, "P": side, "BIAS": kind, "num_warps": warps}
        prepare = {**layout, "ROWS": max(1, 2048 // width)}
        return cls(tile, prepare, triton.next_power_of_2(5 * padded + 2))


def division(divisor: int) -> tuple[int, int]:
    """Multiplier m and shift s with x // divisor = ((2 x m) >> 32) >> s for 0 <= x < 2^31."""
    shift = (divisor - 1).bit_length()
    return -(-(1 << (31 + shift)) // divisor), shift


def contiguous_rows(x: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, as in a view of packed q, k, v; else a copy."""
    return x if x.stride()[1:] == (x.size(2), 1) and x.stride(0) > 0 else x.contiguous()


@triton.jit
def _gather(ptr, rows, stride, inner, mask):
    offset = rows.to(tl.int64)[:, None] * stride + inner[None, :]
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_pair(ptr, mask):
    """Two neighbouring floats by one load of 64 bits."""
    pair = tl.load(ptr, mask=mask, other=0)
    low = pair.to(tl.int32).to(tl.float32, bitcast=True)
    high = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _load_bias(ptr, edge, heads, valid, head_mask, HEADS: tl.constexpr, BIAS: tl.constexpr):
    """Bias of some edges: (edges, 1) if shared by the heads, else (edges, heads)."""
    if BIAS == 1:
        value = tl.load(ptr + edge, mask=valid, other=float("-inf"))[:, None]
    else:
        value = tl.load(
            ptr + edge[:, None] * HEADS + heads[None, :],
            mask=valid[:, None] & head_mask[None, :],
            other=float("-inf"),
        )
    return value.to(tl.float32)


@triton.jit
def _dot_heads(row, tile, EDGES: tl.constexpr, H: tl.constexpr, C: tl.constexpr):
    """Products of one row (H C,) with every edge of a tile (edges, H C), per head."""
    return tl.sum(tl.reshape(row[None, :] * tile, [EDGES, H, C]), 2)


@triton.jit
def _repeat(x, R: tl.constexpr, P: tl.constexpr, H: tl.constexpr, C: tl.constexpr):
    """Per-head weights (edges, H) as (R, P, H C), to multiply a tile."""
    wide = tl.broadcast_to(x[:, :, None], [R * P, H, C])
    return tl.reshape(wide, [R, P, H * C])


@triton.jit
def _fold(x, R: tl.constexpr, P: tl.constexpr, W: tl.constexpr):
    """Sum of (edges, W) over the edges that one lane holds: (P, W)."""
    return tl.sum(tl.reshape(x, [R, P, W]), 0)


@triton.jit(do_not_specialize=["K"])
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    x_src_ptr,
    x_dst_ptr,
    table_ptr,
    bias_ptr,
    out_ptr,
    displacement_ptr,
    lse_ptr,
    norm_ptr,
    K,
    q_stride,
    k_stride,
    v_stride,
    scale,
    HEADS: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BIAS: tl.constexpr,
):
    EDGES: tl.constexpr = R * P
    W: tl.constexpr = H * C
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, EDGES)
    heads = tl.arange(0, H)
    head_mask = heads < HEADS
    inner = tl.arange(0, W)
    inner_mask = inner < HEADS * C
    q = tl.load(q_ptr + row * q_stride + inner, mask=inner_mask, other=0.0)
    q = q.to(tl.float32) * (scale * _LOG2E)
    pair = tl.pointer_type(tl.int64)
    x0 = tl.load(x_dst_ptr + row * 2)
    x1 = tl.load(x_dst_ptr + row * 2 + 1)
    first = row * K

    offset = tl.zeros([H], tl.float32)
    if BIAS > 0:
        offset = tl.full([H], float("-inf"), tl.float32)
        for start in range(0, K, 128):
            slot = start + tl.arange(0, 128)
            bias = _load_bias(bias_ptr, first + slot, heads, slot < K, head_mask, HEADS, BIAS)
            offset = tl.maximum(offset, tl.max(bias, 0))
        offset = tl.where(offset == float("-inf"), 0.0, offset)

    top = tl.full([P, H], float("-inf"), tl.float32)
    total = tl.zeros([P, H], tl.float32)
    move0 = tl.zeros([P, H], tl.float32)
    move1 = tl.zeros([P, H], tl.float32)
    out = tl.zeros([P, W], tl.float32)
    for start in range(0, K, EDGES):
        slot = start + slots
        source = tl.load(table_ptr + first + slot, mask=slot < K, other=-1)
        valid = source >= 0
        mask = valid[:, None] & inner_mask[None, :]
        key = _gather(k_ptr, source, k_stride, inner, mask)
        value = _gather(v_ptr, source, v_stride, inner, mask)
        y0, y1 = _load_pair(x_src_ptr.to(pair, bitcast=True) + source.to(tl.int64), valid)
        logit = _dot_heads(q, key, EDGES, H, C)
        if BIAS > 0:
            bias = _load_bias(bias_ptr, first + slot, heads, valid, head_mask, HEADS, BIAS)
            logit += (bias - offset[None, :]) * _LOG2E
        logit = tl.where(valid[:, None], logit, float("-inf"))
        folded = tl.reshape(logit, [R, P, H])
        new_top = tl.maximum(top, tl.max(folded, 0))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.reshape(tl.exp2(folded - finite[None, :, :]), [EDGES, H])
        decay = tl.exp2(top - finite)
        total = total * decay + _fold(weight, R, P, H)
        move0 = move0 * decay + _fold(weight * (y0 - x0)[:, None], R, P, H)
        move1 = move1 * decay + _fold(weight * (y1 - x1)[:, None], R, P, H)
        wide = tl.reshape(tl.broadcast_to(decay[:, :, None], [P, H, C]), [P, W])
        repeated = _repeat(weight, R, P, H, C)
        out = out * wide + tl.sum(repeated * tl.reshape(value, [R, P, W]), 0)
        top = new_top

    highest = tl.max(top, 0)
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    decay = tl.exp2(top - finite[None, :])
    total = tl.sum(total * decay, 0)
    empty = total == 0.0
    inverse = 1.0 / tl.where(empty, 1.0, total)
    move0 = tl.sum(move0 * decay, 0) * inverse
    move1 = tl.sum(move1 * decay, 0) * inverse
    wide = tl.reshape(tl.broadcast_to((decay * inverse[None, :])[:, :, None], [P, H, C]), [P, W])
    out = tl.sum(out * wide, 0)
    norm = tl.where(empty, float("inf"), highest + tl.log2(total))
    lse = tl.where(empty, float("-inf"), norm / _LOG2E + offset)
    node = row * HEADS + heads
    tl.store(lse_ptr + node, lse, mask=head_mask)
    tl.store(norm_ptr + node * 2, norm, mask=head_mask)
    tl.store(norm_ptr + node * 2 + 1, offset, mask=head_mask)
    tl.store(displacement_ptr + node * 2, move0, mask=head_mask)
    tl.store(displacement_ptr + node * 2 + 1, move1, mask=head_mask)
    tl.store(out_ptr + row * HEADS * C + inner, out.to(out_ptr.dtype.element_ty), mask=inner_mask)


@triton.jit(do_not_specialize=["N"])
def _prepare_kernel(
    d_out_ptr,
    out_ptr,
    d_displacement_ptr,
    displacement_ptr,
    d_lse_ptr,
    norm_ptr,
    x_dst_ptr,
    info_ptr,
    d_x_dst_ptr,
    N,
    d_out_stride,
    HEADS: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    INFO: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    heads = tl.arange(0, H)
    head_mask = heads < HEADS
    inner = tl.arange(0, H * C)
    mask = inside[:, None] & (inner < HEADS * C)[None, :]
    out = _gather(out_ptr, row, HEADS * C, inner, mask)
    d_out = _gather(d_out_ptr, row, d_out_stride, inner, mask)
    node = row[:, None] * HEADS + heads[None, :]
    mask = inside[:, None] & head_mask[None, :]
    norm = tl.load(norm_ptr + node * 2, mask=mask, other=float("inf"))
    offset = tl.load(norm_ptr + node * 2 + 1, mask=mask, other=0.0)
    full = mask & (norm != float("inf"))
    move0 = tl.load(displacement_ptr + node * 2, mask=mask, other=0.0)
    move1 = tl.load(displacement_ptr + node * 2 + 1, mask=mask, other=0.0)
    d_move0 = tl.load(d_displacement_ptr + node * 2, mask=full, other=0.0)
    d_move1 = tl.load(d_displacement_ptr + node * 2 + 1, mask=full, other=0.0)
    d_lse = tl.load(d_lse_ptr + node, mask=full, other=0.0)
    delta = tl.sum(tl.reshape(out * d_out, [ROWS, H, C]), 2)
    delta += move0 * d_move0 + move1 * d_move1 - d_lse
    base = info_ptr + row * INFO
    slot = base[:, None] + 2 * heads[None, :]
    tl.store(slot, norm, mask=inside[:, None])
    tl.store(slot + 1, delta, mask=inside[:, None])
    tl.store(slot + 2 * H, d_move0, mask=inside[:, None])
    tl.store(slot + 2 * H + 1, d_move1, mask=inside[:, None])
    tl.store(base + 4 * H, tl.load(x_dst_ptr + row * 2, mask=inside, other=0.0), mask=inside)
    x1 = tl.load(x_dst_ptr + row * 2 + 1, mask=inside, other=0.0)
    tl.store(base + 4 * H + 1, x1, mask=inside)
    tl.store(base[:, None] + 4 * H + 2 + heads[None, :], offset, mask=inside[:, None])
    # The weights of a row sum to one, so the destination's own share needs no pass over edges.
    tl.store(d_x_dst_ptr + row * 2, -tl.sum(d_move0, 1), mask=inside)
    tl.store(d_x_dst_ptr + row * 2 + 1, -tl.sum(d_move1, 1), mask=inside)


@triton.jit(do_not_specialize=["K"])
def _backward_dst_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    x_src_ptr,
    table_ptr,
    bias_ptr,
    d_out_ptr,
    info_ptr,
    d_q_ptr,
    d_bias_ptr,
    K,
    q_stride,
    k_stride,
    v_stride,
    d_out_stride,
    scale,
    HEADS: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BIAS: tl.constexpr,
    INFO: tl.constexpr,
    NEED_BIAS: tl.constexpr,
):
    EDGES: tl.constexpr = R * P
    W: tl.constexpr = H * C
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, EDGES)
    heads = tl.arange(0, H)
    head_mask = heads < HEADS
    inner = tl.arange(0, W)
    inner_mask = inner < HEADS * C
    q = tl.load(q_ptr + row * q_stride + inner, mask=inner_mask, other=0.0)
    q = q.to(tl.float32) * (scale * _LOG2E)
    d_out = tl.load(d_out_ptr + row * d_out_stride + inner, mask=inner_mask, other=0.0)
    d_out = d_out.to(tl.float32)
    info = info_ptr + row * INFO
    norm = tl.load(info + 2 * heads)
    delta = tl.load(info + 2 * heads + 1)
    d_move0 = tl.load(info + 2 * H + 2 * heads)
    d_move1 = tl.load(info + 2 * H + 2 * heads + 1)
    x0 = tl.load(info + 4 * H)
    x1 = tl.load(info + 4 * H + 1)
    offset = tl.load(info + 4 * H + 2 + heads)
    pair = tl.pointer_type(tl.int64)
    first = row * K
    d_q = tl.zeros([P, W], tl.float32)
    for start in range(0, K, EDGES):
        slot = start + slots
        source = tl.load(table_ptr + first + slot, mask=slot < K, other=-1)
        valid = source >= 0
        mask = valid[:, None] & inner_mask[None, :]
        key = _gather(k_ptr, source, k_stride, inner, mask)
        value = _gather(v_ptr, source, v_stride, inner, mask)
        y0, y1 = _load_pair(x_src_ptr.to(pair, bitcast=True) + source.to(tl.int64), valid)
        logit = _dot_heads(q, key, EDGES, H, C)
        if BIAS > 0:
            bias = _load_bias(bias_ptr, first + slot, heads, valid, head_mask, HEADS, BIAS)
            logit += (bias - offset[None, :]) * _LOG2E
        logit = tl.where(valid[:, None], logit, float("-inf"))
        slope = _dot_heads(d_out, value, EDGES, H, C) - delta[None, :]
        slope += d_move0[None, :] * (y0 - x0)[:, None] + d_move1[None, :] * (y1 - x1)[:, None]
        slope *= tl.exp2(logit - norm[None, :])
        repeated = _repeat(slope, R, P, H, C)
        d_q += tl.sum(repeated * tl.reshape(key, [R, P, W]), 0)
        if NEED_BIAS:
            if BIAS == 1:
                d_bias = tl.sum(slope, 1).to(d_bias_ptr.dtype.element_ty)
                tl.store(d_bias_ptr + first + slot, d_bias, mask=slot < K)
            else:
                tl.store(
                    d_bias_ptr + (first + slot)[:, None] * HEADS + heads[None, :],
                    slope.to(d_bias_ptr.dtype.element_ty),
                    mask=(slot < K)[:, None] & head_mask[None, :],
                )
    d_q = tl.sum(d_q, 0) * scale
    tl.store(d_q_ptr + row * HEADS * C + inner, d_q.to(d_q_ptr.dtype.element_ty), mask=inner_mask)


@triton.jit(do_not_specialize=["multiplier", "shift"])
def _backward_src_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    x_src_ptr,
    edge_ptr,
    bias_ptr,
    d_out_ptr,
    info_ptr,
    task_ptr,
    d_k_ptr,
    d_v_ptr,
    d_x_src_ptr,
    partial_ptr,
    multiplier,
    shift,
    q_stride,
    k_stride,
    v_stride,
    d_out_stride,
    scale,
    HEADS: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BIAS: tl.constexpr,
    INFO: tl.constexpr,
):
    EDGES: tl.constexpr = R * P
    W: tl.constexpr = H * C
    task = task_ptr + tl.program_id(0).to(tl.int64) * 4
    source = tl.load(task).to(tl.int64)
    begin = tl.load(task + 1)
    end = tl.load(task + 2)
    partial = tl.load(task + 3).to(tl.int64)
    slots = tl.arange(0, EDGES)
    heads = tl.arange(0, H)
    head_mask = heads < HEADS
    inner = tl.arange(0, W)
    inner_mask = inner < HEADS * C
    key = tl.load(k_ptr + source * k_stride + inner, mask=inner_mask, other=0.0)
    key = key.to(tl.float32) * (scale * _LOG2E)
    value = tl.load(v_ptr + source * v_stride + inner, mask=inner_mask, other=0.0)
    value = value.to(tl.float32)
    x0 = tl.load(x_src_ptr + source * 2)
    x1 = tl.load(x_src_ptr + source * 2 + 1)
    pair = tl.pointer_type(tl.int64)
    d_k = tl.zeros([P, W], tl.float32)
    d_v = tl.zeros([P, W], tl.float32)
    d_x0 = tl.zeros([P, H], tl.float32)
    d_x1 = tl.zeros([P, H], tl.float32)
    for start in range(begin, end, EDGES):
        place = start + slots
        valid = place < end
        edge = tl.load(edge_ptr + place, mask=valid, other=0)
        row = tl.umulhi(edge.to(tl.uint32) * 2, multiplier.to(tl.uint32)) >> shift
        row = row.to(tl.int64)
        mask = valid[:, None] & inner_mask[None, :]
        q = _gather(q_ptr, row, q_stride, inner, mask)
        d_out = _gather(d_out_ptr, row, d_out_stride, inner, mask)
        info = info_ptr.to(pair, bitcast=True) + row * (INFO // 2)
        norm, delta = _load_pair(info[:, None] + heads[None, :], valid[:, None])
        d_move0, d_move1 = _load_pair(info[:, None] + H + heads[None, :], valid[:, None])
        y0, y1 = _load_pair(info + 2 * H, valid)
        logit = _dot_heads(key, q, EDGES, H, C)
        if BIAS > 0:
            at = info_ptr + (row * INFO + 4 * H + 2)[:, None] + heads[None, :]
            offset = tl.load(at, mask=valid[:, None], other=0.0)
            edge = edge.to(tl.int64)
            bias = _load_bias(bias_ptr, edge, heads, valid, head_mask, HEADS, BIAS)
            logit += (bias - offset) * _LOG2E
        weight = tl.exp2(tl.where(valid[:, None], logit - norm, float("-inf")))
        slope = _dot_heads(value, d_out, EDGES, H, C) - delta
        slope += d_move0 * (x0 - y0)[:, None] + d_move1 * (x1 - y1)[:, None]
        slope *= weight
        d_k += tl.sum(_repeat(slope, R, P, H, C) * tl.reshape(q, [R, P, W]), 0)
        d_v += tl.sum(_repeat(weight, R, P, H, C) * tl.reshape(d_out, [R, P, W]), 0)
        d_x0 += _fold(weight * d_move0, R, P, H)
        d_x1 += _fold(weight * d_move1, R, P, H)
    d_k = tl.sum(d_k, 0) * scale
    d_v = tl.sum(d_v, 0)
    sum0 = tl.sum(tl.sum(d_x0, 0), 0)
    sum1 = tl.sum(tl.sum(d_x1, 0), 0)
    if partial < 0:
        own = source * HEADS * C + inner
        tl.store(d_k_ptr + own, d_k.to(d_k_ptr.dtype.element_ty), mask=inner_mask)
        tl.store(d_v_ptr + own, d_v.to(d_v_ptr.dtype.element_ty), mask=inner_mask)
        tl.store(d_x_src_ptr + source * 2, sum0)
        tl.store(d_x_src_ptr + source * 2 + 1, sum1)
    else:
        part = partial_ptr + partial * (2 * HEADS * C + 2)
        tl.store(part + inner, d_k, mask=inner_mask)
        tl.store(part + HEADS * C + inner, d_v, mask=inner_mask)
        tl.store(part + 2 * HEADS * C, sum0)
        tl.store(part + 2 * HEADS * C + 1, sum1)


@triton.jit
def _combine_kernel(
    partial_ptr,
    heavy_ptr,
    d_k_ptr,
    d_v_ptr,
    d_x_src_ptr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    heavy = heavy_ptr + tl.program_id(0) * 3
    source = tl.load(heavy).to(tl.int64)
    first = tl.load(heavy + 1).to(tl.int64)
    count = tl.load(heavy + 2)
    inner = tl.arange(0, BLOCK)
    mask = inner < WIDTH
    two = tl.arange(0, 2)
    d_k = tl.zeros([BLOCK], tl.float32)
    d_v = tl.zeros([BLOCK], tl.float32)
    d_x = tl.zeros([2], tl.float32)
    for piece in range(0, count):
        at = partial_ptr + (first + piece) * (2 * WIDTH + 2)
        d_k += tl.load(at + inner, mask=mask, other=0.0)
        d_v += tl.load(at + WIDTH + inner, mask=mask, other=0.0)
        d_x += tl.load(at + 2 * WIDTH + two)
    tl.store(d_k_ptr + source * WIDTH + inner, d_k.to(d_k_ptr.dtype.element_ty), mask=mask)
    tl.store(d_v_ptr + source * WIDTH + inner, d_v.to(d_v_ptr.dtype.element_ty), mask=mask)
    tl.store(d_x_src_ptr + source * 2 + two, d_x)
