"""Bounded memory in plain torch: blocks of rows, recomputed in the backward pass.

Both functions save only their inputs and per-node outputs for the backward pass. The backward
pass of attention runs twice: by destination for queries and biases, and over the reverse lists by
source for keys and values. Neither run needs a scatter.

Small graphs have shortcuts on the host, where memory is no concern. Where a node attends to a
quarter of all nodes or more, attention runs on all pairs. The gate's features are symmetric, so
that a pair that is an edge in both directions is computed once, and its hidden layers are kept.

Else attention is made of two primitives: a product sampled at the edges (``_sddmm``) and a sum of
node rows weighted by the edges (``_spmm``). On CPU they are torch's sampled product and its
embedding bag, which read neighbours in place. Weights and slopes of the edges, found by
destination, serve the reverse lists too.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from ..graph import NeighborTable
from .linear import product
from .reference import accumulate_dtype
from .selective_checkpoint import saved_or

BLOCK_VALUES = 1 << 24  # edge values of a block of attention: 64 MiB in float32
_GATHER_VALUES = 1 << 25  # gathered node values of a block on CUDA
_DENSE_NODES = 4  # times k: a graph of at most so many nodes runs on all pairs
_KEPT_EDGES = 1 << 17  # edges of a gate whose hidden layers are kept: 64 MiB
GATE_EDGES = 1 << 12  # edges of a block of the gate: its (edges, 2d) features fit the caches
behind_relu = torch.ops.aten.threshold_backward


def edge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x_src: Tensor,
    x_dst: Tensor,
    bias: Tensor | None,
    graph: NeighborTable,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`ipar_sparse.ops.edge_attention`."""
    if graph.padded:
        # Padding becomes an edge to node 0 at -inf, so that all rows have k edges.
        if bias is None:
            bias = q.new_zeros(graph.num_edges)
        bias = graph.to_table(bias, fill=-math.inf).flatten(0, 1)
        graph = NeighborTable(graph.index.clamp(min=0), num_src_nodes=graph.num_src_nodes)
    if not graph.num_edges:
        zero = (q.sum() + k.sum() + v.sum()) * 0
        out = q.new_zeros(q.shape) + zero
        displacement = (
            x_src.new_zeros(*q.shape[:2], x_src.size(1)) + (x_src.sum() + x_dst.sum()) * 0
        )
        return out, displacement, q.new_full(q.shape[:2], -math.inf)
    with torch.autocast(q.device.type, enabled=False):
        return _Attention.apply(q, k, v, x_src, x_dst, bias, graph)


