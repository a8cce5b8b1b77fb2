"""Studies on a dask cluster that somebody started: killed workers, and what cannot work."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from small_run import SMALL

from ipar_sparse import cli
from ipar_sparse.config import load_config
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.writers import write_slide
from ipar_sparse.errors import UserError
from ipar_sparse.evaluation import study_progress, study_workers
from ipar_sparse.evaluation.study_plan import plan_study
from ipar_sparse.evaluation.study_run import run_study
from ipar_sparse.inference.run_folder import LAST, read_meta

SETTINGS = [*SMALL, "train.epochs=30", "train.patience=30", "eval.baselines=false"]
OFTEN = "from ipar_sparse.train import loop\nloop.SAVE_EVERY = 0.2\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    paths = [folder / f"{name}.h5ad" for name in "ABCD"]
    for slide, path in zip(simulate("cortex", slides=4, spots=90, genes=60), paths, strict=True):
        write_slide(slide, path)
    return paths


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A scheduler and two workers, started as a person would; yields its file and its process."""
    folder = tmp_path_factory.mktemp("cluster")
    file, often = folder / "scheduler.json", folder / "often.py"
    often.write_text(OFTEN)
    given = ("--scheduler-file", file, "--host", "127.0.0.1", "--no-dashboard")
    words = [("scheduler", *given, "--port", "0")]
    worker = ("worker", *given, "--nthreads", "1", "--memory-limit", "0", "--preload", often)
    words += [(*worker, "--local-directory", folder / name) for name in ("one", "two")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "dask", *map(str, one)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for one in words
    ]
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    yield file, processes[0]
    for process in processes[::-1]:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def when(holds, then):
    """Does something in a thread as soon as something holds, within two minutes."""

    def watch():
        deadline = time.monotonic() + 120
        while not (found := holds()) and time.monotonic() < deadline:
            time.sleep(0.05)
        if found:
            then(found)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def training(folder):
    """The process that trains in a folder, once it has kept a part of the model."""
    try:
        meta = read_meta(folder / LAST)
    except UserError:
        return None
    if meta["stage"] != "model" or meta["step"] < 10:
        return None
    lock = (folder / ".lock").stat().st_ino
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] in ("FLOCK", "POSIX") and words[5].endswith(f":{lock}"):
            return int(words[4])
    return None


def argv(files, out, cluster):
    sets = [word for one in SETTINGS for word in ("--set", one)]
    words = ["experiment", "v1", "--slides", *files, "--hold-out", "A,B", "--seeds", "0"]
    return [str(one) for one in (*words, "--out", out, "--scheduler", cluster[0], *sets)]


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="tells who trains by /proc/locks")
@pytest.mark.timeout(600)  # where others use the cores as well
def test_a_killed_worker_costs_its_run_a_part_of_it(files, cluster, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study_progress, "LINES_EVERY", 1.0)
    out = tmp_path / "study"
    folder = out / "runs/v1/A/seed0"
    killer = when(lambda: training(folder), lambda pid: os.kill(pid, signal.SIGKILL))
    assert cli.run_command(argv(files, out, cluster)) == 0
    killer.join()
    told = capsys.readouterr().err
    assert told.count("died; what it did goes on from its last checkpoint") == 1
    assert "\n  encoder, A held out, seed 0: " in told or "\n  v1, B held out, seed 0: " in told
    assert "resuming the model at step" in (folder / "log.txt").read_text()
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in workers: the order of sums is theirs
    try:
        alone = plan_study(files, {"v1": load_config(None, SETTINGS)}, hold_out="A", seeds=(0,))
        run_study(alone, tmp_path / "alone", jobs=1)
    finally:
        torch.set_num_threads(before)
    ours, theirs = (
        json.loads((one / "runs/v1/A/seed0/metrics.json").read_text())
        for one in (out, tmp_path / "alone")
    )
    assert ours["slides"] == theirs["slides"]


def test_workers_that_cannot_do_the_runs_are_refused(files, cluster, tmp_path, monkeypatch):
    slides = [tmp_path / path.name for path in files]
    for path, slide in zip(files, slides, strict=True):
        os.link(path, slide)
    study = plan_study(slides, {"v1": load_config(None, SETTINGS)}, hold_out="A", seeds=(0,))
    file = str(cluster[0])
    with monkeypatch.context() as patch:
        patch.setattr(study_workers, "__version__", "0.0.9")
        with pytest.raises(UserError, match="this command 0.0.9; start it in the same environment"):
            run_study(study, tmp_path / "out", scheduler=file)
    with pytest.raises(UserError, match="device 'cuda:7' is not available"):
        run_study(study, tmp_path / "out", scheduler=file, device="cuda:7")
    slides[1].unlink()  # as on a machine that has another disk
    with pytest.raises(UserError, match="does not see .*B.h5ad; keep slides where all"):
        run_study(study, tmp_path / "out", scheduler=file)
    with pytest.raises(UserError, match="no dask scheduler answers"):
        run_study(study, tmp_path / "other", scheduler="foo://bar")
    with pytest.raises(UserError, match="missing.json: no such file; `dask scheduler"):
        run_study(study, tmp_path / "other", scheduler=str(tmp_path / "missing.json"))
    assert not (tmp_path / "other").exists()


def test_a_scheduler_that_is_lost_ends_the_study_with_one_line(files, cluster, tmp_path, capsys):
    """The last test of the cluster, whose scheduler it kills."""
    out = tmp_path / "study"
    log = out / "runs/v1/A/seed0/log.txt"
    killer = when(log.exists, lambda _: cluster[1].kill())
    assert cli.run_command(argv(files, out, cluster)) == 2
    killer.join()
    lines = [one for one in capsys.readouterr().err.splitlines() if "ERROR" in one.upper()]
    assert len(lines) == 1 and lines[0].startswith("error: the scheduler")
    assert lines[0].endswith("was lost; start one, and the same command goes on with the study")
