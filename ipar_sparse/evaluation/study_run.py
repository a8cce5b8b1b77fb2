"""The work of a study: every run on record, none of which saw what scores it."""

from __future__ import annotations

import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..config import resolve_device
from ..data.slide import Slide
from ..data.splits import Fold
from ..errors import UserError
from ..files import atomic_write
from ..inference.predictor import Predictor
from ..inference.reference import find_reference
from ..progress import console, log_to
from ..train.fit import fit, fit_encoder
from ..train.run_folder import is_resumable, lock_run
from .block_bootstrap import save_layouts
from .jobs import run_jobs, standing
from .scoring import score_slide
from .study_plan import (
    PLAN,
    Study,
    Task,
    baseline_variants,
    check_same_study,
    cv_groups,
    encoder_task,
    load_plan,
    read_all,
    read_scored_cells,
    save_plan,
    study_jobs,
)
from .study_progress import Board, described
from .study_results import StudyResults, collect, is_done, load_run, save_run
from .study_workers import cluster_workers, local_workers

ERROR = "error.txt"
LOG = "log.txt"
_LAG_SECONDS = 90.0
"""Until a shared folder shows what another machine wrote, or lets go of locks of one that died."""


def run_study(
    study: Study,
    out: Path,
    *,
    jobs: int | None = None,
    runs_per_gpu: int | None = None,
    scheduler: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    on_collect: Callable[[Path, StudyResults], object] | None = None,
) -> StudyResults:
    """Works off a study, or what is left of it, and writes ``results.csv`` and ``summary.json``.

    Finished runs are kept, stopped ones go on from their last checkpoint, failed ones are tried
    again. A study in ``out`` may grow by variants and seeds; another study is refused.

    Args:
        study: the plan.
        out: folder of the study.
        jobs: runs side by side; as many as cores, memory and GPUs allow if left out. They share
            the cores, and none has more threads than ``OMP_NUM_THREADS`` allows.
        runs_per_gpu: runs that share a GPU, while its memory allows.
        scheduler: address of a dask scheduler, or its file, whose workers do the runs. They see
            ``out`` and the slides under the same paths.
        device: where all runs are computed; as configured if left out.
        overwrite: remove an earlier study in ``out``, whatever it is, and start anew.
        on_collect: called with folder and results once they are written, also after ctrl-C.

    Raises:
        UserError: ``out`` holds something else, or the scheduler is lost, or a worker cannot do
            the runs; results of what is finished are written.
        KeyboardInterrupt: after ctrl-C; results of what is finished are written.
    """
    out = Path(out)
    if scheduler is not None:
        with standing(scheduler):  # a mistake leaves nothing behind
            pass
    if overwrite:
        _remove_study(out)
    check_study_folder(study, out)
    if device is not None:
        if scheduler is None:
            resolve_device(device)
        variants = {n: c.replace(train={"device": device}) for n, c in study.variants.items()}
        study = replace(study, variants=variants)
    out.mkdir(parents=True, exist_ok=True)
    save_plan(study, out)
    failed: dict[str, str] = {}
    try:
        with _sigterm_as_ctrl_c():
            _work_off(study, out, jobs, runs_per_gpu, scheduler, failed)
    finally:
        results = collect(out, study, failed)
        if on_collect is not None:
            on_collect(out, results)
    return results


