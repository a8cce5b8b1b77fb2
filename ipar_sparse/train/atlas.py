"""The atlas of a run: the frames of its slides, their errors, and the initial layout."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..config import RunConfig
from ..estimators import Atlas
from ..estimators.frames import FrameError, errors_within, frame_errors
from ..geometry import gauge_fix
from .batches import EmbeddedSlide
from .loop import Loop

logger = logging.getLogger(__name__)


def fit_atlas(
    train: Sequence[EmbeddedSlide], others: Sequence[EmbeddedSlide], config: RunConfig, loop: Loop
) -> Atlas:
    """An atlas of the training slides, and the initial layout by it where the run begins so."""
    atlas = Atlas(train[0].h.size(1)).fit([(slide.h, slide.pos) for slide in train])
    atlas.to(loop.device)
    if config.model.init == "atlas":
        place_training_slides(atlas, train, others, config, loop)
    loop.state.metadata["atlas_cells"] = atlas.cells
    return atlas


def describe_frames(
    atlas: Atlas,
    train: Sequence[EmbeddedSlide],
    donors: Mapping[str, str] | None,
    validated: Mapping[str, Sequence[float]],
    loop: Loop,
) -> None:
    """Records the frame of each training slide, and how far cells lie from their places in it.

    Errors are those of cross-validation, whose encoders did not see the slide either. Slides that
    it did not leave out are taken to be like those that it did. Without any, slides are left out of
    the atlas alone.

    Args:
        atlas: of the training slides.
        train: these slides.
        donors: slide name to donor; every slide is its own donor if left out.
        validated: errors in the frame by name of slide, from cross-validation.
        loop: its metadata take what is found.
    """
    how, errors = _errors(train, donors, validated)
    digests = {
        one["name"]: one["digest"]
        for one in loop.state.metadata["slides"]
        if one["role"] == "train"
    }
    frames: list[dict[str, Any]] = []
    for slide, frame, error in zip(train, atlas.frames, errors, strict=True):
        frames.append(
            {
                "name": slide.name,
                "digest": digests[slide.name],
                "radius": frame.scale,
                "rotation": frame.rotation.tolist(),
                "centre": frame.translation.tolist(),
                "median_error": error.median,
                "variance_ratio": error.variance_ratio,
                "left_out": how[slide.name in validated],
            }
        )
    loop.state.metadata["frames"] = frames


def _errors(
    train: Sequence[EmbeddedSlide],
    donors: Mapping[str, str] | None,
    validated: Mapping[str, Sequence[float]],
) -> tuple[tuple[str, str], list[FrameError]]:
    """How slides were left out, those of the cross-validation last; and the error of each."""
    if validated:
        usual = FrameError(*np.mean(list(validated.values()), axis=0).tolist())
        found = [FrameError(*validated.get(slide.name, usual)) for slide in train]
        return (
            "as slides that cross-validation left out",
            "left out of everything in cross-validation",
        ), found
    pairs = [(slide.h, slide.pos) for slide in train]
    if len(train) == 1:
        how = "left out of the atlas alone, by random quarters"
        return (how, how), [errors_within(*pairs[0])]
    groups: dict[str, list[int]] = {}
    for number, slide in enumerate(train):
        groups.setdefault((donors or {}).get(slide.name, slide.name), []).append(number)
    how, members = "left out of the atlas alone, with all of its donor", list(groups.values())
    if len(members) == 1 or len(members) == len(train):
        how, members = "left out of the atlas alone", [[i] for i in range(len(train))]
    found = frame_errors(pairs, members)
    order = np.argsort([number for group in members for number in group])
    return (how, how), [found[i] for i in order]


def place_training_slides(
    atlas: Atlas,
    train: Sequence[EmbeddedSlide],
    others: Sequence[EmbeddedSlide],
    config: RunConfig,
    loop: Loop,
) -> None:
    """Set the initial layout of slides by an atlas of some of them.

    An atlas knows its own slides too well. Their cells are placed under the noise of training and
    without the cells most like them, which are themselves; else the model would learn to trust
    their places more than those on a new slide. Placed by an atlas of the other slides, which
    is worse than that of all, they teach it to trust too little. No dimension takes more noise
    than it varies: an atlas weighs dimensions by how little they leave unsaid.

    Args:
        atlas: of ``train``.
        train: its own slides.
        others: slides that it was not fitted on.
        config: ``train.noise_h``.
        loop: random numbers and device.
    """
    spread = torch.stack([slide.h.std(0, correction=0) for slide in train]).mean(0)
    level = spread.clamp(max=config.train.noise_h)
    for number, slide in enumerate((*train, *others)):
        seen, h = number < len(train), slide.h
        if seen:
            generator = loop.generator("atlas", number, h.device)
            h = h + level * torch.randn(h.shape, generator=generator, device=h.device)
        slide.initial = gauge_fix(atlas(h, nearest=not seen))
