"""What the headers of AnnData files can refuse: no array is read, and nothing slow is loaded."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..config.schema import DataConfig
from ..errors import UserError
from .anndata_store import Store, is_stored, open_store, read_frame, row_count, suggest
from .keys import Keys
from .paths import Source, vendor_files

_X = re.compile(r"(?<![a-z])x(?![a-z])", re.IGNORECASE)  # a coordinate, in the name of a column

STREAM_VALUES = 1 << 26
"""A stored matrix of more values than this, 512 MiB in memory, is not read into memory."""


class Size(NamedTuple):
    """How large the expression of a file is.

    Args:
        cells: rows.
        stored: values that are stored.
        genes: columns.
    """

    cells: int
    stored: int
    genes: int


def check_headers(
    sources: Iterable[str | os.PathLike],
    data: DataConfig,
    *,
    require_pos: bool,
    min_cells: int = 1,
    slide_key_optional: bool = False,
) -> list[Size]:
    """Refuses files that reading would refuse for what their headers say.

    Args:
        sources: files or folders of any known format.
        data: layer, keys and embedding.
        require_pos: refuse files without positions.
        min_cells: refuse files of fewer cells.
        slide_key_optional: take a file without that column as one slide.

    Returns:
        Sizes of the files, of those whose headers tell them.

    Raises:
        UserError: in one line, as reading would.
    """
    layer, sizes = None if data.layer == "X" else data.layer, []
    for source in map(Source.parse, sources):
        if vendor_files(source):
            continue  # what is missing has been refused; there is no header to read
        path = source.path
        with open_store(path, inside=source.group) as store:
            cells, columns = _frame_header(store["obs"])
            if cells is not None:
                check_cell_count(cells, min_cells, str(path))
            matrix, _ = find_matrix(store, layer, str(path), optional=data.embedding is not None)
            if cells is not None:
                sizes.append(_size(matrix, cells))
            if require_pos and not source.is_spatialdata:
                check_positions(store, data.spatial_key, path)
            if data.embedding is not None:
                check_embedding(store, data.embedding, path)
            if data.slide_key is not None and columns is not None and not slide_key_optional:
                check_column(data.slide_key, columns, path)
    return sizes


def reading_cells(data: DataConfig) -> DataConfig:
    """How files of dissociated cells are read where slides are read as ``data`` says.

    Their values may be of another kind, and are recognised. Positions are not read.
    """
    # no obsm key is empty
    return data.model_copy(
        update={"spatial_key": "", "normalized": None, "embedding": None, "drop_outliers": False}
    )


def _size(matrix: Any, cells: int) -> Size:
    if matrix is None:
        return Size(cells, 0, 0)
    if not hasattr(matrix, "keys"):
        return Size(cells, math.prod(matrix.shape), int(matrix.shape[1]))
    return Size(cells, int(matrix["data"].shape[0]), sparse_shape(matrix, (cells, 0))[1])


def sparse_kind(matrix: Any) -> str:
    """``"csr_matrix"``, ``"csc_matrix"`` or what else a stored matrix calls itself."""
    attrs = matrix.attrs
    return attrs.get("encoding-type") or f"{attrs.get('h5sparse_format')}_matrix"


def sparse_shape(matrix: Any, otherwise: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that a stored sparse matrix declares."""
    attrs = matrix.attrs
    rows, columns = attrs.get("shape", attrs.get("h5sparse_shape", otherwise))
    return int(rows), int(columns)


def find_matrix(store: Store, layer: str | None, where: str, optional: bool) -> tuple[Any, Any]:
    """The group or dataset that holds the expression, and the frame of its genes.

    Args:
        store: the open store.
        layer: its name; None is X, and "raw" is `adata.raw` unless a layer has that name.
        where: what messages call the store.
        optional: whether X may be missing: both are None then.

    Raises:
        UserError: there is no such layer, or X is empty.
    """
    layers = list(store["layers"]) if "layers" in store else []
    if layer is None or layer in layers:
        group = store["layers"][layer] if layer else store.get("X")
        attrs = getattr(group, "attrs", {})
        if group is None or attrs.get("encoding-type") == "null":
            if optional:
                return None, None
            raise UserError(f"{where}: X is empty; choose a layer, {suggest('', layers)}")
        return group, store["var"]
    if layer == "raw" and "raw" in store and "X" in store["raw"]:
        return store["raw"]["X"], store["raw"]["var"]
    options = layers + (["raw"] if "raw" in store else [])
    raise UserError(f"{where}: has no layer {layer!r}; {suggest(layer, options)}")


