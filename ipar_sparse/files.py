"""Writing files so that a crash, ctrl-C or a full disk leaves the old one or the new one."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path`` that becomes ``path`` on success.

    The suffix is kept, so that writers which look at it work. On any exception, ctrl-C included,
    the temporary file is removed and what stood at ``path`` is untouched.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename not in (None, str(temporary), str(path.parent)):
            raise
        raise _explain(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike, content: bytes | str) -> None:
    """Writes ``content`` to ``path`` in one step, see :func:`atomic_path`."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | os.PathLike, values: Mapping[str, Any]) -> None:
    """Writes nested values as JSON in one step; numbers that are not finite become null.

    Args:
        path: the file.
        values: mappings, sequences, texts and numbers, those of NumPy and torch included.
    """
    text = json.dumps(_plain(values), indent=2, allow_nan=False, ensure_ascii=False)
    atomic_write(path, text + "\n")


def _plain(value: Any) -> Any:
    """The same in types that JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # of NumPy or torch
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _explain(error: OSError, path: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            f"no space left on the disk while writing {path}; what was there before is intact; "
            "free some space and try again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR):
        return UserError(
            f"{path} cannot be written: {error.strerror}; choose a folder you can write to"
        )
    return error
