"""The report of one slide: one HTML page that opens with the answer, and its figures as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ..data.expression import morans_i, normalized_expression
from ..data.slide import Slide
from ..evaluation.results import FLOOR, SlideEvaluation, flat_metrics
from ..evaluation.scoring import score_slide
from ..files import write_json
from ..geometry.neighborhoods import as_layout
from ..graph import knn
from ..inference.predictor import Predictor
from ..progress import stage
from ..train.history import HISTORY, read_history
from .headline import summarize
from .html import write_page
from .sections import PageInput, build_sections
from .tables import flat_settings, measure_table, metric_table

METRICS = "metrics.json"


def evaluate_slide(
    predictor: Predictor,
    slide: Slide,
    out: str | Path,
    *,
    noise_samples: int | None = None,
    baselines: bool | None = None,
    command: str | None = None,
) -> dict[str, float]:
    """Predict a slide, score it against its positions, and write metrics, figures and report.

    Args:
        predictor: the trained run.
        slide: n cells with positions.
        out: folder for ``metrics.json``, ``report.html`` and ``figures/``; made if missing.
        noise_samples: predictions under training noise; the run's setting if left out.
        baselines: whether to score the baselines; the run's setting if left out.
        command: what the report names as its origin.

    Returns:
        The content of ``metrics.json``: layout metrics of the model by name, ``E_geo_hgate``,
        ``E_geo_tedge``, ``E_geo_floor`` and their parts, candidate recall; metrics of other
        methods as ``method/metric``.

    Raises:
        UserError: if the slide has no positions, or fewer than three cells.
    """
    evaluation = score_slide(predictor, slide, noise_samples=noise_samples, baselines=baselines)
    return write_evaluation(predictor, slide, evaluation, out, command=command)


def write_evaluation(
    predictor: Predictor,
    slide: Slide,
    evaluation: SlideEvaluation,
    out: str | Path,
    *,
    command: str | None = None,
) -> dict[str, float]:
    """Write the metrics, figures and report of a slide that is scored already.

    Arguments and result are those of :func:`evaluate_slide`; ``evaluation`` is of the same slide.
    """
    metrics, out = flat_metrics(evaluation), Path(out)
    with stage("Report"):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / METRICS, metrics)
        history = predictor.run / HISTORY
        write_report(
            out,
            evaluation,
            gene=spatial_gene(slide, predictor.meta["genes"]),
            history=read_history(history) if history.is_file() else None,
            command=command,
        )
    return metrics


def write_report(
    out: str | Path,
    evaluation: SlideEvaluation,
    *,
    gene: tuple[str, np.ndarray] | None = None,
    history: Sequence[Mapping] | None = None,
    command: str | None = None,
) -> Path:
    """Write ``report.html``, self-contained, and its figures under ``figures/``.

    Args:
        out: folder, made if missing; files of an earlier report are replaced.
        evaluation: the prediction and its scores.
        gene: name of a gene and its expression (n,).
        history: rows of the training history.
        command: the command that made the report.

    Returns:
        The path of the page.

    Raises:
        ValueError: if arrays are not of the same cells.
    """
    page = PageInput(evaluation, gene, history, command)
    _check_sizes(page)
    sections = build_sections(page)
    return write_page(
        Path(out),
        "slide.html.j2",
        [figure for section in sections for figure in section["figures"]],
        evaluation=evaluation,
        provenance=evaluation.provenance,
        command=command,
        headline=summarize(evaluation),
        sections=sections,
        table=metric_table(evaluation),
        has_floor=FLOOR in evaluation.methods,
        measures=measure_table(evaluation),
        settings=flat_settings(evaluation.provenance.settings),
    )


def spatial_gene(
    slide: Slide, genes: Sequence[str] | None, most: int = 300
) -> tuple[str, np.ndarray] | None:
    """The gene whose expression is most alike among spatial neighbours (Moran's I).

    Args:
        slide: n cells with positions.
        genes: genes of the run, most variable first; the slide's own if None.
        most: genes looked at.

    Returns:
        Its name and log-normalised expression (n,), or None without expression.
    """
    if slide.expression is None:
        return None
    own = {str(gene) for gene in slide.genes}
    names = [gene for gene in (genes or slide.genes) if str(gene) in own][:most]
    if not names:
        return None
    matrix = normalized_expression(slide, names)
    neighbors = knn(torch.from_numpy(slide.pos), 8).index.numpy()
    best = int(morans_i(matrix, neighbors).argmax())
    return str(names[best]), matrix[:, [best]].toarray().ravel()


def _check_sizes(page: PageInput) -> None:
    evaluation = page.evaluation
    n = len(as_layout(evaluation.pred, "pred"))
    arrays = {"true": evaluation.true, "uncertainty": evaluation.uncertainty}
    arrays["gene"] = None if page.gene is None else page.gene[1]
    for r, pos in enumerate(evaluation.trajectory or ()):
        arrays[f"trajectory[{r}]"] = pos
    for name, values in arrays.items():
        if values is not None and len(values) != n:
            raise ValueError(
                f"report: pred has {n} cells, {name} has {len(values)}; give the same cells"
            )
