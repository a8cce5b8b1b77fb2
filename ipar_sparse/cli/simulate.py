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


ASSAY = "Cells of another assay (--dissociated)"


def _share(text: str):
    return typer.Option(min=0.0, max=0.9, metavar="SHARE", help=text, rich_help_panel=ASSAY)


Depth = Annotated[
    float,
    typer.Option(
        min=0.001,
        metavar="X",
        help="Counts of a cell, times those of a spot.",
        rich_help_panel=ASSAY,
    ),
]
Dropout = Annotated[float, _share("Probability that the count of a gene is lost.")]
Batch = Annotated[
    float,
    typer.Option(
        min=0.0,
        metavar="SD",
        help="Standard deviation of the log factor by which the assay changes each gene.",
        rich_help_panel=ASSAY,
    ),
]
Panel = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Genes of the panel. [dim]Default: all[/dim]",
        rich_help_panel=ASSAY,
        show_default=False,
    ),
]
Doublets = Annotated[float, _share("Cells that hold the counts of two.")]
Foreign = Annotated[float, _share("Cells from another tissue, flagged in obs.")]


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
    dissociated: Annotated[
        bool,
        typer.Option(
            help="Also make cells.h5ad: cells of one more slide, as another assay measures them, "
            "without positions. Their places in the tissue are in obs, tissue_x and tissue_y."
        ),
    ] = False,
    depth: Depth = 0.3,
    dropout: Dropout = 0.1,
    batch: Batch = 0.5,
    panel: Panel = None,
    doublets: Doublets = 0.05,
    foreign: Foreign = 0.0,
    overwrite: options.Overwrite = False,
) -> None:
    """Make slides of a simulated tissue, to try things out."""
    from ..data.assay import dissociate
    from ..data.simulation import iter_slides
    from ..data.writers import write_slide
    from ..progress import stage

    check_folder(out, f"--out {out}")
    paths = [out / f"{tissue.value}{i + 1}.h5ad" for i in range(slides)]
    if panel is not None and panel > genes:
        raise UserError(f"--panel {panel} is more than the {genes} genes; give fewer")
    if dissociated:
        paths.append(out / "cells.h5ad")
    standing = [path.name for path in paths if path.exists()]
    if standing and not overwrite:
        raise UserError(f"{out} holds {standing[0]} already; pass --overwrite or another folder")
    with removed_on_failure(out, paths):
        made = iter_slides(tissue.value, slides=len(paths), spots=spots, genes=genes, seed=seed)
        for number, path in enumerate(paths):
            with stage("Simulating"):
                slide = next(made)
                if number == slides:
                    slide = dissociate(
                        slide,
                        depth=depth,
                        dropout=dropout,
                        batch=batch,
                        panel=panel,
                        doublets=doublets,
                        foreign=foreign,
                        seed=seed,
                    )
            with stage("Writing slides"):
                write_slide(slide, path, compression="lzf", overwrite=overwrite)
    say(f"{slides} {tissue.value} slides of {spots} spots and {genes} genes in {out}")
    if dissociated:
        say(f"{slide.num_cells} dissociated cells, {len(slide.genes)} genes: {paths[-1]}")
