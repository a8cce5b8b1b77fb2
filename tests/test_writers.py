"""Slides and predictions to AnnData files: what is added, kept, refused; interrupted writes."""

import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata_files import N, make, save
from scipy import sparse

from ipar_sparse.data.headers import check_output
from ipar_sparse.data.keys import Keys
from ipar_sparse.data.readers import read_slides
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.writers import add_predictions, write_predictions, write_slide
from ipar_sparse.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def load(path):
    return anndata.read_zarr(path) if path.suffix == ".zarr" else anndata.read_h5ad(path)


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
    with pytest.raises(UserError, match="must end in .h5ad, .zarr, .csv"):
        check_output(source, tmp_path / "b.txt")


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

    monkeypatch.setattr("os.fsync", stop)
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
from ipar_sparse.data.writers import write_predictions
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


@pytest.mark.parametrize("out_suffix", [".h5ad", ".zarr"])
def test_results_are_written_without_a_copy_of_what_they_were_made_of(tmp_path, out_suffix):
    adata = make()
    adata.obsm[Keys.PREDICTION] = np.zeros((N, 2))  # of an earlier run: stays where it is
    source, out = save(adata, tmp_path / "a.h5ad"), tmp_path / f"b{out_suffix}"
    pos, rmse = np.random.default_rng(1).normal(size=(N, 2)), np.ones(N)
    given = {"pos": pos, "obs": {Keys.UNCERTAINTY: rmse}, "uns": {"version": "1.0"}}
    write_predictions(source, out, **given, results_alone=True)
    found = load(out)
    assert list(found.obs_names) == list(adata.obs_names) and found.n_vars == 0
    assert list(found.obsm) == [Keys.PREDICTION] and list(found.obs) == [Keys.UNCERTAINTY]
    np.testing.assert_array_equal(found.obsm[Keys.PREDICTION], pos)
    assert found.uns[Keys.UNS]["version"] == "1.0"
    with pytest.raises(UserError, match="exists"):
        write_predictions(source, out, **given, results_alone=True)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr", "memory"])
def test_columns_of_an_earlier_prediction_do_not_outlive_it(tmp_path, suffix):
    adata = make()
    adata.obs = adata.obs.assign(mine=1, **{Keys.EMPTY: True, Keys.TYPICALITY: 0.5})
    given = {"pos": np.zeros((N, 2)), "obs": {Keys.UNCERTAINTY: np.ones(N)}, "uns": {}}
    if suffix == "memory":
        add_predictions(adata, **given)
    else:
        source, out = save(adata, tmp_path / f"a{suffix}"), tmp_path / f"b{suffix}"
        write_predictions(source, out, **given, overwrite=True)
        adata = load(out)
    assert "mine" in adata.obs and Keys.UNCERTAINTY in adata.obs
    assert not {Keys.EMPTY, Keys.TYPICALITY} & set(adata.obs)
