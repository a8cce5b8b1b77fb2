"""Small folders after the vendors' published lists of output files, images left out."""

import json

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

CONTROLS = 2
CONTROL_NAMES = {
    "10x": ["NegControlProbe_1", "NegControlProbe_2"],
    "MERSCOPE": ["Blank-1", "Blank-2"],
    "CosMx": ["NegPrb1", "SystemControl2"],
}


def write_10x_matrix(path, counts, genes, barcodes, kinds):
    """As Space Ranger and Xenium write it: features x barcodes, CSC."""
    with h5py.File(path, "w") as f:
        f.attrs["library_ids"] = np.array(["a"], dtype="S")
        group = f.create_group("matrix")
        matrix = sparse.csc_matrix(counts.T.astype(np.int32))
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        group["shape"] = matrix.shape
        group["barcodes"] = np.array(barcodes, dtype="S")
        features = group.create_group("features")
        features["id"] = np.array([f"ENSG{i}" for i in range(len(genes))], dtype="S")
        features["name"] = np.array(genes, dtype="S")
        features["feature_type"] = np.array(kinds, dtype="S")
        features["genome"] = np.array(["mm10"] * len(genes), dtype="S")


def write_folder(folder, kind, adata):
    """The files of a platform; rows of the table of positions come in another order.

    Args:
        folder: made if missing.
        kind: name of the platform.
        adata: counts of genes, and positions.

    Returns:
        The names that cells have in these files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts, pos = adata.X.toarray(), adata.obsm["spatial"]
    genes, cells = list(adata.var_names), list(adata.obs_names)
    extra = np.arange(1, CONTROLS * len(cells) + 1).reshape(len(cells), CONTROLS)
    order = np.random.default_rng(0).permutation(len(cells))
    write = _WRITERS[kind]
    return write(folder, np.hstack([counts, extra]), genes, cells, pos, order)


def _visium(folder, counts, genes, cells, pos, order):
    _spots(folder, counts, genes, cells, pos, order, {"spot_diameter_fullres": 9.0}, "csv")
    return cells


def _visium_old(folder, counts, genes, cells, pos, order):
    _spots(folder, counts, genes, cells, pos, order, {"spot_diameter_fullres": 9.0}, "old")
    return cells


def _visium_hd(folder, counts, genes, cells, pos, order):
    for size in (8, 16):
        scales = {"spot_diameter_fullres": 2.0 * size, "bin_size_um": float(size)}
        scales["microns_per_pixel"] = 0.5
        below = folder / "binned_outputs" / f"square_{size:03}um"
        below.mkdir(parents=True)
        _spots(below, counts, genes, cells, pos * size, order, scales, "parquet")
    with h5py.File(folder / "feature_slice.h5", "w") as f:
        layout = {"file_format": "1.0", "transform": [1.0] * 9}
        names = ("cytassist_colrow_to_spot_colrow", "spot_colrow_to_cytassist_colrow")
        names += ("microscope_colrow_to_spot_colrow", "spot_colrow_to_microscope_colrow")
        unit = np.eye(3).ravel().tolist()
        meta = {"hd_layout_json": json.dumps(layout)}
        meta["transform_matrices"] = dict.fromkeys(names, unit)
        f.attrs["metadata_json"] = json.dumps(meta)
    return cells


def _spots(folder, counts, genes, cells, pos, order, scales, kind):
    names = [*genes, *CONTROL_NAMES["10x"]]
    kinds = ["Gene Expression"] * len(genes) + ["Antibody Capture"] * CONTROLS
    write_10x_matrix(folder / "filtered_feature_bc_matrix.h5", counts, names, cells, kinds)
    (folder / "spatial").mkdir()
    scales |= {"tissue_hires_scalef": 0.1, "tissue_lowres_scalef": 0.03}
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
    frame = pd.DataFrame({"barcode": cells, "in_tissue": 1})
    frame["array_row"], frame["array_col"] = range(len(cells)), 0
    frame["pxl_row_in_fullres"], frame["pxl_col_in_fullres"] = pos[:, 1], pos[:, 0]
    frame = frame.iloc[order]
    if kind == "parquet":
        frame.to_parquet(folder / "spatial" / "tissue_positions.parquet")
    elif kind == "csv":
        frame.to_csv(folder / "spatial" / "tissue_positions.csv", index=False)
    else:
        frame.to_csv(folder / "spatial" / "tissue_positions_list.csv", index=False, header=False)


def xenium_name(number):
    """The id of a cell: eight letters a to p for eight hexadecimal digits."""
    letters = str.maketrans("0123456789abcdef", "abcdefghijklmnop")
    return f"{number:08x}".translate(letters) + "-1"


def _xenium(folder, counts, genes, cells, pos, order, parquet=True):
    cells = [xenium_name(number) for number in range(1, len(cells) + 1)]
    names = [*genes, *CONTROL_NAMES["10x"]]
    kinds = ["Gene Expression"] * len(genes)
    kinds += ["Negative Control Probe", "Negative Control Codeword"]
    write_10x_matrix(folder / "cell_feature_matrix.h5", counts, names, cells, kinds)
    frame = pd.DataFrame({"cell_id": cells, "x_centroid": pos[:, 0], "y_centroid": pos[:, 1]})
    frame["cell_area"] = 10.0
    (folder / "experiment.xenium").write_text(
        json.dumps({"analysis_sw_version": "xenium-2.0.0.10", "pixel_size": 0.2125})
    )
    if parquet:  # in the order of the matrix, which spatialdata-io relies on
        frame.to_parquet(folder / "cells.parquet")
    else:
        frame.iloc[order].to_csv(folder / "cells.csv.gz", index=False)
    return cells


def _xenium_csv(*args):
    return _xenium(*args, parquet=False)


def _merscope(folder, counts, genes, cells, pos, order):
    cells = [str(3_000_000_000_000_000_000 + number) for number in range(len(cells))]
    names = [*genes, *CONTROL_NAMES["MERSCOPE"]]
    frame = pd.DataFrame(counts.astype(int), index=pd.Index(cells, name="cell"), columns=names)
    frame.to_csv(folder / "cell_by_gene.csv")
    frame = pd.DataFrame({"EntityID": cells, "fov": 0, "volume": 1.5})
    frame["center_x"], frame["center_y"] = pos.T
    frame.iloc[order].to_csv(folder / "cell_metadata.csv", index=False)
    (folder / "images").mkdir()
    unit = folder / "images" / "micron_to_mosaic_pixel_transform.csv"
    np.savetxt(unit, np.eye(3))
    return cells


def _cosmx(folder, counts, genes, cells, pos, order):
    fov = 1 + np.arange(len(cells)) // 20
    number = 1 + np.arange(len(cells)) % 20
    names = [*genes, *CONTROL_NAMES["CosMx"]]
    frame = pd.DataFrame(counts.astype(int), columns=names)
    frame.insert(0, "fov", fov)
    frame.insert(1, "cell_ID", number)
    background = frame.iloc[[0, 20]].assign(cell_ID=0)
    pd.concat([background, frame]).to_csv(folder / "S0_exprMat_file.csv", index=False)
    frame = frame[["fov", "cell_ID"]].assign(Area=7)
    corner = 100.0 * fov
    frame["CenterX_local_px"], frame["CenterY_local_px"] = pos[:, 0] - corner, pos[:, 1]
    frame["CenterX_global_px"], frame["CenterY_global_px"] = pos.T
    frame.iloc[order].to_csv(folder / "S0_metadata_file.csv", index=False)
    corners = pd.DataFrame({"fov": np.unique(fov), "y_global_px": 0.0})
    corners["x_global_px"] = 100.0 * corners["fov"]
    corners.to_csv(folder / "S0_fov_positions_file.csv", index=False)
    for name in ("CellComposite", "CellLabels"):
        (folder / name).mkdir()
    return [f"{one}_{field}" for one, field in zip(number, fov, strict=True)]


def _slideseq(folder, counts, genes, cells, pos, order):
    frame = pd.DataFrame(counts[:, : len(genes)].T.astype(int), columns=cells)
    frame.insert(0, "GENE", genes)
    frame.to_csv(folder / "MappedDGEForR.csv", index=False)
    frame = pd.DataFrame({"barcodes": cells, "xcoord": pos[:, 0], "ycoord": pos[:, 1]})
    frame.iloc[order].to_csv(folder / "BeadLocationsForR.csv", index=False)
    return cells


def _slideseq_v2(folder, counts, genes, cells, pos, order):
    frame = pd.DataFrame(counts[:, : len(genes)].T.astype(int), columns=cells)
    frame.insert(0, "GENE", genes)
    frame.to_csv(folder / "Puck_1.digital_expression.txt.gz", index=False, sep="\t")
    frame = pd.DataFrame({"barcode": cells, "xcoord": pos[:, 0], "ycoord": pos[:, 1]})
    frame.iloc[order].to_csv(folder / "Puck_1_bead_locations.csv", index=False)
    return cells


def _stereo_cells(folder, counts, genes, cells, pos, order):
    (folder / "041.cellcut").mkdir()
    matrix = sparse.csr_matrix(counts[:, : len(genes)].astype(np.uint16))
    named = [("geneName", "S32"), ("offset", "<u4"), ("cellCount", "<u4"), ("expCount", "<u4")]
    fields = [("id", "<u4"), ("x", "<i4"), ("y", "<i4"), ("offset", "<u4"), ("geneCount", "<u2")]
    fields += [("expCount", "<u2"), ("dnbCount", "<u2"), ("area", "<u2")]
    fields += [("cellTypeID", "<u2"), ("clusterID", "<u2")]
    cell, gene = (
        np.zeros(len(cells), fields),
        np.zeros(len(genes), [*named, ("maxMIDcount", "<u2")]),
    )
    cell["id"], cell["area"] = np.arange(len(cells)), 9
    cell["x"], cell["y"] = np.rint(pos * 1000).T
    cell["offset"], cell["geneCount"] = matrix.indptr[:-1], np.diff(matrix.indptr)
    gene["geneName"] = np.array(genes, dtype="S")
    values = np.zeros(matrix.nnz, [("geneID", "<u4"), ("count", "<u2")])
    values["geneID"], values["count"] = matrix.indices, matrix.data
    by_gene = matrix.tocsc()
    across = np.zeros(matrix.nnz, [("cellID", "<u4"), ("count", "<u2")])
    across["cellID"], across["count"] = by_gene.indices, by_gene.data
    with h5py.File(folder / "041.cellcut" / "SS1.cellbin.gef", "w") as f:
        f.attrs["resolution"] = np.array([500], dtype="<u4")
        group = f.create_group("cellBin")
        group["cell"], group["gene"], group["cellExp"], group["geneExp"] = (
            cell,
            gene,
            values,
            across,
        )
        for name, size in (("cellExon", len(cells)), ("geneExon", len(genes))):
            group[name] = np.zeros(size, "<u2")
        for name in ("cellExpExon", "geneExpExon"):
            group[name] = np.zeros(matrix.nnz, "<u2")
        group["cellBorder"] = np.tile(np.arange(64, dtype="<i2").reshape(32, 2), (len(cells), 1, 1))
        group["blockIndex"], group["blockSize"] = np.zeros(2, "<u4"), np.zeros(4, "<u4")
        group["cellTypeList"] = np.array(["default"], dtype="S32")
    return [str(number) for number in range(len(cells))]


def _stereo_bins(folder, counts, genes, cells, pos, order):
    matrix = sparse.csc_matrix(counts[:, : len(genes)].astype(np.uint32))
    place = np.rint(pos * 1000).astype("<i4")
    spot = np.zeros(matrix.nnz, [("x", "<i4"), ("y", "<i4"), ("count", "<u4")])
    spot["x"], spot["y"] = place[matrix.indices].T
    spot["count"] = matrix.data
    gene = np.zeros(len(genes), [("gene", "S32"), ("offset", "<u4"), ("count", "<u4")])
    gene["gene"], gene["offset"] = np.array(genes, dtype="S"), matrix.indptr[:-1]
    gene["count"] = np.diff(matrix.indptr)
    with h5py.File(folder / "SS1.tissue.gef", "w") as f:
        for size in (20, 50, 100):
            group = f.create_group(f"geneExp/bin{size}")
            group["expression"], group["gene"] = spot, gene
            group["expression"].attrs["resolution"] = np.array([500], dtype="<u4")
    return [f"{x}_{y}" for x, y in place]


_WRITERS = {
    "Visium": _visium,
    "Visium before 2.0": _visium_old,
    "Visium HD": _visium_hd,
    "Xenium": _xenium,
    "Xenium, csv": _xenium_csv,
    "MERSCOPE": _merscope,
    "CosMx": _cosmx,
    "Slide-seq": _slideseq,
    "Slide-seq V2": _slideseq_v2,
    "Stereo-seq cells": _stereo_cells,
    "Stereo-seq bins": _stereo_bins,
}
KINDS = tuple(_WRITERS)
