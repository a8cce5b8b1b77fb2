"""Curves: losses over training, measures over recycles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from ..metrics.diagnostics import HEALTHY
from .style import CYCLE, INK, MUTED, new_axes, new_row, tidy

_TRAINING = {
    "loss": "total",
    "l_rw": "random walk",
    "l_stress": "stress",
    "l_long": "long range",
    "l_gate": "gate",
}
_MARGIN = 0.08  # above the highest value, which markers would touch
_VALIDATION = {
    "val_hgate_e_geo": "gated candidates (as in predictions)",
    "val_tedge_e_geo": "true neighbours (an oracle)",
    "val_e_geo_floor": "true coordinates (the floor)",
}


def loss_curves(
    history: Sequence[Mapping],
    *,
    stage: str = "model",
    axes: Sequence[Axes] | np.ndarray | None = None,
) -> np.ndarray:
    """Training losses over steps, and validation E_geo over epochs with the kept epoch marked.

    The two regularisers (repulsion, entropy) are part of the total and not drawn.

    Args:
        history: rows of the run's history; values may be numbers, numerals, empty or missing.
        stage: the stage shown; rows without a ``stage`` are shown too.
        axes: two axes.
    """
    axes = new_row(axes, 2, 4.4)
    rows = [row for row in history if row.get("stage", stage) in (stage, "", None)]
    left, right = (tidy(ax) for ax in axes)
    step, positive = _column(rows, "step"), True
    for color, (name, label) in zip(CYCLE, _TRAINING.items(), strict=False):
        values = _column(rows, name)
        known = np.isfinite(values)
        if known.any() and (np.abs(values[known]) > 0).any():
            left.plot(step[known], values[known], color=color, lw=1.4, label=label)
            positive = positive and bool((values[known] > 0).all())
    left.set_yscale("log" if positive else "linear")
    left.set_xlabel("training step")
    left.set_ylabel("loss (parts unweighted)")
    left.set_title("Training", fontsize=10.5, color=INK)

    epoch, best = _column(rows, "epoch") + 1, _column(rows, "best") == 1
    for color, (name, label) in zip(CYCLE, _VALIDATION.items(), strict=False):
        values = _column(rows, name)
        known = np.isfinite(values)
        if not known.any():
            continue
        floor = name.endswith("floor")
        style = {"ls": "--", "color": MUTED} if floor else {"marker": "o", "ms": 3, "color": color}
        right.plot(epoch[known], values[known], lw=1.4, label=label, **style)
        if name == "val_hgate_e_geo" and (best & known).any():
            kept = np.flatnonzero(best & known)[-1]
            right.plot(
                epoch[kept],
                values[kept],
                "*",
                ms=13,
                color=color,
                mec=INK,
                mew=0.7,
                label=f"kept: epoch {epoch[kept]:.0f}, {values[kept]:.3f}",
            )
    right.set_xlabel("epoch")
    right.set_ylabel("E_geo (lower is better)")
    right.set_title("Validation", fontsize=10.5, color=INK)
    for ax in axes:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8, frameon=False)
        else:
            ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", color=MUTED)
    return axes


def recycle_curves(
    measures: Mapping[str, float], name: str, *, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """One measure over the recycles, a line for each head, with its healthy range shaded.

    Args:
        measures: flat names, as :func:`ipar_sparse.metrics.diagnostics.diagnose` gives them.
        name: the measure, for example ``"attn_recall@30"``.
        ax: where to draw.
        title: above the axes; the measure's name if left out.
    """
    ax = tidy(new_axes(ax, (3.4, 2.8)))
    lines: dict[str, dict[int, float]] = {}
    for key, value in measures.items():
        measure, *place = key.split("/")
        if measure == name and place and place[0][1:].isdigit():
            head = place[1] if len(place) > 1 else ""
            lines.setdefault(head, {})[int(place[0][1:])] = value
    values = [value for line in lines.values() for value in line.values()]
    for color, (head, line) in zip(CYCLE * (1 + len(lines) // 7), lines.items(), strict=False):
        recycles = sorted(line)
        label = f"head {int(head[1:]) + 1}" if head else None
        ax.plot(
            [r + 1 for r in recycles],
            [line[r] for r in recycles],
            "o-",
            ms=3.5,
            lw=1.3,
            color=color,
            label=label,
        )
    healthy = HEALTHY.get(name)
    if healthy is not None and values:
        low, high = min(0.0, *values), max(values)
        for bound in (healthy.low, healthy.high):
            high = max(high, bound) if math.isfinite(bound) else high
        high += _MARGIN * (high - low)
        ax.axhspan(
            max(healthy.low, low),
            min(healthy.high, high),
            color="#009E73",
            alpha=0.10,
            lw=0,
            zorder=0,
        )
        ax.set_ylim(low, high)
    elif values:
        low, high = min(0.0, *values), max(0.0, *values)
        ax.set_ylim(low, high + (_MARGIN * (high - low) or 1.0))
    ax.set_title(title or name, fontsize=10, color=INK)
    ax.set_xlabel("recycle", fontsize=9)
    if lines:
        ax.set_xticks(sorted({r + 1 for line in lines.values() for r in line}))
    return ax


def _column(rows: Sequence[Mapping], name: str) -> np.ndarray:
    values = np.full(len(rows), np.nan)
    for i, row in enumerate(rows):
        try:
            values[i] = float(row.get(name))
        except (TypeError, ValueError):
            continue  # an empty field of the CSV
    return values
