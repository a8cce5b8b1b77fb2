"""Ranks: how they start and end, what they exchange, and that they compute what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ipar_sparse import distributed as ranks
from ipar_sparse.errors import UserError
from tests.rank_work import equal

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
        assert many["one miniset"] == pytest.approx(one["one miniset"], rel=1e-9)
        gate, joint = slice(5), slice(10, 15)
        assert many["float32"][gate] == pytest.approx(one["float32"][gate], rel=1e-5)
        assert many["float32"][joint] == pytest.approx(one["float32"][joint], rel=1e-5)


def test_a_process_alone_is_a_rank_of_one():
    with ranks.joined("cpu") as device:
        assert (device, ranks.rank(), ranks.size(), ranks.leads()) == ("cpu", 0, 1, True)
        assert ranks.shared_out([3, 4], lambda one: 2 * one) == [6, 8]
        assert [*ranks.share_of(3)] == [0, 1, 2]


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
