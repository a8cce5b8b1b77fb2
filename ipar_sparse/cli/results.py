"""What ``predict`` and ``embed`` add to a file, and say of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .messages import say

if TYPE_CHECKING:
    from ..data.slide import Slide
    from ..inference.predictor import Prediction, Predictor


def empty_cells(slides: Sequence[Slide]) -> dict[str, Any]:
    """The obs column that flags cells without counts, where there are any."""
    import numpy as np

    from ..data.keys import Keys
    from ..data.writers import in_file_order

    flags = [np.asarray(slide.empty) for slide in slides]
    if not any(flag.any() for flag in flags):
        return {}
    return {Keys.EMPTY: in_file_order(slides, flags, fill=False)}


def graphs_of(
    slides: Sequence[Slide], predictions: Sequence[Prediction]
) -> dict[str, dict[str, Any]]:
    """Slide name to how its candidate graph was found, and its recall (1 = exact)."""
    graphs = {}
    for slide, prediction in zip(slides, predictions, strict=True):
        found = prediction.candidates
        graphs[slide.name] = {
            "k": found.k,
            "metric": found.metric,
            "method": found.method,
            "recall": 1.0 if found.recall is None else found.recall,
        }
    return graphs


def provenance(
    predictor: Predictor, graphs: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """What goes to ``uns["ipar"]``: version, run, its resolved configuration, and graphs."""
    return {
        "version": __version__,
        "run": str(predictor.run),
        "config": json.dumps(predictor.config.model_dump(mode="json")),
        "graphs": dict(graphs or {}),
    }


def tell_written(
    slides: Sequence[Slide], out: Path, obsm: Sequence[str], obs: Sequence[str] = ()
) -> None:
    """Says how many cells were written, and under which keys."""
    keys = [f"obsm[{key!r}]" for key in obsm] + [f"obs[{key!r}]" for key in obs]
    *first, last = keys
    listed = f"{', '.join(first)} and {last}" if first else last
    say(f"{sum(slide.num_cells for slide in slides)} cells in {out}, {listed}")
