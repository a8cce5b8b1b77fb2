"""AnnData, from memory or files of any known format, to slides."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from ..config.schema import DataConfig
from ..distributed import size
from ..errors import UserError
from ..progress import stage
from .anndata_store import (
    Store,
    check_honest,
    check_rows,
    is_stored,
    read_element,
    read_frame,
    row_count,
    some_names,
    suggest,
)
from .checks import MAX_CATEGORIES, checked
from .gene_names import merge_duplicates
from .headers import (
    check_cell_count,
    check_embedding,
    check_positions,
    find_matrix,
    sparse_kind,
    sparse_shape,
)
from .held import read_divided
from .keys import Keys
from .names import safe_names, unique_names
from .on_disk import BLOCK, block_length, is_large, read_to_disk, release
from .paths import Source
from .positions import as_positions
from .slide import Slide
from .sources import Opened, open_source, pick_rows
from .values import interpret

_LARGEST = 1e15  # squares of what is larger leave float32
_DENSE = 1 << 31  # numbers of a sparse table that is read dense
MAX_COLUMNS = 64  # obs columns kept with a slide


def read_file(
    source: str | os.PathLike | anndata.AnnData,
    data: DataConfig,
    *,
    require_pos: bool,
    min_cells: int = 1,
    name: str | None = None,
    slide_key_optional: bool = False,
) -> list[Slide]:
    """The slides of a file or object, read as a configuration says; see :func:`read_slides`.

    Args:
        source: an object, or a file or folder of any known format.
        data: layer, embedding and keys.
        require_pos, min_cells, name, slide_key_optional: as in :func:`read_slides`.
    """
    return read_slides(
        source,
        slide_key=data.slide_key,
        drop_outliers=data.drop_outliers,
        layer=None if data.layer == "X" else data.layer,
        normalized=data.normalized,
        embedding=data.embedding,
        spatial_key=data.spatial_key,
        require_pos=require_pos,
        min_cells=min_cells,
        name=name,
        slide_key_optional=slide_key_optional,
    )


def read_files(
    sources: Sequence[str | os.PathLike | anndata.AnnData],
    data: DataConfig,
    *,
    require_pos: bool,
    min_cells: int = 1,
    names: Sequence[str | None] | None = None,
    slide_key_optional: bool = False,
    divided: bool = False,
) -> list[Slide]:
    """The slides of some files or objects; of those with one name, each gets its number added.

    Args:
        sources: objects, or files and folders of any known format.
        data: layer, keys and embedding.
        require_pos, min_cells, slide_key_optional: as in :func:`read_slides`.
        names: one a source; None names a file by its stem.
        divided: whether ranks divide the slides; see :mod:`.held`.

    Raises:
        UserError: in one line, for anything wrong with a source or its content.
    """
    pairs = list(zip(sources, names or [None] * len(sources), strict=True))
    with stage("Reading slides", len(pairs)) as task:

        def read(pair: tuple[Any, str | None]) -> list[Slide]:
            found = read_file(
                pair[0],
                data,
                require_pos=require_pos,
                min_cells=min_cells,
                name=pair[1],
                slide_key_optional=slide_key_optional,
            )
            task.advance()
            return found

        if divided and size() > 1:
            slides = read_divided(pairs, read)
        else:
            slides = [slide for pair in pairs for slide in read(pair)]
    tell_apart(slides)
    return slides


def tell_apart(slides: Sequence[Slide]) -> None:
    """Adds a number to the name of each slide that another one shares."""
    for slide, name in zip(slides, unique_names([s.name for s in slides]), strict=True):
        slide.name = name


def read_slides(
    source: str | os.PathLike | anndata.AnnData,
    *,
    slide_key: str | None = None,
    layer: str | None = None,
    normalized: bool | None = None,
    embedding: str | None = None,
    spatial_key: str = Keys.SPATIAL,
    require_pos: bool = False,
    min_cells: int = 1,
    name: str | None = None,
    slide_key_optional: bool = False,
    drop_outliers: bool = False,
) -> list[Slide]:
    """Reads the slides of one source in blocks, and only what is asked for.

    Args:
        source: an AnnData object, or a file or folder that docs/files.md tells of.
        slide_key: obs column that names the slide of each cell; slides come in order of appearance.
        layer: of the expression; X if left out. "raw" is `adata.raw`, unless a layer has that name.
        normalized: True for log-normalised values, False for counts; None recognises them.
        embedding: "obsm:KEY", an embedding to keep with the slides.
        spatial_key: obsm key of positions.
        require_pos: refuse slides without valid positions; otherwise these are left out, noted.
        min_cells: refuse slides of fewer cells.
        name: of the slide; the stem of the file, or "slide", if left out.
        slide_key_optional: take a file without that column as one slide, and note it.
        drop_outliers: leave out cells whose positions lie far outside the others, or at one point.

    Returns:
        The slides; `Slide.notes` says what was recognised. They may share arrays of an object.

    Raises:
        UserError: in one line, for anything wrong with the file or its content.
    """
    in_memory = isinstance(source, anndata.AnnData)
    where = (name or "slide") if in_memory else str(source)
    expression, values = None, None
    with open_source(source) as opened:
        store, notes, name = opened.store, opened.notes, name or opened.name
        obs = read_frame(store, "obs", where)
        slide_key = _resolve_slide_key(opened, obs, slide_key, slide_key_optional)
        cell_names = obs.index.to_numpy(dtype=str)
        _check_cell_names(cell_names, where)
        group, genes, other_names = _select_matrix(store, layer, where, embedding is not None)
        groups = pick_rows(obs, slide_key, opened.label, where)
        of = (spatial_key, cell_names, groups.get(opened.label))
        pos = _read_positions(store, *of, require_pos, where, notes)
        vectors = None if embedding is None else _read_embedding(store, embedding, where)
        _check_sizes(groups, min_cells, slide_key, where)
        if group is not None:
            expression = _read_matrix(group, (len(obs), len(genes)), where)
            part = f"{where}, X" if layer is None else f"{where}, layer {layer!r}"
            layers = [*store.get("layers", ()), *(["raw"] if "raw" in store else [])]
            _refuse_zeros(expression, layers, part, optional=vectors is not None)
            _check_values(expression, normalized, cell_names, genes, part, layers)
            expression, normalized, values, said = interpret(expression, normalized)
            notes += said
        columns = _label_columns(obs)

    whole = Slide(
        name=name,
        expression=expression,
        genes=genes,
        cell_names=cell_names,
        pos=pos,
        embedding=vectors,
        normalized=bool(normalized),
        values=values,
        gene_columns=other_names,
        empty=None if expression is None else np.diff(expression.indptr) == 0,
        obs=columns,
        path=None if in_memory else str(Source.parse(source)),
    )
    whole = whole if expression is None else merge_duplicates(whole)
    whole.notes = [*notes, *whole.notes]
    slides = _parts(whole, groups)
    if opened.label is not None:  # what is picked is a source of its own
        slides[0].rows = np.arange(slides[0].num_cells)
    return [checked(slide, obs, slide_key, require_pos, drop_outliers, where) for slide in slides]


def _resolve_slide_key(
    opened: Opened, obs: pd.DataFrame, asked: str | None, optional: bool
) -> str | None:
    """The column that is asked for, or else that of the format."""
    if asked is not None and not (optional and asked not in obs):
        return asked
    if opened.question:
        raise UserError(opened.question)
    if asked is not None:
        opened.notes.append(f"no obs column {asked!r}, from which the run took its slides")
    return opened.slide_key


def _parts(whole: Slide, groups: dict[str | None, np.ndarray]) -> list[Slide]:
    """The slides of a file; the whole one where nothing labels it."""
    if None in groups:
        return [whole]
    names = safe_names([f"{whole.name}-{label}" for label in groups])
    return [
        replace(whole.take(rows), name=name, notes=list(whole.notes))
        for name, rows in zip(names, groups.values(), strict=True)
    ]


def _check_cell_names(names: np.ndarray, where: str) -> None:
    check_cell_count(len(names), 1, where)
    index = pd.Index(names)
    if not index.is_unique:
        twice = index[index.duplicated()].unique()
        raise UserError(
            f"{where}: {len(twice)} cell names occur more than once ({some_names(twice)}); "
            "call adata.obs_names_make_unique() and save it again"
        )


def _check_sizes(
    groups: dict[str | None, np.ndarray], min_cells: int, slide_key: str | None, where: str
) -> None:
    for label, rows in groups.items():
        of = where if label is None else f"{where}, {slide_key} {label}"
        check_cell_count(len(rows), min_cells, of)


def _select_matrix(
    store: Store, layer: str | None, where: str, optional: bool
) -> tuple[Any, np.ndarray, dict[str, np.ndarray]]:
    """The group or dataset that holds the expression, names of its genes (G,), and other names."""
    group, var = find_matrix(store, layer, where, optional)
    if group is None:
        return None, np.empty(0, dtype=str), {}
    frame = read_frame({"var": var}, "var", where)
    return group, frame.index.to_numpy(dtype=str), _name_columns(frame)


def _name_columns(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Columns of var that may name the genes: text that differs between most of them."""
    text = (pd.CategoricalDtype, pd.StringDtype)
    found = {}
    for key in frame.columns:
        if frame[key].dtype.kind in "OU" or isinstance(frame[key].dtype, text):
            names = frame[key].astype(str).to_numpy(dtype=str)
            if len(set(names)) > len(names) / 2:
                found[str(key)] = names
    return found


