"""Per-edge values of a neighbour table, in blocks of rows, and the true neighbours they find."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..geometry.neighborhoods import TrueNeighborhoods, as_layout
from ..graph import NeighborTable

ROW_BLOCK = 1 << 14  # rows of an (n, k, heads) table held at once


def per_edge(values: Tensor, graph: NeighborTable, what: str) -> Tensor:
    """Values (E,) or (E, H) as a detached tensor (E, H).

    Raises:
        ValueError: if there is not one value, or one a head, for each edge of the graph.
    """
    values = torch.as_tensor(values).detach()
    if values.dim() == 1:
        values = values.unsqueeze(-1)
    if values.dim() != 2 or values.size(0) != graph.num_edges:
        raise ValueError(
            f"{what} must be (E,) or (E, H) with E = {graph.num_edges} edges of the graph; "
            f"given {tuple(values.shape)}"
        )
    return values


def true_neighborhoods(graph: NeighborTable, pos: Tensor | np.ndarray, k: int) -> TrueNeighborhoods:
    """The k spatial neighbours of the graph's cells.

    Raises:
        ValueError: if the positions are not of the graph's cells.
    """
    layout = as_layout(pos, "true positions")
    if len(layout) != graph.num_nodes or graph.num_src_nodes != graph.num_nodes:
        raise ValueError(
            f"true positions must be of the graph's {graph.num_nodes} cells; given {len(layout)}"
        )
    return TrueNeighborhoods(layout, (k,))


def true_edges(graph: NeighborTable, truth: TrueNeighborhoods, k: int) -> np.ndarray:
    """Number of edges of each cell that end at a true neighbour (n,)."""
    found = np.zeros(graph.num_nodes, dtype=np.int64)
    for start in range(0, graph.num_nodes, ROW_BLOCK):
        rows = np.arange(start, min(graph.num_nodes, start + ROW_BLOCK))
        index = graph.index[start : start + len(rows)].cpu().numpy()
        found[rows] = truth.contains(rows, index, k).sum(axis=1)
    return found


def table_blocks(
    graph: NeighborTable, values: Tensor, fill: float = 0.0
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Rows, their values (rows, k, H) in float64 and the mask of their edges, block by block."""
    rowptr = graph.rowptr
    for start in range(0, graph.num_nodes, ROW_BLOCK):
        stop = min(graph.num_nodes, start + ROW_BLOCK)
        mask = graph.index[start:stop] >= 0
        block = values.new_full((*mask.shape, values.size(1)), fill, dtype=torch.float64)
        block[mask] = values[int(rowptr[start]) : int(rowptr[stop])].double()
        yield np.arange(start, stop), block, mask


def top_hits(
    scores: Tensor, graph: NeighborTable, truth: TrueNeighborhoods, k: int, true_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall (H,) of each row's k best-scored edges; empty rows are left out.

    Args:
        scores: per-edge scores (E, H).
        graph: the graph they belong to.
        truth: spatial neighbours of the same cells.
        k: edges looked at; all of them in rows that have fewer.
        true_k: spatial neighbours that count as true.
    """
    heads = scores.size(1)
    precision, recall, filled = np.zeros(heads), np.zeros(heads), 0
    if not graph.num_edges:
        return precision, recall
    for rows, block, mask in table_blocks(graph, scores, fill=-math.inf):
        degree = mask.sum(dim=1).cpu().numpy()
        index = graph.index[rows[0] : rows[-1] + 1]
        best = block.topk(min(k, graph.k), dim=1).indices
        chosen = np.maximum(np.minimum(degree, k), 1)
        true = np.maximum(truth.size[true_k][rows], 1)
        for h in range(heads):
            held = mask.gather(1, best[..., h])
            others = index.gather(1, best[..., h]).masked_fill(~held, -1)
            hits = truth.contains(rows, others.cpu().numpy(), true_k).sum(axis=1)
            precision[h] += (hits / chosen).sum()
            recall[h] += (hits / true)[degree > 0].sum()
        filled += int((degree > 0).sum())
    return precision / max(filled, 1), recall / max(filled, 1)
