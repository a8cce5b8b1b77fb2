"""Edge attention and the edge gate behind ``nn``: one signature each, several backends.

========== ======================================================================
backend    what it is
========== ======================================================================
reference  plain gather and scatter over the edges: the definition
chunked    bounded memory in plain torch: blocks of rows, recomputed in the backward pass
triton     fused CUDA kernels (needs Triton and a GPU)
========== ======================================================================
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from ..distributed import all_rows, rows_of, shares_rows
from ..graph import NeighborTable
from . import chunked, compiled, reference
from .compiled import keep_operator
from .edges import apply_edges
from .segment import scatter_sum, segment_softmax
from .selective_checkpoint import keep_attention

__all__ = [
    "ATTENTION_BACKENDS",
    "GATE_BACKENDS",
    "apply_edges",
    "edge_attention",
    "edge_gate",
    "keep_attention",
    "keep_operator",
    "resolve_backend",
    "scatter_sum",
    "segment_softmax",
]


def _triton_attention(*args) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton_attention

    return triton_attention.edge_attention(*args)


def _triton_gate(*args) -> Tensor:
    from . import triton_gate

    return triton_gate.edge_gate(*args)


def _fused_if_supported(name: str, *args) -> str:
    """``"triton"``, or ``"chunked"`` for what its kernels do not take."""
    from . import triton_attention, triton_gate

    module = {"attention": triton_attention, "gate": triton_gate}[name]
    return "chunked" if module.unsupported(*args) else "triton"


ATTENTION_BACKENDS: dict[str, Callable] = {
    "reference": reference.edge_attention,
    "chunked": chunked.edge_attention,
    "triton": _triton_attention,
}
GATE_BACKENDS: dict[str, Callable] = {
    "reference": reference.edge_gate,
    "chunked": chunked.edge_gate,
    "triton": _triton_gate,
}


def resolve_backend(backend: str, sample: Tensor) -> str:
    """The backend that ``"auto"`` means for this tensor's device and dtype; others as named.

    Raises:
        ValueError: if the name is unknown.
    """
    if backend == "auto":
        fused = sample.is_cuda and sample.dtype != torch.float64
        return "triton" if fused and find_spec("triton") else "chunked"
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(
            f"unknown backend {backend!r}; choose from auto, {list(ATTENTION_BACKENDS)}"
        )
    return backend


def resolve_attention(backend: str, q: Tensor, x_src: Tensor) -> str:
    """The attention backend that runs for these queries and positions.

    Raises:
        ValueError: if the name is unknown.
    """
    chosen = resolve_backend(backend, q)
    if backend == "auto" and chosen == "triton":
        return _fused_if_supported("attention", q, x_src)
    return chosen


def edge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor | tuple[Tensor, Tensor],
    bias: Tensor | None,
    graph: NeighborTable,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Softmax attention over the in-edges of every node, on values and on displacements.

    .. math::
        \ell_{ij}^h = \langle q_i^h, k_j^h \rangle / \sqrt{C} + b_{ij}^h, \quad
        a_{i\cdot}^h = \operatorname{softmax}_j \ell_{ij}^h, \quad
        o_i^h = \sum_j a_{ij}^h v_j^h, \quad
        \delta_i^h = \sum_j a_{ij}^h (x_j - x_i)

    Args:
        q: queries (n, H, C).
        k: keys (n_src, H, C).
        v: values (n_src, H, C).
        x: positions (n, D), or (sources (n_src, D), destinations (n, D)) for bipartite graphs.
        bias: additive logits (E,), shared by the heads, or (E, H), in the graph's row-major
            order; None for none. -inf removes an edge.
        graph: the in-edges of every destination.
        backend: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"triton"``.

    Returns:
        ``out`` (n, H, C), ``displacement`` (n, H, D), ``lse`` (n, H): log-sum-exp of the
        logits. A node without edges (or with all edges at -inf) gets zeros and -inf.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit together.
    """
    x_src, x_dst = x if isinstance(x, tuple) else (x, x)
    _check_attention(q, k, v, x_src, x_dst, bias, graph)
    if torch.compiler.is_compiling():
        parts = (graph.index, graph.known_reverse, graph.num_src_nodes, graph.padded, backend)
        return tuple(compiled.edge_attention(q, k, v, x_src, x_dst, bias, *parts)[:3])
    chosen = resolve_attention(backend, q, x_src)
    return ATTENTION_BACKENDS[chosen](q, k, v, x_src, x_dst, bias, graph)


def resolve_gate(
    backend: str, h: Tensor, edges: NeighborTable | Tensor, weights: Sequence[Tensor]
) -> str:
    """The backend of the gate that runs for these embeddings and edges.

    Raises:
        ValueError: if the name is unknown.
    """
    chosen = resolve_backend(backend, h)
    if chosen == "triton" and not isinstance(edges, NeighborTable):
        return "chunked"  # the fused kernel reads rows of a table
    if backend == "auto" and chosen == "triton":
        return _fused_if_supported("gate", h, weights)
    return chosen