def _read_flat(dataset: Any, dtype: type) -> np.ndarray:
    out = np.empty(dataset.shape[0], dtype=dtype)
    step = block_length(dataset)
    for start in range(0, len(out), step):
        out[start : start + step] = dataset[start : start + step]
    return out


def _read_matrix(group: Any, shape: tuple[int, int], where: str) -> sparse.csr_matrix:
    """A dense, CSR or CSC matrix as float32 CSR; where it is stored, it is read in blocks."""
    if sparse.issparse(group):
        return _canonical(group)
    if is_stored(group):
        check_honest(group)
        if is_large(group):
            return read_to_disk(group, shape, where)
    if not hasattr(group, "keys"):
        if tuple(group.shape) != shape:
            raise UserError(
                f"{where}: the matrix is {group.shape[0]} x {group.shape[1]} but obs and var name "
                f"{shape[0]} x {shape[1]}; export it again"
            )
        return _dense_to_csr(group)
    kind = sparse_kind(group)
    if kind not in ("csr_matrix", "csc_matrix"):
        raise UserError(
            f"{where}: the matrix is stored as {kind}; store it dense, as CSR or as CSC"
        )
    num_stored = group["data"].shape[0]
    index_type = np.int32 if max(num_stored, *shape) < 2**31 else np.int64
    major, minor = shape if kind == "csr_matrix" else shape[::-1]
    if group["indptr"].shape[0] != major + 1 or num_stored > math.prod(shape):
        raise UserError(f"{where}: its sparse matrix is damaged; copy or export it again")
    indptr = np.asarray(group["indptr"][:], dtype=index_type)
    indices = _read_flat(group["indices"], index_type)
    consistent = (
        sparse_shape(group, shape) == shape
        and len(indptr) == major + 1
        and indptr[0] == 0
        and indptr[-1] == num_stored == len(indices)
        and np.all(np.diff(indptr) >= 0)
        and (num_stored == 0 or (indices.min() >= 0 and indices.max() < minor))
    )
    if not consistent:
        raise UserError(f"{where}: its sparse matrix is damaged; copy or export it again")
    data = _read_flat(group["data"], np.float32)
    if kind == "csr_matrix":
        matrix = sparse.csr_matrix((data, indices, indptr), shape=shape)
    else:
        matrix = sparse.csc_matrix((data, indices, indptr), shape=shape).tocsr()
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def _canonical(matrix: Any) -> sparse.csr_matrix:
    """A float32 CSR matrix without zeros or duplicates; the given one is not changed."""
    found = sparse.csr_matrix(matrix, dtype=np.float32)
    if not found.has_canonical_format or not found.data.all():
        found = found.copy()
        found.sum_duplicates()
        found.eliminate_zeros()
    return found


