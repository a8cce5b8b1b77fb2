"""Variants x held-out slides x seeds: every run on record, none of which saw what scores it.

A study is planned first (which variant, which slides are held out, which slide decides when to
stop), written to ``study.json``, and then worked off job by job. Every stage of a job is fitted
by :func:`~ipar_sparse.train.fit.fit` on training slides; held-out slides are first looked at
when they are scored. Variants with the same data and encoder settings share one trained encoder.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import os
import re
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from rich.console import Console

from .. import __version__
from ..config import PRESETS, RunConfig, load_config, resolve_device
from ..data.slide import Slide
from ..errors import UserError
from ..files import atomic_write
from ..inference.checkpoint import LAST, read_meta
from ..inference.predictor import Predictor
from ..progress import console, log_to
from ..report.slide import write_metrics
from ..report.study import StudyPage, print_study, write_study_report
from ..train.batches import read_file
from ..train.crew import Job, run_jobs
from ..train.fit import fit, fit_encoder, slide_digest
from .comparison import Comparison, Record, compare
from .scoring import ENERGY_OF, FORMS, score_slide

logger = logging.getLogger(__name__)

PLAN = "study.json"
METRICS = "metrics.json"
ERROR = "error.txt"
LOG = "log.txt"
RESULTS = "results.csv"
SUMMARY = "summary.json"

SLIDE, DONOR = "slide", "donor"
FEW_SLIDES = 3
"""With up to so many, all are trained on: one more slide is worth more than the best epoch."""
_ROLES = {"model": "variant", **dict.fromkeys(FORMS, "form"), "true coordinates": "floor"}
_COLUMNS = ("variant", "fold", "seed", "slide", "donor", "method", "role", "metric", "value")


@dataclass(frozen=True)
class Fold:
    """Which slides do what.

    Args:
        name: of the held-out slide or donor.
        test: names of the slides that are held out of every stage.
        val: name of the slide that decides when to stop; None where slides are too few to set
            one aside, and all epochs are run.
        train: names of the slides that are trained on.
    """

    name: str
    test: tuple[str, ...]
    val: str | None
    train: tuple[str, ...]

    @property
    def seen(self) -> tuple[str, ...]:
        """Names of the slides that training reads."""
        return self.train if self.val is None else (*self.train, self.val)


class Task(NamedTuple):
    """A job of a study: train an encoder, or train and score a variant."""

    folder: str
    kind: str
    variant: str
    fold: str
    seed: int


@dataclass(frozen=True)
class Study:
    """What is to be run.

    Args:
        files: files of the slides.
        digests: slide name to a digest of its content.
        donors: slide name to its donor.
        variants: name to configuration; the seed in it is not used.
        folds: which slides are held out.
        seeds: of everything random.
        reference: variant that the others are compared with.
        notes: what a reader should know about the plan.
    """

    files: tuple[str, ...]
    digests: dict[str, str]
    donors: dict[str, str]
    variants: dict[str, RunConfig]
    folds: tuple[Fold, ...]
    seeds: tuple[int, ...]
    reference: str
    notes: tuple[str, ...] = ()

    def config(self, variant: str, seed: int) -> RunConfig:
        """The configuration of one run."""
        return self.variants[variant].replace(train={"seed": seed})

    def fold(self, name: str) -> Fold:
        """The fold of a name."""
        return next(fold for fold in self.folds if fold.name == name)

    def left_out_together(self, fold: Fold) -> dict[str, str]:
        """Slide to its donor, or to itself where the donor of what is held out is trained on: what
        is tried before training is to hold on slides like those held out."""
        trained = {self.donors[name] for name in fold.train}
        if all(self.donors[name] in trained for name in fold.test):
            return {name: name for name in fold.seen}
        return {name: self.donors[name] for name in fold.seen}

    @cached_property
    def encoder_groups(self) -> dict[str, str]:
        """Variant to the digest of all settings that stage A depends on."""
        return {name: _encoder_settings(config) for name, config in self.variants.items()}

    @cached_property
    def baseline_variants(self) -> dict[str, str]:
        """Digest of stage A to the variant beside which its baselines are run."""
        groups = self.encoder_groups
        first = {groups[self.reference]: self.reference}
        for name, group in groups.items():
            first.setdefault(group, name)
        return first

    def encoder_task(self, variant: str, fold: str, seed: int) -> Task | None:
        """The job that trains the encoder of a run; None where embeddings are brought along."""
        if self.variants[variant].data.embedding is not None:
            return None
        group = self.encoder_groups[variant]
        folder = f"encoders/{group}/{_folder(fold)}/seed{seed}"
        return Task(folder, "encoder", self.baseline_variants[group], fold, seed)

    def jobs(self) -> list[Job]:
        """Every job, seed by seed, so that a study stopped early has all folds and variants."""
        jobs: dict[Task, Job] = {}
        for seed in self.seeds:
            for fold in (fold.name for fold in self.folds):
                for variant in self.variants:
                    encoder = self.encoder_task(variant, fold, seed)
                    if encoder is not None:
                        jobs.setdefault(encoder, Job(encoder))
                    folder = f"runs/{variant}/{_folder(fold)}/seed{seed}"
                    task = Task(folder, "run", variant, fold, seed)
                    jobs[task] = Job(task, encoder)
        return list(jobs.values())

    def save(self, out: Path) -> None:
        """Writes the plan to ``study.json``."""
        values = asdict(self) | {
            "variants": {n: c.model_dump(mode="json") for n, c in self.variants.items()},
            "version": __version__,
        }
        atomic_write(out / PLAN, json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, out: Path) -> Study:
        """Reads a plan back.

        Raises:
            UserError: the folder holds no readable study.
        """
        try:
            values = json.loads((Path(out) / PLAN).read_text())
            values.pop("version")
            variants = {n: RunConfig.model_validate(c) for n, c in values["variants"].items()}
            folds = tuple(
                Fold(f["name"], tuple(f["test"]), f["val"], tuple(f["train"]))
                for f in values["folds"]
            )
            tuples = {name: tuple(values[name]) for name in ("files", "seeds", "notes")}
            return cls(**values | tuples | {"variants": variants, "folds": folds})
        except FileNotFoundError:
            raise UserError(f"{out} is no study: it has no {PLAN}; choose another --out") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{Path(out) / PLAN} cannot be read ({error}); choose another --out"
            ) from None


@dataclass
class StudyResults:
    """What a study came to.

    Args:
        comparison: every method and metric.
        done: runs that are finished.
        total: runs that were planned.
        failed: folder of a job to its one-line error.
        page: the HTML page, None before the first run is finished.
    """

    comparison: Comparison
    done: int
    total: int
    failed: dict[str, str] = field(default_factory=dict)
    page: Path | None = None


def plan_study(
    files: Sequence[Path],
    variants: Mapping[str, RunConfig],
    *,
    hold_out: str = SLIDE,
    seeds: Iterable[int] = (0,),
    reference: str | None = None,
    donor_key: str | None = None,
    donor_pattern: str | None = None,
    donor_map: Path | None = None,
) -> Study:
    """Reads the slides and decides who is held out when.

    Args:
        files: AnnData files of slides with positions.
        variants: name to configuration.
        hold_out: ``"slide"`` (each in turn), ``"donor"`` (all slides of each in turn), or names
            of slides or donors with commas, each held out in turn.
        seeds: of everything random; all variants are run with each.
        reference: the variant compared with; the first one if left out.
        donor_key: obs column that names the donor.
        donor_pattern: regular expression searched in the slide's name: its first group, or all
            of it, is the donor.
        donor_map: YAML file of ``slide: donor``.

    Raises:
        UserError: on anything that cannot be run as asked.
    """
    if not variants:
        raise UserError("a study needs a variant; name a preset, e.g. v1")
    for name in variants:
        if not re.fullmatch(r"[\w.+=-]+", name):
            raise UserError(f"variant {name!r}: use letters, digits and . + = - _ only")
    reference = reference or next(iter(variants))
    if reference not in variants:
        raise UserError(
            f"the reference {reference!r} is not among the variants ({', '.join(variants)})"
        )
    files = tuple(str(Path(path).absolute()) for path in files)
    per_setting = {_reading(config): config for config in variants.values()}
    slides = {s.name: s for config in per_setting.values() for s in read_all(files, config)}
    donors = find_donors(slides.values(), donor_key, donor_pattern, donor_map)
    folds, notes = plan_folds(donors, hold_out)
    units = [config.train for config in variants.values() if config.train.unit != "slide"]
    smallest = max((settings.miniset_min for settings in units), default=0)
    for name in dict.fromkeys(name for fold in folds for name in fold.seen):
        if slides[name].num_cells < smallest:
            raise UserError(
                f"{name} has {slides[name].num_cells} cells, fewer than the smallest miniset "
                f"({smallest}); leave it out or --set train.miniset_min={slides[name].num_cells}"
            )
    seeds = tuple(dict.fromkeys(seeds))
    if not seeds:
        raise UserError("a study needs a seed, e.g. --seeds 0-4")
    digests = {name: _digest(slide) for name, slide in slides.items()}
    same: dict[str, str] = {}
    for name, slide in slides.items():
        other = same.setdefault(slide_digest(slide), name)
        if other != name:
            raise UserError(f"{other} and {name} are the same cells; give each slide once")
    return Study(
        files, digests, donors, dict(variants), tuple(folds), seeds, reference, tuple(notes)
    )


def plan_folds(donors: Mapping[str, str], hold_out: str) -> tuple[list[Fold], list[str]]:
    """Folds for slides of known donors, and what is to be told about them.

    The slide that decides when to stop is one of :func:`spared`; which one rotates over the folds.

    Args:
        donors: slide to donor, in the order of the slides.
        hold_out: as in :func:`plan_study`.

    Raises:
        UserError: an unknown name, one donor only, or too few slides.
    """
    of_donor: dict[str, list[str]] = {}
    for slide, donor in donors.items():
        of_donor.setdefault(donor, []).append(slide)
    if hold_out == SLIDE:
        held = {slide: [slide] for slide in donors}
    elif hold_out == DONOR:
        if len(of_donor) < 2:
            raise UserError(
                f"all slides are of one donor ({next(iter(of_donor))}), so none can be held out; "
                "give slides of two donors, or say whose they are with --donor-pattern, "
                "--donor-key or --donor-map"
            )
        held = of_donor
    else:
        held = {}
        for name in (part.strip() for part in hold_out.split(",")):
            if name not in donors and name not in of_donor:
                raise UserError(
                    f"--hold-out {name}: no such slide or donor; slides: {', '.join(donors)}; "
                    f"donors: {', '.join(of_donor)}"
                )
            held[name] = [name] if name in donors else of_donor[name]
    folds, notes = [], []
    for number, (name, test) in enumerate(held.items()):
        rest = [slide for slide in donors if slide not in test]
        if not rest:
            notes.append(f"{name} cannot be held out: that leaves no slide to train on")
            continue
        val = None
        if len(rest) > FEW_SLIDES:
            able = spared({slide: donors[slide] for slide in rest}, {donors[s] for s in test})
            val = able[number % len(able)]
        folds.append(Fold(name, tuple(test), val, tuple(slide for slide in rest if slide != val)))
    if notes and (not folds or hold_out not in (SLIDE, DONOR)):
        raise UserError(f"{notes[0]}; give more slides")
    return folds, notes


def spared(donors: Mapping[str, str], held: Collection[str] = ()) -> list[str]:
    """Slides that training can best do without, one of which is to decide when to stop.

    Those of donors that have most, and of another donor than what is held out if there is one: its
    sisters are worth more to a slide than any other.

    Args:
        donors: slide to donor.
        held: donors of slides that are held out.
    """
    count = Counter(donors.values())
    most = [slide for slide, donor in donors.items() if count[donor] == max(count.values())]
    return [slide for slide in most if donors[slide] not in held] or most


def find_donors(
    slides: Iterable[Slide],
    key: str | None = None,
    pattern: str | None = None,
    table: Path | None = None,
) -> dict[str, str]:
    """Slide to donor; every slide is its own donor if nothing is said.

    Args:
        slides: in order.
        key: obs column.
        pattern: regular expression on the slide's name.
        table: YAML file of ``slide: donor``.

    Raises:
        UserError: a slide whose donor cannot be told.
    """
    if sum(given is not None for given in (key, pattern, table)) > 1:
        raise UserError("give one of --donor-key, --donor-pattern and --donor-map")
    if pattern is not None:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"--donor-pattern {pattern!r} is no regular expression: {error}"
            ) from None
    mapping = _read_yaml(table) if table is not None else {}
    donors = {}
    for slide in slides:
        if key is not None:
            if key not in slide.obs:
                raise UserError(
                    f"{slide.name} has no obs column {key!r} to tell its donor; "
                    f"there are {', '.join(slide.obs) or 'none'}"
                )
            values = np.unique(np.asarray(slide.obs[key]).astype(str))
            if len(values) != 1:
                raise UserError(
                    f"{slide.name}: obs[{key!r}] names {len(values)} donors on one slide; "
                    "use --slide-key if the file holds several slides"
                )
            donors[slide.name] = str(values[0])
        elif pattern is not None:
            match = regex.search(slide.name)
            if match is None:
                raise UserError(f"--donor-pattern {pattern!r} does not match slide {slide.name}")
            donors[slide.name] = match[1] if regex.groups else match[0]
        elif table is not None:
            if slide.name not in mapping:
                raise UserError(f"{table} does not name the donor of {slide.name}")
            donors[slide.name] = str(mapping[slide.name])
        else:
            donors[slide.name] = slide.name
    return donors


def load_variants(
    names: Sequence[str],
    files: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    **sections: Mapping[str, Any],
) -> tuple[dict[str, RunConfig], dict[str, Any]]:
    """Configurations of presets and of the variants in study files.

    A study file is YAML: ``variants`` maps each name to settings in which it differs
    (``model.beta: 1.0``; ``preset: NAME`` to start from); ``set`` holds settings of all of them;
    ``reference``, ``seeds`` and ``hold_out`` are defaults of the command line. Later wins:
    preset, ``set``, ``overrides``, the variant's own settings.

    Args:
        names: presets.
        files: study files.
        overrides: ``section.key=value`` for all variants.
        **sections: values for all variants.

    Returns:
        variants by name, and what the files say of ``reference``, ``seeds`` and ``hold_out``.

    Raises:
        UserError: an unknown preset or key, a variant given twice, an unreadable file.
    """
    given: dict[str, dict[str, Any]] = {name: {"preset": name} for name in names}
    common: dict[str, dict[str, Any]] = {}
    said: dict[str, Any] = {}
    for path in files:
        values = _read_yaml(path)
        known = ("description", "reference", "seeds", "hold_out", "set", "variants")
        for key in values:
            if key not in known:
                raise UserError(f"{path}: unknown key {key!r}; known: {', '.join(known)}")
        variants = values.get("variants")
        if not isinstance(variants, dict) or not variants:
            raise UserError(f"{path}: needs `variants:` with a name and settings for each")
        for name, own in variants.items():
            name = str(name)
            own = {} if own is None else own
            if not isinstance(own, dict):
                raise UserError(f"{path}: variant {name} needs settings such as model.beta: 1.0")
            own = {"preset": name if name in PRESETS else None} | own
            shared = values.get("set") or {}
            if name in given and (own, shared) != (given[name], common.get(name, {})):
                raise UserError(
                    f"{path}: variant {name} is given elsewhere with other settings; rename one"
                )
            given[name], common[name] = own, shared
        said |= {k: values[k] for k in ("reference", "seeds", "hold_out") if k in values}
    configs = {}
    for name, own in given.items():
        own = dict(own)
        preset = own.pop("preset")
        shared = [f"{key}={_as_text(value)}" for key, value in common.get(name, {}).items()]
        mine = [f"{key}={_as_text(value)}" for key, value in own.items()]
        configs[name] = load_config(None, [*shared, *overrides, *mine], preset=preset, **sections)
    return configs, said


def run_study(
    study: Study, out: Path, *, jobs: int | None = None, device: str | None = None
) -> StudyResults:
    """Works off a study, or what is left of it, and writes tables, figure and page.

    Finished runs are kept, stopped ones go on from their last checkpoint, failed ones are tried
    again. A study in ``out`` may grow by variants and seeds; another study is refused.

    Args:
        study: the plan.
        out: folder of the study.
        jobs: runs side by side; half of the cores if left out. They share the cores, each of them
            with no more threads than ``OMP_NUM_THREADS`` allows.
        device: where all runs are computed; as configured if left out.

    Raises:
        UserError: ``out`` holds something else.
        KeyboardInterrupt: after ctrl-C; results of what is finished are written.
    """
    out = Path(out)
    _take_folder(study, out)
    if device is not None:
        resolve_device(device)
        variants = {n: c.replace(train={"device": device}) for n, c in study.variants.items()}
        study = replace(study, variants=variants)
    out.mkdir(parents=True, exist_ok=True)
    study.save(out)
    planned = study.jobs()
    runs = [job for job in planned if job.key.kind == "run"]
    todo = [job for job in planned if not _is_done(out, job.key)]
    needed = {job.after for job in todo if job.after is not None}
    todo = [job for job in todo if job.key.kind == "run" or job.key in needed]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = max(1, min(jobs or cores // 2, len(todo)))
    told = Console(stderr=True, highlight=False)
    count, left = len(runs), sum(job.key.kind == "run" for job in todo)
    told.print(
        f"{count} runs: {len(study.variants)} variants x {len(study.folds)} held out x "
        f"{len(study.seeds)} seeds; {count - left} are done, {processes} at a time"
    )
    for note in study.notes:
        told.print(f"note: {note}", markup=False, soft_wrap=True)
    failed: dict[str, str] = {}
    done, start = count - left, time.monotonic()
    try:
        with _stop_on_sigterm():
            threads = _threads(cores // processes) if processes > 1 else None
            for task, error in run_jobs(_Work(out), todo, processes=processes, threads=threads):
                if error is not None:
                    failed[task.folder] = error
                if task.kind == "run":
                    done += error is None
                    told.print(
                        _line(out, study, task, error, done, count, time.monotonic() - start),
                        markup=False,
                        soft_wrap=True,
                    )
    finally:
        outcome = collect(out, study, failed)
    print_study(outcome.comparison, study.reference)
    return outcome


def collect(out: Path, study: Study, failed: Mapping[str, str] | None = None) -> StudyResults:
    """Reads the finished runs of a study and writes ``results.csv``, ``summary.json`` and page.

    Args:
        out: folder of the study.
        study: its plan.
        failed: folder of a job to its error.
    """
    out, failed = Path(out), dict(failed or {})
    runs = [job.key for job in study.jobs() if job.key.kind == "run"]
    finished = [task for task in runs if _is_done(out, task)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    records = []
    for task in finished:
        for row in _rows(out, study, task):
            writer.writerow(row)
            records.append(_record(study, row))
    comparison = compare(records, study.reference)
    outcome = StudyResults(comparison, len(finished), len(runs), failed)
    if finished:
        atomic_write(out / RESULTS, text.getvalue())
        outcome.page = write_study_report(
            out,
            StudyPage(
                comparison=comparison,
                records=records,
                donors=study.donors,
                folds=[asdict(fold) for fold in study.folds],
                seeds=study.seeds,
                settings={n: _differences(c) for n, c in study.variants.items()},
                notes=list(study.notes),
                failed=failed,
                done=len(finished),
                total=len(runs),
            ),
        )
    write_metrics(
        out / SUMMARY,
        {
            "done": len(finished),
            "total": len(runs),
            "failed": failed,
            "notes": list(study.notes),
            "seeds": list(study.seeds),
            "folds": [asdict(fold) for fold in study.folds],
            **comparison.as_dict(),
        },
    )
    return outcome


def _threads(share: int) -> int:
    """Of a run, whose share of the cores is known; less where the user says so, as one does who has
    several studies side by side. Threads beyond the cores wait for each other by spinning."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(share, int(allowed)) if allowed.isdigit() else share)


