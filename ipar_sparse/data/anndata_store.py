"""AnnData as open stores, from h5ad, zarr or memory: what readers and writers share.

Opening a store loads neither anndata nor pandas, which take a second.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
        if mode == "r" and isinstance(error, (OSError, KeyError, EOFError)):
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

    return read_elem(element)


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

    frame = read_element(store[name])
    if not isinstance(frame, pd.DataFrame):
        raise UserError(
            f"{where}: {name} is in the layout of an AnnData older than 0.7; open it with "
            "anndata.read_h5ad and write it again"
        )
    return frame


def suggest(name: object, options: Iterable[object]) -> str:
    """The end of an error line about an unknown name: the nearest known name, or some of them."""
    known = [str(option) for option in options]
    close = difflib.get_close_matches(str(name), known, 1, cutoff=0.5)
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

    try:
        # keys may have been added since the store was consolidated; zarr 2 does not look there
        fresh: Any = {} if zarr.__version__.startswith("2.") else {"use_consolidated": False}
        return zarr.open_group(str(path), mode=mode, **fresh)
    except Exception as error:
        raise UserError(
            f"{path}: is a folder but not a zarr store, nor one of a known vendor; docs/files.md "
            "lists what is read"
        ) from error


def _open_h5ad(path: Path, mode: Literal["r", "r+"]) -> Store:
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path")
    try:
        return h5py.File(path, mode)
    except OSError as error:
        raise UserError(f"{path}: {_why_unreadable(path, error)}") from error


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
        signature = f.read(8)
    if signature != b"\x89HDF\r\n\x1a\n":
        return "is not an h5ad file; docs/files.md lists what is read"
    return f"cannot be opened ({first_line(error)}); copy or export it again"
