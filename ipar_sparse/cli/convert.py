"""``ipar-sparse convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .messages import note, say


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="AnnData, SpatialData, a 10x matrix, or a folder of Visium, Visium HD, Xenium, "
            "MERSCOPE, CosMx, Stereo-seq or Slide-seq; `IN::PART` takes a part of it.",
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="AnnData file to write, .h5ad or .zarr.")
    ],
    slide_key: options.SlideKey = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Write what a file or folder holds as AnnData: counts, labels, positions; no images.

    The other commands read the same files and folders as they are.
    """
    from ..data.headers import check_free
    from ..data.paths import Source, vendor_files

    found = Source.parse(source)
    check_free(found, out, overwrite)
    vendor_files(found)  # what is missing is told before anything slow is loaded

    from ..data.keys import Keys
    from ..data.sources import load_source, told
    from ..data.writers import write_anndata
    from ..progress import stage

    with stage(f"Reading {source.name}"):
        adata = load_source(source, slide_key)
    for line in told(adata):
        note(line)
    with stage(f"Writing {out.name}"):
        write_anndata(adata, out, overwrite=overwrite)
    where = ", positions in obsm['spatial']" if Keys.SPATIAL in adata.obsm else ""
    say(f"{adata.n_obs} cells of {adata.n_vars} genes in {out}{where}")
