"""The folder of a run: what may be replaced, and what a failure leaves behind."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..config.schema import CONFIG, INPUTS, REQUESTED, RunConfig
from ..distributed import barrier, leads, rank
from ..errors import UserError
from ..files import atomic_path, check_folder, copy_folder
from ..inference.run_folder import BEST, LAST, PREVIOUS, STAGES, last_checkpoint, read_meta

logger = logging.getLogger(__name__)

EXTENDABLE = ("train.epochs", "train.patience")
"""Settings of a run that may be raised when it goes on."""
PARTS = "selection"
"""Folder in that of a run with what its cross-validation has computed so far."""
LOCK = ".lock"
"""File in the folder of a run that the process which trains it holds locked."""
_UNFINISHED = re.compile(rf"\.\w+\.\d+\.tmp\.\w+|{re.escape(LOCK)}")


def check_run_folder(out: Path, overwrite: bool) -> None:
    """Refuses a folder for a new run that is in use; only another run may be overwritten."""
    check_folder(out)
    if _is_empty(out) or not leads():  # the first rank may have begun to use it
        return
    if not overwrite:
        raise UserError(
            f"{out} exists; pass --resume to go on with it, --overwrite to start anew, "
            "or another --out"
        )
    if not any((out / name).is_file() for name in (CONFIG, REQUESTED, INPUTS)):
        raise UserError(
            f"{out} is not a run directory, so it is not overwritten; choose another --out"
        )


def is_resumable(out: Path) -> bool:
    """Whether a folder holds a run that can go on, be it before its first checkpoint."""
    started = (out / REQUESTED).is_file() and (out / INPUTS).is_file()
    return started and (last_checkpoint(out) is not None or not (out / BEST).is_file())


def check_resumable(out: Path) -> None:
    """Refuses to go on with what is no run, or no longer has a checkpoint to go on from.

    Raises:
        UserError: so it is.
    """
    check_folder(out)
    if not (out / REQUESTED).is_file():
        raise UserError(
            f"{out} holds no run to resume ({REQUESTED} is missing); leave out --resume to start "
            "one"
        )
    if (out / BEST).is_file() and last_checkpoint(out) is None:
        raise UserError(
            f"{out} holds the weights of a run, but nothing to resume it from ({LAST} is "
            "missing); predict with it, or start anew with --overwrite"
        )


def extend_run(out: Path, values: Mapping[str, Any]) -> None:
    """Gives a run more epochs or more patience, so that resuming it goes on.

    From there on the learning rate follows the schedule of the longer run.

    Args:
        out: folder of a run.
        values: by key; see :data:`EXTENDABLE`.

    Raises:
        UserError: another key, a bad value, fewer epochs than are done, or patience at its end.
    """
    if values and leads():
        _extend(out, values)
    barrier()


def _extend(out: Path, values: Mapping[str, Any]) -> None:
    if unknown := [key for key in values if key not in EXTENDABLE]:
        raise UserError(
            f"{unknown[0]} cannot be changed in a run that goes on; {' and '.join(EXTENDABLE)} can"
        )
    request = RunConfig.load_request(out).with_values(values)
    if (out / CONFIG).is_file():
        config, last = RunConfig.load(out).with_values(values), last_checkpoint(out)
        meta: dict[str, Any] = {"stage": STAGES[0], "stale": 0}
        if last is not None:
            meta = read_meta(last)
        done = meta["step"] / config.train.steps_per_epoch if meta["stage"] == STAGES[-1] else 0
        if config.train.epochs < done:
            raise UserError(
                f"{out} has done {math.ceil(done)} epochs; set train.epochs to more, or start anew "
                "with --overwrite"
            )
        if meta["stale"] >= config.train.patience:
            raise UserError(
                f"{out} was stopped since its validation score had not improved for "
                f"{meta['stale']} epochs; set train.patience to more to go on"
            )
        config.save(out)
    request.save_request(out)


@contextmanager
def run_folder(out: Path, resume: bool) -> Iterator[None]:
    """The folder of a run, which no other process can train in meanwhile; of ranks, the first.

    A run that is replaced stays beside it until the new one has something to go on from. A
    failure before that brings it back.

    Raises:
        UserError: another process trains in the folder.
        KeyboardInterrupt: of the block; it says so where an earlier run was brought back.
    """
    if not leads():
        barrier()
        if not out.is_dir():
            raise UserError(
                f"rank {rank()} does not see {out}; choose an --out that all machines share"
            )
        yield
        return
    replaced, new_folder = out.with_name(f".{out.name}.replaced"), not out.exists()
    if not resume:
        if not _is_empty(out):
            with lock_run(out):
                _set_aside(out, replaced)
        out.mkdir(parents=True, exist_ok=True)
    with lock_run(out):
        try:
            barrier()
            yield
        except BaseException as error:
            if not resume and not _has_begun(out):
                if replaced.exists():
                    shutil.rmtree(out)
                    os.replace(replaced, out)
                    if isinstance(error, KeyboardInterrupt):
                        raise KeyboardInterrupt(
                            f"stopped before the first checkpoint; {out} is the earlier run again"
                        ) from None
                elif new_folder and (isinstance(error, UserError) or _is_empty(out)):
                    shutil.rmtree(out)
            raise
        finally:
            if _has_begun(out):
                shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Keeps other processes from training in a folder; whoever dies lets go of it.

    Raises:
        UserError: another process trains there.
    """
    lock = FileLock(out / LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{out} is being trained by another process; wait for it, or choose another --out"
        ) from None
    except NotImplementedError:
        logger.warning("%s: this file system has no locks; train here once at a time", out)
        yield
        return
    except OSError as error:
        raise UserError(f"{out} cannot be written to: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def keep_previous(out: Path) -> None:
    """Keeps the last checkpoint as the one before the next, beside it and without copying it."""
    if (out / LAST).is_file():
        with atomic_path(out / PREVIOUS) as link:
            try:
                os.link(out / LAST, link)
            except OSError:  # not every file system has hard links
                shutil.copyfile(out / LAST, link)


def remove_unfinished(out: Path) -> None:
    """Removes files that a killed process was writing; only who holds the lock may."""
    for path in out.iterdir():
        if _UNFINISHED.fullmatch(path.name) and path.name != LOCK:
            path.unlink(missing_ok=True)


def copy_run(run: Path, folder: Path) -> None:
    """Copies a run; the copy appears complete or not at all, an earlier run there is replaced.

    Raises:
        OSError: the disk is full.
        UserError: another process trains in ``folder``.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    replaced = folder.with_name(f".{folder.name}.replaced")
    try:
        copy_folder(run, temporary)
        (temporary / LOCK).unlink(missing_ok=True)
        if not _is_empty(folder):
            with lock_run(folder):
                _set_aside(folder, replaced)
        elif folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _set_aside(out: Path, replaced: Path) -> None:
    """Moves a run aside; if one that died at once replaced another, the other is kept there."""
    if replaced.exists():
        shutil.rmtree(replaced if _has_begun(out) else out)
    with suppress(FileNotFoundError):
        os.replace(out, replaced)


def _has_begun(out: Path) -> bool:
    """Whether a run has computed anything that can be gone on from."""
    parts = out / PARTS
    kept = any((out / name).is_file() for name in (BEST, LAST, PREVIOUS))
    return kept or (parts.is_dir() and any(parts.iterdir()))


def _is_empty(out: Path) -> bool:
    """Whether a folder is missing, or holds nothing but what a start that was killed leaves."""
    return not out.is_dir() or all(_UNFINISHED.fullmatch(path.name) for path in out.iterdir())
