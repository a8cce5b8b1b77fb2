"""AnnData as open stores, from h5ad, zarr or memory: what readers and writers share.

Opening a store loads neither anndata nor pandas, which take a second.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import h5py

from ..errors import UserError

if TYPE_CHECKING:
    import anndata
    import pandas as pd

_FILTERS = {
    307: "bzip2",
    32000: "lzf",
    32001: "blosc",
    32004: "lz4",
    32008: "bitshuffle",
    32013: "zfp",
    32015: "zstandard",
    32026: "blosc2",
    4: "szip",
}
"""Registered number of an HDF5 filter to its name."""

_DECLARED = 1 << 28  # bytes that any array may declare
_HEAPS = 1 << 28  # bytes of a file whose heaps are looked through
_SCANNED = 1 << 22  # bytes of it at a time
_MARK = b"GCOL\1\0\0\0"  # where a heap begins
_RATIO = 2000  # of declared to stored bytes; deflate reaches 1032, on zeros
_DEPTH = 16  # of groups in groups
_CODE = re.compile(rb'"(?:id|name)"\s*:\s*"(?:numcodecs\.)?pickle"')
"""A zarr codec that runs whatever code an array brings along."""

Store = Any
"""Nested mappings of elements: an open h5py.File, a zarr.Group, or :func:`memory_store`."""


@contextmanager
def open_store(
    path: Path, mode: Literal["r", "r+"] = "r", inside: str | None = None
) -> Iterator[Store]:
    """Opens an AnnData file and closes it again.

    Args:
        path: an .h5ad file or a zarr folder.
        mode: "r" to read, "r+" to add to it.
        inside: group of the file that holds the AnnData elements; its root if left out.

    Raises:
        UserError: in one line, if the file is missing, damaged or no AnnData file.
        OSError: if what was written does not fit on the disk.
    """
    store = _open_zarr(path, mode) if path.is_dir() else _open_h5ad(path, mode)
    try:
        table = store if inside is None else store[inside]
        if "obs" not in table or "var" not in table:
            raise UserError(
                f"{path}: is no AnnData file (no obs and var inside); convert it with "
                "adata.write_h5ad, see data/README.md"
            )
        yield table
    except BaseException as error:
        with suppress(RuntimeError):  # a full disk fails again on closing
            _close(store)
        known = isinstance(error, UserError | MemoryError | ImportError)
        if mode == "r" and isinstance(error, Exception) and not known:
            raise UserError(f"{path}: {_why_damaged(path, error)}") from error
        raise
    try:
        _close(store)
    except RuntimeError as error:
        raise OSError(first_line(error)) from error


def memory_store(adata: anndata.AnnData) -> Store:
    """An AnnData object as a store; its elements are not copied."""
    if adata.isbacked and adata.is_view:
        adata = adata.to_memory()
    store = {"obs": adata.obs, "var": adata.var, "layers": adata.layers, "obsm": adata.obsm}
    if adata.X is not None:
        store["X"] = getattr(adata.X, "group", adata.X) if adata.isbacked else adata.X
    if adata.raw is not None:
        store["raw"] = {"X": adata.raw.X, "var": adata.raw.var}
    return store


def is_stored(element: Any) -> bool:
    """Whether an element lies in a file, and not in memory."""
    return type(element).__module__.partition(".")[0] in ("h5py", "zarr")


def read_element(element: Any) -> Any:
    """An element of a store, read where it lies in a file."""
    if not is_stored(element):
        return element
    from anndata.io import read_elem

    check_honest(element)
    try:
        return read_elem(element)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # whatever anndata makes of a damaged file
        raise OSError(f"{element.name}: {first_line(error)}") from error


def check_honest(element: Any, depth: int = 0) -> None:
    """Refuses what declares far more than is stored of it, and groups without end.

    Args:
        element: group or array of an open store.
        depth: of the group that it lies in.

    Raises:
        OSError: so it is.
    """
    if depth > _DEPTH:
        raise OSError(f"{element.name[:80]}: groups are nested too deep")
    if hasattr(element, "keys"):
        for name in element:
            check_honest(element[name], depth + 1)
        return
    chunk = math.prod(getattr(element, "chunks", None) or ())
    declared = max(math.prod(element.shape or ()), chunk) * element.dtype.itemsize
    if declared > _DECLARED and declared > _RATIO * _stored_bytes(element, declared // _RATIO):
        raise OSError(
            f"{element.name} declares {declared / 2**30:,.1f} GiB, of which almost nothing is there"
        )


def row_count(frame: Any) -> int | None:
    """Rows of a data frame; None of a stored one that does not say which column is its index."""
    if not is_stored(frame):
        return len(frame)
    index = dict(getattr(frame, "attrs", {})).get("_index")
    known = isinstance(index, str) and hasattr(frame, "keys") and index in frame
    if not known:
        return None
    names = frame[index]
    if hasattr(names, "keys") and "values" in names:  # AnnData 0.13 stores a mask beside them
        names = names["values"]
    return int(names.shape[0]) if hasattr(names, "shape") else None


def check_rows(element: Any, rows: int | None) -> None:
    """Refuses an array that has another length than the cells, before it is read.

    Raises:
        OSError: so it is.
    """
    shape = getattr(element, "shape", None)
    if is_stored(element) and rows is not None and shape and shape[0] != rows:
        raise OSError(f"{element.name} has {shape[0]} rows instead of {rows}")


def _stored_bytes(element: Any, enough: int) -> int:
    """Bytes that an array takes in its file; of a folder, counted until there are enough."""
    if isinstance(element, h5py.Dataset):
        return element.id.get_storage_size()
    found = 0
    for folder, _, files in os.walk(Path(str(element.store.root)) / element.path):
        found += sum(os.path.getsize(os.path.join(folder, name)) for name in files)
        if found > enough:
            break
    return found


def read_frame(store: Store, name: str, where: str | Path) -> pd.DataFrame:
    """The data frame obs or var of an open store.

    Args:
        store: the open store.
        name: of the frame.
        where: what messages call the store.

    Raises:
        UserError: if an old version of AnnData wrote it.
    """
    import pandas as pd

    stored = store[name]
    if is_stored(stored) and hasattr(stored, "keys"):
        for column in stored:
            if not hasattr(stored[column], "keys"):
                check_rows(stored[column], row_count(stored))
    frame = read_element(stored)
    if not isinstance(frame, pd.DataFrame):
        raise UserError(
            f"{where}: {name} is in the layout of an AnnData older than 0.7; open it with "
            "anndata.read_h5ad and write it again"
        )
    return frame


def suggest(name: object, options: Iterable[object]) -> str:
    """The end of an error line about an unknown name: the nearest known name, or some of them."""
    known = [str(option) for option in options if option is not None]  # X is layer None, of 0.13
    folded = str(name).casefold()
    close = [one for one in known if one.casefold() == folded]  # Actb for ACTB
    close = close or difflib.get_close_matches(str(name), known, 1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    if not known:
        return "there are none"
    return f"there are {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}"


def some_names(names: Iterable[object], most: int = 3) -> str:
    """The first names, for a message."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error.args[0] if error.args else error).strip().split("\n")[0]


