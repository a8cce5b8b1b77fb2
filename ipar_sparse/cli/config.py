"""``ipar-sparse config``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import UserError
from .options import OUTPUT, flag


def config(
    search: Annotated[
        str,
        typer.Argument(
            help="Show all settings with this word in their name or help.", show_default=False
        ),
    ] = "",
    everything: Annotated[bool, flag("--all", "Show every setting.", OUTPUT)] = False,
) -> None:
    """List the settings that matter most, for --set and --config; --all lists every one."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..config import MAIN_SETTINGS, describe

    settings = {setting.key: setting for setting in describe()}
    groups: dict[str, list[str]] = {}
    if search or everything:
        for key, setting in settings.items():
            if search.lower() in f"{key} {setting.text}".lower():
                groups.setdefault(key.rpartition(".")[0] or "run", []).append(key)
    else:
        groups = {heading: list(keys) for heading, keys in MAIN_SETTINGS.items()}
    if not groups:
        raise UserError(
            f"no setting has {search!r} in its name or help; `ipar-sparse config --all` lists all"
        )
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("setting", "default", "what it does"):
        table.add_column(name, overflow="fold")
    for heading, keys in groups.items():
        table.add_row()
        table.add_row(f"[bold]{heading}[/bold]")
        for key in keys:
            _, values, default, text = settings[key]
            table.add_row(key, escape(default), f"{escape(text)} [dim]({escape(values)})[/dim]")
    Console().print(table)
    if not (search or everything):
        left = len(settings) - sum(map(len, groups.values()))
        print(
            f"\n`ipar-sparse config --all` lists {left} more, `ipar-sparse config WORD` searches."
        )
