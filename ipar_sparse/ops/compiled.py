"""Edge attention and the gate as operators that ``torch.compile`` and ``torch.export`` keep.

An operator runs any backend as it is. Its gradient is a second operator that runs the backend
again. For attention, the outputs that activation checkpointing saves are at hand then, so that
the second run costs its preparation only.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from ..graph import NeighborTable
from .reference import accumulate_dtype
from .selective_checkpoint import keep_attention


@torch.library.custom_op("ipar_sparse::edge_attention", mutates_args=())
def edge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x_src: Tensor,
    x_dst: Tensor,
    bias: Tensor | None,
    index: Tensor,
    reverse: list[Tensor],
    num_src_nodes: int,
    padded: bool,
    backend: str,
) -> list[Tensor]:
    """See :func:`ipar_sparse.ops.edge_attention`; the graph comes in parts.

    Args:
        reverse: the reverse lists of the graph, or nothing where they are not known yet.

    Returns:
        ``out``, ``displacement`` and ``lse``, and after them what the backward pass needs.
    """
    from . import ATTENTION_BACKENDS

    graph = NeighborTable(index, num_src_nodes=num_src_nodes, padded=padded)
    backend = _resolve(backend, q, x_src)
    saving, _ = keep_attention()
    with saving:
        outputs = ATTENTION_BACKENDS[backend](q, k, v, x_src, x_dst, bias, graph)
    out, displacement, lse = outputs
    saved = [_own(t) for outputs in saving.saved for t in outputs]
    return [out, displacement, lse.to(accumulate_dtype(q.dtype)), *saved]


@edge_attention.register_fake
def _(q, k, v, x_src, x_dst, bias, index, reverse, num_src_nodes, padded, backend):
    n, heads, channels = q.shape
    dtype, width = accumulate_dtype(q.dtype), x_src.size(1)
    out = v.new_empty(n, heads, channels)
    displacement, lse = x_src.new_empty(n, heads, width), q.new_empty(n, heads, dtype=dtype)
    saved = []
    if _resolve(backend, q, x_src) == "triton":
        moved = q.new_empty(n, heads, width, dtype=torch.float32)
        saved = [torch.empty_like(t) for t in (out, moved, lse, moved)]
    elif backend != "reference" and index.numel():
        total = q.new_empty(heads, n, channels + width, dtype=dtype)
        saved = [total, q.new_empty(heads, n, dtype=dtype)]
    return [out, displacement, lse, *saved]


@torch.library.custom_op("ipar_sparse::edge_attention_backward", mutates_args=())
def _backward(
    grads: list[Tensor],
    saved: list[Tensor],
    wanted: list[bool],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x_src: Tensor,
    x_dst: Tensor,
    bias: Tensor | None,
    index: Tensor,
    reverse: list[Tensor],
    num_src_nodes: int,
    padded: bool,
    backend: str,
) -> list[Tensor]:
    from . import ATTENTION_BACKENDS

    graph = NeighborTable(index, num_src_nodes=num_src_nodes, padded=padded)
    if reverse:
        graph.set_reverse(reverse[0], reverse[1], reverse[2])
    saving, restoring = keep_attention()
    saving.saved.append(tuple(saved))
    # Operators run below autograd. Leaving inference mode puts it back in place.
    with torch.inference_mode(False), torch.enable_grad():
        given = [
            t if t is None else t.detach().requires_grad_(want)
            for t, want in zip((q, k, v, x_src, x_dst, bias), wanted, strict=True)
        ]
        with restoring:
            outputs = ATTENTION_BACKENDS[_resolve(backend, q, x_src)](*given, graph)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            [t for t, want in zip(given, wanted, strict=True) if want],
            [g.to(o.dtype) for o, g in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    return [_own(t) for t in found]


@_backward.register_fake
def _(grads, saved, wanted, q, k, v, x_src, x_dst, bias, *graph):
    given = (q, k, v, x_src, x_dst, bias)
    return [t.new_empty(t.shape) for t, want in zip(given, wanted, strict=True) if want]


def _setup_context(ctx, inputs, output):
    *tensors, reverse, ctx.num_src_nodes, ctx.padded, ctx.backend = inputs
    ctx.num_reverse = len(reverse)
    ctx.save_for_backward(*tensors, *reverse, *output[3:])


def _gradient(ctx, grads):
    saved = list(ctx.saved_tensors)
    tensors, saved = saved[:7], saved[7:]
    reverse, saved = saved[: ctx.num_reverse], saved[ctx.num_reverse :]
    wanted = list(ctx.needs_input_grad[:6])
    graph = (tensors[6], reverse, ctx.num_src_nodes, ctx.padded)
    found = iter(_backward(list(grads[:3]), saved, wanted, *tensors[:6], *graph, ctx.backend))
    ends = (next(found) if want else None for want in wanted)
    return (*ends, None, [None] * ctx.num_reverse, None, None, None)


edge_attention.register_autograd(_gradient, setup_context=_setup_context)


@torch.library.custom_op("ipar_sparse::edge_gate", mutates_args=())
def edge_gate(
    h: Tensor, edges: Tensor, weights: list[Tensor], table: bool, padded: bool, backend: str
) -> Tensor:
    """See :func:`ipar_sparse.ops.edge_gate`; always (E, G).

    Args:
        edges: the index of a table, or an ``edge_index`` (2, E).
        table: which of the two.
        padded: whether the table is padded.
    """
    from . import GATE_BACKENDS, resolve_gate

    graph = NeighborTable(edges, padded=padded) if table else edges
    return _own(GATE_BACKENDS[resolve_gate(backend, h, graph, weights)](h, graph, weights))


@edge_gate.register_fake
def _(h, edges, weights, table, padded, backend):
    if table and padded:
        num_edges = torch.library.get_ctx().new_dynamic_size()
    else:
        num_edges = edges.numel() if table else edges.size(1)
    return weights[0].new_empty(num_edges, weights[4].size(0))


@torch.library.custom_op("ipar_sparse::edge_gate_backward", mutates_args=())
def _gate_backward(
    grad: Tensor,
    h: Tensor,
    edges: Tensor,
    weights: list[Tensor],
    table: bool,
    padded: bool,
    backend: str,
) -> list[Tensor]:
    from . import GATE_BACKENDS, resolve_gate

    graph = NeighborTable(edges, padded=padded) if table else edges
    with torch.inference_mode(False), torch.enable_grad():
        given = [t.detach().requires_grad_() for t in (h, *weights)]
        chosen = resolve_gate(backend, h, graph, weights)
        logits = GATE_BACKENDS[chosen](given[0], graph, given[1:])
        found = torch.autograd.grad(logits, given, grad.to(logits.dtype))
    return [_own(t) for t in found]


@_gate_backward.register_fake
def _(grad, h, edges, weights, table, padded, backend):
    return [t.new_empty(t.shape) for t in (h, *weights)]


def _setup_gate_context(ctx, inputs, output):
    h, edges, weights, *ctx.options = inputs
    ctx.save_for_backward(h, edges, *weights)


def _gate_gradient(ctx, grad):
    h, edges, *weights = ctx.saved_tensors
    d_h, *d_weights = _gate_backward(grad, h, edges, weights, *ctx.options)
    return d_h, None, d_weights, None, None, None


edge_gate.register_autograd(_gate_gradient, setup_context=_setup_gate_context)


def keep_operator() -> tuple[AbstractContextManager, AbstractContextManager]:
    """:func:`ipar_sparse.ops.keep_attention` in the form that ``torch.compile`` takes."""
    return create_selective_checkpoint_contexts([torch.ops.ipar_sparse.edge_attention.default])


def _own(x: Tensor) -> Tensor:
    """A copy with rows one after another: no output of an operator may be a view of another."""
    return x.clone(memory_format=torch.contiguous_format)


def _resolve(backend: str, q: Tensor, x_src: Tensor) -> str:
    from . import resolve_attention

    return resolve_attention(backend, q, x_src)
