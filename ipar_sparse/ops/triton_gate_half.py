r"""The edge gate's kernels in half precision: every product on tensor cores, rows fetched ahead.

A program takes tile after tile in one loop, so that a tile's rows are fetched while those before it
are worked on. Two programs share a multiprocessor: one multiplies while the other does the rest.

The backward pass runs in two kernels over pieces of a node's edges. The first makes the gradient
:math:`z'` of the first layer's sums and leaves it in a buffer of bounded size; the second turns it
into products :math:`\sum_e z'_e x_e^T` with what entered that layer. With one output of gradient
:math:`g_e`, what lies behind needs two sums. Let a be the hidden units, :math:`u = V a + b` the
second layer and :math:`s_e = g_e 1[u_e > 0]`. With :math:`P = \sum_e s_e a_e^T` and
:math:`q = \sum_e s_e` the gradients are :math:`\operatorname{diag}(w) P` for V, :math:`w \odot q`
for b, and :math:`\sum_i V_{ji} P_{ji} + b_j q_j` for the last layer's w.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..graph import NeighborTable
from .triton_attention import SourcePlan, division

_BUFFER = 1 << 28
"""Most values of z' that are kept at once (512 MiB)."""
_STEP = "{{ .reg .b32 z; mov.b32 z, 0; set.gt.{0}x2.{0}x2 $0, $1, z; }}"
_SIGN = """{{
    .reg .b32 z, sign; mov.b32 z, 0; and.b32 sign, $1, 0x80008000;
    set.ne.{0}x2.{0}x2 $0, $1, z; or.b32 $0, $0, sign;
}}"""
"""Two halves an instruction, where Triton's comparisons and selections take four for each."""
_HOLD = "mov.b32 $0, $1;"
"""Nothing; but a product takes what went through it from registers, which spares shared memory."""


def fits(h: Tensor, w0: Tensor, w1: Tensor) -> bool:
    """Whether these kernels take the shapes and dtypes."""
    narrow = w0.size(0) <= 64 and w1.size(0) <= 64
    return h.dtype != torch.float32 and h.size(1) in (32, 64, 128) and narrow


