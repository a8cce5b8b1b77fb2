"""What ``predict`` and ``embed`` say of the file that they wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import check_folder
from .messages import say

if TYPE_CHECKING:
    from ..data.slide import Slide


def outputs_of(sources: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Where the result of each input goes: to a file, or into a folder for several inputs.

    Raises:
        UserError: two inputs would go to one file.
    """
    from ..data.paths import Source

    if len(sources) == 1:
        check_folder(out.parent)
        return {sources[0]: out}
    check_folder(out)
    if out.suffix:
        raise UserError(
            f"{out}: {len(sources)} inputs go to a folder, not to a file; name one by --out"
        )
    outputs: dict[Path, Path] = {}
    for source in sources:
        one = Source.parse(source)
        path = out / f"{'-'.join((one.name, *filter(None, [one.label])))}{one.suffix}"
        if path in outputs.values():
            raise UserError(f"{source}: its result and another would both be {path}; run it apart")
        outputs[source] = path
    return outputs


def tell_written(
    slides: Sequence[Slide], out: Path, obsm: Sequence[str], obs: Sequence[str] = ()
) -> None:
    """Says how many cells were written, and under which keys."""
    if out.suffix not in (".h5ad", ".zarr"):
        say(f"{sum(slide.num_cells for slide in slides)} cells in {out}")
        return
    keys = [f"obsm[{key!r}]" for key in obsm] + [f"obs[{key!r}]" for key in obs]
    *first, last = keys
    listed = f"{', '.join(first)} and {last}" if first else last
    say(f"{sum(slide.num_cells for slide in slides)} cells in {out}, {listed}")
