"""The answer in words: how good a map is, against the best baseline and the ideal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..evaluation.comparison import direction
from ..evaluation.results import FLOOR, MODEL, SlideEvaluation, role_of
from ..metrics.diagnostics import health_warnings
from .tables import finite, table_metrics

_NEIGHBORS = 15
_SMALLEST = 0.005  # difference that counts, however small the errors of sampling are
_GRADES = (
    (0.9, "recovered well"),
    (0.7, "mostly recovered"),
    (0.4, "partly recovered"),
    (0.15, "hardly recovered"),
)


@dataclass(frozen=True)
class Headline:
    """What a report opens with.

    Args:
        text: one sentence.
        evidence: sentences with the numbers behind it.
        warnings: what must be known before believing them.
    """

    text: str
    evidence: list[str]
    warnings: list[str]


def summarize(evaluation: SlideEvaluation) -> Headline:
    """The headline of an evaluation: first, whether the slide is like the training slides.

    A difference counts only beyond two standard errors of the sampling, and beyond 0.005.
    """
    # a map may be good though the model inside it is not: such warnings stand beside its attention
    warnings = [
        *evaluation.provenance.cautions,
        *health_warnings(evaluation.measures, of_map=True),
    ]
    if evaluation.provenance.held_out is False:
        warnings.insert(
            0, "This slide took part in training: its scores say nothing about new slides."
        )
    cells = f"{len(evaluation.pred):,} cells"
    verdict = f"{evaluation.verdict}. " if evaluation.verdict else ""
    if evaluation.provenance.held_out is False:
        verdict += "This slide took part in training. "
    own = evaluation.methods.get(MODEL, {})
    if evaluation.true is None or not own:
        text = f"A map of {cells} was predicted. It was not compared with measured positions."
        return Headline(verdict + text, _expectation(evaluation), warnings)
    rho = finite(own, "distance_spearman")
    text = f"The map of {cells} was scored against measured positions"
    if rho is not None:
        text = f"The overall layout of the tissue was {_grade(rho)}"
    wins, scored = _wins(evaluation)
    if scored:
        text += ", " + (
            "better than every baseline on every measure"
            if wins == scored
            else f"better than every baseline on {wins} of {scored} measures"
            if wins
            else "but on no measure better than the best baseline"
        )
    return Headline(f"{verdict}{text}.", _evidence(evaluation, own), warnings)


def remarks_on(evaluation: SlideEvaluation, groups: Mapping | None) -> list[str]:
    """What a reader should keep in mind of any map, and which of its cells are least certain.

    Args:
        evaluation: the prediction and its scores.
        groups: of :func:`~ipar_sparse.report.tables.group_table`.
    """
    remarks = []
    if evaluation.true is None:
        remarks.append(
            "Measured positions were not looked at, so nothing here says how right the map is. "
            "Where the file has any, the command evaluate compares the map with them."
        )
    if groups and len(groups["rows"]) > 1:
        most, least = groups["rows"][0], groups["rows"][-1]
        remarks.append(
            f"By {groups['name']}, the most uncertain cells are those of {most['label']} (median "
            f"{most['expected']} tissue radii), the least those of {least['label']} "
            f"({least['expected']})."
        )
    order = evaluation.measures.get("uncertainty_error_spearman")
    if order is not None and math.isfinite(order):
        words = "hardly" if order < 0.2 else "in part" if order < 0.4 else "well"
        remarks.append(
            f"The uncertainty tells {words} which cells lie far from their places: its rank "
            f"correlation with their error is {order:.2f}."
        )
    elif evaluation.uncertainty is None:
        remarks.append("This prediction does not say which of its cells are uncertain.")
    remarks.append(
        "The map is centred, turned and mirrored at will, and its unit is the tissue's "
        "root-mean-square radius."
        if evaluation.true is None
        else "The predicted map is turned and scaled to match the measured one, which flatters it "
        "a little."
    )
    return remarks


def _expectation(evaluation: SlideEvaluation) -> list[str]:
    if evaluation.uncertainty is None:
        return []
    half, most = np.nanquantile(evaluation.uncertainty, [0.5, 0.9])
    return [
        f"The expected error is below {half:.2f} tissue radii for half of the cells, and below "
        f"{most:.2f} for nine in ten (1 is a map without information)."
    ]


def _evidence(evaluation: SlideEvaluation, own: Mapping[str, float]) -> list[str]:
    sentences = []
    if finite(own, "distance_spearman") is not None:
        sentences.append(
            "The rank correlation of distances on the map with those in the tissue is "
            f"{_with_error(own, 'distance_spearman')} (1 is perfect, 0 is chance)."
            f"{_versus(evaluation, 'distance_spearman')}"
        )
    name = f"neighbor_hit@{_NEIGHBORS}"
    if (hit := finite(own, name)) is not None:
        chance = finite(own, f"neighbor_hit_chance@{_NEIGHBORS}")
        by_chance = "" if chance is None else f" (by chance {_NEIGHBORS * chance:.2g})"
        versus = _versus(evaluation, name, lambda value: f"{_NEIGHBORS * value:.1f}")
        sentences.append(
            f"Of the {_NEIGHBORS} cells nearest to a cell on the map, {_NEIGHBORS * hit:.1f} are "
            f"among its nearest in the tissue{by_chance}.{versus}"
        )
    if (misplacement := finite(own, "misplacement")) is not None:
        sentences.append(
            f"A cell typically lies {misplacement:.2f} tissue radii from its place "
            f"(1 is a map without information).{_versus(evaluation, 'misplacement')}"
        )
    floor = evaluation.methods.get(FLOOR, {})
    if "E_geo" in own and "E_geo" in floor:
        sentences.append(
            f"The training criterion E_geo is {own['E_geo']:.3f}; the true coordinates "
            f"themselves score {floor['E_geo']:.3f}."
        )
    return sentences


def _wins(evaluation: SlideEvaluation) -> tuple[int, int]:
    """On how many metrics the model beats the best baseline, and of how many."""
    leads = [
        (lead, _margin(evaluation, name, lead[1]))
        for name in table_metrics(evaluation)
        if (lead := _lead(evaluation, name))
    ]
    return sum(ahead > margin for (ahead, _), margin in leads), len(leads)


def _lead(evaluation: SlideEvaluation, name: str) -> tuple[float, str] | None:
    """How far the model is ahead of the best baseline, in the better direction, and its name."""
    methods, sign = evaluation.methods, direction(name)
    own = finite(methods[MODEL], name)
    rivals = {
        method: value
        for method in methods
        if role_of(method) == "baseline" and (value := finite(methods[method], name)) is not None
    }
    if not sign or not rivals or own is None:
        return None
    rival = max(rivals, key=lambda method: sign * rivals[method])
    return sign * (own - rivals[rival]), rival


def _margin(evaluation: SlideEvaluation, name: str, rival: str) -> float:
    methods = evaluation.methods
    errors = [finite(methods[method], f"{name}_se") or 0.0 for method in (MODEL, rival)]
    return max(_SMALLEST, 2 * math.hypot(*errors))


def _versus(
    evaluation: SlideEvaluation, name: str, form: Callable[[float], str] = lambda v: f"{v:.2f}"
) -> str:
    lead = _lead(evaluation, name)
    if lead is None:
        return ""
    ahead, rival = lead
    value, margin = form(evaluation.methods[rival][name]), _margin(evaluation, name, rival)
    if ahead > margin:
        return f" The best baseline ({rival}) reaches {value}."
    if ahead < -margin:
        return f" The baseline {rival} does better: {value}."
    return f" That is no different from the best baseline ({rival}): {value}."


def _with_error(values: Mapping[str, float], name: str) -> str:
    error = finite(values, f"{name}_se")
    shown = f" ± {error:.1g}" if error and error > _SMALLEST else ""
    return f"{values[name]:.2f}{shown}"


def _grade(rho: float) -> str:
    return next((words for bound, words in _GRADES if rho >= bound), "not recovered")
