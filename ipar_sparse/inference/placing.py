"""What a trained run adds to AnnData: the same for files and for objects in memory."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import __version__
from ..config import DataConfig
from ..data import records
from ..data.input_profile import informative
from ..data.keys import Keys
from ..data.notes import Warned
from ..data.slide import Slide, in_file_order
from ..errors import UserError
from ..estimators.modes import AMBIGUOUS, SEPARATION
from ..geometry.alignment import align
from ..layout.uncertainty import widen
from ..progress import track
from .costs import check_prediction, slide_size
from .predictor import Prediction, Predictor
from .reference import Reference, refuse_reference_itself
from .run_folder import check_encoder
from .summary import frame_sentence
from .typicality import UNLIKE

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)


@dataclass
class Additions:
    """What is added to n cells, in their order in the file or object.

    The names are those of :func:`~ipar_sparse.data.writers.write_predictions`.

    Args:
        embedding: (n, d), for obsm["X_ipar_embedding"].
        obs: columns, each (n,).
        uns: for uns["ipar"].
        pos: positions (n, 2), for obsm["X_ipar"]; None where cells are only embedded.
        obsm: further arrays, each (n, ...).
    """

    embedding: np.ndarray
    obs: dict[str, np.ndarray]
    uns: dict[str, Any]
    pos: np.ndarray | None = None
    obsm: dict[str, np.ndarray] = field(default_factory=dict)


def read_cells(
    predictor: Predictor,
    source: str | os.PathLike | AnnData,
    data: DataConfig,
    *,
    require_pos: bool = False,
    name: str | None = None,
    slide_key_optional: bool = False,
    slides: Sequence[Slide] | None = None,
) -> list[Slide]:
    """The slides of a file or object in the terms of a run; their notes say what was done.

    Args:
        predictor: the trained run.
        source: AnnData file or object.
        data: how it is read; see :func:`~ipar_sparse.inference.run_folder.reading_settings`.
        require_pos, name, slide_key_optional: as in
            :func:`~ipar_sparse.data.readers.read_slides`.
        slides: what another process has read of the file.

    Raises:
        UserError: it cannot be read, or not be used with the run.
    """
    if slides is None:
        from ..data.readers import read_files  # anndata, which takes long to load

        slides = read_files(
            [source],
            data,
            require_pos=require_pos,
            names=[name],
            slide_key_optional=slide_key_optional,
        )
    return [predictor.conform(slide, data.ignore_case) for slide in slides]


def place_cells(
    predictor: Predictor,
    slides: Sequence[Slide],
    noise_samples: int | None = None,
    keep_empty: bool = False,
    reference: Reference | None = None,
    keep_foreign: bool = False,
    top: int | None = None,
    adapt: bool | None = None,
) -> Additions:
    """Positions, embedding, uncertainty and provenance of the cells of one file or object.

    Cells without counts in the genes of the run get NaN. Says so where a slide took part in the
    training of the run, or is unlike its slides.

    Args:
        predictor: the trained run.
        slides: all slides of the file or object.
        noise_samples: predictions under training noise; the run's setting if left out.
        keep_empty: give cells without counts the average place and the embedding of an average
            cell, with an uncertainty of one tissue radius.
        reference: training slide in whose frame and units positions are wanted as well.
        keep_foreign: give cells that do not belong to the tissue a position there, too.
        top: number of most probable places wanted of each cell, as well.
        adapt: whether the adapter for other assays places the cells; as the run is set if left out.

    Raises:
        UserError: a slide shares no gene with the run, lacks its embedding, has fewer than 15
            cells with counts, or holds the cells of the reference.
    """
    if reference is not None:
        refuse_reference_itself(reference, slides)
    if predictor.device.type == "cuda":
        free = torch.cuda.mem_get_info(predictor.device)[0]
        sizes = [slide_size(slide) for slide in slides]
        check_prediction(sizes, predictor.config, True, slides[0].name, free)
    samples = noise_samples or predictor.config.eval.noise_samples
    slides = [predictor.conform(slide) for slide in slides]
    for slide in slides:
        if role := role_in_training(predictor, slide):
            logger.warning(
                "%s %s: its map says nothing about how unseen slides are placed", slide.name, role
            )
    predictions = [
        predictor.predict(slide, noise_samples=samples, adapt=adapt)
        for slide in track(slides, "Placing cells")
    ]
    for slide, one in zip(slides, predictions, strict=True):
        if one.typicality is not None:
            one.typicality.tell(slide.name)
    obs, average = _empty_cells(slides), 0.0 if keep_empty else np.nan
    uncertainty = [one.uncertainty for one in predictions]
    obs[Keys.UNCERTAINTY] = _in_file_order(slides, uncertainty, 1.0 if keep_empty else np.nan)
    if Keys.TYPICALITY in certainty_columns(predictor):
        known = [one.typicality.p_value for one in predictions if one.typicality is not None]
        obs[Keys.TYPICALITY] = _in_file_order(slides, known, np.nan)
    added = Additions(
        pos=_in_file_order(slides, [one.pos for one in predictions], average),
        embedding=_in_file_order(slides, [one.embedding for one in predictions], average),
        obs=obs,
        uns={
            **_provenance(predictor, _graphs_of(slides, predictions)),
            **_certainty(predictor, slides, predictions),
            "adapted": {
                slide.name: one.adapted
                for slide, one in zip(slides, predictions, strict=True)
                if one.adapted is not None
            },
            "warnings": _warnings_of(slides) or None,
        },
    )
    hidden = [np.zeros(len(one.pos), dtype=bool) for one in predictions]
    if reference is not None:
        hidden = _add_in_frame(added, predictor, slides, predictions, reference, keep_foreign)
    if top is not None:
        _add_top(added, predictor, slides, predictions, reference, hidden, top)
    return added


def _add_in_frame(
    added: Additions,
    predictor: Predictor,
    slides: Sequence[Slide],
    predictions: Sequence[Prediction],
    reference: Reference,
    keep_foreign: bool,
) -> list[np.ndarray]:
    """Positions in the frame of a reference, their uncertainty, and what they rest on.

    Returns:
        For each slide, which of its cells have no position there (n,).
    """
    settings = predictor.config.typicality
    positions, errors, flags, hidden = [], [], [], []
    for one in predictions:
        place, variance = predictor.frame_places(one)
        pos, error = reference.similarity(place), reference.uncertainty(variance)
        foreign = np.zeros(len(pos), dtype=bool)
        if one.typicality is not None:
            p_value, unlike = one.typicality.p_value, one.typicality.verdict == UNLIKE
            foreign = p_value <= settings.foreign_p_value
            error = widen(error, p_value, settings.growth_below, unlike)
        if one.adapted is not None and one.uncertainty is not None:
            # cells of the slides' own assay, left out, tell too little of those of another
            error = np.maximum(error, one.uncertainty)
        flags.append(foreign)
        hidden.append(foreign & (not keep_foreign))
        positions.append(np.where(hidden[-1][:, None], np.nan, pos))
        errors.append(np.where(hidden[-1], np.nan, reference.radius * error))
    added.obsm[Keys.REFERENCE] = _in_file_order(slides, positions, np.nan)
    added.obs[Keys.UNCERTAINTY_REFERENCE] = _in_file_order(slides, errors, np.nan)
    added.obs[Keys.FOREIGN] = _in_file_order(slides, flags, False)
    count, total = sum(int(flag.sum()) for flag in flags), sum(len(flag) for flag in flags)
    added.uns["reference"] = {
        **reference.describe(),
        "foreign_p_value": settings.foreign_p_value,
        "foreign_cells": count,
        "foreign_kept": keep_foreign,
    }
    farther = "; cells of another assay lie farther off"
    adapted = any(one.adapted is not None for one in predictions)
    logger.info("in the frame of %s%s", frame_sentence(reference.frame), farther * adapted)
    if count:
        logger.warning(
            "%d of %d cells do not belong to the tissue (p-value up to %g): %s in the frame of %s",
            count,
            total,
            settings.foreign_p_value,
            "their positions mean little" if keep_foreign else "they have no position",
            reference.name,
        )
    return hidden


def _add_top(
    added: Additions,
    predictor: Predictor,
    slides: Sequence[Slide],
    predictions: Sequence[Prediction],
    reference: Reference | None,
    hidden: Sequence[np.ndarray],
    count: int,
) -> None:
    """The most probable places, in the frame of a reference or the gauge of the map."""
    places, weights = [], []
    for one, without in zip(predictions, hidden, strict=True):
        place, weight = predictor.top_places(one, count)
        move = align(predictor.frame_places(one)[0], one.pos)[1]
        if reference is not None:
            move = reference.similarity
        shown = np.isfinite(place).all(2)
        place[shown] = move(place[shown])
        place[without], weight[without] = np.nan, np.nan
        places.append(place)
        weights.append(weight)
    added.obsm[Keys.TOP] = _in_file_order(slides, places, np.nan)
    added.obsm[Keys.TOP_WEIGHT] = _in_file_order(slides, weights, np.nan)
    first = np.concatenate([weight[:, 0] for weight in weights])
    unsure, known = int((first < AMBIGUOUS).sum()), int(np.isfinite(first).sum())
    added.uns["top"] = {
        "places": count,
        "frame": Keys.PREDICTION if reference is None else Keys.REFERENCE,
        "separation": SEPARATION,
        "ambiguous_below": AMBIGUOUS,
        "ambiguous_cells": unsure,
    }
    logger.info(
        "for %d of %d cells one place does not suffice: the first weighs less than %g",
        unsure,
        known,
        AMBIGUOUS,
    )


def refuse_cells(
    predictor: Predictor,
    slides: Sequence[Slide],
    strict: bool = False,
    reference: Reference | None = None,
) -> None:
    """Refuses slides before any is placed.

    Args:
        predictor: the trained run.
        slides: all slides of a file or object.
        strict: whether slides that are unlike the training slides are refused.
        reference: whose own cells are refused.

    Raises:
        UserError: one is refused.
    """
    if reference is not None:
        refuse_reference_itself(reference, slides)
    for slide in slides if strict else ():
        found = predictor.compare(informative(predictor.conform(slide)))
        if found is not None and found.verdict == UNLIKE:
            raise UserError(found.sentence(slide.name))


def embed_cells(predictor: Predictor, slides: Sequence[Slide]) -> Additions:
    """The embedding of the cells of one file or object, and its provenance.

    Raises:
        UserError: the run has no encoder, or a slide shares no gene with it.
    """
    check_encoder(predictor.run)
    slides = [predictor.conform(slide) for slide in slides]
    embeddings = [predictor.embed(slide) for slide in track(slides, "Embedding")]
    return Additions(
        embedding=_in_file_order(slides, embeddings, np.nan),
        obs=_empty_cells(slides),
        uns=_provenance(predictor),
    )


def _warnings_of(slides: Sequence[Slide]) -> list[str]:
    """What may make the map of a slide wrong, in lines."""
    return [
        f"{slide.name}: {note}"
        for slide in slides
        for note in slide.notes
        if isinstance(note, Warned)
    ]


def certainty_columns(predictor: Predictor, reference: bool = False) -> tuple[str, ...]:
    """The obs columns that say how much to believe a position, as :func:`place_cells` fills.

    Args:
        predictor: the trained run.
        reference: whether positions are given in the frame of a reference, too.
    """
    known = (Keys.TYPICALITY,) if predictor.typicality is not None else ()
    framed = (Keys.UNCERTAINTY_REFERENCE, Keys.FOREIGN) if reference else ()
    return (Keys.UNCERTAINTY, *known, *framed)


def role_in_training(predictor: Predictor, slide: Slide) -> str | None:
    """See :func:`ipar_sparse.data.records.role_in_training`."""
    return records.role_in_training(predictor.recorded, slide)


def _in_file_order(
    slides: Sequence[Slide], values: Sequence[np.ndarray], fill: float
) -> np.ndarray:
    """Values of cells that hold information, in the order of the file; others are filled."""
    whole = []
    for slide, value in zip(slides, values, strict=True):
        if len(value) < slide.num_cells:
            every = np.full((slide.num_cells, *value.shape[1:]), fill, dtype=value.dtype)
            every[~slide.empty] = value
            value = every
        whole.append(value)
    return in_file_order(slides, whole)


def _empty_cells(slides: Sequence[Slide]) -> dict[str, Any]:
    """The obs column that flags cells without counts, where there are any."""
    flags = [np.asarray(slide.empty) for slide in slides]
    if not any(flag.any() for flag in flags):
        return {}
    return {Keys.EMPTY: in_file_order(slides, flags, fill=False)}


def _graphs_of(
    slides: Sequence[Slide], predictions: Sequence[Prediction]
) -> dict[str, dict[str, Any]]:
    """Slide name to how the graph attended to was found, and its recall (1 = exact)."""
    graphs = {}
    for slide, prediction in zip(slides, predictions, strict=True):
        found = prediction.graph
        graphs[slide.name] = {
            "k": found.k,
            "metric": found.metric,
            "method": found.method,
            "recall": 1.0 if found.recall is None else found.recall,
        }
    return graphs


def _certainty(
    predictor: Predictor, slides: Sequence[Slide], predictions: Sequence[Prediction]
) -> dict[str, Any]:
    """How much to believe the map: verdict of each slide, and how to read uncertainties."""
    law = predictor.config.uncertainty
    compared = {
        slide.name: one.typicality
        for slide, one in zip(slides, predictions, strict=True)
        if one.typicality is not None
    }
    return {
        "disc_radius": law.disc_radius,
        "calibrated": bool(law.calibrated),
        "verdict": {name: one.verdict for name, one in compared.items()},
        "typicality": {
            name: {"sentence": one.sentence(), **one.measures} for name, one in compared.items()
        },
    }


def _provenance(
    predictor: Predictor, graphs: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """What goes to ``uns["ipar"]``: version, run, its resolved configuration, and graphs."""
    return {
        "version": __version__,
        "run": str(predictor.run),
        "config": json.dumps(predictor.config.model_dump(mode="json")),
        "graphs": dict(graphs or {}),
    }
