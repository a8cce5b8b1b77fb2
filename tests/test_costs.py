"""Estimates of memory: near what commands take, and refused beforehand where it is not there."""

import json
import os
import re
import subprocess
import sys

import pytest

from ipar_sparse import cli
from ipar_sparse.config import RunConfig
from ipar_sparse.data.headers import Size, check_headers
from ipar_sparse.data.simulation import iter_slides
from ipar_sparse.data.writers import write_slide
from ipar_sparse.errors import UserError
from ipar_sparse.inference import costs

SLIDES = RunConfig().replace(train={"batch_kind": "slide"})
MILLION = Size(1_000_000, 60_000_000, 300)


@pytest.fixture
def free(monkeypatch):
    def set_free(gigabytes):
        monkeypatch.setattr(costs, "free_host_memory", lambda: gigabytes * 1e9)
        monkeypatch.setattr(costs, "host_memory", lambda: 0)

    return set_free


def test_what_fits_passes_and_what_does_not_names_the_mildest_setting(free):
    free(1000)
    costs.check_training([MILLION], [MILLION], SLIDES, False)
    needed = costs.training_cost([MILLION], [], SLIDES).host
    free(0.9 * needed / 1e9)
    with pytest.raises(UserError, match="1,000,000 cells.*GiB.*it fits with --set") as refused:
        costs.check_training([MILLION], [], SLIDES, False)
    named = re.findall(r"--set (\S+)=(\S+)", str(refused.value))
    assert named == [("model.checkpoint_recycles", "true")]
    milder = SLIDES.with_values({"model.checkpoint_recycles": True})
    assert costs.training_cost([MILLION], [], milder).host < needed
    free(1)
    with pytest.raises(UserError, match="fewer cells"):
        costs.check_training([MILLION], [], SLIDES, False)
    with pytest.raises(UserError, match="x.h5ad: placing 1,000,000 cells"):
        costs.check_prediction([MILLION], RunConfig(), False, "x.h5ad")


def test_ranks_divide_the_expression_of_a_training(monkeypatch):
    one = Size(100_000, 6_000_000, 300)

    def saved(slides, config=SLIDES):
        hosts = []
        for count in (1, 2):
            monkeypatch.setattr(costs, "ranks", lambda count=count: count)
            hosts.append(costs.training_cost([one] * slides, [], config).host)
        return hosts[0] - hosts[1]

    assert saved(1) == 0 < 24 * one.stored < saved(2)
    assert saved(4) == saved(5) == pytest.approx(2 * saved(2))
    assert saved(2, SLIDES.replace(data={"embedding": "obsm:X_pca"})) == 0


def test_devices_that_share_a_slide_need_less_each(monkeypatch):
    needed = []
    for count in (1, 2, 4):
        monkeypatch.setattr(costs, "ranks", lambda count=count: count)
        needed.append(costs.training_cost([MILLION], [], SLIDES, True).device)
    whole = needed[0] - needed[1]
    assert whole / 2 < needed[1] - needed[2] < 0.55 * whole
    assert needed[2] < 0.5 * needed[0]


def test_a_gpu_that_is_too_small_is_named(free):
    free(1000)
    costs.check_training([MILLION], [], SLIDES, True, 200e9)
    with pytest.raises(UserError, match="GPU memory.*checkpoint_recycles"):
        costs.check_training([MILLION], [], SLIDES, True, 30e9)
    with pytest.raises(UserError, match="GPU memory.*--device cpu"):
        costs.check_prediction([MILLION], RunConfig(), True, "x.h5ad", 1e9)


