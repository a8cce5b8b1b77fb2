"""What a run leaves open is selected by cross-validation over donors, from a table of candidates.

Choices are made one after another, each among the candidates of :data:`GRID`. A candidate's score
is sqrt(distance Spearman x neighbour hit) of the final layout of left-out donors. The first
candidate of a choice is taken unless another gains one standard error over it; recycles are left
out only where that gains two.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import DEFAULT_SELECTION, RunConfig
from ..config.schema import SELECTION
from ..data.expression import median_total
from ..data.slide import Slide
from ..distributed import from_first, rank, shared_out, size
from ..estimators.frames import FrameError
from ..files import parse_json
from ..inference.costs import choose_batch_kind, slide_size
from ..layout.uncertainty import disc_radius, fit_error_model
from ..progress import Task, stage
from .batches import SLIDE_STEPS
from .brief import BriefTrainings, load_kernels
from .cross_validation import (
    CORRECTION,
    FULL,
    QUICK,
    Budget,
    DonorFold,
    Scores,
    donor_folds,
    sampled,
)
from .loop import TimeUp, TrainingLoop

logger = logging.getLogger(__name__)

_ERROR_WITHOUT_ATLAS = 0.75  # mean square error, in squared tissue radii, on four public sets
_STEP_SEES = {
    "miniset": "a few hundred cells, drawn anew, so its cost does not grow with the slide",
    "slide": "a whole slide",
    "mixed": "a few hundred cells and a whole slide in turn",
}


@dataclass(frozen=True)
class Candidate:
    """One value of a choice.

    Args:
        name: in tables and logs.
        values: settings by key.
        full: whether it is tried by ``selection.mode=full`` alone.
    """

    name: str
    values: Mapping[str, Any]
    full: bool = False


@dataclass(frozen=True)
class Choice:
    """One question that left-out donors answer.

    Args:
        setting: what is chosen, in words.
        keys: settings that it decides; it is made where one of them is open.
        candidates: the first is taken unless another gains enough over it.
        errors: enough, in standard errors of the gain over the left-out donors.
    """

    setting: str
    keys: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    errors: float = 1.0


def _refinement(rca_power: float, anchor_weight: float, full: bool = False) -> Candidate:
    values = {
        "refine.steps": DEFAULT_SELECTION["refine.steps"],
        "refine.rca_power": rca_power,
        "refine.anchor_weight": anchor_weight,
    }
    return Candidate(f"component weights {rca_power:g}, hold {anchor_weight:g}", values, full)


GRID = (
    Choice(
        "initial layout",
        ("model.init",),
        # an atlas alone tells how uncertain places are, which the correction is for
        (
            Candidate("atlas", {"model.init": "atlas", CORRECTION: DEFAULT_SELECTION[CORRECTION]}),
            Candidate("pca", {"model.init": "pca", CORRECTION: 0}),
            Candidate("mlp", {"model.init": "mlp", CORRECTION: 0}, full=True),
        ),
    ),
    Choice(
        "components of expression",
        ("encoder.component_kind",),
        (
            Candidate("principal", {"encoder.component_kind": "principal"}),
            # 33 quick searches on real slides gained nothing by them
            Candidate("spatial", {"encoder.component_kind": "spatial"}, full=True),
        ),
    ),
    Choice(
        "distance correction",
        (CORRECTION,),
        (
            Candidate("no", {CORRECTION: 0}),
            Candidate("yes", {CORRECTION: DEFAULT_SELECTION[CORRECTION]}),
        ),
    ),
    Choice(
        "how refinement is done",
        ("refine.rca_power", "refine.anchor_weight"),
        (
            _refinement(0.5, 5.0),
            _refinement(0.5, 2.0),
            _refinement(1.0, 2.0),
            _refinement(0.0, 2.0, full=True),
            _refinement(1.0, 5.0, full=True),
            _refinement(0.0, 5.0, full=True),
            _refinement(0.5, 12.0, full=True),
        ),
    ),
    Choice(
        "passes of attention",
        ("model.recycling",),
        # trained as briefly as here, on fewer donors, they show less than they gain: on embryos
        # nothing, where the run itself gains 0.03 in distances; so leaving them out must gain
        (
            Candidate("yes", {"model.recycling": True}),
            Candidate("no", {"model.recycling": False}),
        ),
        2.0,
    ),
    Choice(
        "refinement",
        ("refine.steps",),
        (
            Candidate("no", {"refine.steps": 0}),
            Candidate("yes", {"refine.steps": DEFAULT_SELECTION["refine.steps"]}),
        ),
    ),
)
"""All choices, in the order in which they are made."""


@dataclass
class SelectionResult:
    """What was tried, what it reached, and what was selected.

    Args:
        mode: ``selection.mode``.
        donors: how many were left out in turn; 0 where nothing was tried.
        folds: names of the slides that were left out and learned from.
        choices: one table a choice: candidates with their scores, which was selected, and why.
        selected: the settings that were decided.
        frame_errors: errors of left-out slides in their own frames, by name; see
            :class:`~ipar_sparse.estimators.frames.FrameError`.
    """

    mode: str
    donors: int = 0
    folds: list[dict[str, list[str]]] = field(default_factory=list)
    choices: list[dict[str, Any]] = field(default_factory=list)
    selected: dict[str, Any] = field(default_factory=dict)
    frame_errors: dict[str, FrameError] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


def select_settings(
    slides: Sequence[Slide],
    donors: Mapping[str, str] | None,
    request: RunConfig,
    genes: Sequence[str] | None,
    loop: TrainingLoop,
) -> tuple[RunConfig, SelectionResult]:
    """Decide all that a request leaves open.

    Args:
        slides: training slides with positions.
        donors: slide name to donor; every slide is its own donor if left out.
        request: what was asked for; what it sets is not tried.
        genes: of the encoder; None where embeddings are brought along.
        loop: progress, interruption and device; in its folder is kept what is computed.

    Returns:
        A configuration without open values, and the table behind it.
    """
    given = resolve_from_data(request, slides, loop.device)
    # folds are smaller, and stand for the run
    request = request.with_values({"train.batch_kind": given.train.batch_kind})
    open_keys = set(given.unresolved())
    choices = _open_choices(given, open_keys)
    settings = given.selection
    budget = FULL if settings.mode == "full" else QUICK
    groups = donor_folds(slides, donors, settings.folds, settings.slides_per_donor, budget.left_out)
    result = SelectionResult(given.selection.mode)
    values = {key: given.get(key) for key in DEFAULT_SELECTION}
    values |= {key: DEFAULT_SELECTION[key] for key in open_keys}
    calibrates = "uncertainty.error_intercept" in open_keys
    if result.mode == "none" or not groups or not (choices or calibrates):
        _tell_defaults(result.mode, groups, choices)
        values |= {key: value for key, value in _untried(values).items() if key in open_keys}
    else:
        if loop.device.type == "cuda" and values["model.recycling"]:
            width = request.encoder.out if genes is not None else slides[0].embedding.shape[1]
            load_kernels(given.with_values(values), width, loop.device, genes)
        count = len(groups) * sum(len(choice.candidates) for choice in choices)
        with stage("Cross-validation", total=count) as task:
            folds = _folds(groups, donors, request, values, genes, budget, loop)
            result.folds = [
                {"held_out": [s.name for s in test], "train": [s.name for s in train]}
                for train, test in groups
            ]
            trial = dict(values)
            if "model.recycling" in open_keys:
                trial["model.recycling"] = False  # models are not trained until they are asked for
            try:
                _try_choices(choices, folds, trial, result, task)
                if calibrates:
                    task.advance(0, now="error model")
                    trial |= _error_model(folds, trial)
                values = {key: trial[key] if key in open_keys else values[key] for key in values}
            except TimeUp:
                logger.warning("what was not tried takes its default")
                chosen = _chosen_values(result)
                values |= {key: value for key, value in chosen.items() if key in open_keys}
                left = open_keys - chosen.keys()
                values |= {key: value for key, value in _untried(values).items() if key in left}
        if result.donors:
            with stage("Errors on left-out slides"):
                for errors in shared_out(folds, lambda fold: fold.frame_errors(trial)):
                    result.frame_errors |= errors
    result.selected = {key: values[key] for key in sorted(open_keys)}
    return given.with_values(result.selected), result


def read_frame_errors(out: Path) -> dict[str, FrameError]:
    """What :func:`select_settings` found of errors in frames, from the folder of a run."""
    try:
        found = parse_json((out / SELECTION).read_text()).get("frame_errors", {})
        return {name: FrameError(*map(float, values)) for name, values in found.items()}
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
    ):  # missing, damaged or of an earlier run
        return {}


def _try_choices(
    choices: Sequence[Choice],
    folds: Sequence[DonorFold],
    values: dict[str, Any],
    result: SelectionResult,
    task: Task,
) -> None:
    """Makes all choices; what each decides goes to ``values``, and its table to ``result``."""
    for choice in choices:
        if choice.keys == (CORRECTION,) and values["model.init"] != "atlas":
            task.advance(len(folds) * len(choice.candidates))
            continue  # nothing tells how uncertain places are
        table = _choose(choice, folds, values, task)
        values |= table.pop("values")
        result.choices.append(table)
    found = _scores(folds, values)
    distance, hit = (_donors(found, name) for name in ("distance", "hit"))
    result.donors = len(hit)
    logger.info(
        "with these settings and short trainings, left-out donors reach distance Spearman "
        "%.3f ± %.3f and neighbour hit %.3f ± %.3f; `ipar-sparse info` shows all that was tried",
        distance.mean(),
        standard_error(distance),
        hit.mean(),
        standard_error(hit),
    )


def _chosen_values(result: SelectionResult) -> dict[str, Any]:
    """What the choices that were made decided."""
    return {
        key: value
        for table in result.choices
        for row in table["candidates"]
        if row["name"] == table["selected"]
        for key, value in row["values"].items()
    }


def _folds(
    groups: Sequence[tuple[list[Slide], list[Slide]]],
    donors: Mapping[str, str] | None,
    request: RunConfig,
    values: Mapping[str, Any],
    genes: Sequence[str] | None,
    budget: Budget,
    loop: TrainingLoop,
) -> list[DonorFold]:
    """A fold for each group of donors; what follows from data follows from its own slides."""
    brief, samples = BriefTrainings(loop), sampled(groups, budget.cells)
    return [
        DonorFold(
            f"fold{number}",
            [samples[slide.name] for slide in train],
            [samples[slide.name] for slide in test],
            {slide.name: (donors or {}).get(slide.name, slide.name) for slide in test},
            genes,
            resolve_from_data(request, train).with_values(values),
            budget.per_fold(len(groups)),
            brief,
        )
        for number, (train, test) in enumerate(groups)
    ]


def _untried(values: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults that depend on the initial layout: an atlas alone has a predictive variance."""
    if values["model.init"] == "atlas":
        return {}
    return {
        CORRECTION: 0,
        "uncertainty.error_intercept": _ERROR_WITHOUT_ATLAS,
        "uncertainty.error_slope": 0.0,
    }