def edge_gate(
    h: Tensor,
    edges: NeighborTable | Tensor,
    weights: Sequence[Tensor],
    *,
    backend: str = "auto",
) -> Tensor:
    r"""Score every candidate edge with an MLP of its two ends.

    .. math::
        g_{ij} = W_2\,\mathrm{relu}(W_1\,\mathrm{relu}(
            W_0 [h_i, h_j, |h_i - h_j|, h_i \odot h_j] + b_0) + b_1) + b_2

    The first two blocks of :math:`W_0` take one node alone and are applied once a node.

    Args:
        h: embeddings (n, d); of a table with fewer rows, the destinations stand first.
        edges: candidate edges as a :class:`NeighborTable` or ``edge_index`` (2, E); i is the
            destination.
        weights: ``(W0 (M, 4d), b0 (M,), W1 (M', M), b1 (M',), W2 (G, M'), b2 (G,))``.
        backend: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"triton"``.

    Returns:
        Logits (E,) if G = 1, else (E, G), in the order of the edges.

    Raises:
        ValueError: on shapes or devices that do not fit together.
    """
    _check_gate(h, edges, weights)
    if shares_rows() and isinstance(edges, NeighborTable) and not edges.padded:
        if edges.num_nodes == len(h):
            return _edge_gate_by_rows(h, edges, weights, backend)
    if torch.compiler.is_compiling():
        if isinstance(edges, NeighborTable):
            parts = (edges.index, list(weights), True, edges.padded)
        else:
            parts = (edges, list(weights), False, False)
        logits = compiled.edge_gate(h, *parts, backend)
    else:
        logits = GATE_BACKENDS[resolve_gate(backend, h, edges, weights)](h, edges, weights)
    return logits.squeeze(-1) if weights[4].size(0) == 1 else logits


def _edge_gate_by_rows(
    h: Tensor, edges: NeighborTable, weights: Sequence[Tensor], backend: str
) -> Tensor:
    """The gate, each rank that on its rows."""
    own = rows_of(len(h))
    part = edge_gate(h.roll(-own.start, 0), edges.rows(own, first=True), weights, backend=backend)
    shape = (own.stop - own.start, edges.k, *part.shape[1:])
    return all_rows(part.reshape(shape), len(h)).flatten(0, 1)


def _check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x_src: Tensor,
    x_dst: Tensor,
    bias: Tensor | None,
    graph: NeighborTable,
) -> None:
    n, n_src = graph.num_nodes, graph.num_src_nodes
    shapes = {"q": tuple(q.shape), "k": tuple(k.shape), "v": tuple(v.shape)}
    if q.dim() != 3 or k.shape != v.shape or k.shape[1:] != q.shape[1:]:
        raise ValueError(f"edge_attention needs q (n, H, C) and k, v (n_src, H, C); given {shapes}")
    if q.size(0) != n or k.size(0) != n_src:
        raise ValueError(
            f"edge_attention: the graph has {n} destinations and {n_src} sources; given {shapes}"
        )
    if x_src.dim() != 2 or x_src.size(0) != n_src or x_dst.shape != (n, x_src.size(1)):
        raise ValueError(
            f"edge_attention needs positions ({n_src}, D) and ({n}, D); "
            f"given {tuple(x_src.shape)} and {tuple(x_dst.shape)}"
        )
    # A compiler does not see how many slots of a padded table hold edges.
    unseen = graph.padded and torch.compiler.is_compiling()
    if bias is not None and not unseen and not _fits(bias, graph.num_edges, q.size(1)):
        raise ValueError(
            f"edge_attention needs a bias of shape ({graph.num_edges},) or "
            f"({graph.num_edges}, {q.size(1)}); given {tuple(bias.shape)}"
        )
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(
            f"edge_attention needs q, k, v of one floating dtype; "
            f"given {q.dtype}, {k.dtype}, {v.dtype}"
        )
    devices = {t.device for t in (q, k, v, x_src, x_dst, graph.index)}
    devices |= {bias.device} if bias is not None else set()
    if len(devices) > 1:
        raise ValueError(f"edge_attention: tensors and graph on several devices: {devices}")


def _fits(bias: Tensor, num_edges: int, heads: int) -> bool:
    return bias.shape in ((num_edges,), (num_edges, heads))


def _check_gate(h: Tensor, edges: NeighborTable | Tensor, weights: Sequence[Tensor]) -> None:
    w0, b0, w1, b1, w2, b2 = weights
    if isinstance(edges, NeighborTable):
        if h.dim() != 2 or not h.size(0) == edges.num_src_nodes >= edges.num_nodes:
            raise ValueError(
                f"edge_gate needs embeddings ({edges.num_src_nodes}, d) of one node set, the "
                f"{edges.num_nodes} destinations first; given {tuple(h.shape)}"
            )
    elif edges.dim() != 2 or edges.size(0) != 2:
        raise ValueError(f"edge_gate needs edge_index (2, E); given {tuple(edges.shape)}")
    if (
        w0.size(1) != 4 * h.size(1)
        or w1.size(1) != w0.size(0)
        or w2.size(1) != w1.size(0)
        or (b0.numel(), b1.numel(), b2.numel()) != (w0.size(0), w1.size(0), w2.size(0))
    ):
        raise ValueError(
            f"edge_gate: weights {[tuple(w.shape) for w in weights]} do not fit "
            f"embeddings of width {h.size(1)} (first layer: 4 x width)"
        )
    if len({t.device for t in (h, *weights)} | {edges.device}) > 1:
        raise ValueError("edge_gate: embeddings, edges and weights must be on one device")
