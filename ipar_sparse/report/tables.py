"""Tables of methods against metrics, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..evaluation.comparison import direction
from ..evaluation.results import FLOOR, MODEL, ORACLE, SlideEvaluation, role_of
from ..metrics.layout import METRICS, metric_info
from .html import number_text

_NOT_IN_TABLE = {
    "lambda_ratio",
    "median_distance",
    "neighbor_hit_chance",
    "neighbor_hit@10",
    "candidate_recall",
    "rssd",
}
"""Not scores, or another column in other words: RSSD is the root of the Procrustes error. They
stand in the list of further measures."""


def metric_table(evaluation: SlideEvaluation) -> dict:
    """The table of methods against metrics, with the best of each column marked.

    Returns:
        ``columns`` of :func:`column`; ``rows``: name, role
        (:func:`~ipar_sparse.evaluation.results.role_of`) and cells of text, error and whether it
        is the best.
    """
    methods, names = evaluation.methods, table_metrics(evaluation)
    competitors = [method for method in methods if method not in (FLOOR, ORACLE)]
    best = {}
    for name in names:
        known = {m: v for m in competitors if (v := finite(methods[m], name)) is not None}
        best[name] = best_methods(known, name)
    rows = []
    for method, values in methods.items():
        cells = []
        for name in names:
            value, error = finite(values, name), finite(values, f"{name}_se")
            cells.append(
                {
                    "text": "–" if value is None else number_text(value),
                    "error": plus_minus(error) if value is not None else "",
                    "best": method in best[name],
                }
            )
        rows.append({"name": method, "role": role_of(method), "cells": cells})
    return {"columns": [column(name) for name in names], "rows": rows}


def table_metrics(evaluation: SlideEvaluation) -> list[str]:
    """Metrics that are columns of the table, in the order of :data:`METRICS`."""
    names = dict.fromkeys(name for values in evaluation.methods.values() for name in values)
    order = list(METRICS)

    def is_shown(name: str) -> bool:
        stem = name.partition("@")[0]
        return stem in METRICS and not {stem, name} & _NOT_IN_TABLE and not name.endswith("_se")

    return sorted(filter(is_shown, names), key=lambda name: order.index(name.partition("@")[0]))


def measure_table(evaluation: SlideEvaluation) -> list[dict]:
    """Measures of the model that are not columns: label, text with its error, explanation."""
    columns = set(table_metrics(evaluation))
    values = {**evaluation.methods.get(MODEL, {}), **evaluation.measures}
    rows = []
    for name in values:
        value = finite(values, name)
        if name in columns or name.endswith("_se") or "/" in name or value is None:
            continue
        info = metric_info(name)
        rows.append(
            {
                "label": info.label if info.explanation else name,
                "text": f"{number_text(value)} {plus_minus(finite(values, f'{name}_se'))}".rstrip(),
                "explanation": info.explanation,
            }
        )
    return rows


def column(name: str) -> dict[str, str]:
    """Head of a column: label, arrow towards better values, explanation, direction in words."""
    info = metric_info(name)
    return {
        "name": name,
        "label": info.label,
        "short": name.replace("_", " "),
        "arrow": {1: "↑", -1: "↓"}.get(direction(name), ""),
        "explanation": info.explanation,
        "better": info.better,
    }


def best_methods(values: Mapping[str, float], metric: str) -> set[str]:
    """Methods with the best value as printed; none of one method, or without a direction."""
    sign = direction(metric)
    if not sign or len(values) < 2:
        return set()
    best = number_text(sign * max(sign * value for value in values.values()))
    return {method for method, value in values.items() if number_text(value) == best}


def finite(values: Mapping[str, float], name: str) -> float | None:
    """A value by its name, None where it is missing or not a finite number."""
    value = values.get(name)
    known = isinstance(value, int | float | np.number) and math.isfinite(value)
    return float(value) if known else None


def plus_minus(error: float | None) -> str:
    """A standard error as text, empty where there is none."""
    return f"± {error:.1g}" if error is not None and error > 1e-6 else ""


def flat_settings(settings: Mapping, prefix: str = "") -> dict[str, str]:
    """Nested settings by their keys, as ``train.lr``."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
