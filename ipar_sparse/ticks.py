"""How far a long loop is: told where it runs, heard by whoever shows it.

Rooms that compute load no display. They count their loops here, which costs nothing where nobody
listens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[int, int], None]
"""Called with the finished items and all of them."""

_listener: Listener | None = None
_inside = False


def listen(listener: Listener | None) -> None:
    """Sets who is told; None for nobody."""
    global _listener
    _listener = listener


def counted(items: Sequence[T]) -> Iterator[T]:
    """The items, each told of once it is done; of nested loops the outermost counts."""
    global _inside
    if _listener is None or _inside:
        yield from items
        return
    _inside = True
    try:
        for done, item in enumerate(items, start=1):
            yield item
            if _listener is not None:
                _listener(done, len(items))
    finally:
        _inside = False
