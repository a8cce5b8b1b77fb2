"""Which slides are trained on, validated on and held out; donors are kept together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import read_yaml
from .slide import Slide

SLIDE, DONOR = "slide", "donor"
"""What is held out in turn: every slide, or all slides of every donor."""

FEW_SLIDES = 3
"""Up to so many slides are all trained on: one more is worth more than early stopping."""


@dataclass(frozen=True)
class Fold:
    """The role of every slide in one run of a study.

    Args:
        name: of the held-out slide or donor.
        test: names of the slides that are held out of every stage.
        val: name of the slide for early stopping; None if there is none.
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


def find_donors(
    slides: Iterable[Slide],
    key: str | None = None,
    pattern: str | None = None,
    table: Path | None = None,
) -> dict[str, str]:
    """The donor of every slide; each slide is its own donor if nothing is said.

    Args:
        slides: in order.
        key: obs column that names the donor.
        pattern: regular expression that is searched in the slide's name. Its first group, or the
            whole match if there is none, is the donor.
        table: YAML file of ``slide: donor`` lines.

    Returns:
        Slide name to donor, in the order of the slides.

    Raises:
        UserError: a slide whose donor cannot be told.
    """
    if sum(given is not None for given in (key, pattern, table)) > 1:
        raise UserError("give one of --donor-key, --donor-pattern and --donor-map")
    if key is not None:
        return {slide.name: _donor_in_obs(slide, key) for slide in slides}
    if pattern is not None:
        return _donors_by_pattern([slide.name for slide in slides], pattern)
    names = [slide.name for slide in slides]
    if table is None:
        return {name: name for name in names}
    mapping = {str(name): str(donor) for name, donor in read_yaml(table).items()}
    if missing := [name for name in names if name not in mapping]:
        raise UserError(f"{table} does not name the donor of {missing[0]}")
    return {name: mapping[name] for name in names}


def plan_folds(donors: Mapping[str, str], hold_out: str) -> tuple[list[Fold], list[str]]:
    """Folds of a study on slides of known donors.

    The slide for early stopping is one of :func:`validation_candidates`; which one rotates over
    the folds.

    Args:
        donors: slide to donor, in the order of the slides.
        hold_out: ``"slide"`` (each in turn), ``"donor"`` (all slides of each in turn), or names
            of slides or donors with commas, each held out in turn.

    Returns:
        The folds, and a note on each slide or donor that cannot be held out.

    Raises:
        UserError: an unknown name, one donor only, or too few slides.
    """
    folds, notes = [], []
    for number, (name, test) in enumerate(_held_out(donors, hold_out).items()):
        rest = {slide: donor for slide, donor in donors.items() if slide not in test}
        if not rest:
            notes.append(f"{name} cannot be held out: that leaves no slide to train on")
            continue
        val = None
        if len(rest) > FEW_SLIDES:
            candidates = validation_candidates(rest, {donors[slide] for slide in test})
            val = candidates[number % len(candidates)]
        folds.append(Fold(name, tuple(test), val, tuple(slide for slide in rest if slide != val)))
    if notes and (not folds or hold_out not in (SLIDE, DONOR)):
        raise UserError(f"{notes[0]}; give more slides")
    return folds, notes


def validation_candidates(donors: Mapping[str, str], held_out: Collection[str] = ()) -> list[str]:
    """Slides that training can best do without.

    They are slides of the donors that have most of them. Donors of held-out slides are avoided
    where others have as many: a held-out slide is predicted best from slides of its own donor.

    Args:
        donors: slide to donor.
        held_out: donors of the slides that are held out.
    """
    count = Counter(donors.values())
    most = [slide for slide, donor in donors.items() if count[donor] == max(count.values())]
    return [slide for slide in most if donors[slide] not in held_out] or most


def choose_validation(donors: Mapping[str, str]) -> str | None:
    """The slide that is kept out of training for early stopping, where the user names none.

    Args:
        donors: slide to donor.

    Returns:
        The last of :func:`validation_candidates`; None with :data:`FEW_SLIDES` slides or fewer.
    """
    return validation_candidates(donors)[-1] if len(donors) > FEW_SLIDES else None


def _held_out(donors: Mapping[str, str], hold_out: str) -> dict[str, list[str]]:
    """Name of each fold to its held-out slides."""
    by_donor: dict[str, list[str]] = {}
    for slide, donor in donors.items():
        by_donor.setdefault(donor, []).append(slide)
    if hold_out == SLIDE:
        return {slide: [slide] for slide in donors}
    if hold_out == DONOR:
        if len(by_donor) < 2:
            raise UserError(
                f"all slides are of one donor ({next(iter(by_donor))}), so none can be held out; "
                "give slides of two donors, or say whose they are with --donor-pattern, "
                "--donor-key or --donor-map"
            )
        return by_donor
    held = {}
    for name in (part.strip() for part in hold_out.split(",")):
        if name not in donors and name not in by_donor:
            raise UserError(
                f"--hold-out {name}: no such slide or donor; slides: {', '.join(donors)}; "
                f"donors: {', '.join(by_donor)}"
            )
        held[name] = [name] if name in donors else by_donor[name]
    return held


def named_donors(
    slides: Sequence[Slide], donors: Mapping[str, str] | Sequence[str] | str | None
) -> dict[str, str]:
    """Slide name to donor.

    Args:
        slides: of a run.
        donors: slide name to donor, one donor for each slide, or the obs column that names it;
            every slide is its own if left out.

    Raises:
        UserError: a slide whose donor cannot be told.
    """
    if donors is None or isinstance(donors, str):
        return find_donors(slides, key=donors)
    if not isinstance(donors, Mapping):
        if len(donors) != len(slides):
            raise UserError(f"{len(slides)} slides, but {len(donors)} donors; give one for each")
        return {slide.name: str(donor) for slide, donor in zip(slides, donors, strict=True)}
    if missing := [slide.name for slide in slides if slide.name not in donors]:
        raise UserError(f"donors does not name the donor of {missing[0]}; it is a mapping by slide")
    return {slide.name: str(donors[slide.name]) for slide in slides}


def _donor_in_obs(slide: Slide, key: str) -> str:
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
    return str(values[0])


def _donors_by_pattern(names: Iterable[str], pattern: str) -> dict[str, str]:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--donor-pattern {pattern!r} is no regular expression: {error}") from None
    donors = {}
    for name in names:
        match = regex.search(name)
        if match is None:
            raise UserError(f"--donor-pattern {pattern!r} does not match slide {name}")
        donors[name] = match[1] if regex.groups else match[0]
    return donors
