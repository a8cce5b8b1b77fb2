"""Layouts laid onto one another, and slides brought into one frame (Procrustes analysis)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .neighborhoods import as_layout, unit_gauge


@dataclass(frozen=True)
class Similarity:
    """A similarity transform of the plane: ``x -> scale * x @ rotation + translation``.

    Args:
        scale: at least 0.
        rotation: orthogonal (2, 2); its determinant is -1 where it reflects.
        translation: (2,).
    """

    scale: float
    rotation: np.ndarray
    translation: np.ndarray

    @property
    def reflects(self) -> bool:
        """Whether the transform turns the layout over."""
        return bool(np.linalg.det(self.rotation) < 0)

    def __call__(self, pos) -> np.ndarray:
        """Positions (n, 2) moved by this transform."""
        return self.scale * as_layout(pos) @ self.rotation + self.translation


def align(pred, true, weights=None) -> tuple[np.ndarray, Similarity]:
    r"""Lay a layout onto another by the best similarity transform, reflection allowed.

    .. math::
        \min_{s \ge 0,\, R^\top R = I,\, t} \; \sum_i w_i \| s\, x_i R + t - y_i \|^2

    A layout collapsed to a point is laid onto the centre (s = 0).

    Args:
        pred: the layout to move (n, 2).
        true: the layout to meet (n, 2), in any units.
        weights: non-negative weight of each cell (n,); equal if left out. A transform fitted on
            some cells (weight 1) moves the others (weight 0) along.

    Returns:
        The moved layout (n, 2), float64, in the units of ``true``, and the transform.

    Raises:
        ValueError: if the shapes differ, a value is not finite, or no weight is positive.
    """
    x, y = two_layouts(pred, true, min_points=1)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != (len(x),) or not np.isfinite(w).all() or (w < 0).any() or not w.sum() > 0:
        raise ValueError(
            f"weights must be ({len(x)},), finite, non-negative and not all zero; "
            f"given shape {w.shape}"
        )
    w = w / w.sum()
    centre_x, centre_y = w @ x, w @ y
    xc, yc = x - centre_x, y - centre_y
    size_x, size_y = np.abs(xc).max(), np.abs(yc).max()
    if size_x <= 64 * np.finfo(np.float64).eps * np.abs(x).max(initial=0.0) or size_y == 0:
        return np.tile(centre_y, (len(x), 1)), Similarity(0.0, np.eye(2), centre_y)
    xc, yc = xc / size_x, yc / size_y
    u, singular, vt = np.linalg.svd((w[:, None] * xc).T @ yc)
    rotation = u @ vt
    spread = (w[:, None] * np.square(xc)).sum()
    scale = float(singular.sum() / spread * size_y / size_x) if spread > 0 else 0.0
    transform = Similarity(scale, rotation, centre_y - scale * centre_x @ rotation)
    return transform(x), transform


def two_layouts(pred, true, min_points: int = 3) -> tuple[np.ndarray, np.ndarray]:
    x = as_layout(pred, "predicted positions", min_points)
    y = as_layout(true, "true positions", min_points)
    if x.shape != y.shape:
        raise ValueError(
            f"predicted and true positions must be of the same cells; given {x.shape[0]} and "
            f"{y.shape[0]}"
        )
    if min_points > 1 and not unit_gauge(y).any():
        raise ValueError(
            "true positions are all one point, so nothing can be scored; check the coordinates"
        )
    return x, y


def align_slides(
    slides: Sequence[tuple], *, ridge: float = 1.0, max_iter: int = 50
) -> list[np.ndarray]:
    r"""Bring training slides, each known up to its own gauge, into one frame through H.

    Regression needs one frame for all slides, and slides come rotated and mirrored as they lay
    under the microscope. Generalised Procrustes analysis, with cells paired not one to one but
    through the embedding they share: each slide (unit gauge) is turned, reflection allowed, to
    agree best with what a ridge regression fitted on the *other* slides predicts for its cells,

    .. math::
        R_s \leftarrow \arg\min_{R^\top R = I} \| X_s R - f_{-s}(H_s) \|_F^2,

    over and over until no slide turns. The regression needs only each slide's
    :math:`H_s^\top H_s` and :math:`H_s^\top X_s`, so this costs O(n d^2) once. Every slide is
    tried as the first frame and the start that agrees best in the end is kept.

    Args:
        slides: pairs (embedding (n_s, d), positions (n_s, 2)), one a slide.
        ridge: penalty on standardised features, relative to the number of cells / 1000.
        max_iter: rounds at most.

    Returns:
        Positions (n_s, 2) of each slide in the unit gauge and in the common frame, which is that
        of one of the slides.
    """
    features = standardize([as_embedding(h) for h, _ in slides])
    layouts = [unit_gauge(as_layout(pos, "training positions")) for _, pos in slides]
    if len(slides) == 1:
        return layouts
    # slides count alike, whatever their number of cells
    gram = [f.T @ f / len(f) for f in features]
    cross = [f.T @ x / len(f) for f, x in zip(features, layouts, strict=True)]
    best, turns = np.inf, None
    for first in range(len(slides)):
        disagreement, found = _turn_slides(gram, cross, first, ridge / 1000, max_iter)
        if disagreement < best - 1e-12:
            best, turns = disagreement, found
    return [x @ r for x, r in zip(layouts, turns, strict=True)]


def as_embedding(h) -> np.ndarray:
    x = h.detach().cpu().double().numpy() if torch.is_tensor(h) else np.asarray(h, np.float64)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(f"embedding must be a finite matrix (n, d); given shape {x.shape}")
    return x


def with_intercept(x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones((len(x), 1)), x], axis=1)


def pooled_moments(embeddings: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    pooled = np.concatenate(embeddings)
    scale = pooled.std(axis=0)
    return pooled.mean(axis=0), np.where(scale > 1e-12, scale, 1.0)


def standardize(embeddings: list[np.ndarray]) -> list[np.ndarray]:
    mean, scale = pooled_moments(embeddings)
    return [with_intercept((x - mean) / scale) for x in embeddings]


def solve_ridge(gram: np.ndarray, cross: np.ndarray, penalty: float) -> np.ndarray:
    weight = np.full(len(gram), penalty)
    weight[0] = 1e-9 * (1 + penalty)  # the intercept is free
    return np.linalg.solve(gram + np.diag(weight), cross)


def _turn_slides(gram, cross, first, penalty, max_iter) -> tuple[float, list[np.ndarray]]:
    """Rotations from one start, and the mean squared disagreement they end with."""
    count = len(gram)
    turns: list[np.ndarray | None] = [None] * count
    turns[first] = np.eye(2)
    disagreement = np.inf
    for _ in range(max_iter):
        before, disagreement = disagreement, 0.0
        for s in [*range(first + 1, count), *range(first + 1)]:
            others = [o for o in range(count) if o != s and turns[o] is not None]
            if not others:
                continue
            fitted = solve_ridge(
                sum(gram[o] for o in others),
                sum(cross[o] @ turns[o] for o in others),
                penalty * len(others),
            )
            # X_s' f(H_s) = cross_s' fitted, so the best turn needs no pass over cells
            u, singular, vt = np.linalg.svd(cross[s].T @ fitted)
            if s != first:
                turns[s] = u @ vt
                agreement = singular.sum()
            else:
                agreement = np.trace(cross[s].T @ fitted)
            disagreement += 1 + np.trace(fitted.T @ gram[s] @ fitted) - 2 * agreement
        if before - disagreement < 1e-9:
            break
    return disagreement / count, turns
