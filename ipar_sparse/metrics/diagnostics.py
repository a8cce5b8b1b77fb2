"""Diagnostics of a prediction: graph, gate, attention of every recycle, and collapse of the map.

Everything runs in O(n k) on a :class:`~ipar_sparse.graph.NeighborTable`. Per-edge tensors are in
its row-major order. True positions serve to score alone.

Names are flat: a measure, then its place, as in ``attn_recall@30/r2/h0`` (recycle 2, head 0).
:data:`HEALTHY` holds the range in which each measure should lie, and :func:`health_warnings` says
in words which are outside.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..graph import NeighborTable
from .attention import (
    AttentionFocus,
    attention_entropy,
    attention_term_spearman,
    head_diversity,
    logit_std,
)
from .candidates import candidate_recall, gate_precision_recall
from .edges import per_edge, top_hits, true_neighborhoods
from .health import HEALTHY, HealthyRange, health_warnings
from .shape import boundary_mass, collapse_diagnostics, density_correlation, step_sizes

__all__ = [
    "HEALTHY",
    "AttentionFocus",
    "HealthyRange",
    "RecycleRecord",
    "candidate_recall",
    "collapse_diagnostics",
    "diagnose",
    "health_warnings",
]


@dataclass
class RecycleRecord:
    """The attention of one recycle.

    Args:
        attention: weights (E, H) in the graph's order.
        logits: the logits behind them (E, H); None leaves out ``logit_std``.
        terms: the terms that add up to the logits, name to (E, H) or (E,).
        learned_scalars: name to a scalar or one a head (H,): weight of the gate (``beta``), step
            size (``eta``), scale of normalised queries and keys (``tau``), slope of squared
            distance (``gamma``), length of point offsets (``offset_norm``, in units of the
            layout) and their width (``sigma``).
    """

    attention: Tensor
    logits: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    learned_scalars: Mapping[str, Tensor | float] = field(default_factory=dict)


@torch.no_grad()
def diagnose(
    graph: NeighborTable,
    recycles: Iterable[RecycleRecord] = (),
    *,
    pos: Tensor | np.ndarray | None = None,
    trajectory: Sequence[Tensor | np.ndarray] | None = None,
    gate_logits: Tensor | None = None,
    final: Tensor | np.ndarray | None = None,
    k: int = 30,
    true_k: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Every diagnostic that the given material allows, as one flat dictionary.

    Args:
        graph: the graph attended on.
        recycles: one record a recycle. An iterator is read one record at a time, so that only
            one recycle's attention is held in memory.
        pos: true positions (n, 2), for the measures that need them.
        trajectory: layouts before the first and after each recycle.
        gate_logits: raw gate logits (E,) or (E, G).
        final: the final map (n, 2); the last of ``trajectory`` if left out.
        k: most attended nodes, and candidates with the largest gate, that are looked at.
        true_k: spatial neighbours that count as true; k if left out.
        seed: of drawn rows and pairs.

    Returns:
        Measures such as ``attn_recall@30/r0/h1``, ``logit_std/r0/h1``, ``term_std:qk/r0/h1``,
        ``term_spearman:gate/r0/h1``, ``attention_entropy/r0/h1``, ``head_diversity/r0``,
        ``step_size/r0``, ``gate_precision@30``, ``candidate_recall@15``, ``lambda_ratio``,
        ``boundary_mass``, ``density_correlation``: the input of :func:`health_warnings`.

    Raises:
        ValueError: if a tensor or the positions do not fit the graph.
    """
    out: dict[str, float] = {}
    true_k = k if true_k is None else true_k
    truth = None if pos is None else true_neighborhoods(graph, pos, true_k)

    def put(name: str, r: int, values: Iterable) -> None:
        out.update({f"{name}/r{r}/h{h}": float(value) for h, value in enumerate(values)})

    for r, record in enumerate(recycles):
        attention = per_edge(record.attention, graph, "attention")
        if truth is not None:
            put(f"attn_recall@{k}", r, top_hits(attention, graph, truth, k, true_k)[0])
        if record.logits is not None:
            put("logit_std", r, logit_std(record.logits, graph))
        for name, term in record.terms.items():
            put(f"term_std:{name}", r, logit_std(term, graph))
            put(
                f"term_spearman:{name}",
                r,
                attention_term_spearman(attention, term, graph, seed=seed),
            )
        for name, value in record.learned_scalars.items():
            value = torch.as_tensor(value)
            if value.dim():
                put(name, r, value)
            else:
                out[f"{name}/r{r}"] = float(value)
        put("attention_entropy", r, attention_entropy(attention, graph))
        put("attention_entropy_relative", r, attention_entropy(attention, graph, relative=True))
        if attention.size(1) > 1:
            out[f"head_diversity/r{r}"] = head_diversity(attention, graph)
    if gate_logits is not None and pos is not None:
        out.update(gate_precision_recall(gate_logits, graph, pos, k, true_k))
    if pos is not None:
        out.update(candidate_recall(graph, pos))
    if trajectory is not None:
        out.update({f"step_size/r{r}": size for r, size in enumerate(step_sizes(trajectory))})
        final = trajectory[-1] if final is None else final
    if final is not None:
        out.update(collapse_diagnostics(final, seed=seed))
        out["boundary_mass"] = boundary_mass(final)
        if pos is not None and graph.num_nodes >= 3:
            out["density_correlation"] = density_correlation(final, pos)
    return out