@lru_cache(maxsize=2)
def _read_cached(files: tuple[str, ...], reading: str) -> list[Slide]:
    data = RunConfig.model_validate({"data": json.loads(reading)}).data
    slides = [slide for path in files for slide in read_file(Path(path), data, require_pos=True)]
    for name, count in Counter(slide.name for slide in slides).items():
        if count > 1:
            raise UserError(f"{count} slides are called {name}; give each once, or rename a file")
    return slides


def read_all(files: Sequence[str], config: RunConfig) -> list[Slide]:
    """The slides of a study as a variant reads them; kept in memory for the next job.

    Raises:
        UserError: two slides of one name, or a file that cannot be read.
    """
    return _read_cached(tuple(files), _reading(config))


@dataclass(frozen=True)
class _Work:
    """The work of a job, for a process of its own: all it needs to know lies in the folder."""

    out: Path

    def __call__(self, task: Task) -> None:
        study = Study.load(self.out)
        folder = self.out / task.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ERROR).unlink(missing_ok=True)
        with log_to(folder / LOG):
            try:
                (_train_encoder if task.kind == "encoder" else _run)(study, self.out, task)
            except Exception as error:
                console.print(traceback.format_exc(), markup=False)
                atomic_write(folder / ERROR, f"{error}\n")
                raise


