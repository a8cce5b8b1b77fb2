"""What a run survives: kills, full disks, vanished inputs, damaged files, a second process."""

import importlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_run import QUICK

from ipar_sparse.cli import main, run_command
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.writers import write_slide
from ipar_sparse.inference.run_folder import BEST, LAST, PREVIOUS, last_checkpoint, read_meta
from ipar_sparse.train.run_folder import PARTS, is_resumable, lock_run

pytestmark = pytest.mark.trust

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = [word for setting in QUICK for word in ("--set", setting)]
KILLS = 5  # of one run, at most
EVERY = 0.3  # seconds between two checkpoints, in place of a minute

children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(["ipar_sparse.api", "ipar_sparse.cli.app", "ipar_sparse.train.fit"])


def _command(argv, log, file_size, user):
    """Runs a command line in a child, under limits that this process does not take on itself."""
    from ipar_sparse.train import loop

    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    loop.SAVE_EVERY = EVERY
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if user is not None:
        # loaded late by torch, and out of this user's reach where Python lies in root's home
        assert importlib.import_module("torch._dynamo").disable
        os.setgid(user)
        os.setuid(user)
    sys.argv = ["ipar-sparse", *map(str, argv)]
    main()


def start(argv, log, file_size=None, user=None):
    process = children.Process(target=_command, args=(argv, log, file_size, user))
    process.start()
    return process


def ended(argv, log, **limits):
    """Exit code of a command line in a child, and the last line that it said."""
    process = start(argv, log, **limits)
    process.join(600)  # on a machine that is busy, too
    assert process.exitcode is not None
    text = log.read_text()
    assert "Traceback" not in text
    return process.exitcode, text.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Four files of 140 cells; runs here learn from three and select on them."""
    folder = tmp_path_factory.mktemp("slides")
    for number, slide in enumerate(simulate("cortex", slides=4, spots=140, genes=60), start=1):
        write_slide(slide, folder / f"s{number}.h5ad")
    return folder


@pytest.fixture(scope="module")
def argv(slides):
    """``train`` without its folder."""
    one, two, three, four = (slides / f"s{number}.h5ad" for number in (1, 2, 3, 4))
    return ["train", one, two, three, "--val", four, *SETTINGS, "--out"]


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory):
    """A run that nobody stopped, and how many seconds it took."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert ended(["--version"], out.with_name("log"))[0] == 0  # modules are loaded now
    begin = time.monotonic()
    assert ended([*argv, out], out.with_name("log"))[0] == 0
    return out, time.monotonic() - begin


@pytest.fixture
def stopped(argv, tmp_path):
    """A run that was killed in the training of its model."""
    out = tmp_path / "run"
    process = start([*argv, out], tmp_path / "log")
    while not (out / BEST).is_file() and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert (out / PREVIOUS).is_file()
    return out


