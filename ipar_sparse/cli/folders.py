"""Folders that commands write to: what may be replaced, and what a failure leaves behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError


def check_folder(path: Path, option: str = "--out") -> None:
    """Refuses a folder that is a file, lies below one, or cannot be written to.

    Args:
        path: the folder, which need not exist.
        option: what the message calls it.
    """
    for part in (path, *path.parents):
        if part.exists():
            if not part.is_dir():
                raise UserError(f"{option}: {part} is a file, not a folder; choose another")
            if not os.access(part, os.W_OK):
                raise UserError(f"{option}: {part} cannot be written to; choose another")
            return


def check_output_folder(out: Path, overwrite: bool) -> None:
    """Refuses a folder of results that is in use, unless it may be overwritten."""
    check_folder(out)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} exists and is not empty; pass --overwrite or another --out")


def check_run_folder(out: Path, overwrite: bool) -> None:
    """Refuses a folder for a new run that is in use; only another run may be overwritten."""
    from ..config.schema import CONFIG, REQUESTED

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


def check_resume(out: Path, overwrite: bool, given: Iterable[str]) -> None:
    """Refuses to resume what is no run, or with other settings than it began with.

    Args:
        out: folder of the run.
        overwrite: whether --overwrite was given, too.
        given: other options that were given.
    """
    from ..inference.run_folder import LAST

    if overwrite:
        raise UserError("--resume and --overwrite exclude each other; leave one out")
    if options := ", ".join(given):
        raise UserError(
            f"--resume goes on with the saved settings; leave out {options}, "
            "or start anew with --overwrite"
        )
    if not (out / LAST).is_file():
        raise UserError(
            f"{out} holds no run to resume ({LAST} is missing); leave out --resume to start one"
        )


@contextmanager
def removed_on_failure(folder: Path, paths: Iterable[Path] = ()) -> Iterator[None]:
    """Makes a folder; a failure removes it again, or new files among ``paths``."""
    new_folder = not folder.exists()
    new = [path for path in paths if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        if new_folder:
            shutil.rmtree(folder, ignore_errors=True)
        raise


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


def what_is_left(out: Path) -> str:
    """What a run that was stopped leaves behind, and how to go on with it."""
    from ..inference.run_folder import BEST, LAST

    if not (out / LAST).is_file():
        return "stopped before the first checkpoint; nothing was left behind"
    use = ", or predict with it as it is" if (out / BEST).is_file() else ""
    return (
        f"stopped; {out} holds all that was done so far: "
        f"go on with `ipar-sparse train --out {out} --resume`{use}"
    )


def _has_checkpoint(out: Path) -> bool:
    from ..inference.run_folder import BEST, LAST

    return any((out / name).is_file() for name in (BEST, LAST))
