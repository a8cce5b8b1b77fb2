"""AnnData files (h5ad, zarr) in and out."""

import difflib
import json
import os
import shutil
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, write_elem
from scipy import sparse

from ..errors import UserError
from .keys import Keys
from .slide import Slide

BLOCK = 1 << 22  # stored values read, converted or checked at a time
MAX_CATEGORIES = 64  # annotation with more distinct labels is a name, not a label
MAX_CARRIED = 16  # obs columns kept with a slide
LOG_CEILING = 20.0  # log1p of anything countable stays below this


def read_slides(
    path,
    *,
    slide_key=None,
    layer=None,
    normalized=None,
    embedding=None,
    spatial_key=Keys.SPATIAL,
    require_pos=False,
    min_cells=1,
):
    """Read the slides of one AnnData file; only what is asked for is loaded, in blocks.

    Args:
        path: an .h5ad file or a zarr folder.
        slide_key: obs column that tells several slides in the file apart; slides come in the
            order in which they first appear.
        layer: name of a layer to read instead of X; "raw" is `adata.raw` unless a layer is
            called so.
        normalized: True takes the values as log-normalised, False as counts; None decides by
            whether they are whole numbers, and notes it.
        embedding: "obsm:KEY", an embedding to carry along.
        spatial_key: obsm key of the positions.
        require_pos: positions must be there and valid. Otherwise unusable positions are dropped
            with a note.
        min_cells: least number of cells a slide may have.

    Returns:
        list of `Slide`; `Slide.notes` says what was recognised.

    Raises:
        UserError: in one line, for anything wrong with the file or its content.
    """
    path = Path(path)
    with _open(path) as store:
        obs = _frame(store, "obs", path)
        cell_names = obs.index.to_numpy(dtype=str)
        _check_cell_names(cell_names, path)
        notes = []
        group, genes = _select_matrix(store, layer, path, optional=embedding is not None)
        pos = _read_positions(store, spatial_key, cell_names, require_pos, path, notes)
        vectors = None if embedding is None else _read_embedding(store, embedding, path)
        groups = _group_rows(obs, slide_key, path)
        for label, rows in groups.items():
            if len(rows) < min_cells:
                where = path if label is None else f"{path}, {slide_key} {label}"
                raise UserError(
                    f"{where}: has {len(rows)} cells, at least {min_cells} are needed; "
                    "leave it out or ask for smaller minisets and fewer neighbours"
                )
        expression = None
        if group is not None:
            genes = _unique_genes(genes, notes)
            expression = _read_matrix(group, (len(obs), len(genes)), path)
            where = f"layer {layer!r}" if layer is not None else "X"
            normalized = _check_values(
                expression, normalized, cell_names, genes, f"{path}, {where}", notes
            )
        carried = _carried_columns(obs)

    slides = []
    for label, rows in groups.items():
        everything = len(rows) == len(obs)
        name = path.stem if label is None else f"{path.stem}-{label}"
        part = None
        if expression is not None:
            part = expression if everything else expression[rows]
        slide = Slide(
            name=name,
            expression=part,
            genes=genes,
            cell_names=cell_names[rows],
            pos=None if pos is None else pos[rows],
            embedding=None if vectors is None else vectors[rows],
            normalized=bool(normalized),
            empty=None if part is None else np.diff(part.indptr) == 0,
            obs={key: values[rows] for key, values in carried.items()},
            rows=rows,
            notes=list(notes),
            path=str(path.absolute()),
        )
        _note_oddities(slide)
        slides.append(slide)
    return slides


