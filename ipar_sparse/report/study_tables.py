"""What a study came to, as sentences and as tables of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..evaluation.comparison import MIN_SAMPLES, Comparison, Difference, Record
from ..evaluation.study_results import StudyResults
from ..metrics.layout import metric_info
from .html import number_text
from .tables import best_methods, column

MAIN = ("distance_spearman", "neighbor_hit@15", "procrustes", "E_geo", "candidate_recall@15")
"""Metrics of table and figure; all others are in the CSV."""

_MARKS = {"better": "▲", "worse": "▼", "different": "≠", "": ""}
_VERDICTS = {
    "better": "better than",
    "worse": "worse than",
    "different": "different from",
    "": "no different from",
}


def main_metrics(comparison: Comparison) -> list[str]:
    """Those of :data:`MAIN` that were measured."""
    return [name for name in MAIN if comparison.metrics.get(name)]


def findings(comparison: Comparison) -> list[str]:
    """The reference against the best baseline, metric by metric; other variants against it."""
    found = []
    reference = comparison.reference
    for metric in main_metrics(comparison):
        own = comparison.of(metric, reference)
        if own is None or own.vs_baseline is None:
            continue
        gap = own.vs_baseline
        verdict = _VERDICTS[gap.verdict]
        if gap.count < MIN_SAMPLES:
            verdict = f"on too few {gap.over} to tell from"
        rival = number_text(comparison.of(metric, gap.other).mean)
        count = f"{gap.count} {gap.over if gap.count > 1 else gap.over.rstrip('s')}"
        found.append(
            f"{reference}, {metric_info(metric).label}: {number_text(own.mean)}, {verdict} the "
            f"best baseline, {gap.other} ({rival}; difference {gap_text(gap)} over {count})."
        )
    for method in comparison.methods("variant"):
        if method != reference and (verdicts := _verdicts(comparison, method)):
            found.append(f"{method} against {reference}: {verdicts}.")
    return found


def score_rows(comparison: Comparison, metrics: Sequence[str]) -> list[dict]:
    """Rows of means over slides: name, role and cells of text, error and whether it is best."""
    competitors = comparison.methods("variant", "baseline")
    best = {}
    for name in metrics:
        known = {m: found.mean for m in competitors if (found := comparison.of(name, m))}
        best[name] = best_methods(known, name)
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
                    "best": method in best[name],
                }
            )
        if any(cell["text"] != "–" for cell in cells):
            rows.append({"name": method, "role": role, "cells": cells})
    return rows


def difference_rows(
    comparison: Comparison, metrics: Sequence[str], versus_reference: bool
) -> list[dict]:
    """Rows of paired differences of the variants: name, and cells of text, mark and verdict.

    Args:
        comparison: every method and metric.
        metrics: the columns.
        versus_reference: to the reference variant, or to the best baseline.

    Returns:
        No row if nothing could be compared.
    """
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
                    "text": gap_text(gap),
                    "mark": _MARKS[gap.verdict],
                    "verdict": gap.verdict,
                    "other": "" if versus_reference else gap.other,
                }
            )
        if not (versus_reference and method == comparison.reference):
            rows.append({"name": method, "cells": cells})
    return rows if any(cell["text"] != "–" for row in rows for cell in row["cells"]) else []


def slide_table(results: StudyResults, metric: str) -> dict:
    """A table of slides against methods: means over seeds of one metric."""
    values = means_by_slide(results.records, metric)
    methods = [m for m in results.comparison.methods("variant", "baseline") if values.get(m)]
    rows = [
        {
            "slide": slide,
            "donor": donor,
            "cells": [
                number_text(values[m][slide]) if slide in values[m] else "–" for m in methods
            ],
        }
        for slide, donor in results.study.donors.items()
        if any(slide in values[m] for m in methods)
    ]
    return {"column": column(metric), "methods": methods, "rows": rows}


def means_by_slide(records: Sequence[Record], metric: str) -> dict[str, dict[str, float]]:
    """Method to slide to the mean of a metric over seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in records:
        if record.metric == metric and math.isfinite(record.value):
            found.setdefault(record.method, {}).setdefault(record.slide, []).append(record.value)
    return {m: {s: float(np.mean(v)) for s, v in slides.items()} for m, slides in found.items()}


def shown_methods(comparison: Comparison) -> list[str]:
    """All methods but the true coordinates; of ablations only those of the reference variant."""
    own = f"{comparison.reference}: "
    return [
        method
        for method in comparison.methods("variant", "ablation", "baseline")
        if comparison.roles[method] != "ablation" or method.startswith(own)
    ]


def gap_text(gap: Difference) -> str:
    """A difference with its standard error."""
    error = "" if gap.se is None else f" ± {number_text(gap.se)}"
    return f"{'+' if gap.mean >= 0 else '−'}{number_text(abs(gap.mean))}{error}"


def _verdicts(comparison: Comparison, method: str) -> str:
    """On which main metrics a variant differs from the reference."""
    labels: dict[str, list[str]] = {}
    for metric in main_metrics(comparison):
        own = comparison.of(metric, method)
        if own is not None and own.vs_reference is not None:
            labels.setdefault(own.vs_reference.verdict, []).append(metric_info(metric).label)
    said = [
        f"{verdict} on {', '.join(labels[verdict])}"
        for verdict in ("better", "worse", "different")
        if verdict in labels
    ]
    return "; ".join(said) or ("no difference beyond the noise" if labels else "")