def resolve_from_data(
    request: RunConfig, slides: Sequence[Slide], device: torch.device | None = None
) -> RunConfig:
    """What follows from the training slides alone: kind of values, total, batches, steps.

    Args:
        request: what was asked for.
        slides: training slides.
        device: where the run is computed; the CPU if left out.
    """
    values: dict[str, Any] = {}
    kind = request.train.batch_kind
    if kind == "auto":
        on_gpu = device is not None and device.type == "cuda"
        free = torch.cuda.mem_get_info(device)[0] if on_gpu else None
        sizes = [slide_size(slide) for slide in slides]
        kind, why = from_first(choose_batch_kind(sizes, [], request, on_gpu, free))
        logger.info("each step sees %s: %s (train.batch_kind=%s)", _STEP_SEES[kind], why, kind)
        values["train.batch_kind"] = kind
    settings = request.train
    if request.data.normalized is None:
        kinds = {slide.normalized for slide in slides if slide.expression is not None}
        values["data.normalized"] = kinds == {True}
    if request.data.target_sum is None:
        values["data.target_sum"] = median_total(slides)
    if request.encoder.steps is None:
        values["encoder.steps"] = request.encoder.steps_for(sum(s.num_cells for s in slides))
    if settings.steps_per_epoch is None:
        pool = math.ceil(settings.minisets / settings.batch_size)
        values["train.steps_per_epoch"] = SLIDE_STEPS if kind == "slide" else pool
    return request.with_values(values)