def _dense_to_csr(dataset: Any) -> sparse.csr_matrix:
    step = block_length(dataset)
    blocks = [
        sparse.csr_matrix(np.asarray(dataset[start : start + step], dtype=np.float32))
        for start in range(0, dataset.shape[0], step)
    ]
    return sparse.vstack(blocks, format="csr") if len(blocks) > 1 else blocks[0]


def _check_values(
    matrix: sparse.csr_matrix,
    normalized: bool | None,
    cell_names: np.ndarray,
    genes: np.ndarray,
    where: str,
    layers: Sequence[str],
) -> None:
    """Refuses impossible values."""
    for start in range(0, len(matrix.data), BLOCK):
        values = matrix.data[start : start + BLOCK]
        bad = ~np.isfinite(values)
        problem = "not finite"
        if not bad.any():
            bad, problem = np.abs(values) > _LARGEST, "beyond all counts"
        if not bad.any() and not normalized:
            bad, problem = values < 0, "negative"
        if bad.any():
            at = start + int(np.argmax(bad))
            cell = cell_names[np.searchsorted(matrix.indptr, at, side="right") - 1]
            remedy = (
                "remove the cell or the gene"
                if problem != "negative"
                else f"choose a layer with counts, {suggest('', layers)}, or pass --normalized to "
                "use them as they are"
            )
            raise UserError(
                f"{where}: values are {problem}, first {matrix.data[at]:g} at cell {cell}, "
                f"gene {genes[matrix.indices[at]]}; {remedy}"
            )
        release(matrix)