def write_slide(slide, path, *, compression="gzip", overwrite=True):
    """Write one slide as AnnData: X, obs, var, obsm["spatial"], obsm["X_embedding"].

    Args:
        slide: the `Slide`.
        path: ends in .h5ad or .zarr.
        compression: of the h5ad file, None to write fast.
        overwrite: replace an existing file.

    Raises:
        UserError: if the file exists or cannot be written; nothing half-written is left.
    """
    obsm = {}
    if slide.pos is not None:
        obsm[Keys.SPATIAL] = slide.pos
    if slide.embedding is not None:
        obsm["X_embedding"] = slide.embedding
    adata = anndata.AnnData(
        X=slide.expression,
        obs=pd.DataFrame(slide.obs, index=slide.cell_names.astype(object)),
        var=pd.DataFrame(index=np.asarray(slide.genes, dtype=object)),
        obsm=obsm,
    )
    path = Path(path)
    _check_suffix(path)
    with _replacing(path, overwrite) as temp:
        if path.suffix == ".zarr":
            _write_zarr(adata, temp)
        else:
            adata.write_h5ad(temp, compression=compression)


def check_output(source, out, *, overwrite=False, obsm=(), obs=()):
    """Fail before a long computation rather than after it, if its result could not be written.

    Args:
        source: the AnnData file that predictions will be added to.
        out: where the copy with predictions will go, .h5ad or .zarr.
        overwrite: allow an existing `out`, and existing keys of this package in `source`.
        obsm: obsm keys that will be written, e.g. `Keys.PREDICTION`.
        obs: obs columns that will be written.

    Raises:
        UserError: if `out` is the source, exists, has another suffix, or a key is taken.
    """
    source, out = Path(source), Path(out)
    _check_suffix(out)
    if out.exists() and out.resolve() == source.resolve():
        raise UserError(f"{out}: is the input itself; give --out another name")
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists; choose another --out or pass --overwrite")
    with _open(source) as store:
        present = [
            f"{slot}[{key!r}]"
            for slot, keys in (("obsm", obsm), ("obs", obs), ("uns", (Keys.UNS,)))
            for key in keys
            if slot in store and key in store[slot]
        ]
    if present and not overwrite:
        raise UserError(
            f"{source}: has {', '.join(present)} already; pass --overwrite to replace "
            "them in the output (the input file itself is never changed)"
        )


def write_predictions(
    source, out, *, pos=None, embedding=None, obs=None, uns=None, overwrite=False
):
    """Copy the user's AnnData file and add predictions to the copy.

    The file is copied as it is and only new keys are added, so memory does not grow with it.
    Only where `out` has the other format (.h5ad or .zarr) the whole file is read.

    Args:
        source: the AnnData file the cells were read from; it is not changed.
        out: .h5ad or .zarr to write; appears complete or not at all.
        pos: (n, 2) positions in file order, to obsm["X_ipar"].
        embedding: (n, d), to obsm["X_ipar_embedding"].
        obs: columns to add, each (n,).
        uns: nested dict of plain values, to uns["ipar"].
        overwrite: replace `out`, and keys of the same name in the copy.

    Raises:
        UserError: if something is in the way (see `check_output`) or the disk is full.
        ValueError: if an array has not one row per cell of the file.
    """
    source, out = Path(source), Path(out)
    obsm = {Keys.PREDICTION: pos, Keys.EMBEDDING: embedding}
    obsm = {key: np.asarray(value) for key, value in obsm.items() if value is not None}
    obs = {key: _storable(np.asarray(value)) for key, value in (obs or {}).items()}
    check_output(source, out, overwrite=overwrite, obsm=obsm, obs=obs)
    with _open(source) as store:
        n = len(_frame(store, "obs", source))
    for key, value in {**obsm, **obs}.items():
        if len(value) != n:
            raise ValueError(f"{key} has {len(value)} rows, expected {n}: one per cell of {source}")
    if pos is not None and obsm[Keys.PREDICTION].shape != (n, 2):
        raise ValueError(f"pos has shape {obsm[Keys.PREDICTION].shape}, expected ({n}, 2)")
    with _replacing(out, overwrite) as temp:
        _copy(source, temp, as_zarr=out.suffix == ".zarr")
        with _open(temp, mode="r+") as store:
            for key, value in obsm.items():
                _put(store, "obsm", key, value)
            for key, value in obs.items():
                _put(store, "obs", key, value)
            _put(store, "uns", Keys.UNS, _plain(uns or {}))
        if out.suffix == ".zarr":
            _consolidate(temp)


