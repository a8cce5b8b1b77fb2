"""Cells without positions, for which a run is trained: their genes decide which ones can serve."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config.schema import DataConfig
from ..errors import UserError
from .copies import find_copies, identified, record_of
from .gene_names import check_shared, rename_genes
from .headers import reading_cells
from .held import changed
from .slide import Slide

if TYPE_CHECKING:
    from anndata import AnnData


def read_dissociated(
    sources: Iterable[str | os.PathLike | AnnData],
    data: DataConfig,
    names: Sequence[str | None] | None = None,
) -> list[Slide]:
    """Cells without positions; those that their files hold are not read.

    Args:
        sources: objects, or files and folders of any known format.
        data: how the slides of the run are read.
        names: one a source; None names a file by its stem.

    Raises:
        UserError: in one line, for anything wrong with a source.
    """
    from .readers import read_files

    return read_files(
        list(sources),
        reading_cells(data),
        require_pos=False,
        names=names,
        slide_key_optional=True,
        divided=True,
    )


def record_cells(
    slides: Sequence[Slide], cells: Sequence[Slide], data: DataConfig
) -> dict[str, Any]:
    """What a run writes of the cells that it is trained for.

    Args:
        slides: training slides with expression.
        cells: the cells; their positions are left out.
        data: how gene names are matched.

    Returns:
        ``cells``, a record of each, with the number of ``genes`` that it shares with the first
        training slide; and ``cell_genes``, names on that slide of the genes that all cells have.
        Nothing without cells.

    Raises:
        UserError: the run takes an embedding, cells share too few genes with the slides, or are
            those of a training slide.
    """
    if not cells:
        return {}
    if data.embedding is not None:
        raise UserError(
            "cells decide which genes serve, and a run on an embedding reads none; leave out "
            "--cells or --embedding"
        )
    first, records = identified(slides[0]), []
    genes = [str(gene) for gene in first.genes]
    wanted = list(genes)

    def renamed_as_slides(one: Slide) -> Slide:
        return rename_genes(one, wanted, "the training slides", data.ignore_case)[0]

    for one in cells:
        if one.expression is None:
            raise UserError(f"{one.name}: no expression; give X or --layer")
        one = identified(one if one.pos is None else replace(one, pos=None, digest=None))
        _refuse_training_cells(slides, one)
        (renamed,) = changed([one], renamed_as_slides)
        own = set(map(str, renamed.genes))
        records.append({**record_of(one), "genes": len(own.intersection(wanted))})
        genes = [gene for gene in genes if gene in own]
        check_shared(one, list(one.genes), wanted, len(genes), "the training slides")
    return {"cells": records, "cell_genes": genes}


def _refuse_training_cells(slides: Sequence[Slide], cells: Slide) -> None:
    for slide in slides:
        if find_copies([slide, cells]):
            raise UserError(
                f"{cells.name}: its cells are those of the training slide {slide.name}; give the "
                "cells that are to be placed"
            )
