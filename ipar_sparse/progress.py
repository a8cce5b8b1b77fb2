"""What a person sees while a command works: messages and progress."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

console = Console(stderr=True, highlight=False)
"""Standard error: messages and progress go there, results go to standard output."""


def setup_logging(verbose: bool = False) -> None:
    """Shows the log messages of this package on :data:`console`, above any progress bar."""
    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    logger = logging.getLogger("ipar_sparse")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Appends to a file what is meant for :data:`console`, until the block ends."""
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
    """Progress bars on a terminal and in notebooks; elsewhere a line from time to time.

    Example::

        with Progress() as progress:
            with progress.task("Training the model", total=100) as task:
                for _ in range(100):
                    task.advance(loss=step())

    Args:
        interval: seconds between two lines of one task where the output is no terminal.
    """

    def __init__(self, interval: float = 10.0):
        self._interval = interval
        self._bars: RichProgress | None = None
        if console.is_terminal or (console.is_jupyter and find_spec("ipywidgets")):
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
        """A new task of ``total`` steps (None = unknown), which ends with its ``with`` block."""
        return Task(self, name, total)

    def track(self, items: Iterable, name: str, total: int | None = None):
        """Yields ``items`` and counts them."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        with self.task(name, total) as task:
            for item in items:
                yield item
                task.advance()


class Task:
    """One task in a :class:`Progress`."""

    def __init__(self, progress: Progress, name: str, total: int | None):
        self._progress, self._name, self._total = progress, name, total
        self._done, self._values = 0, ""
        self._started = self._last_line = time.monotonic()
        self._bar: TaskID | None = None

    def __enter__(self) -> Task:
        bars = self._progress._bars
        if bars:
            self._bar = bars.add_task(self._name, total=self._total, values="")
        else:
            console.print(f"{self._name} ...", soft_wrap=True, markup=False)
        return self

    def __exit__(self, kind, *_) -> None:
        bars = self._progress._bars
        if bars and self._bar is not None:
            if kind is None and self._total is None:
                bars.update(self._bar, total=self._done, completed=self._done)
            bars.stop_task(self._bar)
        elif kind is None:
            self._print(f"done in {time.monotonic() - self._started:.1f} s")

    def advance(self, steps: int = 1, **values: float | str) -> None:
        """Counts ``steps`` and shows ``values`` (losses, scores) beside the bar."""
        self._done += steps
        if values:
            self._values = "  ".join(f"{name} {_short(v)}" for name, v in values.items())
        bars = self._progress._bars
        if bars and self._bar is not None:
            bars.update(self._bar, completed=self._done, values=self._values)
        elif time.monotonic() - self._last_line >= self._progress._interval:
            self._print(f"{self._done}/{self._total}" if self._total else f"{self._done}")

    def _print(self, text: str) -> None:
        self._last_line = time.monotonic()
        line = f"{self._name}: {text}  {self._values}".rstrip()
        console.print(line, soft_wrap=True, markup=False)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
