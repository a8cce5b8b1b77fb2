"""What a trained run adds to AnnData: the same for files and for objects in memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import __version__
from ..data.keys import Keys
from ..data.slide import Slide, slide_digest
from ..data.writers import in_file_order
from ..progress import track
from .predictor import Prediction, Predictor
from .run_folder import check_encoder

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
    """

    embedding: np.ndarray
    obs: dict[str, np.ndarray]
    uns: dict[str, Any]
    pos: np.ndarray | None = None


def place_cells(
    predictor: Predictor, slides: Sequence[Slide], noise_samples: int | None = None
) -> Additions:
    """Positions, embedding, uncertainty and provenance of the cells of one file or object.

    Says so where a slide took part in the training of the run.

    Args:
        predictor: the trained run.
        slides: all slides of the file or object.
        noise_samples: predictions under training noise; the run's setting if left out.

    Raises:
        UserError: a slide shares no gene with the run, or lacks its embedding.
    """
    samples = noise_samples or predictor.config.eval.noise_samples
    for slide in slides:
        if role := role_in_training(predictor, slide):
            logger.warning(
                "%s %s: its map says nothing about how unseen slides are placed", slide.name, role
            )
    predictions = [
        predictor.predict(slide, noise_samples=samples) for slide in track(slides, "Placing cells")
    ]
    obs = _empty_cells(slides)
    for column in uncertainty_columns(predictor, noise_samples):
        known = [one.uncertainty for one in predictions if one.uncertainty is not None]
        obs[column] = in_file_order(slides, known)
    return Additions(
        pos=in_file_order(slides, [one.pos for one in predictions]),
        embedding=in_file_order(slides, [one.embedding for one in predictions]),
        obs=obs,
        uns=_provenance(predictor, _graphs_of(slides, predictions)),
    )


def embed_cells(predictor: Predictor, slides: Sequence[Slide]) -> Additions:
    """The embedding of the cells of one file or object, and its provenance.

    Raises:
        UserError: the run has no encoder, or a slide shares no gene with it.
    """
    check_encoder(predictor.run)
    embeddings = [predictor.embed(slide) for slide in track(slides, "Embedding")]
    return Additions(
        embedding=in_file_order(slides, embeddings),
        obs=_empty_cells(slides),
        uns=_provenance(predictor),
    )


def uncertainty_columns(predictor: Predictor, noise_samples: int | None = None) -> tuple[str, ...]:
    """The obs columns of uncertainty that :func:`place_cells` fills: one, or none."""
    samples = noise_samples or predictor.config.eval.noise_samples
    return (Keys.UNCERTAINTY,) if samples > 1 or predictor.atlas is not None else ()


def role_in_training(predictor: Predictor, slide: Slide) -> str | None:
    """What a slide with positions did in the training of a run, as a verb; None if nothing."""
    if slide.pos is None:
        return None
    roles = {one["digest"]: one["role"] for one in predictor.meta["metadata"]["slides"]}
    did = {"train": "was trained on", "val": "decided when training stopped"}
    return did.get(roles.get(slide_digest(slide)))


def _empty_cells(slides: Sequence[Slide]) -> dict[str, Any]:
    """The obs column that flags cells without counts, where there are any."""
    flags = [np.asarray(slide.empty) for slide in slides]
    if not any(flag.any() for flag in flags):
        return {}
    return {Keys.EMPTY: in_file_order(slides, flags, fill=False)}


def _graphs_of(
    slides: Sequence[Slide], predictions: Sequence[Prediction]
) -> dict[str, dict[str, Any]]:
    """Slide name to how its candidate graph was found, and its recall (1 = exact)."""
    graphs = {}
    for slide, prediction in zip(slides, predictions, strict=True):
        found = prediction.candidates
        graphs[slide.name] = {
            "k": found.k,
            "metric": found.metric,
            "method": found.method,
            "recall": 1.0 if found.recall is None else found.recall,
        }
    return graphs


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
