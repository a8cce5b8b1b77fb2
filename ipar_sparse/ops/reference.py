"""The definition: plain gather and scatter, with intermediate tensors (E, ...)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..graph import NeighborTable
from .segment import scatter_sum, segment_softmax


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and sums: float32 for half precision, else the same."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def attention_logits(q_i: Tensor, k_j: Tensor, bias: Tensor | None) -> Tensor:
    """Logits (E, H) from the two ends' queries and keys (E, H, C) and a bias (E,) or (E, H)."""
    dtype = accumulate_dtype(q_i.dtype)
    logits = (q_i.to(dtype) * k_j.to(dtype)).sum(-1) / math.sqrt(q_i.size(-1))
    if bias is not None:
        logits = logits + (bias.unsqueeze(-1) if bias.dim() == 1 else bias).to(dtype)
    return logits


def gate_logits(h_i: Tensor, h_j: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The gate's MLP (E, G) on embeddings of the two ends of the edges, (E, d) each."""
    w0, b0, w1, b1, w2, b2 = weights
    features = torch.cat([h_i, h_j, (h_i - h_j).abs(), h_i * h_j], dim=-1)
    hidden = torch.relu(torch.nn.functional.linear(features, w0, b0))
    hidden = torch.relu(torch.nn.functional.linear(hidden, w1, b1))
    return torch.nn.functional.linear(hidden, w2, b2)


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
    src, dst = graph.edge_index
    n = graph.num_nodes
    attention, lse = segment_softmax(attention_logits(q[dst], k[src], bias), dst, n)
    out = scatter_sum(attention.unsqueeze(-1) * v[src].to(attention.dtype), dst, n)
    moves = (x_src[src] - x_dst[dst]).unsqueeze(1)
    displacement = scatter_sum(attention.unsqueeze(-1).to(moves.dtype) * moves, dst, n)
    return out.to(v.dtype), displacement, lse


def edge_gate(h: Tensor, edges: NeighborTable | Tensor, weights: Sequence[Tensor]) -> Tensor:
    """See :func:`ipar_sparse.ops.edge_gate`; always (E, G)."""
    src, dst = edges.edge_index if isinstance(edges, NeighborTable) else edges
    return gate_logits(h[dst], h[src], weights)
