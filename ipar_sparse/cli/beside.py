"""A process beside that of a command, which reads its cells and writes its results.

To load what reads and writes AnnData takes about as long as to load torch. One process cannot do
both at once. So the command forks before either is loaded. Where anything goes wrong in the other
process, the command does the work itself, and says what it always says.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from io import BufferedRWPair
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .. import usage
from ..progress import quiet_stages, stage

if TYPE_CHECKING:
    from ..data.slide import Slide

_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_KIND = "\0"  # in no name of a file


class Beside:
    """The other process, as the command sees it.

    Args:
        read: reads the slides, there.
        write: writes results, there, given what :meth:`write` was called with.
    """

    def __init__(self, read: Callable[[], Sequence[Slide]], write: Callable[..., None]):
        own, theirs = socket.socketpair()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until it catches what they raise
        self._pid = os.fork()
        if self._pid == 0:
            own.close()
            _serve(theirs.makefile("rwb"), read, write)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        usage.beside = self._pid
        with own, theirs:
            self._stream = own.makefile("rwb")

    @staticmethod
    def helps() -> bool:
        """Whether this process is a fresh one, on Linux, with a core for another."""
        loaded = {"torch", "anndata"} & sys.modules.keys()
        return sys.platform == "linux" and not loaded and len(os.sched_getaffinity(0)) > 1

    def slides(self) -> list[Slide] | None:
        """What was read, without columns of obs; None where it could not be."""
        with stage("Reading slides"):
            try:
                return take(self._stream)
            except (OSError, ValueError, EOFError):
                return None

    def write(self, **results: Any) -> bool:
        """Whether the results were written."""
        try:
            put(self._stream, results)
            return take(self._stream)
        except (OSError, ValueError, EOFError, TypeError):
            return False

    def end(self) -> None:
        """Ends the process, if it works still, once it has removed what is half-written."""
        usage.beside = None
        with suppress(OSError):
            self._stream.close()
        os.kill(self._pid, signal.SIGTERM)
        os.waitpid(self._pid, 0)


def _serve(
    stream: BufferedRWPair, read: Callable[[], Sequence[Slide]], write: Callable[..., None]
) -> NoReturn:
    """The work of the other process; it ends where the command does, which closes the stream."""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        gc.disable()  # its work is short
        sys.modules["dask"] = None  # anndata would load it in vain
        with quiet_stages():
            put(stream, read())
            write(**take(stream))
            put(stream, True)
    finally:  # of an error, too: the command meets it when it does the same
        os._exit(0)


def put(stream: BufferedRWPair, value: Any) -> None:
    """Sends plain values, arrays of numbers and texts, and slides without columns of obs.

    Raises:
        TypeError: the value holds anything else.
        OSError: nobody listens.
    """
    arrays: list[np.ndarray] = []

    def plain(one: Any) -> dict[str, Any]:
        if isinstance(one, np.ndarray | np.generic):
            if one.dtype.hasobject:
                raise TypeError("an array of objects is not sent")
            arrays.append(np.asarray(one))
            return {_KIND: "array", "number": len(arrays) - 1}
        if hasattr(one, "indptr"):
            return {_KIND: "csr", "parts": [one.data, one.indices, one.indptr], "shape": one.shape}
        if not is_dataclass(one):
            raise TypeError(f"{type(one).__name__} is not sent")
        content = {field.name: getattr(one, field.name) for field in fields(one)}
        if "notes" in content:
            notes = [[type(note) is not str, note] for note in content["notes"]]
            content |= {"obs": {}, "notes": notes}
        return {_KIND: type(one).__name__, **content}

    text = json.dumps(value, default=plain)
    shapes = json.dumps([[one.dtype.str, one.shape] for one in arrays])
    stream.write(f"{shapes}\n{text}\n".encode())
    for one in arrays:
        stream.write(one.tobytes())
    stream.flush()


def take(stream: BufferedRWPair) -> Any:
    """What :func:`put` sent.

    Raises:
        EOFError: nobody sends any more.
    """
    shapes, text = stream.readline(), stream.readline()
    arrays: list[np.ndarray] = []
    for kind, shape in json.loads(shapes) if text else ():
        array = np.empty(shape, dtype=kind)
        if array.nbytes != stream.readinto(array.reshape(-1).view(np.uint8).data):
            raise EOFError
        arrays.append(array)
    if not text:
        raise EOFError

    def made(one: dict[str, Any]) -> Any:
        from scipy import sparse

        from ..data.notes import Warned
        from ..data.slide import Slide
        from ..data.values import Values

        match one.pop(_KIND, None):
            case None:
                return one
            case "array":
                return arrays[one["number"]][()]
            case "csr":
                return sparse.csr_matrix(tuple(one["parts"]), shape=one["shape"])
            case "Values":
                return Values(**one)
        one["notes"] = [Warned(note) if grave else note for grave, note in one["notes"]]
        return Slide(**one)

    return json.loads(text, object_hook=made)
