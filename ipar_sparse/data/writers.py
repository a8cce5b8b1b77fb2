"""Slides and predictions to AnnData files (h5ad, zarr)."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from anndata.io import write_elem

from ..errors import UserError
from ..files import as_os_error, copy_folder
from ..ticks import counted
from .anndata_store import Store, first_line, open_store, read_frame
from .headers import check_output, check_suffix, is_table
from .keys import Keys
from .paths import Source
from .slide import Slide
from .sources import load_source

_PIECE = 1 << 24  # bytes of a file copied at a time
_OF_POSITIONS = {
    "obs": (
        Keys.UNCERTAINTY,
        Keys.UNCERTAINTY_REFERENCE,
        Keys.TYPICALITY,
        Keys.FOREIGN,
        Keys.EMPTY,
    ),
    "obsm": (Keys.REFERENCE, Keys.TOP, Keys.TOP_WEIGHT),
}
"""What belongs to positions, by slot, and does not outlive them."""


def to_anndata(slide: Slide) -> anndata.AnnData:
    """One slide as AnnData: X, obs, var, obsm["spatial"], obsm["X_embedding"]."""
    obsm = {}
    if slide.pos is not None:
        obsm[Keys.SPATIAL] = slide.pos
    if slide.embedding is not None:
        obsm["X_embedding"] = slide.embedding
    return anndata.AnnData(
        X=slide.expression,
        obs=pd.DataFrame(slide.obs, index=slide.cell_names.astype(object)),
        var=pd.DataFrame(index=np.asarray(slide.genes, dtype=object)),
        obsm=obsm,
    )


def write_slide(
    slide: Slide,
    path: str | os.PathLike,
    *,
    compression: str | None = "gzip",
    overwrite: bool = True,
) -> None:
    """Writes one slide as AnnData: X, obs, var, obsm["spatial"], obsm["X_embedding"].

    Args:
        slide: the slide.
        path, compression, overwrite: as in :func:`write_anndata`.
    """
    write_anndata(to_anndata(slide), path, compression=compression, overwrite=overwrite)


def write_anndata(
    adata: anndata.AnnData,
    path: str | os.PathLike,
    *,
    compression: str | None = "gzip",
    overwrite: bool = True,
) -> None:
    """Writes AnnData in one step.

    Args:
        adata: what is written.
        path: output file; its name ends in .h5ad or .zarr.
        compression: compression of an h5ad file; None writes faster.
        overwrite: replace an existing file.

    Raises:
        UserError: if the file exists or cannot be written; nothing half-written is left.
    """
    path = Path(path)
    check_suffix(path)
    with _replacing(path, overwrite) as temp:
        if path.suffix == ".zarr":
            _write_zarr(adata, temp)
        else:
            adata.write_h5ad(temp, compression=compression)


def write_predictions(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    pos: np.ndarray | None = None,
    embedding: np.ndarray | None = None,
    obsm: Mapping[str, np.ndarray] | None = None,
    obs: Mapping[str, np.ndarray] | None = None,
    uns: Mapping[str, Any] | None = None,
    slide_key: str | None = None,
    results_alone: bool = False,
    overwrite: bool = False,
) -> None:
    """Copies what predictions were made of, and adds them to the copy.

    An AnnData file or SpatialData store is copied byte by byte and only new keys are added, so
    little memory is needed. The whole is read if `out` has another format, and for a part of a file
    or a vendor's format.

    Args:
        source: what the cells were read from; it is not changed.
        out: .h5ad or .zarr to write, or .csv or .csv.gz for a table of predictions alone; appears
            complete or not at all.
        pos: positions (n, 2) in file order, for obsm["X_ipar"].
        embedding: embedding (n, d) in file order, for obsm["X_ipar_embedding"]. A table holds it
            where there are no positions.
        obsm: further arrays to add, each (n, ...), by key.
        obs: columns to add, each (n,).
        uns: nested dict of plain values, for uns["ipar"].
        slide_key: obs column that a part of a file was sought in.
        results_alone: write cell names and what is added, and no copy of the rest.
        overwrite: replace `out`, and keys of the same name in the copy.

    Raises:
        UserError: if something is in the way (see `check_output`) or the disk is full.
        ValueError: if an array has not one row per cell of the file.
    """
    found, out = Source.parse(source), Path(out)
    arrays = _arrays(pos, embedding, obsm)
    columns = {key: _storable(np.asarray(value)) for key, value in (obs or {}).items()}
    taken: dict[str, Any] = {} if results_alone else {"obsm": arrays, "obs": columns}
    check_output(source, out, overwrite=overwrite, **taken)
    adata, as_it_is = None, not found.is_foreign and found.label is None
    if as_it_is and (results_alone or is_table(out) or found.suffix == out.suffix):
        with open_store(found.path, inside=found.group) as store:
            names = read_frame(store, "obs", found.path).index
    else:
        adata = load_source(source, slide_key)
        names = adata.obs_names
    for key, value in (arrays | columns).items():
        if len(value) != len(names):
            raise ValueError(
                f"{key} has {len(value)} rows, expected {len(names)}: one per cell of {source}"
            )
    if pos is not None and arrays[Keys.PREDICTION].shape != (len(names), 2):
        raise ValueError(f"pos has shape {np.shape(pos)}, expected ({len(names)}, 2)")
    if is_table(out):
        _write_table(names, out, arrays, columns, overwrite)
        return
    if results_alone:
        adata = anndata.AnnData(obs=pd.DataFrame(index=names))
    if adata is not None:
        add_predictions(adata, pos=pos, embedding=embedding, obsm=obsm, obs=obs, uns=uns)
        # coordinates hardly shrink: compressing those of 3 million cells took 40 s
        write_anndata(
            adata, out, compression=None if results_alone else "gzip", overwrite=overwrite
        )
    else:
        _write_copy(found, out, arrays, columns, _plain(dict(uns or {})), overwrite)


def _write_copy(
    source: Source,
    out: Path,
    obsm: Mapping[str, np.ndarray],
    columns: Mapping[str, np.ndarray],
    uns: Any,
    overwrite: bool,
) -> None:
    with _replacing(out, overwrite) as temp:
        (copy_folder if source.path.is_dir() else _copy_file)(source.path, temp)
        with open_store(temp, mode="r+", inside=source.group) as store:
            if Keys.PREDICTION in obsm:
                for key in _OF_POSITIONS["obs"]:
                    _drop_column(store["obs"], key)
                for key in set(_OF_POSITIONS["obsm"]).intersection(store.get("obsm", ())):
                    del store["obsm"][key]
            for key, value in obsm.items():
                _put(store, "obsm", key, value)
            for key, value in columns.items():
                _put(store, "obs", key, value)
            _put(store, "uns", Keys.UNS, uns)
        if out.suffix == ".zarr":
            _consolidate(temp)


def _write_table(
    names: pd.Index,
    out: Path,
    obsm: Mapping[str, np.ndarray],
    columns: Mapping[str, np.ndarray],
    overwrite: bool,
) -> None:
    """A row a cell: its name, its positions or else its embedding, and the obs columns."""
    table = pd.DataFrame(index=pd.Index(names, name="cell"))
    for key, value in obsm.items():
        if key == Keys.EMBEDDING and Keys.PREDICTION in obsm:
            continue
        for place in np.ndindex(value.shape[1:]):
            name = "_".join([key.removeprefix("X_"), *(str(i + 1) for i in place)])
            table[name] = value[(slice(None), *place)]
    with _replacing(out, overwrite) as temp:
        how = "gzip" if out.suffix == ".gz" else None
        table.assign(**columns).to_csv(temp, compression=how)


def add_predictions(
    adata: anndata.AnnData,
    *,
    pos: np.ndarray | None = None,
    embedding: np.ndarray | None = None,
    obsm: Mapping[str, np.ndarray] | None = None,
    obs: Mapping[str, np.ndarray] | None = None,
    uns: Mapping[str, Any] | None = None,
) -> None:
    """Adds to an object what :func:`write_predictions` adds to a file; earlier ones are replaced.

    Args:
        adata: n cells; changed in place.
        pos: positions (n, 2), for obsm["X_ipar"].
        embedding: embedding (n, d), for obsm["X_ipar_embedding"].
        obsm: further arrays to add, each (n, ...), by key.
        obs: columns to add, each (n,).
        uns: nested dict of plain values, for uns["ipar"].
    """
    for slot, keys in _OF_POSITIONS.items() if pos is not None else ():
        held = getattr(adata, slot)
        for key in keys:
            if key in held:
                del held[key]
    for key, value in _arrays(pos, embedding, obsm).items():
        adata.obsm[key] = value
    for key, value in (obs or {}).items():
        adata.obs[key] = _storable(np.asarray(value))
    adata.uns[Keys.UNS] = _plain(dict(uns or {}))


def _arrays(
    pos: np.ndarray | None, embedding: np.ndarray | None, others: Mapping[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """What goes to obsm, by key."""
    given = {Keys.PREDICTION: pos, Keys.EMBEDDING: embedding, **(others or {})}
    return {key: np.asarray(value) for key, value in given.items() if value is not None}


@contextmanager
def _replacing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary path beside `out`, a file or a folder, that becomes `out` on success."""
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists; choose another name or pass --overwrite")
    temp = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    aside = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield temp
        _sync(temp)
        if out.is_dir():  # a folder cannot be replaced in one step
            os.replace(out, aside)
        os.replace(temp, out)
        with suppress(OSError):  # not every file system can sync a folder
            _sync(out.parent, deep=False)
    except (OSError, RuntimeError) as error:
        if (cause := as_os_error(error)) is None:
            raise
        raise UserError(
            f"{out}: could not be written ({_os_reason(cause)}); "
            "free some space or choose another folder; nothing was left behind"
        ) from error
    finally:
        if aside.exists() and not out.exists():
            os.replace(aside, out)
        for leftover in (temp, aside):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _os_reason(error: OSError) -> str:
    if isinstance(error, shutil.Error):  # copytree gathers (source, target, message)
        return error.args[0][0][2]
    return os.strerror(error.errno) if error.errno else first_line(error)


