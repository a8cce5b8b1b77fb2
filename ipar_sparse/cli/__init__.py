"""The command line: one module for each command, which reads options, calls the API, and reports.

:mod:`.options` holds the options that commands share, :mod:`.folders` the checks of paths,
:mod:`.inputs` how slides and runs are read, and :mod:`.messages` what a person is told.
"""

import sys

try:
    from .app import app, main, run_command
except ModuleNotFoundError as error:
    if error.name != "typer":
        raise
    print("the command line needs: pip install 'ipar_sparse[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

__all__ = ["app", "main", "run_command"]
