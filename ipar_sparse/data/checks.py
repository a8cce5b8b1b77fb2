"""What is odd about a slide that was read: told, refused, or left out."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pandas as pd

from ..errors import UserError
from .anndata_store import some_names
from .notes import Warned
from .positions import flatness, stray_cells, stretch
from .slide import Slide

MAX_CATEGORIES = 250  # a column of more distinct labels identifies cells, it does not group them
_SECTION = re.compile(
    r"slide|section|sample|library|batch|donor|animal|mouse|patient|subject|specimen|puck|bregma",
    re.IGNORECASE,
)
_SECTION_CELLS = 15  # of a slide
_LONG = 8  # times as long as wide: longer tissues are rare


def checked(
    slide: Slide,
    obs: pd.DataFrame,
    slide_key: str | None,
    require_pos: bool,
    drop_outliers: bool,
    where: str,
) -> Slide:
    """A slide with notes on what is odd about it.

    Args:
        slide: as it was read.
        obs: all columns of its file.
        slide_key: by which the slides of the file were told apart.
        require_pos: refuse positions that are a point or a line.
        drop_outliers: leave out cells that are not where the tissue is.
        where: what messages call the file.

    Raises:
        UserError: positions are needed, and are a point or a line.
    """
    if slide_key is None:
        slide.notes += _sections(obs)
    if num_empty := int(slide.empty.sum()):
        slide.notes.append(
            f"{num_empty} of {slide.num_cells} cells have no counts "
            f"({some_names(slide.cell_names[slide.empty])}): they get no place"
        )
    if slide.pos is None:
        return slide
    stray = stray_cells(slide.pos) if require_pos else np.zeros(slide.num_cells, bool)
    # of cells that lie very far off, all others are a point
    if shape := flatness(slide.pos[~stray]):
        if require_pos:
            raise UserError(
                f"{where}: the positions of {slide.name} are {shape}; a slide needs two dimensions"
            )
        slide.notes.append(f"positions are {shape}: left out")
        return replace(slide, pos=None)
    if not require_pos:
        return slide
    length, width = np.sort(np.ptp(slide.pos[~stray], axis=0))[::-1]
    if length > _LONG * width:
        slide.notes.append(
            Warned(
                f"the tissue is {length / width:.3g} times as long as wide: if x and y are in "
                "different units, a map learned from it is wrong"
            )
        )
    if stray.any() and drop_outliers:
        slide.notes.append(f"{stray.sum()} cells that lie outside the tissue are left out")
        slide = slide.take(np.flatnonzero(~stray))
    elif stray.any():
        wider = stretch(slide.pos, stray)
        lie = f"make it {wider:.1f} times wider" if wider > 1.2 else "lie at one point"
        slide.notes.append(
            Warned(
                f"{stray.sum()} of {slide.num_cells} cells ({some_names(slide.cell_names[stray])}) "
                f"{lie}: if their positions were filled in, a map learned from them is wrong; "
                "pass --drop-outliers to leave them out"
            )
        )
    repeated = slide.num_cells - len(np.unique(slide.pos, axis=0))
    if repeated:
        slide.notes.append(f"{repeated} cells share their position with another: kept")
    return slide


def _sections(obs: pd.DataFrame) -> list[str]:
    """Hints at obs columns that may tell slides apart."""
    found = []
    for key in obs.columns:
        if _SECTION.search(str(key)):
            count = obs[key].astype(str).value_counts()
            if 1 < len(count) <= MAX_CATEGORIES and count.min() >= _SECTION_CELLS:
                found.append(f"{str(key)!r} ({len(count)} labels)")
    if not found:
        return []
    return [
        f"all cells are taken as one slide; obs has {', '.join(found[:3])}: if these are slides, "
        "pass --slide-key, since slides are placed one by one"
    ]
