"""Layouts that are scored beside a prediction: the model without one part, and its competitors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..config import RunConfig
from ..config.presets import DEFAULT_SELECTION
from ..data.expression import Expression
from ..data.slide import Slide
from ..estimators import Atlas
from ..estimators.components import principal_axes, project
from ..graph import NeighborTable, pooled_candidates
from ..inference import steps
from ..inference.predictor import Prediction, Predictor
from ..inference.run_folder import REFERENCE
from ..supervision.targets import target_graph
from .baselines import run_baselines
from .results import INITIAL, MODEL, NO_CORRECTION, NO_GATE, NO_RECYCLES, NO_REFINEMENT, ORACLE

_SPECTRAL_NEIGHBORS = 15  # of a cell, in the graph of the spectral layout
_CORRECTION, _REFINEMENT = "refine.distance_correction_steps", "refine.steps"
_STEPS = {
    NO_CORRECTION: (_CORRECTION, "the distance correction"),
    NO_REFINEMENT: (_REFINEMENT, "the refinement"),
}


@torch.no_grad()
def ablation_layouts(
    predictor: Predictor, prediction: Prediction, h: Tensor, pos: np.ndarray
) -> dict[str, np.ndarray]:
    """The prediction without one of its parts, and the model on true neighbours.

    Args:
        predictor: the trained run.
        prediction: of the same cells.
        h: embeddings (n, d) on the predictor's device.
        pos: measured positions (n, 2), for :data:`~ipar_sparse.evaluation.results.ORACLE` alone.

    Returns:
        Name to layout (n, 2). A part that the run does not have has no row.
    """
    config, model = prediction.settings, predictor.model
    initial, recycled = (torch.as_tensor(prediction.trajectory[i]).to(h) for i in (0, -1))

    def finish(layout: Tensor, config: RunConfig = config) -> Tensor:
        corrected = steps.correct_distances(layout, h, prediction.predictive_variance, config)
        return steps.refine(corrected, prediction.refinement_graph, config)

    found: dict[str, Tensor] = {}
    if prediction.gate_logits is not None:
        found[NO_GATE] = finish(steps.recycle(model, h, prediction.graph, None, initial)[-1])
    for name, (key, _) in _STEPS.items():
        if config.get(key):
            found[name] = finish(recycled, config.with_values({key: 0}))
    found[INITIAL] = initial
    layouts = {name: layout.double().cpu().numpy() for name, layout in found.items()}
    finished = finish(initial).double().cpu().numpy()
    if not np.allclose(finished, prediction.pos, atol=1e-9):
        layouts[NO_RECYCLES] = finished
    if len(prediction.trajectory) > 1:
        known = _true_neighbors(pos, config).to(h.device)
        oracle = steps.recycle(model, h, known, None, initial)[-1]
        layouts[ORACLE] = oracle.double().cpu().numpy()
    return layouts


def unchanged_notes(layouts: Mapping[str, np.ndarray]) -> list[str]:
    """Says of a row without a step that it equals the model, where it does."""
    return [
        f'"{name}" equals the model: {step} left this layout as it was.'
        for name, (_, step) in _STEPS.items()
        if name in layouts and np.allclose(layouts[name], layouts[MODEL], atol=1e-9)
    ]


@torch.no_grad()
def baseline_layouts(
    predictor: Predictor,
    slide: Slide,
    prediction: Prediction,
    attention: Tensor | None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, np.ndarray]:
    """Every baseline, and those worth it once more with distance correction and refinement.

    Args:
        predictor: the trained run.
        slide: n cells.
        prediction: of the same cells.
        attention: weights (E, heads) on ``prediction.graph``, or None.
        progress: called with each name before it runs.

    Returns:
        Name to layout (n, 2), float64.
    """
    reference = load_reference(predictor.run)
    candidates = prediction.candidates
    if steps.uses_sampled_candidates(candidates.num_nodes, predictor.config):
        candidates = nearest_candidates(candidates, _SPECTRAL_NEIGHBORS)
    layouts = run_baselines(
        prediction.embedding,
        candidates.to("cpu"),
        train=reference,
        operator=attention,
        attended=prediction.graph.to("cpu"),
        seed=predictor.config.train.seed,
        progress=progress,
    )
    layouts |= _refined_baselines(predictor, prediction, layouts, reference)
    # with an embedding of the user's own, X may hold anything
    if genes := predictor.meta["genes"]:
        layouts["PCA of expression"] = expression_pca(slide, genes)
    return layouts


def nearest_candidates(candidates: NeighborTable, k: int) -> NeighborTable:
    """The k nearest of the candidates of every cell, which are sorted by distance."""
    return replace(candidates, index=candidates.index[:, :k], recall=None, _cache={})


def load_reference(run: Path) -> list[tuple[Tensor, Tensor]] | None:
    """Embeddings (n_s, d) and positions (n_s, 2) of the training slides of a run.

    Args:
        run: its folder.

    Returns:
        One pair a slide, of at most 5,000 of its cells; None if the run has saved none.
    """
    path = Path(run) / REFERENCE
    if not path.is_file():
        return None
    tensors = load_file(path)
    count = len({name.split(".")[0] for name in tensors})
    return [(tensors[f"{i}.h"], tensors[f"{i}.pos"]) for i in range(count)]


def expression_pca(slide: Slide, genes) -> np.ndarray:
    """The first two principal components of a slide's own expression (n, 2), nothing learned.

    Args:
        slide: n cells with expression.
        genes: of the run, two at least.
    """
    expression = Expression.from_slide(slide, genes)
    axes, _ = principal_axes([expression], 2)
    return project(expression, axes)


def _refined_baselines(
    predictor: Predictor,
    prediction: Prediction,
    layouts: Mapping[str, np.ndarray],
    reference: list[tuple[Tensor, Tensor]] | None,
) -> dict[str, np.ndarray]:
    """Baselines with distance correction and refinement: what these are worth by themselves.

    A step that the run does without is taken with its default settings.
    """
    own, candidates = predictor.config, prediction.candidates
    missing = set() if own.get(_CORRECTION) else {_CORRECTION}
    if not own.get(_REFINEMENT):
        missing |= {key for key in DEFAULT_SELECTION if key.startswith("refine.")} - {_CORRECTION}
    config = own.with_values({key: DEFAULT_SELECTION[key] for key in missing})
    h, graph = torch.from_numpy(prediction.embedding), prediction.refinement_graph
    if not own.get(_REFINEMENT):
        components, device = predictor.relevant_components, predictor.device
        graph = steps.refinement_graph(h.to(device), candidates, components, config)
    graph, found = graph.to("cpu"), {}
    for name in ("PCA", "MLP", "atlas"):
        if name not in layouts:
            continue
        pos, variance = torch.from_numpy(layouts[name]), None
        if name == "atlas":
            atlas = Atlas(h.size(1)).fit(reference)
            as_atlas = config.with_values({"model.init": "atlas"})
            pos, variance = steps.initial_layout(h, as_atlas, atlas)
        corrected = steps.correct_distances(pos, h, variance, config)
        found[f"{name} + refinement"] = steps.refine(corrected, graph, config).double().numpy()
    return found


def _true_neighbors(pos: np.ndarray, config: RunConfig) -> NeighborTable:
    """True neighbours of every cell, of the reach that the model's candidates have."""
    if not steps.uses_sampled_candidates(len(pos), config):
        return target_graph(pos)
    generator = torch.Generator().manual_seed(config.train.seed)
    pool, k = config.graph.candidate_pool, config.graph.k
    return pooled_candidates(torch.from_numpy(pos), k, pool, generator=generator)
