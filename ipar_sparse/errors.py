"""The one exception that is a message to a person."""

from importlib import import_module
from typing import Any


class UserError(Exception):
    """A mistake the user can mend: one line that says what, where and what to do.

    The command line prints the line and exits with code 2; library users see an exception.
    """


def import_extra(name: str, extra: str) -> Any:
    """A library that an extra of this package installs.

    Args:
        name: of the library.
        extra: of this package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # the library is there, and something that it needs is not
            raise
        raise UserError(f"{name} is not installed: pip install 'ipar_sparse[{extra}]'") from None
