"""Ridge regression from embeddings to the aligned coordinates of training slides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..geometry.alignment import (
    align_slides,
    as_embedding,
    pooled_moments,
    solve_ridge,
    standardize,
    with_intercept,
)


def ridge_layout(h, train: Sequence[tuple]) -> np.ndarray:
    """Ridge regression from H to the aligned training coordinates.

    The penalty is the one that predicts each training slide best from the others
    (leave-one-slide-out; with one slide, from the other half of its cells).

    Args:
        h: embedding of the cells to lay out (n, d).
        train: pairs (embedding (n_s, d), positions (n_s, 2)) of training slides.

    Returns:
        (n, 2)
    """
    features, targets, mean, scale = aligned_training_set(train)
    folds = [(f, x) for f, x in zip(features, targets, strict=True)]
    if len(folds) == 1:
        (f, x), odd = folds[0], np.arange(len(features[0])) % 2 == 1
        folds = [(f[odd], x[odd]), (f[~odd], x[~odd])]
    gram = [f.T @ f for f, _ in folds]
    cross = [f.T @ x for f, x in folds]
    penalties = np.logspace(-4, 2, 13)
    errors = np.zeros(len(penalties))
    for held, (f, x) in enumerate(folds):
        others = [s for s in range(len(folds)) if s != held]
        count = sum(len(folds[s][0]) for s in others)
        a, b = sum(gram[s] for s in others), sum(cross[s] for s in others)
        for p, penalty in enumerate(penalties):
            errors[p] += np.square(f @ solve_ridge(a, b, penalty * count) - x).mean()
    count = sum(len(f) for f, _ in folds)
    chosen = penalties[errors.argmin()] * count
    query = with_intercept((as_embedding(h) - mean) / scale)
    return query @ solve_ridge(sum(gram), sum(cross), chosen)


def aligned_training_set(train):
    embeddings = [as_embedding(h) for h, _ in train]
    mean, scale = pooled_moments(embeddings)
    return standardize(embeddings), align_slides(train), mean, scale