def edge_gate(h: Tensor, edges: NeighborTable | Tensor, weights: Sequence[Tensor]) -> Tensor:
    """See :func:`ipar_sparse.ops.edge_gate`; always (E, G)."""
    if isinstance(edges, NeighborTable) and not edges.padded:
        src, dst = edges.index.long(), None
    else:
        src, dst = edges.edge_index if isinstance(edges, NeighborTable) else edges
        src = src.unsqueeze(-1)
    if isinstance(edges, NeighborTable) and 0 < edges.num_edges <= _KEPT_EDGES and not h.is_cuda:
        with torch.autocast(h.device.type, enabled=False):
            return _PairGate.apply(h.to(weights[0].dtype), edges, *weights)
    if not src.numel():
        return (h.sum() + sum(w.sum() for w in weights)) * h.new_zeros(0, weights[4].size(0))
    with torch.autocast(h.device.type, enabled=False):
        return _Gate.apply(h.to(weights[0].dtype), src, dst, *weights)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, x_src, x_dst, bias, graph):
        dtype = accumulate_dtype(q.dtype)
        channels = q.size(-1)
        total, lse = saved_or(lambda: _Attention._sums(q, k, v, x_src, bias, graph))
        nonempty = torch.isfinite(lse).unsqueeze(-1)
        displacement = total[..., channels:] - x_dst.to(dtype) * nonempty
        ctx.save_for_backward(q, k, v, x_src, x_dst, bias, total, lse)
        ctx.graph = graph
        return (
            total[..., :channels].transpose(0, 1).to(v.dtype).contiguous(),
            displacement.transpose(0, 1).to(x_src.dtype).contiguous(),
            lse.T.contiguous(),
        )

    @staticmethod
    def _sums(q, k, v, x_src, bias, graph) -> tuple[Tensor, Tensor]:
        """Weighted sums of values and positions (H, n, C + D), and log-sum-exp (H, n)."""
        dtype = accumulate_dtype(q.dtype)
        query = _heads_first(q, dtype) / math.sqrt(q.size(-1))
        key = _heads_first(k, dtype)
        value = torch.cat([_heads_first(v, dtype), _per_head(x_src, q.size(1), dtype)], dim=-1)
        if _is_dense(graph):
            weight, lse = _dense_softmax(_dense_bias(bias, graph, query), query, key)
            return torch.bmm(weight, value), lse
        total = query.new_empty(*query.shape[:2], value.size(-1))
        lse = query.new_empty(query.shape[:2])
        for rows, edges, start, column in _row_blocks(graph, q.size(1), query.size(-1)):
            logits = _sddmm(query[:, rows], key, start, column, _bias(bias, edges, query))
            weight, lse[:, rows] = _softmax(logits.unflatten(1, (-1, graph.k)))
            total[:, rows] = _spmm(weight.flatten(1), start, column, value)
        return total, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        with torch.autocast(grads[0].device.type, enabled=False):
            return _Attention._backward(ctx, *grads)

    @staticmethod
    def _backward(ctx, d_out, d_displacement, d_lse):
        saved = q, k, v, x_src, x_dst, bias, total, lse = ctx.saved_tensors
        graph: NeighborTable = ctx.graph
        dtype, channels, heads = total.dtype, q.size(-1), q.size(1)
        scale = 1 / math.sqrt(channels)
        d_total = torch.cat(
            [_heads_first(d_out, dtype), _heads_first(d_displacement, dtype)], dim=-1
        )
        nonempty = torch.isfinite(lse)
        # The x_i part of a displacement is a constant of its row, and cancels in the softmax
        # gradient.
        offset = d_lse.T.to(dtype).masked_fill(~nonempty, 0) - (d_total * total).sum(-1)
        query, key = _heads_first(q, dtype) * scale, _heads_first(k, dtype)
        value = torch.cat([_heads_first(v, dtype), _per_head(x_src, heads, dtype)], dim=-1)
        d_query, d_bias = torch.empty_like(query), None
        if ctx.needs_input_grad[5]:
            d_bias = torch.empty(bias.shape, dtype=dtype, device=bias.device)
        if _is_dense(graph):
            weight, _ = _dense_softmax(_dense_bias(bias, graph, query), query, key)
            d_value = torch.bmm(weight.transpose(1, 2), d_total)
            slope = torch.baddbmm(offset.unsqueeze(-1), d_total, value.transpose(1, 2))
            slope = slope.mul_(weight)
            d_query = torch.bmm(slope, key).mul_(scale)
            d_key = torch.bmm(slope.transpose(1, 2), query)
            if d_bias is not None:
                index = graph.index.long()
                if bias.dim() == 1:
                    d_bias = slope.sum(0).gather(1, index).flatten()
                else:
                    d_bias = slope.gather(2, index.expand(heads, -1, -1)).flatten(1).T
            return _Attention._results(saved, d_displacement, d_query, d_key, d_value, d_bias)
        weight, slope = query.new_empty(2, heads, graph.num_edges)
        for rows, edges, start, column in _row_blocks(graph, heads, value.size(-1)):
            logits = _sddmm(query[:, rows], key, start, column, _bias(bias, edges, query))
            part = _softmax(logits.unflatten(1, (-1, graph.k)))[0].flatten(1)
            constant = offset[:, rows].repeat_interleave(graph.k, 1)
            change = _sddmm(d_total[:, rows], value, start, column, constant).mul_(part)
            d_query[:, rows] = _spmm(change, start, column, key)
            if d_bias is not None:
                d_bias[edges] = change.sum(0) if bias.dim() == 1 else change.T
            weight[:, edges], slope[:, edges] = part, change
        d_query *= scale

        d_key, d_value = torch.empty_like(key), torch.empty_like(value)
        rowptr, edge, dst = graph.reverse()
        for rows, edges in _blocks(rowptr, heads, value.size(-1)):
            start, own = rowptr[rows.start : rows.stop + 1] - edges.start, edge[edges]
            d_value[:, rows] = _spmm(weight, start, dst[edges], d_total, own)
            d_key[:, rows] = _spmm(slope, start, dst[edges], query, own)

        return _Attention._results(saved, d_displacement, d_query, d_key, d_value, d_bias)

    @staticmethod
    def _results(saved, d_displacement, d_query, d_key, d_value, d_bias):
        """Gradients of the inputs, nodes first, in their dtypes."""
        q, k, v, x_src, x_dst, bias, total, lse = saved
        channels, nonempty = q.size(-1), torch.isfinite(lse).unsqueeze(-1)
        d_x_dst = -(_heads_first(d_displacement, total.dtype) * nonempty).sum(0)
        return (
            d_query.transpose(0, 1).to(q.dtype),
            d_key.transpose(0, 1).to(k.dtype),
            d_value[..., :channels].transpose(0, 1).to(v.dtype),
            d_value[..., channels:].sum(0).to(x_src.dtype),
            d_x_dst.to(x_dst.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
        )


class _Gate(torch.autograd.Function):
    """Rows of sources (R, k), all of destination r, or of ``dst[r]`` where it is given."""

    @staticmethod
    def forward(ctx, h, src, dst, w0, b0, w1, b1, w2, b2):
        first, own, other = _gate_nodes(h, w0, b0)
        logits = h.new_empty(*src.shape, w2.size(0))
        for rows in _gate_blocks(src):
            _, _, hidden = _gate_hidden(h, first, own, other, w1, b1, src[rows], _at(dst, rows))
            torch.addmm(b2, hidden, w2.T, out=logits[rows].view(-1, w2.size(0)))
        ctx.save_for_backward(h, src, dst, w0, b0, w1, b1, w2)
        return logits.view(-1, w2.size(0))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logits):
        with torch.autocast(d_logits.device.type, enabled=False):
            return _Gate._backward(ctx, d_logits)

    @staticmethod
    def _backward(ctx, d_logits):
        h, src, dst, w0, b0, w1, b1, w2 = ctx.saved_tensors
        d, k = h.size(1), src.size(1)
        d_logits = d_logits.to(h.dtype).view(*src.shape, w2.size(0))
        first, own, other = _gate_nodes(h, w0, b0)
        d_first, d_w1, d_w2 = torch.zeros_like(first), torch.zeros_like(w1), torch.zeros_like(w2)
        d_b1, d_own, d_other = torch.zeros_like(b1), torch.zeros_like(own), torch.zeros_like(other)
        d_h = torch.zeros_like(h) if ctx.needs_input_grad[0] else None
        for rows in _gate_blocks(src):
            source, to = src[rows], _at(dst, rows)
            grad = d_logits[rows].reshape(-1, w2.size(0))
            features, low, hidden = _gate_hidden(h, first, own, other, w1, b1, source, to)
            d_w2.addmm_(grad.T, hidden)
            d_hidden = behind_relu(grad @ w2, hidden, 0)
            d_w1 += product(d_hidden.T, low.T)
            d_b1 += d_hidden.sum(0)
            d_low = behind_relu(product(d_hidden, w1.T), low, 0)
            d_first += product(d_low.T, features.T)
            _add_rows(d_own, to, d_low.view(-1, k, d_low.size(1)).sum(1))
            d_other.index_add_(0, source.flatten(), d_low)
            if d_h is not None:
                d_gap, d_product = product(d_low, first.T).view(-1, k, 2 * d).split(d, dim=-1)
                left, right = h[to].unsqueeze(1), h[source]
                d_gap = d_gap * (left - right).sign()
                _add_rows(d_h, to, torch.addcmul(d_gap, d_product, right).sum(1))
                d_right = torch.addcmul(-d_gap, d_product, left).flatten(0, 1)
                d_h.index_add_(0, source.flatten(), d_right)
        if d_h is not None:
            d_h += d_own @ w0[:, :d] + d_other @ w0[:, d : 2 * d]
        d_w0 = torch.cat([d_own.T @ h, d_other.T @ h, d_first], dim=-1)
        d_b2 = d_logits.sum((0, 1))
        return d_h, None, None, d_w0, d_own.sum(0), d_w1, d_b1, d_w2, d_b2


