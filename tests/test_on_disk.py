"""Expression larger than memory gives the numbers of expression in memory."""

import os
from dataclasses import replace

import anndata
import numpy as np
import pytest
from anndata_files import make, save
from scipy import sparse

from ipar_sparse.config import RunConfig
from ipar_sparse.data import on_disk
from ipar_sparse.data.copies import slide_digest
from ipar_sparse.data.expression import Expression, cell_totals, select_genes
from ipar_sparse.data.input_profile import profile_inputs
from ipar_sparse.data.readers import read_slides
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.writers import write_slide
from ipar_sparse.errors import UserError
from ipar_sparse.usage import host_peak, reset_host_peak


@pytest.fixture
def streamed(monkeypatch):
    """Every stored matrix of more than 50 values goes through the disk, 1,000 values at a time."""

    def read(source, **given):
        with monkeypatch.context() as patch:
            patch.setattr(on_disk, "STREAM_VALUES", 50)
            patch.setattr(on_disk, "BLOCK", 1000)
            return read_slides(source, **given)

    return read


@pytest.fixture(scope="module")
def slide():
    return simulate("cortex", slides=1, spots=400, genes=80, seed=2)[0]


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("dense", [False, True])
def test_a_large_matrix_is_read_as_a_small_one(slide, streamed, tmp_path, suffix, dense):
    path = tmp_path / f"a{suffix}"
    write_slide(slide, path)
    if dense:
        adata = (anndata.read_zarr if suffix == ".zarr" else anndata.read_h5ad)(path)
        adata.X = adata.X.toarray()
        path = save(adata, tmp_path / f"b{suffix}")
    (small,), (large,) = read_slides(path), streamed(path)
    assert on_disk.is_on_disk(large.expression) and not on_disk.is_on_disk(small.expression)
    for name in ("data", "indices", "indptr"):
        assert np.array_equal(getattr(large.expression, name), getattr(small.expression, name))
    assert large.notes == small.notes and np.array_equal(large.empty, small.empty)
    assert slide_digest(large) == slide_digest(small)
    assert np.array_equal(cell_totals(large), cell_totals(small))
    some = np.array([3, 7, 100, 399])
    taken = on_disk.take_rows(large.expression, some)
    assert (taken != small.expression[some]).nnz == 0


def test_genes_and_what_the_encoder_reads_are_the_same(slide, streamed, tmp_path):
    path = tmp_path / "a.h5ad"
    write_slide(slide, path)
    (small,), (large,) = read_slides(path), streamed(path)
    data = RunConfig().replace(data={"max_genes": 30}).data
    (a,), known, _ = profile_inputs([small], data)
    (b,), also_known, _ = profile_inputs([large], data)
    assert known.genes == also_known.genes == select_genes([small], small.genes, 30)
    assert not on_disk.is_on_disk(b.expression) and b.expression.shape == (400, 30)
    rows = [Expression.from_slide(one, known.genes, 500.0).rows() for one in (a, b)]
    assert np.array_equal(*rows)


def test_an_object_in_backed_mode_is_read_from_its_file(slide, streamed, tmp_path):
    write_slide(slide, tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    (found,) = streamed(backed)
    assert on_disk.is_on_disk(found.expression)
    assert (found.expression != slide.expression).nnz == 0
    (part,) = streamed(backed[:100])
    assert (part.expression != slide.expression[:100]).nnz == 0


def test_oddities_of_a_large_matrix_are_found(streamed, tmp_path):
    adata = make()
    odd = sparse.csr_matrix(adata.X).astype(np.float32)
    odd.data[3] = np.nan
    adata.X = odd
    with pytest.raises(UserError, match="not finite"):
        streamed(save(adata, tmp_path / "nan.h5ad"))
    adata.X = sparse.csr_matrix(np.ones(adata.shape, np.float32))
    path = save(adata, tmp_path / "cut.h5ad")
    import h5py

    with h5py.File(path, "r+") as file:
        file["X/indices"][5] = adata.n_vars
    with pytest.raises(UserError, match="damaged"):
        streamed(path)


def test_a_full_disk_is_one_line(slide, streamed, tmp_path, monkeypatch):
    write_slide(slide, tmp_path / "a.h5ad")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="TMPDIR"):
        streamed(tmp_path / "a.h5ad")


def test_memory_holds_a_block_and_not_the_matrix(tmp_path, monkeypatch):
    """A matrix of 160 MB, of which 0.8 MB are to be in memory at a time."""
    n, genes = 40_000, 500
    rng = np.random.default_rng(0)
    matrix = sparse.csr_matrix(rng.integers(1, 9, (n, genes)).astype(np.float32))
    path = save(anndata.AnnData(X=matrix), tmp_path / "a.h5ad")
    bytes_held = matrix.data.nbytes + matrix.indices.nbytes
    del matrix
    monkeypatch.setattr(on_disk, "STREAM_VALUES", 1000)
    monkeypatch.setattr(on_disk, "BLOCK", 100_000)
    reset_host_peak(trim=True)
    before = host_peak()
    (slide,) = read_slides(path)
    wanted = slide.genes[:20]
    assert select_genes([replace(slide)], slide.genes, 20) and len(wanted) == 20
    assert host_peak() - before < 0.5 * bytes_held
