"""What a person sees of a study: a table in the terminal, a figure, one HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from .. import pl
from ..evaluation.block_bootstrap import BLOCKS, Gain, study_gains
from ..evaluation.comparison import MIN_STANDARD_ERRORS, Comparison
from ..evaluation.study_plan import Study, differences
from ..evaluation.study_results import StudyResults
from ..evaluation.study_run import run_study
from ..files import write_json
from ..metrics.layout import metric_info
from .html import axes_grid, draw_figure, write_page
from .study_tables import (
    difference_rows,
    findings,
    main_metrics,
    means_by_slide,
    score_rows,
    shown_methods,
    slide_table,
)
from .tables import column

GAINS = "gains.json"
"""Gains on cells of another assay, with their errors over blocks and seeds."""


def run_study_with_report(
    study: Study,
    out: str | Path,
    **how: Any,
) -> StudyResults:
    """Works off a study, writes its tables and its page, and prints the main table.

    Arguments and errors are those of :func:`~ipar_sparse.evaluation.study_run.run_study`. The
    page is also written after ctrl-C. Of cells of another assay it also writes and prints the
    gains over baselines, see :mod:`ipar_sparse.evaluation.block_bootstrap`.
    """
    out = Path(out)
    results = run_study(study, out, on_collect=write_study_report, **how)
    print_study(results.comparison)
    if study.cells and (gains := study_gains(out, study)):
        values = {slide: {n: asdict(gain) for n, gain in of.items()} for slide, of in gains.items()}
        write_json(out / GAINS, values)
        print_gains(gains, study.reference)
    return results


def write_study_report(out: str | Path, results: StudyResults) -> Path | None:
    """Writes ``report.html``, self-contained, and ``figures/study.png``.

    Args:
        out: folder of the study.
        results: what its finished runs add up to.

    Returns:
        The path of the page; None, and nothing is written, while no run is finished.
    """
    if not results.done:
        return None
    comparison = results.comparison
    metrics = main_metrics(comparison)
    columns = 2 if len(metrics) > 1 else 1
    height = math.ceil(len(metrics) / columns) * (1.2 + 0.22 * len(shown_methods(comparison)))
    figure = draw_figure(
        "study",
        (10.0, height),
        lambda figure: _draw(figure, results, metrics, columns),
        "Main metrics of every method",
        dense=True,
    )
    tables = {
        f"Against {comparison.reference}": difference_rows(comparison, metrics, True),
        "Against the best baseline": difference_rows(comparison, metrics, False),
    }
    return write_page(
        Path(out),
        "study.html.j2",
        [figure],
        results=results,
        study=results.study,
        findings=findings(comparison),
        figure=figure,
        columns=[column(name) for name in metrics],
        scores=score_rows(comparison, metrics),
        differences={title: rows for title, rows in tables.items() if rows},
        slides=[slide_table(results, name) for name in metrics],
        settings={name: differences(config) for name, config in results.study.variants.items()},
    )


def print_study(comparison: Comparison) -> None:
    """Prints the main metrics, and differences to the reference and the best baseline."""
    metrics = main_metrics(comparison)
    if not metrics:
        return
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("method", no_wrap=True)
    for name in metrics:
        head = column(name)
        table.add_column(f"{head['short']} {head['arrow']}", justify="right")
    shown = {*shown_methods(comparison), *comparison.methods("floor")}
    for row in score_rows(comparison, metrics):
        if row["name"] in shown:
            style = {"variant": "bold", "floor": "dim"}.get(row["role"], "")
            cells = [f"{cell['text']} {cell['error']}".rstrip() for cell in row["cells"]]
            table.add_row(row["name"], *cells, style=style)
    for title, versus_reference in ((comparison.reference, True), ("best baseline", False)):
        table.add_section()
        for row in difference_rows(comparison, metrics, versus_reference):
            cells = [f"{cell['text']} {cell['mark']}".rstrip() for cell in row["cells"]]
            table.add_row(f"{row['name']} - {title}", *cells)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file has no width to wrap at
    console.print(table)
    print(
        "Scores: mean over slides ± standard deviation over seeds. Differences: paired, ± standard "
        "error over slides, seeds averaged first. "
        f"▲ better, ▼ worse by more than {MIN_STANDARD_ERRORS:g} standard errors."
    )


def print_gains(gains: Mapping[str, Mapping[str, Gain]], own: str) -> None:
    """Prints by how much a method exceeds others on cells of another assay, with errors."""
    for slide, found in gains.items():
        seeds = max(gain.seeds for gain in found.values())
        print(
            f"{slide}: distance Spearman of {own} less that of others, ± standard error over "
            f"{BLOCKS} x {BLOCKS} blocks of the tissue and {seeds} seed{'s' * (seeds > 1)}:"
        )
        for name, gain in sorted(found.items(), key=lambda item: item[1].mean):
            sure = gain.mean / gain.se if gain.se > 0 else 0.0
            print(f"  {name:24} {gain.mean:+.4f} ± {gain.se:.4f}  ({sure:+.1f} standard errors)")


def _draw(figure: Figure, results: StudyResults, metrics: Sequence[str], columns: int) -> None:
    comparison = results.comparison
    for ax, name in zip(axes_grid(figure, len(metrics), columns), metrics, strict=True):
        values = means_by_slide(results.records, name)
        shown = [method for method in shown_methods(comparison) if method in values]
        pl.metric_dots(
            {method: values[method] for method in shown},
            name,
            errors={method: comparison.of(name, method).se for method in shown},
            strong=comparison.methods("variant"),
            lines=_lines(comparison, name),
            ax=ax,
        )


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