class _PairGate(torch.autograd.Function):
    """The gate on the unordered pairs of a small table, whose hidden layers are kept."""

    @staticmethod
    def forward(ctx, h, graph, w0, b0, w1, b1, w2, b2):
        first, own, other = _gate_nodes(h, w0, b0)
        (src, dst), (pair, number) = graph.edge_index, graph.pairs()
        mixed = h.new_empty(pair.size(1), first.size(0))
        for part in _pair_blocks(pair):
            mixed[part] = product(_pair_features(h, pair[:, part]), first)
        low = mixed.index_select(0, number)
        low += other.index_select(0, src)
        low += own.index_select(0, dst)
        hidden = product(low.relu_(), w1, b1).relu_()
        ctx.save_for_backward(h, w0, b0, w1, w2, low, hidden)
        ctx.graph = graph
        return torch.addmm(b2, hidden, w2.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logits):
        h, w0, b0, w1, w2, low, hidden = ctx.saved_tensors
        d_logits, d = d_logits.to(h.dtype), h.size(1)
        (src, dst), (pair, number) = ctx.graph.edge_index, ctx.graph.pairs()
        first, own, other = _gate_nodes(h, w0, b0)
        d_hidden = behind_relu(d_logits @ w2, hidden, 0)
        d_low = behind_relu(product(d_hidden, w1.T), low, 0)
        d_own = torch.zeros_like(own).index_add_(0, dst, d_low)
        d_other = torch.zeros_like(other).index_add_(0, src, d_low)
        d_pair = h.new_zeros(pair.size(1), low.size(1)).index_add_(0, number, d_low)
        d_first = torch.zeros_like(first)
        d_h = torch.zeros_like(h) if ctx.needs_input_grad[0] else None
        for part in _pair_blocks(pair):
            left, right = (h.index_select(0, end) for end in pair[:, part])
            d_first += product(d_pair[part].T, _pair_features(h, pair[:, part]).T)
            if d_h is not None:
                d_gap, d_product = product(d_pair[part], first.T).split(d, dim=-1)
                d_gap = d_gap * (left - right).sign()
                d_h.index_add_(0, pair[0, part], torch.addcmul(d_gap, d_product, right))
                d_h.index_add_(0, pair[1, part], torch.addcmul(-d_gap, d_product, left))
        if d_h is not None:
            d_h += d_own @ w0[:, :d] + d_other @ w0[:, d : 2 * d]
        d_w0 = torch.cat([d_own.T @ h, d_other.T @ h, d_first], dim=-1)
        d_w1, d_w2 = product(d_hidden.T, low.T), d_logits.T @ hidden
        d_b1, d_b2 = d_hidden.sum(0), d_logits.sum(0)
        return d_h, None, d_w0, d_own.sum(0), d_w1, d_b1, d_w2, d_b2


