"""Folders that commands write to: what may be replaced, and what a failure leaves behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError


def check_resume(out: Path, overwrite: bool, given: Iterable[str]) -> None:
    """Refuses to resume what is no run, or with other settings than it began with.

    Args:
        out: folder of the run.
        overwrite: whether --overwrite was given, too.
        given: other options that were given.
    """
    from ..train.run_folder import check_resumable

    if overwrite:
        raise UserError("--resume and --overwrite exclude each other; leave one out")
    if options := ", ".join(given):
        raise UserError(
            f"--resume goes on with the saved settings; leave out {options} (train.epochs and "
            "train.patience may be set), or start anew with --overwrite"
        )
    check_resumable(out)


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


def what_is_left(out: Path) -> str:
    """What a run that was stopped leaves behind, and how to go on with it."""
    from ..inference.run_folder import BEST, last_checkpoint
    from ..train.run_folder import is_resumable

    if not is_resumable(out):
        return "stopped before anything was computed; nothing was left behind"
    use = ", or predict with it as it is" if (out / BEST).is_file() else ""
    where = "" if last_checkpoint(out) else " in its cross-validation"
    return (
        f"stopped{where}; {out} holds all that was done so far: "
        f"go on with `ipar-sparse train --out {out} --resume`{use}"
    )