def _train_encoder(study: Study, out: Path, task: Task) -> None:
    slides, fold = _by_name(study, task), study.fold(task.fold)
    train = [slides[name] for name in fold.train]
    config = study.config(task.variant, task.seed)
    folder = out / task.folder
    fit_encoder(
        train, config, folder, study.left_out_together(fold), resume=(folder / LAST).is_file()
    )


def _run(study: Study, out: Path, task: Task) -> None:
    slides, fold = _by_name(study, task), study.fold(task.fold)
    folder, config = out / task.folder, study.config(task.variant, task.seed)
    shared = study.encoder_task(task.variant, task.fold, task.seed)
    start = time.monotonic()
    config.save(folder)
    val = [] if fold.val is None else [slides[fold.val]]
    result = fit(
        [slides[name] for name in fold.train],
        val,
        config,
        folder,
        resume=(folder / LAST).is_file(),
        encoder=shared and out / shared.folder,
        donors=study.left_out_together(fold),
    )
    trained = time.monotonic()
    predictor = Predictor.load(folder, resolve_device(config.train.device))
    beside = study.baseline_variants[study.encoder_groups[task.variant]]
    with_baselines = config.eval.baselines and task.variant == beside
    scores = {}
    for name in fold.test:
        bundle = score_slide(predictor, slides[name], baselines=with_baselines)
        scores[name] = {
            "methods": bundle.methods,
            "metrics": bundle.metrics,
            "diagnostics": bundle.diagnostics,
        }
    write_metrics(
        folder / METRICS,
        {
            "best_epoch": result.best_epoch,
            "validation_e_geo": result.best,
            "seconds_training": round(trained - start, 1),
            "seconds_scoring": round(time.monotonic() - trained, 1),
            "slides": scores,
        },
    )


