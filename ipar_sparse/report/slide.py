"""The report of one slide: one HTML page that opens with the answer, and its figures as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.input_profile import informative
from ..data.keys import Keys
from ..data.slide import Slide
from ..evaluation.results import FLOOR, SlideEvaluation, flat_metrics
from ..evaluation.scoring import provenance_of
from ..files import folder_name, write_json
from ..geometry.alignment import align
from ..geometry.neighborhoods import as_layout
from ..inference.placing import Additions
from ..inference.predictor import Predictor
from ..inference.reference import Reference
from ..layout.uncertainty import square_errors
from ..progress import stage, track
from ..train.history import HISTORY, read_history
from .cells import CellTable, cell_table
from .explorer import CellMap, build_explorer
from .frame import frame_section
from .headline import remarks_on, summarize
from .html import script_text, write_page
from .sections import (
    PageInput,
    diagnostic_sections,
    map_sections,
    method_figures,
    uncertainty_section,
)
from .tables import flat_settings, group_table, main_table, measure_table, metric_table

METRICS = "metrics.json"
ERROR = "distance from measured place"  # column of a page


def write_evaluation(
    predictor: Predictor,
    slide: Slide,
    evaluation: SlideEvaluation,
    out: str | Path,
    *,
    genes: Sequence[str] = (),
    command: str | None = None,
) -> dict[str, float]:
    """Write the metrics, figures and report of a slide that is scored already.

    Args:
        predictor: the trained run.
        slide: n cells with positions.
        evaluation: of this slide.
        out: folder for ``metrics.json``, ``report.html`` and ``figures/``; made if missing.
        genes: genes by which the page can colour cells, beside the most informative.
        command: what the report names as its origin.

    Returns:
        The content of ``metrics.json``: layout metrics of the model by name, ``E_geo_hgate``,
        ``E_geo_tedge``, ``E_geo_floor`` and their parts, candidate recall; metrics of other
        methods as ``method/metric``.
    """
    metrics, out = flat_metrics(evaluation), Path(out)
    slide = informative(predictor.conform(slide))
    with stage("Report"):
        cells = cell_table(slide, slide.pos, predictor.meta["genes"], genes)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / METRICS, metrics)
        history = predictor.run / HISTORY
        write_report(
            out,
            evaluation,
            cells=cells,
            history=read_history(history) if history.is_file() else None,
            command=command,
        )
    return metrics


def write_prediction_report(
    predictor: Predictor,
    slides: Sequence[Slide],
    added: Additions,
    out: str | Path,
    *,
    reference: Reference | None = None,
    genes: Sequence[str] = (),
    command: str | None = None,
) -> list[Path]:
    """Write a page for each slide that was placed, without looking at measured positions.

    Cells that got no place are left out.

    Args:
        predictor: the trained run.
        slides: all slides of the file or object.
        added: what :func:`~ipar_sparse.inference.placing.place_cells` found for them.
        out: folder of the page; each of several slides gets a folder of its name in it.
        reference: in whose frame cells were placed, if in any.
        genes: genes by which the pages can colour cells, beside the most informative.
        command: what the pages name as their origin.

    Returns:
        The paths of the pages.

    Raises:
        UserError: a slide lacks a gene that was asked for.
    """
    pages, verdicts = [], added.uns.get("typicality", {})
    for slide in track(slides, "Report"):
        slide = slide.take(np.flatnonzero(np.isfinite(added.pos[slide.rows]).all(axis=1)))
        own = {name: np.asarray(values)[slide.rows] for name, values in added.obs.items()}
        pos = added.pos[slide.rows]
        evaluation = SlideEvaluation(
            slide.name,
            pos,
            uncertainty=own.get(Keys.UNCERTAINTY),
            typicality=own.get(Keys.TYPICALITY),
            verdict=verdicts.get(slide.name, {}).get("sentence"),
            provenance=provenance_of(predictor, slide),
        )
        cells = cell_table(slide, pos, predictor.meta["genes"], genes, own)
        folder = Path(out) if len(slides) == 1 else Path(out) / folder_name(slide.name)
        frame = None
        if reference is not None:
            frame = frame_section(predictor, slide, added, reference, cells)
        pages.append(write_report(folder, evaluation, cells=cells, frame=frame, command=command))
    return pages


def write_report(
    out: str | Path,
    evaluation: SlideEvaluation,
    *,
    cells: CellTable | None = None,
    history: Sequence[Mapping] | None = None,
    frame: dict[str, Any] | None = None,
    command: str | None = None,
) -> Path:
    """Write ``report.html``, self-contained, and its figures under ``figures/``.

    Args:
        out: folder, made if missing; files of an earlier report are replaced.
        evaluation: the prediction and its scores.
        cells: names, columns and genes of the cells; they are numbered if left out.
        history: rows of the training history.
        frame: of :func:`~ipar_sparse.report.frame.frame_section`.
        command: the command that made the report.

    Returns:
        The path of the page.

    Raises:
        ValueError: if arrays are not of the same cells.
    """
    n = len(as_layout(evaluation.pred, "pred"))
    cells = cells or CellTable(np.arange(n).astype(str))
    _check_sizes(evaluation, cells)
    page = PageInput(evaluation, cells, history, command)
    maps, methods = map_sections(page), method_figures(evaluation)
    uncertainty, diagnostics = uncertainty_section(evaluation), diagnostic_sections(page)
    explorer = _explorer(evaluation, cells)
    sections = [
        *maps,
        *([frame] if frame else []),
        *([uncertainty] if uncertainty else []),
        *diagnostics,
    ]
    table, groups = metric_table(evaluation), group_table(evaluation, cells)
    return write_page(
        Path(out),
        "slide.html.j2",
        [*methods, *(figure for section in sections for figure in section["figures"])],
        scripts=[*explorer["scripts"], script_text("explorer.js")],
        evaluation=evaluation,
        provenance=evaluation.provenance,
        command=command,
        headline=summarize(evaluation),
        explorer=explorer,
        ramp=explorer["ramp"],
        maps=maps,
        frame=frame,
        remarks=remarks_on(evaluation, groups),
        scores=main_table(evaluation) if table["columns"] else None,
        all_scores=table,
        methods=methods,
        has_floor=FLOOR in evaluation.methods,
        uncertainty=uncertainty,
        groups=groups,
        diagnostics=diagnostics,
        measures=measure_table(evaluation),
        settings=flat_settings(evaluation.provenance.settings),
    )


def _explorer(evaluation: SlideEvaluation, cells: CellTable) -> dict:
    """The maps to explore: measured beside predicted, else the prediction in two colours."""
    pred, columns = as_layout(evaluation.pred), dict(cells.columns)
    if evaluation.uncertainty is not None:
        columns[Keys.UNCERTAINTY] = evaluation.uncertainty
    if evaluation.typicality is not None:
        columns[Keys.TYPICALITY] = evaluation.typicality
    if evaluation.true is None:
        place = "place on the map"
        maps = [CellMap("Predicted", pred)] * 2
        first, second = cells.grouping() or place, place
        if evaluation.uncertainty is not None:
            second = Keys.UNCERTAINTY
        colors = [first, second]
    else:
        true = as_layout(evaluation.true)
        columns[ERROR] = np.sqrt(square_errors(pred, true))
        place = "measured place"
        maps = [CellMap("Measured", true), CellMap("Predicted", align(pred, true)[0])]
        colors = [place]
    table = CellTable(cells.names, columns, cells.expression, cells.genes, cells.asked)
    return build_explorer(maps, table, colors, place)


def _check_sizes(evaluation: SlideEvaluation, cells: CellTable) -> None:
    n = len(evaluation.pred)
    arrays = {"true": evaluation.true, "uncertainty": evaluation.uncertainty, "names": cells.names}
    arrays |= dict(cells.columns)
    if cells.expression is not None:
        arrays["expression"] = np.zeros(cells.expression.shape[0])
    for r, pos in enumerate(evaluation.trajectory or ()):
        arrays[f"trajectory[{r}]"] = pos
    for name, values in arrays.items():
        if values is not None and len(values) != n:
            raise ValueError(
                f"report: pred has {n} cells, {name} has {len(values)}; give the same cells"
            )
