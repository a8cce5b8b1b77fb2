"""Jobs in worker processes: order, failures, deaths, stopping."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from ipar_sparse.errors import UserError
from ipar_sparse.evaluation.jobs import Job, Workers, run_jobs


def errand(key, stop):
    if key == "bad":
        raise UserError("this\nwent wrong")
    if key == "dies" or (isinstance(key, Path) and key.name == "once" and not key.exists()):
        if key != "dies":
            key.write_text("begun")
        os.kill(os.getpid(), signal.SIGKILL)
    if isinstance(key, Path):
        key.write_text(str(torch.get_num_threads()))


def wait_for_stop(key, stop):
    key.write_text("begun")
    if not stop.wait(60):
        raise TimeoutError("nobody asked for a stop")
    key.write_text("saved")
    raise KeyboardInterrupt


@pytest.mark.parametrize("processes", [1, 2])
def test_one_failing_job_takes_only_its_followers_with_it(processes, tmp_path):
    good, late, once = tmp_path / "good", tmp_path / "late", tmp_path / "once"
    jobs = [
        Job("bad"),
        Job("follows", "bad"),
        Job("follows on", "follows"),
        Job(good),
        Job(late, good),
    ]
    if processes > 1:
        jobs[:0] = [Job("dies"), Job(once)]
    before, told = dict(os.environ), []
    ended = list(run_jobs(errand, jobs, Workers(processes, 1), tell=told.append))
    assert os.environ == before
    assert len(ended) == len(jobs)
    errors = dict(ended)
    for key in ("bad", "follows", "follows on"):
        assert errors[key] == "this went wrong"
    assert errors[good] is None and errors[late] is None and late.exists()
    order = [key for key, _ in ended]
    assert order.index(good) < order.index(late)
    if processes > 1:
        assert errors["dies"] == "its process died, 3 times in a row; out of memory, perhaps"
        # one that a worker died of once is done by another
        assert errors[once] is None and once.read_text() == good.read_text() == "1"
        assert len(told) == 3 and all("goes on from its last checkpoint" in line for line in told)


def test_stopping_lets_a_running_job_save_and_begins_no_other(tmp_path):
    running, waiting, seen = tmp_path / "running", tmp_path / "waiting", []
    jobs = [Job("fails"), Job(running), Job(waiting)]
    ended = run_jobs(wait_for_stop, jobs, Workers(2), show=seen.append, show_every=0.2)
    key, error = next(ended)
    assert key == "fails" and error
    deadline = time.monotonic() + 60
    while (
        not (running.exists() and any(running in shown for shown in seen))
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    ended.close()
    assert running.read_text() == "saved" and not waiting.exists()
    assert any(running in shown for shown in seen)


def tell_card(key, stop):
    key.write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "as it was"))


@pytest.mark.parametrize("cards", [(), ("3", "GPU-5")])
def test_processes_take_the_cards_in_turn(cards, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    jobs = [Job(tmp_path / name) for name in "ab"]
    assert [error for _, error in run_jobs(tell_card, jobs, Workers(2, cards=cards))] == [None] * 2
    seen = {job.key.read_text() for job in jobs}
    assert seen == (set(cards) or {"as it was"})
