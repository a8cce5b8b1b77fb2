"""Slides in and predictions out: formats, recognised input, bad input, atomic writing."""

import subprocess
import sys
import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from ipar_sparse.data.anndata_io import (
    check_output,
    in_file_order,
    read_slides,
    write_predictions,
    write_slide,
)
from ipar_sparse.data.keys import Keys
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.slide import Slide
from ipar_sparse.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
N, G = 40, 12


def make(seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(1.0, (N, G)).astype(np.float32)
    counts[:, 0] += 1
    return anndata.AnnData(
        X=sparse.csr_matrix(counts),
        obs=pd.DataFrame(
            {
                "section": pd.Categorical(np.where(np.arange(N) % 3 == 0, "s2", "s1")),
                "area": rng.random(N),
                "barcode": [f"b{i}" for i in range(N)],
            },
            index=[f"cell{i}" for i in range(N)],
        ),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(G)]),
        obsm={"spatial": rng.random((N, 2)), "X_pca": rng.normal(size=(N, 5))},
        layers={"counts": counts.copy(), "log": sparse.csc_matrix(np.log1p(counts))},
        uns={"title": "mine"},
    )


def save(adata, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.write_zarr(path) if path.suffix == ".zarr" else adata.write_h5ad(path)
    return path


def load(path):
    return anndata.read_zarr(path) if path.suffix == ".zarr" else anndata.read_h5ad(path)


def fails(path, *words, **options):
    with pytest.raises(UserError) as caught:
        read_slides(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("store", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_matrix_is_read_as_written(tmp_path, suffix, store, dtype):
    adata = make()
    expected = adata.X.toarray()
    adata.X = store(expected.astype(dtype))
    (slide,) = read_slides(save(adata, tmp_path / f"a{suffix}"), require_pos=True)
    assert slide.name == "a"
    assert isinstance(slide.expression, sparse.csr_matrix)
    assert slide.expression.dtype == np.float32
    assert slide.expression.has_canonical_format
    np.testing.assert_array_equal(slide.expression.toarray(), expected)
    np.testing.assert_array_equal(slide.pos, adata.obsm["spatial"])
    assert list(slide.genes) == list(adata.var_names)
    assert list(slide.cell_names) == list(adata.obs_names)
    assert not slide.normalized and not slide.notes and not slide.empty.any()


def test_blocks_smaller_than_the_matrix_change_nothing(tmp_path, monkeypatch):
    adata = make()
    expected = adata.X.toarray()
    monkeypatch.setattr("ipar_sparse.data.anndata_io.BLOCK", 7)
    for layer in (None, "counts"):
        (slide,) = read_slides(save(adata, tmp_path / "a.h5ad"), layer=layer)
        np.testing.assert_array_equal(slide.expression.toarray(), expected)


def test_layers_and_raw(tmp_path):
    adata = make()
    adata.raw = adata[:, ::-1].copy()
    path = save(adata, tmp_path / "a.h5ad")
    (slide,) = read_slides(path, layer="log")
    assert slide.normalized and "whole numbers" in slide.notes[0]
    np.testing.assert_allclose(slide.expression.toarray(), np.log1p(adata.X.toarray()), rtol=1e-6)
    (slide,) = read_slides(path, layer="raw")
    assert list(slide.genes) == list(adata.var_names[::-1])
    np.testing.assert_array_equal(slide.expression.toarray(), adata.X.toarray()[:, ::-1])
    fails(path, "a.h5ad", "no layer 'count'", "did you mean 'counts'?", layer="count")


def test_normalized_is_recognised_and_can_be_decided(tmp_path):
    path = save(make(), tmp_path / "a.h5ad")
    assert read_slides(path, normalized=True)[0].normalized
    (slide,) = read_slides(path, layer="log", normalized=False)
    assert not slide.normalized and not slide.notes
    adata = make()
    adata.X = adata.X * np.float32(100.5)
    (slide,) = read_slides(save(adata, path))
    assert slide.normalized and any("too high for logarithms" in note for note in slide.notes)


def test_several_slides_in_one_file(tmp_path):
    adata = make()
    path = save(adata, tmp_path / "both.h5ad")
    slides = read_slides(path, slide_key="section", embedding="obsm:X_pca")
    assert [s.name for s in slides] == ["both-s2", "both-s1"]
    for slide, label in zip(slides, ["s2", "s1"], strict=True):
        part = adata[adata.obs["section"] == label]
        assert list(slide.cell_names) == list(part.obs_names)
        np.testing.assert_array_equal(slide.expression.toarray(), part.X.toarray())
        np.testing.assert_array_equal(slide.pos, part.obsm["spatial"])
        np.testing.assert_array_equal(slide.embedding, part.obsm["X_pca"].astype(np.float32))
        np.testing.assert_array_equal(slide.obs["area"], part.obs["area"])
        assert set(slide.obs["section"]) == {label}
    back = in_file_order(slides, [s.pos for s in slides])
    np.testing.assert_array_equal(back, adata.obsm["spatial"])
    half = in_file_order(slides[:1], [slides[0].pos])
    assert np.isnan(half[1]).all() and half.shape[0] == slides[0].rows.max() + 1
    fails(path, "no obs column 'sections'", "'section'", slide_key="sections")
    fails(path, "s2", "has 14 cells", "at least 20", slide_key="section", min_cells=20)


def test_label_columns_are_carried_and_names_are_not(tmp_path):
    adata = make()
    adata.obs["barcode"] = [f"b{i}" for i in range(N)]
    adata = anndata.concat([adata, adata, adata], index_unique="-")
    adata.obs["barcode"] = adata.obs_names
    adata.obs["age"] = pd.array([None, *range(3 * N - 1)], dtype="Int64")
    adata.obs["good"] = True
    (slide,) = read_slides(save(adata, tmp_path / "a.h5ad"))
    assert set(slide.obs) == {"section", "area", "age", "good"}
    assert np.isnan(slide.obs["age"][0]) and slide.obs["age"][2] == 1
    assert slide.obs["good"].dtype == bool


def test_embedding_without_expression(tmp_path):
    adata = make()
    bare = anndata.AnnData(obs=adata.obs, obsm=dict(adata.obsm))
    path = save(bare, tmp_path / "a.h5ad")
    (slide,) = read_slides(path, embedding="obsm:X_pca")
    assert slide.expression is None and slide.embedding.shape == (N, 5)
    fails(path, "X is empty")
    fails(path, 'no obsm["X_pc"]', "'X_pca'", embedding="obsm:X_pc")
    fails(path, "write it as obsm:KEY", embedding="X_pca")


def test_odd_but_usable_input_is_kept_and_noted(tmp_path):
    adata = make()
    counts = adata.X.toarray()
    counts[[3, 5]] = 0
    adata.X = sparse.csr_matrix(counts)
    pos = np.column_stack([adata.obsm["spatial"], np.zeros(N)])
    pos[7] = pos[8]
    adata.obsm["spatial"] = pos
    names = [f"gene{i}" for i in range(G)]
    names[4] = names[9] = "gene2"
    adata.var_names = names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = save(adata, tmp_path / "a.h5ad")
    (slide,) = read_slides(path, require_pos=True)
    assert list(np.flatnonzero(slide.empty)) == [3, 5]
    assert slide.pos.shape == (N, 2)
    assert len(set(slide.genes)) == G and list(slide.genes[[2, 4, 9]]) == [
        "gene2",
        "gene2-1",
        "gene2-2",
    ]
    notes = "; ".join(slide.notes)
    for told in ("2 of 40 cells have no counts", "cell3, cell5", "1 cells share", "three columns"):
        assert told in notes
    assert "1 gene names occur more than once (gene2)" in notes


def test_explicit_zeros_do_not_hide_an_empty_cell(tmp_path):
    adata = make()
    adata.X.data[adata.X.indptr[2] : adata.X.indptr[3]] = 0
    (slide,) = read_slides(save(adata, tmp_path / "a.h5ad"))
    assert list(np.flatnonzero(slide.empty)) == [2]


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_bad_positions(tmp_path, suffix):
    adata = make()
    del adata.obsm["spatial"]
    adata.obsm["X_spatial"] = np.zeros((N, 2))
    path = save(adata, tmp_path / f"a{suffix}")
    fails(path, 'no obsm["spatial"]', "'X_spatial'", require_pos=True)
    assert read_slides(path)[0].pos is None

    adata.obsm["spatial"] = np.zeros((N, 4))
    fails(save(adata, path), "40 x 4", "expected 40 x 2", require_pos=True)

    adata.obsm["spatial"] = np.zeros((N, 2))
    adata.obsm["spatial"][[4, 6], 1] = np.nan
    path = save(adata, path)
    fails(path, "NaN", "2 of 40 cells", "cell4, cell6", require_pos=True)
    (slide,) = read_slides(path)
    assert slide.pos is None and "left out" in slide.notes[0]


@pytest.mark.parametrize(
    ("value", "word"), [(-1, "negative"), (np.nan, "not finite"), (np.inf, "not finite")]
)
@pytest.mark.parametrize("store", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_impossible_counts(tmp_path, value, word, store):
    adata = make()
    counts = adata.X.toarray()
    counts[11, 3] = value
    adata.X = store(counts)
    path = save(adata, tmp_path / "a.h5ad")
    fails(path, "a.h5ad, X", word, "cell11", "gene3")
    if value == -1:
        assert read_slides(path, normalized=True)[0].expression.min() == -1
    else:
        fails(path, word, normalized=True)


def test_duplicate_cell_names(tmp_path):
    adata = make()
    adata.obs_names = ["cell0", "cell0", *adata.obs_names[2:]]
    fails(save(adata, tmp_path / "a.h5ad"), "1 cell names", "cell0", "obs_names_make_unique")


def test_too_few_cells(tmp_path):
    fails(save(make(), tmp_path / "a.h5ad"), "has 40 cells, at least 96", min_cells=96)
    empty = make()[:0].copy()
    fails(save(empty, tmp_path / "b.h5ad"), "has no cells")


def test_unreadable_files(tmp_path):
    fails(tmp_path / "none.h5ad", "no such file")
    path = tmp_path / "a.h5ad"
    path.write_text("barcode,x,y\n")
    fails(path, "is not an h5ad file")
    path.write_bytes(b"")
    fails(path, "is empty")
    whole = save(make(), tmp_path / "b.h5ad").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    fails(path, "truncated")
    path.write_bytes(whole[:-500])
    fails(path, "truncated")
    with h5py.File(path, "w") as f:
        f["matrix"] = np.zeros(3)
    fails(path, "is no AnnData file")
    (tmp_path / "folder").mkdir()
    fails(tmp_path / "folder", "not a zarr store")


def test_damaged_sparse_matrix(tmp_path):
    path = save(make(), tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as f:
        f["X/indices"][0] = G + 5
    fails(path, "sparse matrix is damaged")
    adata = make()
    adata.write_h5ad(path, compression="gzip")
    with h5py.File(path, "r+") as f:
        where = f["X/data"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[where : where + 20] = b"x" * 20
    path.write_bytes(content)
    fails(path, "is damaged", "copy or export it again")
    path = save(make(), tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as f:
        del f["X/indptr"]
    fails(path, "damaged")


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_slide_round_trip(tmp_path, suffix):
    (slide,) = read_slides(save(make(), tmp_path / "a.h5ad"), embedding="obsm:X_pca")
    path = tmp_path / f"b{suffix}"
    write_slide(slide, path)
    (back,) = read_slides(path, embedding="obsm:X_embedding")
    assert (back.expression != slide.expression).nnz == 0
    for name in ("genes", "cell_names", "pos", "embedding"):
        np.testing.assert_array_equal(getattr(back, name), getattr(slide, name))
    for key, value in slide.obs.items():
        np.testing.assert_array_equal(back.obs[key], value)
    with pytest.raises(UserError, match="exists"):
        write_slide(slide, path, overwrite=False)


@pytest.mark.parametrize("source_suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("out_suffix", [".h5ad", ".zarr"])
def test_predictions_are_added_and_nothing_else_changes(tmp_path, source_suffix, out_suffix):
    adata = make()
    source = save(adata, tmp_path / f"a{source_suffix}")
    out = tmp_path / "deep" / f"b{out_suffix}"
    rng = np.random.default_rng(1)
    pos, vectors = rng.normal(size=(N, 2)), rng.normal(size=(N, 8)).astype(np.float32)
    uns = {
        "version": "1.0",
        "graph": {"k": 100, "recall": 0.97, "backend": None, "approximate": False},
        "names": ["a", "b"],
        "sizes": (1, 2),
        "mixed": [1, "x", {"y": 2}],
        "path": Path("run"),
    }
    obs = {Keys.EMPTY: np.zeros(N, bool), "ipar_kind": np.array(["x", "y"] * (N // 2))}
    write_predictions(source, out, pos=pos, embedding=vectors, obs=obs, uns=uns)
    back = load(out)
    np.testing.assert_array_equal(back.obsm[Keys.PREDICTION], pos)
    np.testing.assert_array_equal(back.obsm[Keys.EMBEDDING], vectors)
    assert list(back.obs.columns) == [*adata.obs.columns, Keys.EMPTY, "ipar_kind"]
    assert back.obs[Keys.EMPTY].dtype == bool
    assert list(back.obs["ipar_kind"][:2]) == ["x", "y"]
    assert back.uns[Keys.UNS]["graph"]["recall"] == 0.97
    assert "backend" not in back.uns[Keys.UNS]["graph"]
    assert list(back.uns[Keys.UNS]["names"]) == ["a", "b"]
    assert list(back.uns[Keys.UNS]["sizes"]) == [1, 2]
    assert back.uns["title"] == "mine"
    np.testing.assert_array_equal(back.X.toarray(), adata.X.toarray())
    for key in adata.layers:
        assert (abs(sparse.csr_matrix(back.layers[key] - adata.layers[key]))).max() == 0
    for key in adata.obsm:
        np.testing.assert_array_equal(back.obsm[key], adata.obsm[key])
    pd.testing.assert_frame_equal(back.obs[adata.obs.columns], load(source).obs)
    assert sorted(p.name for p in out.parent.iterdir()) == [out.name]


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_nothing_is_overwritten_unasked(tmp_path, suffix):
    source = save(make(), tmp_path / f"a{suffix}")
    out, again = tmp_path / f"b{suffix}", tmp_path / f"c{suffix}"
    write_predictions(source, out, pos=np.zeros((N, 2)), obs={Keys.EMPTY: np.zeros(N, bool)})
    with pytest.raises(UserError, match="exists; .*--overwrite"):
        write_predictions(source, out, pos=np.ones((N, 2)))
    with pytest.raises(UserError, match=r"obsm\['X_ipar'\], uns\['ipar'\] already.*--overwrite"):
        write_predictions(out, again, pos=np.ones((N, 2)))
    with pytest.raises(UserError, match="is the input itself"):
        write_predictions(out, out, pos=np.ones((N, 2)), overwrite=True)
    assert load(out).obsm[Keys.PREDICTION].max() == 0 and not again.exists()
    write_predictions(source, out, pos=np.ones((N, 2)), overwrite=True)
    assert load(out).obsm[Keys.PREDICTION].min() == 1
    write_predictions(
        out, again, pos=np.full((N, 2), 2.0), obs={Keys.EMPTY: np.ones(N, bool)}, overwrite=True
    )
    back = load(again)
    assert back.obsm[Keys.PREDICTION].min() == 2 and back.obs[Keys.EMPTY].all()
    assert list(tmp_path.glob(".*")) == []
    with pytest.raises(UserError, match="must end in .h5ad or .zarr"):
        check_output(source, tmp_path / "b.csv")


def test_wrong_number_of_rows_is_a_programming_error(tmp_path):
    source = save(make(), tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match="X_ipar has 3 rows, expected 40"):
        write_predictions(source, tmp_path / "b.h5ad", pos=np.zeros((3, 2)))
    with pytest.raises(ValueError, match="holds '/'"):
        write_predictions(source, tmp_path / "b.h5ad", pos=np.zeros((N, 2)), uns={"a/b": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5ad"]


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_write_leaves_no_trace(tmp_path, monkeypatch, suffix, error):
    source = save(make(), tmp_path / f"a{suffix}")
    out = tmp_path / f"b{suffix}"
    write_predictions(source, out, pos=np.zeros((N, 2)))
    (before,) = read_slides(out, spatial_key=Keys.PREDICTION)

    def stop(*_):
        raise error

    monkeypatch.setattr("ipar_sparse.data.anndata_io._sync", stop)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else UserError
    with pytest.raises(expected) as caught:
        write_predictions(source, out, pos=np.ones((N, 2)), overwrite=True)
    if expected is UserError:
        assert "No space left on device" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == [source.name, out.name]
    (after,) = read_slides(out, spatial_key=Keys.PREDICTION)
    np.testing.assert_array_equal(after.pos, before.pos)


@pytest.mark.parametrize(("suffix", "limit"), [(".h5ad", 1_600_000), (".zarr", 100_000)])
def test_a_write_that_hits_the_limit_of_the_disk(tmp_path, suffix, limit):
    adata = make()
    adata.obsm["large"] = np.random.default_rng(0).random((N, 4000))
    source = save(adata, tmp_path / f"a{suffix}")
    script = f"""
import resource, signal, sys
import numpy as np
from ipar_sparse.errors import UserError
from ipar_sparse.data.anndata_io import write_predictions
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    write_predictions({str(source)!r}, {str(tmp_path / ("b" + suffix))!r},
        pos=np.zeros(({N}, 2)), embedding=np.random.random(({N}, 30000)))
except UserError as error:
    print("USER", error)
    sys.exit(2)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stdout and "File too large" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == [source.name]


@pytest.mark.slow
def test_a_large_sparse_matrix_is_never_dense(tmp_path):
    n, genes, per_cell = 30_000, 20_000, 200
    path = tmp_path / "large.h5ad"
    rng = np.random.default_rng(0)
    indices = (np.arange(per_cell) * (genes // per_cell) + rng.integers(0, 100, (n, 1))).ravel()
    adata = anndata.AnnData(
        X=sparse.csr_matrix(
            (
                rng.integers(1, 9, n * per_cell).astype(np.float32),
                indices.astype(np.int32),
                np.arange(n + 1) * per_cell,
            ),
            shape=(n, genes),
        )
    )
    save(adata, path)
    script = f"""
import resource, sys
import ipar_sparse.data.anndata_io as io
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
slide, = io.read_slides({str(path)!r})
assert slide.expression.nnz == {n * per_cell}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    stored = 8 * n * per_cell / 1024
    assert int(done.stdout) < 4 * stored + 100_000  # dense would be 2,400,000


@pytest.mark.parametrize(
    ("file", "cells", "genes", "normalized", "column"),
    [
        ("human_breast_st/A1", 346, 11671, False, "donor"),
        ("mouse_embryo_seqfish/embryo1", 3848, 351, True, "cell_type"),
        ("mouse_hypothalamus_merfish/a1_m0_09", 5557, 135, True, "cell_class"),
        ("mouse_mpfc_starmap/BZ5", 1049, 166, False, "layer"),
    ],
)
def test_real_slides(real_slides, file, cells, genes, normalized, column):
    (slide,) = read_slides(real_slides / f"{file}.h5ad", require_pos=True)
    assert slide.expression.shape == (cells, genes)
    assert slide.normalized is normalized and column in slide.obs
    assert slide.pos.std(axis=0).min() > 0


def test_slide_checks_its_shapes():
    with pytest.raises(ValueError, match=r"pos has shape \(2, 3\), expected \(2, 2\)"):
        Slide("a", None, np.empty(0, str), np.array(["x", "y"]), pos=np.zeros((2, 3)))
    matrix = sparse.csr_matrix([[0, 1.0], [0, 0]])
    slide = Slide("a", matrix, np.array(["g", "h"]), np.array(["x", "y"]))
    assert list(slide.empty) == [False, True] and list(slide.rows) == [0, 1]
    assert repr(slide) == "Slide('a', 2 cells, 2 genes (counts), without positions)"


def test_cells_taken_from_a_slide_bring_all_that_is_theirs():
    matrix = sparse.csr_matrix([[0, 1.0], [0, 0], [2, 0]])
    slide = Slide(
        "a",
        matrix,
        np.array(["g", "h"]),
        np.array(["x", "y", "z"]),
        pos=np.eye(3)[:, :2],
        obs={"layer": np.array([4, 5, 6])},
    )
    part = slide.take(np.array([2, 1]))
    assert list(part.cell_names) == ["z", "y"] and list(part.rows) == [2, 1]
    assert part.expression.toarray().tolist() == [[2, 0], [0, 0]] and part.embedding is None
    assert part.pos.tolist() == [[0, 0], [0, 1]] and list(part.obs["layer"]) == [6, 5]
    assert list(part.empty) == [False, True] and slide.num_cells == 3


def write_10x_matrix(path, counts, genes, barcodes):
    """As Space Ranger and Xenium write it: features x barcodes, CSC."""
    with h5py.File(path, "w") as f:
        group = f.create_group("matrix")
        matrix = sparse.csc_matrix(counts.T.astype(np.int32))
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        group["shape"] = matrix.shape
        group["barcodes"] = np.array(barcodes, dtype="S")
        features = group.create_group("features")
        features["id"] = np.array([f"ENSG{i}" for i in range(len(genes))], dtype="S")
        features["name"] = np.array(genes, dtype="S")
        kinds = ["Gene Expression"] * (len(genes) - 1) + ["Negative Control Probe"]
        features["feature_type"] = np.array(kinds, dtype="S")


def vendor_files(folder, kind, adata):
    """The files a vendor's software leaves, rows of the position table in another order."""
    counts, cells, genes = adata.X.toarray(), list(adata.obs_names), list(adata.var_names)
    x, y = adata.obsm["spatial"].T
    order = np.random.default_rng(0).permutation(N)
    if kind == "Visium":
        (folder / "spatial").mkdir()
        write_10x_matrix(folder / "filtered_feature_bc_matrix.h5", counts, genes, cells)
        pd.DataFrame(
            {
                "barcode": cells,
                "in_tissue": 1,
                "array_row": 0,
                "array_col": 0,
                "pxl_row_in_fullres": y,
                "pxl_col_in_fullres": x,
            }
        ).iloc[order].to_csv(folder / "spatial" / "tissue_positions.csv", index=False)
        return genes[:-1]
    if kind == "Xenium":
        write_10x_matrix(folder / "cell_feature_matrix.h5", counts, genes, cells)
        frame = pd.DataFrame({"cell_id": cells, "x_centroid": x, "y_centroid": y})
        frame.iloc[order].to_csv(folder / "cells.csv.gz", index=False)
        return genes[:-1]
    genes = [*genes[:-1], "Blank-1"]
    frame = pd.DataFrame(counts, index=pd.Index(cells, name="cell"), columns=genes)
    frame.to_csv(folder / "cell_by_gene.csv")
    frame = pd.DataFrame({"EntityID": cells, "fov": 0, "center_x": x, "center_y": y})
    frame.iloc[order].to_csv(folder / "cell_metadata.csv", index=False)
    return genes[:-1]


@pytest.mark.parametrize("kind", ["Visium", "Xenium", "MERFISH"])
def test_conversion_recipes_of_the_data_page_work(tmp_path, kind):
    page = (ROOT / "data" / "README.md").read_text()
    blocks = {
        title.split()[0]: body.split("```python\n")[1].split("```")[0]
        for title, body in (part.split("\n", 1) for part in page.split("\n### ")[1:])
        if "```python" in body
    }
    adata = make()
    genes = vendor_files(tmp_path, kind, adata)
    code = "" if kind == "MERFISH" else blocks["Counts"]
    subprocess.run([sys.executable, "-c", code + blocks[kind]], cwd=tmp_path, check=True)
    (slide,) = read_slides(tmp_path / f"{kind.lower()}.h5ad", require_pos=True)
    assert list(slide.genes) == genes and list(slide.cell_names) == list(adata.obs_names)
    np.testing.assert_array_equal(slide.expression.toarray(), adata.X.toarray()[:, :-1])
    np.testing.assert_allclose(slide.pos, adata.obsm["spatial"])


def test_sample_in_the_repository_is_what_the_command_makes():
    files = sorted((ROOT / "data" / "sample").glob("*.h5ad"))
    assert sum(f.stat().st_size for f in files) < 900_000
    slides = simulate("cortex", slides=3, spots=500, genes=300, seed=0)
    assert [f.stem for f in files] == [s.name for s in slides]
    for file, slide in zip(files, slides, strict=True):
        (back,) = read_slides(file, require_pos=True)
        assert (back.expression != slide.expression).nnz == 0
        np.testing.assert_allclose(back.pos, slide.pos)
        np.testing.assert_array_equal(back.obs["layer"], slide.obs["layer"])