def _by_name(study: Study, task: Task) -> dict[str, Slide]:
    return {slide.name: slide for slide in read_all(study.files, study.variants[task.variant])}


def _rows(out: Path, study: Study, task: Task) -> Iterator[tuple]:
    """Rows of the results of one run, in the order of the columns."""
    content = json.loads((out / task.folder / METRICS).read_text())
    for slide, found in content["slides"].items():
        place = (task.variant, task.fold, task.seed, slide, study.donors[slide])
        for method, values in found["methods"].items():
            role = _ROLES.get(method, "baseline")
            if role == "variant":
                values = values | found["metrics"] | found["diagnostics"]
            if method in ENERGY_OF:
                values = _energies(values, found["metrics"], ENERGY_OF[method])
            for metric, value in values.items():
                if value is not None:
                    yield (*place, method, role, metric, value)


def _energies(values: dict, metrics: dict, own: str) -> dict:
    """Values of a method with E_geo and its parts under one name for all methods."""
    suffixes = tuple(f"_{suffix}" for suffix in ENERGY_OF.values())
    values = {name: value for name, value in values.items() if not name.endswith(suffixes)}
    end = f"_{own}"
    return values | {k.removesuffix(end): v for k, v in metrics.items() if k.endswith(end)}


def _record(study: Study, row: tuple) -> Record:
    variant, _, seed, slide, _, method, role, metric, value = row
    if role == "variant":
        method = variant
    elif role == "form":
        method = f"{variant}: {method}"
    elif role == "baseline" and len(study.baseline_variants) > 1:
        method = f"{method} [{study.baseline_variants[study.encoder_groups[variant]]}]"
    return Record(method, role, slide, seed, metric, float(value))


