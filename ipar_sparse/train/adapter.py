"""Fits what places cells of another assay; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..data.held import holders_of, of_held
from ..data.input_profile import InputProfile
from ..data.slide import Slide
from ..estimators import Adapter, Atlas
from ..estimators.adapter import Reference, spatial_neighbors
from ..inference.adapting import shares_of
from ..progress import stage
from .loop import TrainingLoop
from .members import read_inputs

_CELLS = 20_000  # of a slide, that weights of genes are estimated on


def fit_adapter(
    slides: Sequence[Slide], atlas: Atlas, genes: Sequence[str] | None, loop: TrainingLoop
) -> None:
    """Remember training cells by their expression.

    There is no adapter on an embedding, or on values that cannot be turned into shares.

    Args:
        slides: training slides.
        atlas: fitted on them, in the same order.
        genes: of the run.
        loop: takes up what is fitted.
    """
    profile = InputProfile.from_dict(read_inputs(loop.out).get("profile"))
    if genes is None or profile is None or profile.scaling == "as given":
        return
    with stage("Adapter"):

        def reference(pair: tuple[Slide, Any]) -> Reference:
            slide, near = _sample(pair[0], loop.device)
            pos, frame = np.asarray(slide.pos), pair[1]
            places = (pos - frame.translation) @ frame.rotation.T / max(frame.scale, 1e-12)
            return Reference(shares_of(slide, genes, profile)[0], pos, places, near)

        pairs, holders = list(zip(slides, atlas.frames, strict=True)), holders_of(slides)
        found = Adapter(len(genes)).fit(of_held(pairs, reference, holders), holders)
        loop.modules["adapter"] = found.to(loop.device)
        loop.state.metadata["adapter"] = {"cells": found.cells, "slides": len(slides)}


def _sample(slide: Slide, device: torch.device) -> tuple[Slide, np.ndarray]:
    """Some cells of a slide, their spatial neighbours behind them, and where these stand."""
    near = spatial_neighbors(slide.pos, device)
    if slide.num_cells <= _CELLS:
        return slide, near
    some = np.random.default_rng(0).permutation(slide.num_cells)[:_CELLS]
    others = np.setdiff1d(near[some], some)
    rows = np.concatenate([some, others])
    number = np.zeros(slide.num_cells, dtype=np.int64)
    number[rows] = np.arange(len(rows))
    return slide.take(rows), number[near[some]]