def check_cell_count(cells: int, least: int, where: str) -> None:
    """Refuses a slide without cells, or with too few."""
    if cells == 0:
        raise UserError(f"{where}: has no cells; export it again")
    if cells < least:
        raise UserError(
            f"{where}: has {cells} cells, at least {least} are needed; "
            "leave it out or ask for smaller minisets and fewer neighbours"
        )


def check_positions(store: Store, key: str, where: str | Path) -> None:
    """Refuses a store without measured positions."""
    available = list(store["obsm"]) if "obsm" in store else []
    if key not in available:
        hint = suggest(key, available)
        if not available and (pair := _coordinates(list(store["obs"]))):
            hint = f"obs has {' and '.join(pair)}: if these are positions, put them there"
        raise UserError(f'{where}: has no obsm["{key}"] with measured positions; {hint}')


def _coordinates(columns: list[str]) -> tuple[str, str] | None:
    """The shortest names of obs columns that differ by x and y alone."""
    pairs = [(name, _X.sub(lambda x: chr(ord(x[0]) + 1), str(name))) for name in columns]
    found = [pair for pair in pairs if pair[0] != pair[1] and pair[1] in columns]
    return min(found, key=lambda pair: len(pair[0]), default=None)


def check_embedding(store: Store, spec: str, where: str | Path) -> str:
    """The obsm key of an embedding given as ``obsm:KEY``.

    Raises:
        UserError: it is written otherwise, or the store has none of the name.
    """
    slot, _, key = str(spec).partition(":")
    if slot != "obsm" or not key:
        raise UserError(f"embedding {spec!r} is not understood; write it as obsm:KEY")
    available = list(store["obsm"]) if "obsm" in store else []
    if key not in available:
        raise UserError(f'{where}: has no obsm["{key}"]; {suggest(key, available)}')
    return key


def check_column(key: str, columns: Iterable[object], where: str | Path) -> None:
    """Refuses an obs column that is not there."""
    if key not in (known := [str(column) for column in columns]):
        raise UserError(f"{where}: has no obs column {key!r}; {suggest(key, known)}")


def _frame_header(frame: Any) -> tuple[int | None, list[str] | None]:
    """Rows and columns of a stored data frame; None for both in a layout of old versions."""
    attrs = getattr(frame, "attrs", {})
    rows = row_count(frame)
    if attrs.get("encoding-type") != "dataframe" or rows is None:
        return None, None
    return rows, [str(name) for name in attrs["column-order"]]


def check_output(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    obsm: Iterable[str] = (),
    obs: Iterable[str] = (),
) -> None:
    """Checks, before a long computation, that its result can be written.

    Args:
        source: what predictions will be added to a copy of.
        out: where the copy with predictions will go, .h5ad, .zarr, .csv or .csv.gz.
        overwrite: allow an existing `out`, and existing keys of this package in `source`.
        obsm: obsm keys that will be written, e.g. `Keys.PREDICTION`.
        obs: obs columns that will be written.

    Raises:
        UserError: if `out` is the source, exists, has another suffix, or a key is taken.
    """
    found, out = Source.parse(source), Path(out)
    check_free(found, out, overwrite, table=True)
    if vendor_files(found) or is_table(out):
        return
    obsm, obs = tuple(obsm), tuple(obs)
    with open_store(found.path, inside=found.group) as store:
        if is_stored(store["obs"]) and not hasattr(store["obs"], "keys"):
            read_frame(store, "obs", str(source))  # of an old version: refused by its line
        uns = (Keys.UNS,) if obsm or obs else ()
        present = [
            f"{slot}[{key!r}]"
            for slot, keys in (("obsm", obsm), ("obs", obs), ("uns", uns))
            for key in keys
            if slot in store and key in store[slot]
        ]
    if present and not overwrite:
        raise UserError(
            f"{found.path}: has {', '.join(present)} already; pass --overwrite to replace "
            "them in the output (the input file itself is never changed)"
        )


def check_free(source: Source, out: Path, overwrite: bool, table: bool = False) -> None:
    """Refuses an output that is the source, that exists, or whose name says no format."""
    check_suffix(out, table)
    if out.exists() and out.resolve() == source.path.resolve():
        raise UserError(f"{out}: is the input itself; give --out another name")
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists; choose another --out or pass --overwrite")


def check_suffix(path: Path, table: bool = False) -> None:
    """Refuses the name of an output that says no format."""
    if path.suffix not in (".h5ad", ".zarr") and not (table and is_table(path)):
        known = ".h5ad, .zarr, .csv or .csv.gz" if table else ".h5ad or .zarr"
        raise UserError(f"{path}: the name of an output must end in {known}")


def is_table(path: Path) -> bool:
    """Whether a name is that of a text table."""
    return path.name.endswith((".csv", ".csv.gz"))