def _refuse_zeros(
    matrix: sparse.csr_matrix, layers: Sequence[str], where: str, optional: bool
) -> None:
    if not optional and not len(matrix.data):
        raise UserError(f"{where}: all values are zero; choose a layer, {suggest('', layers)}")


def _read_obsm(store: Store, key: str) -> np.ndarray:
    value = store["obsm"][key]
    check_rows(value, row_count(store["obs"]))
    value = read_element(value)
    if sparse.issparse(value):
        if math.prod(value.shape) > _DENSE:
            shape = " x ".join(map(str, value.shape))
            raise OSError(f"obsm[{key!r}] is a sparse table of {shape}, too large for one")
        value = value.toarray()
    return np.asarray(value)


def _read_positions(
    store: Store,
    key: str,
    cell_names: np.ndarray,
    rows: np.ndarray | None,
    required: bool,
    where: str,
    notes: list[str],
) -> np.ndarray | None:
    """Positions (n, 2), float64; None if there are none or, where not required, unusable ones.

    Rows that are not picked are not looked at, and are NaN.
    """
    available = list(store["obsm"]) if "obsm" in store else []
    if required:
        check_positions(store, key, where)
    if key not in available:
        return None
    value, picked = _read_obsm(store, key), slice(None) if rows is None else rows
    pos, problem, said = as_positions(value[picked], key, cell_names[picked])
    if problem is not None and required:
        raise UserError(f"{where}: {problem}")
    notes += said if problem is None else [f"{problem.split(';')[0]}: positions were left out"]
    if pos is None or rows is None:
        return pos
    whole = np.full((len(cell_names), 2), np.nan)
    whole[rows] = pos
    return whole


def _read_embedding(store: Store, spec: str, where: str) -> np.ndarray:
    key = check_embedding(store, spec, where)
    value = _read_obsm(store, key)
    if value.ndim != 2 or value.dtype.kind not in "fiu":
        raise UserError(f'{where}: obsm["{key}"] is no table of numbers; give an embedding n x d')
    value = np.ascontiguousarray(value, dtype=np.float32)
    bad = np.logical_not(np.isfinite(value).all(axis=1))
    if bad.any():
        raise UserError(
            f'{where}: obsm["{key}"] is NaN or infinite for {bad.sum()} of {len(bad)} cells; '
            "remove these cells or compute the embedding again"
        )
    return value


def _label_columns(obs: pd.DataFrame) -> dict[str, np.ndarray]:
    """Columns to keep with a slide: numbers, and labels that group cells."""
    columns: dict[str, np.ndarray] = {}
    for key in obs.columns:
        column = obs[key]
        if len(columns) == MAX_COLUMNS:
            break
        if column.dtype.kind in "fiub":
            plain = isinstance(column.dtype, np.dtype)
            columns[str(key)] = column.to_numpy(
                **({} if plain else {"dtype": float, "na_value": np.nan})
            )
        elif isinstance(column.dtype, pd.CategoricalDtype) or column.dtype.kind in "OU":
            codes, labels = pd.factorize(column)
            if len(labels) <= MAX_CATEGORIES and len(labels) < len(column):
                # shared strings: an array of fixed width would take their longest for each cell
                known = np.array([*map(str, labels), np.nan], dtype=object)
                columns[str(key)] = known[codes]  # code -1 is no label
    return columns
