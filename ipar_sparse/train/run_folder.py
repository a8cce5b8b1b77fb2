"""The folder of a run: what may be replaced, and what a failure leaves behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config.schema import CONFIG, REQUESTED
from ..errors import UserError
from ..files import check_folder
from ..inference.checkpoint import BEST, LAST


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
