"""Notes on what was done to a slide."""


class Warned(str):
    """A note on something that may make a result wrong, and cannot be undone."""
