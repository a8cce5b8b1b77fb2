"""The folder of a run: what may be replaced, and what a failure leaves behind."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config.schema import CONFIG, REQUESTED, RunConfig
from ..errors import UserError
from ..files import check_folder
from ..inference.run_folder import BEST, LAST, STAGES, read_meta

EXTENDABLE = ("train.epochs", "train.patience")
"""Settings of a run that may be raised when it goes on."""


def check_run_folder(out: Path, overwrite: bool) -> None:
    """Refuses a folder for a new run that is in use; only another run may be overwritten."""
    check_folder(out)
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"{out} exists; pass --resume to go on with it, --overwrite to start anew, "
            "or another --out"
        )
    if not any((out / name).is_file() for name in (CONFIG, REQUESTED)):
        raise UserError(
            f"{out} is not a run directory, so it is not overwritten; choose another --out"
        )


def check_resumable(out: Path) -> None:
    """Refuses to go on with what holds no checkpoint.

    Raises:
        UserError: it holds none.
    """
    if not (out / LAST).is_file():
        raise UserError(
            f"{out} holds no run to resume ({LAST} is missing); leave out --resume to start one"
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
    if not values:
        return
    if unknown := [key for key in values if key not in EXTENDABLE]:
        raise UserError(
            f"{unknown[0]} cannot be changed in a run that goes on; {' and '.join(EXTENDABLE)} can"
        )
    request = RunConfig.load_request(out).with_values(values)
    if (out / CONFIG).is_file():
        config, meta = RunConfig.load(out).with_values(values), read_meta(out / LAST)
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
    """The folder of a run; a failure before the first checkpoint leaves what was there before."""
    if resume:
        yield
        return
    aside = out.with_name(f".{out.name}.{os.getpid()}.old")
    new_folder = not out.exists()
    if not new_folder:
        os.replace(out, aside)
    out.mkdir(parents=True)
    try:
        yield
    except BaseException:
        if not _has_checkpoint(out):
            shutil.rmtree(out, ignore_errors=True)
            if not new_folder:
                os.replace(aside, out)
        raise
    finally:
        if aside.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _has_checkpoint(out: Path) -> bool:
    return any((out / name).is_file() for name in (BEST, LAST))
