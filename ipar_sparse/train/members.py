"""The slides that a run is given: which of them train it, and whether they are those of before."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.schema import INPUTS
from ..data.copies import find_copies, identified, slide_digest
from ..data.slide import Slide
from ..data.splits import choose_validation
from ..errors import UserError
from ..files import parse_json

logger = logging.getLogger(__name__)


def divide(
    slides: Sequence[Slide], val: Sequence[Slide] | None, donors: Mapping[str, str] | None
) -> tuple[list[Slide], list[Slide]]:
    """Slides to train on, and slides that decide when to stop.

    Args:
        slides: with positions.
        val: None keeps one of more than three slides for this.
        donors: slide name to donor.

    Raises:
        UserError: there is no slide, one has no positions, or two hold the same cells.
    """
    slides = [identified(slide) for slide in slides]
    if not slides:
        raise UserError("no slide to train on; give one at least")
    if val is None:
        known = {slide.name: (donors or {}).get(slide.name, slide.name) for slide in slides}
        name = choose_validation(known)
        val = [slide for slide in slides if slide.name == name]
        slides = [slide for slide in slides if slide.name != name]
        if val:
            logger.info("%s is kept out of training and decides when to stop", name)
    if not val and len(slides) == 1:
        logger.warning(
            "one training slide and none to validate on: what is peculiar to it is learned as the "
            "plan of the tissue, and nothing here shows how much. Add slides, or score the run on "
            "another slide before relying on its maps"
        )
    elif not val:
        logger.info("no validation slide: training does not stop early")
    for slide in (*slides, *val):
        if slide.pos is None:
            raise UserError(f"{slide.name}: no positions to train on; see data/README.md")
    val = [identified(slide) for slide in val]
    _refuse_copies(slides, val)
    return slides, val


def _refuse_copies(slides: Sequence[Slide], val: Sequence[Slide]) -> None:
    """Refuses slides of the same cells, whatever these are called."""
    members = [*slides, *val]
    for i, j in find_copies(members):
        one, other = members[i].name, members[j].name
        if i < len(slides) <= j:
            raise UserError(
                f"{other} is given both to train on and to validate on: its cells, or their "
                f"positions, are those of {one}, so its score would mean nothing; leave it out of "
                "one"
            )
        raise UserError(
            f"{one} and {other} hold the same cells, or positions; give each slide once"
        )


def check_members(train: Sequence[Slide], val: Sequence[Slide], out: Path) -> None:
    """Refuses to go on with other slides than a run was started with.

    Raises:
        UserError: a slide is not on record.
    """
    recorded = read_inputs(out)
    for role, slides in (("train", train), ("val", val)):
        known = {one["digest"] for one in recorded.get(role, [])}
        for slide in slides:
            if slide_digest(slide) not in known:
                raise UserError(
                    f"{slide.name}: {out} was not started with this slide as it is; give the "
                    "slides as before"
                )


def read_inputs(out: Path) -> dict[str, Any]:
    """What a run wrote of its slides; nothing where that is missing or damaged."""
    try:
        return parse_json((out / INPUTS).read_text())
    except (OSError, ValueError):
        return {}
