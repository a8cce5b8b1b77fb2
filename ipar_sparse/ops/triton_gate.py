r"""Fused edge gate on CUDA: intermediate results of an edge's MLP stay on the chip.

A program handles one node and the edges around it. With the embedding :math:`h_c` of that node and
:math:`h_o` of the node at the other end, the first layer is

.. math::
    z = A_c + \big(W_o + W_m \operatorname{diag}(h_c)\big) h_o + W_d |h_c - h_o|,

so that the products with :math:`h_o` and with :math:`h_c \odot h_o` are one. In the backward pass
one product :math:`\sum_e z'_e h_{o}^T` gives the gradients of both. The backward pass recomputes
the tile. Over destinations it gives one half of the embeddings' gradient and, in sums of each
program that a last reduction adds in order, the weights' gradients. Over the reverse lists, with
the two ends exchanged, it gives the other half.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..graph import NeighborTable
from ..graph.order import local_order
from .triton_attention import Reorder, SourcePlan, division, wrong_device
from .triton_gate_half import HalfGate, _combine_kernel, fits


def unsupported(h: Tensor, weights) -> str | None:
    """Why these inputs cannot run here, or None if they can."""
    hidden = (weights[0].size(0), weights[2].size(0))
    if wrong := wrong_device(h):
        return wrong
    if h.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"float32, bfloat16 or float16 embeddings (given {h.dtype})"
    if h.size(1) > 256:
        return f"embeddings of at most 256 values (given {h.size(1)})"
    if any(width not in (16, 32, 64, 128) for width in hidden):
        return f"hidden layers of 16, 32, 64 or 128 (given {hidden})"
    if weights[4].size(0) > 16:
        return f"at most 16 outputs (given {weights[4].size(0)})"
    return None


def edge_gate(h: Tensor, graph: NeighborTable, weights) -> Tensor:
    """See :func:`ipar_sparse.ops.edge_gate`; always (E, G), in the weights' dtype.

    The products run in the embeddings' dtype (autocast's, where that is on) with float32 sums.
    float32 products follow :func:`torch.set_float32_matmul_precision`: exact to float32's own
    rounding with ``"highest"``, torch's default, and TF32 otherwise.

    A graph that :func:`~ipar_sparse.graph.order.reorder` has been called on runs in its local
    order.

    Raises:
        ValueError: on dtypes or shapes that the kernels do not take.
    """
    if torch.is_autocast_enabled(h.device.type):
        h = h.to(torch.get_autocast_dtype(h.device.type))
    if reason := unsupported(h, weights):
        raise ValueError(f"the triton backend takes {reason}; use backend='chunked'")
    order = local_order(graph)
    if order is None:
        return graph.from_table(_EdgeGate.apply(h, graph, *weights))
    local, perm, inverse = order
    logits = _EdgeGate.apply(Reorder.apply(h, perm, inverse), local, *weights)
    return graph.from_table(Reorder.apply(logits, inverse, perm))


class _EdgeGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, graph, w0, b0, w1, b1, w2, b2):
        h = h.contiguous()
        exact = torch.get_float32_matmul_precision() == "highest"
        outputs = w2.size(0)
        logits = torch.empty(graph.num_nodes, graph.k, outputs, dtype=w0.dtype, device=h.device)
        half = fits(h, w0, w1)
        if logits.numel() and half:
            logits = HalfGate(graph, h, (w0, b0, w1, b1, w2, b2)).forward()
        elif logits.numel():
            parts = _Parts(h, w0, b0, w1, w2, exact=exact)
            wide = h.size(1) > 128 or max(w0.size(0), w1.size(0)) > 64
            tile = _tile(h.dtype, exact=exact, large=wide or graph.k <= 64)
            programs = min(graph.num_nodes, _multiprocessors(h.device) * (16 // tile["num_warps"]))
            _forward_kernel[(programs,)](
                h,
                parts.own(0),
                graph.index,
                parts.first,
                parts.second,
                b1,
                parts.last,
                b2,
                logits,
                graph.num_nodes,
                graph.k,
                programs,
                **parts.shape,
                **tile,
            )
        ctx.save_for_backward(h, w0, b0, w1, b1, w2)
        ctx.graph, ctx.exact, ctx.half = graph, exact, half and outputs == 1
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logits):
        h, w0, b0, w1, b1, w2 = ctx.saved_tensors
        graph: NeighborTable = ctx.graph
        need_h = ctx.needs_input_grad[0]
        if not d_logits.numel():
            return (
                torch.zeros_like(h),
                None,
                *map(torch.zeros_like, (w0, b0, w1, b1, w2)),
                w2.new_zeros(w2.size(0)),
            )
        d_b2 = d_logits.sum((0, 1))
        d_logits = d_logits.contiguous()
        scale = None
        if h.dtype == torch.float16:  # gradients of a mean over millions of edges would underflow
            scale = d_logits.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            d_logits = d_logits / scale
        if ctx.half:
            gate = HalfGate(graph, h, (w0, b0, w1, b1, w2))
            grads = gate.backward(d_logits, need_h=need_h)
        else:
            parts = _Parts(h, w0, b0, w1, w2, exact=ctx.exact)
            grads = parts.gradients(graph, (w0, b1), d_logits, need_h=need_h)
        if scale is not None:
            grads = [None if grad is None else grad * scale for grad in grads]
        d_h = None if grads[0] is None else grads[0].to(h.dtype)
        return d_h, None, *(grad.to(w0.dtype) for grad in grads[1:]), d_b2


class _Parts:
    """The weights as the kernels read them: input-major blocks in the products' dtype."""

    def __init__(self, h, w0, b0, w1, w2, *, exact):
        self.h, self.b0, self.exact = h, b0, exact
        d, m = h.size(1), w0.size(0)
        # own, other, gap, product: each (d, m)
        self.first = w0.view(m, 4, d).permute(1, 2, 0).to(h.dtype).contiguous()
        self.second = w1.T.to(h.dtype).contiguous()
        self.last = w2.contiguous()
        self.shape = {
            "D": d,
            "DP": max(triton.next_power_of_2(d), 16),
            "M": m,
            "M2": w1.size(0),
            "G": w2.size(0),
        }

    def own(self, block: int) -> Tensor:
        """The centre's own product and the bias (n, m): of destinations (0) or sources (1)."""
        return torch.addmm(self.b0.to(self.h.dtype), self.h, self.first[block])

    def gradients(self, graph, weights, d_logits, *, need_h: bool) -> list[Tensor | None]:
        """Gradients of h, or None if it needs none, and of the weights without b2; float32."""
        (w0, b1), h = weights, self.h
        d, m, m2, outputs = h.size(1), self.shape["M"], self.shape["M2"], self.shape["G"]
        by_dst, sums = self.backward(graph, b1, d_logits, by_source=False, need_h=need_h)
        d_other, d_product, d_gap, d_w1, d_b1, d_w2 = sums.split(
            [d * m, d * m, d * m, m * m2, m2, outputs * m2]
        )
        d_own = by_dst[:, :m]
        d_w0 = torch.empty(m, 4 * d, dtype=torch.float32, device=h.device)
        d_w0[:, :d] = d_own.to(h.dtype).T @ h
        for block, part in enumerate((d_other, d_gap, d_product), start=1):
            d_w0[:, block * d : (block + 1) * d] = part.view(d, m).T
        d_h = None
        if need_h:
            by_src, _ = self.backward(graph, b1, d_logits, by_source=True, need_h=True)
            d_h = by_dst[:, m:] + by_src[:, m:]
            d_h.addmm_(d_own, w0[:, :d].float()).addmm_(by_src[:, :m], w0[:, d : 2 * d].float())
        return [d_h, d_w0, d_own.sum(0), d_w1.view(m, m2).T, d_b1, d_w2.view(outputs, m2)]

    def backward(self, graph, b1, d_logits, *, by_source: bool, need_h: bool):
        """Gradients of the centres, (n, m) or (n, m + d), and the flat sums for the weights."""
        h, device = self.h, self.h.device
        n, d = h.shape
        m, m2, outputs = self.shape["M"], self.shape["M2"], self.shape["G"]
        width = m + d if need_h else m
        # sources that are no destinations have no gradient as such
        make = torch.zeros if graph.num_nodes < n and not by_source else torch.empty
        centre = make(n, width, dtype=torch.float32, device=device)
        tile = _tile(h.dtype, backward=True, exact=self.exact, large=need_h or d > 128)
        plan = SourcePlan.of(graph) if by_source else None
        tasks = graph.num_nodes if plan is None else plan.num_tasks
        programs = min(tasks, _multiprocessors(device) * (8 // tile["num_warps"]))
        total = 0 if by_source else 3 * d * m + m * m2 + m2 + outputs * m2
        sums = torch.empty(programs, total, dtype=torch.float32, device=device)
        partial = torch.empty(
            0 if plan is None else plan.num_partials, width, dtype=torch.float32, device=device
        )
        _backward_kernel[(programs,)](
            h,
            self.own(int(by_source)),
            graph.index if plan is None else plan.edge,
            None if plan is None else plan.task,
            self.first,
            self.second,
            b1,
            self.last,
            d_logits,
            centre,
            partial,
            sums,
            tasks,
            graph.k,
            *division(max(graph.k, 1)),
            programs,
            total,
            **self.shape,
            **tile,
            WIDTH=width,
            BY_SOURCE=by_source,
            NEED_H=need_h,
        )
        if plan is not None and plan.num_heavy:
            _combine_kernel[(plan.num_heavy,)](
                partial, plan.heavy, centre, WIDTH=width, BLOCK=triton.next_power_of_2(width)
            )
        return centre, sums.sum(0)


def _tile(dtype: torch.dtype, *, exact: bool, backward: bool = False, large: bool = False) -> dict:
    """Edges a tile, the precision of its products, warps and stages of a program.

    Small tiles in the backward pass leave registers for the weights' gradients. Exact float32
    products split their operands in two for TF32 cores. In ``large`` backward passes the split
    operands exceed shared memory, and plain cores are used. The forward pass with TF32 is fastest
    with all edges of a node in one tile, unless that is ``large`` or mostly padding.
    """
    if dtype == torch.float32:
        if not (backward or large):
            block, precision = (32, "ieee") if exact else (128, "tf32")
            return {"BLOCK": block, "PRECISION": precision, "num_warps": 8, "num_stages": 1}
        precision = "tf32" if not exact else "ieee" if large and backward else "tf32x3"
        return {"BLOCK": 16, "PRECISION": precision, "num_warps": 8, "num_stages": 1}
    if backward:
        return {"BLOCK": 32, "PRECISION": "ieee", "num_warps": 8, "num_stages": 2}
    return {"BLOCK": 64, "PRECISION": "ieee", "num_warps": 4}


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _hidden(centre, other, own, gap_w, mixed_w, second_w, second_b, PRECISION: tl.constexpr):
    """Both layers of a tile of edges: |h_c - h_o|, z_1 and z_2."""
    gap = tl.abs(centre[None, :] - other.to(tl.float32)).to(other.dtype)
    low = tl.dot(other, mixed_w, input_precision=PRECISION)
    low = tl.dot(gap, gap_w, acc=low, input_precision=PRECISION) + own[None, :]
    active = tl.maximum(low, 0.0).to(other.dtype)
    high = tl.dot(active, second_w, input_precision=PRECISION) + second_b[None, :]
    return gap, low, active, high


@triton.jit(do_not_specialize=["N", "K", "programs"])
def _forward_kernel(
    h_ptr,
    own_ptr,
    table_ptr,
    first_ptr,
    second_ptr,
    b1_ptr,
    w2_ptr,
    b2_ptr,
    logits_ptr,
    N,
    K,
    programs,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    M2: tl.constexpr,
    G: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    inner = tl.arange(0, DP)
    inner_mask = inner < D
    cols = tl.arange(0, M)
    cols2 = tl.arange(0, M2)
    slots = tl.arange(0, BLOCK)
    block = inner[:, None] * M + cols[None, :]
    mask = inner_mask[:, None]
    other_w = tl.load(first_ptr + D * M + block, mask=mask, other=0.0)
    gap_w = tl.load(first_ptr + 2 * D * M + block, mask=mask, other=0.0)
    product_w = tl.load(first_ptr + 3 * D * M + block, mask=mask, other=0.0)
    second_w = tl.load(second_ptr + cols[:, None] * M2 + cols2[None, :])
    b1 = tl.load(b1_ptr + cols2).to(tl.float32)
    for row in range(tl.program_id(0), N, programs):
        row64 = tl.full([], 0, tl.int64) + row
        centre = tl.load(h_ptr + row64 * D + inner, mask=inner_mask, other=0.0).to(tl.float32)
        own = tl.load(own_ptr + row64 * M + cols).to(tl.float32)
        mixed = other_w.to(tl.float32) + product_w.to(tl.float32) * centre[:, None]
        mixed = mixed.to(other_w.dtype)
        for start in range(0, K, BLOCK):
            slot = start + slots
            source = tl.load(table_ptr + row64 * K + slot, mask=slot < K, other=-1).to(tl.int64)
            other = tl.load(
                h_ptr + source[:, None] * D + inner[None, :],
                mask=(source >= 0)[:, None] & inner_mask[None, :],
                other=0.0,
            )
            _, _, _, high = _hidden(centre, other, own, gap_w, mixed, second_w, b1, PRECISION)
            high = tl.maximum(high, 0.0)
            at = logits_ptr + (row64 * K + slot) * G
            for g in tl.static_range(G):
                w2 = tl.load(w2_ptr + g * M2 + cols2).to(tl.float32)
                logit = tl.sum(high * w2[None, :], 1) + tl.load(b2_ptr + g).to(tl.float32)
                tl.store(at + g, logit.to(logits_ptr.dtype.element_ty), mask=slot < K)


@triton.jit(do_not_specialize=["tasks", "K", "multiplier", "shift", "programs", "total"])
def _backward_kernel(
    h_ptr,
    own_ptr,
    list_ptr,
    task_ptr,
    first_ptr,
    second_ptr,
    b1_ptr,
    w2_ptr,
    d_logits_ptr,
    centre_ptr,
    partial_ptr,
    sums_ptr,
    tasks,
    K,
    multiplier,
    shift,
    programs,
    total,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    M2: tl.constexpr,
    G: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_SOURCE: tl.constexpr,
    NEED_H: tl.constexpr,
):
    OTHER: tl.constexpr = 0 if BY_SOURCE else 1
    GP: tl.constexpr = 1 if G == 1 else 16
    outputs = tl.arange(0, GP)[:, None]
    inner = tl.arange(0, DP)
    inner_mask = inner < D
    cols = tl.arange(0, M)
    cols2 = tl.arange(0, M2)
    slots = tl.arange(0, BLOCK)
    block = inner[:, None] * M + cols[None, :]
    mask = inner_mask[:, None]
    gap_w = tl.load(first_ptr + 2 * D * M + block, mask=mask, other=0.0)
    second_w = tl.load(second_ptr + cols[:, None] * M2 + cols2[None, :])
    b1 = tl.load(b1_ptr + cols2).to(tl.float32)
    if not BY_SOURCE:
        d_other = tl.zeros([DP, M], tl.float32)
        d_product = tl.zeros([DP, M], tl.float32)
        d_gap_w = tl.zeros([DP, M], tl.float32)
        d_second = tl.zeros([M, M2], tl.float32)
        # Summed per row of the tile, over the rows only once at the end.
        d_b1 = tl.zeros([BLOCK, M2], tl.float32)
        d_w2 = tl.zeros([BLOCK, M2], tl.float32)
        d_w2_more = tl.zeros([GP, M2], tl.float32)
    for task in range(tl.program_id(0), tasks, programs):
        if BY_SOURCE:
            entry = task_ptr + (tl.full([], 0, tl.int64) + task) * 4
            node = tl.load(entry).to(tl.int64)
            begin = tl.load(entry + 1)
            end = tl.load(entry + 2)
            part = tl.load(entry + 3).to(tl.int64)
        else:
            node = tl.full([], 0, tl.int64) + task
            begin = 0
            end = K
        centre = tl.load(h_ptr + node * D + inner, mask=inner_mask, other=0.0).to(tl.float32)
        own = tl.load(own_ptr + node * M + cols).to(tl.float32)
        # Read again for every node, to save registers.
        other_w = tl.load(first_ptr + OTHER * D * M + block, mask=mask, other=0.0)
        product_w = tl.load(first_ptr + 3 * D * M + block, mask=mask, other=0.0)
        mixed = other_w.to(tl.float32) + product_w.to(tl.float32) * centre[:, None]
        mixed = mixed.to(other_w.dtype)
        d_own = tl.zeros([BLOCK, M], tl.float32)
        d_mixed = tl.zeros([DP, M], tl.float32)
        d_centre = tl.zeros([DP], tl.float32)
        for start in range(begin, end, BLOCK):
            place = start + slots
            valid = place < end
            if BY_SOURCE:
                edge = tl.load(list_ptr + place, mask=valid, other=0)
                neighbor = tl.umulhi(edge.to(tl.uint32) * 2, multiplier.to(tl.uint32)) >> shift
                neighbor = neighbor.to(tl.int64)
                edge = edge.to(tl.int64)
            else:
                edge = node * K + place
                neighbor = tl.load(list_ptr + edge, mask=valid, other=-1).to(tl.int64)
                valid = neighbor >= 0
            other = tl.load(
                h_ptr + neighbor[:, None] * D + inner[None, :],
                mask=valid[:, None] & inner_mask[None, :],
                other=0.0,
            )
            gap, low, active, high = _hidden(
                centre, other, own, gap_w, mixed, second_w, b1, PRECISION
            )
            d_high = tl.zeros([BLOCK, M2], tl.float32)
            for g in tl.static_range(G):
                w2 = tl.load(w2_ptr + g * M2 + cols2).to(tl.float32)
                d_logit = tl.load(d_logits_ptr + edge * G + g, mask=valid, other=0.0)
                d_logit = d_logit.to(tl.float32)
                d_high += d_logit[:, None] * w2[None, :]
                if not BY_SOURCE:
                    share = d_logit[:, None] * tl.maximum(high, 0.0)
                    if G == 1:
                        d_w2 += share
                    else:
                        share = tl.sum(share, 0)
                        d_w2_more += tl.where(outputs == g, share[None, :], 0.0)
            d_high = tl.where(high > 0.0, d_high, 0.0)
            d_high_low = d_high.to(other.dtype)
            d_low = tl.dot(d_high_low, tl.trans(second_w), input_precision=PRECISION)
            d_low = tl.where(low > 0.0, d_low, 0.0)
            d_own += d_low
            d_low = d_low.to(other.dtype)
            if NEED_H or not BY_SOURCE:
                d_mixed = tl.dot(tl.trans(other), d_low, acc=d_mixed, input_precision=PRECISION)
            if not BY_SOURCE:
                d_b1 += d_high
                d_second = tl.dot(
                    tl.trans(active), d_high_low, acc=d_second, input_precision=PRECISION
                )
                d_gap_w = tl.dot(tl.trans(gap), d_low, acc=d_gap_w, input_precision=PRECISION)
            if NEED_H:
                d_gap = tl.dot(d_low, tl.trans(gap_w), input_precision=PRECISION)
                away = centre[None, :] - other.to(tl.float32)
                d_gap = tl.where(away > 0.0, d_gap, tl.where(away < 0.0, -d_gap, 0.0))
                d_centre += tl.sum(d_gap, 0)
        if NEED_H:
            product_w = tl.load(first_ptr + 3 * D * M + block, mask=mask, other=0.0)
            d_centre += tl.sum(d_mixed * product_w.to(tl.float32), 1)
        if not BY_SOURCE:
            d_other += d_mixed
            d_product += d_mixed * centre[:, None]
        to = centre_ptr + node * WIDTH
        if BY_SOURCE:
            to = tl.where(part < 0, to, partial_ptr + part * WIDTH)
        tl.store(to + cols, tl.sum(d_own, 0))
        if NEED_H:
            tl.store(to + M + inner, d_centre, mask=inner_mask)
    if not BY_SOURCE:
        sums = sums_ptr + tl.program_id(0).to(tl.int64) * total
        tl.store(sums + block, d_other, mask=mask)
        tl.store(sums + D * M + block, d_product, mask=mask)
        tl.store(sums + 2 * D * M + block, d_gap_w, mask=mask)
        sums += 3 * D * M
        tl.store(sums + cols[:, None] * M2 + cols2[None, :], d_second)
        sums += M * M2
        tl.store(sums + cols2, tl.sum(d_b1, 0))
        sums += M2
        if G == 1:
            tl.store(sums + cols2, tl.sum(d_w2, 0))
        else:
            tl.store(sums + outputs * M2 + cols2[None, :], d_w2_more, mask=outputs < G)
