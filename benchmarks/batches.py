"""Minisets, whole slides, both, or what the program chooses: scores and time of training.

    python -m benchmarks.batches --sizes 1000,10000 --section cells.h5ad --out DIR

Runs the study ``experiments/batches.yaml`` on three simulated slides of each size, and on one
section whose cells are dealt at random into three parts; each slide or part is held out in turn.
Writes ``batches.json``, and beside it the folder of each study. Jobs that run side by side slow
each other, so times are compared within one call only.
"""

from __future__ import annotations

import argparse
import math
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from ipar_sparse.cli.experiment import parse_seeds
from ipar_sparse.config import RunConfig
from ipar_sparse.data.readers import read_files
from ipar_sparse.data.simulation import iter_slides
from ipar_sparse.data.slide import Slide
from ipar_sparse.data.writers import write_slide
from ipar_sparse.evaluation.comparison import Record, compare, difference
from ipar_sparse.evaluation.study_plan import Study, load_variants, plan_study, study_jobs
from ipar_sparse.evaluation.study_results import is_done, load_run
from ipar_sparse.evaluation.study_run import run_study

from . import harness

SCORE, SECONDS = "score", "seconds"
"""sqrt(distance Spearman x neighbour hit), as in selection; seconds of training but the encoder."""
METRICS = ("distance_spearman", "neighbor_hit@15", "procrustes", SCORE, SECONDS)
HEAD = ("data", "a step sees", "distance Spearman", "neighbour hit @15", "Procrustes error")
HEAD += ("score", "score less the best (± standard error)", "seconds", "runs")


def deal(section: Slide, parts: int, seed: int = 0) -> Iterator[Slide]:
    """The cells of a slide in random parts, each with the whole extent of the tissue."""
    part = np.random.default_rng(seed).integers(0, parts, section.num_cells)
    for number in range(parts):
        slide = section.take(np.flatnonzero(part == number))
        slide.name = f"part{number + 1}"
        yield slide


def measured(study: Study, out: Path) -> list[Record]:
    """Scores and seconds of the runs that are finished."""
    found = []
    for task in (job.key for job in study_jobs(study)):
        if task.kind == "run" and is_done(out, task):
            run = load_run(out, task)
            for slide, one in run["slides"].items():
                values = dict(one["methods"]["model"], seconds=run["seconds_training"])
                product = values["distance_spearman"] * values["neighbor_hit@15"]
                values[SCORE] = math.sqrt(max(product, 0.0))
                key = task.variant, "variant", slide, task.seed
                found += [Record(*key, metric, float(values[metric])) for metric in METRICS]
    return found


def rows(name: str, records: Sequence[Record], reference: str) -> list[dict]:
    """One row a variant, over the slides and seeds that all have: means, and the paired
    difference of its score to the best one."""
    scores: dict[str, dict] = {}
    for record in records:
        if record.metric == SCORE:
            scores.setdefault(record.method, {})[record.slide, record.seed] = record.value
    common = set.intersection(*map(set, scores.values())) if scores else set()
    if not common:
        return []
    scores = {method: {key: own[key] for key in common} for method, own in scores.items()}
    summary = compare([r for r in records if (r.slide, r.seed) in common], reference)
    best = max(scores, key=lambda method: summary.of(SCORE, method).mean)
    found = []
    for method, own in scores.items():
        gap = difference(SCORE, own, scores[best], best)
        row = {"data": name, "variant": method, "runs": len(own)}
        row |= {metric: summary.of(metric, method).mean for metric in METRICS}
        found.append(row | {"less_best": gap.mean, "less_best_se": gap.se, "over": gap.over})
    return found


def _error(value: float | None) -> str:
    """A standard error; one slide and one seed have none."""
    return "" if value is None else f" ± {value:.4f}"


def _files(given: argparse.Namespace) -> Iterator[tuple[str, list[Path]]]:
    sets = {}
    for size in (int(float(text)) for text in given.sizes.split(",") if text):
        sets[f"cortex of {size:,} cells"] = iter_slides("cortex", slides=3, spots=size)
    if given.section:
        (section,) = read_files([given.section], RunConfig().data, require_pos=True)
        sets[f"{section.num_cells:,} cells in three parts"] = deal(section, 3)
    for number, (name, slides) in enumerate(sets.items()):
        paths = []
        for slide in slides:
            paths.append(given.out / f"data{number}" / f"{slide.name}.h5ad")
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            write_slide(slide, paths[-1], compression=None)
        yield name, paths


def main(argv: list[str] | None = None) -> None:
    """``python -m benchmarks.batches``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, default=Path("experiments/batches.yaml"))
    parser.add_argument("--sizes", default="", help="cells of a simulated slide, with commas")
    parser.add_argument("--section", type=Path, help="a file of one section, dealt into parts")
    parser.add_argument("--seeds", default="0-2")
    parser.add_argument("--set", action="append", default=[], help="a setting of all variants")
    parser.add_argument("--device", help="as configured if left out")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--minutes", type=float, help="of each study; then what is done counts")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    record = harness.Record(given.out / "batches.json", torch.device(device))
    record.more |= {"jobs": given.jobs, "settings": given.set}
    variants, stated = load_variants([], [given.study], given.set)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for number, (name, paths) in enumerate(_files(given)):
        folder, reference = given.out / f"study{number}", stated["reference"]
        study = plan_study(paths, variants, seeds=parse_seeds(given.seeds), reference=reference)
        signal.setitimer(signal.ITIMER_REAL, 60 * given.minutes if given.minutes else 0)
        try:
            run_study(study, folder, jobs=given.jobs, device=given.device)
        except KeyboardInterrupt:
            print("time is up")
        signal.setitimer(signal.ITIMER_REAL, 0)
        for row in rows(name, measured(study, folder), reference):
            record.add(row)
    table = [
        [r["data"], r["variant"], *(r[metric] for metric in METRICS[:4])]
        + [f"{r['less_best']:+.4f}{_error(r['less_best_se'])}", r[SECONDS], r["runs"]]
        for r in record.rows
    ]
    print(harness.markdown(HEAD, table))


if __name__ == "__main__":
    main()
