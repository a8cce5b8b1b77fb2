"""The ``ipar-sparse`` command: its subcommands, and the code that it exits with."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from .. import __version__
from ..distributed import leave
from . import (
    benchmark,
    check,
    config,
    convert,
    embed,
    evaluate,
    experiment,
    info,
    predict,
    simulate,
    train,
)
from .folders import what_is_left
from .messages import explain, tell_failure
from .watched import on_devices, watched

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Predict where cells lie in a tissue from their gene expression alone.\n\n"
        "Train on slides whose positions are known, then place the cells of other slides. "
        "Slides are AnnData files (.h5ad or .zarr) with positions in obsm\\['spatial'], or what "
        "a vendor's software wrote.\n\n"
        "[bold]A first try, with simulated slides:[/bold]\n\n"
        "  ipar-sparse simulate slides --slides 4\n\n"
        "  ipar-sparse train slides/cortex1.h5ad slides/cortex2.h5ad --val slides/cortex3.h5ad "
        "--out run\n\n"
        "  ipar-sparse evaluate run slides/cortex4.h5ad --out report"
    ),
)
app.command()(watched(simulate.simulate))
app.command()(watched(convert.convert))
app.command()(on_devices(watched(train.train), what_is_left))
app.command()(watched(check.check))
app.command()(on_devices(watched(predict.predict), predict.what_is_left))
app.command()(watched(embed.embed))
app.command()(watched(evaluate.evaluate))
app.command()(watched(experiment.experiment))
app.command()(benchmark.benchmark)
app.command()(info.info)
app.command()(config.config)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the whole traceback of an error.")
    ] = False,
) -> None:
    """Options of all commands; :func:`run_command` acts on them."""


def main() -> NoReturn:
    """Entry point of the ``ipar-sparse`` command; a polite kill is ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if "OMP_WAIT_POLICY" not in os.environ:
        # threads of torch that wait for one whose core is taken would keep theirs busy for long
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    status: list[int] = []
    atexit.register(_leave, status)  # what libraries register later is called before
    if "--debug" not in sys.argv:
        # h5py prints what it cannot raise, as when a full disk keeps a file from being closed
        sys.unraisablehook = lambda _: None
        sys.excepthook = _without_closing_errors
    code = run_command(sys.argv[1:])
    status.append(code)
    leave(code)
    sys.exit(code)


def _leave(status: list[int]) -> None:
    """Ends the process at once: to free all that torch has loaded takes half a second.

    Nor does Python tell of a ctrl-C amid an import, which was told, by dying of it.
    """
    if status:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status[0])


def run_command(argv: list[str]) -> int:
    """Runs one command line.

    Args:
        argv: its words, without the name of the program.

    Returns:
        The exit code: 0, 2 for a mistake of the user, 130 for ctrl-C, 1 for any other failure.
    """
    debug = "--debug" in argv
    if "--version" in argv:
        print(__version__)
        return 0
    arguments = [word for word in argv if word != "--debug"] or ["--help"]
    try:
        if not {"-h", "--help"} & set(arguments):
            _quiet_libraries()
        command = typer.main.get_command(app)
        code = command.main(arguments, prog_name="ipar-sparse", standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        code, text = explain(error)
        tell_failure(error, text)
        return code
    if code == 130:
        tell_failure(KeyboardInterrupt(), "stopped; nothing half-written was left")
    return code or 0


def _without_closing_errors(kind, error, trace) -> None:
    if not issubclass(kind, OSError | RuntimeError):
        sys.__excepthook__(kind, error, trace)


def _quiet_libraries() -> None:
    """Messages of this package are shown, warnings meant for developers are not."""
    import warnings

    from ..progress import setup_logging

    setup_logging()
    for category in (FutureWarning, DeprecationWarning, ImportWarning):
        warnings.simplefilter("ignore", category)
