"""AnnData files to slides: formats, recognised input, bad input."""

import subprocess
import sys
import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from anndata_files import G, N, make, save
from scipy import sparse

from ipar_sparse.config.schema import DataConfig
from ipar_sparse.data.headers import check_headers
from ipar_sparse.data.readers import read_file, read_slides
from ipar_sparse.data.slide import in_file_order
from ipar_sparse.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


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
    monkeypatch.setattr("ipar_sparse.data.readers.BLOCK", 7)
    for layer in (None, "counts"):
        (slide,) = read_slides(save(adata, tmp_path / "a.h5ad"), layer=layer)
        np.testing.assert_array_equal(slide.expression.toarray(), expected)


def test_layers_and_raw(tmp_path):
    adata = make()
    adata.raw = adata[:, ::-1].copy()
    path = save(adata, tmp_path / "a.h5ad")
    (slide,) = read_slides(path, layer="log")
    assert not slide.normalized and "log1p of counts: turned back" in slide.notes[0]
    np.testing.assert_allclose(slide.expression.toarray(), adata.X.toarray(), rtol=1e-6)
    (slide,) = read_slides(path, layer="log", normalized=True)
    assert slide.normalized and not slide.notes
    np.testing.assert_allclose(slide.expression.toarray(), np.log1p(adata.X.toarray()), rtol=1e-6)
    (slide,) = read_slides(path, layer="raw")
    assert list(slide.genes) == list(adata.var_names[::-1])
    np.testing.assert_array_equal(slide.expression.toarray(), adata.X.toarray()[:, ::-1])
    fails(path, "a.h5ad", "no layer 'count'", "did you mean 'counts'?", layer="count")


def test_normalized_is_recognised_and_can_be_decided(tmp_path):
    path = save(make(), tmp_path / "a.h5ad")
    assert read_slides(path, normalized=True)[0].normalized
    (slide,) = read_slides(path, layer="log", normalized=False)
    assert not slide.normalized and "log1p of counts, but taken as counts" in slide.notes[0]
    adata = make()
    adata.X = adata.X.multiply(np.linspace(50.5, 99, G)).tocsr()
    (slide,) = read_slides(save(adata, path))
    assert not slide.normalized and any("vary too much for logarithms" in n for n in slide.notes)


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


def test_a_file_is_read_as_a_configuration_says(tmp_path):
    path = save(make(), tmp_path / "a.h5ad")
    data = DataConfig(layer="log", slide_key="section", embedding="obsm:X_pca")
    slides = read_file(path, data, require_pos=True)
    assert [s.name for s in slides] == ["a-s2", "a-s1"]
    assert not slides[0].normalized and slides[0].embedding.shape[1] == 5
    assert slides[0].path == str(path.absolute())
    (plain,) = read_file(path, DataConfig(layer="X", normalized=True), require_pos=False)
    np.testing.assert_array_equal(plain.expression.toarray(), make().X.toarray())
    assert plain.normalized
    with pytest.raises(UserError, match="at least 41"):
        read_file(path, DataConfig(), require_pos=True, min_cells=41)
    with pytest.raises(UserError, match="did you mean 'spatial'"):
        read_file(path, DataConfig(spatial_key="spatia"), require_pos=True)


def test_label_columns_are_kept_and_names_are_not(tmp_path):
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
    assert list(slide.genes) == [f"gene{i}" for i in range(G) if i not in (4, 9)]
    added = slide.expression[:, 2].toarray().ravel()
    np.testing.assert_array_equal(added, counts[:, [2, 4, 9]].sum(1))
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
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    fails(path, "git lfs pull")
    table = tmp_path / "a.csv"
    table.write_text("cell,Gene1\nc1,3\n")
    fails(table, "is a table; make AnnData of it")
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
from ipar_sparse.data.readers import read_slides
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
slide, = read_slides({str(path)!r})
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


def test_names_beside_a_mask_are_read_as_anndata_of_2026_writes_them(tmp_path):
    from anndata.io import read_elem, write_elem

    path = save(make(), tmp_path / "a.h5ad")
    with (
        h5py.File(path, "r+") as file,
        anndata.settings.override(allow_write_nullable_strings=True),
    ):
        for frame in (file["obs"], file["var"]):
            key = frame.attrs["_index"]
            names = pd.array(np.asarray(read_elem(frame[key]), dtype=str), dtype="string")
            del frame[key]
            write_elem(frame, key, names)
    data = DataConfig()
    (size,) = check_headers([Path(path)], data, require_pos=True)
    (slide,) = read_file(path, data, require_pos=True)
    assert size.cells == slide.num_cells == N
    np.testing.assert_array_equal(slide.cell_names, make().obs_names)
