"""Predict a slide whose positions are known, and score the prediction and its competitors."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from .. import __version__
from ..config import RunConfig
from ..data.anndata_store import suggest
from ..data.input_profile import informative
from ..data.notes import Warned
from ..data.slide import Slide
from ..errors import UserError
from ..inference.placing import role_in_training
from ..inference.predictor import Prediction, Predictor
from ..inference.reference import Reference, refuse_reference_itself
from ..layout.uncertainty import calibration_metrics, square_errors
from ..metrics.diagnostics import candidate_recall
from ..metrics.layout import evaluate_layout
from ..metrics.published import published_metrics
from ..progress import stage
from ..supervision.losses import e_geo
from ..supervision.targets import build_target
from .attention import attention_diagnostics
from .baselines import BASELINES
from .layouts import ablation_layouts, baseline_layouts, nearest_candidates, unchanged_notes
from .naive import naive_layouts
from .results import E_GEO_SUFFIX, FLOOR, MODEL, Provenance, SlideEvaluation

_NEIGHBORS = 15  # of a cell, by which candidates and embedding are scored


def score_slide(
    predictor: Predictor,
    slide: Slide,
    *,
    noise_samples: int | None = None,
    baselines: bool | None = None,
    class_key: str | None = None,
    known: Sequence[Slide] = (),
    reference: Reference | None = None,
) -> SlideEvaluation:
    """Predict a slide and score the model, its ablations and the baselines; nothing is written.

    Args:
        predictor: the trained run.
        slide: cells with positions; those that hold information are scored.
        noise_samples: predictions under training noise, for the uncertainty; the run's setting if
            left out.
        baselines: whether to score the baselines; the run's setting if left out.
        class_key: obs column of cell classes, for the RSSD by class.
        known: training slides, onto which expression is matched as a further baseline.
        reference: training slide in whose frame the positions of this one were measured.

    Raises:
        UserError: if the slide has no positions, fewer than three cells, no such column, or the
            cells of the reference.
    """
    settings = predictor.config.eval
    slide = informative(predictor.conform(slide))
    if slide.pos is None:
        raise UserError(f"{slide.name}: no positions to score against; use `ipar-sparse predict`")
    if slide.num_cells < 3:
        raise UserError(f"{slide.name}: {slide.num_cells} cells are too few to score; give 3")
    if class_key is not None and class_key not in slide.obs:
        hint = suggest(class_key, slide.obs)
        raise UserError(f"{slide.name}: obs has no column {class_key!r} of classes; {hint}")
    classes = None if class_key is None else slide.obs[class_key]
    if reference is not None:
        refuse_reference_itself(reference, [slide])
    with stage("Predicting"):
        samples = settings.noise_samples if noise_samples is None else noise_samples
        prediction = predictor.predict(slide, noise_samples=samples)
    h = torch.from_numpy(prediction.embedding).to(predictor.device)
    layouts = {MODEL: prediction.pos}
    with stage("Ablations"):
        layouts |= ablation_layouts(predictor, prediction, h, slide.pos)
    with stage("Attention"):
        attention = attention_diagnostics(predictor, h, prediction, slide.pos)
    if settings.baselines if baselines is None else baselines:
        layouts |= _competitors(predictor, slide, prediction, attention.weights, known)
    layouts[FLOOR] = slide.pos
    if (typicality := prediction.typicality) is not None:
        typicality.tell(slide.name)
    methods = _score_layouts(layouts, slide.pos, predictor.config, classes)
    if reference is not None:
        methods[MODEL] |= _frame_errors(predictor, prediction, slide.pos, reference)
    return SlideEvaluation(
        slide=slide.name,
        pred=prediction.pos,
        true=slide.pos,
        methods=methods,
        measures=attention.measures
        | _measures(methods, prediction, slide.pos, predictor.config.uncertainty.disc_radius),
        focus=attention.focus,
        trajectory=prediction.trajectory,
        uncertainty=prediction.uncertainty,
        typicality=None if typicality is None else typicality.p_value,
        verdict=None if typicality is None else typicality.sentence(),
        layouts=layouts,
        cells=slide.cell_names,
        provenance=provenance_of(predictor, slide, prediction.cautions, unchanged_notes(layouts)),
    )


def _competitors(
    predictor: Predictor,
    slide: Slide,
    prediction: Prediction,
    attention: Tensor | None,
    known: Sequence[Slide],
) -> dict[str, np.ndarray]:
    """Layouts of all baselines, with training slides also of naive matches onto one of them."""
    with stage("Baselines", total=len(BASELINES)) as task:
        layouts = baseline_layouts(
            predictor, slide, prediction, attention, lambda name: task.advance(now=name)
        )
        if known and (genes := predictor.meta["genes"]):
            total = predictor.config.data.target_sum or 1e4
            conformed = [informative(predictor.conform(one)) for one in known]
            layouts |= naive_layouts(slide, conformed, genes, total)
    return layouts


def _frame_errors(
    predictor: Predictor, prediction: Prediction, pos: np.ndarray, reference: Reference
) -> dict[str, float]:
    """Median distance of all cells from their places, in units of the reference and in radii."""
    found = reference.similarity(predictor.frame_places(prediction)[0])
    error = float(np.median(np.linalg.norm(found - pos, axis=1)))
    radius = float(np.sqrt(np.square(pos - pos.mean(axis=0)).sum(axis=1).mean()))
    return {"frame_error": error, "frame_error_radii": error / radius}


def e_geo_of_layouts(
    layouts: Mapping[str, np.ndarray], pos: np.ndarray, seed: int
) -> dict[str, dict[str, float]]:
    """E_geo of layouts and its parts ``L_RW`` and ``L_stress``; 0 at the true coordinates.

    Exact up to 384 cells. Beyond, walks of the same reach are sampled, and compared on sampled
    rows.

    Args:
        layouts: method to layout (n, 2).
        pos: true positions (n, 2).
        seed: of both samples.
    """
    target = build_target(pos, seed=seed)
    found = {}
    for method, layout in layouts.items():
        generator = torch.Generator().manual_seed(seed)
        layout = torch.as_tensor(layout, dtype=torch.float64)
        values = e_geo(layout, target, generator=generator)
        names = {"E_geo": "e_geo", "L_RW": "l_rw", "L_stress": "l_stress"}
        # rounding noise must not show as -0.000
        found[method] = {name: round(float(values[key]), 12) + 0.0 for name, key in names.items()}
    return found


def _score_layouts(
    layouts: Mapping[str, np.ndarray],
    pos: np.ndarray,
    config: RunConfig,
    classes: np.ndarray | None,
) -> dict[str, dict[str, float]]:
    """Method to its metrics by flat name."""
    settings, methods = config.eval, {}
    with stage("Scoring", total=len(layouts)) as task:
        for name, layout in layouts.items():
            methods[name] = evaluate_layout(
                layout,
                pos,
                ks=tuple(settings.ks),
                num_pairs=settings.sample_pairs,
                num_rows=settings.sample_rows,
            )
            methods[name] |= published_metrics(layout, pos, classes)
            task.advance(now=name)
        for name, values in e_geo_of_layouts(layouts, pos, config.train.seed).items():
            methods[name] |= values
    return methods


def _measures(
    methods: Mapping[str, Mapping[str, float]],
    prediction: Prediction,
    pos: np.ndarray,
    disc_radius: float | None,
) -> dict[str, float]:
    """Flat measures of graph, embedding, uncertainty and typicality, and E_geo by its suffixes."""
    measures = {
        f"{name}_{suffix}": methods[method][name]
        for method, suffix in E_GEO_SUFFIX.items()
        if method in methods
        for name in ("E_geo", "L_RW", "L_stress")
    }
    candidates = prediction.candidates
    measures |= candidate_recall(candidates, pos, k=_NEIGHBORS)
    nearest = candidate_recall(nearest_candidates(candidates, _NEIGHBORS), pos, _NEIGHBORS)
    measures[f"embedding_hit@{_NEIGHBORS}"] = nearest[f"candidate_recall@{_NEIGHBORS}"]
    if candidates.recall is not None:
        measures["graph_recall"] = candidates.recall
    if prediction.uncertainty is not None:
        error = np.sqrt(square_errors(prediction.pos, pos))
        if np.ptp(prediction.uncertainty) > 0:
            order = spearmanr(prediction.uncertainty, error).statistic
            measures["uncertainty_error_spearman"] = float(order)
        measures |= calibration_metrics(prediction.uncertainty, error, disc_radius)
    if prediction.typicality is not None:
        measures |= {f"typicality_{k}": v for k, v in prediction.typicality.measures.items()}
    return measures


def provenance_of(
    predictor: Predictor, slide: Slide, cautions: Sequence[str] = (), notes: Sequence[str] = ()
) -> Provenance:
    """Where the prediction of a slide comes from.

    Args:
        predictor: the trained run.
        slide: what it placed; held out is known of slides with positions only.
        cautions: lines that must be read before the map is relied on.
        notes: lines on rows of the table, after those on how the slide was read.
    """
    slides = predictor.meta["metadata"]["slides"]
    return Provenance(
        training=[entry["name"] for entry in slides if entry["role"] == "train"],
        validation=[entry["name"] for entry in slides if entry["role"] == "val"],
        held_out=None if slide.pos is None else role_in_training(predictor, slide) is None,
        settings=predictor.config.model_dump(mode="json"),
        versions=_versions(),
        cautions=[*cautions, *(note for note in slide.notes if isinstance(note, Warned))],
        notes=[*(note for note in slide.notes if not isinstance(note, Warned)), *notes],
    )


def _versions() -> dict[str, str]:
    found = {"ipar_sparse": __version__, "python": platform.python_version()}
    for name in ("torch", "torch-geometric", "numpy", "scipy", "scikit-learn", "anndata"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
