"""What a person is told: results, notes, and one line for every error."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..distributed import LOST, RankLost, is_rank, launcher_tells, started_rank, tells
from ..errors import UserError

_EXTRAS = {
    "anndata": "cli",
    "bokeh": "cli",
    "distributed": "cli",
    "filelock": "cli",
    "jinja2": "cli",
    "matplotlib": "cli",
    "pydantic": "cli",
    "rich": "cli",
    "safetensors": "cli",
    "sklearn": "cli",
    "tensorboard": "cli",
    "yaml": "cli",
    "faiss": "faiss",
    "umap": "umap",
}
"""Library that may be missing -> the extra that installs it."""


Lines = list[tuple[int, str]]
"""What a rank has for a person: results at level 0, and log messages at theirs."""
_kept: Lines | None = None  # of another rank than the first


class Stopped(Exception):
    """Ctrl-C, with a line on what is left and how to go on."""


def say(text: str, stream=None) -> None:
    """Prints a result, or a line to another stream; names may hold what steers a terminal.

    Of several ranks the first prints results.
    """
    if stream is None and started_rank():
        if _kept is not None:
            _kept.append((0, text))
        return
    text = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
    print(text, file=stream or sys.stdout, flush=True)


def note(text: str, warns: bool = False) -> None:
    """Prints what is no result and no error; ``warns`` of a result that may be wrong."""
    from ..progress import tell

    line = f"{'warning' if warns else 'note'}: {text}"
    if _kept is not None:
        _kept.append((logging.INFO, line))
    tell(line)


class _Keeper(logging.Handler):
    """Keeps log messages of this package."""

    def emit(self, record: logging.LogRecord) -> None:
        if _kept is not None:
            _kept.append((record.levelno, self.format(record)))


@contextmanager
def lines_kept() -> Iterator[Lines]:
    """Keeps what this rank has for a person, where the first rank has to say it."""
    global _kept
    lines: Lines = []
    if not started_rank():
        yield lines
        return
    handler, logger = _Keeper(), logging.getLogger("ipar_sparse")
    handler.setFormatter(logging.Formatter("%(levelname)-8s %(message)s"))
    _kept, level = lines, logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        _kept = None
        logger.removeHandler(handler)
        logger.setLevel(level)


def say_kept(lines: Lines) -> None:
    """Says on the first rank what another has kept."""
    from ..progress import tell

    for level, text in lines:
        if level >= logging.WARNING and not started_rank():
            say(text, stream=sys.stderr)
        else:
            (tell if level else say)(text)


def tell_failure(error: BaseException, text: str) -> None:
    """Prints the line of a failure, on one rank where several have failed."""
    stopped = isinstance(error, KeyboardInterrupt | Stopped) or _lost_a_rank(error)
    if (stopped and launcher_tells()) or not tells():
        return
    say(text, stream=sys.stderr)


def explain(error: Exception) -> tuple[int, str]:
    """The exit code of an error, and the line that is printed for it."""
    if isinstance(error, Stopped):
        return 130, str(error)
    code, text = _explain(error)
    return code, f"error: {' '.join(text.split())}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the host or of a GPU was missing, however a library says so."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and (
        "not enough memory" in said or "can't allocate memory" in said or "ALLOC_FAILED" in said
    )


def out_of_memory(left: str) -> str:
    """The line on missing memory.

    Args:
        left: what is left behind, and what to do.
    """
    from ..progress import failed_stage

    stage = failed_stage()
    who = f"rank {os.environ['RANK']} is " if is_rank() else ""
    return f"{who}out of memory{f' ({stage})' if stage else ''}; {left}"


def _lost_a_rank(error: BaseException) -> bool:
    """Also where torch raises it from the work that waits for an exchange."""
    return isinstance(error, RankLost) or type(error).__name__ == "DistBackendError"


def _explain(error: Exception) -> tuple[int, str]:
    if isinstance(error, UserError):
        return 2, str(error)
    if _lost_a_rank(error):
        return LOST, f"another rank died or did not answer in time ({error})"
    if hasattr(error, "format_message"):  # a mistake found by the parser
        context = getattr(error, "ctx", None)
        where = f" (see `{context.command_path} --help`)" if context else ""
        return 2, f"{error.format_message().rstrip('.')}{where}"
    if isinstance(error, ModuleNotFoundError):
        library = (error.name or "").split(".")[0]
        if library in _EXTRAS:
            extra = _EXTRAS[library]
            return 2, f"{error.name} is not installed: pip install 'ipar_sparse[{extra}]'"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f" while writing {error.filename}" if error.filename else ""
        return 2, (
            f"no space left on the disk{where}; free some space and try again (train: --resume)"
        )
    if isinstance(error, OSError) and error.errno and error.filename:
        return 2, (
            f"{error.filename}: {error.strerror.lower()}; check the path and its permissions, or "
            "choose another"
        )
    if is_out_of_memory(error):
        return 2, out_of_memory("nothing half-written was left; give fewer cells at a time")
    return 1, (
        f"unexpected {type(error).__name__}: {error}; this is a fault of the program: "
        "run again with --debug and report what it prints"
    )
