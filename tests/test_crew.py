"""Jobs in processes of their own: order, failures, deaths."""

import os
from pathlib import Path

import pytest
import torch

from ipar_sparse.errors import UserError
from ipar_sparse.train.crew import Job, run_jobs


def _errand(key):
    if key == "bad":
        raise UserError("this\nwent wrong")
    if key == "dies":
        os._exit(3)
    if isinstance(key, Path):
        key.write_text(str(torch.get_num_threads()))


@pytest.mark.parametrize("processes", [1, 2])
def test_one_failing_job_takes_only_its_followers_with_it(processes, tmp_path):
    good, late = tmp_path / "good", tmp_path / "late"
    jobs = [
        Job("bad"),
        Job("follows", "bad"),
        Job("follows on", "follows"),
        Job(good),
        Job(late, good),
    ]
    if processes > 1:
        jobs.insert(0, Job("dies"))
    ended = list(run_jobs(_errand, jobs, processes=processes, threads=1 if processes > 1 else None))
    assert len(ended) == len(jobs)
    errors = dict(ended)
    for key in ("bad", "follows", "follows on"):
        assert errors[key] == "this went wrong"
    assert errors[good] is None and errors[late] is None and late.exists()
    order = [key for key, _ in ended]
    assert order.index(good) < order.index(late)
    if processes > 1:
        assert "exit code 3" in errors["dies"]
        assert good.read_text() == "1"
