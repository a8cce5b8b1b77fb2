"""Maps of cells: layouts, genes, recycles, attention, uncertainty."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize

from ..geometry.alignment import align
from ..geometry.neighborhoods import as_layout, unit_gauge
from ..metrics.diagnostics import AttentionFocus
from .style import (
    FAINT,
    INK,
    draw_subset,
    marker_area,
    new_axes,
    new_row,
    note_subset,
    scatter,
    tissue_axes,
)

# one axis is blue to orange, which red-green blindness keeps apart, the other dark to light
_CORNERS = {"low": ("#0B2A6B", "#7A2300"), "high": ("#8CD3F0", "#FFD166")}
_FOCUS = LinearSegmentedColormap.from_list("focus", ["#F3C98B", "#D55E00", "#5A1A00"])


def position_colors(pos) -> np.ndarray:
    """A colour for each cell by its place: blue to orange from left to right, dark to light up.

    Colours are interpolated in OKLab space between four corner colours, on coordinates clipped to
    their 1st to 99th percentile.

    Args:
        pos: layout (n, 2).

    Returns:
        RGB (n, 3) in [0, 1].
    """
    pos = as_layout(pos)
    low, high = np.quantile(pos, [0.01, 0.99], axis=0)
    u, v = np.clip((pos - low) / np.maximum(high - low, 1e-300), 0, 1).T[..., None]
    corners = {side: [to_oklab(_rgb(color)) for color in _CORNERS[side]] for side in _CORNERS}
    bottom = (1 - u) * corners["low"][0] + u * corners["low"][1]
    top = (1 - u) * corners["high"][0] + u * corners["high"][1]
    return from_oklab((1 - v) * bottom + v * top)


def layout(
    pos, color=None, *, ax: Axes | None = None, title: str | None = None, label: str | None = None
) -> Axes:
    """One map of cells.

    Args:
        pos: layout (n, 2).
        color: RGB of each cell (n, 3), or a value of each cell (n,), for which a colour bar is
            drawn; by position if left out.
        ax: where to draw.
        title: above the map.
        label: of the colour bar.
    """
    pos = as_layout(pos)
    ax = tissue_axes(new_axes(ax), title)
    color = position_colors(pos) if color is None else np.asarray(color)
    if len(color) != len(pos):
        raise ValueError(f"layout: {len(pos)} cells, but colours for {len(color)}")
    rows = draw_subset(len(pos))
    if color.ndim == 2:
        scatter(ax, pos[rows], c=color[rows])
    else:
        color = color.astype(float)
        rows = rows[np.argsort(color[rows], kind="stable")]  # high values lie on top
        drawn = scatter(ax, pos[rows], c=color[rows], cmap="viridis", norm=_robust(color))
        _colorbar(ax, drawn, label)
    note_subset(ax, len(rows), len(pos))
    return ax


def layout_pair(
    true,
    pred,
    color=None,
    *,
    axes: Sequence[Axes] | None = None,
    label: str | None = None,
    titles: tuple[str, str] = ("Measured", "Predicted"),
) -> np.ndarray:
    """Measured and predicted map side by side, the prediction aligned with the truth.

    Args:
        true: measured positions (n, 2).
        pred: predicted positions (n, 2), in any gauge.
        color: as in :func:`layout`; by *measured* position if left out, so that the predicted
            map shows where each part of the tissue went.
        axes: two axes.
        label: of the colour bars.
        titles: above the two maps.
    """
    axes = new_row(axes, 2, 4.2)
    aligned, _ = align(pred, true)
    color = position_colors(true) if color is None else color
    layout(true, color, ax=axes[0], title=titles[0], label=label)
    layout(aligned, color, ax=axes[1], title=titles[1], label=label)
    return axes


def trajectory(
    layouts: Sequence, *, true=None, axes: Sequence[Axes] | None = None, color=None
) -> np.ndarray:
    """The map before the first and after every recycle; cells keep their colour.

    Args:
        layouts: positions (n, 2) of each.
        true: measured positions, by which cells are coloured and the last layout is aligned; the
            last layout itself if left out.
        axes: one for each layout.
        color: RGB (n, 3) or values (n,) instead.
    """
    axes = new_row(axes, len(layouts), 2.6)
    goal = layouts[-1] if true is None else true
    color = position_colors(goal) if color is None else color
    _, transform = align(layouts[-1], goal)
    for r, (ax, pos) in enumerate(zip(axes, layouts, strict=True)):
        # one rotation for all: a layout that rotates from recycle to recycle should be seen to
        pos = unit_gauge(as_layout(pos)) @ transform.rotation
        layout(pos, color, ax=ax, title="initial" if r == 0 else f"recycle {r}")
    return axes


def attention_focus(
    pos, focus: Sequence[AttentionFocus], *, axes: Sequence[Axes] | None = None
) -> np.ndarray:
    """Where single cells attend: a star is the cell, dark large dots have most of its attention.

    Args:
        pos: positions (n, 2); measured ones show whether attention finds true neighbours.
        focus: one panel each.
        axes: one for each.
    """
    pos = as_layout(pos)
    axes = new_row(axes, len(focus), 2.9)
    rows = draw_subset(len(pos))
    for ax, one in zip(axes, focus, strict=True):
        tissue_axes(ax, one.label or f"cell {one.cell:,}")
        scatter(ax, pos[rows], c=FAINT)
        weights = np.asarray(one.weights, float)
        order = np.argsort(weights)
        share = weights[order] / max(weights.max(initial=0.0), 1e-300)
        size = np.clip(marker_area(ax, len(pos)), 8, 25)
        at = pos[np.asarray(one.neighbors)[order]]
        ax.scatter(
            *at.T, s=size * (0.4 + 1.6 * share), c=share, cmap=_FOCUS, vmin=0, vmax=1, linewidths=0
        )
        ax.scatter(*pos[one.cell], marker="*", s=150, c="#56B4E9", edgecolors=INK, linewidths=0.8)
        note_subset(ax, len(rows), len(pos))
    return axes


def uncertainty_map(pos, uncertainty, *, ax: Axes | None = None) -> Axes:
    """The map coloured by the uncertainty of each cell.

    Args:
        pos: layout (n, 2).
        uncertainty: predicted root mean square error of each cell (n,), in tissue radii.
        ax: where to draw.
    """
    return layout(pos, uncertainty, ax=ax, title="Uncertainty", label="tissue radii")


def _robust(values: np.ndarray) -> Normalize:
    known = values[np.isfinite(values)]
    if not len(known):
        return Normalize(0, 1)
    low, high = np.quantile(known, [0.01, 0.99])
    if high <= low:  # a gene that is expressed in fewer than one cell in a hundred
        low, high = known.min(), known.max()
    return Normalize(low, high if high > low else low + 1, clip=True)


def _colorbar(ax: Axes, drawn, label: str | None) -> None:
    bar = ax.get_figure().colorbar(drawn, ax=ax, shrink=0.75, pad=0.02, aspect=25)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2)
    if label:
        bar.set_label(label, fontsize=9)


def _rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255


# Ottosson (2020), OKLab: linear sRGB to cone responses, and those to lightness and two hues
_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_OPPONENT = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def to_oklab(rgb: np.ndarray) -> np.ndarray:
    """Colours (n, 3) in OKLab space, where distances are those that an eye sees."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _CONES.T) @ _OPPONENT.T


def from_oklab(lab: np.ndarray) -> np.ndarray:
    """RGB (n, 3) in [0, 1] of colours in OKLab space."""
    linear = (lab @ np.linalg.inv(_OPPONENT).T) ** 3 @ np.linalg.inv(_CONES).T
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
