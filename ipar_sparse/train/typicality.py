"""Fits what tells new cells from the training cells, without training anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..config import RunConfig
from ..data.held import holders_of, of_held
from ..data.slide import Slide
from ..estimators import Typicality
from ..inference.modules import build_typicality
from ..inference.typicality import features_of
from ..progress import stage
from .loop import TrainingLoop

_FOLDS = 4  # at most


def fit_typicality(
    slides: Sequence[Slide],
    donors: Mapping[str, str] | None,
    genes: Sequence[str] | None,
    config: RunConfig,
    loop: TrainingLoop | None = None,
) -> Typicality:
    """Remember training cells, and calibrate on donors or quarters of slides left out in turn.

    Args:
        slides: training slides.
        donors: slide name to donor; every slide is its own donor if left out.
        genes: of the run; None where embeddings are brought along.
        config: of the run, without open values.
        loop: takes up what is fitted.
    """
    with stage("Typicality"):
        target_sum, holders = config.data.target_sum or 1e4, holders_of(slides)
        filled = [np.flatnonzero(~np.asarray(slide.empty)) for slide in slides]
        features = of_held(
            list(zip(slides, filled, strict=True)),
            lambda one: features_of(one[0], genes, target_sum)[one[1]],
            holders,
        )
        total = slides[0].embedding.shape[1] if genes is None else len(genes)
        sizes = {"width": min(config.typicality.genes, total), "features": total}
        folds = [
            fold[rows] for fold, rows in zip(donor_or_quarter(slides, donors), filled, strict=True)
        ]
        found = build_typicality(config, sizes)
        found.fit(features, folds, config.typicality.cells, holders)
        if loop is not None:
            loop.modules["typicality"] = found.to(loop.device)
            loop.state.metadata["typicality"] = found.sizes
    return found


def donor_or_quarter(slides: Sequence[Slide], donors: Mapping[str, str] | None) -> list[np.ndarray]:
    """Fold of each cell (n_s,) of each slide: its donor's, or the quarter of the slide it lies in.

    Donors are put in four folds at most. With one donor, each slide is cut at the medians of both
    coordinates.

    Args:
        slides: training slides.
        donors: slide name to donor; every slide is its own donor if left out.
    """
    names = [(donors or {}).get(slide.name, slide.name) for slide in slides]
    known = list(dict.fromkeys(names))
    if len(known) > 1:
        return [
            np.full(slide.num_cells, known.index(name) % _FOLDS)
            for slide, name in zip(slides, names, strict=True)
        ]
    found = []
    for slide in slides:
        # by rank, so that no quarter is empty where many cells share a coordinate
        half = [
            np.argsort(np.argsort(axis, kind="stable")) >= slide.num_cells // 2
            for axis in np.asarray(slide.pos).T
        ]
        found.append(2 * half[0].astype(int) + half[1])
    return found
