"""What a person sees while a command works: messages, and a live display of progress."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

console = Console(stderr=True, highlight=False)
"""Where everything that is not a result goes."""


def setup_logging(verbose: bool = False) -> None:
    """Shows the messages of this package on :data:`console`, above any progress bar."""
    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    logger = logging.getLogger("ipar_sparse")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Sends everything meant for :data:`console` to the end of a file instead."""
    logger = logging.getLogger("ipar_sparse")
    before = logger.handlers[:], logger.level, logger.propagate
    with open(path, "a", buffering=1) as file:
        setup_logging()
        console.file = file
        try:
            yield
        finally:
            console.file = None  # standard error again
            logger.handlers[:], logger.level, logger.propagate = before


class Progress:
    """Bars with the latest values on a terminal, a line now and then elsewhere.

    Example::

        with Progress() as progress:
            with progress.task("Training", total=100) as task:
                for _ in range(100):
                    task.advance(loss=step())

    Args:
        interval: seconds between two lines of one task when the output is not a terminal.
    """

    def __init__(self, interval: float = 10.0):
        self._interval = interval
        self._bars = None
        if console.is_terminal:
            self._bars = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[values]}", markup=False),
                console=console,
            )

    def __enter__(self) -> Progress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bars:
            self._bars.stop()

    def task(self, name: str, total: int | None = None) -> Task:
        """A new task of ``total`` steps (None = unknown), closed by its ``with`` block."""
        return Task(self, name, total)

    def track(self, items: Iterable, name: str, total: int | None = None):
        """Yields ``items`` and counts them."""
        if total is None and hasattr(items, "__len__"):
            total = len(items)
        with self.task(name, total) as task:
            for item in items:
                yield item
                task.advance()


class Task:
    """One piece of work in a :class:`Progress`."""

    def __init__(self, progress: Progress, name: str, total: int | None):
        self._progress, self._name, self._total = progress, name, total
        self._done, self._values = 0, ""
        self._started = self._spoke = time.monotonic()
        self._bar = None

    def __enter__(self) -> Task:
        if self._progress._bars:
            self._bar = self._progress._bars.add_task(self._name, total=self._total, values="")
        else:
            console.print(f"{self._name} ...", soft_wrap=True, markup=False)
        return self

    def __exit__(self, kind, *_) -> None:
        if self._bar is not None:
            if kind is None and self._total is None:
                self._progress._bars.update(self._bar, total=self._done, completed=self._done)
            self._progress._bars.stop_task(self._bar)
        elif kind is None:
            seconds = time.monotonic() - self._started
            self._say(f"done in {seconds:.1f} s")

    def advance(self, steps: int = 1, **values: float | str) -> None:
        """Counts ``steps`` and shows ``values`` (losses, scores) beside the bar."""
        self._done += steps
        if values:
            self._values = "  ".join(f"{name} {_short(v)}" for name, v in values.items())
        if self._bar is not None:
            self._progress._bars.update(self._bar, completed=self._done, values=self._values)
        elif time.monotonic() - self._spoke >= self._progress._interval:
            self._say(f"{self._done}/{self._total}" if self._total else f"{self._done}")

    def _say(self, text: str) -> None:
        self._spoke = time.monotonic()
        line = f"{self._name}: {text}  {self._values}".rstrip()
        console.print(line, soft_wrap=True, markup=False)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
