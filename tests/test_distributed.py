"""Ranks: how they start and end, what they exchange, and that they compute what one does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ipar_sparse import IPAR, cli
from ipar_sparse import distributed as ranks
from ipar_sparse.cli.messages import out_of_memory
from ipar_sparse.config import RunConfig
from ipar_sparse.data.headers import Size
from ipar_sparse.data.writers import to_anndata, write_slide
from ipar_sparse.errors import UserError
from ipar_sparse.inference.costs import check_training
from ipar_sparse.inference.run_folder import BEST
from ipar_sparse.progress import console
from ipar_sparse.train.history import HISTORY, read_history
from tests.rank_work import equal, joined, selected
from tests.small_run import SMALL, small_config

ROOT = Path(__file__).parents[1]


def on_ranks(name: str, count: int, folder: Path) -> list:
    """What a function of :mod:`tests.rank_work` gives on each rank."""
    out = folder / f"{name}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", "-m", "tests.rank_work", name, str(out)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_ranks_exchange_what_they_say(tmp_path):
    found = on_ranks("exchange", 2, tmp_path)

    assert (
        found[0]
        == found[1]
        == {
            "filled": [2, 3, 2],
            "rate": pytest.approx(2**0.5),
            "slides_per_step": [2, 1, 1],
            "gathered": [0, 1],
            "first": 7,
            "largest": [1, 0],
            "summed": [2.0, 1.0],
            "alike": [0.0, 0.0],
            "shared_out": [[10, 0], [11, 1], [12, 0]],
            "shares": [[0, 1], [2]],
            "errors": [
                "rank 1 has read other slides than rank 0; give all ranks the same files",
                "item 2 failed",
            ],
            "told_by": 1,
        }
    )


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_compute_the_losses_of_one(count, tmp_path):
    one = equal()
    for many in on_ranks("equal", count, tmp_path):
        assert len(many["float64"]) == 50
        assert many["float64"] == pytest.approx(one["float64"], rel=1e-9)
        assert many["rows"] == pytest.approx(one["rows"], rel=1e-9)
        assert many["rows in blocks"] == pytest.approx(one["rows in blocks"], rel=1e-9)
        assert many["one miniset"] == pytest.approx(one["one miniset"], rel=1e-9)
        gate, joint = slice(5), slice(10, 15)
        assert many["float32"][gate] == pytest.approx(one["float32"][gate], rel=1e-5)
        assert many["float32"][joint] == pytest.approx(one["float32"][joint], rel=1e-5)


@pytest.mark.parametrize("work, settings", [(selected, 6), (joined, 2)])
def test_ranks_that_divide_the_slides_select_and_learn_what_one_does(work, settings, tmp_path):
    one = work()
    for many in on_ranks(work.__name__, 2, tmp_path):
        assert many["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert many["norms"] == pytest.approx(one["norms"], rel=1e-3, abs=1e-4)
        assert len(one["decided"]) >= settings
        for key, value in one["decided"].items():
            close = pytest.approx(value, rel=1e-3) if isinstance(value, float) else value
            assert many["decided"][key] == close, key


def test_a_rank_that_is_killed_ends_the_run_in_one_line_and_any_number_goes_on(
    small_slides, tmp_path
):
    files, out = [tmp_path / f"{n}.h5ad" for n in range(3)], tmp_path / "run"
    for slide, file in zip(small_slides, files, strict=False):
        write_slide(slide, file)
    settings = [*SMALL, "train.batch_size=2", "train.epochs=4000", "train.patience=4000"]
    command = [sys.executable, "-m", "ipar_sparse", "train", *map(str, files[:2])]
    command += ["--val", str(files[2]), "--out", str(out)]
    command += [word for one in settings for word in ("--set", one)]
    command += ["--device", "cpu", "--devices", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not (out / BEST).is_file():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)
    os.kill(_process_of_rank(1, out), signal.SIGKILL)
    began = time.monotonic()
    _, said = run.communicate(timeout=60)

    assert run.returncode == 2 and time.monotonic() - began < 30
    (line,) = [one for one in said.splitlines() if "error" in one or "Error" in one]
    assert line.startswith("error: rank 1 was killed (SIGKILL)") and "--resume" in line
    epochs = max(row["epoch"] for row in read_history(out / HISTORY) if "epoch" in row)
    given = ["--set", f"train.epochs={int(epochs) + 3}", "--out", str(out), "--resume"]
    assert cli.run_command(["train", *given]) == 0


def _process_of_rank(number: int, out: Path) -> int:
    """The process that a launcher started with a folder among its words."""
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            words = (folder / "cmdline").read_text().split("\0")
            if str(out) in words and f"RANK={number}" in (folder / "environ").read_text().split(
                "\0"
            ):
                return int(folder.name)
    raise AssertionError(f"no process of rank {number}")


def test_a_script_trains_on_several_devices_and_a_notebook_is_told_how(
    small_slides, tmp_path, monkeypatch
):
    slides = [to_anndata(slide) for slide in small_slides[:2]]
    given = {"config": small_config("train.epochs=1"), "device": "cpu", "devices": 2}
    model = IPAR.train(slides, out=tmp_path / "run", **given)
    assert model.config.train.batch_size == 2
    assert len(model.predict(slides[0], copy=True).obsm["X_ipar"]) == 140

    with pytest.raises(UserError, match="missing.h5ad: no such file"):
        IPAR.train(["missing.h5ad"], out=tmp_path / "other", **given)
    monkeypatch.setattr(console, "is_jupyter", True)
    with pytest.raises(UserError, match="train a.h5ad --out RUN --devices 2"):
        IPAR.train(["a.h5ad"], devices=2)


def test_a_process_alone_is_a_rank_of_one():
    with ranks.joined("cpu") as device:
        assert (device, ranks.rank(), ranks.size(), ranks.leads()) == ("cpu", 0, 1, True)
        assert ranks.shared_out([3, 4], lambda one: 2 * one) == [6, 8]
        assert [*ranks.share_of(3)] == [0, 1, 2]


def test_a_rank_names_itself_and_reckons_with_the_others_on_its_machine(monkeypatch):
    alone = free_host()
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert out_of_memory("fewer cells").startswith("rank 1 is out of memory")
    assert ranks.is_rank() and ranks.started_rank() == 1
    assert free_host() < 0.8 * alone


def free_host() -> float:
    """MiB that a refused training is told are free."""
    config, size = RunConfig(), Size(cells=10**11, stored=10**14, genes=1000)
    with pytest.raises(UserError, match="of memory, and") as refused:
        check_training([size], [], config, on_gpu=False)
    number, unit = re.search(r"and ([\d.]+) (\w+) are free", str(refused.value)).groups()
    return float(number) * {"MiB": 1, "GiB": 1024, "TiB": 1024**2}[unit]


@pytest.mark.parametrize(
    "devices, device, line",
    [
        (10_000, "cpu", "--devices 10000, but this machine has"),
        (2, "cuda:1", "--device cuda:1 is one device; with --devices name cuda or cpu"),
    ],
)
def test_more_ranks_than_devices_are_refused_before_any_starts(devices, device, line):
    with pytest.raises(UserError, match=line):
        ranks.launch(["-c", "raise SystemExit(9)"], devices, device)