def same(run, other):
    for name in (BEST, LAST):
        assert read_meta(run / name) == read_meta(other / name)
        ours, theirs = load_file(run / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    for name in ("config.json", "selection.json"):
        assert (run / name).read_text() == (other / name).read_text()
    return True


def resumed(out, log=None):
    log = log or out.with_name("log")
    code, line = ended(["train", "--out", out, "--resume"], log)
    assert code == 0, line
    return out


def progress(out):
    """Where a run stands, and when it last kept something."""
    kept = [path for path in (*out.glob("*.safetensors"), *out.glob(f"{PARTS}/*"))]
    last = max((path.stat().st_mtime for path in kept), default=None)
    if (checkpoint := last_checkpoint(out)) is not None:
        meta = read_meta(checkpoint)
        return meta["stage"], meta["step"], last
    return "selection" if kept else "start", len(kept), last


def test_killed_at_any_moment_a_run_goes_on_to_the_same_tensors(
    argv, whole, tmp_path, full, trust_row
):
    whole, seconds = whole
    kills, log, runs = 50 if full else 5, [], 0
    random = np.random.default_rng(0)
    while len(log) < kills:
        out, words = tmp_path / f"run{runs}", tmp_path / f"log{runs}"
        ready, some = False, min(len(log) + KILLS, kills)
        while not ready and len(log) < some:
            begin, moment = time.time(), random.uniform(0, 0.7 * seconds)
            again = is_resumable(out)
            words_of = ["train", "--out", out, "--resume"] if again else [*argv, out]
            if not again and out.exists():
                words_of.append("--overwrite")
            process = start(words_of, words)
            while len(log) % 2 and last_checkpoint(out) is None and process.is_alive():
                time.sleep(0.01)  # every other kill falls behind the cross-validation
            process.join(moment)
            ready = process.exitcode is not None
            if ready:
                assert process.exitcode == 0, words.read_text()
                continue
            process.kill()
            process.join()
            stage, step, kept = progress(out)
            lost = time.time() - max(begin, kept or 0)
            log.append({"run": runs, "second": moment, "kept": stage, "step": step, "lost": lost})
        if not ready:
            resumed(out, words)
        assert same(out, whole)
        assert "Traceback" not in words.read_text()
        runs += 1
    stages = Counter(entry["kept"] for entry in log)
    most = max(entry["lost"] for entry in log)
    assert most < 120
    if full:
        (ROOT / "build").mkdir(exist_ok=True)
        (ROOT / "build" / "kills.json").write_text(json.dumps(log, indent=1) + "\n")
    trust_row(
        "kill -9 at random moments",
        f"{len(log)} kills in {runs} runs ({', '.join(f'{k} {v}' for k, v in stages.items())}), "
        f"all resumed to equal tensors; at most {most:.1f} s of work lost",
    )


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(stopped, whole, damage):
    last, data = stopped / LAST, (stopped / LAST).read_bytes()
    last.unlink()  # for a moment both checkpoints are one file with two names
    if damage != "missing":
        last.write_bytes(data[:-5000] if damage == "truncated" else data[:-9] + b"123456789")
    assert same(resumed(stopped), whole[0])
    said = " ".join(stopped.with_name("log").read_text().split())
    assert ("the checkpoint before it is taken" in said) == (damage != "missing")


def test_a_polite_kill_is_ctrl_c(argv, whole, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    process = start([*argv, out], log)
    while not is_resumable(out):
        time.sleep(0.01)
    process.terminate()
    process.join(60)
    assert process.exitcode == 130
    said = " ".join(log.read_text().split())
    assert "stopped in its cross-validation" in said and "--resume" in said
    assert same(resumed(out), whole[0])
    assert not (out / PARTS).exists()


def test_a_run_that_died_at_once_is_resumed_or_overwritten_and_stays_till_then(
    argv, whole, tmp_path
):
    out, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(whole[0], out)
    for name in ("config.json", "selection.json", BEST, LAST, PREVIOUS, "reference.safetensors"):
        (out / name).unlink()
    code, line = ended(["predict", out, argv[1], "--out", tmp_path / "p.h5ad"], log)
    assert code == 2 and "stopped before its model was trained" in line
    code, line = ended([*argv, out], log)
    assert code == 2 and "--resume" in line and "--overwrite" in line
    other = shutil.copytree(out, tmp_path / "other")
    assert same(resumed(out), whole[0])
    assert ended([*argv, other, "--overwrite"], log)[0] == 0
    assert same(other, whole[0])


def test_what_was_killed_before_its_model_says_so(argv, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    process = start([*argv, out, "--select", "none"], log)
    while not (out / "config.json").is_file() and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (out / BEST).exists()
    code, line = ended(["predict", out, argv[1], "--out", tmp_path / "p.h5ad"], log)
    assert code == 2 and "stopped before its model was trained" in line
    assert not (tmp_path / "p.h5ad").exists()


def test_two_processes_do_not_train_in_one_folder(stopped, argv, whole, tmp_path):
    log = tmp_path / "log"
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with lock_run(stopped):
        for words in (["train", "--out", stopped, "--resume"], [*argv, stopped, "--overwrite"]):
            code, line = ended(words, log)
            assert code == 2 and "is being trained by another process" in line
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before
    assert same(resumed(stopped), whole[0])


def test_an_interrupted_overwrite_keeps_the_old_run(whole, argv, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(whole[0], out)
    process = start([*argv, out, "--overwrite", "--set", "train.seed=1"], log)
    while not (tmp_path / ".run.replaced").exists():
        time.sleep(0.001)
    process.kill()
    process.join()
    assert same(tmp_path / ".run.replaced", whole[0])
    # killed before anything was computed, and started once more: the old one stays meanwhile
    shutil.rmtree(out / PARTS, ignore_errors=True)
    (out / LAST).unlink(missing_ok=True)
    code, line = ended([*argv, out, "--overwrite"], tmp_path / "second", file_size=1500)
    assert code == 2 and "no space left" in line, line
    assert same(out, whole[0]) and not (tmp_path / ".run.replaced").exists()


@pytest.mark.parametrize("place", ["resource limit", "small disk"])
def test_a_full_disk_loses_nothing(stopped, whole, place, tmp_path):
    log, limits, run = tmp_path / "log", {}, stopped
    if place == "resource limit":
        limits["file_size"] = (stopped / LAST).stat().st_size // 2
    else:
        run = small_disk(tmp_path) / "run"
        shutil.copytree(stopped, run)
        (run.parent / "filler").write_bytes(bytes(shutil.disk_usage(run).free - 4096))
    try:
        code, line = ended(["train", "--out", run, "--resume"], log, **limits)
        assert code == 2 and "no space left" in line
        if run != stopped:
            shutil.copytree(run, tmp_path / "kept")
    finally:
        if run != stopped:
            os.system(f"umount {run.parent}")
    run = stopped if run == stopped else tmp_path / "kept"
    assert same(resumed(run), whole[0])


def small_disk(tmp_path):
    """A file system of a megabyte or two, for those who may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=3m none {disk} 2>/dev/null"):
        pytest.skip("may not mount a small disk")
    return disk


def test_a_full_disk_leaves_no_half_written_prediction(trust_run, trust_slides, tmp_path):
    out = tmp_path / "results"
    out.mkdir()
    for words in (
        ["predict", trust_run, trust_slides / "cortex4.h5ad", "--out", out / "p.h5ad"],
        [
            "evaluate",
            trust_run,
            trust_slides / "cortex4.h5ad",
            "--out",
            out / "report",
            "--no-baselines",
        ],
        ["simulate", out / "slides", "--slides", "1"],
    ):
        code, line = ended(words, tmp_path / "log", file_size=20_000)
        assert code == 2 and "space" in line, line
        assert list(out.iterdir()) == []


def test_a_read_only_folder_is_told_before_work_begins(whole, slides, argv):
    user = 65534 if os.getuid() == 0 else None  # root may write anywhere
    base = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    base.chmod(0o755)
    try:
        shutil.copytree(whole[0], base / "run")
        shutil.copytree(slides, base / "slides")
        (base / "logs").mkdir()
        (base / "logs").chmod(0o777)
        (base / "slides").chmod(0o755)
        (base / "run").chmod(0o555)
        log, cells = base / "logs" / "log", base / "slides" / "s4.h5ad"
        moved = [base / "slides" / w.name if isinstance(w, Path) else w for w in argv]
        os.environ["HOME"], home = str(base / "logs"), os.environ["HOME"]
        for words in (
            ["train", "--resume", "--out", base / "run"],
            [*moved, base / "run", "--overwrite"],
            [*moved, base / "new"],
            ["predict", base / "run", cells, "--out", base / "p.h5ad"],
        ):
            code, line = ended(words, log, user=user)
            assert code == 2 and "writ" in line, line
        # a run that may only be read still predicts
        words = ["predict", base / "run", cells, "--out", base / "logs" / "p.h5ad"]
        code, line = ended(words, log, user=user)
        assert code == 0, line
    finally:
        os.environ["HOME"] = home
        shutil.rmtree(base)


def test_vanished_inputs_are_one_line(stopped, slides, whole, argv, tmp_path, monkeypatch, capsys):
    log, hidden = tmp_path / "log", tmp_path / "hidden.h5ad"
    shutil.move(slides / "s2.h5ad", hidden)
    try:
        code, line = ended(["train", "--out", stopped, "--resume"], log)
        assert code == 2 and "no such file" in line and "s2.h5ad" in line
    finally:
        shutil.move(hidden, slides / "s2.h5ad")
    assert same(resumed(stopped), whole[0])

    import ipar_sparse.inference.placing as placing

    cells, out, place = tmp_path / "cells.h5ad", tmp_path / "out.h5ad", placing.place_cells
    shutil.copy(slides / "s4.h5ad", cells)

    def vanish(*given, **named):
        cells.unlink()
        return place(*given, **named)

    monkeypatch.setattr(placing, "place_cells", vanish)
    assert run_command(["predict", str(whole[0]), str(cells), "--out", str(out)]) == 2
    assert "no such file" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()
