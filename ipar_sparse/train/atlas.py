"""The initial layout of training slides by an atlas of themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import RunConfig
from ..estimators import Atlas
from ..geometry import gauge_fix
from .batches import EmbeddedSlide
from .loop import Loop


def fit_atlas(
    train: Sequence[EmbeddedSlide], others: Sequence[EmbeddedSlide], config: RunConfig, loop: Loop
) -> Atlas:
    """An atlas of the training slides, and the initial layout of all slides by it."""
    atlas = Atlas(train[0].h.size(1)).fit([(slide.h, slide.pos) for slide in train])
    atlas.to(loop.device)
    place_training_slides(atlas, train, others, config, loop)
    return atlas


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
