"""Colours, axes and markers that all figures share."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

# Okabe and Ito (2008), without their yellow, which vanishes on white
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MODEL = "#0072B2"
INK = "#1F2933"
MUTED = "#6B7680"
FAINT = "#D9DEE3"
BACKGROUND = "#F7F8FA"

MAX_POINTS = 1_000_000


def new_axes(ax: Axes | None, size: tuple[float, float] = (4.2, 4.2)) -> Axes:
    """The given axes, or those of a new figure of ``size`` inches."""
    if ax is not None:
        return ax
    return plt.subplots(figsize=size, layout="constrained")[1]


def new_row(axes: Sequence[Axes] | np.ndarray | None, count: int, size: float = 3.2) -> np.ndarray:
    """``count`` axes side by side: the given ones, checked, or those of a new figure."""
    if axes is None:
        _, axes = plt.subplots(
            1, count, figsize=(size * count, size + 0.4), layout="constrained", squeeze=False
        )
    axes = np.ravel(np.asarray(axes, dtype=object))
    if len(axes) < count:
        raise ValueError(f"this figure has {count} panels; given {len(axes)} axes")
    return axes[:count]


def tidy(ax: Axes) -> Axes:
    """Plain axes for curves and bars: no box, faint grid behind."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(MUTED)
    ax.tick_params(colors=INK, labelsize=9)
    ax.grid(color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def tissue_axes(ax: Axes, title: str | None = None) -> Axes:
    """Axes for a layout: equal aspect, no ticks, since units and orientation mean nothing."""
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_facecolor(BACKGROUND)
    for spine in ax.spines.values():
        spine.set_color(FAINT)
    if title:
        ax.set_title(title, fontsize=10.5, color=INK)
    return ax


def draw_subset(n: int, seed: int = 0) -> np.ndarray:
    """Rows to draw, in random order, so that no group of cells hides another."""
    return np.random.default_rng(seed).permutation(n)[:MAX_POINTS]


def note_subset(ax: Axes, drawn: int, n: int) -> None:
    """Say under the axes how many of the cells are drawn, if not all."""
    if drawn < n:
        ax.set_xlabel(f"{drawn:,} of {n:,} cells drawn", fontsize=8, color=MUTED)


def marker_area(ax: Axes, n: int) -> float:
    """Marker area in square points with which n cells fill about half of the axes."""
    box, figure = ax.get_position(), ax.figure
    area = box.width * figure.bbox.width * box.height * figure.bbox.height
    area *= (72 / figure.dpi) ** 2
    return float(np.clip(0.45 * area / max(n, 1), 0.3, 70.0))


def scatter(ax: Axes, pos: np.ndarray, **settings):
    """A scatter of cells in a size for their number, rasterised in vector formats."""
    settings.setdefault("s", marker_area(ax, len(pos)))
    return ax.scatter(pos[:, 0], pos[:, 1], linewidths=0, rasterized=len(pos) > 2000, **settings)
