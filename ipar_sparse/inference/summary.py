"""What a run was trained on, how far it got and what it selected, in lines for a person."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import RunConfig, describe
from ..config.schema import SELECTION
from ..data.records import recorded_inputs
from ..errors import UserError
from ..files import parse_json
from .run_folder import (
    BEST,
    count_parameters,
    find_checkpoint,
    last_checkpoint,
    read_meta,
    unfinished,
)


class RunSummary(dict[str, str]):
    """Label to text of one or more lines; a notebook shows it as a table."""

    def __repr__(self) -> str:
        width = 2 + max(map(len, self), default=0)
        return "\n".join(
            f"{label if first else '':<{width}}{line}"
            for label, text in self.items()
            for first, line in zip(
                [True, *[False] * text.count("\n")], text.split("\n"), strict=True
            )
        )


def summarize_run(run: Path) -> RunSummary:
    """What there is to tell of a run: slides, genes, progress, settings.

    Args:
        run: folder of a run.

    Raises:
        UserError: the folder is no run, or a file in it is missing or damaged.
    """
    config = RunConfig.load(run)
    request = RunConfig.load_request(run)
    last = last_checkpoint(run)
    weights = last if last is not None and not (run / BEST).is_file() else find_checkpoint(run)
    meta = read_meta(last or weights)
    recorded, rows = recorded_inputs(run), RunSummary()
    for role, label in (("train", "trained on"), ("val", "validated on")):
        slides = [f"{one['path'] or one['name']}, {one['cells']:,} cells" for one in recorded[role]]
        rows[label] = "\n".join(slides) or "nothing"
    if cells := recorded.get("cells"):
        lines = [
            f"{one['path'] or one['name']}, {one['cells']:,} cells, {one['genes']:,} shared genes"
            for one in cells
        ]
        rows["trained for"] = "\n".join(lines)
    rows["genes"] = f"{meta['metadata']['genes']:,}"
    rows |= _input_rows(recorded.get("profile"))
    if frames := meta["metadata"].get("frames"):
        rows["frame errors"] = "\n".join(map(frame_sentence, frames))
    rows["progress"] = unfinished(run) or "finished"
    if meta["best"] is not None:
        rows["best epoch"] = f"{meta['best_epoch'] + 1}, validation E_geo {meta['best']:.4g}"
    rows["weights"] = weights.name
    counts = count_parameters(weights).items()
    rows["parameters"] = ", ".join(f"{name} {count:,}" for name, count in counts)
    rows["version"] = meta["ipar_sparse"]
    rows["settings"] = "\n".join(_changed(request)) or "all defaults"
    decided = [f"{key} = {_text(config.get(key))}" for key in request.unresolved()]
    rows["selected"] = "\n".join(decided) or "nothing was left open"
    return rows


def frame_sentence(frame: Mapping[str, Any]) -> str:
    """The error in the frame of a training slide, in words.

    Args:
        frame: what a run says of it; see :func:`~ipar_sparse.train.atlas.describe_frames`.
    """
    error = frame["median_error"]
    return (
        f"{frame['name']}: half of its cells lie within {frame['radius'] * error:.4g} of their "
        f"places ({error:.2f} of its radius), {frame['left_out']}"
    )


def _input_rows(profile: Mapping[str, Any] | None) -> dict[str, str]:
    """What the training slides held, of a run that recorded it."""
    if profile is None:
        return {}
    scaled = {
        "total": f"scaled to {profile['total']:,.5g} a cell, over {len(profile['shared']):,} genes",
        "logs": "taken as they are",
        "unscaled": "taken as they are",
        "as given": "taken as they are",
    }
    widths = [width for width in profile["extent"] if width]
    rows = {
        "values": f"{profile['values']}, {scaled[profile['scaling']]}",
        "gene names": profile["identifiers"] + (", any case" if profile["ignore_case"] else ""),
    }
    if widths:
        span = f"{min(widths):,.4g} to {max(widths):,.4g}"
        rows["extent"] = f"slides are {span} wide, in the units of their files"
    if profile["slide_key"]:
        rows["slide key"] = profile["slide_key"]
    return rows


def read_selection(run: Path) -> dict[str, Any]:
    """The cross-validation table of a run."""
    path = run / SELECTION
    try:
        return parse_json(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or damaged; train the run again") from None


def _changed(config: RunConfig) -> Iterator[str]:
    """Settings that differ from their defaults, as ``section.key = value``."""
    defaults = RunConfig()
    for setting in describe():
        value = config.get(setting.key)
        if value != defaults.get(setting.key):
            yield f"{setting.key} = {_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
