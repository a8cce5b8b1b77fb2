"""SpatialData stores in and out, spatialdata-io beside our readers, scanpy and squidpy behind."""

import sys

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata_files import make, save
from vendor_files import write_folder

from ipar_sparse.data.headers import check_output
from ipar_sparse.data.keys import Keys
from ipar_sparse.data.paths import vendor_files
from ipar_sparse.data.readers import read_slides
from ipar_sparse.data.sources import Source, load_source
from ipar_sparse.data.writers import write_predictions
from ipar_sparse.errors import UserError

PLATFORMS = {"Visium": "visium", "Visium HD": "visium_hd", "Xenium": "xenium"}
PLATFORMS |= {"MERSCOPE": "merscope", "CosMx": "cosmx", "Stereo-seq cells": "stereoseq"}


def refused(source, *words, **options):
    with pytest.raises(UserError) as caught:
        read_slides(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.fixture
def spatialdata():
    return pytest.importorskip("spatialdata", reason="spatialdata is not installed")


@pytest.fixture
def store(spatialdata):
    """Writes cells of two sections to a store: circles, or pixels of a label image."""
    from spatialdata.models import Labels2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale

    def write(path, *, apart=False, systems=("global", "global"), labels=False, tables=("table",)):
        adata = make()
        pos = adata.obsm.pop("spatial") * 100
        key = adata.obs["section"].astype(str)
        adata.obs["region"], adata.obs["instance"] = key.astype("category"), np.arange(1, 41)
        elements = {}
        for region, system in zip(("s1", "s2"), systems, strict=True):
            rows = np.flatnonzero(key == region)
            place = pos[rows] + (1000 * apart if region == "s2" else 0)
            to = {system: Scale([2.0, 2.0], axes=("x", "y")) if region == "s2" else Identity()}
            if labels:
                image = np.zeros((120, 120), dtype=np.uint16)
                x, y = place.astype(int).T
                image[y, x] = adata.obs["instance"].to_numpy()[rows]
                elements[region] = Labels2DModel.parse(image, dims=("y", "x"), transformations=to)
            else:
                index = adata.obs["instance"].to_numpy()[rows]
                circles = dict(geometry=0, radius=1.0, index=index, transformations=to)
                elements[region] = ShapesModel.parse(place, **circles)
            pos[rows] = (place.astype(int) if labels else place) * (2 if region == "s2" else 1)
        table = dict(region=["s1", "s2"], region_key="region", instance_key="instance")
        made = {name: TableModel.parse(adata.copy(), **table) for name in tables}
        kind = "labels" if labels else "shapes"
        spatialdata.SpatialData(tables=made, **{kind: elements}).write(path)
        adata.obsm["spatial"] = pos
        return adata

    return write


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    path = save(make(), tmp_path / "a.zarr")
    (tmp_path / "b.zarr" / "tables").mkdir(parents=True)
    for name in ("zarr.json", ".zgroup"):
        if (path / name).exists():
            (tmp_path / "b.zarr" / name).write_text((path / name).read_text())
    refused(tmp_path / "b.zarr", "SpatialData store without a table")
    monkeypatch.setitem(sys.modules, "spatialdata", None)
    table = tmp_path / "b.zarr" / "tables" / "table"
    path.rename(table)
    import zarr

    for key, value in (("region", "a"), ("region_key", "section"), ("instance_key", "barcode")):
        zarr.open_group(str(table), mode="r+").attrs[key] = value
    refused(tmp_path / "b.zarr", "pip install 'ipar_sparse[spatialdata]'")


@pytest.mark.parametrize("labels", [False, True])
def test_regions_give_slides_and_positions(store, tmp_path, labels):
    adata = store(tmp_path / "a.zarr", labels=labels)
    slides = read_slides(tmp_path / "a.zarr", require_pos=True)
    assert [slide.name for slide in slides] == ["a-s2", "a-s1"]
    for slide in slides:
        part = adata[list(slide.cell_names)]
        np.testing.assert_array_equal(slide.expression.toarray(), part.X.toarray())
        # the centre of a pixel is half a pixel, scaled, beyond its corner
        near = 1.01 if labels else 1e-9
        np.testing.assert_allclose(slide.pos, part.obsm["spatial"], atol=near)
        assert "centroids of s2 in global, s1 in global" in slide.notes[0]
    (picked,) = read_slides(f"{tmp_path / 'a.zarr'}::s1", require_pos=True)
    np.testing.assert_array_equal(picked.pos, slides[1].pos)
    assert len(read_slides(tmp_path / "a.zarr", slide_key="section")) == 2
    refused(f"{tmp_path / 'a.zarr'}::s3", "no region 's3'")


def test_what_is_meant_is_asked_for(store, tmp_path):
    store(tmp_path / "a.zarr", apart=True)
    refused(tmp_path / "a.zarr", "side by side", "::all", "::s2", "--slide-key region")
    (whole,) = read_slides(f"{tmp_path / 'a.zarr'}::all")
    assert whole.num_cells == 40 and whole.name == "a"
    assert len(read_slides(tmp_path / "a.zarr", slide_key="region")) == 2
    store(tmp_path / "b.zarr", apart=True, systems=("one", "two"))
    assert len(read_slides(tmp_path / "b.zarr")) == 2  # each lies in a system of its own
    store(tmp_path / "c.zarr", tables=("bins", "cells"))
    refused(tmp_path / "c.zarr", "holds the tables bins, cells", "::bins")
    names = [one.name for one in read_slides(f"{tmp_path / 'c.zarr'}::cells")]
    assert names == ["c-cells-s2", "c-cells-s1"]
    assert read_slides(f"{tmp_path / 'c.zarr'}::cells::s1")[0].num_cells == 26


def test_predictions_are_written_back(spatialdata, store, tmp_path):
    adata = store(tmp_path / "a.zarr")
    given = {"pos": np.arange(80.0).reshape(40, 2), "obs": {"ipar_empty": np.zeros(40, bool)}}
    given["uns"] = {"version": "1"}
    for source in ("a.zarr", "a.zarr::table"):
        write_predictions(tmp_path / source, tmp_path / "b.zarr", **given, overwrite=True)
        back = spatialdata.read_zarr(tmp_path / "b.zarr")
        assert set(back.shapes) == {"s1", "s2"}
        np.testing.assert_array_equal(back["table"].obsm[Keys.PREDICTION], given["pos"])
        assert "ipar_empty" in back["table"].obs and back["table"].uns["ipar"]["version"] == "1"
        assert list(back["table"].obs_names) == list(adata.obs_names)
        back.validate_table_in_spatialdata(back["table"])
    with pytest.raises(UserError, match="already"):
        check_output(tmp_path / "b.zarr", tmp_path / "c.zarr", obsm=[Keys.PREDICTION])
    assert Keys.PREDICTION not in spatialdata.read_zarr(tmp_path / "a.zarr")["table"].obsm
    write_predictions(tmp_path / "a.zarr", tmp_path / "c.h5ad", **given)
    alone = anndata.read_h5ad(tmp_path / "c.h5ad")
    np.testing.assert_allclose(alone.obsm["spatial"], adata.obsm["spatial"])
    np.testing.assert_array_equal(alone.obsm[Keys.PREDICTION], given["pos"])
    part = {"pos": given["pos"][:26], "obs": {}}
    write_predictions(f"{tmp_path / 'a.zarr'}::s1", tmp_path / "d.h5ad", **part)
    assert set(anndata.read_h5ad(tmp_path / "d.h5ad").obs["region"]) == {"s1"}


def add_what_spatialdata_io_needs(folder, kind, cells):
    """Files that are no tables, which it opens on the way to them; and MERSCOPE in one order."""
    if kind == "MERSCOPE":
        file = folder / "cell_metadata.csv"
        table = pd.read_csv(file, index_col=0, dtype={"EntityID": str})
        table.loc[cells].to_csv(file)
    if kind == "Xenium":
        import zarr

        group = zarr.open_group(
            zarr.storage.ZipStore(folder / "cells.zarr.zip", mode="w"), mode="w", zarr_format=2
        )
        numbers = np.arange(1, len(cells) + 1, dtype=np.uint32)
        group["cell_id"] = np.column_stack([numbers, np.ones_like(numbers)])
        group["cell_summary"] = np.zeros((len(cells), 1))
        group["cell_summary"].attrs["column_names"] = ["z_level"]
        for mask in (0, 1):
            group[f"polygon_sets/{mask}/cell_index"] = numbers - 1
        group.store.close()
    if kind == "Stereo-seq cells":
        import tifffile

        for name in ("02.count", "03.register", "04.tissuecut", "051.cellcluster"):
            (folder / name).mkdir()
        write_folder(folder / "04.tissuecut", "Stereo-seq bins", make())
        (folder / "04.tissuecut" / "SS1.tissue.gef").rename(folder / "04.tissuecut" / "SS1.gef")
        (folder / "02.count" / "SS1.raw.gef").touch()
        clustered = anndata.AnnData(make().X, var=make().var)
        save(clustered, folder / "051.cellcluster" / "SS1.cell.cluster.h5ad")
        image = np.zeros((64, 64), np.uint8)
        for name in ("mask", "regist"):
            tifffile.imwrite(folder / "03.register" / f"SS1_{name}.tif", image)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PLATFORMS)
