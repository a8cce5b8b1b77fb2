"""Procrustes analysis: one layout moved onto another, and slides rotated into one frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .neighborhoods import as_layout, unit_gauge

EmbeddedSlides = Sequence[tuple[Tensor | np.ndarray, Tensor | np.ndarray]]
"""Pairs (embedding (n_s, d), positions (n_s, 2)), one per slide."""


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
        """Whether the transform mirrors the layout."""
        return bool(np.linalg.det(self.rotation) < 0)

    def __call__(self, pos: Tensor | ArrayLike) -> np.ndarray:
        """Positions (n, 2) moved by this transform."""
        return self.scale * as_layout(pos) @ self.rotation + self.translation


def align(pred: Tensor | ArrayLike, true: Tensor | ArrayLike) -> tuple[np.ndarray, Similarity]:
    r"""Move a layout onto another by the best similarity transform, reflection allowed.

    .. math::
        \min_{s \ge 0,\, R^\top R = I,\, t} \; \sum_i \| s\, x_i R + t - y_i \|^2

    A layout that is a single point is moved to the centre of the other (s = 0).

    Args:
        pred: the layout to move (n, 2).
        true: the layout to move it onto (n, 2), any units.

    Returns:
        The moved layout (n, 2), float64, in the units of ``true``, and the transform.

    Raises:
        ValueError: if the shapes differ, or a value is not finite.
    """
    x, y = two_layouts(pred, true, min_points=1)
    w = np.full(len(x), 1 / len(x))
    centre_x, centre_y = w @ x, w @ y
    xc, yc = x - centre_x, y - centre_y
    size_x, size_y = np.abs(xc).max(), np.abs(yc).max()
    if size_x <= 64 * np.finfo(np.float64).eps * np.abs(x).max(initial=0.0) or size_y == 0:
        return np.tile(centre_y, (len(x), 1)), Similarity(0.0, np.eye(2), centre_y)
    xc, yc = xc / size_x, yc / size_y
    u, singular, vt = np.linalg.svd((w[:, None] * xc).T @ yc)
    rotation = u @ vt
    square = (w[:, None] * np.square(xc)).sum()
    scale = float(singular.sum() / square * size_y / size_x) if square > 0 else 0.0
    transform = Similarity(scale, rotation, centre_y - scale * centre_x @ rotation)
    return transform(x), transform


def square_displacement(moved: Tensor, pos: Tensor) -> Tensor:
    """Squared distance (n,) of every cell from another layout, once :func:`align` has moved it.

    Args:
        moved: the layout to move (n, 2), in any gauge.
        pos: the layout to move it onto (n, 2), on the same device.

    Returns:
        float64, on the device.
    """
    x, y = (layout.double() - layout.double().mean(0) for layout in (moved, pos))
    u, singular, vt = torch.linalg.svd(x.T @ y)
    scale = singular.sum() / x.square().sum().clamp(min=1e-300)
    return (scale * x @ (u @ vt) - y).square().sum(1)


def two_layouts(
    pred: Tensor | ArrayLike, true: Tensor | ArrayLike, min_points: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Two layouts of the same cells as float64 (n, 2), checked.

    Args:
        pred: predicted positions (n, 2).
        true: true positions (n, 2).
        min_points: least number of cells. Above 1, true positions must not be all one point.

    Raises:
        ValueError: if they are no layouts of the same cells, or nothing can be scored on them.
    """
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
    slides: EmbeddedSlides, *, ridge: float = 1.0, max_iter: int = 50
) -> list[np.ndarray]:
    r"""Rotate training slides into one frame, by the embedding that they share.

    Slides lie under the microscope rotated and mirrored, and a regression needs one frame for
    all. This is generalised Procrustes analysis (Gower 1975) without paired cells. A ridge
    regression from the embedding :math:`H_s` is fitted on the *other* slides. Each slide
    :math:`X_s`, in the unit gauge, is rotated to agree with it,

    .. math::
        R_s \leftarrow \arg\min_{R^\top R = I} \| X_s R - f_{-s}(H_s) \|_F^2,

    in turn until no slide moves. Reflections are allowed. The fit needs only
    :math:`H_s^\top H_s` and :math:`H_s^\top X_s` of each slide, so cells are read once, O(n d^2).
    Every slide is tried as the first frame; the solution of least disagreement is kept.

    Args:
        slides: pairs (embedding (n_s, d), positions (n_s, 2)), one per slide.
        ridge: penalty on standardised features, relative to the number of cells / 1000.
        max_iter: most rounds over the slides.

    Returns:
        Positions (n_s, 2) of each slide in the unit gauge and the common frame. That frame is the
        one of some slide.
    """
    features = standardize([as_embedding(h) for h, _ in slides])
    layouts = [unit_gauge(as_layout(pos, "training positions")) for _, pos in slides]
    if len(slides) == 1:
        return layouts
    # slides have equal weight, whatever their number of cells
    gram = [f.T @ f / len(f) for f in features]
    cross = [f.T @ x / len(f) for f, x in zip(features, layouts, strict=True)]
    best, rotations = np.inf, [np.eye(2)] * len(slides)
    for first in range(len(slides)):
        disagreement, found = _rotations_from(gram, cross, first, ridge / 1000, max_iter)
        if disagreement < best - 1e-12:
            best, rotations = disagreement, found
    return [x @ r for x, r in zip(layouts, rotations, strict=True)]