def _open_zarr(path: Path, mode: Literal["r", "r+"]) -> Store:
    import zarr

    for metadata in (*path.rglob(".zarray"), *path.rglob("zarr.json"), *path.glob(".zmetadata")):
        if _CODE.search(metadata.read_bytes()):
            raise UserError(
                f"{path}: holds pickled objects ({metadata.parent.name}), which may run any code; "
                "write it again with adata.write_zarr"
            )
    try:
        # keys may have been added since the store was consolidated; zarr 2 does not look there
        fresh: Any = {} if zarr.__version__.startswith("2.") else {"use_consolidated": False}
        return zarr.open_group(str(path), mode=mode, **fresh)
    except Exception as error:
        raise UserError(f"{path}: {_why_no_store(path)}") from error


def _why_no_store(path: Path) -> str:
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return "is a run; give a run first, then files of cells"
    if files := sorted(path.glob("*.h5ad")):
        return f"is a folder of files; give these themselves, such as {files[0]}"
    return (
        "is a folder but not a zarr store, nor one of a known vendor; docs/files.md lists what "
        "is read"
    )


def _open_h5ad(path: Path, mode: Literal["r", "r+"]) -> Store:
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path")
    if not path.is_file():
        raise UserError(f"{path}: is no regular file; copy it to one")
    about = path.stat()
    if about.st_size <= _HEAPS and _endless(path, about.st_mtime_ns):
        raise UserError(f"{path}: is damaged (its texts never end); copy or export it again")
    try:
        file = h5py.File(path, mode)
    except OSError as error:
        raise UserError(f"{path}: {_why_unreadable(path, error)}") from error
    if (name := _kept_elsewhere(file)) is not None:
        file.close()
        raise UserError(
            f"{path}: {name} lies in another file, which is not read; write it again with "
            "adata.write_h5ad"
        )
    return file