def check_study_folder(study: Study, out: Path) -> None:
    """Refuses a folder that holds anything but this study, or a part of it.

    Raises:
        UserError: it does.
    """
    out = Path(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise UserError(f"--out: {out} is a file, not a folder; choose another")
    if not (out / PLAN).is_file():
        raise UserError(f"{out} is not empty and holds no study; choose another --out")
    check_same_study(load_plan(out), study, out)


def _remove_study(out: Path) -> None:
    """Removes the folder of a study; of anything else it removes nothing."""
    if (out / PLAN).is_file():
        shutil.rmtree(out)


def _work_off(
    study: Study,
    out: Path,
    jobs: int | None,
    runs_per_gpu: int | None,
    scheduler: str | None,
    failed: dict[str, str],
) -> None:
    """Runs all jobs that are not done, says so line by line, and notes what failed."""
    planned = study_jobs(study)
    todo = [job for job in planned if not is_done(out, job.key)]
    needed = {job.after for job in todo}
    todo = [job for job in todo if job.key.kind == "run" or job.key in needed]
    total = sum(job.key.kind == "run" for job in planned)
    done = total - sum(job.key.kind == "run" for job in todo)
    if scheduler is None:
        workers = local_workers(study, len(todo), jobs, runs_per_gpu)
        where = f"{workers.processes} at a time"
    else:
        workers, where = cluster_workers(scheduler, study, out), f"on workers of {scheduler}"
    start = time.monotonic()
    with Board() as board:
        board.say(
            f"{total} runs: {len(study.variants)} variants x {len(study.folds)} held out x "
            f"{len(study.seeds)} seeds; {done} are done, {where}"
        )
        for note in study.notes:
            board.say(f"note: {note}")
        work = _Work(out.absolute())
        shown: dict[str, Any] = {"tell": board.say, "show": board.show, "show_every": board.every}
        for task, error in run_jobs(work, todo, workers, **shown):
            if error is None and not _within(_LAG_SECONDS, partial(is_done, out, task)):
                error = f"its worker wrote to another {out}"
            if error is not None:
                failed[task.folder] = error
            if task.kind == "run":
                done += error is None
                minutes = (time.monotonic() - start) / 60
                told = f"failed: {error}" if error else _score(out, task)
                board.say(f"[{done}/{total}] {described(task)}: {told}; {minutes:.1f} min in all")


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Whether something comes true in time."""
    until = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < until:
        time.sleep(1.0)
    return found


@dataclass(frozen=True)
class _Work:
    """What a process does for a job: all that it needs to know lies in the folder of the study."""

    out: Path

    def __call__(self, task: Task, stop: threading.Event | None) -> None:
        study = load_plan(self.out)
        folder = self.out / task.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ERROR).unlink(missing_ok=True)
        work = _train_encoder if task.kind == "encoder" else _run
        _within(_LAG_SECONDS, partial(_is_free, folder))
        with log_to(folder / LOG):
            try:
                work(study, self.out, task, stop)
            except Exception as error:
                console.print(traceback.format_exc(), markup=False)
                atomic_write(folder / ERROR, f"{error}\n")
                raise


def _is_free(folder: Path) -> bool:
    """Whether no other process works in the folder of a job."""
    try:
        with lock_run(folder):
            return True
    except UserError:
        return False


def _train_encoder(study: Study, out: Path, task: Task, stop: threading.Event | None) -> None:
    slides, fold = _slides_by_name(study, task), study.fold(task.fold)
    folder = out / task.folder
    fit_encoder(
        [slides[name] for name in fold.train],
        study.config(task.variant, task.seed),
        folder,
        donors=cv_groups(study, fold),
        cells=_cells(study, fold, slides),
        resume=is_resumable(folder),
        stop=stop,
    )


def _run(study: Study, out: Path, task: Task, stop: threading.Event | None) -> None:
    slides, fold = _slides_by_name(study, task), study.fold(task.fold)
    folder, config = out / task.folder, study.config(task.variant, task.seed)
    shared = encoder_task(study, task.variant, task.fold, task.seed)
    if shared is not None:
        _within(_LAG_SECONDS, partial(is_done, out, shared))
    start = time.monotonic()
    result = fit(
        [slides[name] for name in fold.train],
        [] if fold.val is None else [slides[fold.val]],
        config,
        out=folder,
        donors=cv_groups(study, fold),
        cells=_cells(study, fold, slides),
        resume=is_resumable(folder),
        encoder=shared and out / shared.folder,
        stop=stop,
    )
    trained = time.monotonic()
    predictor = Predictor.load(folder, resolve_device(config.train.device))
    baselines = config.eval.baselines and baseline_variants(study)[task.variant] == task.variant
    evaluations = {}
    for name in fold.test:
        if stop is not None and stop.is_set():
            raise KeyboardInterrupt
        evaluations[name] = score_slide(
            predictor,
            slides[name],
            baselines=baselines,
            known=[slides[one] for one in fold.train] if baselines else (),
            reference=find_reference(folder, study.frame) if study.frame else None,
        )
        if study.cells:
            save_layouts(folder, evaluations[name])
    scored = time.monotonic()
    save_run(folder, result, evaluations, training=trained - start, scoring=scored - trained)


def _slides_by_name(study: Study, task: Task) -> dict[str, Slide]:
    config = study.variants[task.variant]
    slides = [*read_all(study.files, config), *read_scored_cells(study.cells, config)]
    return {slide.name: slide for slide in slides}


def _cells(study: Study, fold: Fold, slides: Mapping[str, Slide]) -> list[Slide]:
    """The cells that a run is trained for."""
    return [slides[name] for name in fold.test] if study.cells else []


def _score(out: Path, task: Task) -> str:
    found = load_run(out, task)
    scores = [slide["methods"]["model"]["distance_spearman"] for slide in found["slides"].values()]
    seconds = found["seconds_training"] + found["seconds_scoring"]
    return f"distance Spearman {np.mean(scores):.3f} in {seconds:.0f} s"


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """A polite kill is ctrl-C: workers save, and results so far are written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
