"""What a person sees while a command works, and where its time and memory went.

Every piece of work of note is a :func:`stage`. On a terminal and in notebooks stages are bars.
Elsewhere, and in a log file, a stage that takes over two seconds gets a line, another every
minute, and one at its end. What stages took is kept for :func:`watching`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from . import __version__, ticks, usage
from .distributed import started_rank
from .files import write_json

console = Console(stderr=True, highlight=False)
"""Standard error: messages and progress go there, results go to standard output."""

LOGGER = logging.getLogger("ipar_sparse")
_SHOWN_AFTER = 2.0  # seconds; a shorter stage leaves no line
_LINE_EVERY = 60.0  # seconds between two lines of a stage


class PlainHandler(logging.Handler):
    """One line a message on :data:`console`, never wrapped and without control characters."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), soft_wrap=True, markup=False)


def setup_logging(verbose: bool = False) -> None:
    """Shows the log messages of this package on :data:`console`, above any progress bar."""
    handler: logging.Handler
    if started_rank():  # rank 0 speaks
        handler = logging.NullHandler()
    elif console.is_terminal or console.is_jupyter:
        handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    else:
        handler = PlainHandler()
        handler.setFormatter(logging.Formatter("%(levelname)-8s %(message)s"))
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(logging.DEBUG if verbose else logging.INFO)
    LOGGER.propagate = False


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Appends to a file what is meant for :data:`console`, until the block ends."""
    before = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate
    with open(path, "a", buffering=1) as file:
        console.file = file
        setup_logging()
        try:
            yield
        finally:
            console.file = None  # standard error again
            LOGGER.handlers[:], LOGGER.level, LOGGER.propagate = before


@dataclass
class StageUse:
    """What the stages of one name took, all together.

    Args:
        name: of the stage, after those that it is a part of: ``"Selection / Encoder"``.
        times: how often it ran.
        seconds: it took.
        host_peak_bytes: most memory that the process held meanwhile.
        device_peak_bytes: most GPU memory that torch held meanwhile.
        device_busy: share of the time in which the GPU worked; None where nothing tells.
    """

    name: str
    times: int = 0
    seconds: float = 0.0
    host_peak_bytes: int = 0
    device_peak_bytes: int = 0
    device_busy: float | None = None


class Task:
    """A running stage; :func:`stage` makes it.

    Args:
        path: names of the stages that it is a part of, and its own.
        total: steps; None = unknown.
    """

    def __init__(self, path: tuple[str, ...], total: int | None):
        self.path, self.total, self.done, self.values = path, total, 0, ""
        self.part = 0.0  # of the step that runs
        self.heard = False  # whether its steps are those of a loop
        self.began = time.monotonic()
        self.host_peak = self.device_peak = 0
        self.bar: TaskID | None = None
        self.last_line: float | None = None

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def advance(self, steps: int = 1, **values: float | str) -> None:
        """Counts ``steps`` and shows ``values`` (losses, scores) beside the bar."""
        self.done, self.part = self.done + steps, 0.0
        if values:
            self.values = "  ".join(f"{name} {_short(v)}" for name, v in values.items())
        _shown.update(self)

    def reach(self, done: int, total: int) -> None:
        """Sets how many of how many steps are done."""
        self.done, self.total = done, total
        _shown.update(self)

    def line(self) -> str:
        """How far it is and how long it will take."""
        parts = []
        done = self.done + self.part
        if self.total:
            partly = 0 < self.part < 1 and self.done < self.total
            shown = f" and {self.part:.0%} of the next" if partly else ""
            parts.append(f"{self.done:,} of {self.total:,}{shown}")
        elif self.done:
            parts.append(f"{self.done:,}")
        parts.append(f"{time_text(self.seconds)} so far")
        # first steps also load and compile, and would promise far too long a time
        if self.total and min(5, self.total / 2) <= done < self.total:
            left = self.seconds / done * (self.total - done)
            parts.append(f"about {time_text(left)} left")
        return f"{' / '.join(self.path)}: {', '.join(parts)}  {self.values}".rstrip()


class _Shown:
    """The running stages of this process, how they are shown, and what all stages took."""

    def __init__(self) -> None:
        self.stack: list[Task] = []
        self.uses: dict[tuple[str, ...], StageUse] = {}
        self.quiet = started_rank() > 0
        self.sampler: usage.DeviceSampler | None = None
        self.failed: tuple[str, ...] = ()  # the innermost stage that an exception ended
        self.began = 0.0  # in seconds of this process; a second command begins later
        self._bars: RichProgress | None = None
        self._ended: threading.Event | None = None

    def enter(self, name: str, total: int | None) -> Task:
        self._fold_peaks()
        self.failed = ()
        path = (*(task.path[-1] for task in self.stack), name)
        task = Task(path, total)
        if not self.stack:
            self._open()
        self.stack.append(task)
        if self._bars is not None:
            indent = "  " * (len(path) - 1)
            task.bar = self._bars.add_task(f"{indent}{name}", total=total, values="")
        return task

    def leave(self, task: Task, failed: bool) -> None:
        self._fold_peaks()
        self.stack.remove(task)
        if failed and not self.failed:
            self.failed = task.path
        use = self.uses.setdefault(task.path, StageUse(" / ".join(task.path)))
        seconds, before = task.seconds, use.seconds
        use.times, use.seconds = use.times + 1, before + seconds
        use.host_peak_bytes = max(use.host_peak_bytes, task.host_peak)
        use.device_peak_bytes = max(use.device_peak_bytes, task.device_peak)
        if self.sampler is not None:
            busy = self.sampler.busy(task.began, task.began + seconds)
            if busy is not None:
                use.device_busy = ((use.device_busy or 0.0) * before + busy * seconds) / use.seconds
        if self._bars is not None and task.bar is not None:
            if seconds < _SHOWN_AFTER and len(task.path) > 1:
                self._bars.remove_task(task.bar)
            else:
                if not failed and task.total is None:
                    self._bars.update(task.bar, total=task.done, completed=task.done)
                self._bars.stop_task(task.bar)
        if not failed and seconds >= _SHOWN_AFTER:
            self.tell(f"{' / '.join(task.path)}: done in {time_text(seconds)}  {task.values}")
        if not self.stack:
            self._close()

    def update(self, task: Task) -> None:
        if self._bars is not None and task.bar is not None:
            self._bars.update(
                task.bar, total=task.total, completed=task.done + task.part, values=task.values
            )

    def tell(self, line: str, above_bars: bool = False) -> None:
        """A line where no bars are, or above them too, and in the log file."""
        if self.quiet:
            return
        if self._bars is None or above_bars:
            console.print(line.rstrip(), soft_wrap=True, markup=False)
        for handler in LOGGER.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.emit(
                    LOGGER.makeRecord(LOGGER.name, logging.INFO, "", 0, line.rstrip(), (), None)
                )

    def _open(self) -> None:
        ticks.listen(self._hear)
        live = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets"))
        if live and not self.quiet:
            self._bars = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[values]}", markup=False),
                console=console,
            )
            self._bars.start()
        self._ended = threading.Event()
        threading.Thread(target=self._lines, args=(self._ended,), daemon=True).start()

    def _close(self) -> None:
        ticks.listen(None)
        self._ended.set()
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _hear(self, done: int, total: int) -> None:
        """Of a loop in a stage, or in one step of a stage that counts its own."""
        if not self.stack:
            return
        task = self.stack[-1]
        if task.total is None or task.heard:
            task.heard = True
            task.reach(done, total)
        else:
            task.part = min(done / total, 1.0)
            self.update(task)

    def _lines(self, ended: threading.Event) -> None:
        """Lines of stages that take long, until ``ended``; runs beside the work."""
        while not ended.wait(0.25):
            for task in self.stack[-1:]:
                due = _SHOWN_AFTER if task.last_line is None else task.last_line + _LINE_EVERY
                if task.seconds >= due:
                    task.last_line = task.seconds
                    self.tell(task.line())

    def _fold_peaks(self) -> None:
        """Adds the peaks since the last call to those of all running stages."""
        if self.stack:
            host, device = usage.host_peak(), usage.device_peak(reset=True)
            for task in self.stack:
                task.host_peak = max(task.host_peak, host)
                task.device_peak = max(task.device_peak, device)
        usage.reset_host_peak()


_shown = _Shown()


@contextmanager
def stage(name: str, total: int | None = None) -> Iterator[Task]:
    """Work that is shown while it runs, and whose time and memory are kept.

    Stages may lie in each other. Loops in ``ticks.counted`` say how far one without a total is.

    Args:
        name: what is done, for a person: ``"Reading slides"``.
        total: steps, which the block counts by :meth:`Task.advance`; None = unknown.
    """
    task = _shown.enter(name, total)
    failed = True
    try:
        yield task
        failed = False
    finally:
        _shown.leave(task, failed)


def track(items: Iterable, name: str, total: int | None = None) -> Iterator:
    """Yields ``items`` as a stage that counts them."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with stage(name, total) as task:
        for item in items:
            yield item
            task.advance()


