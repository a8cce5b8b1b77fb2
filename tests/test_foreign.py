"""Shares of foreign cells that are flagged, on cells whose answer is known."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from benchmarks import foreign

CELLS, GENES = 400, 60


def slide(path, seed):
    """Cells of kinds with genes of their own; those called alike express what "one" does."""
    rng = np.random.default_rng(seed)
    label = rng.choice(["one", "two", "strange", "alike"], CELLS, p=[0.4, 0.4, 0.1, 0.1])
    programme = np.array([{"two": 1, "strange": 2}.get(kind, 0) for kind in label])
    rate = 0.5 + 6.0 * (np.arange(GENES) // 15 == programme[:, None])
    matrix = sparse.csr_matrix(rng.poisson(rate).astype(np.float32))
    names = pd.Index([f"g{i}" for i in range(GENES)])
    obs = pd.DataFrame({"kind": label}, index=[str(i) for i in range(CELLS)])
    pos = {"spatial": rng.random((CELLS, 2))}
    anndata.AnnData(matrix, obs, pd.DataFrame(index=names), obsm=pos).write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    return [str(slide(folder / f"s{seed}.h5ad", seed)) for seed in range(3)]


def found(out):
    rows = pd.DataFrame(json.loads((out / "foreign.json").read_text()))
    return rows.groupby("foreign_cells").mean(numeric_only=True)


def test_a_type_of_its_own_is_flagged_and_one_like_another_is_not(files, tmp_path, capsys):
    foreign.main([*files, "--label", "kind", "--least", "20", "--out", str(tmp_path)])
    shares = found(tmp_path)
    assert set(shares.index) == {"one", "two", "strange", "alike"}
    assert shares.flagged_at_5["strange"] > 0.9 and shares.flagged["strange"] > 0.9
    assert shares.flagged_at_5["alike"] < 0.2
    assert (shares.false_alarms < 0.15).all()
    assert "flagged_at_5" in capsys.readouterr().out


def test_labels_can_be_left_out_together(files, tmp_path):
    given = ["--label", "kind", "--organ", "strange,alike", "--out", str(tmp_path)]
    foreign.main([*files, *given])
    shares = found(tmp_path)
    assert list(shares.index) == ["strange,alike"]
    assert 0.3 < shares.flagged_at_5["strange,alike"] < 0.75  # the half that is strange


def test_cells_of_another_tissue_are_compared_over_shared_genes(files, tmp_path):
    other, rng = tmp_path / "other.h5ad", np.random.default_rng(5)
    rate = 0.5 + 6.0 * (np.arange(GENES) // 15 == 3)
    names = pd.Index([f"G{i}" for i in range(10, 10 + GENES)])  # 50 shared, in other letter case
    counts = sparse.csr_matrix(rng.poisson(np.roll(rate, -10), (200, GENES)).astype(np.float32))
    anndata.AnnData(counts, var=pd.DataFrame(index=names)).write_h5ad(other)
    foreign.main([*files, "--cells", str(other), "--out", str(tmp_path)])
    shares = found(tmp_path)
    assert shares.genes["other"] == 50 and shares.flagged_at_5["other"] > 0.9
