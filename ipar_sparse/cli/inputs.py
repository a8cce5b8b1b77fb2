"""How commands read slides and trained runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .messages import note
from .options import given

if TYPE_CHECKING:
    from ..config import DataConfig, RunConfig
    from ..data.slide import Slide
    from ..inference.predictor import Predictor


def read_files(
    paths: Iterable[Path], data: DataConfig, *, require_pos: bool, min_cells: int = 1
) -> list[Slide]:
    """The slides of some files; of those with one name, each gets its number added.

    Args:
        paths: AnnData files.
        data: layer, keys and embedding.
        require_pos: refuse slides without positions.
        min_cells: refuse slides with fewer cells.
    """
    from ..data.readers import read_file
    from ..progress import Progress

    slides: list[Slide] = []
    with Progress() as progress:
        for path in progress.track(list(paths), "Reading slides"):
            slides += read_file(path, data, require_pos=require_pos, min_cells=min_cells)
    names = [slide.name for slide in slides]
    for number, slide in enumerate(slides, start=1):
        if names.count(slide.name) > 1:
            slide.name = f"{slide.name}-{number}"
    return slides


def tell_notes(slides: Iterable[Slide]) -> None:
    """Prints what was recognised in the slides."""
    for slide in slides:
        for text in slide.notes:
            note(text if slide.name in text else f"{slide.name}: {text}")


def check_no_leak(slides: Sequence[Path], val: Sequence[Path]) -> None:
    """Refuses a slide that is given twice, or both to train and to validate on."""
    seen = {path.resolve() for path in slides}
    if len(seen) < len(slides):
        raise UserError("a slide is given twice to train on; give each once")
    for path in val:
        if path.resolve() in seen:
            raise UserError(
                f"{path} is given both to train on and as --val, so its score would mean nothing; "
                "leave it out of one"
            )


def recorded_inputs(run: Path) -> dict[str, Any]:
    """What a run says of its slides: lists ``train`` and ``val``, and ``donors`` by slide.

    Raises:
        UserError: it says nothing, or nothing that can be read.
    """
    from ..config.schema import INPUTS

    path = run / INPUTS
    try:
        recorded = json.loads(path.read_text())
        return {**recorded, "train": recorded["train"], "val": recorded["val"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is missing or damaged; train the run again") from None


def recorded_slides(
    run: Path, files: Iterable[Path], settings: RunConfig
) -> tuple[list[Slide], list[Slide]]:
    """The training and validation slides of a run, read again; they are known by their cells.

    Args:
        run: its folder.
        files: where the slides are now; the recorded files if empty.
        settings: of the run.

    Raises:
        UserError: a slide of the run is not in the files.
    """
    from ..data.slide import slide_digest

    recorded = recorded_inputs(run)
    wanted = recorded["train"] + recorded["val"]
    paths = list(files) or [Path(one["path"]) for one in wanted if one["path"] is not None]
    slides = read_files(
        dict.fromkeys(paths),
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


def load_predictor(run: Path, device: str | None) -> Predictor:
    """The trained model of a run."""
    from ..config import RunConfig, resolve_device
    from ..inference.run_folder import find_checkpoint

    RunConfig.load(run)  # a folder that is no run is refused before anything slow
    find_checkpoint(run)
    target = resolve_device(device or "auto")

    from ..inference.predictor import Predictor

    return Predictor.load(run, target)


def reading_settings(
    predictor: Predictor,
    layer: str | None,
    normalized: bool | None,
    slide_key: str | None,
    embedding: str | None = None,
) -> DataConfig:
    """How new files are read: as those of the run, but for what the user says.

    A run resolves ``normalized`` for its own files, which says nothing of others: it is recognised
    in each file, unless the run was asked for it.
    """
    from ..config import RunConfig

    config = predictor.config
    if embedding is not None and config.data.embedding is None:
        raise UserError(
            f"{predictor.run} was trained with its own encoder, so --embedding cannot be used; "
            "leave it out"
        )
    asked = {"normalized": RunConfig.load_request(predictor.run).data.normalized}
    asked |= given(layer=layer, normalized=normalized, slide_key=slide_key, embedding=embedding)
    return config.replace(data=asked).data
