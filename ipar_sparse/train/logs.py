"""What a run tells: a CSV history, TensorBoard curves, and a live display."""

from __future__ import annotations

import csv
import io
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ..files import atomic_write

HISTORY = "history.csv"
"""Name of the CSV history in a run directory."""

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


class History:
    """CSV log with one row per logged step; resuming cuts off what came after the checkpoint.

    Args:
        path: the CSV file; can be read while it grows.
        columns: all columns, ``step`` first; values missing from a row are left empty.
        resume_step: continue the file and drop rows of later steps; None starts a new one.
    """

    def __init__(self, path: Path, columns: Sequence[str], resume_step: int | None = None):
        if "step" not in columns:
            raise ValueError(f"a history needs a `step` column; got {list(columns)}")
        self.path, self.columns = Path(path), list(columns)
        kept: list[dict[str, Any]] = []
        if resume_step is not None and self.path.exists():
            kept = [row for row in read_history(self.path) if row["step"] <= resume_step]
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        atomic_write(self.path, text.getvalue())
        self._file = open(self.path, "a", newline="", buffering=1)
        self._writer = csv.DictWriter(self._file, self.columns, lineterminator="\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row and flushes it.

        Raises:
            ValueError: the row has a column that was not declared.
        """
        self._writer.writerow(row)

    def close(self) -> None:
        self._file.close()


def read_history(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV history: numbers as int or float, texts as they are, empty cells left out.

    A last line cut short by a crash is dropped.
    """
    text = Path(path).read_text()
    complete = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(io.StringIO(complete))
    return [{k: _number(v) for k, v in row.items() if v not in ("", None)} for row in rows]


class TensorBoard:
    """TensorBoard curves in ``folder``; steps after ``resume_step`` are purged on resuming."""

    def __init__(self, folder: Path, resume_step: int | None = None):
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=30)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds every finite number in ``values`` at ``step``."""
        for name, value in values.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


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


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
