"""How many true neighbours are among a cell's candidates, and which of them the gate prefers."""

import numpy as np
import torch
from torch import Tensor

from ..graph import NeighborTable, nearest_of
from .edges import per_edge, top_hits, true_edges, true_neighborhoods


def candidate_recall(
    graph: NeighborTable, pos: Tensor | np.ndarray, k: int = 15
) -> dict[str, float]:
    """Fraction of a cell's true spatial neighbours that are among its candidates.

    Args:
        graph: candidates of n cells.
        pos: true positions (n, 2).
        k: spatial neighbours asked for; ties at the k-th place count alike.

    Returns:
        ``candidate_recall@k``; ``candidate_recall_chance@k``, the recall of random candidates:
        candidates / (n - 1); and ``candidate_recall_lift``, the first over the second. The lift
        is left out where chance exceeds a quarter, since perfect candidates could show none.

    Raises:
        ValueError: if the positions are not of the graph's cells.
    """
    truth = true_neighborhoods(graph, pos, k)
    n = graph.num_nodes
    found = true_edges(graph, truth, k).astype(np.float64)
    recall = float((found / np.maximum(truth.size[k], 1)).mean()) if n > 1 else 1.0
    chance = graph.num_edges / (n * (n - 1)) if n > 1 else 1.0
    out = {f"candidate_recall@{k}": recall, f"candidate_recall_chance@{k}": chance}
    if chance <= 0.25:
        out["candidate_recall_lift"] = recall / chance if chance > 0 else 0.0
    return out


def sampled_candidate_recall(
    h: Tensor,
    pos: Tensor | np.ndarray,
    candidates: int,
    k: int = 15,
    metric: str = "euclidean",
    cells: int = 2000,
) -> dict[str, float]:
    """:func:`candidate_recall` of some cells of a large slide, whose graph is not needed.

    Args:
        h: embeddings (n, d).
        pos: true positions (n, 2).
        candidates: nearest cells in the embedding that are a cell's candidates.
        k: spatial neighbours asked for.
        metric: of the embedding, ``"euclidean"`` or ``"cosine"``.
        cells: number of cells looked at, drawn at random without replacement.

    Returns:
        As :func:`candidate_recall`, and ``candidate_recall_se@k``, the standard error of the
        sample.
    """
    n = len(h)
    rows = torch.from_numpy(np.sort(np.random.default_rng(0).choice(n, min(cells, n), False)))
    place = torch.as_tensor(pos).to(h.device).double()
    near = nearest_of(place, rows.to(h.device), k).unsqueeze(1)
    found = nearest_of(h, rows.to(h.device), candidates, metric=metric).unsqueeze(2)
    share = (near == found).any(1).sum(1).double() / near.size(2)
    recall, chance = float(share.mean()), found.size(1) / (n - 1)
    return {
        f"candidate_recall@{k}": recall,
        f"candidate_recall_se@{k}": float(share.std() / len(rows) ** 0.5),
        f"candidate_recall_chance@{k}": chance,
    } | ({"candidate_recall_lift": recall / chance} if chance <= 0.25 else {})


def gate_precision_recall(
    logits: Tensor,
    graph: NeighborTable,
    pos: Tensor | np.ndarray,
    k: int = 30,
    true_k: int | None = None,
) -> dict[str, float]:
    """Precision and recall of each cell's k candidates with the largest gate logits.

    Args:
        logits: gate logits (E,), or (E, G) for head-specific gates, which are averaged.
        graph: the candidates that were gated.
        pos: true positions (n, 2).
        k: candidates taken; all of them in rows that have fewer.
        true_k: spatial neighbours that count as true; k if left out.

    Returns:
        ``gate_precision@k``, ``gate_recall@k``; ``candidate_precision``, the precision of all
        candidates, which a random choice among them reaches; ``gate_lift``, the first over that.

    Raises:
        ValueError: if logits or positions do not fit the graph.
    """
    true_k = k if true_k is None else true_k
    logits = per_edge(logits, graph, "gate logits").mean(dim=-1, keepdim=True)
    truth = true_neighborhoods(graph, pos, true_k)
    precision, recall = top_hits(logits, graph, truth, k, true_k)
    inside = int(true_edges(graph, truth, true_k).sum())
    base = inside / graph.num_edges if graph.num_edges else 0.0
    return {
        f"gate_precision@{k}": float(precision[0]),
        f"gate_recall@{k}": float(recall[0]),
        "candidate_precision": base,
        "gate_lift": float(precision[0]) / base if base > 0 else 0.0,
    }
