"""Cells assigned to the spots of a training slide, and what is expected at each spot."""

from dataclasses import replace

import anndata
import numpy as np
import pytest
from scipy import sparse
from small_run import small_config

from ipar_sparse import IPAR, UserError, composition, expected_expression
from ipar_sparse.cli import run_command
from ipar_sparse.data.keys import Keys
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.writers import to_anndata, write_slide
from ipar_sparse.geometry.alignment import align
from ipar_sparse.train.fit import fit


@pytest.fixture(scope="module")
def slides():
    return simulate("cortex", slides=3, spots=300, genes=120)


@pytest.fixture(scope="module")
def run(slides, tmp_path_factory):
    out = tmp_path_factory.mktemp("mapping") / "run"
    config = small_config("encoder.steps=30", "graph.k=30", "model.recycling=false")
    fit(slides[:2], [], config, out)
    return out


@pytest.fixture(scope="module")
def mapped(run, slides, tmp_path_factory):
    """The cells with their positions in the frame of the first slide, and the mapping onto it."""
    path = tmp_path_factory.mktemp("mapped") / "map.h5ad"
    cells = to_anndata(slides[2])
    placed = IPAR.load(run).predict(cells, copy=True, reference=to_anndata(slides[0]), mapping=path)
    return placed, anndata.read_h5ad(path)


def test_rows_sum_to_one_and_cells_go_to_spots_where_they_lie(mapped, slides):
    placed, mapping = mapped
    assert mapping.shape == (300, 300) and sparse.issparse(mapping.X)
    assert list(mapping.obs_names) == list(placed.obs_names)
    assert list(mapping.var_names) == list(slides[0].cell_names)
    np.testing.assert_allclose(mapping.varm[Keys.SPATIAL], slides[0].pos)
    total = np.asarray(mapping.X.sum(axis=1)).ravel()
    without = np.isnan(placed.obsm[Keys.REFERENCE]).any(1)
    np.testing.assert_allclose(total, np.where(without, 0, 1), atol=1e-5)
    assert 0 < without.sum() < 30 and np.diff(mapping.X.indptr).max() <= 100
    assert mapping.X.data.min() > 0
    mean = (mapping.X @ slides[0].pos)[~without]
    radius = placed.uns["ipar"]["reference"]["rms_radius"]
    apart = np.linalg.norm(mean - placed.obsm[Keys.REFERENCE][~without], axis=1)
    assert np.median(apart) < 0.2 * radius
    tissue = [np.stack([one.obs["tissue_x"], one.obs["tissue_y"]], axis=1) for one in slides]
    true = align(tissue[0], slides[0].pos)[1](tissue[2])[~without]
    assert np.median(np.linalg.norm(mean - true, axis=1)) < 0.7 * radius


def test_expected_composition_follows_the_tissue(mapped, slides):
    _, mapping = mapped
    shares = composition(mapping, "layer")
    known = shares.notna().all(axis=1).to_numpy()
    np.testing.assert_allclose(shares[known].sum(axis=1), 1, atol=1e-5)
    labels = mapping.obs["layer"].astype(str).to_numpy()
    for spot in np.flatnonzero(known)[:5]:
        weight = mapping.X[:, spot].toarray().ravel()
        expected = [weight[labels == label].sum() / weight.sum() for label in shares.columns]
        np.testing.assert_allclose(shares.iloc[spot], expected, atol=1e-5)
    most = shares[known].to_numpy().argmax(1)
    guessed = np.asarray(shares.columns)[most]
    measured = np.asarray(slides[0].obs["layer"]).astype(str)[known]
    usual = max((measured == label).mean() for label in shares.columns)
    assert (guessed == measured).mean() > usual + 0.1
    with pytest.raises(UserError, match="no obs column 'type'"):
        composition(mapping, "type")


def test_expected_expression_is_the_mean_of_the_cells_at_a_spot(mapped, slides):
    placed, mapping = mapped
    spots = expected_expression(mapping, placed)
    assert spots.shape == (300, placed.n_vars)
    np.testing.assert_allclose(spots.obsm[Keys.SPATIAL], slides[0].pos)
    weight, counts = mapping.X.toarray(), placed.X.toarray()
    np.testing.assert_allclose(spots.obs[Keys.CELLS], weight.sum(0), rtol=1e-5)
    some = np.flatnonzero(weight.sum(0) > 0.1)
    expected = (weight.T @ counts)[some] / weight.sum(0)[some, None]
    np.testing.assert_allclose(spots.X.toarray()[some], expected, rtol=1e-4)
    measured = np.log1p(slides[0].expression.toarray())
    gene = np.argmax(measured.mean(0) * measured.std(0))
    assert np.corrcoef(np.log1p(spots.X.toarray())[some, gene], measured[some, gene])[0, 1] > 0.1
    with pytest.raises(UserError, match="other cells"):
        expected_expression(mapping, placed[:10])


def test_neighbourhood_analyses_of_squidpy_run_on_predicted_positions(mapped):
    squidpy = pytest.importorskip("squidpy", reason="squidpy is not installed")
    placed, mapping = mapped
    cells = placed[~np.isnan(placed.obsm[Keys.REFERENCE]).any(1)].copy()
    cells.obsm["spatial"] = cells.obsm[Keys.REFERENCE]
    spots = expected_expression(mapping, placed)
    spots.obs["layer"] = composition(mapping, "layer").fillna(0).idxmax(axis=1).to_numpy()
    for one in (cells, spots):
        one.obs["layer"] = one.obs["layer"].astype("category")
        squidpy.gr.spatial_neighbors(one, coord_type="generic", n_neighs=6)
        squidpy.gr.nhood_enrichment(one, cluster_key="layer", n_perms=50, show_progress_bar=False)
        score = one.uns["layer_nhood_enrichment"]["zscore"]
        assert np.diag(score).mean() > 2  # cells of a layer lie together


def test_the_command_writes_the_mapping_and_refuses_what_makes_no_sense(
    run, slides, tmp_path, capsys
):
    cells, reference, out = (tmp_path / name for name in ("c.h5ad", "r.h5ad", "o.h5ad"))
    write_slide(replace(slides[2], pos=None), cells)
    write_slide(slides[0], reference)
    asked = ["predict", str(run), str(cells), "--out", str(out)]
    framed = [*asked, "--reference", str(reference)]
    for words, told in (
        ([*asked, "--mapping", str(tmp_path / "m.h5ad")], "add that"),
        ([*framed, "--mapping", str(out)], "another output"),
        ([*framed, "--mapping", str(reference)], "is an input"),
        ([*framed, "--mapping", str(tmp_path / "m.txt")], "must end in"),
        ([*asked, "--reference", "cortex1", "--mapping", str(tmp_path / "m.h5ad")], "needs the"),
    ):
        assert run_command(words) == 2
        assert told in capsys.readouterr().err
        assert not out.exists() and not (tmp_path / "m.h5ad").exists()
    path = tmp_path / "m.zarr"
    assert run_command([*framed, "--keep-foreign", "--mapping", str(path)]) == 0
    total = np.asarray(anndata.read_zarr(path).X.sum(axis=1)).ravel()
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert run_command([*framed, "--overwrite", "--mapping", str(tmp_path / "m.h5ad")]) == 0
    assert run_command([*framed, "--mapping", str(path), "--out", str(tmp_path / "p.h5ad")]) == 2
    assert "exists" in capsys.readouterr().err and not (tmp_path / "p.h5ad").exists()
