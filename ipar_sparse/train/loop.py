"""What all stages of a training share: random numbers, logs, checkpoints, interruption, resume.

Everything random in a step comes from a generator seeded by the run's seed, the stage and the
step. A run that was stopped and resumed therefore computes what an unbroken one does, bit for bit
on CPU.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from .. import __version__
from ..distributed import barrier, from_first, is_rank, largest, leads, size
from ..errors import UserError
from ..inference.checkpoint import load_checkpoint, save_checkpoint, settle_checkpoints
from ..inference.run_folder import BEST, LAST, STAGES, read_meta
from ..progress import Task, stage
from .batches import step_generator, step_seed
from .history import RunLog
from .run_folder import keep_previous, lock_run, remove_unfinished

logger = logging.getLogger(__name__)

_LOG_EVERY = 10  # steps
SAVE_EVERY = 60.0
"""Seconds between two checkpoints of a stage."""

CUT_SHORT = "cut_short"
"""Key of the metadata that lists the parts which a limit of time cut short."""
# of the time a run may take, when a part has to be done: what is left is for those after it
_TIME_SHARES = {"selection": 0.3, "encoder": 0.6, "gate": 0.7, "model": 0.95}


class TimeUp(Exception):
    """Cross-validation has used up its time."""


@dataclass
class TrainState:
    """How far a run has come; saved with every checkpoint.

    Args:
        stage: one of :data:`STAGES`.
        step: finished steps of the stage.
        best: best validation score so far.
        best_epoch: its epoch, counted from 0.
        stale: epochs since then.
        log_step: finished steps of all stages, which number the rows of the history.
        metadata: what is known of the data: genes, cells, slides, candidate recall.
    """

    stage: str = STAGES[0]
    step: int = 0
    best: float | None = None
    best_epoch: int | None = None
    stale: int = 0
    log_step: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)


class Loop:
    """Steps and their random numbers, without logs or files.

    Args:
        seed: of everything random.
        device: where steps are computed.
        after_step: called after each step; may raise to stop.
    """

    def __init__(
        self, seed: int, device: torch.device, after_step: Callable[[], None] = lambda: None
    ):
        self.seed, self.device, self.after_step = seed, device, after_step
        self.state = TrainState()

    def generator(self, stage: str, step: int, device=None) -> torch.Generator:
        """The source of all random numbers of one step."""
        return step_generator(self.seed, stage, step, device or self.device)

    def seed_of(self, stage: str, step: int) -> int:
        """The seed of that source."""
        return step_seed(self.seed, stage, step)

    def seeds_of(self, stage: str, step: int, pieces: Iterable[range]) -> list[list[int]]:
        """Seeds of the graphs of a step, by their numbers in its batch; those of each piece."""
        names = ((f"{stage}/{n}" if n else stage for n in piece) for piece in pieces)
        return [[self.seed_of(name, step) for name in piece] for piece in names]

    @contextmanager
    def stage(
        self, name: str, total: int, optimizer: Optimizer, scaler: GradScaler | None = None
    ) -> Iterator[Stage]:
        """A stage of so many steps; after any but the last, the next one begins.

        Args:
            name: one of :data:`STAGES`.
            total: steps.
            optimizer: restored where a stopped run had it, and saved with every checkpoint.
            scaler: of gradients, likewise.
        """
        yield Stage(self, name, total, optimizer, scaler)
        if name != STAGES[-1]:
            self.advance(name)

    def advance(self, finished: str) -> None:
        """Go on to the stage after ``finished``."""
        self.state.stage, self.state.step = STAGES[STAGES.index(finished) + 1], 0
        self.save()

    def late(self, part: str) -> bool:
        """Whether a part of the run has used up its time, where that is limited."""
        return False

    def finished(self, name: str) -> bool:
        """Whether a stage was finished before this run was resumed."""
        return STAGES.index(self.state.stage) > STAGES.index(name)

    def count(self, stage: Stage, losses: Mapping[str, Any] | None) -> None:
        """After every step."""
        self.state.step += 1
        self.after_step()

    def between_steps(self, stage: Stage) -> None:
        """Between two steps: the place to stop, or to save."""

    def log(self, stage: str, values: Mapping[str, Any]) -> None:
        """Keeps a row of numbers."""

    def save_best(self) -> None:
        """Keeps the weights as the best so far."""

    def save(self, stage: Stage | None = None) -> None:
        """Saves everything that resuming needs."""


class Stage:
    """The steps of one stage; iterate over it, or over :meth:`until` an epoch's end.

    Args:
        loop: it belongs to.
        name: of the stage.
        total: steps.
        optimizer: saved with its checkpoints.
        scaler: of gradients, likewise.
        display: of its progress, if it is shown.
    """

    def __init__(
        self,
        loop: Loop,
        name: str,
        total: int,
        optimizer: Optimizer,
        scaler: GradScaler | None = None,
        display: Task | None = None,
    ):
        self.loop, self.name, self.total = loop, name, total
        self.optimizer, self.scaler, self.display = optimizer, scaler, display
        self._losses: Mapping[str, Any] | None = None
        self._shown = loop.state.step

    def __iter__(self) -> Iterator[int]:
        return self.until(self.total)

    def until(self, end: int) -> Iterator[int]:
        """Numbers of the steps that are left up to ``end``, each counted when its body is done.

        They end early where time is up. The run can be stopped between two of them; after the
        last one only by :meth:`Loop.between_steps`, once the caller has done what belongs to the
        epoch.
        """
        while self.loop.state.step < end and not self.loop.late(self.name):
            yield self.loop.state.step
            self.loop.count(self, self._losses)
            if self.loop.state.step < end:
                self.loop.between_steps(self)

    def record(self, losses: Mapping[str, Any]) -> None:
        """The losses of the present step, for the logs."""
        self._losses = losses

    def show(self, loss: float) -> None:
        """Brings the display up to the present step."""
        if self.display is not None:
            shown, self._shown = self._shown, self.loop.state.step
            self.display.advance(self._shown - shown, loss=loss)


class KeptLoop(Loop):
    """A loop that keeps its state in a file, and goes on from there.

    Args:
        path: of the checkpoint; its folder exists.
        seed: of everything random.
        device: where steps are computed.
        stop: looked at between steps; set, it ends the training after a checkpoint.
        after_step: called after each step; may raise to stop.

    Attributes:
        modules: name to module, saved with every checkpoint.
        meta: what else a checkpoint says.
    """

    def __init__(
        self,
        path: Path,
        seed: int,
        device: torch.device,
        stop: threading.Event | None = None,
        after_step: Callable[[], None] = lambda: None,
    ):
        super().__init__(seed, device, after_step)
        self.path, self.stop = path, stop or threading.Event()
        self.modules: dict[str, nn.Module] = {}
        self.meta: dict[str, Any] = {}
        self._resumed: dict[str, Any] | None = None
        self._saved_at = time.monotonic()

    def restore(self) -> None:
        """Take up the checkpoint, if there is one; optimisers wait for their stage."""
        if self._resumed is None and self.path.is_file():
            self._resumed = read_meta(self.path)
        if self._resumed is not None:
            load_checkpoint(self.path, self.modules)
            self.state = TrainState(**{name: self._resumed[name] for name in asdict(self.state)})

    @contextmanager
    def stage(
        self, name: str, total: int, optimizer: Optimizer, scaler: GradScaler | None = None
    ) -> Iterator[Stage]:
        if self._resumed is not None and self.state.step:
            load_checkpoint(self.path, optimizer=optimizer)
            if scaler is not None and self._resumed["scaler"]:
                scaler.load_state_dict(self._resumed["scaler"])
        self._resumed = None
        with super().stage(name, total, optimizer, scaler) as steps:
            yield steps

    def between_steps(self, stage: Stage) -> None:
        """If asked to stop, leave a checkpoint to resume from; else save one every minute.

        Raises:
            KeyboardInterrupt: if asked to stop.
        """
        if self.stop.is_set():
            self.save(stage)
            raise KeyboardInterrupt
        self.save_in_time(stage)

    def save_in_time(self, stage: Stage) -> None:
        """Saves a checkpoint if the last one is a minute old."""
        if time.monotonic() - self._saved_at > SAVE_EVERY:
            self.save(stage)

    def save(self, stage: Stage | None = None) -> None:
        self._write(self.path, stage)
        self._saved_at = time.monotonic()

    def _write(self, path: Path, stage: Stage | None = None) -> None:
        scaler = None if stage is None else stage.scaler
        meta = {
            "ipar_sparse": __version__,
            **asdict(self.state),
            **self.meta,
            "modules": list(self.modules),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        optimizer = None if stage is None else stage.optimizer
        save_checkpoint(path, self.modules, meta, optimizer=optimizer)


class TrainingLoop(KeptLoop):
    """A loop that keeps a run folder; no other process can keep the same one meanwhile.

    Of several ranks the first keeps it. All stop, or are late, at the same step.

    Args:
        out: the run directory; exists.
        seed: of everything random.
        device: where steps are computed.
        resume: whether the run in ``out`` goes on.
        stop: looked at between steps; set, it ends the run after a checkpoint, as ctrl-C does.
        max_minutes: that the run may take; parts that are late are cut short.
    """

    def __init__(
        self,
        out: Path,
        seed: int,
        device: torch.device,
        resume: bool = False,
        stop: threading.Event | None = None,
        max_minutes: float | None = None,
    ):
        super().__init__(out / LAST, seed, device, stop)
        self._began = time.monotonic()
        self._seconds = math.inf if max_minutes is None else 60 * max_minutes
        self.out, self.resume = out, resume
        self._open = ExitStack()
        self._late, self._ask_at, self._asked_at = False, 0, self._began  # of all ranks

    def __enter__(self) -> TrainingLoop:
        with ExitStack() as entered:
            if leads():
                entered.enter_context(lock_run(self.out))
                remove_unfinished(self.out)
                if self.resume:
                    self._resumed = settle_checkpoints(self.out)
                self._log = RunLog(self.out, self._resumed is not None)
                entered.callback(self._log.close)
            self._resumed = from_first(self._resumed)
            entered.enter_context(_interrupts(self.stop))
            self._open = entered.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._open.__exit__(*exception)

    def restore(self) -> None:
        """Take up the last checkpoint, if there is one; optimisers wait for their stage.

        Raises:
            UserError: if it was trained on other genes.
        """
        meta = self._resumed
        if meta is None:
            return
        if meta["genes"] != self.meta["genes"]:
            raise UserError(
                f"{self.out} was trained on {len(meta['genes'] or [])} genes that these slides do "
                "not give; resume with the slides the run was started with"
            )
        super().restore()
        barrier()  # the first may write anew from here on
        if cut := self.state.metadata.get(CUT_SHORT):
            self.state.metadata[CUT_SHORT] = [part for part in cut if part != STAGES[-1]]
        logger.info("resuming the %s at step %d", self.state.stage, self.state.step)

    @contextmanager
    def stage(
        self, name: str, total: int, optimizer: Optimizer, scaler: GradScaler | None = None
    ) -> Iterator[Stage]:
        with (
            stage(f"Training the {name}", total) as display,
            super().stage(name, total, optimizer, scaler) as steps,
        ):
            barrier()
            steps.display, self._ask_at = display, 0
            if self.state.step:
                display.advance(self.state.step)
            yield steps

    def count(self, stage: Stage, losses: Mapping[str, Any] | None) -> None:
        state = self.state
        state.step += 1
        state.log_step += 1
        if losses is None or not (state.step % _LOG_EVERY == 0 or state.step == 1):
            return
        values = {name: float(torch.as_tensor(value).detach()) for name, value in losses.items()}
        if not math.isfinite(values["loss"]):
            advice = "lower train.lr, or use train.precision=float32"
            raise UserError(
                f"the loss became {values['loss']} at step {state.step} of the {stage.name}; "
                + ("lower encoder.lr" if stage.name == "encoder" else advice)
            )
        values["lr"] = float(stage.optimizer.param_groups[0]["lr"])
        self.log(stage.name, values)
        stage.show(values["loss"])

    def between_steps(self, stage: Stage) -> None:
        if size() > 1 and not self._all_stop(stage):
            self.save_in_time(stage)
            return
        stopping = self.stop.is_set() and stage.name == STAGES[-1]
        if stopping and not (self.out / BEST).exists():
            self.save_best()
        try:
            super().between_steps(stage)
        except KeyboardInterrupt:
            barrier()  # a rank that ends before the others have saved would end them
            raise

    def _all_stop(self, stage: Stage) -> bool:
        """Whether a rank was asked to stop; ranks ask each other about every five seconds."""
        step, now = self.state.step, time.monotonic()
        if step < self._ask_at:
            return False
        pace = (now - self._asked_at) / _LOG_EVERY  # seconds a step, at least
        self._asked_at = now
        after = min(_LOG_EVERY, max(1, int(5 / pace))) if leads() else 0
        asked, late, ask_at = largest(self.stop.is_set(), self._is_late(stage.name), step + after)
        self._late, self._ask_at = bool(late), ask_at
        if asked:
            self.stop.set()
        return bool(asked)

    def stop_if_asked(self) -> None:
        """Stop where there is nothing to save.

        Raises:
            KeyboardInterrupt: if asked to stop.
            TimeUp: if the selection has used up its time.
        """
        if self.stop.is_set():
            raise KeyboardInterrupt
        self.stop_if_late()

    def stop_if_late(self) -> None:
        """End the selection where its time is up.

        Raises:
            TimeUp: so it is.
        """
        if self.late("selection"):
            raise TimeUp

    def _is_late(self, part: str) -> bool:
        return time.monotonic() - self._began >= _TIME_SHARES[part] * self._seconds

    def late(self, part: str) -> bool:
        together = size() > 1 and part != "selection"  # whose folds ranks compute apart
        if not (self._late if together else self._is_late(part)):
            return False
        cut = self.state.metadata.setdefault(CUT_SHORT, [])
        if part not in cut:
            cut.append(part)
            logger.warning("%s: cut short, since time is limited", part)
        return True

    def log(self, stage: str, values: Mapping[str, Any]) -> None:
        if leads():
            self._log.write(stage, values, self.state.log_step)

    def save_best(self) -> None:
        if leads():
            self._write(self.out / BEST)

    def save(self, stage: Stage | None = None) -> None:
        if leads():
            keep_previous(self.out)
            super().save(stage)
        self._saved_at = time.monotonic()


@contextmanager
def _interrupts(asked: threading.Event) -> Iterator[None]:
    """Turns the first ctrl-C, or SIGTERM, into an event; the second ctrl-C stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number, frame):
        if asked.is_set():
            if is_rank():
                return  # its launcher passes on what the terminal has sent already
            raise KeyboardInterrupt
        asked.set()
        again = "" if is_rank() else "; press ctrl-C again to stop at once"
        # in a thread: this one may be amid an import that showing the line needs, too
        say = threading.Thread(target=logger.warning, args=("stopping after this step%s", again))
        say.start()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
