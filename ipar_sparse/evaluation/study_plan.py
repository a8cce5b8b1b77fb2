"""What a study runs: variants, held-out slides, seeds; and who shares an encoder.

A study is planned first and written to ``study.json``. Held-out slides are first looked at when
they are scored. Variants with the same data and encoder settings share one trained encoder.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from .. import __version__
from ..config import PRESETS, RunConfig, load_config
from ..config.schema import DECIDED_FROM_DATA
from ..data.copies import find_copies, slide_digest
from ..data.slide import Slide
from ..data.splits import SLIDE, Fold, choose_validation, find_donors, plan_folds
from ..errors import UserError
from ..files import folder_name, parse_json, read_yaml, write_json
from .jobs import Job

PLAN = "study.json"
_DECIDED_PER_RUN = {"train.batch_kind", "train.steps_per_epoch"}
_DECIDED_AT_ONCE = {"data.normalized", "data.target_sum", "encoder.steps", *_DECIDED_PER_RUN}
_FILE_KEYS = ("description", "reference", "seeds", "hold_out", "set", "variants")


class Task(NamedTuple):
    """A job of a study: train an encoder, or train and score a variant.

    Args:
        folder: of its results, relative to that of the study.
        kind: ``"encoder"`` or ``"run"``.
        variant: name of the variant.
        fold: name of the fold.
        seed: of everything random.
    """

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
        cells: files of cells of another assay, which every fold places from all slides.
        frame: training slide in whose frame their positions were measured.
    """

    files: tuple[str, ...]
    digests: dict[str, str]
    donors: dict[str, str]
    variants: dict[str, RunConfig]
    folds: tuple[Fold, ...]
    seeds: tuple[int, ...]
    reference: str
    notes: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()
    frame: str | None = None

    def config(self, variant: str, seed: int) -> RunConfig:
        """The configuration that is asked for in one run."""
        return self.variants[variant].replace(train={"seed": seed})

    def fold(self, name: str) -> Fold:
        """The fold of a name."""
        return next(fold for fold in self.folds if fold.name == name)


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
    cells: Sequence[Path] = (),
    frame: str | None = None,
) -> Study:
    """Reads the slides and decides which are held out when.

    Args:
        files: AnnData files of slides with positions.
        variants: name to configuration.
        hold_out: as in :func:`~ipar_sparse.data.splits.plan_folds`.
        seeds: of everything random; all variants are run with each.
        reference: the variant compared with; the first one if left out.
        donor_key, donor_pattern, donor_map: as in :func:`~ipar_sparse.data.splits.find_donors`.
        cells: files of cells of another assay. Each is placed by runs on all slides, whose genes
            are chosen among its own; positions in it are looked at to score. Nothing is held out.
        frame: name of the slide in whose frame positions of the cells were measured.

    Raises:
        UserError: on anything that cannot be run as asked.
    """
    if not variants:
        raise UserError("a study needs a variant; name a preset, e.g. v1")
    for name in variants:
        if folder_name(name) != name:
            raise UserError(
                f"variant {name!r}: use letters, digits and . + = - _ only, no dot first"
            )
    reference = reference or next(iter(variants))
    if reference not in variants:
        raise UserError(
            f"the reference {reference!r} is not among the variants ({', '.join(variants)})"
        )
    files = tuple(str(Path(path).absolute()) for path in files)
    per_setting = {_reading(config): config for config in variants.values()}
    slides = {s.name: s for config in per_setting.values() for s in read_all(files, config)}
    donors = find_donors(slides.values(), donor_key, donor_pattern, donor_map)
    cells = tuple(str(Path(path).absolute()) for path in cells)
    if cells:
        placed = {s.name: s for c in per_setting.values() for s in read_scored_cells(cells, c)}
        folds, notes = _cell_folds(slides, placed, donors), list[str]()
        if frame is not None and any(frame not in fold.train for fold in folds):
            trained = ", ".join(folds[0].train)
            raise UserError(f"--frame {frame}: no run is trained on such a slide; give {trained}")
        slides, donors = slides | placed, donors | {name: name for name in placed}
    else:
        folds, notes = plan_folds(donors, hold_out)
    seeds = tuple(dict.fromkeys(seeds))
    if not seeds:
        raise UserError("a study needs a seed, e.g. --seeds 0-4")
    _check_slides(slides, folds, variants)
    digests = {name: _content_digest(slide) for name, slide in slides.items()}
    notes, folds = tuple(notes), tuple(folds)
    given = dict(variants), folds, seeds, reference, notes, cells, frame
    return Study(files, digests, donors, *given)


