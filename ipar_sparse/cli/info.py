"""``ipar-sparse info``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from . import options
from .inputs import recorded_inputs

if TYPE_CHECKING:
    from rich.table import Table

    from ..config import RunConfig


def info(run: options.Run) -> None:
    """Show what a run was trained on, how far it got, and which settings it selected and why."""
    from rich.console import Console
    from rich.table import Table

    from ..config import RunConfig
    from ..inference.run_folder import LAST, count_parameters, find_checkpoint, read_meta

    config = RunConfig.load(run)
    request = RunConfig.load_request(run)
    weights = find_checkpoint(run)
    meta = read_meta(run / LAST if (run / LAST).is_file() else weights)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    recorded = recorded_inputs(run)
    for role, label in (("train", "trained on"), ("val", "validated on")):
        slides = [f"{one['path'] or one['name']}, {one['cells']:,} cells" for one in recorded[role]]
        table.add_row(label, "\n".join(slides) or "nothing")
    table.add_row("genes", f"{meta['metadata']['genes']:,}")
    table.add_row("progress", f"{meta['stage']} stage, step {meta['step']:,}")
    if meta["best"] is not None:
        best = f"{meta['best_epoch'] + 1}, validation E_geo {meta['best']:.4g}"
        table.add_row("best epoch", best)
    table.add_row("weights", weights.name)
    counts = count_parameters(weights).items()
    table.add_row("parameters", ", ".join(f"{name} {count:,}" for name, count in counts))
    table.add_row("version", meta["ipar_sparse"])
    table.add_row("settings", "\n".join(_changed(request)) or "all defaults")
    decided = [f"{key} = {_text(config.get(key))}" for key in request.unresolved()]
    table.add_row("selected", "\n".join(decided) or "nothing was left open")
    console = Console()
    console.print(table)
    selection = _selection(run)
    if selection["choices"]:
        donors, folds = selection["donors"], len(selection["folds"])
        console.print(
            f"\n[bold]cross-validation scores[/bold], {folds} folds over {donors} donors "
            f"({selection['mode']}): distance Spearman and neighbour hit @15, mean ± standard "
            "error; the score is the root of their product"
        )
        console.print(_scores(selection))
        for choice in selection["choices"]:
            console.print(f"{choice['setting']}: {choice['reason']}", markup=False, soft_wrap=True)


def _selection(run: Path) -> dict[str, Any]:
    """The cross-validation table of a run."""
    from ..config.schema import SELECTION

    path = run / SELECTION
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or damaged; train the run again") from None


def _scores(selection: Mapping[str, Any]) -> Table:
    """Every candidate of every choice with its scores, and a mark at the selected one."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("setting", "candidate", "score", "distances", "neighbours", "selected"):
        table.add_column(name)
    for choice in selection["choices"]:
        setting = choice["setting"]
        for candidate in choice["candidates"]:
            names = ("score", "distance_spearman", "neighbor_hit@15")
            scores = (_score(candidate, name) for name in names)
            mark = "yes" if candidate["name"] == choice["selected"] else ""
            table.add_row(setting, candidate["name"], *scores, mark)
            setting = ""
        table.add_section()
    return table


def _score(candidate: Mapping[str, Any], name: str) -> str:
    value, error = candidate.get(name), candidate.get(f"{name}_se")
    if value is None:
        return "–"
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _changed(config: RunConfig) -> Iterator[str]:
    """Settings that differ from their defaults, as ``section.key = value``."""
    from ..config import RunConfig, describe

    defaults = RunConfig()
    for setting in describe():
        value = config.get(setting.key)
        if value != defaults.get(setting.key):
            yield f"{setting.key} = {_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