@lru_cache(maxsize=64)
def _endless(path: Path, changed: int) -> bool:
    """Whether a heap of texts holds a gap of no length, on which HDF5 2.0 hangs for ever.

    Args:
        path: of an HDF5 file.
        changed: when the file was changed last.
    """
    total = path.stat().st_size
    with path.open("rb") as file:
        for begin in range(0, total, _SCANNED):
            file.seek(begin)
            block, start = file.read(_SCANNED + len(_MARK) - 1), -1
            while (start := block.find(_MARK, start + 1)) >= 0:
                if _endless_heap(file, begin + start, total):
                    return True
    return False


def _endless_heap(file: BinaryIO, start: int, total: int) -> bool:
    """Whether the heap at a place of a file of so many bytes holds such a gap."""
    file.seek(start + len(_MARK))
    head = file.read(8)
    size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if size > total + 16 - start:
        return False
    file.seek(start)
    heap, place = file.read(size) + bytes(16), 16
    while place + 16 <= size:
        number, _, _, length = struct.unpack_from("<HHIQ", heap, place)
        if number == 0 and length == 0:
            return True
        place += length if number == 0 else 16 + -(-length // 8) * 8
    return False


def _kept_elsewhere(file: h5py.File) -> str | None:
    """The first element that is a link to another file, or whose values lie in one."""

    def linked(name: bytes, link: Any) -> str | None:
        return name.decode(errors="replace") if link.type == h5py.h5l.TYPE_EXTERNAL else None

    def stored(name: str, element: Any) -> str | None:
        elsewhere = isinstance(element, h5py.Dataset) and (element.external or element.is_virtual)
        return name if elsewhere else None

    try:
        return file.id.links.visit(linked, info=True) or file.visititems(stored)
    except Exception:  # of a damaged file; whoever reads that part says so
        return None


def _why_damaged(path: Path, error: BaseException) -> str:
    if not path.is_dir() and (missing := _missing_filter(path)):
        return (
            f"is compressed by {missing}, which is not installed; write it again with "
            'adata.write_h5ad(..., compression="gzip")'
        )
    return f"is damaged ({first_line(error)}); copy or export it again"


def _missing_filter(path: Path) -> str | None:
    """The first filter that a data set of a file needs and HDF5 does not find."""
    found: list[str] = []

    def look(name: str, element: Any) -> None:
        if isinstance(element, h5py.Dataset):
            settings = element.id.get_create_plist()
            for number in range(settings.get_nfilters()):
                code = settings.get_filter(number)[0]
                if not h5py.h5z.filter_avail(code):
                    found.append(
                        f"{_FILTERS.get(code, 'a filter')} (HDF5 filter {code}, in {name})"
                    )

    try:
        with h5py.File(path, "r") as file:
            file.visititems(look)
    except (OSError, RuntimeError, KeyError):
        return None
    return found[0] if found else None


def _close(store: Store) -> None:
    if isinstance(store, h5py.File):
        store.close()


def _why_unreadable(path: Path, error: OSError) -> str:
    if not os.access(path, os.R_OK):
        return "may not be read; check its permissions"
    if os.path.getsize(path) == 0:
        return "is empty; copy or export it again"
    if "truncated" in str(error):
        return "is truncated (the copy did not finish); copy it again"
    with open(path, "rb") as f:
        begin = f.read(40)
    if begin.startswith(b"version https://git-lfs"):
        return "is a pointer to a file, and not that; run `git lfs pull`"
    if begin.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        return "is compressed; unpack it first (docs/files.md lists what is read)"
    if path.name.lower().endswith((".csv", ".tsv", ".txt")):
        return "is a table; make AnnData of it, as anndata.read_csv does, and save that"
    if not begin.startswith(b"\x89HDF\r\n\x1a\n"):
        return "is not an h5ad file; docs/files.md lists what is read"
    return f"cannot be opened ({first_line(error)}); copy or export it again"
