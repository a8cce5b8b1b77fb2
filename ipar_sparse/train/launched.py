"""Training on several devices from Python: the call is carried to processes of its own.

``python -m ipar_sparse.train.launched FILE`` is one of them; FILE holds the call.
"""

from __future__ import annotations

import functools
import inspect
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..distributed import LOST, RankLost, is_rank, joined, launch, leave, tells
from ..errors import UserError
from ..progress import console


def on_devices(train: Callable[..., Any]) -> Callable[..., Any]:
    """A method ``train`` whose argument ``devices`` starts it once on each of them."""

    @functools.wraps(train)
    def run(cls, *args: Any, **given: Any):
        arguments = inspect.signature(train).bind(cls, *args, **given).arguments
        devices = arguments.pop("devices", None)
        if is_rank() or devices in (None, 1):
            with joined(arguments.get("device")) as arguments["device"]:
                return train(**arguments)
        del arguments["cls"]
        _refuse_here(arguments, devices)
        _carry(cls, arguments, devices)
        return cls.load(arguments["out"], arguments.get("device") or "auto")

    return run


def _refuse_here(arguments: Mapping[str, Any], devices: int) -> None:
    if console.is_jupyter:
        slides = arguments["slides"]
        listed = slides if isinstance(slides, list | tuple) else [slides]
        files = [str(one) for one in listed if isinstance(one, str | os.PathLike)]
        named = " ".join(files) if len(files) == len(listed) else "SLIDE.h5ad ..."
        raise UserError(
            "a notebook is one process, and several devices need one each; run `ipar-sparse train "
            f"{named} --out {arguments.get('out') or 'RUN'} --devices {devices}`, then IPAR.load"
        )
    if arguments.get("out") is None:
        raise UserError("devices needs out, the folder of the run, which all of them see")


def _carry(cls: type, arguments: Mapping[str, Any], devices: int) -> None:
    """Calls ``cls.train`` on every rank.

    Raises:
        UserError: of a rank, or one died.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "call"
        path.write_bytes(pickle.dumps((cls, dict(arguments))))
        words = ["-m", "ipar_sparse.train.launched", str(path)]
        try:
            code = launch(words, devices, arguments.get("device"))
        except RankLost as error:
            raise UserError(f"{error}; resume=True goes on from what was saved") from None
        said = path.with_suffix(".error")
        if code:
            text = said.read_text() if said.is_file() else f"a rank failed with exit code {code}"
            raise UserError(text)


def _main(path: Path) -> None:
    cls, arguments = pickle.loads(path.read_bytes())
    code = 0
    try:
        cls.train(**arguments)
    except UserError as error:
        code = 2
        if tells():
            path.with_suffix(".error").write_text(str(error))
    except RankLost:
        code = LOST
    except KeyboardInterrupt:
        code = 130
    leave(code)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
