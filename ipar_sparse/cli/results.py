"""What ``predict`` and ``embed`` say of the file that they wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .messages import say

if TYPE_CHECKING:
    from ..data.slide import Slide


def tell_written(
    slides: Sequence[Slide], out: Path, obsm: Sequence[str], obs: Sequence[str] = ()
) -> None:
    """Says how many cells were written, and under which keys."""
    keys = [f"obsm[{key!r}]" for key in obsm] + [f"obs[{key!r}]" for key in obs]
    *first, last = keys
    listed = f"{', '.join(first)} and {last}" if first else last
    say(f"{sum(slide.num_cells for slide in slides)} cells in {out}, {listed}")
