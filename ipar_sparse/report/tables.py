"""Tables of methods against metrics, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ..evaluation.comparison import direction
from ..evaluation.results import FLOOR, MODEL, ORACLE, RANDOM, SlideEvaluation, role_of
from ..layout.uncertainty import square_errors
from ..metrics.layout import METRICS, metric_info
from .cells import CellTable
from .html import number_text

_NOT_IN_TABLE = {
    "lambda_ratio",
    "median_distance",
    "neighbor_hit_chance",
    "neighbor_hit@10",
    "candidate_recall",
    "misplacement",
    "cell_spearman",
    "cell_spearman_mean",
    "contact_f1",
    "rssd",
    "rssd_by_class",
    "frame_error",
    "frame_error_radii",
}
"""Not scores, another column in other words (misplacement is the root of the Procrustes error), or
measures of other papers. They stand in the list of further measures."""


_MAIN = (
    "distance_spearman",
    "neighbor_hit@15",
    "procrustes",
    "stress_1",
    "trustworthiness@15",
    "E_geo",
)
_RIVALS = 3  # baselines of the main table, beside chance


def main_table(evaluation: SlideEvaluation) -> dict:
    """:func:`metric_table` of at most six rows: the model, the best baselines, chance, truth."""
    methods = evaluation.methods
    names = [name for name in _MAIN if name in table_metrics(evaluation)]
    first = (names or table_metrics(evaluation))[0]
    sign = direction(first) or 1
    rivals = [m for m in methods if role_of(m) == "baseline" and m != RANDOM]
    rivals.sort(key=lambda m: -sign * (finite(methods[m], first) or -sign * math.inf))
    kept = [m for m in (MODEL, *rivals[:_RIVALS], RANDOM, FLOOR) if m in methods]
    return metric_table(evaluation, kept, names)


def metric_table(
    evaluation: SlideEvaluation, rows: Sequence[str] = (), names: Sequence[str] = ()
) -> dict:
    """The table of methods against metrics, with the best of each column marked.

    Args:
        evaluation: the scores.
        rows: methods that are shown; all if left out. The best are still sought among all.
        names: metrics that are shown; all if left out.

    Returns:
        ``columns`` of :func:`column`; ``rows``: name, role
        (:func:`~ipar_sparse.evaluation.results.role_of`) and cells of text, error and whether it
        is the best.
    """
    methods, names = evaluation.methods, names or table_metrics(evaluation)
    competitors = [method for method in methods if method not in (FLOOR, ORACLE)]
    best = {}
    for name in names:
        known = {m: v for m in competitors if (v := finite(methods[m], name)) is not None}
        best[name] = best_methods(known, name)
    shown, table = rows or list(methods), []
    for method in shown:
        values, cells = methods[method], []
        for name in names:
            value, error = finite(values, name), finite(values, f"{name}_se")
            cells.append(
                {
                    "text": "–" if value is None else number_text(value),
                    "error": plus_minus(error) if value is not None else "",
                    "best": method in best[name],
                }
            )
        table.append({"name": method, "role": role_of(method), "cells": cells})
    return {"columns": [column(name) for name in names], "rows": table}


def group_table(evaluation: SlideEvaluation, cells: CellTable) -> dict | None:
    """The expected error by the label of cells, the most uncertain first.

    Returns:
        ``name`` of the column, whether it is ``scored``, and ``rows``: label, number of cells,
        median expected error, median error where it is known, and ``low``, ``middle`` and
        ``high``: quartiles of the expected error in percent of the range of all. None without
        uncertainty or labels.
    """
    name, uncertainty = cells.grouping(), evaluation.uncertainty
    if name is None or uncertainty is None:
        return None
    frame = pd.DataFrame({"label": np.asarray(cells.columns[name]), "expected": uncertainty})
    if evaluation.true is not None:
        frame["error"] = np.sqrt(square_errors(evaluation.pred, evaluation.true))
    groups = frame.groupby("label")
    sizes, errors = groups.size(), groups["error"].median() if "error" in frame else None
    quartiles = groups["expected"].quantile([0.25, 0.5, 0.75]).unstack()
    least, most = float(quartiles.min(axis=None)), float(quartiles.max(axis=None))
    places = 4 + 92 * (quartiles - least) / max(most - least, 1e-300)
    rows = [
        {
            "label": str(label),
            "cells": int(sizes[label]),
            "expected": number_text(quartiles.loc[label, 0.5]),
            "error": None if errors is None else number_text(errors[label]),
            **dict(zip(("low", "middle", "high"), places.loc[label].round(1), strict=True)),
        }
        for label in quartiles.sort_values(0.5, ascending=False).index
    ]
    return {
        "name": name,
        "scored": errors is not None,
        "least": number_text(least),
        "most": number_text(most),
        "rows": rows,
    }


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
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
