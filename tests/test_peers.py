"""Published programs on the same slides: how a program fails, and how all are scored."""

import sys

import anndata
import numpy as np
import pytest
from scipy import sparse

from benchmarks.peers import programs
from benchmarks.peers.__main__ import main, most_alike, table
from ipar_sparse.evaluation.naive import NAIVE, log_normalized

DOES = {
    "places": "np.save(job / 'positions.npy', np.ones((4, 2)))",
    "fails": "raise ValueError('no such gene')",
    "grows": "np.ones(1 << 40)",
    "hangs": "import time; time.sleep(60)",
}


@pytest.fixture
def adapters(tmp_path, monkeypatch):
    head = "import sys; from pathlib import Path; import numpy as np; job = Path(sys.argv[1])\n"
    for name, line in DOES.items():
        (tmp_path / f"run_{name}.py").write_text(head + line + "\n")
    monkeypatch.setattr(programs, "ADAPTERS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("places", "done"),
        ("fails", "failed"),
        ("grows", "did not fit"),
        ("hangs", "did not end"),
    ],
)
def test_a_program_that_fails_is_a_row(adapters, name, state):
    minutes = 0.03 if name == "hangs" else 1
    found = programs.run(name, sys.executable, adapters, minutes, 4.0)
    assert found.state == state, found.error
    assert (found.pos is not None) == (state == "done")
    if name == "fails":
        assert found.error == "ValueError: no such gene"


@pytest.mark.slow
def test_a_program_that_pip_cannot_install_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setitem(programs.PROGRAMS, "none", ("--no-index", "there-is-no-such-program"))
    assert "there-is-no-such-program" in programs.install("none", tmp_path)
    assert not (tmp_path / "none" / "installed").exists()


def test_work_is_split_over_processes_and_gathered(adapters, tmp_path, capsys):
    files = [tmp_path / f"{name}.h5ad" for name in "abc"]
    rng = np.random.default_rng(0)
    for i, path in enumerate(files):
        counts = rng.poisson(3.0, (30 + i, 40)).astype(np.float32)
        slide = anndata.AnnData(
            sparse.csr_matrix(counts), obsm={"spatial": rng.random((30 + i, 2))}
        )
        slide.write_h5ad(path)
    (adapters / "run_celery.py").write_text(
        "import sys; from pathlib import Path; import anndata; import numpy as np\n"
        "job = Path(sys.argv[1])\n"
        "cells = anndata.read_h5ad(job / 'cells.h5ad'); assert 'spatial' not in cells.obsm\n"
        "np.save(job / 'positions.npy', np.random.default_rng(0).random((cells.n_obs, 2)))\n"
    )
    given = [*map(str, files), "--python", sys.executable, "--programs", "celery"]
    for name in "ab":
        main([*given, "--only", name, "--out", str(tmp_path / name)])
    parts = [str(tmp_path / name / "peers.json") for name in "ab"]
    capsys.readouterr()
    main([*given, "--only", "b", "--merge", *parts, "--out", str(tmp_path / "all")])
    (row,) = [r.split() for r in capsys.readouterr().out.splitlines() if r.startswith("celery")]
    assert row[1:4] == ["2", "of", "2"]
    with np.load(tmp_path / "b" / "b.celery.npz") as kept:
        assert kept["pos"].shape == (31, 2) and list(kept["cells"][:2]) == ["0", "1"]


def test_naive_matches_find_the_place_that_expression_determines():
    rng = np.random.default_rng(0)
    places, true = rng.random((400, 2)), rng.random((50, 2))
    centres = rng.random((30, 2))

    def counts(pos):
        squares = np.square(pos[:, None] - centres).sum(-1)
        return sparse.csr_matrix(rng.poisson(200 * np.exp(-squares / 0.1)).astype(np.float32))

    slide, other, cells = counts(places), counts(places * [1.0, 0.2]), counts(true)
    assert most_alike([*map(anndata.AnnData, (other, slide))], anndata.AnnData(cells)).X is slide
    logs = log_normalized(slide), places, log_normalized(cells)
    for name, match in NAIVE.items():
        error = np.linalg.norm(match(*logs) - true, axis=1)
        assert np.median(error) < 0.12, name  # a cell put in the middle is off by 0.38


def test_the_table_says_who_placed_how_many():
    rows = [
        {"program": "a", "state": "done", "seconds": 2.0, "distance_spearman": 0.25},
        {"program": "a", "state": "done", "seconds": 4.0, "distance_spearman": 0.75},
        {"program": "b", "state": "did not fit", "seconds": 9.0},
    ]
    _, a, b = table(rows).splitlines()
    assert a.split() == ["a", "2", "of", "2", "0.5", "-", "-", "-", "3", "-"]
    assert b.endswith("did not fit") and "0 of 1" in b
