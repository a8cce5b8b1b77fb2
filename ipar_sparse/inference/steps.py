"""The steps from an embedding to a layout, each a pure function of tensors and settings.

Training, selection, prediction and the ablations of an evaluation all use these and no others.
``config`` is a configuration without open values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import RunConfig
from ..estimators import Atlas, RelevantComponents
from ..estimators.relevant_components import search_space
from ..geometry import gauge_fix, principal_plane
from ..graph import NeighborTable, knn_candidates, pooled_candidates
from ..layout import correct_distances as correct
from ..layout import refine_layout, relative_variance
from ..nn import EdgeGateSoft, IPALiteModel

_OVERLAP_NEIGHBORS = 15  # by which refinement tells whether a layout needs it


def uses_sampled_candidates(num_cells: int, config: RunConfig) -> bool:
    """Whether the model attends to sampled candidates on a slide of so many cells.

    Candidates in training on minisets reach over a good part of the tissue. On a whole slide the
    nearest ones are much nearer, and cannot unfold a layout.
    """
    pool = config.graph.candidate_pool
    return config.train.batch_kind not in ("slide", "mixed") and 2 <= pool < num_cells


def candidate_graph(h: Tensor, config: RunConfig) -> NeighborTable:
    """The k nearest neighbours of every cell in the embedding (n, d), nearest first."""
    settings = config.graph
    return knn_candidates(h, settings.k, metric=settings.metric, backend=settings.backend)


Candidates = NeighborTable | Callable[[], NeighborTable]
"""Candidates of every cell, or a function that seeks them once they are needed."""


def attention_graph(h: Tensor, candidates: Candidates | None, config: RunConfig) -> NeighborTable:
    """What the model attends to: all candidates, or the nearest in a random sample of cells.

    Args:
        h: embeddings (n, d).
        candidates: of :func:`candidate_graph`; sought here if None and needed.
        config: pool size and seed of the sample.
    """
    if not uses_sampled_candidates(len(h), config):
        return candidate_graph(h, config) if candidates is None else _found(candidates)
    settings = config.graph
    return pooled_candidates(
        h,
        settings.k,
        settings.candidate_pool,
        metric=settings.metric,
        generator=torch.Generator().manual_seed(config.train.seed),
    )


def initial_layout(
    h: Tensor,
    config: RunConfig,
    atlas: Atlas | None = None,
    places: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The layout that the recycles begin from, in the unit-RMS gauge.

    Args:
        h: embeddings (n, d).
        config: ``model.init``.
        atlas: of the training slides, for ``model.init=atlas``.
        places: of the adapter, with their variance; taken in place of all else if given.

    Returns:
        Positions (n, 2), None where the model's own MLP makes them; and the predictive variance of
        each cell's place (n,), relative to the variance of the tissue, None without an atlas.
    """
    if places is not None:
        return gauge_fix(places[0]), relative_variance(*places)
    if config.model.init == "pca":
        return gauge_fix(principal_plane(h)), None
    if config.model.init == "atlas":
        if atlas is None:
            raise ValueError("model.init=atlas needs the atlas of the run")
        place, variance = atlas.mean_and_variance(h)
        return gauge_fix(place), relative_variance(place, variance)
    return None, None


def gate_bias(
    gate: EdgeGateSoft, h: Tensor, graph: NeighborTable, config: RunConfig
) -> tuple[Tensor | None, Tensor | None]:
    """The gate's share of the attention logits, and its raw logits; None for both without a gate.

    Args:
        gate: scores edges.
        h: embeddings (n, d).
        graph: E edges.
        config: ``model.beta``.

    Returns:
        Two tensors (E,), or (E, heads).
    """
    if not config.model.gated:
        return None, None
    logits = gate(h, graph)
    return config.model.gate_weight * logits, logits


def recycle(
    model: IPALiteModel,
    h: Tensor,
    graph: NeighborTable,
    bias: Tensor | None,
    initial: Tensor | None,
) -> list[Tensor]:
    """Layouts (n, 2) before the first recycle and after each."""
    return model(h, graph, edge_bias=bias, return_trajectory=True, initial=initial)[1]


def refinement_graph(
    h: Tensor,
    candidates: Candidates,
    relevant_components: RelevantComponents | None,
    config: RunConfig,
) -> NeighborTable:
    """The nearest cells that refinement pulls a cell towards.

    Args:
        h: embeddings (n, d).
        candidates: of the model; taken as they are where no power is set.
        relevant_components: of the training slides.
        config: ``refine.rca_power`` and ``refine.pc_power``.
    """
    settings = config.refine
    if not settings.steps or not (settings.rca_power or settings.pc_power):
        return _found(candidates)
    space = search_space(h, relevant_components, settings.rca_power or 0.0, settings.pc_power)
    k = max(_OVERLAP_NEIGHBORS, settings.neighbors)
    return knn_candidates(space, k, backend=config.graph.backend)


def _found(candidates: Candidates) -> NeighborTable:
    return candidates if isinstance(candidates, NeighborTable) else candidates()


def correct_distances(pos: Tensor, h: Tensor, variance: Tensor | None, config: RunConfig) -> Tensor:
    """A layout (n, 2) whose distances take the uncertainty of places into account.

    Args:
        pos: layout (n, 2).
        h: embeddings (n, d).
        variance: predictive variance (n,), or None.
        config: ``refine.distance_correction_steps``.
    """
    steps = config.refine.distance_correction_steps or 0
    return correct(pos, variance, h, steps=steps, seed=config.train.seed)


def refine(pos: Tensor, graph: NeighborTable, config: RunConfig) -> Tensor:
    """A layout (n, 2) pulled towards nearest candidates.

    Args:
        pos: layout (n, 2).
        graph: of :func:`refinement_graph`.
        config: ``refine``.
    """
    settings = config.refine
    return refine_layout(
        pos,
        graph,
        steps=settings.steps or 0,
        neighbors=settings.neighbors,
        anchor_weight=settings.anchor_weight or 0.0,
        skip_if_overlap=settings.skip_if_overlap,
        seed=config.train.seed,
    )