def test_what_a_step_sees_follows_size_device_and_memory(free, monkeypatch):
    free(1000)
    by_size = {"cpu": {0: "miniset"}, "cuda": {0: "mixed", 5000: "slide"}}
    monkeypatch.setattr(costs, "KIND_FROM_CELLS", by_size)
    small = Size(4999, 300_000, 300)

    def chosen(slides, *given):
        return costs.choose_batch_kind(slides, [], RunConfig(), *given)

    assert chosen([small], True) == ("mixed", "best for slides of 4,999 cells on a GPU")
    assert chosen([small, MILLION], True)[0] == "slide"
    assert chosen([small, MILLION], False) == (
        "miniset",
        "best for slides of 1,000,000 cells on the CPU",
    )
    kind, why = chosen([MILLION], True, 30e9)
    assert kind == "miniset" and "do not fit" in why
    costs.check_training([MILLION], [], RunConfig(), True, 30e9)  # so nothing is refused
    assert costs.choose_batch_kind([MILLION], [], SLIDES, True, 30e9)[0] == "slide"


def test_ten_million_cells_that_bring_an_embedding_fit_on_one_gpu(free):
    free(120)
    config = RunConfig().replace(data={"embedding": "obsm:X"})
    costs.check_prediction([Size(10_000_000, 0, 0)], config, True, "x.h5ad", 79e9)
    with pytest.raises(UserError, match="GPU memory"):
        costs.check_prediction([Size(16_000_000, 0, 0)], config, True, "x.h5ad", 79e9)


def test_a_file_larger_than_memory_costs_a_block_and_the_selected_genes():
    large = Size(1_000_000, 1_000_000_000, 20_000)
    config = RunConfig().replace(train={"minisets": 10})
    found = costs.training_cost([large], [], config).host
    assert found < 16 * 2**30
    whole = config.replace(data={"max_genes": None})
    assert costs.training_cost([large], [], whole).host > 24e9


def test_commands_refuse_before_they_begin(tmp_path, monkeypatch, capfd):
    (slide,) = iter_slides("cortex", slides=1, spots=300, genes=60)
    path = tmp_path / "a.h5ad"
    write_slide(slide, path)
    (size,) = check_headers([path], RunConfig().data, require_pos=True)
    assert size == Size(300, slide.expression.nnz, 60)
    monkeypatch.setattr(costs, "free_host_memory", lambda: 1e8)
    monkeypatch.setattr(costs, "host_memory", lambda: 0)
    capfd.readouterr()
    assert cli.run_command(["train", str(path), "--out", str(tmp_path / "run")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: training on 300 cells takes about") and "are free" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are told by Linux")
@pytest.mark.parametrize(("n", "genes", "minisets"), [(1500, 300, 200), (8000, 600, 8)])
def test_estimates_are_within_a_third_of_measured_peaks(n, genes, minisets, tmp_path):
    paths = [tmp_path / f"{number}.h5ad" for number in range(3)]
    for path, slide in zip(
        paths, iter_slides("cortex", slides=3, spots=n, genes=genes), strict=True
    ):
        write_slide(slide, path, compression=None)
    sizes = check_headers(paths, RunConfig().data, require_pos=True)
    asked = ["train.epochs=1", f"train.minisets={minisets}", "encoder.steps=3"]
    asked += ["selection.mode=none", "train.gate_steps=2", "train.val_minisets=2"]
    config = RunConfig().with_values({"train.minisets": minisets})
    run, profile = tmp_path / "run", tmp_path / "profile.json"

    def peak(*words):
        argv = [sys.executable, "-m", "ipar_sparse", *words, "--profile", profile]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([*map(str, argv), "--device", "cpu"], check=True, env=env)
        return json.loads(profile.read_text())["host_peak_bytes"]

    chosen = [word for one in asked for word in ("--set", one)]
    measured = peak("train", *paths[:2], "--out", run, *chosen)
    assert costs.training_cost(sizes[:2], [], config).host == pytest.approx(measured, rel=0.3)
    measured = peak("predict", run, paths[2], "--out", tmp_path / "placed.h5ad")
    assert costs.prediction_cost(sizes[2:], config).host == pytest.approx(measured, rel=0.3)
