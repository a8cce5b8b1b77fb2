"""Whether a run can place some cells, told before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DataConfig, RunConfig
from ..data.copies import identified
from ..data.input_profile import InputProfile, conform
from ..data.notes import Warned
from ..data.records import recorded_inputs, role_in_training
from ..data.slide import Slide
from ..errors import UserError
from .costs import prediction_cost, slide_size
from .run_folder import find_checkpoint, read_meta, unfinished

# of processor time, on simulated cortices of 300 to 16,000 cells and 1,000 genes; docs/checks.md
_SECONDS = (6.3, 1.17e-3, 2.6e-9)  # to start, per cell, per pair of cells


@dataclass
class Check:
    """What is known of one slide before it is placed.

    Args:
        name: of the slide, or of the file that was refused.
        refused: why it cannot be placed; None if it can.
        values: kind of its values, in words.
        genes: how many genes of the run it has, and how many the run reads; None of an embedding.
        cells: how many, and how many of them get no place.
        notes: what was recognised and undone.
        warnings: what may make its map wrong.
        likeness: a sentence on how like the training slides it is; None where nothing tells.
        seconds, gigabytes: to expect of a prediction on one core, memory at its peak.
    """

    name: str
    refused: str | None = None
    values: str = ""
    genes: tuple[int, int] | None = None
    cells: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    likeness: str | None = None
    seconds: float = 0.0
    gigabytes: float = 0.0

    @property
    def verdict(self) -> str:
        """``"can be placed"``, ``"can be placed, but ..."`` or ``"cannot be placed"``."""
        if self.refused is not None:
            return "cannot be placed"
        return "can be placed, but see the warnings" if self.warnings else "can be placed"


def check_cells(
    run: Path,
    source: str | os.PathLike,
    data: DataConfig,
    slide_key_optional: bool = False,
    compare: Callable[[Slide], str | None] | None = None,
) -> list[Check]:
    """Reads the slides of a file and compares them with what a run knows of its input.

    Args:
        run: its folder.
        source: AnnData file.
        data: how it is read; see :func:`~ipar_sparse.inference.run_folder.reading_settings`.
        slide_key_optional: take a file without that column as one slide, and note it.
        compare: tells how like the training slides a slide in the terms of the run is.

    Raises:
        UserError: the run is none, or is damaged. What is wrong with the file is in the result.
    """
    config, meta = RunConfig.load(run), read_meta(find_checkpoint(run))
    profile = load_profile(recorded_inputs(run), config, meta)
    try:
        from ..data.readers import read_files

        slides = read_files(
            [source], data, require_pos=False, slide_key_optional=slide_key_optional
        )
    except UserError as error:
        return [Check(Path(source).name, refused=str(error))]
    return [_check(run, profile, slide, data.ignore_case, compare) for slide in slides]


def _check(
    run: Path,
    profile: InputProfile | None,
    slide: Slide,
    ignore_case: bool,
    compare: Callable[[Slide], str | None] | None,
) -> Check:
    try:
        found = in_terms_of(run, profile, slide, ignore_case)
        likeness = compare(found) if compare else None
    except UserError as error:
        return Check(slide.name, refused=str(error))
    notes = [str(note) for note in found.notes if not isinstance(note, Warned)]
    warnings = [str(note) for note in found.notes if isinstance(note, Warned)]
    if role := role_in_training(recorded_inputs(run), found):
        warnings.append(f"{role}: its map says nothing about how unseen slides are placed")
    genes = None
    if profile is not None:
        genes = (len(set(profile.genes) & set(found.genes.tolist())), len(profile.genes))
    cells, cost = found.num_cells, prediction_cost([slide_size(slide)], RunConfig.load(run))
    start, each, pair = _SECONDS
    return Check(
        slide.name,
        values="an embedding" if profile is None else str(slide.values or "counts"),
        genes=genes,
        cells=(cells, int(found.empty.sum())),
        notes=tuple(notes),
        warnings=tuple(warnings),
        likeness=likeness,
        seconds=start + each * cells + pair * cells**2,
        gigabytes=cost.host / 1e9,
    )


def load_profile(
    recorded: Mapping[str, Any], config: RunConfig, meta: Mapping[str, Any]
) -> InputProfile | None:
    """What a run knows of its input; None of a run on an embedding.

    Args:
        recorded: see :func:`~ipar_sparse.data.records.recorded_inputs`.
        config: what it was computed with.
        meta: of its checkpoint.
    """
    if meta["genes"] is None:
        return None
    profile = InputProfile.from_dict(recorded.get("profile"))
    if profile is None:  # a run of an older version
        return InputProfile(
            scaling="as given" if config.data.normalized else "total",
            values="not recorded",
            genes=meta["genes"],
            total=config.data.target_sum or 1e4,
        )
    return profile


def in_terms_of(
    run: Path, profile: InputProfile | None, slide: Slide, ignore_case: bool | None = None
) -> Slide:
    """A slide in the terms of a run; what was done and what may be wrong is noted on it.

    Args:
        run: its folder.
        profile: of :func:`load_profile`.
        slide: as it was read.
        ignore_case: whether letter case of gene names is disregarded; as the run did if left out.

    Raises:
        UserError: the run cannot place the slide; the line says why.
    """
    if slide.fits == str(run):
        return slide
    if stopped := unfinished(run):
        slide = replace(slide, notes=[*slide.notes, Warned(stopped)])
    if profile is not None:
        if slide.expression is None:
            raise UserError(f"{slide.name}: no expression to embed; give X or --layer")
        return replace(conform(slide, profile, ignore_case), fits=str(run))
    if slide.embedding is None:
        raise UserError(f"{slide.name}: this run uses an embedding; give --embedding obsm:KEY")
    filled = np.zeros(slide.num_cells, dtype=bool)
    return replace(identified(slide), empty=filled, fits=str(run))
