"""Ridge regression from embeddings to the aligned coordinates of training slides."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from ..geometry.alignment import (
    EmbeddedSlides,
    align_slides,
    as_embedding,
    pooled_mean_and_std,
    solve_ridge,
    standardize,
    with_intercept,
)


def ridge_layout(h: Tensor | ArrayLike, train: EmbeddedSlides) -> np.ndarray:
    """Positions by ridge regression from the embedding to aligned training coordinates.

    The penalty is chosen by leave-one-slide-out cross-validation. With one slide, every second
    cell is left out instead.

    Args:
        h: embedding of the cells to place (n, d).
        train: pairs (embedding (n_s, d), positions (n_s, 2)) of training slides.

    Returns:
        Positions (n, 2), float64, in RMS radii of a slide.
    """
    features, targets, mean, scale = aligned_training_set(train)
    folds = list(zip(features, targets, strict=True))
    if len(folds) == 1:
        (f, x), odd = folds[0], np.arange(len(features[0])) % 2 == 1
        folds = [(f[odd], x[odd]), (f[~odd], x[~odd])]
    gram = [f.T @ f for f, _ in folds]
    cross = [f.T @ x for f, x in folds]
    penalties = np.logspace(-4, 2, 13)
    errors = np.zeros(len(penalties))
    for left_out, (f, x) in enumerate(folds):
        others = [s for s in range(len(folds)) if s != left_out]
        count = sum(len(folds[s][0]) for s in others)
        a, b = sum(gram[s] for s in others), sum(cross[s] for s in others)
        for p, penalty in enumerate(penalties):
            errors[p] += np.square(f @ solve_ridge(a, b, penalty * count) - x).mean()
    count = sum(len(f) for f, _ in folds)
    selected = penalties[errors.argmin()] * count
    query = with_intercept((as_embedding(h) - mean) / scale)
    return query @ solve_ridge(sum(gram), sum(cross), selected)


def aligned_training_set(
    train: EmbeddedSlides,
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
    """Training slides as a regression takes them.

    Args:
        train: pairs (embedding (n_s, d), positions (n_s, 2)).

    Returns:
        Standardised features with an intercept (n_s, 1 + d) and aligned positions (n_s, 2) of
        each slide; mean (d,) and standard deviation (d,) of the embeddings.
    """
    embeddings = [as_embedding(h) for h, _ in train]
    mean, scale = pooled_mean_and_std(embeddings)
    return standardize(embeddings), align_slides(train), mean, scale
