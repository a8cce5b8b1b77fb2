"""Writing files so that a crash, ctrl-C or a full disk leaves the old one or the new one."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
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


def write_json(path: str | os.PathLike, values: Any) -> None:
    """Writes strict JSON in one step; a number that is not finite becomes null.

    Args:
        path: the file.
        values: mappings, lists, arrays, tensors, numbers, strings and booleans, nested.
    """
    text = json.dumps(_plain(values), indent=2, allow_nan=False, ensure_ascii=False)
    atomic_write(path, text + "\n")


def check_folder(path: Path, option: str = "--out") -> None:
    """Refuses a folder that is a file, lies below one, or cannot be written to.

    Args:
        path: the folder, which need not exist.
        option: what the message calls it.
    """
    for part in (path, *path.parents):
        if part.exists():
            if not part.is_dir():
                raise UserError(f"{option}: {part} is a file, not a folder; choose another")
            if not os.access(part, os.W_OK):
                raise UserError(f"{option}: {part} cannot be written to; choose another")
            return


def check_output_folder(out: Path, overwrite: bool, option: str = "--out") -> None:
    """Refuses a folder of results that is in use, unless it may be overwritten."""
    check_folder(out, option)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} exists and is not empty; pass --overwrite or another {option}")


def copy_folder(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies a folder with all that it holds; the copy may be written to, the source need not."""
    target = Path(target)
    shutil.copytree(source, target, copy_function=shutil.copyfile, dirs_exist_ok=True)
    for folder in (target, *target.rglob("*")):
        if folder.is_dir():
            folder.chmod(folder.stat().st_mode | stat.S_IRWXU)


def folder_name(name: str) -> str:
    """A name, such as that of a slide, as the name of one folder; two names give two folders."""
    safe = re.sub(r"[^\w.+=-]", "_", name).lstrip(".")[:100]
    if safe and safe == name:
        return safe
    return f"{safe or 'unnamed'}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def parse_json(text: str | bytes) -> Any:
    """JSON; ValueError for whatever is none, or is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def parse_yaml(text: str) -> Any:
    """Plain YAML; ``yaml.YAMLError`` for whatever is none.

    Aliases are refused: a few of them unfold to more than fits in memory.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                event = self.get_event()
                raise yaml.composer.ComposerError(
                    None, None, f"alias *{event.anchor} is not read", event.start_mark
                )
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise yaml.YAMLError(str(error).partition("\n")[0]) from None


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a YAML file of ``name: value`` lines.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    import yaml

    try:
        values = parse_yaml(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path} is not valid YAML; correct it") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `name: value` lines")
    return values


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # of numpy or torch
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_os_error(error: OSError | RuntimeError) -> OSError | None:
    """The operating system's error behind another, None if there is none.

    HDF5 raises RuntimeError for some failed writes, and tells the number in its text alone.
    """
    if isinstance(error, OSError):
        return error
    number = re.search(r"file write failed.* errno = (\d+)", str(error), re.DOTALL)
    return None if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


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
