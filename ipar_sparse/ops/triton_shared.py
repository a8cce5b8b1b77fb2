"""Edge attention by shared sources: a group of rows reads the union of its sources once.

In local order neighbouring destinations have sources in common. A group of them runs over the
union of its sources in tiles; products are dense blocks of group x union on tensor cores, and the
edges are a mask. A tile of slots says which of the k edges of a row joins a destination and a
source. The bias is read where there is an edge. The pass over sources does the same with
groups of sources and the union of their destinations. Tiles are built once a graph.

What depends on positions is a product of 16 columns, see :func:`_source_parts_kernel`: numbers are
split into three bfloat16 parts, whose products up to the 24th bit are summed in float32. A column
of ones sums the rounded weights, so that the weights of a row sum to one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..graph import NeighborTable
from ..graph.order import is_local
from .tiles import NO_EDGE, Tiles, destination_tiles, source_tiles

_LOG2E = tl.constexpr(1.4426950408889634)
# Sums of weights within which the first pass, without a running maximum, has kept all digits.
_LEAST, _MOST = tl.constexpr(2.0**-60), tl.constexpr(2.0**60)
# Measured, docs/kernels.md: one warp takes a group, so that no barriers make warps wait.
_GROUP, _WIDTH = 16, 16
_DENSITY = 0.09  # of edges in the tiles; below it rows are gathered faster
_FROM = 20_000  # nodes; fewer groups leave multiprocessors idle
_FORWARD = _BACKWARD_SRC = {"num_warps": 1, "num_stages": 2}
_BACKWARD_DST = {"num_warps": 1, "num_stages": 3}


def find_tiles(q: Tensor, graph: NeighborTable, edge: Tensor | None) -> None:
    """Builds the tiles of a graph where they will pay, once: they take as long as some passes.

    ``edge`` are its edges sorted by source, where the pass over sources is needed.
    """
    if _takes(q, graph):
        shape = _GROUP, _WIDTH, _DENSITY
        graph._cached("tiles", lambda: destination_tiles(graph, *shape))
        if edge is not None:
            graph._cached("source_tiles", lambda: source_tiles(graph, edge, *shape))


def tiles_of(q: Tensor, graph: NeighborTable, name: str = "tiles") -> Tiles | None:
    """The ``"tiles"`` or ``"source_tiles"`` of a graph; None where rows are to be gathered."""
    return graph._cache.get(name) if _takes(q, graph) else None


def _takes(q: Tensor, graph: NeighborTable) -> bool:
    heads, channels = q.shape[1:]
    layout = heads in (1, 2, 4) and channels >= 16 and heads * channels <= 128
    large = graph.num_nodes >= _FROM and graph.k < NO_EDGE
    return is_local(graph) and q.dtype == torch.bfloat16 and layout and large


def forward(q, k, v, x_src, x_dst, bias, tiles, outputs, slots):
    """Fills ``outputs``: out, displacement, log-sum-exp and norm, as the gathering kernel does."""
    n, heads, channels = q.shape
    parts = source_parts(x_src)
    again = torch.empty(tiles.groups, dtype=torch.int32, device=q.device)
    # Groups in which weights without a running maximum left the range are done again with one.
    for online in (False, True):
        _shared_forward_kernel[(tiles.groups,)](
            q,
            k,
            v,
            parts,
            x_src,
            x_dst,
            tiles.column,
            tiles.words,
            tiles.first,
            bias,
            *outputs,
            again,
            n,
            slots,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            channels**-0.5,
            HEADS=heads,
            C=channels,
            BIAS=0 if bias is None else bias.dim(),
            ONLINE=online,
            **tiles.shape,
            **_FORWARD,
        )


def backward_dst(q, k, v, parts, d_out, bias, tiles, d_q, d_bias, slots):
    """Fills the gradients of queries and bias.

    ``parts`` are what :func:`source_parts` and :func:`destination_parts` give.
    """
    n, heads, channels = q.shape
    _shared_backward_dst_kernel[(tiles.groups,)](
        q,
        k,
        v,
        *parts,
        d_out,
        tiles.column,
        tiles.words,
        tiles.first,
        bias,
        d_q,
        d_bias,
        n,
        slots,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        d_out.stride(0),
        channels**-0.5,
        HEADS=heads,
        C=channels,
        BIAS=0 if bias is None else bias.dim(),
        NEED_BIAS=d_bias is not None,
        **tiles.shape,
        **_BACKWARD_DST,
    )


def backward_src(q, k, v, parts, d_out, bias, tiles, d_k, d_v, d_x, slots):
    """Fills the gradients of keys, values and the sources' positions."""
    heads, channels = q.shape[1:]
    _shared_backward_src_kernel[(tiles.groups,)](
        q,
        k,
        v,
        *parts[:2],
        d_out,
        tiles.column,
        tiles.words,
        tiles.first,
        bias,
        d_k,
        d_v,
        d_x,
        k.size(0),
        slots,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        d_out.stride(0),
        channels**-0.5,
        HEADS=heads,
        C=channels,
        BIAS=0 if bias is None else bias.dim(),
        WIDE=bias is not None and bias.numel() >= 1 << 31,
        **tiles.shape,
        **_BACKWARD_SRC,
    )


