"""What the finished runs of a study add up to: ``results.csv`` and ``summary.json``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..files import atomic_write, write_json
from ..inference.run_folder import LAST, read_meta
from ..train.fit import FitResult
from .comparison import Comparison, Record, compare
from .results import E_GEO_SUFFIX, SlideEvaluation, role_of
from .study_plan import Study, Task, baseline_variants, study_jobs

METRICS = "metrics.json"
RESULTS = "results.csv"
SUMMARY = "summary.json"


class Row(NamedTuple):
    """One measured value, as in ``results.csv``.

    Args:
        variant, fold, seed: the run.
        slide: the held-out slide.
        donor: of the slide.
        method: ``"model"``, one of its ablations, a baseline, or the true coordinates.
        role: one of :data:`~ipar_sparse.evaluation.comparison.ROLES`.
        metric: flat name.
        value: what was measured.
    """

    variant: str
    fold: str
    seed: int
    slide: str
    donor: str
    method: str
    role: str
    metric: str
    value: float


@dataclass
class StudyResults:
    """What the finished runs of a study add up to.

    Args:
        study: the plan.
        records: every measured value.
        comparison: every method and metric.
        done: runs that are finished.
        total: runs that were planned.
        failed: folder of a job to its error in one line.
    """

    study: Study
    records: list[Record]
    comparison: Comparison
    done: int
    total: int
    failed: dict[str, str] = field(default_factory=dict)


def collect(out: Path, study: Study, failed: Mapping[str, str] | None = None) -> StudyResults:
    """Reads the finished runs of a study, and writes ``results.csv`` and ``summary.json``.

    Args:
        out: folder of the study.
        study: its plan.
        failed: folder of a job to its error in one line.
    """
    out, failed = Path(out), dict(failed or {})
    runs = [job.key for job in study_jobs(study) if job.key.kind == "run"]
    finished = [task for task in runs if is_done(out, task)]
    rows = [row for task in finished for row in _rows(out, study, task)]
    scored_beside = baseline_variants(study)
    records = [as_record(row, scored_beside) for row in rows]
    results = StudyResults(
        study, records, compare(records, study.reference), len(finished), len(runs), failed
    )
    if finished:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)
        atomic_write(out / RESULTS, text.getvalue())
    summary = {
        "done": results.done,
        "total": results.total,
        "failed": failed,
        "notes": study.notes,
        "seeds": study.seeds,
        "folds": [asdict(fold) for fold in study.folds],
        **results.comparison.as_dict(),
    }
    write_json(out / SUMMARY, summary)
    return results


def is_done(out: Path, task: Task) -> bool:
    """Whether a job has left behind all that it is for."""
    folder = Path(out) / task.folder
    if task.kind == "run":
        return (folder / METRICS).is_file()
    return (folder / LAST).is_file() and read_meta(folder / LAST)["stage"] != "encoder"


def save_run(
    folder: Path, result: FitResult, evaluations: Mapping[str, SlideEvaluation], **seconds: float
) -> None:
    """Writes ``metrics.json`` of one run, which then counts as finished.

    Args:
        folder: of the run.
        result: of its training.
        evaluations: held-out slide to its evaluation.
        **seconds: time that a part took, by its name.
    """
    slides = {
        name: {"methods": evaluation.methods, "measures": evaluation.measures}
        for name, evaluation in evaluations.items()
    }
    trained = {"best_epoch": result.best_epoch, "validation_e_geo": result.best}
    times = {f"seconds_{name}": round(value, 1) for name, value in seconds.items()}
    write_json(folder / METRICS, {**trained, **times, "slides": slides})


def load_run(out: Path, task: Task) -> dict:
    """What :func:`save_run` wrote."""
    return json.loads((Path(out) / task.folder / METRICS).read_text())


def as_record(row: Row, scored_beside: Mapping[str, str]) -> Record:
    """A row under the name that its method has in the table of a study.

    Args:
        row: of the results.
        scored_beside: variant to the one whose baselines are its own; where encoders differ,
            so do baselines.
    """
    method = row.method
    if row.role == "variant":
        method = row.variant
    elif row.role == "ablation":
        method = f"{row.variant}: {row.method}"
    elif row.role == "baseline" and len(set(scored_beside.values())) > 1:
        method = f"{row.method} [{scored_beside[row.variant]}]"
    return Record(method, row.role, row.slide, row.seed, row.metric, float(row.value))


def _rows(out: Path, study: Study, task: Task) -> Iterator[Row]:
    suffixes = tuple(f"_{suffix}" for suffix in E_GEO_SUFFIX.values())
    for slide, found in load_run(out, task)["slides"].items():
        run = (task.variant, task.fold, task.seed, slide, study.donors[slide])
        # E_geo of every method stands among its own metrics
        measures = {k: v for k, v in found["measures"].items() if not k.endswith(suffixes)}
        for method, values in found["methods"].items():
            role = _study_role(method)
            if role == "variant":
                values = values | measures
            for metric, value in values.items():
                if value is not None:
                    yield Row(*run, method, role, metric, value)


def _study_role(method: str) -> str:
    role = role_of(method)
    return {"model": "variant", "oracle": "ablation"}.get(role, role)
