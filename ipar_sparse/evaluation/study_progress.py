"""How far the runs of a study are, for a person: a line for each that is computed."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..progress import is_quiet
from .study_plan import Task

LINES_EVERY = 60.0
"""Seconds between lines of running jobs, where none can be written over."""


class Board:
    """Lines of running jobs below what was said; where none can be written over, once a minute.

    Attributes:
        every: seconds after which lines are to be shown anew.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=is_quiet())
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self.every = 2.0 if self.console.is_terminal else LINES_EVERY

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, markup=False, soft_wrap=True)

    def show(self, lines: Mapping[Task, str]) -> None:
        """Where each running job is."""
        texts = [f"  {described(task)}: {line or 'begins'}" for task, line in lines.items()]
        if self._live.is_started:
            whole = Text("\n".join(texts), no_wrap=True, overflow="ellipsis")
            self._live.update(whole, refresh=True)
        else:
            for text in texts:
                self.say(text)


def described(task: Task) -> str:
    """A job in a few words."""
    what = "encoder" if task.kind == "encoder" else task.variant
    return f"{what}, {task.fold} held out, seed {task.seed}"
