"""Scores as figures: bars against baselines, distance against distance, calibration."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from ..geometry.neighborhoods import as_layout, sample_pairs, unit_gauge
from ..metrics.layout import metric_info
from .style import INK, MODEL, MUTED, new_axes, tidy

_PAIRS = 200_000
_DENSITY = LinearSegmentedColormap.from_list("density", ["#D3E3F0", "#5B9BCB", "#08306B"])


def metric_dots(
    values: Mapping[str, Mapping[str, float]],
    metric: str,
    *,
    errors: Mapping[str, float | None] | None = None,
    strong: Collection[str] = (),
    lines: Mapping[str, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """One metric over many slides: a dot for the mean of each method, faint dots for its slides.

    Args:
        values: method to the value on each slide, top to bottom.
        metric: its flat name.
        errors: standard error of each mean; whiskers span two of them.
        strong: methods in strong colour.
        lines: name to a value drawn through all rows, at most three.
        ax: where to draw.
    """
    names = [name for name in values if values[name]]
    ax = tidy(new_axes(ax, (4.6, 0.8 + 0.28 * max(len(names), 1))))
    ax.grid(axis="y", visible=False)
    errors = errors or {}
    for place, name in enumerate(names):
        slides = np.array(list(values[name].values()))
        color = MODEL if name in strong else MUTED
        ax.scatter(slides, np.full(len(slides), place), s=11, color=color, alpha=0.28, lw=0)
        spread = 2 * (errors.get(name) or 0.0)
        ax.errorbar(
            slides.mean(),
            place,
            xerr=spread or None,
            fmt="o",
            ms=6,
            color=color,
            elinewidth=1.6,
            capsize=3,
        )
    for style, (label, value) in zip((":", "--", "-."), (lines or {}).items(), strict=False):
        ax.axvline(value, color=MUTED, lw=1.1, ls=style, label=label)
    if lines:
        ax.legend(fontsize=8, frameon=False, loc="upper right", bbox_to_anchor=(1.0, -0.06))
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    info = metric_info(metric)
    ax.set_title(info.label, fontsize=10, color=INK, loc="left")
    arrow = f"{info.better} is better" if info.better else ""
    ax.set_xlabel(arrow, fontsize=8.5, color=MUTED, loc="left")
    return ax


def distance_density(
    pred, true, *, ax: Axes | None = None, seed: int = 0, title: str | None = None
) -> Axes:
    """Predicted against true distance of pairs of cells; a perfect map is the diagonal.

    Both are in units of the tissue's root-mean-square radius, and the prediction has its best
    scale. All pairs are drawn on small slides, else a random 200,000.

    Args:
        pred: predicted layout (n, 2).
        true: measured layout (n, 2).
        ax: where to draw.
        seed: of the random pairs.
        title: above the axes.
    """
    x, y = unit_gauge(as_layout(pred)), unit_gauge(as_layout(true))
    if len(x) * (len(x) - 1) // 2 <= _PAIRS:
        first, second = np.triu_indices(len(x), 1)
    else:
        first, second = sample_pairs(len(x), _PAIRS, np.random.default_rng(seed))
    d = np.linalg.norm(x[first] - x[second], axis=1)
    delta = np.linalg.norm(y[first] - y[second], axis=1)
    d = d * ((d * delta).sum() / max(np.square(d).sum(), 1e-300))
    ax = tidy(new_axes(ax))
    top = 1.02 * max(d.max(initial=0.0), delta.max(initial=0.0), 1e-12)
    drawn = ax.hexbin(
        delta,
        d,
        gridsize=55,
        bins="log",
        mincnt=1,
        extent=(0, top, 0, top),
        cmap=_DENSITY,
        linewidths=0.1,
    )
    ax.plot([0, top], [0, top], color="#D55E00", lw=1.4, ls="--", label="perfect map")
    ax.set_xlim(0, top)
    ax.set_ylim(0, top)
    ax.set_aspect("equal")
    ax.set_xlabel("true distance (tissue radii)")
    ax.set_ylabel("predicted distance")
    ax.legend(fontsize=8, frameon=False, loc="upper left")
    bar = ax.get_figure().colorbar(drawn, ax=ax, shrink=0.75, pad=0.02, aspect=25)
    bar.set_label("pairs of cells", fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2)
    if title:
        ax.set_title(title, fontsize=10.5, color=INK)
    return ax


def uncertainty_calibration(uncertainty, error, *, ax: Axes | None = None, bins: int = 10) -> Axes:
    """Error against uncertainty, root mean squares in bins of equal size, with the diagonal.

    Args:
        uncertainty: of each cell (n,), in tissue radii.
        error: its distance from the measured position after alignment (n,), same unit.
        ax: where to draw.
        bins: number of bins, fewer on few cells.
    """
    uncertainty, error = np.asarray(uncertainty, float), np.asarray(error, float)
    if uncertainty.shape != error.shape or uncertainty.ndim != 1:
        raise ValueError(
            f"uncertainty_calibration needs two values a cell; given {uncertainty.shape} "
            f"and {error.shape}"
        )
    ax = tidy(new_axes(ax))
    parts = np.array_split(np.argsort(uncertainty), max(1, min(bins, len(error) // 5)))
    predicted = [np.sqrt(np.square(uncertainty[part]).mean()) for part in parts]
    observed = np.sqrt([np.square(error[part]).mean() for part in parts])
    # the standard error of a root is that of the mean square, over twice the root
    sem = np.array([np.square(error[part]).std() / np.sqrt(len(part)) for part in parts])
    sem = np.divide(sem, 2 * observed, out=np.zeros_like(observed), where=observed > 0)
    ax.errorbar(predicted, observed, yerr=2 * sem, fmt="o-", ms=4, color=MODEL, lw=1.3, capsize=2)
    reach = 1.05 * max(max(predicted), float((observed + 2 * sem).max()), 1e-9)
    ax.plot([0, reach], [0, reach], color=MUTED, lw=1, ls="--", zorder=0)
    ax.set_xlim(0, reach)
    ax.set_ylim(0, reach)
    ax.set_xlabel("uncertainty (tissue radii)")
    ax.set_ylabel("error (tissue radii)")
    ax.set_title("Is it calibrated?", fontsize=10.5, color=INK)
    return ax
