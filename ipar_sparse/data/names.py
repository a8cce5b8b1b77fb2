"""Names of slides that serve as names of folders and keys, whatever the user's labels hold."""

from __future__ import annotations

import re
from collections.abc import Sequence

_UNSAFE = re.compile(r"[^\w.+=@ ()-]|\s(?<! )")
_LONGEST = 100  # letters; file systems take 255 bytes


def safe_name(name: str) -> str:
    """A name without slashes and control characters, that is no path and not too long."""
    return _UNSAFE.sub("_", name)[:_LONGEST].strip(" .") or "slide"


def safe_names(names: Sequence[str]) -> list[str]:
    """Safe names, a different one for each."""
    return unique_names([safe_name(name) for name in names])


def unique_names(names: Sequence[str]) -> list[str]:
    """Names with ``-1``, ``-2``, ... added where several are equal but for letter case.

    Names that are made up are none of those that were there before.
    """
    folded = [name.casefold() for name in names]
    taken, found = set(folded), []
    for number, (name, own) in enumerate(zip(names, folded, strict=True), start=1):
        if folded.count(own) > 1:
            new = f"{name}-{number}"
            while new.casefold() in taken:
                new += "-1"
            taken.add(new.casefold())
            name = new
        found.append(name)
    return found
