"""Fused edge attention on CUDA: online softmax over the neighbour table, two-pass backward.

Every kernel gathers node rows straight from where they lie and keeps its sums in registers; no
per-edge tensor exists except the bias and its gradient. The backward pass runs once by
destination (queries, bias) and once over the reverse lists by source (keys, values, positions):
every output has one writer, so that results are the same bits in every run. Sources with long
reverse lists are cut into chunks of fixed size whose partial sums a last kernel adds in order.

Logits are kept in units of log 2. A row's largest bias is subtracted before the products are
added, so that large biases (1e4) cost no digits.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..graph import NeighborTable

_LOG2E = tl.constexpr(1.4426950408889634)
_CHUNK = 256  # out-edges a program of the source pass takes on: about twice the mean at k = 100


def unsupported(q: Tensor, x: Tensor) -> str | None:
    """Why these inputs cannot run here, or None if they can."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"float32, bfloat16 or float16 queries (given {q.dtype})"
    if q.size(-1) not in (8, 16, 32, 64, 128):
        return f"8, 16, 32, 64 or 128 channels a head (given {q.size(-1)})"
    if q.size(-2) * q.size(-1) > 2048:
        return f"at most 2048 channels in all (given {q.size(-2) * q.size(-1)})"
    if x.size(-1) != 2:
        return f"positions in two dimensions (given {x.size(-1)})"
    return None


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

    Raises:
        ValueError: on dtypes or shapes that the kernels do not take.
    """
    if reason := unsupported(q, x_src):
        raise ValueError(f"the triton backend takes {reason}; use backend='chunked'")
    if bias is not None:
        bias = graph.to_table(bias, fill=-math.inf).flatten(0, 1)
    dtype = x_src.dtype
    out, displacement, lse = _EdgeAttention.apply(
        q, k, v, x_src.float(), x_dst.float(), bias, graph
    )
    return out, displacement.to(dtype), lse


class _EdgeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, x_src, x_dst, bias, graph):
        q, k, v = _rows(q), _rows(k), _rows(v)
        x_src, x_dst = x_src.contiguous(), x_dst.contiguous()
        bias = None if bias is None else bias.contiguous()
        n, heads, channels = q.shape
        out = torch.empty(n, heads, channels, dtype=q.dtype, device=q.device)
        displacement = torch.empty(n, heads, 2, dtype=torch.float32, device=q.device)
        lse = torch.empty(n, heads, dtype=torch.float32, device=q.device)
        # Log-sum-exp in base 2 relative to the row's bias offset, and the offset itself.
        norm = torch.empty(n, heads, 2, dtype=torch.float32, device=q.device)
        if n:
            shape = _Shape.of(q, bias)
            _forward_kernel[(n,)](
                q, k, v, x_src, x_dst, graph.index, bias, out, displacement, lse, norm,
                graph.k, q.stride(0), k.stride(0), v.stride(0), channels**-0.5,
                **shape.tile,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, x_src, x_dst, bias, out, displacement, norm)
        ctx.graph = graph
        return out, displacement, lse

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
        d_bias = torch.empty_like(bias) if ctx.needs_input_grad[5] else None
        # What an edge needs of its destination beside q and d_out, in one aligned row: per head
        # (norm, softmax offset, d_displacement, bias offset), then the position.
        info = torch.empty(n, shape.info, dtype=torch.float32, device=device)
        d_out = _rows(d_out)
        if n:
            _prepare_kernel[(triton.cdiv(n, shape.prepare["ROWS"]),)](
                d_out, out, d_displacement.contiguous(), displacement, d_lse.contiguous(),
                norm, x_dst, info, d_x_dst,
                n, d_out.stride(0), INFO=shape.info, **shape.prepare,
            )  # fmt: skip
            _backward_dst_kernel[(n,)](
                q, k, v, x_src, graph.index, bias, d_out, info, d_q, d_bias,
                graph.k, q.stride(0), k.stride(0), v.stride(0), d_out.stride(0), scale,
                INFO=shape.info, NEED_BIAS=d_bias is not None, **shape.tile,
            )  # fmt: skip
        if k.size(0) and any(ctx.needs_input_grad[1:4]):
            plan = SourcePlan.of(graph)
            partial = torch.empty(
                plan.num_partials, 2 * heads * channels + 2, dtype=torch.float32, device=device
            )
            _backward_src_kernel[(plan.num_tasks,)](
                q, k, v, x_src, plan.edge, bias, d_out, info, plan.task,
                d_k, d_v, d_x_src, partial,
                graph.k, q.stride(0), k.stride(0), v.stride(0), d_out.stride(0), scale,
                INFO=shape.info, **shape.tile,
            )  # fmt: skip
            if plan.num_heavy:
                _combine_kernel[(plan.num_heavy,)](
                    partial, plan.heavy, d_k, d_v, d_x_src,
                    WIDTH=heads * channels,
                    BLOCK=triton.next_power_of_2(heads * channels),
                )  # fmt: skip
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
        """The graph's plan, built at first use and kept with it."""
        return graph._cached(f"source_plan_{chunk}", lambda: cls._build(graph, chunk))

    @classmethod
    def _build(cls, graph: NeighborTable, chunk: int) -> "SourcePlan":
        source = graph.index.flatten()
        device = source.device
        edge = torch.sort(source, stable=True).indices.int()
        degree = torch.bincount(
            source[source >= 0] if graph.padded else source, minlength=graph.num_src_nodes
        )
        edge = edge[edge.numel() - int(degree.sum()) :]
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
        row_bytes = padded * channels * q.element_size()
        # A warp reads 512 bytes at once; four such reads of keys and of values are in flight.
        warps = min(max(row_bytes // 512, 1), 8)
        block = min(max(4096 * warps // row_bytes, 4), 32)
        kind = 0 if bias is None else bias.dim()
        tile = {"HEADS": heads, "H": padded, "C": channels, "BLOCK": block, "BIAS": kind}
        prepare = {"HEADS": heads, "H": padded, "C": channels}
        prepare["ROWS"] = max(1, 2048 // (padded * channels))
        return cls({**tile, "num_warps": warps}, prepare, triton.next_power_of_2(5 * padded + 2))


def _rows(x: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous (a view into a packed q, k, v is), or a copy."""
    return x if x.stride()[1:] == (x.size(2), 1) and x.stride(0) > 0 else x.contiguous()


@triton.jit
def _gather(ptr, rows, stride, inner, mask):
    offset = rows.to(tl.int64)[:, None, None] * stride + inner[None, :, :]
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


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
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, x_src_ptr, x_dst_ptr, table_ptr, bias_ptr,
    out_ptr, displacement_ptr, lse_ptr, norm_ptr,
    K, q_stride, k_stride, v_stride, scale,
    HEADS: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, BLOCK)
    heads = tl.arange(0, H)
    head_mask = heads < HEADS
    inner = heads[:, None] * C + tl.arange(0, C)[None, :]
    q = tl.load(q_ptr + row * q_stride + inner, mask=head_mask[:, None], other=0.0)
    q = q.to(tl.float32) * (scale * _LOG2E)
    x0 = tl.load(x_dst_ptr + row * 2)
    x1 = tl.load(x_dst_ptr + row * 2 + 1)
    first = row * K

    offset = tl.zeros([H], tl.float32)
    if BIAS > 0:
        offset = tl.full([H], float("-inf"), tl.float32)
        for start in range(0, K, BLOCK):
            slot = start + slots
            bias = _load_bias(bias_ptr, first + slot, heads, slot < K, head_mask, HEADS, BIAS)
            offset = tl.maximum(offset, tl.max(bias, 0))
        offset = tl.where(offset == float("-inf"), 0.0, offset)

    top = tl.full([H], float("-inf"), tl.float32)
    total = tl.zeros([H], tl.float32)
    move0 = tl.zeros([H], tl.float32)
    move1 = tl.zeros([H], tl.float32)
    out = tl.zeros([H, C], tl.float32)
    for start in range(0, K, BLOCK):
        slot = start + slots
        source = tl.load(table_ptr + first + slot, mask=slot < K, other=-1)
        valid = source >= 0
        mask = valid[:, None, None] & head_mask[None, :, None]
        key = _gather(k_ptr, source, k_stride, inner, mask)
        value = _gather(v_ptr, source, v_stride, inner, mask)
        y0 = tl.load(x_src_ptr + source.to(tl.int64) * 2, mask=valid, other=0.0) - x0
        y1 = tl.load(x_src_ptr + source.to(tl.int64) * 2 + 1, mask=valid, other=0.0) - x1
        logit = tl.sum(q[None, :, :] * key, 2)
        if BIAS > 0:
            bias = _load_bias(bias_ptr, first + slot, heads, valid, head_mask, HEADS, BIAS)
            logit += (bias - offset[None, :]) * _LOG2E
        logit = tl.where(valid[:, None], logit, float("-inf"))
        new_top = tl.maximum(top, tl.max(logit, 0))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(logit - finite[None, :])
        decay = tl.exp2(top - finite)
        total = total * decay + tl.sum(weight, 0)
        move0 = move0 * decay + tl.sum(weight * y0[:, None], 0)
        move1 = move1 * decay + tl.sum(weight * y1[:, None], 0)
        out = out * decay[:, None] + tl.sum(weight[:, :, None] * value, 0)
        top = new_top

    empty = total == 0.0
    inverse = 1.0 / tl.where(empty, 1.0, total)
    norm = tl.where(empty, float("inf"), top + tl.log2(total))
    lse = tl.where(empty, float("-inf"), norm / _LOG2E + offset)
    node = row * HEADS + heads
    tl.store(lse_ptr + node, lse, mask=head_mask)
    tl.store(norm_ptr + node * 2, norm, mask=head_mask)
    tl.store(norm_ptr + node * 2 + 1, offset, mask=head_mask)
    tl.store(displacement_ptr + node * 2, move0 * inverse, mask=head_mask)
    tl.store(displacement_ptr + node * 2 + 1, move1 * inverse, mask=head_mask)
    out = out * inverse[:, None]
    tl.store(
        out_ptr + row * HEADS * C + inner, out.to(out_ptr.dtype.element_ty), mask=head_mask[:, None]
    )


@triton.jit
def _prepare_kernel(
    d_out_ptr, out_ptr, d_displacement_ptr, displacement_ptr, d_lse_ptr, norm_ptr, x_dst_ptr,
    info_ptr, d_x_dst_ptr,
    N, d_out_stride,
    HEADS: tl.constexpr, H: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, INFO: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    heads = tl.arange(0, H)
    head_mask = heads < HEADS
    inner = heads[:, None] * C + tl.arange(0, C)[None, :]
    mask = inside[:, None, None] & head_mask[None, :, None]
    out = _gather(out_ptr, row, HEADS * C, inner, mask)
    d_out = _gather(d_out_ptr, row, d_out_stride, inner, mask)
    node = row[:, None] * HEADS + heads[None, :]
    mask = inside[:, None] & head_mask[None, :]
    norm = tl.load(norm_ptr + node * 2, mask=mask, other=float("inf"))
    offset = tl.load(norm_ptr + node * 2 + 1, mask=mask, other=0.0)
    move0 = tl.load(displacement_ptr + node * 2, mask=mask, other=0.0)
    move1 = tl.load(displacement_ptr + node * 2 + 1, mask=mask, other=0.0)
    full = mask & (norm != float("inf"))
    d_move0 = tl.load(d_displacement_ptr + node * 2, mask=full, other=0.0)
    d_move1 = tl.load(d_displacement_ptr + node * 2 + 1, mask=full, other=0.0)
    d_lse = tl.load(d_lse_ptr + node, mask=full, other=0.0)
    delta = tl.sum(out * d_out, 2) + move0 * d_move0 + move1 * d_move1 - d_lse
    slot = info_ptr + row[:, None] * INFO + heads[None, :]
    tl.store(slot, norm, mask=mask)
    tl.store(slot + H, delta, mask=mask)
    tl.store(slot + 2 * H, d_move0, mask=mask)
    tl.store(slot + 3 * H, d_move1, mask=mask)
    tl.store(slot + 4 * H, offset, mask=mask)
    last = info_ptr + row * INFO + 5 * H
    tl.store(last, tl.load(x_dst_ptr + row * 2, mask=inside, other=0.0), mask=inside)
    tl.store(last + 1, tl.load(x_dst_ptr + row * 2 + 1, mask=inside, other=0.0), mask=inside)
    # The weights of a row sum to one, so the destination's own share needs no pass over edges.
    tl.store(d_x_dst_ptr + row * 2, -tl.sum(d_move0, 1), mask=inside)
    tl.store(d_x_dst_ptr + row * 2 + 1, -tl.sum(d_move1, 1), mask=inside)


@triton.jit
def _backward_dst_kernel(
    q_ptr, k_ptr, v_ptr, x_src_ptr, table_ptr, bias_ptr, d_out_ptr, info_ptr,
    d_q_ptr, d_bias_ptr,
    K, q_stride, k_stride, v_stride, d_out_stride, scale,
    HEADS: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, INFO: tl.constexpr, NEED_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, BLOCK)
    heads = tl.arange(0, H)
    head_mask = heads < HEADS
    inner = heads[:, None] * C + tl.arange(0, C)[None, :]
    q = tl.load(q_ptr + row * q_stride + inner, mask=head_mask[:, None], other=0.0)
    q = q.to(tl.float32) * (scale * _LOG2E)
    d_out = tl.load(d_out_ptr + row * d_out_stride + inner, mask=head_mask[:, None], other=0.0)
    d_out = d_out.to(tl.float32)
    info = info_ptr + row * INFO
    norm = tl.load(info + heads, mask=head_mask, other=float("inf"))
    delta = tl.load(info + H + heads, mask=head_mask, other=0.0)
    d_move0 = tl.load(info + 2 * H + heads, mask=head_mask, other=0.0)
    d_move1 = tl.load(info + 3 * H + heads, mask=head_mask, other=0.0)
    offset = tl.load(info + 4 * H + heads, mask=head_mask, other=0.0)
    x0 = tl.load(info + 5 * H)
    x1 = tl.load(info + 5 * H + 1)
    first = row * K
    d_q = tl.zeros([H, C], tl.float32)
    for start in range(0, K, BLOCK):
        slot = start + slots
        source = tl.load(table_ptr + first + slot, mask=slot < K, other=-1)
        valid = source >= 0
        mask = valid[:, None, None] & head_mask[None, :, None]
        key = _gather(k_ptr, source, k_stride, inner, mask)
        value = _gather(v_ptr, source, v_stride, inner, mask)
        y0 = tl.load(x_src_ptr + source.to(tl.int64) * 2, mask=valid, other=0.0) - x0
        y1 = tl.load(x_src_ptr + source.to(tl.int64) * 2 + 1, mask=valid, other=0.0) - x1
        logit = tl.sum(q[None, :, :] * key, 2)
        if BIAS > 0:
            bias = _load_bias(bias_ptr, first + slot, heads, valid, head_mask, HEADS, BIAS)
            logit += (bias - offset[None, :]) * _LOG2E
        logit = tl.where(valid[:, None] & head_mask[None, :], logit, float("-inf"))
        weight = tl.exp2(logit - norm[None, :])
        slope = tl.sum(d_out[None, :, :] * value, 2) - delta[None, :]
        slope += d_move0[None, :] * y0[:, None] + d_move1[None, :] * y1[:, None]
        slope *= weight
        d_q += tl.sum(slope[:, :, None] * key, 0)
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
    tl.store(
        d_q_ptr + row * HEADS * C + inner,
        (d_q * scale).to(d_q_ptr.dtype.element_ty),
        mask=head_mask[:, None],
    )


@triton.jit
def _backward_src_kernel(
    q_ptr, k_ptr, v_ptr, x_src_ptr, edge_ptr, bias_ptr, d_out_ptr, info_ptr, task_ptr,
    d_k_ptr, d_v_ptr, d_x_src_ptr, partial_ptr,
    K, q_stride, k_stride, v_stride, d_out_stride, scale,
    HEADS: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, INFO: tl.constexpr,
):  # fmt: skip
    task = task_ptr + tl.program_id(0).to(tl.int64) * 4
    source = tl.load(task).to(tl.int64)
    begin = tl.load(task + 1)
    end = tl.load(task + 2)
    partial = tl.load(task + 3).to(tl.int64)
    slots = tl.arange(0, BLOCK)
    heads = tl.arange(0, H)
    head_mask = heads < HEADS
    inner = heads[:, None] * C + tl.arange(0, C)[None, :]
    key = tl.load(k_ptr + source * k_stride + inner, mask=head_mask[:, None], other=0.0)
    key = key.to(tl.float32) * (scale * _LOG2E)
    value = tl.load(v_ptr + source * v_stride + inner, mask=head_mask[:, None], other=0.0)
    value = value.to(tl.float32)
    x0 = tl.load(x_src_ptr + source * 2)
    x1 = tl.load(x_src_ptr + source * 2 + 1)
    d_k = tl.zeros([H, C], tl.float32)
    d_v = tl.zeros([H, C], tl.float32)
    d_x0 = tl.zeros([H], tl.float32)
    d_x1 = tl.zeros([H], tl.float32)
    for start in range(begin, end, BLOCK):
        place = start + slots
        valid = place < end
        edge = tl.load(edge_ptr + place, mask=valid, other=0)
        row = edge // K
        mask = valid[:, None, None] & head_mask[None, :, None]
        q = _gather(q_ptr, row, q_stride, inner, mask)
        d_out = _gather(d_out_ptr, row, d_out_stride, inner, mask)
        info = info_ptr + row.to(tl.int64)[:, None] * INFO + heads[None, :]
        mask = valid[:, None] & head_mask[None, :]
        norm = tl.load(info, mask=mask, other=float("inf"))
        delta = tl.load(info + H, mask=mask, other=0.0)
        d_move0 = tl.load(info + 2 * H, mask=mask, other=0.0)
        d_move1 = tl.load(info + 3 * H, mask=mask, other=0.0)
        last = info_ptr + row.to(tl.int64) * INFO + 5 * H
        y0 = x0 - tl.load(last, mask=valid, other=0.0)
        y1 = x1 - tl.load(last + 1, mask=valid, other=0.0)
        logit = tl.sum(key[None, :, :] * q, 2)
        if BIAS > 0:
            offset = tl.load(info + 4 * H, mask=mask, other=0.0)
            edge = edge.to(tl.int64)
            bias = _load_bias(bias_ptr, edge, heads, valid, head_mask, HEADS, BIAS)
            logit += (bias - offset) * _LOG2E
        weight = tl.exp2(tl.where(mask, logit, float("-inf")) - norm)
        slope = tl.sum(value[None, :, :] * d_out, 2) - delta
        slope += d_move0 * y0[:, None] + d_move1 * y1[:, None]
        slope *= weight
        d_k += tl.sum(slope[:, :, None] * q, 0)
        d_v += tl.sum(weight[:, :, None] * d_out, 0)
        d_x0 += tl.sum(weight * d_move0, 0)
        d_x1 += tl.sum(weight * d_move1, 0)
    d_k = d_k * scale
    sum0 = tl.sum(d_x0, 0)
    sum1 = tl.sum(d_x1, 0)
    if partial < 0:
        own = source * HEADS * C + inner
        tl.store(d_k_ptr + own, d_k.to(d_k_ptr.dtype.element_ty), mask=head_mask[:, None])
        tl.store(d_v_ptr + own, d_v.to(d_v_ptr.dtype.element_ty), mask=head_mask[:, None])
        tl.store(d_x_src_ptr + source * 2, sum0)
        tl.store(d_x_src_ptr + source * 2 + 1, sum1)
    else:
        part = partial_ptr + partial * (2 * HEADS * C + 2)
        tl.store(part + inner, d_k, mask=head_mask[:, None])
        tl.store(part + HEADS * C + inner, d_v, mask=head_mask[:, None])
        tl.store(part + 2 * HEADS * C, sum0)
        tl.store(part + 2 * HEADS * C + 1, sum1)


@triton.jit
def _combine_kernel(
    partial_ptr, heavy_ptr, d_k_ptr, d_v_ptr, d_x_src_ptr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
