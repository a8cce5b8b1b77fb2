"""Benchmarks measure what they say, refuse wrong results, and skip what will not fit."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks
from benchmarks import end_to_end, harness, kernels, knn, model
from ipar_sparse.config import load_config
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.writers import write_slide
from ipar_sparse.evaluation.study_plan import load_plan
from ipar_sparse.graph import NeighborTable

CPU = torch.device("cpu")


def grows(**more):
    """A benchmark whose time grows with pairs and whose memory grows with edges."""
    return harness.Benchmark(
        name="b",
        title="t",
        measure=model.measure,
        work=lambda job: job["n"] ** 2,
        memory=lambda job: job["n"] * 10,
        **more,
    )


def job(**given):
    start = {"implementation": "chunked", "task": "forward", "n": 40, "k": 5, "seed": 0}
    return {**start, "device": "cpu", "precision": "float32", "repeats": 1, **given}


def test_small_sizes_are_measured_and_reported(tmp_path, capsys):
    rows = model.run(
        [60, 90],
        tmp_path,
        "cpu",
        k=8,
        tasks=["step"],
        repeats=1,
        train_up_to=60,
        implementations=["pyg", "chunked"],
    )
    assert [(r["n"], r["implementation"], r["task"]) for r in rows] == [
        (60, "pyg", "step"),
        (60, "chunked", "step"),
        (90, "pyg", "step"),
        (90, "chunked", "step"),
    ]
    assert all(r["seconds"] > 0 and r["peak_bytes"] >= 0 for r in rows[:2])
    assert all(r["deviation"] < 1e-5 for r in rows[:2])
    assert all("only forward" in r["skipped"] for r in rows[2:])
    saved = json.loads((tmp_path / "benchmark.json").read_text())
    assert saved["rows"] == rows and saved["machine"]["device"]
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "60  step" in printed and "x faster" in printed and "against pyg" in printed


def test_what_will_not_fit_is_skipped_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "free_memory", lambda device: 2**20)
    monkeypatch.setattr(harness.Worker, "call", lambda *given: pytest.fail("it was measured"))
    rows = model.run([50], tmp_path, "cpu", k=8, implementations=["dense"])
    assert [row["task"] for row in rows] == ["forward", "backward"]
    assert all("needs about" in row["skipped"] for row in rows)


def test_estimates_scale_with_what_time_and_memory_grow_with():
    before = job(n=100, peak_bytes=10, seconds=1.0)
    assert harness.too_much(grows(), job(n=200), before, 100, 3.0) == "would take about 4 s"
    assert harness.too_much(grows(), job(n=200), before, 100, 5.0) is None
    assert "needs about" in harness.too_much(grows(), job(n=200), before, 20, 5.0)
    assert "needs about" in harness.too_much(grows(), job(n=200), None, 2000, 5.0)
    failed = {"failed": "out of memory"}
    assert harness.too_much(grows(), job(n=200), failed, 1e9, 5.0) == "out of memory"
    dense, sparse = (model.count_edges(job(n=20, implementation=i)) for i in ("dense", "pyg"))
    assert (dense, sparse) == (400, 100)


def test_effective_bandwidth_counts_rows_in_the_given_precision():
    half, full = (model.traffic("forward", 10, 7, kind) for kind in ("bfloat16", "float32"))
    assert full - half == 10 * 7 * 128 * 2 * 11  # two rows a recycle and one of the gate
    row = {"task": "forward", "n": 10, "k": 7, "precision": "bfloat16", "seconds": 2.0}
    assert model.rates(row) == {"edges_per_s": 35.0, "tb_per_s": half / 2e12}


@pytest.mark.parametrize(
    "tb_per_s, text", [(2.345, "2.35 TB/s"), (0.0423, "42 GB/s"), (4.2e-6, "0.0042 GB/s")]
)
def test_a_slow_machine_has_a_bandwidth_too(tb_per_s, text):
    assert harness.bandwidth_text(tb_per_s) == text


def test_a_worker_that_fails_or_dies_is_replaced():
    worker = harness.Worker()
    try:
        assert worker.call(model.measure, {"device": "cpu"})["failed"].startswith("KeyError")
        assert "died" in worker.call(os._exit, 3)["failed"]
        assert worker.call(model.measure, job())["seconds"] > 0
    finally:
        worker.close()


def test_a_wrong_implementation_is_not_timed(monkeypatch):
    monkeypatch.setattr(model, "deviation", lambda *given: 0.2)
    result = model.measure(job())
    assert "seconds" not in result and "differ" in result["failed"]


@pytest.mark.parametrize("implementation", ["pyg", "chunked"])
def test_implementations_place_cells_as_the_dense_form_does(implementation):
    assert 0 < model.deviation(implementation, "float32", CPU) < 1e-5


def test_no_gradient_that_is_timed_is_zero():
    problem = model.make_problem(50, 6, 0, "cpu")
    layout = model.Layout("chunked", "float32", NeighborTable(problem["index"]), problem["h"])
    layout.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layout.parameters)


def test_peak_memory_is_that_of_the_call_alone():
    size = 2**24  # floats
    torch.ones(4 * size).sum()  # more memory, before
    for _ in range(2):
        peak = harness.measure(lambda: torch.ones(size).sum(), CPU, 1)["peak_bytes"]
        assert 0.9 * 4 * size < peak < 1.5 * 4 * size


def test_ratios_are_against_the_dense_form():
    rows = [
        job(implementation="pyg", seconds=2.0, peak_bytes=40 * 2**20),
        job(implementation="dense", seconds=6.0, peak_bytes=400 * 2**20),
        job(implementation="chunked", skipped="needs about 3 TiB, 1 GiB are free"),
    ]
    text = harness.table(rows)
    assert "3.0x faster, 10.0x less memory" in text and "does not fit" in text


def test_a_problem_has_neighbours_worth_finding():
    saved = model.make_problem(300, 10, 0, "cpu")
    near = (saved["pos"][saved["index"].long()] - saved["pos"].unsqueeze(1)).norm(dim=-1).mean()
    assert float(near) < 0.5 * float(torch.pdist(saved["pos"]).mean())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": ["nap"]}, "nap"),
        ({"tasks": ["forward", "knn"]}, "by itself"),
        ({"tasks": ["knn"], "implementations": ["x"]}, "unknown implementation x"),
        ({"implementations": ["x"]}, "unknown implementation x"),
        ({"precision": "int3"}, "int3"),
    ],
)
def test_unknown_names_are_refused(tmp_path, given, message):
    given = {"tasks": ["forward"], "sizes": [10], "out": tmp_path, "device": CPU} | given
    with pytest.raises(ValueError, match=message) as caught:
        benchmarks.run(**given)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_kernels_need_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="CUDA"):
        kernels.run(["check"], [10], tmp_path, CPU)


def test_neighbour_searches_are_timed_and_checked(tmp_path, capsys):
    rows = knn.run([40, 90], tmp_path, "cpu", k=8, implementations=["exact", "kdtree"], repeats=1)
    timed = [row for row in rows if row["implementation"] == "exact"]
    assert [row["n"] for row in timed] == [40, 90]
    assert all(row["seconds"] > 0 and row["recall"] == 1.0 for row in timed)
    refused = [row for row in rows if row["implementation"] == "kdtree"]
    assert "d <= 3" in refused[0]["failed"] and "d <= 3" in refused[1]["skipped"]
    assert json.loads((tmp_path / "knn.json").read_text())["rows"] == rows
    assert (tmp_path / "knn.png").stat().st_size > 10_000
    assert "recall 1.0000" in capsys.readouterr().out.splitlines()[-1]


def test_searches_that_would_take_too_long_are_left_out(tmp_path, monkeypatch):
    done = {"seconds": 1.0, "seconds_spread": 0.0, "peak_bytes": 1, "recall": 0.9}
    monkeypatch.setattr(harness.Worker, "call", lambda *given: done)
    rows = knn.run([10, 70, 100], tmp_path, "cpu", implementations=["exact"], patience=60)
    assert rows[1]["recall"] == 0.9 and rows[2]["seconds"] == 1.0
    rows = knn.run([10, 100], tmp_path, "cpu", implementations=["exact"], patience=60)
    assert rows[1]["skipped"] == "would take about 100 s"


def test_recall_is_the_share_of_true_neighbours():
    points = torch.arange(9.0).unsqueeze(1)
    rows = torch.tensor([0, 4])
    index = torch.zeros(9, 2, dtype=torch.int32)
    index[0], index[4] = torch.tensor([1, 2]), torch.tensor([3, 8])
    assert knn.recall(points, index, rows) == 0.75


TINY = [
    "encoder.steps=4",
    "encoder.hidden=[24]",
    "encoder.out=16",
    "model.dim=16",
    "model.channels=16",
    "model.heads=2",
    "model.head_channels=8",
    "model.recycles=2",
    "model.init=pca",
    "train.minisets=4",
    "train.miniset_min=40",
    "train.miniset_max=60",
    "train.epochs=1",
    "train.gate_steps=2",
    "graph.k=12",
    "data.max_genes=60",
]


def test_a_model_meets_the_same_tissue_at_every_size(tmp_path, monkeypatch, capsys):
    from benchmarks import size_transfer
    from ipar_sparse.train.fit import fit

    slides = simulate("cortex", slides=1, spots=120, genes=80, seed=3)
    fit(slides, [], load_config(None, TINY, selection={"mode": "none"}), tmp_path / "run")
    met = []
    predict = size_transfer.Predictor.predict
    monkeypatch.setattr(
        size_transfer.Predictor, "predict", lambda self, s: met.append(s) or predict(self, s)
    )
    run, out = tmp_path / "run", tmp_path / "out"
    size_transfer.main([str(run), "--sizes", "70,200", "--genes", "80", "--out", str(out)])
    few, many = met
    assert (few.num_cells, many.num_cells) == (70, 200)
    np.testing.assert_array_equal(few.pos, many.pos[:70])
    assert (few.expression != many.expression[:70]).nnz == 0
    rows = json.loads((out / "size_transfer.json").read_text())["rows"]
    assert [(row["n"], row["implementation"]) for row in rows] == [
        (n, method) for n in (70, 200) for method in ("model", "PCA", "ridge")
    ]
    assert all(-1 <= row["distance_spearman"] <= 1 and row["procrustes"] > 0 for row in rows)
    assert (out / "size_transfer.png").stat().st_size > 10_000
    assert "| 200 | ridge |" in capsys.readouterr().out


def test_kinds_of_batches_are_compared_on_what_all_of_them_did(tmp_path, capsys):
    from benchmarks import batches

    (section,) = simulate("cortex", slides=1, spots=180, genes=80, seed=3)
    write_slide(section, tmp_path / "section.h5ad")
    parts = list(batches.deal(section, 3))
    cells = [cell for part in parts for cell in part.cell_names]
    assert sorted(cells) == sorted(section.cell_names) and len({p.name for p in parts}) == 3
    words = ["--section", str(tmp_path / "section.h5ad"), "--seeds", "0", "--device", "cpu"]
    words += [word for one in [*TINY, "train.steps_per_epoch=3"] for word in ("--set", one)]
    batches.main([*words, "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "batches.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["auto", "minisets", "slides", "both"]
    auto, minisets, slides, both = rows  # on the CPU the choice is minisets
    assert auto["score"] == minisets["score"] and len({r["score"] for r in rows}) == 3
    assert all(row["runs"] == 3 and row["seconds"] > 0 for row in rows)
    assert min(row["less_best"] for row in rows) < 0 == max(row["less_best"] for row in rows)
    assert "| 180 cells in three parts | both |" in capsys.readouterr().out
    folder = tmp_path / "out" / "study0"
    records = batches.measured(load_plan(folder), folder)
    late = [r for r in records if (r.method, r.slide) != ("slides", "part2")]
    assert [row["runs"] for row in batches.rows("x", late, "auto")] == [2] * 4
    assert batches.rows("x", [], "auto") == []


def test_embeddings_are_scored_on_slides_they_have_not_seen():
    from benchmarks import embedding

    slides = simulate("cortex", slides=2, spots=120, genes=80, seed=3)
    config = load_config(None, TINY, selection={"mode": "none"})
    (row,) = embedding.score(config, slides[:1], slides[1:], {s.name: s.name for s in slides})
    assert row["slide"] == slides[1].name
    assert 0 <= row["knn_hit@15"] <= row["knn_recall@15"] + 0.2 <= 1.2
    assert row["chance_hit@15"] == pytest.approx(15 / 119)
    other = {key: value + 0.25 for key, value in row.items() if key != "slide"}
    rows = [{"variant": "a", **row}, {"variant": "b", **row, **other}]
    first, second = embedding.table(rows).splitlines()[2:]
    assert first.startswith("| a |") and second.count("+0.250") == len(embedding.COLUMNS)


def test_exponents_are_those_of_the_sizes_that_count():
    def rows(n, **seconds):
        whole = sum(seconds.values())
        return [
            {"command": "train", "n": n, "stage": name, "seconds": t, "share": t / whole}
            for name, t in seconds.items()
        ]

    measured = rows(1000, search=9.0, load=2.0)  # too small to say how a stage grows
    for n in (10_000, 100_000, 1_000_000):
        measured += rows(n, search=n**2 / 1e10, load=2.0)
    measured.append({"command": "predict", "n": 10_000, "stage": "all", "failed": "no memory"})
    search, load = end_to_end.exponents(measured)
    assert search["exponent"] == pytest.approx(2.0) and load["exponent"] == pytest.approx(0.0)
    assert search["fitted"] == [10_000, 100_000, 1_000_000]
    assert search["share"] == pytest.approx(100 / 102)


@pytest.mark.slow
def test_whole_commands_are_measured_stage_by_stage(tmp_path, capsys):
    short = "encoder.steps=2 train.epochs=1 train.minisets=2 train.gate_steps=1 selection.mode=none"
    more = {"slides": 1, "predict_cells": 400, "settings": short.split()}
    found = end_to_end.run([300], tmp_path, CPU, genes=60, **more)
    stages = {(row["command"], row["stage"]): row for row in found["rows"]}
    for name in ("Reading slides", "Training the encoder", "Training the model", "all"):
        assert stages["train", name]["seconds"] > 0
    assert {("predict", "Placing cells"), ("predict", "Writing placed.h5ad")} <= stages.keys()
    for command in ("train", "predict"):
        top = [r for (c, s), r in stages.items() if c == command and " / " not in s and s != "all"]
        whole = stages[command, "all"]
        assert sum(row["seconds"] for row in top) == pytest.approx(whole["seconds"], rel=0.01)
        assert whole["host_peak_bytes"] > 2**27  # torch alone
        assert 0.5 < whole["host_estimate_bytes"] / whole["host_peak_bytes"] < 2
        assert whole["n"] == {"train": 300, "predict": 400}[command]
    assert 0.2 < stages["predict", "all"]["distance_spearman"] <= 1
    saved = json.loads((tmp_path / "end_to_end.json").read_text())
    assert saved["import_torch_seconds"] > 0 and saved["rows"] == found["rows"]
    assert (tmp_path / "end_to_end.png").stat().st_size > 10_000
    assert "Training the model" in capsys.readouterr().out
    assert list(tmp_path.glob("*/")) == []  # slides and runs are gone


@pytest.mark.slow
def test_commands_on_slides_that_bring_their_embedding_are_measured(tmp_path):
    short = ["train.epochs=1", "train.minisets=2", "train.gate_steps=1", "selection.mode=none"]
    found = end_to_end.run([300], tmp_path, CPU, embedding=24, settings=short)
    stages = {row["stage"]: row for row in found["rows"] if row["command"] == "predict"}
    assert "Training the encoder" not in {row["stage"] for row in found["rows"]}
    assert stages["all"]["distance_spearman"] > 0.8


def test_a_checkout_that_is_not_installed_has_the_command(tmp_path):
    checkout, packages = Path(benchmarks.__file__).parents[1], sysconfig.get_path("purelib")
    words = "benchmark --tasks knn --implementations fast --sizes 60 --out".split()
    done = subprocess.run(
        [sys.executable, "-S", "-m", "ipar_sparse", *words, str(tmp_path)],  # -S: no .pth file
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(checkout), packages])},
        capture_output=True,
        text=True,
    )
    assert "unknown implementation fast" in done.stderr, done.stderr


def test_random_counts_are_written_as_they_are_read(tmp_path, capsys):
    from benchmarks import reading
    from ipar_sparse.data.readers import read_slides

    stored = reading.write_random(tmp_path / "a.h5ad", 25, 400, 0.05)
    (slide,) = read_slides(tmp_path / "a.h5ad", require_pos=True)
    assert slide.expression.nnz == stored == 25 * 20 and slide.expression.shape == (25, 400)
    assert set(np.diff(slide.expression.indptr)) == {20} and not slide.normalized
    words = ["--cells", "300", "--genes", "400", "--out", str(tmp_path / "out")]
    for more in ([], ["--in-memory"]):
        reading.main([*words, *more])
        (row,) = json.loads((tmp_path / "out" / "reading.json").read_text())["rows"]
        assert row["stored"] == 6000 and row["genes_taken"] == 400
        assert row["reading_bytes"] > row["before_bytes"] > 2**27
    assert "| 300 | 6,000 |" in capsys.readouterr().out
