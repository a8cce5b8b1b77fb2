"""The benchmark measures what it says, and skips what will not fit."""

import json

import numpy as np
import pytest
import torch

from benchmarks import compare, information_limit, knn, size_transfer
from ipar_sparse.config import load_config
from ipar_sparse.data import simulation as simulate_module
from ipar_sparse.train.fit import fit


def test_small_sizes_are_measured_and_reported(tmp_path, capsys):
    rows = compare.run(
        [60, 90],
        tmp_path,
        "cpu",
        k=8,
        works=["step"],
        repeats=1,
        train_up_to=60,
        implementations=["pyg", "chunked"],
    )
    assert [(r["n"], r["implementation"], r["work"]) for r in rows] == [
        (60, "pyg", "step"),
        (60, "chunked", "step"),
        (90, "pyg", "step"),
        (90, "chunked", "step"),
    ]
    assert all(r["seconds"] > 0 and r["peak_bytes"] >= 0 for r in rows[:2])
    assert all("only forward" in r["skipped"] for r in rows[2:])
    saved = json.loads((tmp_path / "benchmark.json").read_text())
    assert saved["rows"] == rows and saved["machine"]["device"]
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    assert "60  step" in capsys.readouterr().out


def test_what_will_not_fit_is_skipped_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "free_memory", lambda device: 2**20)
    measured = []
    monkeypatch.setattr(compare, "_measure", lambda *a: measured.append(a) or {})
    rows = compare.run([50], tmp_path, "cpu", k=8, implementations=["dense"])
    assert not measured
    assert all("needs about" in row["skipped"] for row in rows)


def test_the_estimate_scales_with_pairs_or_edges():
    before = {"n": 100, "peak_bytes": 5, "seconds": 1.0}
    assert compare._estimate("dense", 200, 10, before) == 20
    assert compare._estimate("chunked", 200, 10, before) == 10
    row = {"implementation": "dense", "n": 200, "k": 10}
    assert "about 4 s" in compare._too_much(row, before, torch.device("cpu"), 3.0)
    assert compare._too_much(row, before, torch.device("cpu"), 5.0) is None


def test_effective_bandwidth_counts_rows_in_the_given_precision():
    half, full = (compare.traffic("forward", 10, 7, kind) for kind in ("bfloat16", "float32"))
    assert full - half == 10 * 7 * 128 * 2 * 11  # two rows a recycle and one of the gate
    row = {"work": "forward", "n": 10, "k": 7, "precision": "bfloat16", "seconds": 2.0}
    assert compare.rates(row) == {"edges_per_s": 35.0, "tb_per_s": half / 2e12}


def test_a_worker_that_dies_is_replaced(tmp_path):
    with compare._Workers(torch.device("cpu")) as workers:
        assert "KeyError" in workers.ask({"device": "cpu"})["failed"]
        job = {
            "implementation": "chunked",
            "work": "forward",
            "n": 40,
            "k": 5,
            "seed": 0,
            "device": "cpu",
            "precision": "float32",
            "repeats": 1,
            "data": None,
            "target": None,
        }
        assert workers.ask(job)["seconds"] > 0


def test_a_problem_has_neighbours_worth_finding():
    saved = compare.make_problem(300, 10, 0, "cpu")
    near = (saved["pos"][saved["index"].long()] - saved["pos"].unsqueeze(1)).norm(dim=-1).mean()
    assert float(near) < 0.5 * float(torch.pdist(saved["pos"]).mean())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"works": ["nap"]}, "nap"),
        ({"implementations": ["x"]}, "x"),
        ({"precision": "int3"}, "int3"),
    ],
)
def test_unknown_names_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        compare.run([10], tmp_path, "cpu", **given)
    assert not list(tmp_path.iterdir())


def test_neighbour_searches_are_timed_and_checked(tmp_path, capsys):
    rows = knn.run([40, 90], tmp_path, "cpu", k=8, backends=["exact", "kdtree"], repeats=1)
    timed = [row for row in rows if row["backend"] == "exact"]
    assert [row["n"] for row in timed] == [40, 90]
    assert all(row["seconds"] > 0 and row["recall"] == 1.0 for row in timed)
    refused = [row for row in rows if row["backend"] == "kdtree"]
    assert "d <= 3" in refused[0]["failed"] and "d <= 3" in refused[1]["skipped"]
    assert json.loads((tmp_path / "knn.json").read_text())["rows"] == rows
    assert (tmp_path / "knn.png").stat().st_size > 10_000
    assert "recall 1.0000" in capsys.readouterr().out.splitlines()[-1]


def test_searches_that_would_take_too_long_are_left_out(tmp_path, monkeypatch):
    done = {"seconds": 1.0, "seconds_spread": 0.0, "peak_bytes": 1, "recall": 0.9}
    monkeypatch.setattr(knn, "_measure", lambda job: done)
    rows = knn.run([10, 70, 100], tmp_path, "cpu", backends=["exact"], budget=60)
    assert rows[1]["recall"] == 0.9 and rows[2]["seconds"] == 1.0
    rows = knn.run([10, 100], tmp_path, "cpu", backends=["exact"], budget=60)
    assert rows[1]["skipped"] == "would take about 100 s"