def in_file_order(slides, values, fill=np.nan):
    """Put per-slide arrays back into the row order of the file the slides were read from.

    Args:
        slides: all slides of one file, as `read_slides` returned them.
        values: one array (n_slide, ...) per slide.
        fill: value of rows that belong to no slide.

    Returns:
        (n_file, ...) array.
    """
    total = 1 + max(int(slide.rows.max()) for slide in slides if slide.num_cells)
    first = np.asarray(values[0])
    covered = sum(slide.num_cells for slide in slides) == total
    dtype = first.dtype if covered else np.result_type(first.dtype, type(fill))
    out = np.full((total, *first.shape[1:]), fill if not covered else 0, dtype=dtype)
    for slide, value in zip(slides, values, strict=True):
        out[slide.rows] = value
    return out


@contextmanager
def _open(path, mode="r"):
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path")
    if path.is_dir():
        import zarr

        try:
            # keys may have been added since the store was consolidated; zarr 2 does not look there
            fresh = {} if zarr.__version__.startswith("2.") else {"use_consolidated": False}
            store = zarr.open_group(str(path), mode=mode, **fresh)
        except Exception as error:
            raise UserError(
                f"{path}: is a folder but not a zarr store; give an .h5ad file or a .zarr folder"
            ) from error
    else:
        try:
            store = h5py.File(path, mode)
        except OSError as error:
            raise UserError(f"{path}: {_why_unreadable(path, error)}") from error
    try:
        if "obs" not in store or "var" not in store:
            raise UserError(
                f"{path}: is no AnnData file (no obs and var inside); convert it with "
                "adata.write_h5ad, see data/README.md"
            )
        yield store
    except BaseException as error:
        with suppress(RuntimeError):  # a full disk fails again on closing
            _close(store)
        if mode == "r" and isinstance(error, (OSError, KeyError, EOFError)):
            raise UserError(
                f"{path}: is damaged ({_first_line(error)}); copy or export it again"
            ) from error
        raise
    try:
        _close(store)
    except RuntimeError as error:
        raise OSError(_first_line(error)) from error


def _close(store):
    if isinstance(store, h5py.File):
        store.close()


def _why_unreadable(path, error):
    if not os.access(path, os.R_OK):
        return "may not be read; check its permissions"
    if os.path.getsize(path) == 0:
        return "is empty; copy or export it again"
    if "truncated" in str(error):
        return "is truncated (the copy did not finish); copy it again"
    with open(path, "rb") as f:
        signature = f.read(8)
    if signature != b"\x89HDF\r\n\x1a\n":
        return "is not an h5ad file; convert it with adata.write_h5ad, see data/README.md"
    return f"cannot be opened ({_first_line(error)}); copy or export it again"


def _first_line(error):
    return str(error.args[0] if error.args else error).strip().split("\n")[0]


def _frame(store, name, path):
    frame = read_elem(store[name])
    if not isinstance(frame, pd.DataFrame):
        raise UserError(
            f"{path}: {name} is in the layout of an AnnData older than 0.7; open it with "
            "anndata.read_h5ad and write it again"
        )
    return frame


