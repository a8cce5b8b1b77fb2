"""Prediction on several devices: what one gives, of one slide in parts or of several at once."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from anndata import read_h5ad

from ipar_sparse import IPAR, cli
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.writers import write_slide
from ipar_sparse.errors import UserError
from ipar_sparse.progress import console
from ipar_sparse.train.fit import fit
from tests.small_run import small_config
from tests.test_distributed import on_ranks

MORE = ["encoder.steps=40", "train.epochs=6", "train.gate_steps=20", "refine.steps=40"]
VARIANTS = {
    # candidates of a sample, an atlas, the refinement in a space of its own
    "sampled": ["model.init=atlas", "graph.candidate_pool=200", "refine.rca_power=0.5"],
    # all candidates, edges scored pair by pair and by distances, whose scale is that of all edges
    "whole": ["train.batch_kind=slide", "model.pair_hidden=[8]", "model.terms=[pair,rbf]"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of each variant, and cells that they have not seen."""
    folder = tmp_path_factory.mktemp("placed")
    slides = simulate("cortex", slides=2, spots=300, genes=60, seed=3)
    for name, settings in VARIANTS.items():
        fit(slides, [], small_config(*MORE, *settings), out=folder / "runs" / name)
    for number, spots in enumerate((1300, 400)):
        unseen = simulate("cortex", slides=1, spots=spots, genes=60, seed=8 + number)[0]
        write_slide(unseen, folder / f"cells{number}.h5ad")
    return folder


def predict(*words, code=0):
    """One command, in a process of its own; what it says."""
    command = [sys.executable, "-m", "ipar_sparse", "predict", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def test_ranks_that_share_the_rows_of_a_slide_place_its_cells_as_one_does(folder):
    alone = {}
    for name in VARIANTS:
        out = folder / f"{name}.h5ad"
        words = ("predict", folder / "runs" / name, folder / "cells0.h5ad", "--out", out)
        assert cli.run_command([*map(str, words), "--device", "cpu"]) == 0
        alone[name] = read_h5ad(out)
    (first, second) = on_ranks("predict", 2, folder)
    assert first == second
    for name in VARIANTS:
        assert first["split"][name], "the rows were not split"
        found = np.array(first[name])
        assert np.abs(found - alone[name].obsm["X_ipar"]).max() < 1e-4


def test_the_command_shares_one_file_and_deals_several(folder):
    run, cells = folder / "runs" / "sampled", [folder / f"cells{i}.h5ad" for i in (0, 1)]
    options = ("--device", "cpu", "--devices", "2")
    one = predict(run, cells[0], "--out", folder / "one.h5ad", "--top", "2", *options)
    assert one.stdout.count(f"cells in {folder / 'one.h5ad'}") == 1
    many = predict(run, *cells, "--out", folder / "many", *options)
    for path in cells:
        assert many.stdout.count(f"cells in {folder / 'many' / path.name}") == 1
    predict(run, *cells, "--out", folder / "alone", "--device", "cpu")
    alone = [read_h5ad(folder / "alone" / path.name) for path in cells]
    dealt = [read_h5ad(folder / "many" / path.name) for path in cells]
    for found, wanted in zip(
        [read_h5ad(folder / "one.h5ad"), *dealt], [alone[0], *alone], strict=True
    ):
        assert np.abs(found.obsm["X_ipar"] - wanted.obsm["X_ipar"]).max() < 1e-4
        assert np.abs(found.obs["ipar_uncertainty"] - wanted.obs["ipar_uncertainty"]).max() < 1e-4
        assert found.uns["ipar"]["verdict"] == wanted.uns["ipar"]["verdict"]


@pytest.mark.parametrize(
    "words, line",
    [
        (("--devices", "10000", "--device", "cpu"), "--devices 10000, but this machine has"),
        (("--devices", "2", "--device", "cpu", "--top", "99"), "--top"),
    ],
)
def test_a_mistake_is_one_line_of_one_rank(folder, words, line):
    out = folder / "refused.h5ad"
    run = folder / "runs" / "sampled"
    said = predict(run, folder / "cells1.h5ad", "--out", out, *words, code=2).stderr
    errors = [one for one in said.splitlines() if "error:" in one]
    assert len(errors) == 1 and line in errors[0] and "Traceback" not in said
    assert not Path(out).exists()


def test_a_script_fills_an_object_by_several_devices(folder, monkeypatch):
    model = IPAR.load(folder / "runs" / "sampled", device="cpu")
    cells = read_h5ad(folder / "cells0.h5ad")
    alone = model.predict(cells, copy=True, top=2)
    assert model.predict(cells, top=2, devices=2) is None
    for key in ("X_ipar", "X_ipar_embedding", "X_ipar_top"):
        assert np.allclose(cells.obsm[key], alone.obsm[key], atol=1e-4, equal_nan=True)
    assert set(cells.obs) == set(alone.obs) and set(cells.uns["ipar"]) == set(alone.uns["ipar"])
    with pytest.raises(UserError, match="nothing was filled"):
        model.predict(cells, top=99, devices=2)
    with pytest.raises(UserError, match="--devices 10000, but this machine has"):
        model.predict(cells, devices=10_000)
    monkeypatch.setattr(console, "is_jupyter", True)
    with pytest.raises(UserError, match="run `ipar-sparse predict .* --devices 2`"):
        model.predict(cells, devices=2)
