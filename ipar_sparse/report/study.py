"""What a person sees of a study: a table in the terminal, a figure, one HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import pl
from ..evaluation.comparison import BEYOND, FEW, Comparison, Difference, Record
from ..files import atomic_write
from ..metrics.layout import metric_info
from .html import draw_figure, environment, number_text

PAGE = "report.html"
MAIN = ("distance_spearman", "neighbor_hit@15", "procrustes", "E_geo", "candidate_recall@15")
"""Metrics of the table and the figure; all others are in the CSV."""

_MARKS = {"better": "▲", "worse": "▼", "different": "≠", "": ""}


@dataclass
class StudyPage:
    """What the page of a study shows.

    Args:
        comparison: every method and metric.
        records: the values behind it.
        donors: slide to donor.
        folds: name, test, val and train of each.
        seeds: of the runs.
        settings: variant to the settings in which it differs from the defaults.
        notes: lines on the plan.
        failed: folder of a failed job to its error.
        done: runs that are finished.
        total: runs that were planned.
    """

    comparison: Comparison
    records: Sequence[Record]
    donors: Mapping[str, str]
    folds: Sequence[Mapping[str, Any]]
    seeds: Sequence[int]
    settings: Mapping[str, Sequence[str]]
    notes: Sequence[str] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    done: int = 0
    total: int = 0


def write_study_report(out: Path, page: StudyPage) -> Path:
    """Writes ``report.html``, self-contained, and ``figures/study.png``; returns the page.

    Args:
        out: folder of the study.
        page: what to show.
    """
    comparison = page.comparison
    metrics = main_metrics(comparison)
    rows = len(_drawn(comparison))
    columns = 2 if len(metrics) > 1 else 1
    size = (10.0, math.ceil(len(metrics) / columns) * (1.2 + 0.22 * rows))
    drawn = draw_figure(
        "study",
        size,
        lambda figure: _draw(figure, page, metrics, columns),
        "Main metrics of every method",
        dense=True,
    )
    (out / "figures").mkdir(exist_ok=True)
    atomic_write(out / "figures" / "study.png", drawn.pop("png"))
    text = (
        environment()
        .get_template("study.html.j2")
        .render(
            page=page,
            answers=answers(comparison),
            figure=drawn,
            columns=[_column(name) for name in metrics],
            scores=_scores(comparison, metrics),
            differences=[
                (title, rows)
                for title, rows in (
                    (f"Against {comparison.reference}", _differences(comparison, metrics, True)),
                    ("Against the best baseline", _differences(comparison, metrics, False)),
                )
                if any(cell["text"] != "–" for row in rows for cell in row["cells"])
            ],
            per_slide=[_per_slide(page, name) for name in metrics],
        )
    )
    atomic_write(out / PAGE, text)
    return out / PAGE


def main_metrics(comparison: Comparison) -> list[str]:
    """Those of :data:`MAIN` that were measured."""
    return [name for name in MAIN if comparison.metrics.get(name)]


def answers(comparison: Comparison) -> list[str]:
    """The reference against the best baseline, metric by metric; the others against it."""
    found = []
    reference = comparison.reference
    for metric in main_metrics(comparison):
        own = comparison.of(metric, reference)
        if own is None or own.vs_baseline is None:
            continue
        gap = own.vs_baseline
        verdict = {"better": "better than", "worse": "worse than"}.get(
            gap.verdict, "no different from" if gap.count >= FEW else "on too few to tell from"
        )
        found.append(
            f"{reference}, {metric_info(metric).label}: {number_text(own.mean)}, {verdict} the "
            f"best baseline, {gap.other} "
            f"({number_text(comparison.of(metric, gap.other).mean)}; difference {_gap_text(gap)} "
            f"over {gap.count} {gap.over if gap.count > 1 else gap.over.rstrip('s')})."
        )
    for method in comparison.methods("variant"):
        if method != reference and (told := _told(comparison, method)):
            found.append(f"{method} against {reference}: {told}.")
    return found


def _told(comparison: Comparison, method: str) -> str:
    """On which main metrics a variant differs from the reference."""
    by_verdict: dict[str, list[str]] = {}
    for metric in main_metrics(comparison):
        own = comparison.of(metric, method)
        if own is not None and own.vs_reference is not None:
            label = metric_info(metric).label
            by_verdict.setdefault(own.vs_reference.verdict, []).append(label)
    said = [
        f"{verdict} on {', '.join(by_verdict[verdict])}"
        for verdict in ("better", "worse", "different")
        if verdict in by_verdict
    ]
    return "; ".join(said) or ("no difference beyond the noise" if by_verdict else "")


def print_study(comparison: Comparison, reference: str) -> None:
    """Prints the table of main metrics with differences to the reference and the best baseline.

    Args:
        comparison: every method and metric.
        reference: name of the reference variant.
    """
    from rich.console import Console
    from rich.table import Table

    metrics = main_metrics(comparison)
    if not metrics:
        return
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("method", no_wrap=True)
    for name in metrics:
        column = _column(name)
        table.add_column(f"{column['short']} {column['arrow']}", justify="right")
    for row in _scores(comparison, metrics):
        if row["role"] == "form" and not _is_of_reference(comparison, row["name"]):
            continue
        style = {"variant": "bold", "floor": "dim", "form": ""}.get(row["role"], "")
        cells = [f"{cell['text']} {cell['error']}".rstrip() for cell in row["cells"]]
        table.add_row(row["name"], *cells, style=style)
    for title, versus_reference in ((f"- {reference}", True), ("- best baseline", False)):
        rows = _differences(comparison, metrics, versus_reference)
        rows = [row for row in rows if any(cell["text"] != "–" for cell in row["cells"])]
        if rows:
            table.add_section()
        for row in rows:
            cells = [f"{cell['text']} {cell['mark']}".rstrip() for cell in row["cells"]]
            table.add_row(f"{row['name']} {title}", *cells)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file has no width to wrap at
    console.print(table)
    print(
        "mean over slides ± s.d. over seeds; paired differences ± standard error over slides, "
        f"seeds averaged first; ▲ better, ▼ worse by more than {BEYOND:g} standard errors"
    )


def _column(name: str) -> dict[str, str]:
    info = metric_info(name)
    arrow = {"higher": "↑", "lower": "↓"}.get(info.better, "")
    short = name.replace("_", " ")
    return {
        "name": name,
        "label": info.label,
        "short": short,
        "arrow": arrow,
        "explanation": info.explanation,
    }


def _scores(comparison: Comparison, metrics: Sequence[str]) -> list[dict]:
    best = {}
    for name in metrics:
        sign = {"higher": 1, "lower": -1}.get(metric_info(name).better)
        competitors = comparison.methods("variant", "baseline")
        known = {m: s.mean for m in competitors if (s := comparison.of(name, m)) is not None}
        if sign and len(known) > 1:
            top = max(sign * value for value in known.values())
            best[name] = {m for m, v in known.items() if number_text(sign * v) == number_text(top)}
    rows = []
    for method, role in comparison.roles.items():
        cells = []
        for name in metrics:
            found = comparison.of(name, method)
            error = "" if found is None or found.sd is None else f"± {number_text(found.sd)}"
            cells.append(
                {
                    "text": "–" if found is None else number_text(found.mean),
                    "error": error,
                    "best": method in best.get(name, ()),
                }
            )
        if any(cell["text"] != "–" for cell in cells):
            rows.append({"name": method, "role": role, "cells": cells})
    return rows


def _differences(comparison, metrics, versus_reference: bool) -> list[dict]:
    rows = []
    for method in comparison.methods("variant"):
        cells = []
        for name in metrics:
            found = comparison.of(name, method)
            gap = found and (found.vs_reference if versus_reference else found.vs_baseline)
            cells.append(
                {"text": "–", "mark": "", "verdict": "", "other": ""}
                if gap is None
                else {
                    "text": _gap_text(gap),
                    "mark": _MARKS[gap.verdict],
                    "verdict": gap.verdict,
                    "other": "" if versus_reference else gap.other,
                }
            )
        if not (versus_reference and method == comparison.reference):
            rows.append({"name": method, "cells": cells})
    return rows


def _per_slide(page: StudyPage, metric: str) -> dict:
    """A table of slides against methods: means over seeds."""
    values = _by_method(page.records, metric)
    methods = [m for m in page.comparison.methods("variant", "baseline") if values.get(m)]
    slides = [slide for slide in page.donors if any(slide in values[m] for m in methods)]
    rows = [
        {
            "slide": slide,
            "donor": page.donors[slide],
            "cells": [
                number_text(values[m][slide]) if slide in values[m] else "–" for m in methods
            ],
        }
        for slide in slides
    ]
    return {"column": _column(metric), "methods": methods, "rows": rows}


def _by_method(records: Sequence[Record], metric: str) -> dict[str, dict[str, float]]:
    """Method to slide to its mean over seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in records:
        if record.metric == metric and math.isfinite(record.value):
            found.setdefault(record.method, {}).setdefault(record.slide, []).append(record.value)
    return {m: {s: float(np.mean(v)) for s, v in slides.items()} for m, slides in found.items()}