def _suggest(name, options):
    options = [str(o) for o in options]
    close = difflib.get_close_matches(str(name), options, 1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    if not options:
        return "there are none"
    return f"there are {', '.join(options[:8])}{', ...' if len(options) > 8 else ''}"


def _names(values, most=3):
    values = [str(v) for v in values]
    return ", ".join(values[:most]) + (", ..." if len(values) > most else "")


def _check_cell_names(names, path):
    if len(names) == 0:
        raise UserError(f"{path}: has no cells; export it again")
    index = pd.Index(names)
    if not index.is_unique:
        twice = index[index.duplicated()].unique()
        raise UserError(
            f"{path}: {len(twice)} cell names occur more than once ({_names(twice)}); "
            "call adata.obs_names_make_unique() and save it again"
        )


def _select_matrix(store, layer, path, optional):
    """The group or dataset that holds the expression, and the gene names of its columns."""
    layers = list(store["layers"]) if "layers" in store else []
    if layer is None or layer in layers:
        group = store[f"layers/{layer}"] if layer else store.get("X")
        if group is None or group.attrs.get("encoding-type") == "null":
            if optional:
                return None, np.empty(0, dtype=str)
            raise UserError(f"{path}: X is empty; choose a layer, {_suggest('', layers)}")
        return group, _frame(store, "var", path).index.to_numpy(dtype=str)
    if layer == "raw" and "raw" in store and "X" in store["raw"]:
        return store["raw/X"], read_elem(store["raw/var"]).index.to_numpy(dtype=str)
    options = layers + (["raw"] if "raw" in store else [])
    raise UserError(f"{path}: has no layer {layer!r}; {_suggest(layer, options)}")


def _unique_genes(genes, notes):
    index = pd.Index(genes)
    twice = index[index.duplicated()].unique()
    if len(twice) == 0:
        return genes
    notes.append(
        f"{len(twice)} gene names occur more than once ({_names(twice)}): "
        "later ones were renamed NAME-1, NAME-2, ..."
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return anndata.utils.make_index_unique(index).to_numpy(dtype=str)


def _block_length(dataset):
    # a block never splits a chunk along the first axis, or the chunk is decompressed many times
    chunks = getattr(dataset, "chunks", None)
    per_row = int(np.prod(dataset.shape[1:])) or 1
    rows = max(1, BLOCK // per_row)
    return max(rows // chunks[0], 1) * chunks[0] if chunks else rows


def _read_flat(dataset, dtype):
    out = np.empty(dataset.shape[0], dtype=dtype)
    step = _block_length(dataset)
    for start in range(0, len(out), step):
        out[start : start + step] = dataset[start : start + step]
    return out


def _read_matrix(group, shape, path):
    """CSR float32 of a stored dense, CSR or CSC matrix, read block by block."""
    if not hasattr(group, "keys"):
        if tuple(group.shape) != shape:
            raise UserError(
                f"{path}: the matrix is {group.shape[0]} x {group.shape[1]} but obs and var name "
                f"{shape[0]} x {shape[1]}; export it again"
            )
        return _dense_to_csr(group)
    attrs = group.attrs
    kind = attrs.get("encoding-type") or f"{attrs.get('h5sparse_format')}_matrix"
    if kind not in ("csr_matrix", "csc_matrix"):
        raise UserError(f"{path}: the matrix is stored as {kind}; store it dense, as CSR or as CSC")
    stored_shape = tuple(int(s) for s in attrs.get("shape", attrs.get("h5sparse_shape", shape)))
    num_stored = group["data"].shape[0]
    index_type = np.int32 if max(num_stored, *shape) < 2**31 else np.int64
    indptr = np.asarray(group["indptr"][:], dtype=index_type)
    major, minor = shape if kind == "csr_matrix" else shape[::-1]
    indices = _read_flat(group["indices"], index_type)
    consistent = (
        stored_shape == shape
        and len(indptr) == major + 1
        and indptr[0] == 0
        and indptr[-1] == num_stored == len(indices)
        and np.all(np.diff(indptr) >= 0)
        and (num_stored == 0 or (indices.min() >= 0 and indices.max() < minor))
    )
    if not consistent:
        raise UserError(f"{path}: its sparse matrix is damaged; copy or export it again")
    data = _read_flat(group["data"], np.float32)
    if kind == "csr_matrix":
        matrix = sparse.csr_matrix((data, indices, indptr), shape=shape)
    else:
        matrix = sparse.csc_matrix((data, indices, indptr), shape=shape).tocsr()
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def _dense_to_csr(dataset):
    step = _block_length(dataset)
    blocks = [
        sparse.csr_matrix(np.asarray(dataset[start : start + step], dtype=np.float32))
        for start in range(0, dataset.shape[0], step)
    ]
    return sparse.vstack(blocks, format="csr") if len(blocks) > 1 else blocks[0]


def _check_values(matrix, normalized, cell_names, genes, where, notes):
    """Refuse impossible values; return whether the values are log-normalised."""
    whole, top = True, 0.0
    for start in range(0, len(matrix.data), BLOCK):
        values = matrix.data[start : start + BLOCK]
        bad = ~np.isfinite(values)
        problem = "not finite"
        if not bad.any() and not normalized:
            bad, problem = values < 0, "negative"
        if bad.any():
            at = start + int(np.argmax(bad))
            cell = cell_names[np.searchsorted(matrix.indptr, at, side="right") - 1]
            remedy = (
                "remove the cell or the gene"
                if problem == "not finite"
                else "choose a layer with raw counts, or pass --normalized to use them as they are"
            )
            raise UserError(
                f"{where}: values are {problem}, first {matrix.data[at]:g} at cell {cell}, "
                f"gene {genes[matrix.indices[at]]}; {remedy}"
            )
        whole = whole and bool(np.all(values == np.rint(values)))
        top = max(top, float(values.max()))
    if normalized is None and not whole:
        notes.append(
            "values are not whole numbers: taken as log-normalised and used as they are "
            "(--counts if they are counts)"
        )
        if top > LOG_CEILING:
            notes.append(
                f"values reach {top:.0f}, too high for logarithms: "
                "pass --counts unless they are meant to be used as they are"
            )
    return not whole if normalized is None else bool(normalized)


def _read_obsm(store, key):
    value = read_elem(store[f"obsm/{key}"])
    if sparse.issparse(value):
        value = value.toarray()
    return np.asarray(value)


def _read_positions(store, key, cell_names, required, path, notes):
    available = list(store["obsm"]) if "obsm" in store else []
    if key not in available:
        if required:
            raise UserError(
                f'{path}: has no obsm["{key}"] with measured positions; {_suggest(key, available)}'
            )
        return None
    value = _read_obsm(store, key)
    problem = None
    if value.ndim != 2 or value.shape[1] not in (2, 3) or value.dtype.kind not in "fiu":
        shape = " x ".join(str(s) for s in value.shape)
        problem = f"is {shape} of {value.dtype}, expected {len(cell_names)} x 2 numbers"
        remedy = "put x and y there"
    else:
        bad = ~np.isfinite(value[:, :2].astype(np.float64)).all(axis=1)
        if bad.any():
            first = _names(cell_names[bad])
            problem = f"is NaN or infinite for {bad.sum()} of {len(bad)} cells ({first})"
            remedy = "remove these cells or give them positions"
    if problem is not None:
        if required:
            raise UserError(f'{path}: obsm["{key}"] {problem}; {remedy}')
        notes.append(f'obsm["{key}"] {problem}: positions were left out')
        return None
    if value.shape[1] == 3:
        notes.append(f'obsm["{key}"] has three columns: the first two were used')
    return np.ascontiguousarray(value[:, :2], dtype=np.float64)


def _read_embedding(store, spec, path):
    slot, _, key = str(spec).partition(":")
    if slot != "obsm" or not key:
        raise UserError(f"embedding {spec!r} is not understood; write it as obsm:KEY")
    available = list(store["obsm"]) if "obsm" in store else []
    if key not in available:
        raise UserError(f'{path}: has no obsm["{key}"]; {_suggest(key, available)}')
    value = _read_obsm(store, key)
    if value.ndim != 2 or value.dtype.kind not in "fiu":
        raise UserError(f'{path}: obsm["{key}"] is no table of numbers; give an embedding n x d')
    value = np.ascontiguousarray(value, dtype=np.float32)
    bad = ~np.isfinite(value).all(axis=1)
    if bad.any():
        raise UserError(
            f'{path}: obsm["{key}"] is NaN or infinite for {bad.sum()} of {len(bad)} cells; '
            "remove these cells or compute the embedding again"
        )
    return value


def _group_rows(obs, slide_key, path):
    if slide_key is None:
        return {None: np.arange(len(obs))}
    if slide_key not in obs:
        raise UserError(
            f"{path}: has no obs column {slide_key!r}; {_suggest(slide_key, obs.columns)}"
        )
    column = obs[slide_key]
    if column.isna().any():
        raise UserError(
            f"{path}: {int(column.isna().sum())} cells have no value in obs[{slide_key!r}]; "
            "fill it in or remove them"
        )
    codes, labels = pd.factorize(column.astype(str))
    order = np.argsort(codes, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(codes, minlength=len(labels)))[:-1])
    return dict(zip(labels, rows, strict=True))


def _carried_columns(obs):
    carried = {}
    for key in obs.columns:
        column = obs[key]
        if len(carried) == MAX_CARRIED:
            break
        if column.dtype.kind in "fiub":
            plain = isinstance(column.dtype, np.dtype)
            carried[str(key)] = column.to_numpy(
                **({} if plain else {"dtype": float, "na_value": np.nan})
            )
        elif isinstance(column.dtype, pd.CategoricalDtype) or column.dtype.kind in "OU":
            codes, labels = pd.factorize(column.astype(str))
            if len(labels) <= MAX_CATEGORIES:
                carried[str(key)] = labels.to_numpy(dtype=str)[codes]
    return carried


def _note_oddities(slide):
    num_empty = int(slide.empty.sum())
    if num_empty:
        slide.notes.append(
            f"{num_empty} of {slide.num_cells} cells have no counts "
            f"({_names(slide.cell_names[slide.empty])}): kept and flagged"
        )
    if slide.pos is not None:
        repeated = slide.num_cells - len(np.unique(slide.pos, axis=0))
        if repeated:
            slide.notes.append(f"{repeated} cells share their position with another: kept")


def _check_suffix(path):
    if path.suffix not in (".h5ad", ".zarr"):
        raise UserError(f"{path}: the name of an output must end in .h5ad or .zarr")


@contextmanager
def _replacing(out, overwrite):
    """A temporary name beside `out` that takes its place when the block ends well."""
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
    except OSError as error:
        raise UserError(
            f"{out}: could not be written ({_os_reason(error)}); "
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


def _os_reason(error):
    if isinstance(error, shutil.Error):  # copytree gathers (source, target, message)
        return error.args[0][0][2]
    return os.strerror(error.errno) if error.errno else _first_line(error)


def _sync(path, deep=True):
    files = [p for p in path.rglob("*") if p.is_file()] if deep and path.is_dir() else [path]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _copy(source, temp, as_zarr):
    if source.is_dir() == as_zarr:
        (shutil.copytree if as_zarr else shutil.copyfile)(source, temp)
    elif as_zarr:
        _write_zarr(anndata.io.read_h5ad(source), temp)
    else:
        anndata.io.read_zarr(source).write_h5ad(temp)


def _write_zarr(adata, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which zarr version is written is anndata's choice
        adata.write_zarr(path)


def _consolidate(path):
    # the source's consolidated metadata, if any, does not list the keys that were added
    import zarr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr 3 warns that consolidation is an extension
        zarr.consolidate_metadata(str(path))


def _put(store, slot, key, value):
    if slot not in store:
        write_elem(store, slot, {})
    group = store[slot]
    fresh = key not in group
    write_elem(group, key, value)
    if slot == "obs" and fresh:
        order = [str(c) for c in group.attrs["column-order"]]
        group.attrs["column-order"] = [*order, key]


def _storable(values):
    return values.astype(object) if values.dtype.kind == "U" else values


def _plain(value):
    """What AnnData can store in uns, from nested plain Python values."""
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