def _open_choices(config: RunConfig, open_keys: set[str]) -> list[Choice]:
    """Choices of which something is open, with the candidates that agree with what is set."""
    encoder = config.encoder
    closed: set[str] = set()
    if config.data.embedding is not None or not (encoder.skip and encoder.component_weight):
        closed.add("encoder.component_kind")
    if config.refine.steps == 0:
        closed |= {"refine.rca_power", "refine.anchor_weight"}
    found = []
    for choice in GRID:
        if not open_keys.difference(closed).intersection(choice.keys):
            continue
        kept: dict[tuple, Candidate] = {}
        for candidate in choice.candidates:
            if candidate.full and config.selection.mode != "full":
                continue
            values = {k: v for k, v in candidate.values.items() if k in open_keys}
            kept.setdefault(tuple(values.items()), Candidate(candidate.name, values))
        if len(kept) > 1:
            found.append(replace(choice, candidates=tuple(kept.values())))
    return found


def _choose(
    choice: Choice, folds: Sequence[DonorFold], values: Mapping[str, Any], task
) -> dict[str, Any]:
    """The table of one choice, and under ``values`` the settings that it decides."""
    scores: list[list[Scores]] = []
    for candidate in choice.candidates:
        task.advance(0, now=f"{choice.setting}: {candidate.name}")
        scores.append(_scores(folds, {**values, **candidate.values}, task))
    balanced = [_donors(found, "balanced") for found in scores]
    taken = best_candidate(balanced, choice.errors)
    rows = []
    for candidate, found, own in zip(choice.candidates, scores, balanced, strict=True):
        row: dict[str, Any] = {"name": candidate.name, "values": dict(candidate.values)}
        parts = {"score": own, "distance_spearman": _donors(found, "distance")}
        parts |= {"neighbor_hit@15": _donors(found, "hit"), "gain": own - balanced[0]}
        for name, of_donors in parts.items():
            row[name], row[f"{name}_se"] = float(of_donors.mean()), standard_error(of_donors)
        rows.append(row)
    chosen = rows[taken]
    first = rows[0]["name"]
    gain = f"{chosen['gain']:+.3f} ± {chosen['gain_se']:.3f} over {first}"
    enough = "a standard error" if choice.errors == 1 else f"{choice.errors:g} standard errors"
    reason = gain if taken else f"no other gains {enough} over {first}"
    logger.info("selected %s: %s%s", choice.setting, chosen["name"], f" ({gain})" if taken else "")
    return {
        "setting": choice.setting,
        "candidates": rows,
        "selected": chosen["name"],
        "reason": reason,
        "values": dict(choice.candidates[taken].values),
    }


