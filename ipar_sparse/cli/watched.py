"""Options that all long commands share: what is shown, where it is kept, and what it took."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from ..files import check_folder
from .options import OUTPUT, flag

Quiet = Annotated[bool, flag("--quiet", "Show warnings, errors and results alone.", OUTPUT)]
LogFile = Annotated[
    Path | None, flag("--log-file", "File to add messages and progress to.", OUTPUT, "FILE")
]
Profile = Annotated[
    Path | None,
    flag("--profile", "JSON file for the time and memory of each stage.", OUTPUT, "FILE"),
]
_OPTIONS = {"quiet": (Quiet, False), "log_file": (LogFile, None), "profile": (Profile, None)}


@contextmanager
def loading() -> Iterator[None]:
    """Shows that libraries are loaded, which takes seconds."""
    from ..progress import stage

    with stage("Loading libraries"):
        yield


def watched(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options ``--quiet``, ``--log-file`` and ``--profile``."""

    @functools.wraps(command)
    def run(*args: Any, quiet: bool, log_file: Path | None, profile: Path | None, **rest: Any):
        from ..progress import watching

        for path, option in ((log_file, "--log-file"), (profile, "--profile")):
            if path is not None:
                check_folder(path.absolute().parent, option)
        words = " ".join(sys.argv[1:])
        with watching(words, quiet=quiet, log_file=log_file, profile=profile):
            command(*args, **rest)

    kinds = get_type_hints(command, include_extras=True) | {n: k for n, (k, _) in _OPTIONS.items()}
    defaults = {name: default for name, (_, default) in _OPTIONS.items()}
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in defaults.items()
    ]
    parameters = [*inspect.signature(command).parameters.values(), *added]
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [one.replace(annotation=kinds[one.name]) for one in parameters]
    )
    run.__annotations__ = kinds
    return run