def load_variants(
    names: Sequence[str],
    files: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    **sections: Mapping[str, Any],
) -> tuple[dict[str, RunConfig], dict[str, Any]]:
    """Configurations of presets and of the variants in study files.

    A study file is YAML. ``variants`` maps each name to the settings in which it differs
    (``model.beta: 1.0``; ``preset: NAME`` to start from). ``set`` holds settings of all of them.
    ``reference``, ``seeds`` and ``hold_out`` are defaults of the command line. Later wins:
    preset, ``set``, ``overrides``, the variant's own settings.

    Args:
        names: presets.
        files: study files.
        overrides: ``section.key=value`` for all variants.
        **sections: values for all variants.

    Returns:
        Variants by name, and what the files say of ``reference``, ``seeds`` and ``hold_out``.

    Raises:
        UserError: an unknown preset or key, a variant given twice, an unreadable file.
    """
    given: dict[str, tuple[dict, dict]] = {name: ({"preset": name}, {}) for name in names}
    defaults: dict[str, Any] = {}
    for path in files:
        variants, shared, said = _read_study_file(path)
        for name, own in variants.items():
            if name in given and given[name] != (own, shared):
                raise UserError(
                    f"{path}: variant {name} is given elsewhere with other settings; rename one"
                )
            given[name] = own, shared
        defaults |= said
    configs = {}
    for name, (own, shared) in given.items():
        preset = own["preset"]
        mine = _as_overrides({key: value for key, value in own.items() if key != "preset"})
        settings = [*_as_overrides(shared), *overrides, *mine]
        configs[name] = load_config(None, settings, preset=preset, **sections)
    return configs, defaults


def cv_groups(study: Study, fold: Fold) -> dict[str, str]:
    """Groups for the cross-validation within a fold: slide to its donor, or to itself.

    Settings are chosen for slides like those held out. If their donors are trained on, every
    slide is its own group; else a donor is.
    """
    trained = {study.donors[name] for name in fold.train}
    if all(study.donors[name] in trained for name in fold.test):
        return {name: name for name in fold.seen}
    return {name: study.donors[name] for name in fold.seen}


def baseline_variants(study: Study) -> dict[str, str]:
    """Variant to the one whose runs score its baselines: the first with the same encoder."""
    digests = {name: _encoder_digest(config) for name, config in study.variants.items()}
    first = {digests[study.reference]: study.reference}
    for name, digest in digests.items():
        first.setdefault(digest, name)
    return {name: first[digest] for name, digest in digests.items()}


def encoder_task(study: Study, variant: str, fold: str, seed: int) -> Task | None:
    """The job that trains the encoder of a run; None where embeddings are brought along."""
    config = study.variants[variant]
    if config.data.embedding is not None:
        return None
    folder = f"encoders/{_encoder_digest(config)}/{folder_name(fold)}/seed{seed}"
    return Task(folder, "encoder", baseline_variants(study)[variant], fold, seed)


def study_jobs(study: Study) -> list[Job]:
    """Every job, seed by seed, so that a study stopped early has all folds and variants."""
    jobs: dict[Task, Job] = {}
    for seed in study.seeds:
        for fold in (fold.name for fold in study.folds):
            for variant in study.variants:
                encoder = encoder_task(study, variant, fold, seed)
                if encoder is not None:
                    jobs.setdefault(encoder, Job(encoder))
                task = Task(
                    f"runs/{variant}/{folder_name(fold)}/seed{seed}", "run", variant, fold, seed
                )
                jobs[task] = Job(task, encoder)
    return list(jobs.values())


