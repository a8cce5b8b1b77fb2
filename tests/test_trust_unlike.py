"""A slide of another tissue is called unlike, and its stated error is that of a wrong map."""

import anndata
import numpy as np
import pytest
from scipy import sparse

from ipar_sparse.cli import run_command
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.writers import to_anndata
from ipar_sparse.layout.uncertainty import square_errors

pytestmark = pytest.mark.trust


def lobules(adata, rng):
    (slide,) = simulate("lobules", slides=1, spots=300, genes=120, seed=4)
    return to_anndata(slide)


def shuffled(adata, rng):
    adata.var_names = rng.permutation(adata.var_names.to_numpy())
    return adata


def noise(adata, rng):
    totals = np.asarray(adata.X.sum(axis=1)).ravel().astype(int)
    even = np.full(adata.n_vars, 1 / adata.n_vars)
    counts = np.array([rng.multinomial(total, even) for total in totals], dtype=np.float32)
    adata.X = sparse.csr_matrix(counts)
    return adata


def as_it_is(adata, rng):
    return adata


CASES = {
    "lobules on a cortex run": (lobules, "unlike"),
    "cortex, its gene names shuffled": (shuffled, "unlike"),
    "noise with the totals of a cortex": (noise, "unlike"),
    "a held-out cortex": (as_it_is, "like the training slides"),
}


def place(trust_run, trust_slides, tmp_path, make, *options):
    adata = make(anndata.read_h5ad(trust_slides / "cortex4.h5ad"), np.random.default_rng(0))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    out = tmp_path / "placed.h5ad"
    code = run_command(
        ["predict", str(trust_run), str(tmp_path / "cells.h5ad"), "--out", str(out), *options]
    )
    return code, out


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_and_the_stated_error(
    name, trust_run, trust_slides, tmp_path, capsys, trust_row
):
    make, verdict = CASES[name]
    code, out = place(trust_run, trust_slides, tmp_path, make)
    assert code == 0
    said = "".join(capsys.readouterr())
    placed = anndata.read_h5ad(out)
    true = np.sqrt(square_errors(placed.obsm["X_ipar"], placed.obsm["spatial"]).mean())
    stated = np.sqrt(np.square(placed.obs["ipar_uncertainty"]).mean())
    (found,) = placed.uns["ipar"]["verdict"].values()
    assert found == verdict and 0.8 * true <= stated
    lines = [line for line in said.splitlines() if "unlike the training slides" in line]
    assert len(lines) == (verdict == "unlike")
    unlike = placed.obs["ipar_typicality"] <= 0.05
    assert unlike.mean() == 1 if verdict == "unlike" else unlike.mean() < 0.15
    assert placed.uns["ipar"]["disc_radius"] > 1
    trust_row(name, f"{found}; stated error {stated:.2f} of {true:.2f}")


def test_strict_refuses_what_is_unlike_and_nothing_else(trust_run, trust_slides, tmp_path, capsys):
    code, out = place(trust_run, trust_slides, tmp_path, shuffled, "--strict")
    assert code == 2 and not out.exists()
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "unlike the training slides" in said
    code, out = place(trust_run, trust_slides, tmp_path, as_it_is, "--strict")
    assert code == 0 and out.exists()


def test_fewer_than_15_cells_are_refused_with_the_reason(
    trust_run, trust_slides, tmp_path, capsys, trust_row
):
    code, out = place(trust_run, trust_slides, tmp_path, lambda adata, _: adata[:14].copy())
    said = capsys.readouterr().err
    assert code == 2 and not out.exists() and "14 cells with counts have no layout" in said
    trust_row("14 cells", f"exit {code}")
    code, _ = place(trust_run, trust_slides, tmp_path, lambda adata, _: adata[:15].copy())
    assert code == 0
