"""What a run says of the slides that it was trained on, and how they are found again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.schema import INPUTS, RunConfig
from ..errors import UserError
from ..files import parse_json

if TYPE_CHECKING:
    from anndata import AnnData

    from .slide import Slide


def recorded_inputs(run: Path) -> dict[str, Any]:
    """What a run says of its slides: lists ``train`` and ``val``, and ``donors`` by slide.

    A run that was trained for certain cells also has ``cells`` and ``cell_genes``; see
    :func:`~ipar_sparse.data.dissociated.record_cells`.

    Raises:
        UserError: it says nothing, or nothing that can be read.
    """
    path = run / INPUTS
    try:
        recorded = parse_json(path.read_text())
        for one in (*recorded["train"], *recorded["val"], *recorded.get("cells", ())):
            _check_record(one)
        return recorded
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is missing or damaged; train the run again") from None


def _check_record(one: Any) -> None:
    """Refuses, by some error, what no run says of a slide."""
    texts = isinstance(one["name"], str) and isinstance(one["digest"], str)
    if not (texts and isinstance(one["cells"], int) and isinstance(one["path"], str | None)):
        raise TypeError
    for signature in (*one.get("sketch", ()), *one.get("places", ())):
        if not 0 <= int(signature, 16) < 2**64:
            raise ValueError


def role_in_training(recorded: Mapping[str, Any], slide: Slide) -> str | None:
    """What the cells of a slide did in the training of a run, as a verb; None if nothing.

    They are known by what they hold, whatever file, slide and cells are called.

    Args:
        recorded: see :func:`recorded_inputs`.
        slide: as it was read, or in the terms of the run.
    """
    from .copies import MOST, SOME, identified, overlap

    did = {"train": "was trained on", "val": "decided when training stopped"}
    slide = identified(slide)
    shares: dict[str, float] = dict.fromkeys(did, 0.0)
    for role in did:
        for one in recorded.get(role, ()):
            if one["digest"] == slide.digest:
                return did[role]
            cells = overlap(one.get("sketch", ()), slide.signatures)
            held = max(cells, overlap(one.get("places", ()), slide.places)) * one["cells"]
            shares[role] = max(shares[role], min(held / slide.num_cells, 1.0))
    role = max(shares, key=lambda name: shares[name])
    if shares[role] >= MOST:
        return did[role]
    return f"{did[role]} in part" if shares[role] >= SOME else None


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
    from .copies import identified
    from .readers import read_files

    recorded = recorded_inputs(run)
    wanted = recorded["train"] + recorded["val"]
    paths = [one["path"] for one in wanted if one["path"] is not None]
    slides = read_files(
        list(sources) or list(dict.fromkeys(paths)),
        settings.data,
        require_pos=True,
        min_cells=settings.train.miniset_min,
        divided=True,
    )
    found = {slide.digest: slide for slide in map(identified, slides)}
    for one in wanted:
        if one["digest"] not in found:
            raise UserError(
                f"{one['name']}: none of the files holds this slide of {run} as it was; "
                "give the files that the run was started with"
            )
        found[one["digest"]].name = one["name"]
    train, val = ([found[one["digest"]] for one in recorded[role]] for role in ("train", "val"))
    return train, val