def _sync(path: Path, deep: bool = True) -> None:
    """Writes a file, or all files of a folder, to the disk."""
    files = [p for p in path.rglob("*") if p.is_file()] if deep and path.is_dir() else [path]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _copy_file(source: Path, target: Path) -> None:
    with open(source, "rb") as old, open(target, "wb") as new:
        for _ in counted(range(0, source.stat().st_size, _PIECE)):
            new.write(old.read(_PIECE))


def _write_zarr(adata: anndata.AnnData, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which zarr version is written is anndata's choice
        adata.write_zarr(path)


def _consolidate(path: Path) -> None:
    # the source's consolidated metadata, if any, does not list the keys that were added
    import zarr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr 3 warns that consolidation is an extension
        zarr.consolidate_metadata(str(path))


def _put(store: Store, slot: str, key: str, value: Any) -> None:
    if slot not in store:
        write_elem(store, slot, {})
    group = store[slot]
    fresh = key not in group
    write_elem(group, key, value)
    if slot == "obs" and fresh:
        order = [str(c) for c in group.attrs["column-order"]]
        group.attrs["column-order"] = [*order, key]


def _drop_column(frame: Store, key: str) -> None:
    if key in frame:
        del frame[key]
        frame.attrs["column-order"] = [str(c) for c in frame.attrs["column-order"] if c != key]


def _storable(values: np.ndarray) -> np.ndarray:
    return values.astype(object) if values.dtype.kind == "U" else values


def _plain(value: Any) -> Any:
    """Nested plain Python values in a form that AnnData can store in uns."""
    if isinstance(value, dict):
        taken = {str(k): _plain(v) for k, v in value.items() if v is not None}
        odd = next((k for k in taken if "/" in k), None)
        if odd is not None:
            raise ValueError(f"uns key {odd!r} holds '/', which separates groups in the file")
        return taken
    if isinstance(value, (list, tuple)):
        if all(isinstance(v, str) for v in value):
            return np.array(value, dtype=object)
        if all(isinstance(v, (bool, int, float, np.number)) for v in value):
            return np.array(value)
        return json.dumps(value, default=str)
    if isinstance(value, (str, bool, int, float, np.number, np.bool_, np.ndarray)):
        return _storable(value) if isinstance(value, np.ndarray) else value
    return str(value)
