"""Measures of attention over a neighbour table: what it finds, how sharp and how varied it is."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..graph import NeighborTable
from .correlation import mean_row_spearman
from .edges import per_edge, table_blocks, top_hits, true_neighborhoods


@dataclass(frozen=True)
class AttentionFocus:
    """Where one cell attends.

    Args:
        cell: its row.
        neighbors: rows it attends to (m,).
        weights: its attention on them (m,), heads averaged.
        label: title of its panel; the cell's row if left out.
    """

    cell: int
    neighbors: np.ndarray
    weights: np.ndarray
    label: str | None = None


def attn_recall(
    attention: Tensor,
    graph: NeighborTable,
    pos: Tensor | np.ndarray,
    k: int = 30,
    true_k: int | None = None,
) -> np.ndarray:
    """Fraction of the k most attended nodes that are true spatial neighbours, per head.

    Args:
        attention: weights (E, H) or (E,).
        graph: the attention graph.
        pos: true positions (n, 2).
        k: most attended nodes looked at; all of them in rows that have fewer.
        true_k: spatial neighbours that count as true; k if left out.

    Returns:
        (H,), each in [0, 1].

    Raises:
        ValueError: if attention or positions do not fit the graph.
    """
    true_k = k if true_k is None else true_k
    attention = per_edge(attention, graph, "attention")
    return top_hits(attention, graph, true_neighborhoods(graph, pos, true_k), k, true_k)[0]


def attention_entropy(
    attention: Tensor, graph: NeighborTable, *, relative: bool = False
) -> np.ndarray:
    r"""Mean entropy of a node's attention, per head, in nats.

    .. math::
        \frac1n \sum_i -\sum_j a_{ij} \log a_{ij} \quad (\text{relative: each row over } \log d_i)

    Args:
        attention: weights (E, H) or (E,), each row summing to 1 (rows of zeros are left out).
        graph: the attention graph.
        relative: divide by the entropy of uniform attention over the row's :math:`d_i` edges;
            rows of one edge are then left out.

    Returns:
        (H,); 0 if no row is left.
    """
    attention = per_edge(attention, graph, "attention")
    total, count = torch.zeros(attention.size(1), dtype=torch.float64), 0
    for _, a, mask in table_blocks(graph, attention):
        entropy = -(a * a.clamp(min=1e-38).log()).sum(dim=1)
        degree = mask.sum(dim=1)
        keep = (a.sum(dim=1) > 0).any(dim=-1) & (degree > (1 if relative else 0))
        if relative:
            entropy = entropy / degree.clamp(min=2).double().log().unsqueeze(-1)
        total += entropy[keep].sum(dim=0).cpu()
        count += int(keep.sum())
    return (total / max(count, 1)).numpy()


def logit_std(logits: Tensor, graph: NeighborTable) -> np.ndarray:
    """Standard deviation of logits, or of one term of them, over all edges, per head.

    Args:
        logits: (E, H) or (E,); -inf entries (removed edges) are left out.
        graph: the attention graph.

    Returns:
        (H,)
    """
    values = per_edge(logits, graph, "logits").double()
    finite = torch.isfinite(values)
    count = finite.sum(dim=0).clamp(min=1)
    values = values.masked_fill(~finite, 0.0)
    mean = values.sum(dim=0) / count
    square = (values - mean).square().masked_fill(~finite, 0.0).sum(dim=0) / count
    return square.sqrt().cpu().numpy()


def attention_term_spearman(
    attention: Tensor,
    term: Tensor,
    graph: NeighborTable,
    *,
    num_rows: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """Spearman correlation of attention with one logit term within a node's edges, per head.

    Ranks are taken within each row, because softmax ignores what all edges of a row share. The
    mean over rows is returned.

    Args:
        attention: weights (E, H) or (E,).
        term: one term of the logits, (E, H) or (E,) if the heads share it.
        graph: the attention graph.
        num_rows: rows drawn without replacement where the graph has more.
        seed: of the drawn rows.

    Returns:
        (H,) in [-1, 1]. Rows in which either side is constant are left out; 0 if none remains.
    """
    attention = per_edge(attention, graph, "attention")
    term = per_edge(term, graph, "logit term").expand_as(attention)
    n = graph.num_nodes
    rows = torch.arange(n)
    if n > num_rows:
        drawn = np.random.default_rng([seed, 4]).choice(n, num_rows, replace=False)
        rows = torch.from_numpy(np.sort(drawn))
    rows = rows.to(graph.device)
    mask = (graph.index[rows] >= 0).cpu().numpy()
    a = graph.to_table(attention)[rows].double().cpu().numpy()
    t = graph.to_table(term)[rows].double().cpu().numpy()
    return np.array([mean_row_spearman(a[..., h], t[..., h], mask) for h in range(a.shape[-1])])


def head_diversity(attention: Tensor, graph: NeighborTable) -> float:
    r"""How differently the heads attend: mean total-variation distance over pairs of heads.

    .. math::
        \frac1n \sum_i \operatorname{mean}_{h<h'} \tfrac12 \sum_j |a_{ij}^h - a_{ij}^{h'}|

    Args:
        attention: weights (E, H).
        graph: the attention graph.

    Returns:
        In [0, 1]: 0 for identical heads and for a single one, 1 for disjoint ones.
    """
    attention = per_edge(attention, graph, "attention")
    heads = attention.size(1)
    if heads < 2 or not graph.num_nodes:
        return 0.0
    total = 0.0
    for _, a, _ in table_blocks(graph, attention):
        for h in range(heads):
            total += float((a[..., h + 1 :] - a[..., h : h + 1]).abs().sum())
    return 0.5 * total / (graph.num_nodes * heads * (heads - 1) / 2)