def test_recall_is_the_share_of_true_neighbours():
    points = torch.arange(9.0).unsqueeze(1)
    rows = torch.tensor([0, 4])
    index = torch.zeros(9, 2, dtype=torch.int32)
    index[0], index[4] = torch.tensor([1, 2]), torch.tensor([3, 8])
    assert knn.recall(points, index, rows) == 0.75


@pytest.mark.parametrize("name", ["cortex", "lobules"])
def test_the_program_behind_a_tissue_is_the_simulators(name):
    """And what it fits to counts lies nearer to the truth than a guess."""
    own = simulate_module.TISSUES[name](600, np.random.default_rng([name == "lobules", 600]))
    place = np.random.default_rng(0).uniform(-1, 1, (50, 2))
    wanted = own.features(place, np.random.default_rng(1))
    program = information_limit.PROGRAMS[name](600)
    np.testing.assert_allclose(program.weight, own.weight, atol=1e-6)
    at = place if name == "cortex" else np.column_stack([place[:, 0], wanted[:, 0]])
    found = program.features(torch.from_numpy(at).float())
    np.testing.assert_allclose(found, wanted[:, :-3], atol=1e-5)
    slide = simulate_module.simulate(name, slides=1, spots=300, genes=600, seed=3)[0]
    truth = program.truth(slide)
    counts = torch.tensor(slide.expression.toarray(), dtype=torch.float32)
    batch, dropout = information_limit.fit_batch(program, counts, torch.from_numpy(truth).float())
    low, high = truth.min(0).tolist(), truth.max(0).tolist()
    at, kinds, depth = information_limit.decode(program, counts, batch, dropout, low, high)
    error = np.square(at.numpy() - truth).mean(0)
    variance = np.square(truth - truth.mean(0)).mean(0)
    assert (error < 0.7 * variance).all()
    if not program.repeats:
        return
    grid, spread, share = information_limit.posterior(
        program, counts, batch, dropout, kinds, depth, truth
    )
    torch.testing.assert_close(share.sum(1), torch.ones(300, dtype=torch.float64))
    near = torch.cdist(torch.from_numpy(truth), grid).argmin(1).bincount(minlength=len(grid))
    assert np.corrcoef(near, spread)[0, 1] > 0.5
    mean = (share @ grid).numpy()
    assert (np.square(mean - truth).mean(0) < error).all()  # the mean is what errs least
    layout = program.layouts(mean)["the trend, and across it 0.1 of the zone"]
    np.testing.assert_allclose(layout.std(0), (1, 0.1))
    likely = information_limit.likeliest_pairs(spread, share)
    assert all(i not in row and len(set(row)) == 15 for i, row in enumerate(likely.tolist()))


def test_the_likeliest_neighbours_share_what_few_cells_have():
    """Of two cells that are as alike as two others, those of a rare kind are sooner neighbours."""
    share = torch.zeros(60, 2, dtype=torch.float64)
    share[:40, 0], share[40:, 1] = 1, 1
    share[0] = torch.tensor([0.5, 0.5])
    spread = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
    likely = information_limit.likeliest_pairs(spread, share)
    assert (likely[0] >= 40).all() and (likely[1:40] < 40).all() and (likely[40:] >= 40).all()


def test_a_model_meets_the_same_tissue_at_every_size(tmp_path, monkeypatch, capsys):
    slides = simulate_module.simulate("cortex", slides=1, spots=120, genes=80, seed=3)
    small = [
        "encoder.steps=4",
        "encoder.hidden=[24]",
        "encoder.out=16",
        "model.dim=16",
        "model.channels=16",
        "model.heads=2",
        "model.head_channels=8",
        "model.recycles=2",
        "train.minisets=4",
        "train.miniset_min=40",
        "train.miniset_max=60",
        "train.epochs=1",
        "train.gate_steps=2",
        "graph.k=12",
        "data.max_genes=60",
        "model.start=pca",
    ]
    (tmp_path / "run").mkdir()
    config = load_config(None, small)
    config.save(tmp_path / "run")
    fit(slides, [], config, tmp_path / "run")
    met = []
    predict = size_transfer.Predictor.predict
    monkeypatch.setattr(
        size_transfer.Predictor, "predict", lambda self, s: met.append(s) or predict(self, s)
    )
    simulate = simulate_module.simulate
    monkeypatch.setattr(
        size_transfer, "simulate", lambda *a, **given: simulate(*a, genes=80, **given)
    )
    out = tmp_path / "out"
    size_transfer.main([str(tmp_path / "run"), "--sizes", "70,200", "--out", str(out)])
    few, many = met
    assert (few.num_cells, many.num_cells) == (70, 200)
    np.testing.assert_array_equal(few.pos, many.pos[:70])
    assert (few.expression != many.expression[:70]).nnz == 0
    rows = json.loads((out / "size_transfer.json").read_text())
    assert [(row["n"], row["method"]) for row in rows] == [
        (n, method) for n in (70, 200) for method in ("model", "PCA", "ridge")
    ]
    assert all(-1 <= row["distance_spearman"] <= 1 and row["procrustes"] > 0 for row in rows)
    assert (out / "size_transfer.png").stat().st_size > 10_000
    assert "| 200 | ridge |" in capsys.readouterr().out