def _pair_blocks(pair: Tensor) -> Iterator[slice]:
    for start in range(0, pair.size(1), GATE_EDGES):
        yield slice(start, min(start + GATE_EDGES, pair.size(1)))


def _pair_features(h: Tensor, pair: Tensor) -> Tensor:
    """|h_i - h_j| and h_i h_j of pairs (2, p), side by side (p, 2d)."""
    left, right = (h.index_select(0, end) for end in pair)
    features = h.new_empty(len(left), 2 * h.size(1))
    torch.sub(left, right, out=features[:, : h.size(1)]).abs_()
    torch.mul(left, right, out=features[:, h.size(1) :])
    return features


def _is_dense(graph: NeighborTable) -> bool:
    """Whether attention on all pairs is faster: few nodes, each edge once, on the host."""
    n, m = graph.num_nodes, graph.num_src_nodes
    return graph.device.type == "cpu" and m <= _DENSE_NODES * graph.k and n == m and graph.is_simple


def _dense_bias(bias: Tensor | None, graph: NeighborTable, like: Tensor) -> Tensor:
    """The bias of every pair (H, n, n), -inf where there is no edge."""
    n, heads, index = graph.num_nodes, like.size(0), graph.index.long()
    if bias is None or bias.dim() == 1:
        values = like.new_zeros(n, graph.k) if bias is None else bias.to(like.dtype).view(n, -1)
        table = like.new_full((n, n), -math.inf).scatter_(1, index, values)
        return table.expand(heads, -1, -1)
    values = bias.to(like.dtype).T.reshape(heads, n, graph.k)
    table = like.new_full((heads, n, n), -math.inf)
    return table.scatter_(2, index.expand(heads, -1, -1), values)


