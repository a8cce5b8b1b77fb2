"""How far cells land from their true places in the frame of a slide that an atlas did not see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..geometry.alignment import EmbeddedSlides, align_slides
from ..geometry.neighborhoods import unit_gauge
from .atlas import Atlas

_CELLS = 5000  # of a slide, from which an atlas is fitted here
_PLACED = 2000  # of a left-out slide
_PARTS = 4  # of an only slide, left out in turn


class FrameError(NamedTuple):
    """Errors of the cells of one slide, placed by an atlas that was fitted without them.

    Args:
        median: distance of a cell from its true place, in RMS radii of the slide.
        variance_ratio: mean square of that distance over the mean predictive variance.
    """

    median: float
    variance_ratio: float


def frame_errors(slides: EmbeddedSlides, left_out: Sequence[Sequence[int]]) -> list[FrameError]:
    """Errors of slides that are left out of the atlas.

    All slides are turned into one frame together: how a slide lies in it is known. Its cells are
    then placed by an atlas of the slides that are not left out with it.

    Args:
        slides: pairs (embedding (n_s, d), positions (n_s, 2)).
        left_out: numbers of the slides that are left out together, group by group.

    Returns:
        One for each number, in the order given.
    """
    pairs = [_some(h, pos, _CELLS) for h, pos in slides]
    places = align_slides(pairs)
    found = []
    for group in left_out:
        rest = [i for i in range(len(pairs)) if i not in group]
        atlas = _atlas([pairs[i] for i in rest], [places[i] for i in rest])
        found += [_summary([_errors(atlas, pairs[i][0], places[i])]) for i in group]
    return found


def errors_within(h: Tensor, pos: Tensor | np.ndarray) -> FrameError:
    """Errors of the cells of an only slide: random quarters of them are left out in turn.

    Args:
        h: embedding (n, d).
        pos: positions (n, 2).
    """
    h, pos = _some(h, pos, _CELLS)  # in random order
    places, part = unit_gauge(pos), np.arange(len(pos)) % _PARTS
    found = []
    for number in range(min(_PARTS, len(pos))):
        rest = part != number
        atlas = _atlas([(h[rest], pos[rest])], [places[rest]])
        found.append(_errors(atlas, h[~rest], places[~rest]))
    return _summary(found)


def _atlas(slides: EmbeddedSlides, places: Sequence[np.ndarray]) -> Atlas:
    return Atlas(slides[0][0].shape[1]).fit(slides, places)


def _some(
    h: Tensor | np.ndarray, pos: Tensor | np.ndarray, count: int
) -> tuple[Tensor, np.ndarray]:
    """At most so many cells, drawn at random, on the host."""
    embedding, places = (torch.as_tensor(values).detach().cpu() for values in (h, pos))
    rows = torch.from_numpy(np.random.default_rng(0).permutation(len(places))[:count])
    return embedding.float()[rows], places.double()[rows].numpy()


def _errors(atlas: Atlas, h: Tensor, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Square error and predictive variance of each cell (n,)."""
    found, variance = atlas.mean_and_variance(h[:_PLACED])
    square = np.square(found.double().numpy() - places[:_PLACED]).sum(1)
    return square, variance.double().numpy()


def _summary(found: Sequence[tuple[np.ndarray, np.ndarray]]) -> FrameError:
    square, variance = (np.concatenate(values) for values in zip(*found, strict=True))
    ratio = square.mean() / max(variance.mean(), 1e-12)
    return FrameError(float(np.median(np.sqrt(square))), float(ratio))
