"""The one exception that is a message to a person."""


class UserError(Exception):
    """A mistake the user can mend: one line that says what, where and what to do.

    The command line prints the line and exits with code 2; library users see an exception.
    """
