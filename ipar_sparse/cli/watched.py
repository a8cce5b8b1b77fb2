"""Options that all long commands share: what is shown, where it is kept, and what it took."""

from __future__ import annotations

import functools
import gc
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..distributed import RankLost, is_rank, joined, launch, started_rank
from ..errors import UserError
from ..files import check_folder
from .messages import Stopped
from .options import OUTPUT, RUNNING, flag

Quiet = Annotated[bool, flag("--quiet", "Show warnings, errors and results alone.", OUTPUT)]
LogFile = Annotated[
    Path | None, flag("--log-file", "File to add messages and progress to.", OUTPUT, "FILE")
]
Profile = Annotated[
    Path | None,
    flag("--profile", "JSON file for the time and memory of each stage.", OUTPUT, "FILE"),
]
Devices = Annotated[
    int | None,
    flag(
        "--devices",
        "Number of GPUs of this machine to share the work, or with --device cpu of processes. "
        "[dim]Default: 1[/dim]",
        RUNNING,
        "N",
        min=1,
    ),
]
_OPTIONS = {"quiet": (Quiet, False), "log_file": (LogFile, None), "profile": (Profile, None)}


@contextmanager
def loading() -> Iterator[None]:
    """Shows that libraries are loaded, which takes seconds."""
    from ..progress import stage

    collects = gc.isenabled()
    gc.disable()  # to look for garbage among what is loaded takes a fifth of the time
    try:
        with stage("Loading libraries"):
            yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()  # nor is it looked through later
        if collects:
            gc.enable()


def watched(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options ``--quiet``, ``--log-file`` and ``--profile``."""

    @functools.wraps(command)
    def run(*args: Any, quiet: bool, log_file: Path | None, profile: Path | None, **rest: Any):
        from ..progress import watching

        if started_rank():  # rank 0 shows and keeps
            quiet, log_file, profile = True, None, None
        for path, option in ((log_file, "--log-file"), (profile, "--profile")):
            if path is not None:
                check_folder(path.absolute().parent, option)
        words = " ".join(sys.argv[1:])
        with watching(words, quiet=quiet, log_file=log_file, profile=profile):
            command(*args, **rest)

    return _with_options(command, run, _OPTIONS)


def on_devices(command: Callable[..., None], left: Callable[[Path], str]) -> Callable[..., None]:
    """A command with the option ``--devices``, which starts it once on each of them.

    Args:
        command: with the options ``--device`` and ``--out``.
        left: says what it leaves at ``--out`` where it was stopped, and how to go on.
    """

    @functools.wraps(command)
    def run(*args: Any, devices: int | None, **rest: Any) -> None:
        if is_rank():
            with joined(rest["device"]) as rest["device"]:
                command(*args, **rest)
        elif devices is None or devices == 1:
            command(*args, **rest)
        else:
            _launch(devices, rest["device"], functools.partial(left, rest["out"]))

    return _with_options(command, run, {"devices": (Devices, None)})


def _launch(devices: int, device: str | None, left: Callable[[], str]) -> None:
    """Runs this very command line on several devices."""
    words = [word for word in sys.argv[1:] if not word.startswith("--devices=")]
    while "--devices" in words:
        at = words.index("--devices")
        del words[at : at + 2]
    try:
        code = launch(["-m", "ipar_sparse", *words], devices, device)
    except KeyboardInterrupt:
        raise Stopped(left()) from None
    except RankLost as error:
        raise UserError(f"{error}; {left()}") from None
    if code:
        raise typer.Exit(code)


def _with_options(
    command: Callable[..., None], run: Callable[..., None], options: dict[str, tuple[Any, Any]]
) -> Callable[..., None]:
    """``run`` as a command with the options of ``command`` and some more: kind and default."""
    kinds = get_type_hints(command, include_extras=True) | {n: k for n, (k, _) in options.items()}
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, (_, default) in options.items()
    ]
    parameters = [*inspect.signature(command).parameters.values(), *added]
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [one.replace(annotation=kinds[one.name]) for one in parameters]
    )
    run.__annotations__ = kinds
    return run
