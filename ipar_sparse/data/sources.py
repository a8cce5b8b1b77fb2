"""Files and folders of any known format, opened or loaded, and the slides in them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import anndata
import numpy as np
import pandas as pd

from ..errors import UserError
from .anndata_store import Store, memory_store, open_store, suggest
from .headers import check_column
from .keys import Keys
from .paths import Source, vendor_files
from .spatialdata_store import load_table, open_table
from .vendors import read_vendor

Cells: TypeAlias = anndata.AnnData | str | os.PathLike
"""Cells in memory, or a file or folder of any known format; ``"multi.h5ad::C"`` is a part."""


@dataclass
class Opened:
    """An open source.

    Args:
        store: its elements.
        name: what slides of it are called.
        slide_key: obs column that its format names slides in, if it does.
        label: of the only slide that is meant.
        question: what to ask the user, where it is unclear what a slide is.
        notes: lines for the user.
    """

    store: Store
    name: str
    slide_key: str | None = None
    label: str | None = None
    question: str | None = None
    notes: list[str] = field(default_factory=list)


@contextmanager
def open_source(source: str | os.PathLike | anndata.AnnData) -> Iterator[Opened]:
    """Opens an object, file or folder of any known format, and closes it again.

    Raises:
        UserError: in one line, if it cannot be read or it is unclear what is meant.
    """
    if isinstance(source, anndata.AnnData):
        yield Opened(memory_store(source), "slide")
        return
    found = Source.parse(source)
    if found.is_spatialdata:
        with open_table(found) as (store, regions):
            opened = Opened(store, found.name, label=found.label)
            opened.notes.append("; ".join(["read as SpatialData", *regions.notes]))
            if not found.takes_all:
                opened.slide_key = regions.slide_key
                opened.question = regions.question if found.label is None else None
            yield opened
    elif files := vendor_files(found):
        adata = read_vendor(files, found.part)
        yield Opened(memory_store(adata), found.name, label=found.label, notes=told(adata))
    else:
        with open_store(found.path) as store:
            yield Opened(store, found.name, label=found.label)


def load_source(source: str | os.PathLike, slide_key: str | None = None) -> anndata.AnnData:
    """All of what a source holds, in memory.

    Args:
        source: a file or folder of any known format.
        slide_key: obs column that a picked slide is sought in.

    Raises:
        UserError: in one line, if it cannot be read or it is unclear what is meant.
    """
    found = Source.parse(source)
    if found.is_spatialdata:
        adata, regions = load_table(found)
        slide_key = slide_key or regions.slide_key
    elif files := vendor_files(found):
        adata = read_vendor(files, found.part)
    else:
        with open_store(found.path):  # says in one line what is wrong with a file
            pass
        read_file = anndata.io.read_zarr if found.path.is_dir() else anndata.io.read_h5ad
        adata = read_file(found.path)
    if found.label is None:
        return adata
    rows = pick_rows(adata.obs, slide_key, found.label, str(found.path))
    return adata[rows[found.label]].copy()


def pick_rows(
    obs: pd.DataFrame, slide_key: str | None, label: str | None, where: str
) -> dict[str | None, np.ndarray]:
    """Row numbers of each slide, by its label; None labels a source of one slide.

    Args:
        obs: of the source.
        slide_key: column that names the slide of each cell.
        label: of the only slide that is meant.
        where: what messages call the source.

    Raises:
        UserError: no such column, cells without a value in it, or no such slide.
    """
    if slide_key is None:
        if label is None:
            return {None: np.arange(len(obs))}
        columns = [
            c for c in obs if obs[c].dtype.kind not in "fc" and (obs[c].astype(str) == label).any()
        ]
        hint = f", e.g. --slide-key {columns[0]}" if columns else ""
        raise UserError(
            f"{where}: which obs column holds {label!r} is not said; name it by --slide-key{hint}"
        )
    check_column(slide_key, obs.columns, where)
    column = obs[slide_key]
    if column.isna().any():
        raise UserError(
            f"{where}: {int(column.isna().sum())} cells have no value in obs[{slide_key!r}]; "
            "fill it in or remove them"
        )
    codes, labels = pd.factorize(column.astype(str))
    if label is not None and label not in labels:
        raise UserError(f"{where}: has no {slide_key} {label!r}; {suggest(label, labels)}")
    order = np.argsort(codes, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(codes, minlength=len(labels)))[:-1])
    found = dict(zip(labels, rows, strict=True))
    return found if label is None else {label: found[label]}


def told(adata: anndata.AnnData) -> list[str]:
    """What was read of a vendor's format or of SpatialData, as lines for the user."""
    made = adata.uns.get(Keys.SOURCE)
    if made is None:
        return []
    notes = [f"read as {made['format']}"]
    if "positions" in made:
        notes[0] += f"; {made['positions']}"
    elif "unit" in made:
        notes[0] += f"; positions in units of one {made['unit']}"
    if left_out := made.get("left_out"):
        listed = ", ".join(f"{count} {kind}" for kind, count in left_out.items())
        notes.append(f"left out, as they are no genes: {listed}")
    return notes


def named_sources(
    slides: Cells | Sequence[Cells] | Mapping[str, Cells] | None,
    start: int = 0,
    kind: str = "slide",
) -> tuple[list[str | None], list[Cells]]:
    """Names and sources of slides, as a person gives them.

    Args:
        slides: objects, files or folders; a mapping names them.
        start: how many come before, in the numbers of objects without a name.
        kind: that these numbers follow.

    Returns:
        A name for each source, and the sources; None where a file has its own.
    """
    if slides is None:
        return [], []
    if isinstance(slides, Mapping):
        return [str(name) for name in slides], list(slides.values())
    if isinstance(slides, anndata.AnnData | str | os.PathLike) or hasattr(slides, "shape"):
        slides = [slides]  # whatever else has a shape is refused as one object
    if not isinstance(slides, Iterable):
        raise UserError(f"slides are AnnData or paths of files; {slides!r} is neither")
    sources = list(slides)
    numbers = range(start + 1, start + len(sources) + 1)
    return [
        f"{kind}{number}" if isinstance(source, anndata.AnnData) else None
        for number, source in zip(numbers, sources, strict=True)
    ], sources