@dataclass
class HalfGate:
    """A gate's inputs as the kernels read them, for one graph.

    Args:
        graph: its edges.
        h: embeddings (n, d), contiguous, float16 or bfloat16.
        weights: ``w0, b0, w1, b1, w2`` of the three layers; forward b2 too.
    """

    graph: NeighborTable
    h: Tensor
    weights: tuple[Tensor, ...]

    def __post_init__(self):
        w0, b0, w1, b1 = self.weights[:4]
        d, m = self.h.size(1), w0.size(0)
        low = self.h.dtype
        # own, other, gap, product: each (m, d)
        self.first = w0.view(m, 4, d).transpose(0, 1).to(low).contiguous()
        self.second = w1.to(low).contiguous()
        self.bias = b0.to(low)
        # The second layer's bias as halves whose sum is exact, to be added by a product.
        self.biases = torch.zeros(16, w1.size(0), dtype=low, device=w0.device)
        for row in self.biases[:3]:
            row.copy_(b1 - self.biases.float().sum(0))
        self.shape = {"D": d, "M": m, "M2": w1.size(0)}
        # Edges of a node that go together, and how many such pieces a row of the table has.
        self.piece = 128 if self.graph.k > 64 else 64
        self.pieces = triton.cdiv(self.graph.k, self.piece)
        self.kept: Tensor | None = None
        half = "bf16" if low == torch.bfloat16 else "f16"
        # Neither Triton's interpreter nor chips before Hopper take the assembly.
        plain = not _chip(self.h.device)["hopper"]
        self.step, self.sign, self.hold = (
            "" if plain else code.format(half) for code in (_STEP, _SIGN, _HOLD)
        )

    def own(self, block: int) -> Tensor:
        """The centre's own product and the bias (n, m): of destinations (0) or sources (1)."""
        return torch.addmm(self.bias, self.h, self.first[block].T)

    def forward(self) -> Tensor:
        """Logits (n, k, outputs), in the weights' dtype."""
        graph, (w0, _, _, _, w2, b2) = self.graph, self.weights
        logits = torch.empty(
            graph.num_nodes, graph.k, w2.size(0), dtype=w0.dtype, device=self.h.device
        )
        tile, programs = _tile("forward", self.h.device)
        tile["BLOCK"] = min(tile["BLOCK"], self.piece)
        tiles = graph.num_nodes * triton.cdiv(graph.k, tile["BLOCK"])
        programs = min(tiles, programs)
        _forward_kernel[(programs,)](
            self.h,
            self.own(0),
            graph.index,
            self.first,
            self.second,
            self.biases,
            w2.contiguous(),
            b2,
            logits,
            tiles,
            graph.k,
            programs,
            **self.shape,
            G=w2.size(0),
            PIECES=triton.cdiv(graph.k, tile["BLOCK"]),
            HOLD=self.hold,
            **tile,
        )
        return logits

    def backward(self, d_logits: Tensor, *, need_h: bool) -> list[Tensor | None]:
        """Gradients of h, or None if it needs none, and of the weights without b2; float32.

        Args:
            d_logits: gradient of the logits (n, k, 1), contiguous.
            need_h: whether the embeddings learn.
        """
        w0, _, _, b1, w2 = (weight.float() for weight in self.weights)
        d, m, h = self.h.size(1), w0.size(0), self.h
        by_dst, outer, behind = self._passes(d_logits, by_source=False, need_h=need_h)
        n, d_own, d_h = by_dst.size(0), by_dst[:, :m], None
        d_gap, d_product, *d_other = outer
        if need_h:
            by_src, _, _ = self._passes(d_logits, by_source=True, need_h=True)
            d_other = [by_src[:, :m].to(h.dtype).T @ h]
            d_h = by_src[:, m:].addmm(by_src[:, :m], w0[:, d : 2 * d])
            d_h[:n].add_(by_dst[:, m:]).addmm_(d_own, w0[:, :d])
        d_w0 = torch.cat([d_own.to(h.dtype).T @ h[:n], *d_other, d_gap, d_product], 1)
        sums, total = behind[:, :-16], behind[:, -16]
        d_w2 = (self.second.float() * sums).sum(1) + b1 * total
        last = w2[0]
        return [d_h, d_w0, d_own.sum(0), last[:, None] * sums, last * total, d_w2[None]]

    def _passes(self, d_logits: Tensor, *, by_source: bool, need_h: bool):
        """Sums of z' and the gradients of the centres, (n, m) or (n, m + d), and over all edges.

        Over all edges: z' times the gap, the product and, where the embeddings are frozen, the
        other end, each (m, d); P and q side by side, (m2, m + 16).
        """
        graph, h, piece = self.graph, self.h, self.piece
        d, m, m2 = self.shape.values()
        width = m + d if need_h else m
        plan = SourcePlan.of(graph, piece) if by_source else None
        count = graph.num_nodes * self.pieces if plan is None else plan.num_tasks
        rows = count if plan is None else graph.num_src_nodes
        centre = torch.empty(rows, width, dtype=torch.float32, device=h.device)
        partial = centre.new_empty(0 if plan is None else plan.num_partials, width)
        side = "source " if by_source else ""
        (layers, first), (sums, second) = (
            _tile(side + name, h.device) for name in ("layers", "sums")
        )
        layers["BLOCK"], sums["DB"] = min(layers["BLOCK"], piece), min(sums["DB"], d)
        cut, parts = piece // layers["BLOCK"], d // sums["DB"]
        # Whole rows of the table go into the buffer, compactly; sources' pieces of any length.
        step, each = (piece, 1) if by_source else (graph.k, self.pieces)
        step = min(count, max(_BUFFER // (step * m), 1) * each)
        kept = by_source and self.kept is not None
        low = self.kept
        if low is None:
            size = step * piece if by_source else step // each * graph.k
            low = torch.empty(size, m, dtype=h.dtype, device=h.device)
        if kept:
            step = count
            sums["STAGES"] += 2  # z' is found by the list, one load later than what lies in order
        elif need_h and step == count:
            self.kept = low
        first, second = min(step * cut, first), max(min(step, second // parts), 1)
        behind = centre.new_zeros(0 if by_source else first, m2, m + 16)
        outer = centre.new_zeros(0 if by_source else second, 2 if need_h else 3, m, d)
        _, _, w1, _, w2 = self.weights
        back, own = (w2.T * w1).to(h.dtype), self.own(int(by_source))
        edges, task = (graph.index, None) if plan is None else (plan.edge, plan.task)
        fixed = {"PIECE": piece, "PIECES": self.pieces, "BY_SOURCE": by_source, "D": d, "M": m}
        quotient = division(graph.k)
        for base in range(0, count, step):
            tiles = min(step, count - base)
            if not kept:
                _layers_kernel[(first,)](
                    h,
                    own,
                    edges,
                    task,
                    self.first,
                    self.second,
                    self.biases,
                    back,
                    d_logits,
                    low,
                    behind,
                    base,
                    tiles * cut,
                    graph.k,
                    *quotient,
                    first,
                    M2=m2,
                    STEP=self.step,
                    HOLD=self.hold,
                    **fixed,
                    **layers,
                )
            _sums_kernel[(second * parts,)](
                h,
                edges,
                task,
                self.first,
                low,
                centre,
                partial,
                outer,
                base,
                tiles,
                graph.k,
                *quotient,
                second,
                KEPT=kept,
                NEED_H=need_h,
                SIGN=self.sign,
                **fixed,
                **sums,
            )
        if plan is not None and plan.num_heavy:
            _combine_kernel[(plan.num_heavy,)](
                partial, plan.heavy, centre, WIDTH=width, BLOCK=triton.next_power_of_2(width)
            )
        if plan is None and self.pieces > 1:
            centre = centre.view(graph.num_nodes, self.pieces, width).sum(1)
        return centre, outer.sum(0).unbind(0), behind.sum(0)


_TILES = {
    "forward": {"BLOCK": 64, "STAGES": 5, "num_warps": 4, "share": 2},
    "layers": {"BLOCK": 64, "STAGES": 3, "num_warps": 4, "share": 2},
    "source layers": {"BLOCK": 64, "STAGES": 7, "num_warps": 4, "share": 2},
    "sums": {"DB": 64, "STAGES": 5, "num_warps": 4, "share": 2},
    "source sums": {"DB": 64, "STAGES": 5, "num_warps": 4, "share": 2},
}
"""Edges a tile, stages of its pipeline, warps, and programs that share a multiprocessor; of sums,
columns of the inputs a program."""


def _tile(kernel: str, device: torch.device) -> tuple[dict, int]:
    """Launch options, and the most programs that run at once."""
    tile, chip = dict(_TILES[kernel]), _chip(device)
    if chip["small"]:
        tile["STAGES"] = 3  # rows of one tile instead of two
    return tile, tile.pop("share") * chip["multiprocessors"]


@functools.cache
def _chip(device: torch.device) -> dict:
    """What tiles depend on; without a GPU, in Triton's interpreter, too."""
    if device.type != "cuda":
        return {"multiprocessors": 1, "small": False, "hopper": False}
    chip = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return {
        "multiprocessors": chip["multiprocessor_count"],
        "small": chip["max_shared_mem"] < 160 << 10,
        "hopper": torch.cuda.get_device_capability(device) >= (9, 0),
    }


@triton.jit
def _ends(
    list_ptr,
    task_ptr,
    piece,
    offset,
    slots,
    K,
    multiplier,
    shift,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    BY_SOURCE: tl.constexpr,
):
    """A piece's node, and of its edges: positions, the nodes at the other end, which are there.

    What is not there repeats an edge; padding, whose logit has no gradient, the node itself.
    """
    if BY_SOURCE:
        entry = task_ptr + piece * 4
        node = tl.load(entry)
        place = tl.load(entry + 1) + offset + slots
        end = tl.load(entry + 2)
        edge = tl.load(list_ptr + tl.maximum(tl.minimum(place, end - 1), 0))
        other = (tl.umulhi(edge.to(tl.uint32) * 2, multiplier.to(tl.uint32)) >> shift).to(tl.int32)
        real = place < end
    else:
        node = piece // PIECES
        place = piece % PIECES * PIECE + offset + slots
        edge = tl.full([], 0, tl.int64) + node
        edge = edge * K + tl.minimum(place, K - 1)
        other = tl.load(list_ptr + edge)
        real = place < K
        other = tl.where(other < 0, node, other)
    return tl.full([], 0, tl.int64) + node, place, edge, other.to(tl.int64), real


@triton.jit
def _hold(x, CODE: tl.constexpr):
    if CODE == "":
        return x
    return tl.inline_asm_elementwise(CODE, "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)


@triton.jit
def _step(x, CODE: tl.constexpr):
    """1 where a half is positive, else 0; without assembly in Triton's interpreter."""
    if CODE == "":
        return tl.where(x > 0.0, 1.0, 0.0).to(x.dtype)
    return tl.inline_asm_elementwise(CODE, "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)


@triton.jit
def _sign(x, CODE: tl.constexpr):
    """-1, 0 or 1."""
    if CODE == "":
        return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0)).to(x.dtype)
    return tl.inline_asm_elementwise(CODE, "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)


@triton.jit
def _weights(first_ptr, start, OTHER: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    """The first layer's weights of half of the columns: for other ends, gaps and products."""
    at = first_ptr + start + tl.arange(0, M)[:, None] * D + tl.arange(0, D // 2)[None, :]
    return tl.load(at + OTHER * D * M), tl.load(at + 2 * D * M), tl.load(at + 3 * D * M)


@triton.jit
def _first_layer(low, other, centre, weights, HOLD: tl.constexpr):
    """Adds half of the columns of rows (edges, D / 2) to the first layer's sums (edges, M).

    By halves, because gaps wait for their product in registers.
    """
    other_w, gap_w, product_w = weights
    mixed = tl.fma(product_w, tl.broadcast_to(centre[None, :], product_w.shape), other_w)
    low = tl.dot(_hold(other, HOLD), tl.trans(mixed), acc=low)
    return tl.dot(tl.abs(centre[None, :] - other), tl.trans(gap_w), acc=low)


@triton.jit(do_not_specialize=["tiles", "K", "programs"])
def _forward_kernel(
    h_ptr,
    own_ptr,
    table_ptr,
    first_ptr,
    second_ptr,
    bias_ptr,
    w2_ptr,
    b2_ptr,
    logits_ptr,
    tiles,
    K,
    programs,
    D: tl.constexpr,
    M: tl.constexpr,
    M2: tl.constexpr,
    G: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    HOLD: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    inner = tl.arange(0, HALF)
    cols = tl.arange(0, M)
    cols2 = tl.arange(0, M2)
    left_w = _weights(first_ptr, 0, 1, D, M)
    right_w = _weights(first_ptr, HALF, 1, D, M)
    second_w = tl.load(second_ptr + cols2[:, None] * M + cols[None, :])
    tens = tl.arange(0, 16)[:, None]
    ones = tl.full([BLOCK, 16], 1.0, h_ptr.dtype.element_ty)
    bias = tl.load(bias_ptr + tens * M2 + cols2[None, :])
    last_w, last_b = tl.load(w2_ptr + cols2), tl.load(b2_ptr)
    for tile in tl.range(tl.program_id(0), tiles, programs, num_stages=STAGES):
        node = tile // PIECES
        slot = tile % PIECES * BLOCK + tl.arange(0, BLOCK)
        row = tl.full([], 0, tl.int64) + node
        source = tl.load(table_ptr + row * K + tl.minimum(slot, K - 1))
        source = tl.where(source < 0, node, source).to(tl.int64)
        there = h_ptr + source[:, None] * D + inner[None, :]
        left, right = tl.load(there), tl.load(there + HALF)
        here = h_ptr + row * D + inner
        own = own_ptr + (row + tens) * M + cols[None, :]
        own = tl.load(own, mask=tens == 0, other=0.0)
        low = tl.dot(ones, own)
        low = _first_layer(low, left, tl.load(here), left_w, HOLD)
        low = _first_layer(low, right, tl.load(here + HALF), right_w, HOLD)
        active = tl.maximum(low, 0.0).to(left.dtype)
        high = tl.maximum(tl.dot(active, tl.trans(second_w), acc=tl.dot(ones, bias)), 0.0)
        at = logits_ptr + (row * K + slot) * G
        for g in tl.static_range(G):
            w2, b2 = last_w, last_b
            if g > 0:
                w2, b2 = tl.load(w2_ptr + g * M2 + cols2), tl.load(b2_ptr + g)
            logit = tl.sum(high * w2.to(tl.float32)[None, :], 1) + b2.to(tl.float32)
            tl.store(at + g, logit.to(logits_ptr.dtype.element_ty), mask=slot < K)


@triton.jit(do_not_specialize=["base", "tiles", "K", "multiplier", "shift", "programs"])
def _layers_kernel(
    h_ptr,
    own_ptr,
    list_ptr,
    task_ptr,
    first_ptr,
    second_ptr,
    bias_ptr,
    back_ptr,
    d_logits_ptr,
    low_ptr,
    behind_ptr,
    base,
    tiles,
    K,
    multiplier,
    shift,
    programs,
    D: tl.constexpr,
    M: tl.constexpr,
    M2: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    BY_SOURCE: tl.constexpr,
    STEP: tl.constexpr,
    HOLD: tl.constexpr,
):
    """z' of each edge, and over all edges P and q."""
    OTHER: tl.constexpr = 0 if BY_SOURCE else 1
    SUB: tl.constexpr = PIECE // BLOCK
    HALF: tl.constexpr = D // 2
    inner = tl.arange(0, HALF)
    cols = tl.arange(0, M)
    cols2 = tl.arange(0, M2)
    slots = tl.arange(0, BLOCK)
    left_w = _weights(first_ptr, 0, OTHER, D, M)
    right_w = _weights(first_ptr, HALF, OTHER, D, M)
    second = cols2[:, None] * M + cols[None, :]
    second_w = tl.load(second_ptr + second)
    tens = tl.arange(0, 16)[:, None]
    ones = tl.full([BLOCK, 16], 1.0, h_ptr.dtype.element_ty)
    bias = tl.load(bias_ptr + tens * M2 + cols2[None, :])
    back_w = tl.load(back_ptr + second)
    if not BY_SOURCE:
        behind = behind_ptr + tl.program_id(0) * (M2 * (M + 16)) + cols2[:, None] * (M + 16)
        behind_q = behind + M + tl.arange(0, 16)[None, :]
        behind += cols[None, :]
        d_second = tl.load(behind)
        d_b1 = tl.load(behind_q)
    for tile in tl.range(tl.program_id(0), tiles, programs, num_stages=STAGES):
        piece, offset = base + tile // SUB, tile % SUB * BLOCK
        node, place, edge, neighbor, real = _ends(
            list_ptr,
            task_ptr,
            piece,
            offset,
            slots,
            K,
            multiplier,
            shift,
            PIECE,
            PIECES,
            BY_SOURCE,
        )
        there = h_ptr + neighbor[:, None] * D + inner[None, :]
        left, right = tl.load(there), tl.load(there + HALF)
        here = h_ptr + node * D + inner
        own = own_ptr + (node + tens) * M + cols[None, :]
        own = tl.load(own, mask=tens == 0, other=0.0)
        d_logit = tl.where(real, tl.load(d_logits_ptr + edge), 0.0)
        low = tl.dot(ones, own)
        low = _first_layer(low, left, tl.load(here), left_w, HOLD)
        low = _first_layer(low, right, tl.load(here + HALF), right_w, HOLD)
        active = tl.maximum(low, 0.0).to(left.dtype)
        high = tl.dot(active, tl.trans(second_w), acc=tl.dot(ones, bias))
        s = _step(high.to(left.dtype), STEP) * d_logit.to(left.dtype)[:, None]
        if not BY_SOURCE:
            d_second = tl.dot(tl.trans(s), active, acc=d_second)
            # Added apart: sums of a product in flight would make all products wait.
            d_b1 += tl.dot(tl.trans(s), ones)
        d_low = tl.dot(s, back_w).to(left.dtype) * _step(active, STEP)
        if BY_SOURCE:
            at = tile * BLOCK + slots
        else:
            at = (piece // PIECES - base // PIECES) * K + place
        at = low_ptr + at.to(tl.int64)[:, None] * M + cols[None, :]
        tl.store(at, d_low, mask=real[:, None])
    if not BY_SOURCE:
        tl.store(behind, d_second)
        tl.store(behind_q, d_b1)


@triton.jit(do_not_specialize=["base", "tiles", "K", "multiplier", "shift", "programs"])
def _sums_kernel(
    h_ptr,
    list_ptr,
    task_ptr,
    first_ptr,
    low_ptr,
    centre_ptr,
    partial_ptr,
    outer_ptr,
    base,
    tiles,
    K,
    multiplier,
    shift,
    programs,
    D: tl.constexpr,
    M: tl.constexpr,
    DB: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    STAGES: tl.constexpr,
    BY_SOURCE: tl.constexpr,
    KEPT: tl.constexpr,
    NEED_H: tl.constexpr,
    SIGN: tl.constexpr,
):
    """Products of z' with DB columns of the first layer's inputs, by centre and over all edges."""
    WIDTH: tl.constexpr = M + D if NEED_H else M
    TERMS: tl.constexpr = 2 if NEED_H else 3
    part = tl.program_id(0) % (D // DB)
    worker = tl.program_id(0) // (D // DB)
    inner = part * DB + tl.arange(0, DB)
    cols = tl.arange(0, M)
    slots = tl.arange(0, PIECE)
    first_col = tl.arange(0, 16) == 0
    block = inner[:, None] + cols[None, :] * D
    ones = tl.full([PIECE, 16], 1.0, low_ptr.dtype.element_ty)
    if NEED_H:
        gap_w = tl.load(first_ptr + 2 * D * M + block)
        product_w = tl.load(first_ptr + 3 * D * M + block)
    if not BY_SOURCE:
        outer = outer_ptr + worker.to(tl.int64) * (TERMS * D * M) + block
        d_gap = tl.load(outer)
        d_product = tl.load(outer + D * M)
        if not NEED_H:
            d_other = tl.load(outer + 2 * D * M)
    for tile in tl.range(worker, tiles, programs, num_stages=STAGES):
        piece = base + tile
        node, place, edge, neighbor, real = _ends(
            list_ptr, task_ptr, piece, 0, slots, K, multiplier, shift, PIECE, PIECES, BY_SOURCE
        )
        other = tl.load(h_ptr + neighbor[:, None] * D + inner[None, :])
        centre = tl.load(h_ptr + node * D + inner)
        if KEPT:
            at = edge
        elif BY_SOURCE:
            at = tile * PIECE + slots
        else:
            at = (piece // PIECES - base // PIECES) * K + place
        at = low_ptr + at.to(tl.int64)[:, None] * M + cols[None, :]
        low = tl.load(at, mask=real[:, None], other=0.0)
        if BY_SOURCE:
            part_row = tl.load(task_ptr + piece * 4 + 3).to(tl.int64)
            to = tl.where(part_row < 0, centre_ptr + node * WIDTH, partial_ptr + part_row * WIDTH)
        else:
            to = centre_ptr + (tl.full([], 0, tl.int64) + piece) * WIDTH
        own = tl.dot(tl.trans(low), ones)
        column = cols[:, None] + tl.arange(0, 16)[None, :]
        tl.store(to + column, own, mask=first_col[None, :] & (part == 0))
        mixed = tl.dot(tl.trans(other), low)
        away = centre[None, :] - other
        if not BY_SOURCE:
            d_product += mixed * centre[:, None].to(tl.float32)
            if not NEED_H:
                d_other += mixed
            d_gap = tl.dot(tl.trans(tl.abs(away)), low, acc=d_gap)
        if NEED_H:
            sign = _sign(away, SIGN)
            turned = tl.dot(tl.trans(sign), low) * gap_w.to(tl.float32)
            tl.store(to + M + inner, tl.sum(mixed * product_w.to(tl.float32) + turned, 1))
    if not BY_SOURCE:
        tl.store(outer, d_gap)
        tl.store(outer + D * M, d_product)
        if not NEED_H:
            tl.store(outer + 2 * D * M, d_other)


@triton.jit
def _combine_kernel(partial_ptr, heavy_ptr, centre_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of sources whose edges were cut into pieces: the pieces' rows added in order."""
    heavy = heavy_ptr + tl.program_id(0) * 3
    node = tl.load(heavy).to(tl.int64)
    first = tl.load(heavy + 1).to(tl.int64)
    count = tl.load(heavy + 2)
    inner = tl.arange(0, BLOCK)
    mask = inner < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for piece in range(0, count):
        total += tl.load(partial_ptr + (first + piece) * WIDTH + inner, mask=mask, other=0.0)
    tl.store(centre_ptr + node * WIDTH + inner, total, mask=mask)
