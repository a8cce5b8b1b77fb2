"""Sections of the report of a slide: a title, a few sentences and figures each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from .. import pl
from ..evaluation.results import (
    FLOOR,
    INITIAL,
    MODEL,
    NO_RECYCLES,
    NO_REFINEMENT,
    RANDOM,
    SlideEvaluation,
)
from ..geometry.alignment import align
from ..geometry.neighborhoods import as_layout, unit_gauge
from ..metrics.descriptions import metric_info
from ..metrics.diagnostics import health_warnings
from .cells import CellTable
from .html import axes_grid, draw_figure
from .tables import finite

_DOTS = ("distance_spearman", "procrustes", "neighbor_hit@15", "trustworthiness@15")
_PANELS = {
    "attn_recall@30": "Attention on true neighbours",
    "logit_std": "Standard deviation of logits",
    "attention_entropy_relative": "Entropy of attention (1: uniform)",
    "step_size": "Movement |ΔX|/√n",
}
_COUNTS = ("No", "One", "Two", "Three", "Four", "Five", "Six")


@dataclass(frozen=True)
class PageInput:
    """What a page shows of a slide.

    Args:
        evaluation: the prediction and its scores.
        cells: names, columns and genes of the cells.
        history: rows of the training history, or None.
        command: the command that made the report, or None.
    """

    evaluation: SlideEvaluation
    cells: CellTable
    history: Sequence[Mapping] | None = None
    command: str | None = None


def map_sections(page: PageInput) -> list[dict]:
    """The maps as figures, for readers without JavaScript: cells by place, and by the first gene.

    Returns:
        Title, text, figures (:func:`~ipar_sparse.report.html.draw_figure`) and what is unusual.
    """
    found = [_map_section(page.evaluation), _gene_section(page)]
    return [section for section in found if section is not None]


def diagnostic_sections(page: PageInput) -> list[dict]:
    """What is folded away, in the form of :func:`map_sections`."""
    evaluation = page.evaluation
    found = [
        _distance_section(evaluation),
        _recycle_section(evaluation),
        _attention_section(evaluation),
        _training_section(page),
    ]
    return [section for section in found if section is not None]


def _map_section(evaluation: SlideEvaluation) -> dict:
    pred, true = evaluation.pred, evaluation.true
    if true is None:
        figure = draw_figure(
            "map",
            (5.2, _height(evaluation, 5.2)),
            lambda figure: pl.layout(pred, ax=figure.subplots(), title="Predicted"),
            "Predicted map of cells",
        )
        text = "Each dot is a cell, coloured by its place on the predicted map."
        return section("The map", text, [figure])
    figure = draw_figure(
        "map",
        (10.0, _height(evaluation, 4.9)),
        lambda figure: pl.layout_pair(true, pred, axes=figure.subplots(1, 2)),
        "Measured and predicted map of cells",
    )
    text = (
        "Left: where the cells were measured. Right: where they were predicted, rotated to match. "
        "A cell has the same colour on both; a good map shows the same gradients."
    )
    return section("The map", text, [figure])


def _gene_section(page: PageInput) -> dict | None:
    if not page.cells.genes:
        return None
    name, evaluation = page.cells.genes[0], page.evaluation
    values = page.cells.gene(name)
    pred, true = evaluation.pred, evaluation.true

    def draw(figure: Figure) -> None:
        if true is None:
            pl.layout(pred, values, ax=figure.subplots(), label=name)
        else:
            pl.layout_pair(true, pred, values, axes=figure.subplots(1, 2), label=name)

    size = (5.6, _height(evaluation, 4.8)) if true is None else (10.0, _height(evaluation, 4.2))
    text = f"Expression of {name}. Its domain should have the same shape on the predicted map."
    figure = draw_figure("gene", size, draw, f"Expression of {name} on the maps")
    return section("A gene on the map", text, [figure])


def method_figures(evaluation: SlideEvaluation) -> list[dict]:
    """The main metrics of every method as one figure; none without other methods.

    Random layouts are in the tables alone: their dots would press all others together.
    """
    methods = {name: values for name, values in evaluation.methods.items() if name != RANDOM}
    names = [name for name in _DOTS if sum(name in values for values in methods.values()) > 1]
    if evaluation.true is None or not names:
        return []

    def draw(figure: Figure) -> None:
        for ax, name in zip(axes_grid(figure, len(names), 2), names, strict=True):
            known = {m: v for m in methods if (v := finite(methods[m], name)) is not None}
            chances = [v for m in methods if (v := finite(methods[m], _chance(name))) is not None]
            lines = {FLOOR: known.pop(FLOOR)} if FLOOR in known else {}
            pl.metric_dots(
                {method: {evaluation.slide: value} for method, value in known.items()},
                name,
                errors={method: finite(methods[method], f"{name}_se") for method in known},
                strong=(MODEL,),
                lines=lines | ({"chance": chances[0]} if chances else {}),
                ax=ax,
            )

    height = math.ceil(len(names) / 2) * (1.3 + 0.24 * len(methods))
    alt = f"{', '.join(metric_info(name).label for name in names)} of every method, as dots"
    return [draw_figure("methods", (10.5, height), draw, alt, dense=True)]


def _chance(name: str) -> str:
    return name.replace("@", "_chance@") if "@" in name else "-"


def _distance_section(evaluation: SlideEvaluation) -> dict | None:
    if evaluation.true is None:
        return None
    figure = draw_figure(
        "distances",
        (5.4, 4.6),
        lambda figure: pl.distance_density(evaluation.pred, evaluation.true, ax=figure.subplots()),
        "Predicted against true distances",
    )
    text = (
        "Pairs of cells by their true distance (right) and their predicted distance (up). A "
        "perfect map lies on the dashed line. A flat top means that far parts of the tissue were "
        "folded together."
    )
    return section("Distances", text, [figure])


def uncertainty_section(evaluation: SlideEvaluation) -> dict | None:
    """Uncertainty of the cells, and whether it is calibrated; None if nothing is scored."""
    uncertainty, true = evaluation.uncertainty, evaluation.true
    if uncertainty is None:
        if not evaluation.methods:
            return None
        text = "Not shown: this run tells none from one prediction; pass --noise-samples 8."
        return section("Uncertainty", text, [])

    def draw(figure: Figure) -> None:
        if true is None:
            pl.uncertainty_map(evaluation.pred, uncertainty, ax=figure.subplots())
            return
        axes, measured = figure.subplots(1, 2), unit_gauge(as_layout(true))
        aligned, _ = align(unit_gauge(as_layout(evaluation.pred)), measured)
        pl.uncertainty_map(aligned, uncertainty, ax=axes[0])
        error = np.linalg.norm(aligned - measured, axis=1)
        pl.uncertainty_calibration(uncertainty, error, ax=axes[1])

    text = (
        "The predicted root mean square error of each cell. It follows the predictive variance of "
        "the run's atlas, where it has one. With several noise samples, it also follows how far "
        "noise moves the cell. "
    )
    if evaluation.provenance.settings.get("uncertainty", {}).get("calibrated"):
        text += "Its size was fitted on left-out donors of the training slides."
    else:
        text += (
            "Its size follows the law that held on public slides; it was not fitted on donors of "
            "this run."
        )
    if true is not None:
        text += (
            " Right: cells in groups of equal size, least uncertain first. Where the line rises, "
            "uncertain cells do lie farther from their places. On the dashed line the error is as "
            "large as predicted."
        )
    width = 5.6 if true is None else 10.0
    figure = draw_figure("uncertainty", (width, 4.2), draw, "Uncertainty map and calibration")
    return section("Uncertainty", text, [figure])


def _recycle_section(evaluation: SlideEvaluation) -> dict | None:
    layouts = evaluation.trajectory
    if layouts is None or len(layouts) < 2:
        return None

    def draw(figure: Figure) -> None:
        pl.trajectory(layouts, true=evaluation.true, axes=axes_grid(figure, len(layouts), 4))

    height = math.ceil(len(layouts) / 4) * _height(evaluation, 2.4)
    text = (
        "The initial layout and the map after each pass through the model (a recycle), in the "
        "colours of the first figure. Distance correction and refinement, where a run has them, "
        "come afterwards."
    )
    figure = draw_figure("recycles", (10.0, height), draw, "The map after every recycle")
    return section("Pass by pass", text, [figure])


def _attention_section(evaluation: SlideEvaluation) -> dict | None:
    figures, sentences = [], []
    unusual = health_warnings(evaluation.measures, of_map=False)
    if evaluation.focus:
        figures.append(_focus_figure(evaluation))
        count = len(evaluation.focus)
        number = _COUNTS[count] if count < len(_COUNTS) else str(count)
        where = "predicted" if evaluation.true is None else "measured"
        sentences.append(
            f"{number} cells (stars) on the {where} map, and the cells they attend to. The darker "
            "and larger a dot, the more attention. True neighbours lie around the star."
        )
    panels = {
        name: title
        for name, title in _PANELS.items()
        if any(key.startswith(f"{name}/r") for key in evaluation.measures)
    }
    if panels:
        figures.append(_panel_figure(evaluation.measures, panels))
        below = "Below, measures" if evaluation.focus else "Measures"
        sentences.append(f"{below} of attention by recycle and head; green is the healthy range.")
    if not figures and not unusual:
        return None
    if unusual and INITIAL in evaluation.methods:
        sentences.append(_worth_of_attention(evaluation))
    return section("Attention", " ".join(sentences), figures, unusual)


def _worth_of_attention(evaluation: SlideEvaluation) -> str:
    """Which rows of the scores tell what the recycles are worth on this slide."""
    methods = evaluation.methods
    if NO_RECYCLES in methods:
        ends = MODEL, NO_RECYCLES
    else:
        ends = (NO_REFINEMENT if NO_REFINEMENT in methods else MODEL), INITIAL
    return (
        f'What attention is worth on this slide is the difference between "{ends[0]}" and '
        f'"{ends[1]}" among the scores.'
    )


def _focus_figure(evaluation: SlideEvaluation) -> dict:
    pos = evaluation.pred if evaluation.true is None else evaluation.true
    focus = evaluation.focus
    return draw_figure(
        "attention",
        (2.5 * len(focus), _height(evaluation, 2.5)),
        lambda figure: pl.attention_focus(
            pos, focus, axes=np.ravel(figure.subplots(1, len(focus)))
        ),
        "Attention of single cells",
    )


def _panel_figure(measures: Mapping[str, float], panels: Mapping[str, str]) -> dict:
    def draw(figure: Figure) -> None:
        axes = np.ravel(figure.subplots(1, len(panels)))
        for ax, (name, title) in zip(axes, panels.items(), strict=True):
            pl.recycle_curves(measures, name, ax=ax, title=title)
        heads = axes[0].get_legend_handles_labels()
        if heads[0]:
            figure.legend(*heads, loc="outside lower center", ncols=8, fontsize=8, frameon=False)

    size = (2.5 * len(panels), 2.7)
    alt = "Measures of attention over recycles"
    return draw_figure("diagnostics", size, draw, alt, dense=True)


def _training_section(page: PageInput) -> dict | None:
    if not page.history:
        return None
    figure = draw_figure(
        "training",
        (10.0, 3.8),
        lambda figure: pl.loss_curves(page.history, axes=figure.subplots(1, 2)),
        "Loss curves",
        dense=True,
    )
    text = (
        "Left: the parts of the loss. Right: the validation score, on the graph that a prediction "
        "has and on the true neighbours. The star is the epoch that was kept."
    )
    return section("Training", text, [figure])


def section(title: str, text: str, figures: list[dict], unusual: Sequence[str] = ()) -> dict:
    """A section of a page, in the form of :func:`map_sections`."""
    return {"title": title, "text": text, "figures": figures, "unusual": unusual}


def _height(evaluation: SlideEvaluation, width: float) -> float:
    """Height of a panel of ``width`` inches that fits the tissue, with room for a title."""
    pos = as_layout(evaluation.pred if evaluation.true is None else evaluation.true)
    extent = np.ptp(pos, axis=0)
    ratio = extent[1] / extent[0] if extent[0] > 0 else 1.0
    return width * float(np.clip(ratio, 0.5, 1.5)) + 0.35
