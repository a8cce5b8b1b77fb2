"""A training slide as a frame of reference: positions in its own coordinates and units."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import RunConfig
from ..data.copies import identified
from ..data.headers import check_suffix
from ..data.paths import Source
from ..data.records import recorded_inputs, role_in_training
from ..data.slide import Slide
from ..errors import UserError
from ..files import check_folder
from .run_folder import find_checkpoint, read_meta

if TYPE_CHECKING:
    from anndata import AnnData

    from ..geometry.alignment import Similarity

MOST_PLACES = 10
"""Most probable places of a cell that can be asked for, at most."""


@dataclass(frozen=True)
class Reference:
    """A training slide whose frame positions are wanted in.

    Args:
        frame: what the run says of the frame; see
            :func:`~ipar_sparse.train.atlas.describe_frames`.
        record: what the run says of the slide; see
            :func:`~ipar_sparse.data.records.recorded_inputs`.
        slide: as it was read; None where it was given by name.
    """

    frame: dict[str, Any]
    record: dict[str, Any]
    slide: Slide | None = None

    @property
    def name(self) -> str:
        """Of the slide, in the run."""
        return self.frame["name"]

    @property
    def radius(self) -> float:
        """Root-mean-square radius of the slide, in its units."""
        return self.frame["radius"]

    def describe(self) -> dict[str, Any]:
        """For ``uns["ipar"]["reference"]``."""
        return {
            "name": self.name,
            "digest": self.frame["digest"],
            "units": "those of the positions of the reference",
            "rms_radius": self.radius,
            "median_error": self.radius * self.frame["median_error"],
            "relative_error": self.frame["median_error"],
            "left_out": self.frame["left_out"],
        }

    @property
    def similarity(self) -> Similarity:
        """From the common frame of the training slides, in RMS radii, to that of the slide."""
        from ..geometry.alignment import Similarity  # torch, for which no refusal waits

        rotation, centre = np.array(self.frame["rotation"]), np.array(self.frame["centre"])
        return Similarity(self.radius, rotation, centre)

    def uncertainty(self, variance: np.ndarray) -> np.ndarray:
        """Predicted root mean square error (n,) in RMS radii.

        Args:
            variance: predictive variance of the places (n,), in squared RMS radii.
        """
        return np.sqrt(self.frame["variance_ratio"] * np.asarray(variance, dtype=np.float64))


def find_reference(
    run: Path, source: str | os.PathLike | AnnData, name: str | None = None
) -> Reference:
    """The training slide that a file or object holds, or that is called so.

    A slide is known by what its cells hold, whatever its file is called now.

    Args:
        run: folder of a run.
        source: AnnData, a file or folder of any known format, or the name of a training slide.
        name: of the slide that is meant, where a file holds several.

    Raises:
        UserError: the slide was not trained on or has no positions, or the run is of an earlier
            version, whose slides have no frame.
    """
    frames = read_meta(find_checkpoint(run))["metadata"].get("frames")
    if frames is None:
        raise UserError(
            f"{run} is of an earlier version, whose slides have no frames; train it again, or "
            "leave out --reference"
        )
    recorded = recorded_inputs(run)
    names = [one["name"] for one in frames]
    slides: list[Slide] = []
    if isinstance(source, str | os.PathLike) and not Source.parse(source).path.exists():
        found = [one for one in frames if one["name"] == os.fspath(source)]
        if not found:
            raise UserError(
                f"--reference {source}: no such file, and no slide that {run} was trained on has "
                f"this name; it was trained on {_listed(names)}"
            )
    else:
        from ..data.readers import read_files  # with what reads files

        data = RunConfig.load_request(run).data
        read = read_files([source], data, require_pos=True, slide_key_optional=True)
        slides = [identified(slide) for slide in read]
        digests = {slide.digest for slide in slides}
        found = [one for one in frames if one["digest"] in digests]
        label = source if isinstance(source, str | os.PathLike) else slides[0].name
        if not found:
            held = any(one["digest"] in digests for one in recorded["val"])
            why = "decided when its training stopped" if held else "is no slide of it"
            raise UserError(
                f"--reference {label}: {run} was not trained on it ({why}), so it has no frame; "
                f"give one of {_listed(names)}"
            )
        found = [one for one in found if name in (None, one["name"])] or found
        if len(found) > 1:
            raise UserError(
                f"--reference {label}: holds {len(found)} training slides; pick one, e.g. "
                f"--reference {found[0]['name']}"
            )
    digest = found[0]["digest"]
    return Reference(
        frame=found[0],
        record=next(one for one in recorded["train"] if one["digest"] == digest),
        slide=next((slide for slide in slides if slide.digest == digest), None),
    )


def frame_options(
    run: Path,
    reference: str | os.PathLike | AnnData | None,
    top: int | None = None,
    keep_foreign: bool = False,
    spots: bool = False,
    page: bool = False,
) -> dict[str, Any]:
    """What is asked for beside the map, in the terms of ``place_cells``.

    Args:
        run: folder of a run.
        reference: see :func:`find_reference`.
        top: number of most probable places of each cell.
        keep_foreign: give foreign cells a position in the frame of the reference.
        spots: whether the slide of the reference is needed, and not its frame alone.
        page: whether it is shown, where it can be found.

    Raises:
        UserError: the reference is none, or an option makes no sense or means nothing.
    """
    if keep_foreign and reference is None:
        raise UserError("--keep-foreign means nothing without --reference SLIDE; leave it out")
    if top is not None:
        if not isinstance(top, int) or not 1 <= top <= MOST_PLACES:
            raise UserError(f"--top {top}: ask for 1 to {MOST_PLACES} places of each cell")
        if "atlas_cells" not in read_meta(find_checkpoint(run))["metadata"]:
            raise UserError(
                f"{run} is of an earlier version and has no atlas; train it again, or leave out "
                "--top"
            )
    found = None if reference is None else find_reference(run, reference)
    if (spots or page) and found is not None and found.slide is None:
        path = found.record["path"]
        if path is not None and Source.parse(path).path.exists():
            found = find_reference(run, path, found.name)
        elif spots:
            raise UserError(
                f"--mapping needs the spots of {found.name}, whose file is not where it was in "
                "training; give it by --reference FILE"
            )
    return {"reference": found, "top": top, "keep_foreign": keep_foreign}


def check_mapping(
    mapping: str | os.PathLike,
    reference: str | os.PathLike | AnnData | None,
    others: Iterable[str | os.PathLike | AnnData],
    overwrite: bool,
) -> None:
    """Refuses an output of assignments to spots that cannot be written.

    Args:
        mapping: the file.
        reference: whose spots cells are assigned to.
        others: inputs and outputs beside it.
        overwrite: allow an existing file.

    Raises:
        UserError: it has no reference, is another file of the same command, exists, or has a name
            of no known format.
    """
    path = Path(mapping)
    if reference is None:
        raise UserError(
            "--mapping assigns cells to the spots of --reference SLIDE; add that, or leave it out"
        )
    check_suffix(path)
    check_folder(path.parent)
    names = [one for one in (*others, reference) if isinstance(one, str | os.PathLike)]
    if any(Source.parse(one).path.resolve() == path.resolve() for one in names):
        raise UserError(
            f"--mapping {path}: is an input or another output of this command; give it a name of "
            "its own"
        )
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists; choose another --mapping or pass --overwrite")


def refuse_reference_itself(reference: Reference, slides: Sequence[Slide]) -> None:
    """Refuses cells that are those of the reference: their places in it are known.

    Raises:
        UserError: so they are.
    """
    for slide in slides:
        if role_in_training({"train": [reference.record]}, slide) == "was trained on":
            raise UserError(
                f"{slide.name} holds the cells of the reference {reference.name}, whose positions "
                "are known; give other cells, or another --reference"
            )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown}, ..." if len(names) > 5 else shown