def _draw(figure, page: StudyPage, metrics: Sequence[str], columns: int) -> None:
    comparison = page.comparison
    rows = math.ceil(len(metrics) / columns)
    axes = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for ax, name in zip(axes, metrics, strict=False):
        values = _by_method(page.records, name)
        shown = [m for m in _drawn(comparison) if m in values]
        pl.metric_dots(
            {method: values[method] for method in shown},
            name,
            errors={method: comparison.of(name, method).se for method in shown},
            strong=comparison.methods("variant"),
            lines=_lines(comparison, name),
            ax=ax,
        )
    for ax in axes[len(metrics) :]:
        ax.set_visible(False)


def _drawn(comparison: Comparison) -> list[str]:
    """Methods in the figure: of the forms only those of the reference, or they would fill it."""
    return [
        method
        for method in comparison.methods("variant", "form", "baseline")
        if comparison.roles[method] != "form" or _is_of_reference(comparison, method)
    ]


def _is_of_reference(comparison: Comparison, form: str) -> bool:
    return form.startswith(f"{comparison.reference}: ")


def _lines(comparison: Comparison, metric: str) -> dict[str, float]:
    """Values to compare with: the best baseline, chance, and an ideal that is not plain 0 or 1."""
    lines = {}
    if best := comparison.best_baseline.get(metric):
        lines["best baseline"] = comparison.of(metric, best).mean
    chance = comparison.metrics.get(metric.replace("@", "_chance@"), {})
    levels = [summary.mean for summary in chance.values()]
    if "@" in metric and levels and max(levels) - min(levels) < 1e-9:
        lines["chance"] = levels[0]
    for method in comparison.methods("floor"):
        if metric_info(metric).perfect is None and comparison.of(metric, method):
            lines[method] = comparison.of(metric, method).mean
    return lines


def _gap_text(gap: Difference) -> str:
    error = "" if gap.se is None else f" ± {number_text(gap.se)}"
    return f"{'+' if gap.mean >= 0 else '−'}{number_text(abs(gap.mean))}{error}"
