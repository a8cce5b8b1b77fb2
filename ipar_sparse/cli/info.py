"""``ipar-sparse info``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    from rich.table import Table


def info(run: options.Run) -> None:
    """Show what a run was trained on, how far it got, and which settings it selected and why."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..inference.summary import read_selection, summarize_run

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, text in summarize_run(run).items():
        table.add_row(label, escape(text))
    console = Console()
    console.print(table)
    selection = read_selection(run)
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
