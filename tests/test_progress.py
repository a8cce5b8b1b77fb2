"""Stages of work: how they are shown, and what is kept of their time and memory."""

import io
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

from ipar_sparse import cli, progress, ticks

SLOW = """
import time
from ipar_sparse.progress import setup_logging, stage, watching
setup_logging()
with watching("work"):
    with stage("Baking", total=10) as task:
        for _ in range(10):
            time.sleep(0.25)
            task.advance(loss=0.5)
    with stage("Tasting"):
        pass
"""


@pytest.fixture
def kept():
    """Stages that ended in the test, by name."""
    with progress.watching("test"):
        yield lambda: {one["name"]: one for one in progress.profiled()["stages"]}


def test_without_a_terminal_a_long_stage_gets_plain_lines_that_say_how_far_it_is():
    done = subprocess.run([sys.executable, "-c", SLOW], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    first, last, *summary = done.stderr.splitlines()
    assert first.startswith("Baking: ") and "of 10" in first and "left" in first
    assert last.startswith("Baking: done in 2.") and last.endswith("loss 0.5")
    assert "\x1b" not in done.stderr and "\r" not in done.stderr
    assert "Tasting" not in done.stderr  # shorter than anyone waits
    assert summary[0].startswith("where the time went") and "Baking" in summary[1]


def test_on_a_terminal_a_stage_is_a_bar(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=shown, force_terminal=True, width=80))
    with progress.stage("Baking", total=4) as task:
        task.advance(2)
        with progress.stage("Kneading"):
            pass
    assert "Baking" in shown.getvalue() and "2/4" in shown.getvalue()


def test_parts_are_kept_under_their_whole_with_their_own_peaks(kept):
    with progress.stage("whole"):
        for _ in range(2):
            with progress.stage("large"):
                held = np.ones(40_000_000)
                time.sleep(0.05)
                del held
        with progress.stage("small"):
            pass
    found = kept()
    assert list(found) == ["whole", "whole / large", "whole / small"]
    assert found["whole / large"]["times"] == 2
    assert 0.1 <= found["whole / large"]["seconds"] <= found["whole"]["seconds"]
    peak = {name: one["host_peak_bytes"] for name, one in found.items()}
    assert peak["whole"] == peak["whole / large"] > peak["whole / small"] + 200_000_000


def test_a_counted_loop_tells_the_stage_that_it_runs_in_how_far_it_is():
    with progress.stage("outer") as task:
        for number in ticks.counted(range(3)):
            assert (task.done, task.total) == (number, 3 if number else None)
            list(ticks.counted(range(100)))  # a loop in a loop does not count
    assert (task.done, task.total) == (3, 3)
    with progress.stage("outer", total=2) as task:
        for number in ticks.counted(range(4)):
            assert task.part == number / 4
            assert (f"0 of 2 and {task.part:.0%} of the next" in task.line()) == (number > 0)
        assert "0 of 2, " in task.line() and "left" in task.line()
        task.advance()
        assert (task.done, task.part) == (1, 0.0)
    assert list(ticks.counted("ab")) == ["a", "b"]  # nobody listens


def test_a_failed_command_leaves_its_profile(tmp_path):
    with pytest.raises(KeyError), progress.watching("cook", profile=tmp_path / "profile.json"):
        with progress.stage("Baking"):
            raise KeyError
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["command"] == "cook" and not found["completed"]
    assert [one["name"] for one in found["stages"]] == ["Baking"]


def test_commands_keep_a_log_and_a_profile_and_may_be_quiet(tmp_path, capfd):
    def simulate(name, *more):
        capfd.readouterr()
        argv = ["simulate", str(tmp_path / name), "--spots", "100", "--genes", "50", *more]
        assert cli.run_command(argv) == 0
        return capfd.readouterr()

    profile, log = tmp_path / "profile.json", tmp_path / "log.txt"
    out, _ = simulate("a", "--profile", str(profile), "--log-file", str(log), "--slides", "2")
    stages = {one["name"]: one for one in json.loads(profile.read_text())["stages"]}
    assert {"Simulating", "Writing slides"} <= stages.keys()
    assert all(one["host_peak_bytes"] > 2**20 for one in stages.values())
    assert log.is_file() and "cortex slides" in out
    quiet = simulate("b", "--quiet", "--log-file", str(log))
    assert quiet.err == "" and "cortex slides" in quiet.out
    assert cli.run_command(["simulate", str(tmp_path / "c"), "--log-file", str(log / "x")]) == 2
    assert "--log-file" in capfd.readouterr().err and not (tmp_path / "c").exists()
