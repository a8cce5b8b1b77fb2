"""``ipar-sparse check``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from . import options
from .inputs import load_predictor
from .messages import say
from .options import given

if TYPE_CHECKING:
    from ..data.slide import Slide
    from ..inference.input_check import Check


def check(
    run: options.Run,
    cells: Annotated[
        list[Path],
        typer.Argument(metavar="CELLS...", help="AnnData files (.h5ad or .zarr) of cells."),
    ],
    layer: options.Layer = None,
    normalized: options.Normalized = None,
    slide_key: options.SlideKey = None,
    embedding: options.Embedding = None,
    ignore_case: options.IgnoreCase = None,
) -> None:
    """Tell whether a run can place cells, and what to expect; nothing is placed or written.

    Exit code 2 where one of the files cannot be placed.
    """
    from ..config import RunConfig
    from ..inference.run_folder import find_checkpoint, read_meta, reading_settings

    reading = given(layer=layer, normalized=normalized, slide_key=slide_key, embedding=embedding)
    reading |= given(ignore_case=ignore_case)
    config = RunConfig.load(run)
    read_meta(find_checkpoint(run))
    data = reading_settings(run, config, **reading)

    from ..inference.input_check import check_cells
    from ..inference.typicality import check_size

    predictor = load_predictor(run, "cpu")

    def compare(slide: Slide) -> str | None:
        check_size(slide)
        found = predictor.compare(slide)
        return None if found is None else found.sentence()

    refused, optional = 0, slide_key is None
    for path in cells:
        for found in check_cells(run, path, data, optional, compare):
            refused += found.refused is not None
            say("\n".join([f"{found.name}: {found.verdict}", *_lines(found)]))
    if refused:
        raise UserError(f"{refused} of the slides cannot be placed by {run}; the lines say why")


def _lines(found: Check) -> list[str]:
    if found.refused is not None:
        return [f"  why       {found.refused}"]
    cells, empty = found.cells
    rows = {"cells": f"{cells:,}" + (f", {empty:,} of which get no place" if empty else "")}
    if found.genes is not None:
        rows["genes"] = f"{found.genes[0]:,} of the {found.genes[1]:,} that the run reads"
    rows["values"] = found.values
    if found.likeness is not None:
        rows["tissue"] = found.likeness
    lines = [f"  {label:<9} {text}" for label, text in rows.items()]
    lines += [f"  note      {text}" for text in found.notes]
    lines += [f"  warning   {text}" for text in found.warnings]
    return [
        *lines,
        f"  takes     about {found.seconds:,.0f} s on one core, {found.gigabytes:.1f} GB of memory",
    ]
