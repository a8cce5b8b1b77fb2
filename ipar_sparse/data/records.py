"""What a run says of the slides that it was trained on, and how they are found again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.schema import INPUTS, RunConfig
from ..errors import UserError

if TYPE_CHECKING:
    from anndata import AnnData

    from .slide import Slide


def recorded_inputs(run: Path) -> dict[str, Any]:
    """What a run says of its slides: lists ``train`` and ``val``, and ``donors`` by slide.

    Raises:
        UserError: it says nothing, or nothing that can be read.
    """
    path = run / INPUTS
    try:
        recorded = json.loads(path.read_text())
        return {**recorded, "train": recorded["train"], "val": recorded["val"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is missing or damaged; train the run again") from None


def recorded_slides(
    run: Path, sources: Iterable[str | os.PathLike | AnnData], settings: RunConfig
) -> tuple[list[Slide], list[Slide]]:
    """The training and validation slides of a run, read again; they are known by their cells.

    Args:
        run: its folder.
        sources: files or objects that hold the slides now; the recorded files if empty.
        settings: of the run.

    Raises:
        UserError: a slide of the run is not in the files.
    """
    from .readers import read_files
    from .slide import slide_digest

    recorded = recorded_inputs(run)
    wanted = recorded["train"] + recorded["val"]
    paths = [one["path"] for one in wanted if one["path"] is not None]
    slides = read_files(
        list(sources) or list(dict.fromkeys(paths)),
        settings.data,
        require_pos=True,
        min_cells=settings.train.miniset_min,
    )
    found = {slide_digest(slide): slide for slide in slides}
    for one in wanted:
        if one["digest"] not in found:
            raise UserError(
                f"{one['name']}: none of the files holds this slide of {run} as it was; "
                "give the files that the run was started with"
            )
        found[one["digest"]].name = one["name"]
    train, val = ([found[one["digest"]] for one in recorded[role]] for role in ("train", "val"))
    return train, val
