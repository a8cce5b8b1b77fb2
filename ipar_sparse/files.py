"""Writing files so that a crash, ctrl-C or a full disk leaves the old one or the new one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