def _scores(
    folds: Sequence[DonorFold], values: Mapping[str, Any], task: Task | None = None
) -> list[Scores]:
    """Of every fold; ranks compute folds in turn."""

    def score(fold: DonorFold) -> Scores:
        found = fold.scores(values)
        if task is not None:
            task.advance()
        return found

    found = shared_out(folds, score)
    if task is not None:
        task.advance(len(folds) - len(range(rank(), len(folds), size())))
    return found


def best_candidate(scores: Sequence[np.ndarray], errors: float = 1.0) -> int:
    """The first candidate, or the best of those that gain enough over it.

    Args:
        scores: of each candidate, those of every left-out donor (donors,).
        errors: enough, in standard errors of the gain.
    """
    first, best, most = scores[0], 0, 0.0
    for number, own in enumerate(scores[1:], start=1):
        gain = own - first
        if gain.mean() > max(most, errors * standard_error(gain)):
            best, most = number, float(gain.mean())
    return best


def standard_error(values: np.ndarray) -> float:
    """Standard error of a mean over donors; 0 for one."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _donors(found: Sequence[Scores], name: str) -> np.ndarray:
    return np.array([value for scores in found for value in getattr(scores, name)])


def _error_model(folds: Sequence[DonorFold], values: Mapping[str, Any]) -> dict[str, Any]:
    """How the square error of a cell follows its predictive variance, on the left-out donors."""
    donors = shared_out(folds, lambda fold: fold.errors(values))
    model = fit_error_model(donors)
    return {
        "uncertainty.error_intercept": model.intercept,
        "uncertainty.error_slide_slope": model.slide_slope,
        "uncertainty.error_slope": model.slope,
        "uncertainty.disc_radius": _shrunk(disc_radius(model, donors)),
        "uncertainty.calibrated": True,
    }


def _shrunk(radius: float) -> float:
    """The radius, moved halfway to the usual one: two donors tell little of the next one."""
    usual = DEFAULT_SELECTION["uncertainty.disc_radius"]
    return math.sqrt(radius * usual)


def _tell_defaults(mode: str, groups: Sequence, choices: Sequence) -> None:
    if not choices:
        logger.info("every setting is given: no cross-validation")
    elif mode == "none":
        logger.info("no cross-validation (selection.mode=none): defaults are taken")
    elif not groups:
        logger.info("slides of one donor: no other to compare settings on, so defaults are taken")