def save_plan(study: Study, out: Path) -> None:
    """Writes the plan to ``study.json``."""
    variants = {name: config.model_dump(mode="json") for name, config in study.variants.items()}
    write_json(out / PLAN, asdict(study) | {"variants": variants, "version": __version__})


def load_plan(out: Path) -> Study:
    """Reads a plan back.

    Raises:
        UserError: the folder holds no readable study.
    """
    path = Path(out) / PLAN
    try:
        values = parse_json(path.read_text())
        values.pop("version")
        variants = {n: RunConfig.model_validate(c) for n, c in values["variants"].items()}
        folds = tuple(
            Fold(f["name"], tuple(f["test"]), f["val"], tuple(f["train"])) for f in values["folds"]
        )
        tuples = {name: tuple(values[name]) for name in ("files", "seeds", "notes", "cells")}
        return Study(**values | tuples | {"variants": variants, "folds": folds})
    except FileNotFoundError:
        raise UserError(f"{out} is no study: it has no {PLAN}; choose another --out") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another --out") from None


def check_same_study(before: Study, study: Study, out: Path) -> None:
    """Refuses a folder that holds another study; variants and seeds may be added.

    Args:
        before: the study that ``out`` holds.
        study: the one that is asked for.
        out: the folder.

    Raises:
        UserError: they differ in slides, donors, folds, or in a variant or seed of the first.
    """
    labels = {"digests": "slides", "cells": "cells", "donors": "donors"}
    labels |= {"folds": "held-out slides"}
    differs = [
        label for name, label in labels.items() if getattr(before, name) != getattr(study, name)
    ]
    if not set(before.seeds) <= set(study.seeds):
        differs.append("seeds")
    differs += [
        f"variant {name}"
        for name, config in before.variants.items()
        if name not in study.variants or _identity(config) != _identity(study.variants[name])
    ]
    if differs:
        raise UserError(
            f"{out} holds another study ({differs[0]} differ); choose another --out, pass "
            "--overwrite to start anew, or ask for the same study to go on with it (seeds and "
            "variants may be added)"
        )


def differences(config: RunConfig) -> list[str]:
    """Settings in which a configuration differs from the defaults, as ``section.key=value``."""
    own, default = _identity(config), _identity(RunConfig())
    return [
        f"{section}.{key}={value}"
        for section, values in own.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if value != default[section][key]
    ]


def read_all(files: Sequence[str], config: RunConfig) -> list[Slide]:
    """The slides of a study as a variant reads them; kept in memory for the next job.

    Raises:
        UserError: two slides of one name, or a file that cannot be read.
    """
    return _read_cached(tuple(files), _reading(config))


def read_scored_cells(files: Sequence[str], config: RunConfig) -> list[Slide]:
    """Cells of another assay, with the positions that score them; kept in memory.

    Raises:
        UserError: a file cannot be read, or two hold cells of one name.
    """
    return _read_cached(tuple(files), _reading(config), True) if files else []


@lru_cache(maxsize=4)
def _read_cached(files: tuple[str, ...], reading: str, cells: bool = False) -> list[Slide]:
    from ..data.headers import reading_cells
    from ..data.readers import read_files

    data = RunConfig.model_validate({"data": json.loads(reading)}).data
    if cells:
        data = reading_cells(data).model_copy(update={"spatial_key": data.spatial_key})
    slides = [
        slide
        for path in files
        for slide in read_files([path], data, require_pos=True, slide_key_optional=cells)
    ]
    for name, count in Counter(slide.name for slide in slides).items():
        if count > 1:
            raise UserError(f"{count} slides are called {name}; give each once, or rename a file")
    return slides


