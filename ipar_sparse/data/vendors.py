"""Tables of vendors' files, as AnnData: counts of genes, positions of cells, no images."""

from __future__ import annotations

import json
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from ..errors import UserError, import_extra
from .anndata_store import first_line, some_names
from .keys import Keys
from .paths import VendorFiles, pick_bins

BLOCK = 1 << 22  # values of a text table that are read at a time
GENES = "Gene Expression"
_DAMAGES = (OSError, EOFError, KeyError, IndexError, TypeError, ValueError, zlib.error)
"""What libraries raise on tables that are cut off, or lack what belongs in them."""
_COSMX_CONTROLS = ("NegPrb", "Negative", "SystemControl", "FalseCode")


def read_vendor(files: VendorFiles, part: str | None = None) -> AnnData:
    """The table of a vendor's files.

    Control probes are left out. ``uns["ipar_source"]`` says how many, and in which unit
    positions are.

    Args:
        files: of one slide.
        part: the size of bins, e.g. ``"bin50"``, where a Stereo-seq file holds several.

    Raises:
        UserError: in one line, if files are damaged or do not fit, or several could be meant.
    """
    try:
        if files.kind == "Stereo-seq":
            return _read_gef(files.matrix, part)
        if files.positions is None:
            adata = _read_cells(files.matrix)
        else:
            adata = _READERS[files.kind.partition(",")[0]](files.matrix, files.positions)
    except _DAMAGES as error:
        raise UserError(
            f"{files.matrix.parent}: is damaged or incomplete ({first_line(error)}); export it "
            "again"
        ) from error
    adata.uns[Keys.SOURCE]["format"] = files.kind
    return adata


