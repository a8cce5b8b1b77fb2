"""Graphs and targets kept on disk, found again by the content they were made from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy import sparse
from torch import Tensor

from .. import __version__
from ..errors import UserError
from ..files import atomic_path
from ..inference.checkpoint import digest

logger = logging.getLogger(__name__)

SIZE_LIMIT = 10 * 2**30
"""Bytes the cache may take; the entries that were not used for longest go first."""


def cache_folder() -> Path:
    """``$IPAR_SPARSE_CACHE``, or ``ipar_sparse`` in the cache folder of the platform."""
    if chosen := os.environ.get("IPAR_SPARSE_CACHE"):
        return Path(chosen)
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "ipar_sparse"


def content_key(kind: str, inputs: Mapping[str, Any]) -> str:
    """SHA-256 over the package version, ``kind`` and everything in ``inputs``.

    Arrays, tensors and scipy matrices count by dtype, shape and bytes; numbers, texts, lists and
    dicts by value.

    Raises:
        TypeError: an input is of another kind.
    """
    described = {name: _describe(value) for name, value in inputs.items()}
    text = json.dumps([__version__, kind, described], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def cached(
    kind: str,
    inputs: Mapping[str, Any],
    build: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]],
    folder: Path | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``build()`` returns, from the disk if it was built from the same inputs before.

    A damaged entry is built again; a cache that cannot be written to is done without.

    Args:
        kind: what is kept, e.g. ``"candidates"``.
        inputs: everything the result depends on, see :func:`content_key`.
        build: makes the result: tensors by name, and anything JSON can hold beside them.
        folder: where entries lie; default :func:`cache_folder`.

    Returns:
        tensors on the CPU, and what was kept beside them.
    """
    path = Path(folder or cache_folder()) / f"{kind}-{content_key(kind, inputs)[:40]}.safetensors"
    found = _load(path)
    if found is not None:
        return found
    tensors, info = build()
    _store(path, tensors, info)
    return {name: value.cpu() for name, value in tensors.items()}, info


def cached_record(
    kind: str, inputs: Mapping[str, Any], record: type, build: Callable[[], Any]
) -> Any:
    """The dataclass of tensors that ``build()`` returns, see :func:`cached`.

    Args:
        kind, inputs: see :func:`cached`.
        record: class of the result: fields are tensors, such records, None, or JSON values;
            private fields start anew.
        build: makes the result.
    """
    tensors, info = cached(kind, inputs, lambda: _flatten(build()))
    return _rebuild(record, tensors, info)


def _flatten(record: Any, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, info = {}, {}
    for item in fields(record):
        name, value = prefix + item.name, getattr(record, item.name)
        if item.name.startswith("_"):
            continue
        if isinstance(value, Tensor):
            tensors[name] = value
        elif is_dataclass(value):
            below = _flatten(value, name + ".")
            tensors |= below[0]
            info |= {name: {"record": True}, **below[1]}
        else:
            info[name] = value
    return tensors, info


def _rebuild(record: type, tensors: dict[str, Tensor], info: dict[str, Any], prefix: str = ""):
    hints, values = get_type_hints(record), {}
    for item in fields(record):
        name = prefix + item.name
        if name in tensors:
            values[item.name] = tensors[name]
        elif info.get(name) == {"record": True}:
            kinds = (hints[item.name], *get_args(hints[item.name]))
            below = next(kind for kind in kinds if is_dataclass(kind))
            values[item.name] = _rebuild(below, tensors, info, name + ".")
        elif name in info:
            value = info[name]
            values[item.name] = tuple(value) if isinstance(value, list) else value
    return record(**values)


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if digest(header["info"], tensors) != header["sha256"]:
            raise ValueError("checksum does not match")
        info = json.loads(header["info"])
        os.utime(path)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        logger.warning("cache entry %s is damaged (%s) and is built again", path, error)
        return None
    return tensors, info


def _store(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    text = json.dumps(info)
    contents = {name: value.detach().cpu().clone() for name, value in tensors.items()}
    contents = {name: value.contiguous() for name, value in contents.items()}
    header = {"info": text, "sha256": digest(text, contents)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file(contents, temporary, metadata=header)
        _evict(path.parent, keep=path)
    except (OSError, SafetensorError, UserError) as error:
        logger.warning("going on without the cache: %s", error)


def _evict(folder: Path, keep: Path) -> None:
    entries = []
    for path in folder.glob("*.safetensors"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another run was faster
            continue
        entries.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries, key=lambda entry: entry[0]):
        if total <= SIZE_LIMIT:
            break
        if path != keep:
            path.unlink(missing_ok=True)
            total -= size


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:
            value = value.view(torch.int16)
        value = value.numpy()
    if sparse.issparse(value):
        csr = value.tocsr()
        return [_describe(part) for part in (csr.indptr, csr.indices, csr.data)] + [csr.shape]
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return _describe(value.tolist())
        content = hashlib.sha256(np.ascontiguousarray(value)).hexdigest()
        return [str(value.dtype), list(value.shape), content]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): _describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(
        f"cannot key a cache by {type(value).__name__}; give arrays, tensors, numbers or texts"
    )