def as_embedding(h: Tensor | ArrayLike) -> np.ndarray:
    """An embedding as float64 (n, d) on the host.

    Raises:
        ValueError: if it is no matrix or a value is not finite.
    """
    x = h.detach().cpu().double().numpy() if torch.is_tensor(h) else np.asarray(h, np.float64)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(f"embedding must be a finite matrix (n, d); given shape {x.shape}")
    return x


def with_intercept(x: np.ndarray) -> np.ndarray:
    """Features (n, d) with a first column of ones (n, 1 + d)."""
    return np.concatenate([np.ones((len(x), 1)), x], axis=1)


def pooled_mean_and_std(embeddings: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and standard deviation (d,) over all cells; 1 for constant features."""
    pooled = np.concatenate(embeddings)
    scale = pooled.std(axis=0)
    return pooled.mean(axis=0), np.where(scale > 1e-12, scale, 1.0)


def standardize(embeddings: list[np.ndarray]) -> list[np.ndarray]:
    """Embeddings (n_s, d) at pooled mean 0 and variance 1, with an intercept (n_s, 1 + d)."""
    mean, scale = pooled_mean_and_std(embeddings)
    return [with_intercept((x - mean) / scale) for x in embeddings]


def solve_ridge(gram: np.ndarray, cross: np.ndarray, penalty: float) -> np.ndarray:
    """Ridge coefficients (d, 2) from Gram matrix (d, d) and cross products (d, 2).

    The first feature is the intercept, which is not penalised.
    """
    weight = np.full(len(gram), penalty)
    weight[0] = 1e-9 * (1 + penalty)  # keeps the system solvable
    return np.linalg.solve(gram + np.diag(weight), cross)


def _rotations_from(
    gram: list[np.ndarray], cross: list[np.ndarray], first: int, penalty: float, max_iter: int
) -> tuple[float, list[np.ndarray]]:
    """Rotations found from one slide's frame, and their mean squared disagreement."""
    count, zero = len(gram), np.zeros(())
    rotations: dict[int, np.ndarray] = {first: np.eye(2)}
    disagreement = np.inf
    for _ in range(max_iter):
        before, disagreement = disagreement, 0.0
        for s in [*range(first + 1, count), *range(first + 1)]:
            others = [o for o in range(count) if o != s and o in rotations]
            if not others:
                continue
            fitted = solve_ridge(
                sum((gram[o] for o in others), zero),
                sum((cross[o] @ rotations[o] for o in others), zero),
                penalty * len(others),
            )
            # X_s' f(H_s) = cross_s' fitted, so the best rotation needs no pass over cells
            u, singular, vt = np.linalg.svd(cross[s].T @ fitted)
            if s != first:
                rotations[s] = u @ vt
                agreement = singular.sum()
            else:
                agreement = np.trace(cross[s].T @ fitted)
            disagreement += 1 + np.trace(fitted.T @ gram[s] @ fitted) - 2 * agreement
        if before - disagreement < 1e-9:
            break
    return disagreement / count, [rotations[s] for s in range(count)]
