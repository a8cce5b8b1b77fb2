"""Maps of cells: layouts, genes, recycles, attention, uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex, to_rgba_array
from matplotlib.lines import Line2D

from ..data.keys import Keys
from ..geometry.alignment import align
from ..geometry.neighborhoods import as_layout, unit_gauge
from ..metrics.diagnostics import AttentionFocus
from .colors import (
    Coloring,
    Palette,
    color_by_key,
    color_of,
    positions_of,
    value_range,
    with_position,
)
from .oklab import from_oklab, to_oklab
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

if TYPE_CHECKING:
    from anndata import AnnData

CONTINUOUS = colormaps["viridis"].with_extremes(bad=FAINT)

# one axis is blue to orange, which red-green blindness keeps apart, the other dark to light
_CORNERS = {"low": ["#0B2A6B", "#7A2300"], "high": ["#8CD3F0", "#FFD166"]}
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
    corners = {side: to_oklab(to_rgba_array(colors)[:, :3]) for side, colors in _CORNERS.items()}
    bottom = (1 - u) * corners["low"][0] + u * corners["low"][1]
    top = (1 - u) * corners["high"][0] + u * corners["high"][1]
    return from_oklab((1 - v) * bottom + v * top)


def layout(
    cells,
    color=None,
    *,
    basis: str = "ipar",
    layer: str | None = None,
    palette: Palette = None,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
    title: str | None = None,
    label: str | None = None,
) -> Axes | np.ndarray:
    """One map of cells, or one for each of several keys.

    Args:
        cells: layout (n, 2), or AnnData, whose cells without a position are left out.
        color: RGB of each cell (n, 3), numbers (n,), or labels (n,); by position if left out. Of
            AnnData also an obs column, a gene, or a list of these.
        basis: of AnnData, where the layout lies: obsm["X_<basis>"] or obsm["<basis>"].
        layer: of AnnData, the layer of a gene's expression; X if left out.
        palette: colours of labels, by label or in their order; uns["<key>_colors"] if left out.
        ax: where to draw; one for each key of a list.
        title: above the map; the key if left out.
        label: of the colour bar.

    Returns:
        The axes; an array of them for a list of keys.

    Raises:
        UserError: AnnData has no such layout, column or gene.
        ValueError: there are not as many colours as cells.
    """
    pos, colors = _maps_of(cells, color, basis, layer, palette)
    if not isinstance(colors, list):
        return _draw_map(new_axes(cast(Axes | None, ax)), pos, colors, title or colors.name, label)
    axes = new_row(cast(Sequence[Axes] | None, ax), len(colors), 4.2)
    for one, shown in zip(axes, colors, strict=True):
        _draw_map(one, pos, shown, title or shown.name, label)
    return axes


def compare(
    slide: AnnData,
    color=None,
    *,
    basis: str = "ipar",
    measured: str = Keys.SPATIAL,
    layer: str | None = None,
    palette: Palette = None,
    axes: Sequence[Axes] | np.ndarray | None = None,
) -> np.ndarray:
    """Measured and predicted map of one slide side by side, the prediction turned to match.

    Args:
        slide: n cells with positions and a prediction.
        color: as in :func:`layout`; by *measured* position if left out, so that the predicted map
            shows where each part of the tissue went.
        basis: of the prediction.
        measured: obsm key of the measured positions.
        layer: layer of a gene's expression; X if left out.
        palette: colours of labels.
        axes: two for each key.

    Returns:
        Axes (2,), or (keys, 2) for a list of keys.

    Raises:
        UserError: the slide has no positions, no prediction, or no such column or gene.
    """
    true, colors = _maps_of(slide, color, measured, layer, palette)
    pred = positions_of(slide, basis)
    rows = colors if isinstance(colors, list) else [colors]
    if axes is None:
        _, axes = plt.subplots(
            len(rows), 2, figsize=(9.4, 4.6 * len(rows)), layout="constrained", squeeze=False
        )
    axes = np.ravel(np.asarray(axes, dtype=object)).reshape(-1, 2)
    for pair, shown in zip(axes, rows, strict=True):
        name = "" if shown.name is None else f", {shown.name}"
        titles = (f"Measured{name}", f"Predicted{name}")
        layout_pair(true, pred, shown, axes=pair, titles=titles)
    return axes if isinstance(colors, list) else axes[0]


def layout_pair(
    true,
    pred,
    color=None,
    *,
    axes: Sequence[Axes] | np.ndarray | None = None,
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
    if not isinstance(color, Coloring):
        color = color_of(position_colors(true) if color is None else color)
    _draw_map(axes[0], as_layout(true), color, titles[0], label, legend=False)
    _draw_map(axes[1], as_layout(aligned), color, titles[1], label)
    return axes


def _maps_of(
    cells, color, basis: str, layer: str | None, palette: Palette
) -> tuple[np.ndarray, Coloring | list[Coloring]]:
    """Positions (n, 2) and colours of a map; a list of colours for a list of keys."""
    if not hasattr(cells, "obsm"):
        pos = as_layout(cells)
        return pos, color_of(position_colors(pos) if color is None else color, palette)
    keys = isinstance(color, list | tuple) and all(isinstance(key, str) for key in color)
    placed = with_position(cells, basis)
    if not placed.all():
        cells = cells[placed]
        if color is not None and not isinstance(color, str) and not keys:
            color = np.asarray(color)[placed]
    pos = positions_of(cells, basis)
    if color is None:
        return pos, color_of(position_colors(pos))
    if isinstance(color, str):
        return pos, color_by_key(cells, color, layer=layer, palette=palette)
    if keys:
        return pos, [color_by_key(cells, key, layer=layer, palette=palette) for key in color]
    return pos, color_of(color, palette)


def _draw_map(
    ax: Axes,
    pos: np.ndarray,
    color: Coloring,
    title: str | None = None,
    label: str | None = None,
    *,
    legend: bool = True,
) -> Axes:
    tissue_axes(ax, title)
    values = color.values
    if len(values) != len(pos):
        raise ValueError(f"layout: {len(pos)} cells, but colours for {len(values)}")
    rows = draw_subset(len(pos))
    if values.ndim == 2:
        scatter(ax, pos[rows], c=values[rows])
        if color.labels and legend:
            _legend(ax, color.labels)
    else:
        # high values lie on top, cells without a value below all
        rows = rows[np.argsort(np.nan_to_num(values[rows], nan=-np.inf), kind="stable")]
        drawn = scatter(
            ax,
            pos[rows],
            c=values[rows],
            cmap=CONTINUOUS,
            norm=_robust(values),
            plotnonfinite=True,
        )
        _colorbar(ax, drawn, label)
    note_subset(ax, len(rows), len(pos))
    return ax


def _legend(ax: Axes, labels: dict[str, np.ndarray]) -> None:
    marks = [
        Line2D([], [], linestyle="", marker="o", markersize=6, color=to_hex(tuple(rgb)), label=name)
        for name, rgb in labels.items()
    ]
    ax.legend(
        handles=marks,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        ncols=1 + (len(marks) - 1) // 18,
        frameon=False,
        fontsize=8,
        handletextpad=0.2,
    )


def trajectory(
    layouts: Sequence, *, true=None, axes: Sequence[Axes] | np.ndarray | None = None, color=None
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
    pos, focus: Sequence[AttentionFocus], *, axes: Sequence[Axes] | np.ndarray | None = None
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
    color = color_of(uncertainty)
    return _draw_map(new_axes(ax), as_layout(pos), color, "Uncertainty", "tissue radii")


def _robust(values: np.ndarray) -> Normalize:
    low, high = value_range(values)
    return Normalize(low, high if high > low else low + 1, clip=True)


def _colorbar(ax: Axes, drawn, label: str | None) -> None:
    bar = ax.get_figure().colorbar(drawn, ax=ax, shrink=0.75, pad=0.02, aspect=25)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2)
    if label:
        bar.set_label(label, fontsize=9)