def test_tables_agree_with_spatialdata_io(tmp_path, kind):
    reason = "spatialdata-io is not installed"
    read = getattr(pytest.importorskip("spatialdata_io", reason=reason), PLATFORMS[kind])
    folder = tmp_path / "sample"
    cells = write_folder(folder, kind, make())
    add_what_spatialdata_io_needs(folder, kind, cells)
    options = {
        "Visium": {"dataset_id": "a"},
        "Visium HD": {"dataset_id": "a", "bin_size": 8, "load_segmentations_only": False},
        "Xenium": dict.fromkeys(
            ("cells_boundaries", "nucleus_boundaries", "cells_labels", "nucleus_labels"), False
        )
        | dict.fromkeys(("transcripts", "morphology_mip", "morphology_focus"), False),
        "MERSCOPE": {"transcripts": False, "cells_boundaries": False, "mosaic_images": False},
        "CosMx": {"transcripts": False},
        "Stereo-seq cells": {"read_square_bin": False},
    }
    try:
        theirs = next(iter(read(folder, **options[kind]).tables.values()))
    except TypeError as error:
        if "dtype" not in str(error):
            raise
        pytest.skip(f"spatialdata-io cannot read {kind} beside this anndata: {error}")
    ours = load_source(f"{folder}::square_008um" if kind == "Visium HD" else folder)
    assert vendor_files(Source.parse(f"{folder}::square_008um" if "HD" in kind else folder))
    if kind == "Stereo-seq cells":  # its names of cells come from another file
        theirs.obs_names = ours.obs_names
    assert set(ours.obs_names) == set(theirs.obs_names)
    theirs = theirs[ours.obs_names, ours.var_names]
    np.testing.assert_array_equal(ours.X.toarray(), np.asarray(theirs.X.toarray()))
    pos = theirs.obsm["global" if kind == "CosMx" else "spatial"]
    np.testing.assert_allclose(ours.obsm["spatial"], np.asarray(pos, dtype=float))