def _cell_folds(
    slides: Mapping[str, Slide], cells: Mapping[str, Slide], donors: Mapping[str, str]
) -> list[Fold]:
    """One fold for each slide of cells: all others are trained on, but for one that validates."""
    if same := [name for name in cells if name in slides]:
        raise UserError(f"cells and a slide are both called {same[0]}; rename a file")
    val = choose_validation(donors)
    train = tuple(name for name in slides if name != val)
    return [Fold(name, (name,), val, train) for name in cells]


def _check_slides(
    slides: Mapping[str, Slide], folds: Sequence[Fold], variants: Mapping[str, RunConfig]
) -> None:
    """Refuses slides that are too small to be trained on, or given twice."""
    trainings = [config.train for config in variants.values()]
    smallest = max((t.miniset_min for t in trainings if t.batch_kind != "slide"), default=0)
    for name in dict.fromkeys(name for fold in folds for name in fold.seen):
        if slides[name].num_cells < smallest:
            raise UserError(
                f"{name} has {slides[name].num_cells} cells, fewer than the smallest miniset "
                f"({smallest}); leave it out or --set train.miniset_min={slides[name].num_cells}"
            )
    names = list(slides)
    for one, other in find_copies([slides[name] for name in names]):
        raise UserError(
            f"{names[one]} and {names[other]} hold the same cells, or positions; give each slide "
            "once"
        )


def _read_study_file(path: Path) -> tuple[dict[str, dict], dict[str, Any], dict[str, Any]]:
    """Settings of each variant, settings of all, and defaults of the command line."""
    values = read_yaml(path)
    for key in values:
        if key not in _FILE_KEYS:
            raise UserError(f"{path}: unknown key {key!r}; known: {', '.join(_FILE_KEYS)}")
    given = values.get("variants")
    if not isinstance(given, dict) or not given:
        raise UserError(f"{path}: needs `variants:` with a name and settings for each")
    variants: dict[str, dict[str, Any]] = {}
    for name, own in given.items():
        name, own = str(name), {} if own is None else own
        if not isinstance(own, dict):
            raise UserError(f"{path}: variant {name} needs settings such as model.beta: 1.0")
        variants[name] = {"preset": name if name in PRESETS else None} | own
    said: dict[str, Any] = {
        key: values[key] for key in ("reference", "seeds", "hold_out") if key in values
    }
    return variants, values.get("set") or {}, said


def _as_overrides(settings: Mapping[str, Any]) -> list[str]:
    texts = []
    for key, value in settings.items():
        text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
        texts.append(f"{key}=" + text.removesuffix("\n").removesuffix("\n..."))
    return texts


def _identity(config: RunConfig) -> dict[str, Any]:
    """A configuration without what may differ between runs of one variant."""
    values = config.model_dump(mode="json")
    del values["train"]["device"], values["train"]["seed"]
    return values


def _reading(config: RunConfig) -> str:
    """The settings that decide how a file is read, as text."""
    values = config.data.model_dump(mode="json")
    return json.dumps({key: value for key, value in values.items() if key != "max_genes"})


def _encoder_digest(config: RunConfig) -> str:
    """Of all settings that the encoder, and what is decided beside it, depends on.

    Runs that share an encoder also share the settings that were decided where it was trained.
    Cross-validation depends on every setting, named defaults only on what is asked for.
    """
    values = _identity(config)
    open_keys = set(config.unresolved()) - _DECIDED_AT_ONCE
    if config.selection.mode == "none" or not open_keys:
        asked = {k: config.get(k) for k in DECIDED_FROM_DATA if k not in _DECIDED_PER_RUN}
        values = {"data": values["data"], "encoder": values["encoder"], "decided": asked}
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _content_digest(slide: Slide) -> str:
    digest = hashlib.sha256(slide_digest(slide).encode())
    if slide.expression is not None:
        for part in (slide.expression.indptr, slide.expression.indices, slide.expression.data):
            digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()[:16]
