"""Simulated cells of another assay: each term does what it says, and truth goes along."""

import anndata
import numpy as np
import pytest

from ipar_sparse.cli import run_command
from ipar_sparse.data.assay import dissociate
from ipar_sparse.data.simulation import simulate

NOTHING = {"depth": 1.0, "dropout": 0.0, "batch": 0.0, "doublets": 0.0}


@pytest.fixture(scope="module")
def slide():
    return simulate("cortex", slides=1, spots=800, genes=200, seed=4)[0]


def totals(cells, axis):
    return np.asarray(cells.expression.sum(axis)).ravel()


def matched(slide, cells):
    """Rows of the slide in the order of the cells."""
    return slide.take(
        np.array([np.flatnonzero(slide.cell_names == n)[0] for n in cells.cell_names])
    )


def test_depth_dropout_batch_and_panel_change_counts_as_they_say(slide):
    whole = totals(slide, 1).sum()
    plain = dissociate(slide, **NOTHING)
    own = matched(slide, plain)
    assert plain.pos is None and plain.name == "cortex1_cells"
    assert np.corrcoef(totals(plain, 1), totals(own, 1))[0, 1] > 0.9
    np.testing.assert_array_equal(plain.obs["tissue_x"], own.obs["tissue_x"])
    assert totals(plain, 1).sum() == pytest.approx(whole, rel=0.01)
    for change, expected in (({"depth": 0.2}, 0.2), ({"dropout": 0.4}, 0.6)):
        found = totals(dissociate(slide, **NOTHING | change), 1).sum() / whole
        assert found == pytest.approx(expected, rel=0.02)
    apart = dissociate(slide, **NOTHING | {"batch": 0.8, "depth": 3.0})
    common = totals(slide, 0) > 300
    factor = np.log(totals(apart, 0)[common] / totals(slide, 0)[common])
    assert factor.std() == pytest.approx(0.8, rel=0.25)
    panel = dissociate(slide, **NOTHING, panel=30)
    assert panel.expression.shape == (800, 30) and set(panel.genes) < set(slide.genes)


def test_doublets_and_cells_from_outside_are_flagged(slide):
    cells = dissociate(slide, **NOTHING | {"doublets": 0.3}, foreign=0.2, seed=1)
    outside, two = cells.obs["foreign"], cells.obs["doublet"]
    assert cells.num_cells == 1000 and outside.sum() == 200
    assert np.isnan(cells.obs["tissue_x"][outside]).all()
    assert np.isfinite(cells.obs["tissue_x"][~outside]).all()
    assert set(cells.obs["layer"][outside]) == {"none"}
    assert two.mean() == pytest.approx(0.3, abs=0.05)
    ratio = np.median(totals(cells, 1)[two & ~outside]) / np.median(
        totals(cells, 1)[~two & ~outside]
    )
    assert 1.6 < ratio < 2.4
    # programs of the other tissue: mean expression of its cells is not that of the slide
    means = [np.log1p(cells.expression[rows].mean(0)).A1 for rows in (outside, ~outside)]
    alike = np.log1p(cells.expression[~outside][::2].mean(0)).A1
    assert np.corrcoef(*means)[0, 1] < 0.7 < 0.95 < np.corrcoef(means[1], alike)[0, 1]


def test_the_same_seed_gives_the_same_cells_and_another_gives_others(slide):
    a, b, c = (dissociate(slide, seed=seed) for seed in (0, 0, 1))
    assert (a.expression != b.expression).nnz == 0 and (a.cell_names == b.cell_names).all()
    assert (a.cell_names != c.cell_names).any()


@pytest.mark.parametrize(
    "given", [{"dropout": 1.0}, {"depth": 0.0}, {"batch": -1.0}, {"panel": 201}, {"foreign": -0.1}]
)
def test_what_no_assay_does_is_refused(slide, given):
    with pytest.raises(ValueError, match=next(iter(given))):
        dissociate(slide, **given)


def test_the_command_writes_slides_and_cells_without_positions(tmp_path, capfd):
    argv = f"simulate {tmp_path} --slides 1 --spots 150 --genes 60 --dissociated --panel 40".split()
    assert run_command([*argv, "--foreign", "0.1"]) == 0
    assert "167 dissociated cells, 40 genes" in capfd.readouterr().out
    cells = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert cells.shape == (167, 40) and "spatial" not in cells.obsm
    assert cells.obs["tissue_x"].notna().sum() == 150
    assert anndata.read_h5ad(tmp_path / "cortex1.h5ad").shape == (150, 60)
    capfd.readouterr()
    assert run_command([*argv, "--overwrite", "--panel", "61"]) == 2
    assert "--panel 61 is more than the 60 genes" in capfd.readouterr().err