def failed_stage() -> str:
    """The stage that the last exception ended; empty if there was none."""
    return " / ".join(_shown.failed)


def is_quiet() -> bool:
    """Whether stages are not shown."""
    return _shown.quiet


def where() -> str:
    """How far the innermost stage is that runs in this process; empty if none does."""
    return "".join(task.line() for task in _shown.stack[-1:])


def tell(line: str) -> None:
    """Shows a line that is neither a result nor a warning; quiet commands leave it out."""
    _shown.tell(line, above_bars=True)


@contextmanager
def quiet_stages(quiet: bool = True) -> Iterator[None]:
    """Shows neither stages nor messages below a warning in the block, if ``quiet``."""
    before, level = _shown.quiet, LOGGER.level
    if quiet:
        _shown.quiet = True
        LOGGER.setLevel(logging.WARNING)
    try:
        yield
    finally:
        _shown.quiet = before
        LOGGER.setLevel(level)


@contextmanager
def watching(
    command: str, *, quiet: bool = False, log_file: Path | None = None, profile: Path | None = None
) -> Iterator[None]:
    """A command: its stages are shown, and a summary says where time and memory went.

    Args:
        command: what is run.
        quiet: show warnings and errors alone.
        log_file: messages and lines of progress are added to it, each with its time.
        profile: JSON file for what each stage took, written if the command fails, too.
    """
    handler = None
    if log_file is not None:
        handler = logging.FileHandler(log_file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
        LOGGER.addHandler(handler)
    _shown.uses.clear()
    _shown.sampler = usage.DeviceSampler() if profile is not None else None
    completed = False
    try:
        with quiet_stages(quiet):
            yield
            completed = True
            if usage.seconds_since_start() - _shown.began >= _SHOWN_AFTER:
                for line in summary():
                    tell(line)
    finally:
        if _shown.sampler is not None:
            _shown.sampler.close()
            _shown.sampler = None
        if profile is not None:
            write_json(profile, {"command": command, "completed": completed, **profiled()})
        if handler is not None:
            LOGGER.removeHandler(handler)
            handler.close()
        _shown.began = usage.seconds_since_start()


def profiled() -> dict[str, Any]:
    """Where the time of this process and its memory went, for JSON."""
    stages = [asdict(use) for use in _in_order()]
    return {
        "version": __version__,
        "seconds": usage.seconds_since_start() - _shown.began,
        "host_peak_bytes": max((use["host_peak_bytes"] for use in stages), default=0),
        "device_peak_bytes": max((use["device_peak_bytes"] for use in stages), default=0),
        "stages": stages,
    }


def summary() -> list[str]:
    """The same in lines: stages that took a hundredth of the time or more."""
    found = profiled()
    total, gpu = found["seconds"], found["device_peak_bytes"] > 0
    head = f"{'where the time went':<44}{'seconds':>9}{'share':>7}{'host':>11}"
    lines = [head + (f"{'GPU':>11}" if gpu else "")]
    for use in found["stages"]:
        if use["seconds"] < 0.01 * total:
            continue
        *outer, name = use["name"].split(" / ")
        text = "  " * len(outer) + name + (f" ({use['times']}x)" if use["times"] > 1 else "")
        line = f"{text:<44}{use['seconds']:>9.1f}{use['seconds'] / total:>7.0%}"
        line += f"{size_text(use['host_peak_bytes']):>11}"
        lines.append(line + (f"{size_text(use['device_peak_bytes']):>11}" if gpu else ""))
    last = f"{'all':<44}{total:>9.1f}{1:>7.0%}{size_text(found['host_peak_bytes']):>11}"
    return [*lines, last + (f"{size_text(found['device_peak_bytes']):>11}" if gpu else "")]


def _in_order() -> list[StageUse]:
    """Stages as they began, each followed by its parts."""
    paths = list(_shown.uses)  # a part ends before its whole
    roots = list(dict.fromkeys(path[:1] for path in paths))

    def below(path: tuple[str, ...]) -> Iterator[StageUse]:
        if path in _shown.uses:
            yield _shown.uses[path]
        deeper = dict.fromkeys(p[: len(path) + 1] for p in paths if p[: len(path)] == path)
        for one in deeper:
            if len(one) > len(path):
                yield from below(one)

    return [use for root in roots for use in below(root)]


def size_text(count: float) -> str:
    """Bytes as a person reads them."""
    units = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    unit = next((name for name in units if count < 1024 * units[name]), "TiB")
    return f"{count / units[unit]:.{0 if unit == 'MiB' else 1}f} {unit}"


def time_text(seconds: float) -> str:
    """A time as a person reads it."""
    if seconds < 100:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