def source_parts(x: Tensor) -> Tensor:
    """Rows of 16 numbers that stand for positions (n, 2)."""
    n = x.size(0)
    parts = torch.empty(n, 16, dtype=torch.bfloat16, device=x.device)
    _source_parts_kernel[(triton.cdiv(n, 128),)](x, parts, n, ROWS=128)
    return parts


def destination_parts(info, x_src, heads: int, slope: float) -> tuple[Tensor, Tensor]:
    """What the backward passes read of destinations, by head.

    Returns:
        Rows of 16 numbers, whose products with those of sources are slopes by position; and the
        levels that logits are taken relative to (n, heads): log-sum-exp in base 2.
    """
    n = info.size(0)
    parts = torch.empty(n, heads, 16, dtype=torch.bfloat16, device=info.device)
    level = torch.empty(n, heads, dtype=torch.float32, device=info.device)
    _destination_parts_kernel[(triton.cdiv(n, 32),)](
        info,
        x_src,
        parts,
        level,
        n,
        slope,
        HEADS=heads,
        PADDED=triton.next_power_of_2(heads),
        INFO=info.size(1),
        ROWS=32,
    )
    return parts, level


@triton.jit
def _split(x, part):
    """Part 0, 1 or 2 of float32 numbers as bfloat16; the three sum to the number."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return tl.where(part == 0, high, tl.where(part == 1, middle, low))


@triton.jit(do_not_specialize=["N"])
def _source_parts_kernel(x_ptr, parts_ptr, N, ROWS: tl.constexpr):
    """Columns of a source: h m l h m of each axis of its position, 1 1 1, 0 0 0.

    Those of a destination: h h h m m of each axis of its gradient of displacement; three parts of
    minus its constant; three of minus its level over the slope of the logits. The product of two
    rows is d . (y - x) - delta, of which only the gradient d is rounded, to 16 bits. A row of ones
    in the last three columns takes the level out.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, 16)
    axis = tl.where(column < 5, 0, 1)
    mask = (row < N)[:, None]
    at = row[:, None] * 2 + axis[None, :]
    # Relative to the first source: far from the origin no digits are lost.
    x = tl.load(x_ptr + at, mask=mask, other=0.0) - tl.load(x_ptr + axis)[None, :]
    one = tl.where(column < 13, 1.0, 0.0).to(tl.bfloat16)[None, :]
    value = tl.where((column < 10)[None, :], _split(x, ((column - 5 * axis) % 3)[None, :]), one)
    tl.store(parts_ptr + row[:, None] * 16 + column[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["N"])
def _destination_parts_kernel(
    info_ptr,
    x_src_ptr,
    parts_ptr,
    level_ptr,
    N,
    slope,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    INFO: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    column = tl.arange(0, 16)
    axis = tl.where(column < 5, 0, 1)
    part = tl.where(column - 5 * axis < 3, 0, 1)
    part = tl.where(column < 10, part, (column - 10) % 3)[None, :]
    base = info_ptr + row * INFO
    x0 = tl.load(base + 4 * PADDED, mask=inside, other=0.0) - tl.load(x_src_ptr)
    x1 = tl.load(base + 4 * PADDED + 1, mask=inside, other=0.0) - tl.load(x_src_ptr + 1)
    for head in tl.static_range(HEADS):
        delta = tl.load(base + 2 * head + 1, mask=inside, other=0.0)
        move0 = _two(tl.load(base + 2 * PADDED + 2 * head, mask=inside, other=0.0))
        move1 = _two(tl.load(base + 2 * PADDED + 2 * head + 1, mask=inside, other=0.0))
        constant = -(delta + move0 * x0 + move1 * x1)
        norm = tl.load(base + 2 * head, mask=inside, other=0.0)
        offset = tl.load(base + 4 * PADDED + 2 + head, mask=inside, other=0.0)
        level = tl.minimum(norm + offset * _LOG2E, 1e30)  # a row without edges has an infinite one
        value = tl.where((axis == 0)[None, :], move0[:, None], move1[:, None])
        value = tl.where((column < 10)[None, :], value, constant[:, None])
        value = tl.where((column < 13)[None, :], value, (-level / slope)[:, None])
        at = (row[:, None] * HEADS + head) * 16 + column[None, :]
        tl.store(parts_ptr + at, _split(value, part), mask=inside[:, None])
        tl.store(level_ptr + row * HEADS + head, level, mask=inside)


@triton.jit
def _two(x):
    """The first two bfloat16 parts of float32 numbers, summed."""
    high = x.to(tl.bfloat16).to(tl.float32)
    return high + (x - high).to(tl.bfloat16).to(tl.float32)


@triton.jit
def _columns(x, column, A: tl.constexpr, B: tl.constexpr, D: tl.constexpr):
    """Sum of three columns of (rows, 16); of fewer where two are the same."""
    chosen = (column == A) | (column == B) | (column == D)
    return tl.sum(tl.where(chosen[None, :], x, 0.0), 1)


@triton.jit
def _largest_bias(ptr, edges, column, K, head, HEADS: tl.constexpr, BIAS: tl.constexpr):
    """The largest bias of every row whose edges begin at ``edges``; 0 if it has none."""
    largest = tl.zeros(edges.shape, tl.float32)
    if BIAS > 0:
        tile = tl.full([edges.shape[0], column.shape[0]], float("-inf"), tl.float32)
        for start in range(0, K, column.shape[0]):
            slot = start + column
            at = edges[:, None] + slot[None, :]
            if BIAS == 2:
                at = at * HEADS + head
            bias = tl.load(ptr + at, mask=(slot < K)[None, :], other=float("-inf"))
            tile = tl.maximum(tile, bias.to(tl.float32))
        largest = tl.max(tile, 1)
        largest = tl.where(largest == float("-inf"), 0.0, largest)
    return largest


@triton.jit
def _slot_bias(ptr, first, words, head, HEADS: tl.constexpr, BIAS: tl.constexpr):
    """Bias of the edges in a tile of slots (G, U), -inf where there is none.

    Each word holds the slots of four columns; ``first`` are the first edges of their rows, for
    each of the four.
    """
    tiles = ()
    for byte in tl.static_range(4):
        slot = (words >> (8 * byte)) & 255
        if BIAS == 0:
            tiles += (tl.where(slot == 255, float("-inf"), 0.0),)
        else:
            at = first[byte] + slot
            if BIAS == 2:
                at = at * HEADS + head
            bias = tl.load(ptr + at, mask=slot != 255, other=float("-inf"))
            tiles += (bias.to(tl.float32),)
    tile = tl.join(tl.join(tiles[0], tiles[2]), tl.join(tiles[1], tiles[3]))
    return tl.reshape(tile, [words.shape[0], 4 * words.shape[1]])


@triton.jit
def _store_slots(ptr, first, words, tile, head, HEADS: tl.constexpr, BIAS: tl.constexpr):
    """Writes the values of edges of a tile (G, U) to their places; the reverse of reading."""
    even, odd = tl.split(tl.reshape(tile, [words.shape[0], words.shape[1], 2, 2]))
    tile0, tile2 = tl.split(even)
    tile1, tile3 = tl.split(odd)
    tiles = (tile0, tile1, tile2, tile3)
    for byte in tl.static_range(4):
        slot = (words >> (8 * byte)) & 255
        at = first + slot
        if BIAS == 2:
            at = at * HEADS + head
        tl.store(ptr + at, tiles[byte].to(ptr.dtype.element_ty), mask=slot != 255)


@triton.jit
def _columns_first(at, K, U: tl.constexpr, WIDE: tl.constexpr):
    """First edges of the rows of a tile's columns, for each of four."""
    first = ()
    for byte in tl.static_range(4):
        node = tl.load(at + 4 * tl.arange(0, U // 4) + byte)
        first += (((node.to(tl.int64) if WIDE else node) * K)[None, :],)
    return first


@triton.jit
def _gather(ptr, row, stride, inner):
    return tl.load(ptr + row[:, None] * stride + inner[None, :])


@triton.jit(do_not_specialize=["N", "K"])
def _shared_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    parts_ptr,
    x_src_ptr,
    x_dst_ptr,
    column_ptr,
    word_ptr,
    first_ptr,
    bias_ptr,
    out_ptr,
    displacement_ptr,
    lse_ptr,
    norm_ptr,
    again_ptr,
    N,
    K,
    q_stride,
    k_stride,
    v_stride,
    scale,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    U: tl.constexpr,
    BIAS: tl.constexpr,
    ONLINE: tl.constexpr,
):
    group = tl.program_id(0)
    again_ptr += group
    if ONLINE:
        if tl.load(again_ptr) == 0:
            return
    member = tl.arange(0, G)
    row = group.to(tl.int64) * G + member
    inside = row < N
    row = tl.minimum(row, N - 1)
    channel = tl.arange(0, C)
    column = tl.arange(0, U)
    sixteen = tl.arange(0, 16)
    # Edges of a group are counted from its first one, so that 32 bits hold the number.
    local = tl.minimum(member, N - 1 - group * G) * K
    if BIAS > 0:
        bias_ptr += group.to(tl.int64) * G * K * (HEADS if BIAS == 2 else 1)
    slope = scale * _LOG2E

    common = _largest_bias(bias_ptr, local, column, K, 0, HEADS, BIAS % 2)
    q, out, move, top, offset = (), (), (), (), ()
    for h in tl.static_range(HEADS):
        q += (_gather(q_ptr, row, q_stride, h * C + channel),)
        out += (tl.zeros([G, C], tl.float32),)
        move += (tl.zeros([G, 16], tl.float32),)
        top += (tl.full([G], float("-inf") if ONLINE else 0.0, tl.float32),)
        if BIAS == 2:
            offset += (_largest_bias(bias_ptr, local, column, K, h, HEADS, BIAS),)
        else:
            offset += (common,)

    begin = tl.load(first_ptr + group)
    end = tl.load(first_ptr + group + 1)
    column_at = column_ptr + begin.to(tl.int64) * U + column
    # The second program number is 0. The compiler, which does not know, gives the lanes of a warp
    # neighbouring rows, as it does where it reads biases; layouts that differ cost shared memory.
    word = (member[:, None] + G * tl.arange(0, U // 4)[None, :]) ^ tl.program_id(1)
    word_at = word_ptr + begin.to(tl.int64) * (G * U // 4) + word
    # Sources, slots and shared biases of a tile are read while the tile before it is worked on.
    source = tl.load(column_at).to(tl.int64)
    first = (local[:, None], local[:, None], local[:, None], local[:, None])
    bias = _slot_bias(bias_ptr, first, tl.load(word_at), 0, HEADS, BIAS % 2)
    next_words = tl.load(word_at + G * U // 4)
    for _ in range(begin, end):
        if BIAS == 2:
            words = tl.load(word_at)
        column_at += U
        word_at += G * U // 4
        next_source = tl.load(column_at).to(tl.int64)
        last_words = tl.load(word_at + G * U // 4)
        next_bias = _slot_bias(bias_ptr, first, next_words, 0, HEADS, BIAS % 2)
        added = (bias - offset[0][:, None]) * _LOG2E
        position = _gather(parts_ptr, source, 16, sixteen)
        new_out, new_move, new_top = (), (), ()
        for h in tl.static_range(HEADS):
            key = _gather(k_ptr, source, k_stride, h * C + channel)
            value = _gather(v_ptr, source, v_stride, h * C + channel)
            if BIAS == 2:
                bias_h = _slot_bias(bias_ptr, first, words, h, HEADS, BIAS)
                added = (bias_h - offset[h][:, None]) * _LOG2E
            logit = tl.dot(q[h], tl.trans(key)) * slope + added
            if ONLINE:
                highest = tl.maximum(top[h], tl.max(logit, 1))
                finite = tl.where(highest == float("-inf"), 0.0, highest)
                weight = tl.exp2(logit - finite[:, None])
                decay = tl.exp2(top[h] - finite)[:, None]
                new_out += (tl.dot(weight.to(value.dtype), value, out[h] * decay),)
                new_move += (tl.dot(weight.to(tl.bfloat16), position, move[h] * decay),)
                new_top += (highest,)
            else:
                weight = tl.exp2(logit)
                new_out += (tl.dot(weight.to(value.dtype), value, out[h]),)
                new_move += (tl.dot(weight.to(tl.bfloat16), position, move[h]),)
                new_top += (top[h],)
        out, move, top = new_out, new_move, new_top
        source, bias, next_words = next_source, next_bias, last_words

    own0 = tl.load(x_dst_ptr + row * 2) - tl.load(x_src_ptr)
    own1 = tl.load(x_dst_ptr + row * 2 + 1) - tl.load(x_src_ptr + 1)
    bad = tl.zeros([G], tl.int32)
    for h in tl.static_range(HEADS):
        total = _columns(move[h], sixteen, 10, 10, 10)
        empty = total == 0.0
        bad += tl.where((total >= _LEAST) & (total <= _MOST), 0, 1)
        inverse = 1.0 / tl.where(empty, 1.0, total)
        move0 = _columns(move[h], sixteen, 0, 1, 2) * inverse - own0
        move1 = _columns(move[h], sixteen, 5, 6, 7) * inverse - own1
        norm = tl.where(empty, float("inf"), top[h] + tl.log2(tl.where(empty, 1.0, total)))
        lse = tl.where(empty, float("-inf"), norm / _LOG2E + offset[h])
        node = row * HEADS + h
        tl.store(lse_ptr + node, lse, mask=inside)
        tl.store(norm_ptr + node * 2, norm, mask=inside)
        tl.store(norm_ptr + node * 2 + 1, offset[h], mask=inside)
        tl.store(displacement_ptr + node * 2, tl.where(empty, 0.0, move0), mask=inside)
        tl.store(displacement_ptr + node * 2 + 1, tl.where(empty, 0.0, move1), mask=inside)
        mean = (out[h] * inverse[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + node[:, None] * C + channel[None, :], mean, mask=inside[:, None])
    if not ONLINE:
        tl.store(again_ptr, tl.sum(tl.where(inside, bad, 0)))


@triton.jit(do_not_specialize=["N", "K"])
def _shared_backward_dst_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    src_parts_ptr,
    dst_parts_ptr,
    level_ptr,
    d_out_ptr,
    column_ptr,
    word_ptr,
    first_ptr,
    bias_ptr,
    d_q_ptr,
    d_bias_ptr,
    N,
    K,
    q_stride,
    k_stride,
    v_stride,
    d_out_stride,
    scale,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    U: tl.constexpr,
    BIAS: tl.constexpr,
    NEED_BIAS: tl.constexpr,
):
    group = tl.program_id(0)
    member = tl.arange(0, G)
    row = group.to(tl.int64) * G + member
    inside = row < N
    row = tl.minimum(row, N - 1)
    channel = tl.arange(0, C)
    column = tl.arange(0, U)
    sixteen = tl.arange(0, 16)
    local = tl.minimum(member, N - 1 - group * G) * K
    if BIAS > 0:
        bias_ptr += group.to(tl.int64) * G * K * (HEADS if BIAS == 2 else 1)
    if NEED_BIAS:
        d_bias_ptr += group.to(tl.int64) * G * K * (HEADS if BIAS == 2 else 1)
    slope = scale * _LOG2E

    q, d_out, parts, d_q, level = (), (), (), (), ()
    for h in tl.static_range(HEADS):
        q += (_gather(q_ptr, row, q_stride, h * C + channel),)
        d_out += (_gather(d_out_ptr, row, d_out_stride, h * C + channel),)
        parts += (_gather(dst_parts_ptr, row * HEADS + h, 16, sixteen),)
        d_q += (tl.zeros([G, C], tl.float32),)
        level += (tl.load(level_ptr + row * HEADS + h),)

    begin = tl.load(first_ptr + group)
    end = tl.load(first_ptr + group + 1)
    column_at = column_ptr + begin.to(tl.int64) * U + column
    # The second program number is 0. The compiler, which does not know, gives the lanes of a warp
    # neighbouring rows, as it does where it reads biases; layouts that differ cost shared memory.
    word = (member[:, None] + G * tl.arange(0, U // 4)[None, :]) ^ tl.program_id(1)
    word_at = word_ptr + begin.to(tl.int64) * (G * U // 4) + word
    source = tl.load(column_at).to(tl.int64)
    first = (local[:, None], local[:, None], local[:, None], local[:, None])
    bias = _slot_bias(bias_ptr, first, tl.load(word_at), 0, HEADS, BIAS % 2)
    next_words = tl.load(word_at + G * U // 4)
    for _ in range(begin, end):
        if NEED_BIAS or BIAS == 2:
            words = tl.load(word_at)
        column_at += U
        word_at += G * U // 4
        next_source = tl.load(column_at).to(tl.int64)
        last_words = tl.load(word_at + G * U // 4)
        next_bias = _slot_bias(bias_ptr, first, next_words, 0, HEADS, BIAS % 2)
        added = bias * _LOG2E
        position = tl.trans(_gather(src_parts_ptr, source, 16, sixteen))
        d_bias = tl.zeros([G, U], tl.float32)
        new_q = ()
        for h in tl.static_range(HEADS):
            key = _gather(k_ptr, source, k_stride, h * C + channel)
            value = _gather(v_ptr, source, v_stride, h * C + channel)
            if BIAS == 2:
                bias_h = _slot_bias(bias_ptr, first, words, h, HEADS, BIAS)
                added = bias_h * _LOG2E
            logit = tl.dot(q[h], tl.trans(key)) * slope + added
            weight = tl.exp2(logit - level[h][:, None])
            d_weight = tl.dot(d_out[h], tl.trans(value), tl.dot(parts[h], position))
            d_logit = weight * d_weight
            new_q += (tl.dot(d_logit.to(key.dtype), key, d_q[h]),)
            if NEED_BIAS and BIAS == 2:
                _store_slots(d_bias_ptr, local[:, None], words, d_logit, h, HEADS, BIAS)
            elif NEED_BIAS:
                d_bias += d_logit
        if NEED_BIAS and BIAS == 1:
            _store_slots(d_bias_ptr, local[:, None], words, d_bias, 0, HEADS, BIAS)
        d_q = new_q
        source, bias, next_words = next_source, next_bias, last_words

    for h in tl.static_range(HEADS):
        to = d_q_ptr + (row * HEADS + h)[:, None] * C + channel[None, :]
        tl.store(to, (d_q[h] * scale).to(d_q_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["N", "K"])
def _shared_backward_src_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    src_parts_ptr,
    dst_parts_ptr,
    d_out_ptr,
    column_ptr,
    word_ptr,
    first_ptr,
    bias_ptr,
    d_k_ptr,
    d_v_ptr,
    d_x_ptr,
    N,
    K,
    q_stride,
    k_stride,
    v_stride,
    d_out_stride,
    scale,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    U: tl.constexpr,
    BIAS: tl.constexpr,
    WIDE: tl.constexpr,
):
    group = tl.program_id(0)
    member = tl.arange(0, G)
    row = group.to(tl.int64) * G + member
    inside = row < N
    row = tl.minimum(row, N - 1)
    channel = tl.arange(0, C)
    column = tl.arange(0, U)
    sixteen = tl.arange(0, 16)
    slope = scale * _LOG2E

    key, value, d_k, d_v = (), (), (), ()
    parts = _gather(src_parts_ptr, row, 16, sixteen)
    ones = tl.where(sixteen[None, :] >= 13, tl.full([G, 16], 1.0, tl.float32), 0.0)
    ones = ones.to(tl.bfloat16)
    d_x = tl.zeros([G, 16], tl.float32)
    for h in tl.static_range(HEADS):
        key += (_gather(k_ptr, row, k_stride, h * C + channel),)
        value += (_gather(v_ptr, row, v_stride, h * C + channel),)
        d_k += (tl.zeros([G, C], tl.float32),)
        d_v += (tl.zeros([G, C], tl.float32),)

    begin = tl.load(first_ptr + group)
    end = tl.load(first_ptr + group + 1)
    column_at = column_ptr + begin.to(tl.int64) * U + column
    # The second program number is 0. The compiler, which does not know, gives the lanes of a warp
    # neighbouring rows, as it does where it reads biases; layouts that differ cost shared memory.
    word = (member[:, None] + G * tl.arange(0, U // 4)[None, :]) ^ tl.program_id(1)
    word_at = word_ptr + begin.to(tl.int64) * (G * U // 4) + word
    other = tl.load(column_at)
    next_words = tl.load(word_at + G * U // 4)
    ends_at = column_ptr + begin.to(tl.int64) * U
    first = _columns_first(ends_at, K, U, WIDE)
    bias = _slot_bias(bias_ptr, first, tl.load(word_at), 0, HEADS, BIAS % 2)
    next_first = _columns_first(ends_at + U, K, U, WIDE)
    for _ in range(begin, end):
        if BIAS == 2:
            words = tl.load(word_at)
            first = _columns_first(ends_at, K, U, WIDE)
        column_at += U
        word_at += G * U // 4
        ends_at += U
        next_other = tl.load(column_at)
        last_words = tl.load(word_at + G * U // 4)
        last_first = _columns_first(ends_at + U, K, U, WIDE)
        next_bias = _slot_bias(bias_ptr, next_first, next_words, 0, HEADS, BIAS % 2)
        new_k, new_v = (), ()
        added = bias * _LOG2E
        node = other.to(tl.int64)
        for h in tl.static_range(HEADS):
            q = _gather(q_ptr, node, q_stride, h * C + channel)
            d_out = _gather(d_out_ptr, node, d_out_stride, h * C + channel)
            move = _gather(dst_parts_ptr, node * HEADS + h, 16, sixteen)
            if BIAS == 2:
                bias_h = _slot_bias(bias_ptr, first, words, h, HEADS, BIAS)
                added = bias_h * _LOG2E
            # The products take in minus the level, and what depends on positions.
            logit = tl.dot(key[h], tl.trans(q), tl.dot(ones, tl.trans(move))) * slope + added
            weight = tl.exp2(logit)
            d_weight = tl.dot(value[h], tl.trans(d_out), tl.dot(parts, tl.trans(move)))
            d_logit = weight * d_weight
            rounded = weight.to(q.dtype)
            new_v += (tl.dot(rounded, d_out, d_v[h]),)
            d_x = tl.dot(rounded.to(tl.bfloat16), move, d_x)
            new_k += (tl.dot(d_logit.to(q.dtype), q, d_k[h]),)
        d_k, d_v = new_k, new_v
        other, bias, next_words, next_first = next_other, next_bias, last_words, last_first

    for h in tl.static_range(HEADS):
        to = (row * HEADS + h)[:, None] * C + channel[None, :]
        mask = inside[:, None]
        tl.store(d_k_ptr + to, (d_k[h] * scale).to(d_k_ptr.dtype.element_ty), mask=mask)
        tl.store(d_v_ptr + to, d_v[h].to(d_v_ptr.dtype.element_ty), mask=mask)
    tl.store(d_x_ptr + row * 2, _columns(d_x, sixteen, 0, 3, 3), mask=inside)
    tl.store(d_x_ptr + row * 2 + 1, _columns(d_x, sixteen, 5, 8, 8), mask=inside)
