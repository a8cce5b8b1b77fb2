"""``ipar-sparse simulate``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..files import check_folder
from . import options
from .folders import removed_on_failure
from .messages import say


class Tissue(str, Enum):
    """Kinds of simulated tissue."""

    cortex = "cortex"
    lobules = "lobules"


def simulate(
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder to write the slides to.")],
    tissue: Annotated[
        Tissue,
        typer.Option(
            help="cortex: layers and a gradient, so that expression tells the position. "
            "lobules: liver-like zones that repeat, so that it tells only part of it."
        ),
    ] = Tissue.cortex,
    slides: Annotated[int, typer.Option(min=1, metavar="N", help="Number of slides.")] = 3,
    spots: Annotated[int, typer.Option(min=100, metavar="N", help="Spots on each slide.")] = 1500,
    genes: Annotated[int, typer.Option(min=50, metavar="N", help="Number of genes.")] = 1200,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seed; another one gives other slides.")
    ] = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Make slides of a simulated tissue, to try things out."""
    from ..data.simulation import iter_slides
    from ..data.writers import write_slide
    from ..progress import stage

    check_folder(out, f"--out {out}")
    paths = [out / f"{tissue.value}{i + 1}.h5ad" for i in range(slides)]
    standing = [path.name for path in paths if path.exists()]
    if standing and not overwrite:
        raise UserError(f"{out} holds {standing[0]} already; pass --overwrite or another folder")
    with removed_on_failure(out, paths):
        made = iter_slides(tissue.value, slides=slides, spots=spots, genes=genes, seed=seed)
        for path in paths:
            with stage("Simulating"):
                slide = next(made)
            with stage("Writing slides"):
                write_slide(slide, path, compression="lzf", overwrite=overwrite)
    say(f"{slides} {tissue.value} slides of {spots} spots and {genes} genes in {out}")