@pytest.fixture
def placed(small_run, small_slides):
    from ipar_sparse import IPAR
    from ipar_sparse.data.writers import to_anndata

    return IPAR.load(small_run).predict(to_anndata(small_slides[3]), copy=True)


def test_results_work_on_in_scanpy(placed, tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    scanpy = pytest.importorskip("scanpy", reason="scanpy is not installed")
    axes = scanpy.pl.embedding(placed, basis="ipar", color="layer", show=False)
    drawn = np.vstack([one.get_offsets() for one in axes.collections])
    assert len(drawn) == placed.n_obs
    np.testing.assert_allclose(np.sort(drawn[:, 0]), np.sort(placed.obsm[Keys.PREDICTION][:, 0]))
    scanpy.pp.neighbors(placed, use_rep=Keys.PREDICTION, n_neighbors=5)
    assert placed.obsp["connectivities"].shape == (140, 140)


def test_results_work_on_in_squidpy(placed):
    squidpy = pytest.importorskip("squidpy", reason="squidpy is not installed")
    squidpy.gr.spatial_neighbors(
        placed, spatial_key=Keys.PREDICTION, n_neighs=6, coord_type="generic"
    )
    graph = placed.obsp["spatial_connectivities"]
    assert graph.shape == (140, 140) and np.all(graph.getnnz(axis=1) >= 6)
    pos = placed.obsm[Keys.PREDICTION]
    near = np.argsort(np.linalg.norm(pos - pos[0], axis=1))[1:7]
    assert set(graph[0].indices) == set(near)
    placed.obs["layer"] = placed.obs["layer"].astype("category")
    squidpy.gr.nhood_enrichment(placed, cluster_key="layer", show_progress_bar=False, n_perms=5)
    assert "layer_nhood_enrichment" in placed.uns