def _table(
    matrix: sparse.spmatrix,
    cells: Iterable[str],
    var: pd.DataFrame,
    pos: np.ndarray | None,
    *,
    unit: str | None = None,
    microns: float | None = None,
    left_out: dict[str, int] | None = None,
    obs: pd.DataFrame | None = None,
) -> AnnData:
    """A table of n cells, with ``uns["ipar_source"]``, which lacks the format."""
    names = pd.Index([str(cell) for cell in cells], dtype=object)
    obs = pd.DataFrame(index=names) if obs is None else obs.set_axis(names)
    source: dict = {"left_out": left_out or {}}
    if unit is not None:
        source["unit"] = unit
    if microns is not None:
        source["microns_per_unit"] = float(microns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # genes of one name are told where slides are made
        adata = AnnData(
            sparse.csr_matrix(matrix, dtype=np.float32),
            obs=obs,
            var=var,
            uns={Keys.SOURCE: source},
        )
    if pos is not None:
        adata.obsm[Keys.SPATIAL] = np.asarray(pos, dtype=np.float64)
    return adata


def _of_cells(table: pd.DataFrame, cells: Iterable[str], file: Path) -> pd.DataFrame:
    """The rows of a table of positions, in the order of the counts."""
    cells = pd.Index(cells)
    missing = cells[~cells.isin(table.index)]
    if len(missing):
        raise UserError(
            f"{file}: does not name {len(missing)} of {len(cells)} cells ({some_names(missing)}); "
            "take counts and positions from one run"
        )
    return table.loc[cells]


def _read_frame(file: Path, index: str, keys: Iterable[str] = (), **options) -> pd.DataFrame:
    """A table from csv or parquet, its index and other keys as text."""
    if file.suffix == ".parquet":
        import_extra("pyarrow", "vendors")
        frame = pd.read_parquet(file)
    else:
        options["dtype"] = dict.fromkeys((index, *keys), str)
        frame = pd.read_csv(file, float_precision="round_trip", **options)
    frame = frame.set_index(index)
    decoded = [name.decode() if isinstance(name, bytes) else str(name) for name in frame.index]
    return frame.set_axis(pd.Index(decoded))


def _read_10x(file: Path) -> tuple[sparse.csr_matrix, np.ndarray, pd.DataFrame, dict[str, int]]:
    """Counts, barcodes and genes of a 10x matrix, and how many other features it holds."""
    with h5py.File(file) as store:
        if "matrix" not in store:
            raise UserError(
                f"{file}: is no 10x matrix of Cell Ranger 3 or later; read it with "
                "scanpy.read_10x_h5 and save it with adata.write_h5ad"
            )
        group = store["matrix"]
        # stored as CSC of features x barcodes, which is CSR of barcodes x features
        parts = tuple(group[name][:] for name in ("data", "indices", "indptr"))
        matrix = sparse.csr_matrix(parts, shape=tuple(group["shape"][:][::-1]))
        cells = group["barcodes"].asstr()[:]
        features = group["features"]
        kinds = features["feature_type"].asstr()[:]
        var = pd.DataFrame(
            {"gene_ids": features["id"].asstr()[:]},
            index=features["name"].asstr()[:].astype(object),
        )
    genes = kinds == GENES
    if not genes.any():
        raise UserError(f"{file}: holds no feature of type {GENES!r}, but {some_names(set(kinds))}")
    return matrix[:, genes], cells, var[genes], dict(Counter(kinds[~genes].tolist()))


def _read_cells(matrix: Path) -> AnnData:
    counts, cells, var, left_out = _read_10x(matrix)
    return _table(counts, cells, var, None, left_out=left_out)


def _read_visium(matrix: Path, positions: Path) -> AnnData:
    counts, cells, var, left_out = _read_10x(matrix)
    columns = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres"]
    columns += ["pxl_col_in_fullres"]
    # Space Ranger before 2.0 wrote no header
    old = {"header": None, "names": columns} if positions.stem.endswith("_list") else {}
    spots = _of_cells(_read_frame(positions, "barcode", **old), cells, positions)
    scales = positions.parent / "scalefactors_json.json"
    microns = json.loads(scales.read_text()).get("microns_per_pixel") if scales.is_file() else None
    pos = spots[["pxl_col_in_fullres", "pxl_row_in_fullres"]]
    return _table(
        counts,
        cells,
        var,
        pos,
        unit="pixel",
        microns=microns,
        left_out=left_out,
        obs=spots[columns[1:4]],
    )


def _read_xenium(matrix: Path, positions: Path) -> AnnData:
    counts, cells, var, left_out = _read_10x(matrix)
    table = _of_cells(_read_frame(positions, "cell_id"), cells, positions)
    pos = table[["x_centroid", "y_centroid"]]
    obs = table.drop(columns=pos.columns)
    return _table(
        counts,
        cells,
        var,
        pos,
        unit="micrometer",
        microns=1,
        left_out=left_out,
        obs=obs.select_dtypes("number"),
    )


def _read_wide(file: Path, keys: list[str] | None = None, **options):
    """A text table of counts: sparse values, the column names, and the key columns.

    Args:
        file: a row of names, then rows of counts; key columns come first.
        keys: names of the key columns; the first column if left out.
        **options: of ``pandas.read_csv``.
    """
    head = pd.read_csv(file, nrows=0, **options).columns
    keys = keys or [head[0]]
    names = [name for name in head if name not in keys]
    blocks, found = [], []
    rows = max(1, BLOCK // len(head))
    for part in pd.read_csv(file, dtype=dict.fromkeys(keys, str), chunksize=rows, **options):
        blocks.append(sparse.csr_matrix(part[names].to_numpy(dtype=np.float32)))
        found.append(part[keys])
    if not found:
        raise UserError(f"{file}: holds no row of counts; export it again")
    return sparse.vstack(blocks, format="csr"), names, pd.concat(found, ignore_index=True)


def _without(counts, names: list[str], prefixes: Iterable[str], kind: str):
    """Counts and names without those columns that begin so, and how many these were."""
    index = pd.Index(names)
    control = np.zeros(len(index), dtype=bool)
    for prefix in prefixes:
        control |= index.str.lower().str.startswith(prefix.lower())
    left_out = {kind: int(control.sum())} if control.any() else {}
    return counts[:, ~control], pd.DataFrame(index=index[~control].astype(object)), left_out


def _read_merscope(matrix: Path, positions: Path) -> AnnData:
    counts, names, keys = _read_wide(matrix)
    cells = keys.iloc[:, 0]
    first = pd.read_csv(positions, nrows=0).columns[0]  # unnamed, EntityID or cell
    table = _of_cells(_read_frame(positions, first), cells, positions)
    counts, var, left_out = _without(counts, names, ["Blank"], "blank barcodes")
    pos = table[["center_x", "center_y"]]
    obs = table.drop(columns=pos.columns).select_dtypes("number")
    return _table(counts, cells, var, pos, unit="micrometer", microns=1, left_out=left_out, obs=obs)


def _read_cosmx(matrix: Path, positions: Path) -> AnnData:
    head = pd.read_csv(matrix, nrows=0).columns
    extra = [name for name in ("cell", "cell_id") if name in head]  # of later versions
    counts, names, keys = _read_wide(matrix, ["fov", "cell_ID", *extra])
    inside = (keys["cell_ID"] != "0").to_numpy()  # cell 0 of a field is what lies in no cell
    counts = counts[inside]
    cells = (keys["cell_ID"] + "_" + keys["fov"])[inside]  # numbered in each field of view
    table = _read_frame(positions, "cell_ID", keys=["fov"])
    table = _of_cells(table.set_axis(table.index + "_" + table["fov"]), cells, positions)
    counts, var, left_out = _without(counts, names, _COSMX_CONTROLS, "control probes")
    if not inside.all():
        left_out["rows of counts outside cells"] = int((~inside).sum())
    pos = table[["CenterX_global_px", "CenterY_global_px"]]
    obs = table.drop(columns=pos.columns)
    kept = obs.select_dtypes("number").assign(fov=pd.Categorical(obs["fov"]))
    return _table(counts, cells, var, pos, unit="pixel", left_out=left_out, obs=kept)


def _read_slideseq(matrix: Path, positions: Path) -> AnnData:
    text = ".txt" in matrix.suffixes or ".tsv" in matrix.suffixes
    counts, beads, genes = _read_wide(matrix, sep="\t" if text else ",")
    head = pd.read_csv(positions, nrows=0).columns
    barcode = next((name for name in head if "barcode" in name.lower()), head[0])
    table = _of_cells(_read_frame(positions, barcode), beads, positions)
    var = pd.DataFrame(index=pd.Index(genes.iloc[:, 0], dtype=object, name=None))
    return _table(counts.T, beads, var, table[["xcoord", "ycoord"]], unit="pixel")


def _read_gef(file: Path, part: str | None) -> AnnData:
    """Cells or square bins of a Stereo-seq file; x and y count spots of the chip."""
    with h5py.File(file) as store:
        if "cellBin" in store:
            return _read_cell_gef(store, file)
        bins = store.get("geneExp", {})
        size = pick_bins(file, part, sorted(bins, key=lambda name: int(name[3:])))
        group = bins[size]
        spots, genes = group["expression"][:], group["gene"][:]
        resolution = group["expression"].attrs.get("resolution", store.attrs.get("resolution"))
    code = spots["x"].astype(np.int64) << 32 | spots["y"].astype(np.int64)
    places, rows = np.unique(code, return_inverse=True)
    pos = np.column_stack([places >> 32, places & 0xFFFFFFFF])
    columns = np.repeat(np.arange(len(genes)), genes["count"])
    matrix = sparse.csr_matrix((spots["count"], (rows, columns)), shape=(len(places), len(genes)))
    names = [f"{x}_{y}" for x, y in pos]
    return _gef_table(matrix, names, genes, pos, f"Stereo-seq, {size}", resolution)


def _read_cell_gef(store: h5py.File, file: Path) -> AnnData:
    group = store["cellBin"]
    cells, genes, values = group["cell"][:], group["gene"][:], group["cellExp"][:]
    indptr = np.append(cells["offset"].astype(np.int64), len(values))
    if indptr[0] != 0 or np.any(np.diff(indptr) != cells["geneCount"]):
        raise UserError(f"{file}: its cells and its counts do not fit; export it again")
    matrix = sparse.csr_matrix(
        (values["count"], values["geneID"].astype(np.int32), indptr),
        shape=(len(cells), len(genes)),
    )
    pos = np.column_stack([cells["x"], cells["y"]])
    resolution = store.attrs.get("resolution")
    return _gef_table(matrix, cells["id"], genes, pos, "Stereo-seq, cells", resolution)


def _gef_table(matrix, cells, genes, pos, kind: str, resolution) -> AnnData:
    columns = genes.dtype.names or ()
    name = [column for column in ("geneName", "gene", "geneID") if column in columns][0]
    var = pd.DataFrame(index=pd.Index(np.char.decode(genes[name], "utf-8"), dtype=object))
    if name == "geneName" and "geneID" in columns:
        var["gene_ids"] = np.char.decode(genes["geneID"], "utf-8")
    microns = None if resolution is None else np.ravel(resolution)[0] / 1000  # given in nm
    adata = _table(matrix, cells, var, pos, unit="spot of the chip", microns=microns)
    adata.uns[Keys.SOURCE]["format"] = kind
    return adata


_READERS = {
    "Xenium": _read_xenium,
    "Visium": _read_visium,
    "Visium HD": _read_visium,
    "MERSCOPE": _read_merscope,
    "CosMx": _read_cosmx,
    "Slide-seq": _read_slideseq,
}
