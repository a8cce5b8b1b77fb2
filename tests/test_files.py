"""Files as they come: folders of vendors, parts of files, SpatialData; what is refused."""

import importlib.util
import json
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata_files import make, save
from scipy import sparse
from vendor_files import CONTROLS, KINDS, write_10x_matrix, write_folder

from ipar_sparse.data.keys import Keys
from ipar_sparse.data.paths import Source
from ipar_sparse.data.readers import read_slides
from ipar_sparse.data.sources import load_source
from ipar_sparse.errors import UserError

NO_PARQUET = importlib.util.find_spec("pyarrow") is None
PARTS = {"Visium HD": "square_008um", "Stereo-seq bins": "bin50"}
UNITS = {
    "Visium": "pixel",
    "Xenium": "micrometer",
    "MERSCOPE": "micrometer",
    "CosMx": "pixel",
    "Slide-seq": "pixel",
    "Stereo-seq": "spot of the chip",
}


def small():
    """Cells with positions, for a folder of a vendor."""
    return make()


def refused(source, *words, **options):
    with pytest.raises(UserError) as caught:
        read_slides(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def needs_parquet(kind):
    if NO_PARQUET and kind in ("Visium HD", "Xenium"):
        pytest.skip("pyarrow is not installed")


def told_unit(kind):
    return UNITS[next(name for name in UNITS if kind.startswith(name))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_a_vendor_is_read_as_it_comes(tmp_path, kind):
    needs_parquet(kind)
    adata, folder = small(), tmp_path / "sample"
    cells = write_folder(folder, kind, adata)
    source = f"{folder}::{PARTS[kind]}" if kind in PARTS else folder
    (slide,) = read_slides(source, require_pos=True)
    order = [list(slide.cell_names).index(cell) for cell in cells]
    assert slide.name == (f"sample-{PARTS[kind]}" if kind in PARTS else "sample")
    assert list(slide.genes) == list(adata.var_names)
    np.testing.assert_array_equal(slide.expression.toarray()[order], adata.X.toarray())
    scale = 8 if kind == "Visium HD" else 1000 if kind.startswith("Stereo") else 1
    near = 0.5 if kind.startswith("Stereo") else 1e-9  # whole numbers on the chip
    np.testing.assert_allclose(slide.pos[order], adata.obsm["spatial"] * scale, atol=near)
    notes = "; ".join(slide.notes)
    assert told_unit(kind) in notes and kind.split(",")[0].split(" ")[0] in notes
    if kind[:5] not in ("Slide", "Stere"):
        left_out = load_source(source).uns[Keys.SOURCE]["left_out"]
        assert sum(n for what, n in left_out.items() if "rows" not in what) == CONTROLS
        assert "left out, as they are no genes" in notes
    assert slide.path == str(Source.parse(source))


def test_what_was_read_is_kept_with_a_file_that_is_written(tmp_path):
    write_folder(tmp_path / "a", "CosMx", small())
    load_source(tmp_path / "a").write_h5ad(tmp_path / "a.h5ad")
    made = anndata.read_h5ad(tmp_path / "a.h5ad").uns[Keys.SOURCE]
    assert made["format"] == "CosMx" and made["unit"] == "pixel"
    assert made["left_out"] == {"control probes": 2, "rows of counts outside cells": 2}
    write_folder(tmp_path / "b", "Stereo-seq cells", small())
    assert load_source(tmp_path / "b").uns[Keys.SOURCE]["microns_per_unit"] == 0.5


def test_a_matrix_of_cells_is_read_without_positions(tmp_path):
    adata, path = small(), tmp_path / "cells.h5"
    kinds = ["Gene Expression"] * adata.n_vars
    write_10x_matrix(path, adata.X.toarray(), adata.var_names, adata.obs_names, kinds)
    (slide,) = read_slides(path)
    assert slide.pos is None
    np.testing.assert_array_equal(slide.expression.toarray(), adata.X.toarray())
    refused(path, 'no obsm["spatial"]', require_pos=True)
    kinds = ["Protein"] * adata.n_vars
    write_10x_matrix(path, adata.X.toarray(), adata.var_names, adata.obs_names, kinds)
    refused(path, "no feature of type 'Gene Expression'")


def test_the_folder_above_outs_names_the_slide(tmp_path):
    write_folder(tmp_path / "brain" / "outs", "Visium", small())
    for folder in (tmp_path / "brain", tmp_path / "brain" / "outs"):
        assert read_slides(folder)[0].name == "brain"


def test_bins_are_asked_for_where_there_are_several(tmp_path):
    write_folder(tmp_path / "chip", "Stereo-seq bins", small())
    refused(tmp_path / "chip", "bin20, bin50, bin100", "pick one", "::bin20")
    refused(f"{tmp_path / 'chip'}::bin5", "bin20, bin50, bin100")
    assert read_slides(f"{tmp_path / 'chip' / 'SS1.tissue.gef'}::bin100")[0].num_cells == 40


def test_incomplete_folders_are_refused_in_one_line(tmp_path):
    adata = small()
    for kind, missing in (
        ("Visium", "spatial/tissue_positions.csv"),
        ("Xenium, csv", "cells.csv.gz"),
        ("CosMx", "S0_metadata_file.csv"),
    ):
        folder = tmp_path / kind
        write_folder(folder, kind, adata)
        (folder / missing).unlink()
        refused(folder, f"looks like {kind.split(',')[0]}", "beside the counts")
    folder = tmp_path / "twice"
    write_folder(folder, "MERSCOPE", adata)
    (folder / "b_cell_by_gene.csv").write_text("cell,a\n1,2\n")
    refused(folder, "could be meant", "folder of its own")
    folder = tmp_path / "other"
    write_folder(folder, "Slide-seq", adata)
    (folder / "BeadLocationsForR.csv").write_text("barcodes,xcoord,ycoord\ncell0,1,2\n")
    refused(folder, "does not name 39 of 40 cells")
    folder = tmp_path / "broken"
    write_folder(folder, "Xenium, csv", adata)
    (folder / "cell_feature_matrix.h5").write_bytes(b"not hdf")
    refused(folder, "is damaged or incomplete")


@pytest.mark.parametrize("kind", KINDS)
def test_tables_that_are_cut_off_are_refused_in_one_line(tmp_path, kind):
    needs_parquet(kind)
    folder = tmp_path / "a"
    write_folder(folder, kind, small())
    kinds = (".h5", ".gef", ".parquet", ".gz", ".csv")
    unread = {"S0_fov_positions_file.csv", "feature_slice.h5", "square_016um", "images"}
    files = [path for path in folder.rglob("*") if path.suffix in kinds]
    tables = [path for path in files if not unread & set(path.parts)]
    assert tables
    source = f"{folder}::{PARTS[kind]}" if kind in PARTS else folder
    for path in tables:
        whole = path.read_bytes()
        for content in (b"", whole[: len(whole) // 2], b"a,b\n1,2\n"):
            path.write_bytes(content)
            refused(source, str(tmp_path), require_pos=True)
        path.write_bytes(whole)
    read_slides(source, require_pos=True)


def test_anndata_may_be_called_h5(tmp_path):
    path = save(make(), tmp_path / "a.h5ad")
    path = path.rename(tmp_path / "a.h5")
    assert read_slides(path, require_pos=True)[0].num_cells == 40


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path / "a", "Xenium, csv", small())
    (tmp_path / "a" / "cells.csv.gz").rename(tmp_path / "a" / "cells.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(tmp_path / "a", "pyarrow is not installed: pip install 'ipar_sparse[vendors]'")


def test_a_part_of_a_file_is_a_slide(tmp_path):
    adata = make()
    path = save(adata, tmp_path / "both.h5ad")
    (slide,) = read_slides(f"{path}::s2", slide_key="section")
    part = adata[adata.obs["section"] == "s2"]
    assert slide.name == "both-s2" and list(slide.cell_names) == list(part.obs_names)
    np.testing.assert_array_equal(slide.rows, np.arange(14))
    assert slide.path == f"{path}::s2"
    again = load_source(slide.path, "section")
    assert list(again.obs_names) == list(slide.cell_names)
    refused(f"{path}::s2", "is not said", "--slide-key section")
    refused(f"{path}::s3", "no section 's3'", slide_key="section")
    refused(f"{path}::s1::s2", "pick one part", slide_key="section")
    refused(f"{path}::", "PATH::PART")


def test_positions_that_other_sections_lack_do_not_matter(tmp_path):
    adata = make()
    adata.obsm["spatial"][(adata.obs["section"] == "s1").to_numpy()] = np.nan
    path = save(adata, tmp_path / "a.h5ad")
    (slide,) = read_slides(f"{path}::s2", slide_key="section", require_pos=True)
    assert np.isfinite(slide.pos).all()
    refused(f"{path}::s1", "26 of 26 cells", slide_key="section", require_pos=True)


@pytest.mark.parametrize(
    ("file", "kind"), [("human_breast_st/A1", "Visium"), ("mouse_mpfc_starmap/BZ5", "MERSCOPE")]
)
def test_real_slides_are_the_same_as_folders_of_vendors(real_slides, tmp_path, file, kind):
    (expected,) = read_slides(real_slides / f"{file}.h5ad", require_pos=True)
    adata = anndata.read_h5ad(real_slides / f"{file}.h5ad")
    adata.obsm["spatial"] = expected.pos
    adata.X = sparse.csr_matrix(adata.X)
    cells = write_folder(tmp_path / "a", kind, adata)
    (slide,) = read_slides(tmp_path / "a", require_pos=True)
    at = {cell: row for row, cell in enumerate(slide.cell_names)}
    order = [at[cell] for cell in cells]
    assert (slide.expression[order] != expected.expression).nnz == 0
    np.testing.assert_array_equal(slide.pos[order], expected.pos)


def test_a_path_that_holds_the_mark_is_written_with_a_backslash(tmp_path):
    path = save(make(), tmp_path / "a::b.h5ad")
    (slide,) = read_slides(str(path).replace("::", r"\::"))
    assert slide.name == "a::b" and slide.num_cells == 40
    assert read_slides(slide.path)[0].name == "a::b"
    refused(path, "backslash", r"a\::b.h5ad")


@pytest.fixture
def command(capfd):
    """Runs a command, which must succeed or be refused in one line; gives what it printed."""
    cli = pytest.importorskip("ipar_sparse.cli.app")

    def run(*argv, code=0):
        capfd.readouterr()
        found = cli.run_command([str(word) for word in argv])
        out, err = capfd.readouterr()
        assert found == code, err
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code == 2) and "Traceback" not in err
        return errors[0] if errors else out + err

    return run


@pytest.fixture(scope="module")
def sections(small_slides, tmp_path_factory):
    """One file of four sections, which are in obs["section"]."""
    from ipar_sparse.data.writers import to_anndata

    parts = {name: to_anndata(one) for name, one in zip("ABCD", small_slides, strict=True)}
    adata = anndata.concat(parts, label="section", index_unique="-")
    return save(adata, tmp_path_factory.mktemp("sections") / "multi.h5ad")


def small_settings():
    from small_run import SMALL  # readers are tested without torch, too

    return [word for setting in SMALL for word in ("--set", setting)]


def test_sections_of_one_file_train_validate_and_are_placed(sections, tmp_path, command):
    run, key = tmp_path / "run", ("--slide-key", "section")
    train = [f"{sections}::A", f"{sections}::B", "--out", run, *key, *small_settings()]
    line = command("train", *train, "--val", f"{sections}::B", code=2)
    assert "both to train on and as --val" in line
    assert "both to train on" in command("train", *train, "--val", sections, code=2)
    command("train", *train, "--val", f"{sections}::C")
    recorded = json.loads((run / "inputs.json").read_text())
    assert [one["name"] for one in recorded["train"]] == ["multi-A", "multi-B"]
    assert [one["path"] for one in recorded["val"]] == [f"{sections}::C"]
    command("train", "--out", run, "--resume", "--set", "train.epochs=4")

    told = command("predict", run, f"{sections}::C", "--out", tmp_path / "c.h5ad")
    assert "multi-C decided when training stopped" in told
    placed = anndata.read_h5ad(tmp_path / "c.h5ad")
    assert placed.n_obs == 140 and set(placed.obs["section"]) == {"C"}
    assert np.isfinite(placed.obsm[Keys.PREDICTION]).all()

    alone = anndata.read_h5ad(sections)
    alone = alone[alone.obs["section"] == "D"].copy()
    alone.obs = alone.obs.rename(columns={"section": "piece"})
    other = save(alone, tmp_path / "other.h5ad")
    told = command("predict", run, other, sections, "--out", tmp_path / "both")
    assert "no obs column 'section', from which the run took its slides" in told
    both = [anndata.read_h5ad(tmp_path / "both" / f"{name}.h5ad") for name in ("other", "multi")]
    # each section is placed apart, with the same result as a file of its own
    again = both[1].obsm[Keys.PREDICTION][(both[1].obs["section"] == "D").to_numpy()]
    np.testing.assert_allclose(both[0].obsm[Keys.PREDICTION], again, atol=1e-4)
    command("predict", run, other, "--out", tmp_path / "p.h5ad", "--slide-key", "piece")
    line = command("predict", run, other, "--out", tmp_path / "q.h5ad", *key, code=2)
    assert "no obs column 'section'" in line


def test_several_inputs_go_to_a_folder(small_run, sections, tmp_path, command):
    twin = tmp_path / "multi.h5ad"
    twin.write_bytes(sections.read_bytes())
    predict = ["predict", small_run, sections, twin, "--out"]
    assert "go to a folder" in command(*predict, tmp_path / "a.h5ad", code=2)
    assert "would both be" in command(*predict, tmp_path / "a", code=2)
    assert not (tmp_path / "a").exists()


def test_predictions_go_to_a_table(small_run, sections, tmp_path, command):
    key = ("--slide-key", "section")
    command("predict", small_run, sections, "--out", tmp_path / "a.h5ad", *key)
    command("predict", small_run, sections, "--out", tmp_path / "a.csv", *key)
    command("predict", small_run, f"{sections}::D", "--out", tmp_path / "d.csv.gz", *key)
    command("embed", small_run, sections, "--out", tmp_path / "e.csv", *key)
    adata = anndata.read_h5ad(tmp_path / "a.h5ad")
    table = pd.read_csv(tmp_path / "a.csv", index_col="cell")
    assert list(table.columns[:2]) == ["ipar_1", "ipar_2"]
    assert list(table.index) == list(adata.obs_names)
    np.testing.assert_allclose(table[["ipar_1", "ipar_2"]], adata.obsm[Keys.PREDICTION], rtol=1e-5)
    if Keys.UNCERTAINTY in adata.obs:
        np.testing.assert_allclose(table[Keys.UNCERTAINTY], adata.obs[Keys.UNCERTAINTY], rtol=1e-5)
    assert len(pd.read_csv(tmp_path / "d.csv.gz")) == 140
    embedding = pd.read_csv(tmp_path / "e.csv", index_col="cell")
    np.testing.assert_allclose(embedding, adata.obsm[Keys.EMBEDDING], rtol=1e-4)


def test_folders_of_vendors_go_through_all_commands(small_slides, tmp_path, command):
    from ipar_sparse.data.writers import to_anndata

    kinds = ("Visium", "Xenium, csv", "MERSCOPE", "CosMx")
    folders = [tmp_path / kind.split(",")[0] for kind in kinds]
    for folder, kind, slide in zip(folders, kinds, small_slides, strict=True):
        write_folder(folder, kind, to_anndata(slide))
    told = command("convert", folders[1], tmp_path / "xenium.h5ad")
    assert "140 cells of 80 genes" in told and "1 Negative Control Probe" in told
    again = read_slides(tmp_path / "xenium.h5ad", require_pos=True)[0]
    np.testing.assert_array_equal(again.pos, small_slides[1].pos)
    assert "exists" in command("convert", folders[1], tmp_path / "xenium.h5ad", code=2)
    assert "end in .h5ad" in command("convert", folders[1], tmp_path / "x.csv", code=2)

    run = tmp_path / "run"
    train = [*folders[:2], "--val", folders[2], "--out", run, *small_settings()]
    command("train", *train)
    told = command("predict", run, folders[3], "--out", tmp_path / "cosmx.h5ad")
    assert "2 control probes" in told
    placed = anndata.read_h5ad(tmp_path / "cosmx.h5ad")
    assert placed.obsm[Keys.PREDICTION].shape == (140, 2)
    assert placed.uns[Keys.SOURCE]["format"] == "CosMx"
    told = command("evaluate", run, folders[3], "--out", tmp_path / "report", "--no-baselines")
    assert "\ndistance Spearman" in told.partition("CosMx: ")[2]
    assert "no zarr store" not in told and Path(tmp_path / "report" / "report.html").is_file()
    (tmp_path / "empty").mkdir()
    line = command("predict", run, tmp_path / "empty", "--out", tmp_path / "n.h5ad", code=2)
    assert "nor one of a known vendor" in line