def _line(out, study, task, error, done, count, seconds) -> str:
    head = f"[{done}/{count}] {task.variant}, {task.fold} held out, seed {task.seed}"
    if error is not None:
        return f"{head}: failed: {error}"
    found = json.loads((out / task.folder / METRICS).read_text())
    scores = [slide["methods"]["model"]["distance_spearman"] for slide in found["slides"].values()]
    took = found["seconds_training"] + found["seconds_scoring"]
    return (
        f"{head}: distance Spearman {np.mean(scores):.3f} "
        f"({took:.0f} s; {seconds / 60:.1f} min in all)"
    )


def _take_folder(study: Study, out: Path) -> None:
    """Refuses a folder that holds anything but this study, or a part of it."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise UserError(f"--out: {out} is a file, not a folder; choose another")
    if not (out / PLAN).is_file():
        raise UserError(f"{out} is not empty and holds no study; choose another --out")
    before = Study.load(out)
    differs = [
        name
        for name in ("digests", "donors", "folds")
        if getattr(before, name) != getattr(study, name)
    ]
    changed = [
        name
        for name, config in before.variants.items()
        if name not in study.variants or _identity(config) != _identity(study.variants[name])
    ]
    if not set(before.seeds) <= set(study.seeds):
        differs.append("seeds")
    if changed:
        differs.append(f"variant {changed[0]}")
    if differs:
        what = {"digests": "slides", "folds": "held-out slides"}.get(differs[0], differs[0])
        raise UserError(
            f"{out} holds another study ({what} differ); choose another --out, or ask for the "
            "same study to go on with it (seeds and variants may be added)"
        )


def _is_done(out: Path, task: Task) -> bool:
    folder = out / task.folder
    if task.kind == "run":
        return (folder / METRICS).is_file()
    return (folder / LAST).is_file() and read_meta(folder / LAST)["stage"] != "encoder"


def _identity(config: RunConfig) -> dict:
    values = config.model_dump(mode="json")
    del values["train"]["device"], values["train"]["seed"], values["data"]["cache"]
    return values


def _differences(config: RunConfig) -> list[str]:
    """Settings in which a configuration differs from the defaults, as ``section.key=value``."""
    own, default = _identity(config), _identity(RunConfig())
    return [
        f"{section}.{key}={value}"
        for section, values in own.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if value != default[section][key]
    ]


def _reading(config: RunConfig) -> str:
    """The settings that decide how a file is read, as text."""
    values = config.data.model_dump(mode="json")
    return json.dumps({k: v for k, v in values.items() if k not in ("max_genes", "cache")})


def _encoder_settings(config: RunConfig) -> str:
    values = _identity(config)
    text = json.dumps([values["data"], values["encoder"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _digest(slide: Slide) -> str:
    digest = hashlib.sha256(slide_digest(slide).encode())
    if slide.expression is not None:
        for part in (slide.expression.indptr, slide.expression.indices, slide.expression.data):
            digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()[:16]


def _folder(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.+=-]", "_", name)


def _as_text(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path} is not valid YAML; correct it") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `name: value` lines")
    return values


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
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
