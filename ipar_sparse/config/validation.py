"""Nested settings: how they are merged, and what is said of a wrong one in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

ALL_SETTINGS = "; `ipar-sparse config --all` lists them all"


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values of ``base``, with those of ``top`` in place of its own."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merge(below, value)
        merged[key] = value
    return merged


def explain(error: ValidationError, source, known: Iterable[str]) -> str:
    """The first of pydantic's errors in one line, and how many more there are.

    Args:
        error: what pydantic raised.
        source: file or call that the values came from; None names none.
        known: keys among which the nearest to an unknown one is suggested.
    """
    first, *others = error.errors()
    where = f" in {source}" if source else ""
    more = f" (and {len(others)} more)" if others else ""
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown config key {key}{where}{suggest(key, known, ALL_SETTINGS)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        section = f"config section {key}" if key else "config"
        return f"{section}{where}: {message}{more}"
    if first["type"] == "model_type":
        return (
            f"config section {key}{where} needs keys under it, e.g. {key}.KEY=VALUE; "
            f"given {first['input']!r}{more}"
        )
    expected = message.removeprefix("Input should be ").split(", unable to parse")[0]
    expected = expected.replace("a valid tuple", "a list, e.g. [10, 15]")
    return f"config key {key}{where}: given {first['input']!r}, expected {expected}{more}"


def suggest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message about an unknown name: the most similar known one, if there is one."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        leaf = name.rsplit(".", 1)[-1]
        leaves = {row.rsplit(".", 1)[-1]: row for row in reversed(known)}
        close = [leaves[k] for k in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
    return f"; did you mean {close[0]}?" if close else otherwise