def _dense_softmax(table: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of all pairs (H, n, n) under a bias, and the log-sum-exp of its logits (H, n)."""
    return _softmax(torch.baddbmm(table, query, key.transpose(1, 2)))


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of rows (H, r, k), zeros where all logits are -inf, and log-sum-exp (H, r).

    A softmax handles -inf and vanishing weights many times faster than an exponential does.
    """
    top, weight = logits.amax(-1), logits.softmax(-1)
    empty = torch.isinf(top)
    if bool(empty.any()):
        weight = weight.masked_fill(empty.unsqueeze(-1), 0.0)
    return weight, (top - weight.amax(-1).log()).masked_fill_(empty, -math.inf)


def _gate_blocks(src: Tensor) -> Iterator[slice]:
    step = max(1, GATE_EDGES // max(1, src.size(1)))
    for start in range(0, src.size(0), step):
        yield slice(start, min(start + step, src.size(0)))


def _at(dst: Tensor | None, rows: slice) -> Tensor | slice:
    return rows if dst is None else dst[rows]


def _add_rows(total: Tensor, rows: Tensor | slice, values: Tensor) -> None:
    if isinstance(rows, slice):
        total[rows] += values
    else:
        total.index_add_(0, rows, values)


def _gate_nodes(h, w0, b0):
    """The first layer's edge block (M, 2d) and its two per-node parts (n, M)."""
    d = h.size(1)
    own, other = product(h, w0[:, :d], b0), product(h, w0[:, d : 2 * d])
    return w0[:, 2 * d :].contiguous(), own, other


def _gate_hidden(h, first, own, other, w1, b1, src, dst):
    """Edge features (e, 2d) and the two hidden layers of edges from src (r, k) to dst (r,)."""
    d, (r, k) = h.size(1), src.shape
    left, right = h[dst].unsqueeze(1), h.index_select(0, src.flatten()).view(r, k, d)
    features = h.new_empty(r, k, 2 * d)
    torch.sub(left, right, out=features[..., :d]).abs_()
    torch.mul(left, right, out=features[..., d:])
    features = features.view(r * k, 2 * d)
    low = product(features, first)
    low += other.index_select(0, src.flatten())
    low.view(r, k, -1).add_(own[dst].unsqueeze(1))
    return features, low.relu_(), product(low, w1, b1).relu_()


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.transpose(0, 1).to(dtype).contiguous()


def _per_head(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).unsqueeze(0).expand(heads, -1, -1)


def _bias(bias: Tensor | None, edges: slice | Tensor, like: Tensor) -> Tensor | None:
    """The bias of some edges as (1 or H, e)."""
    if bias is None:
        return None
    part = bias[edges].to(like.dtype)
    return part.unsqueeze(0) if part.dim() == 1 else part.T


def _blocks(rowptr: Tensor, heads: int, channels: int) -> Iterator[tuple[slice, slice]]:
    """Slices of rows and of their edges, each block under the memory budget (or one row)."""
    budget = BLOCK_VALUES // heads
    if rowptr.is_cuda:
        budget = min(budget, _GATHER_VALUES // (heads * channels))
    n, total = rowptr.numel() - 1, int(rowptr[-1])
    marks = torch.arange(0, total + budget, budget, device=rowptr.device)
    inner = torch.searchsorted(rowptr, marks.clamp(max=total), right=True).sub_(1)
    cuts = sorted({0, n, *inner.tolist()})
    ends = rowptr[torch.tensor(cuts, device=rowptr.device)].tolist()
    for rows, edges in zip(pairwise(cuts), pairwise(ends), strict=True):
        yield slice(*rows), slice(*edges)


def _row_blocks(graph: NeighborTable, heads: int, channels: int) -> Iterator[tuple]:
    """Slices of rows and of their edges, and each block's row pointer and columns, in int32."""
    column = graph.index.flatten()
    for rows, edges in _blocks(graph.rowptr, heads, channels):
        start = graph.rowptr[rows.start : rows.stop + 1] - edges.start
        yield rows, edges, start.int(), column[edges]


def _sddmm(
    rows: Tensor, columns: Tensor, rowptr: Tensor, col: Tensor, add: Tensor | None
) -> Tensor:
    """Products <rows_i, columns_j> at the edges of a block, plus ``add``: (H, e)."""
    heads, e = rows.size(0), col.numel()
    shape = (rowptr.numel() - 1, columns.size(1))
    # torch's sampled product refuses patterns with more entries than the matrix has places, which
    # repeated edges can have.
    if rows.is_cuda or e > shape[0] * shape[1]:
        row = torch.repeat_interleave(rowptr.diff(), output_size=e)
        out = (rows.index_select(1, row) * columns.index_select(1, col)).sum(-1)
        return out if add is None else out + add
    out = rows.new_zeros(heads, e)
    if add is not None:
        out.copy_(add)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR tensor|invariant)", UserWarning)
        for head, values in enumerate(out):
            place = torch.sparse_csr_tensor(rowptr, col, values, shape, check_invariants=False)
            torch.sparse.sampled_addmm(place, rows[head], columns[head].T, out=place)
    return out


def _spmm(
    values: Tensor, rowptr: Tensor, col: Tensor, nodes: Tensor, order: Tensor | None = None
) -> Tensor:
    """Sums of node rows (H, m, D) weighted by edge values (H, e), ``values[:, order]`` if given."""
    own = (v if order is None else v.index_select(0, order) for v in values)
    if values.is_cuda:
        gathered = torch.stack(list(own)).unsqueeze(-1) * nodes.index_select(1, col)
        lengths = rowptr.diff().expand(values.size(0), -1).contiguous()
        return torch.segment_reduce(gathered, "sum", lengths=lengths, axis=1, unsafe=True)
    sums = (
        embedding_bag(col, node, rowptr[:-1], mode="sum", per_sample_weights=value)
        for value, node in zip(own, nodes, strict=True)
    )
    return torch.stack(list(sums))
