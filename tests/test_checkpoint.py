"""Checkpoints: everything comes back bit for bit, and a bad file changes nothing."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ipar_sparse.errors import UserError
from ipar_sparse.files import atomic_path, atomic_write
from ipar_sparse.inference.checkpoint import load_checkpoint, save_checkpoint
from ipar_sparse.inference.run_folder import (
    BEST,
    LAST,
    count_parameters,
    find_checkpoint,
    read_meta,
)


class Training:
    """A little run with an optimiser of several groups, as a real one has."""

    def __init__(self, width=4):
        torch.manual_seed(3)
        self.modules = {"gate": nn.Linear(3, width), "model": nn.Linear(width, 2)}
        parameters = [p for m in self.modules.values() for p in m.parameters()]
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters[:2], "lr": 1e-2}, {"params": parameters[2:]}],
            lr=1 / 3,
            betas=(0.8, 0.95),
            amsgrad=True,
        )

    def steps(self, first, last):
        """Losses of some steps; the data of a step follows from its number."""
        losses = []
        for step in range(first, last):
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
            loss = self.modules["model"](self.modules["gate"](x).relu()).square().sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def save(self, path, **meta):
        save_checkpoint(path, self.modules, meta, optimizer=self.optimizer)

    def load(self, path):
        return load_checkpoint(path, self.modules, optimizer=self.optimizer)

    def weights(self):
        return {f"{n}.{k}": v for n, m in self.modules.items() for k, v in m.state_dict().items()}


@pytest.fixture
def checkpoint(tmp_path):
    training = Training()
    training.steps(0, 2)
    training.save(tmp_path / LAST, epoch=2)
    return tmp_path / LAST


def test_resumed_training_is_the_same_to_the_last_bit(tmp_path):
    training = Training()
    training.steps(0, 3)
    training.save(tmp_path / LAST, epoch=3, lr=0.1 + 0.2, genes=["A", "β"])
    expected = training.steps(3, 7)

    other = Training()
    assert other.load(tmp_path / LAST) == {"epoch": 3, "lr": 0.1 + 0.2, "genes": ["A", "β"]}
    assert other.steps(3, 7) == expected
    for key, value in training.weights().items():
        assert torch.equal(other.weights()[key], value)
    assert other.optimizer.param_groups[1]["betas"] == (0.8, 0.95)
    assert other.optimizer.param_groups[1]["lr"] == 1 / 3


def test_weights_are_named_by_their_module(checkpoint):
    from safetensors import safe_open

    with safe_open(checkpoint, framework="pt") as file:
        assert {"gate.weight", "gate.bias", "model.weight", "model.bias"} <= set(file.keys())
        assert json.loads(file.metadata()["document"])["meta"] == {"epoch": 2}
    assert read_meta(checkpoint) == {"epoch": 2}
    assert count_parameters(checkpoint) == {"gate": 3 * 4 + 4, "model": 4 * 2 + 2}


def test_every_kind_of_tensor_survives(tmp_path):
    class Odd(nn.Module):
        def __init__(self, fill):
            super().__init__()
            self.low = nn.Parameter(torch.full((2, 3), fill, dtype=torch.bfloat16).t())
            self.scalar = nn.Parameter(torch.tensor(fill, dtype=torch.float64))
            self.register_buffer("none", torch.empty(0, 3))
            self.register_buffer("mask", torch.tensor([fill > 0, False]))
            self.tied = self.scalar

    save_checkpoint(tmp_path / BEST, {"odd": Odd(0.3)}, {})
    other = Odd(0.0)
    load_checkpoint(tmp_path / BEST, {"odd": other})
    for key, value in Odd(0.3).state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


@pytest.mark.parametrize("keep", [0, 7, 200, 0.5, 0.99])
def test_truncated_file_is_one_clear_line(checkpoint, keep):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(keep if keep >= 1 or keep == 0 else keep * len(data))])
    with pytest.raises(UserError, match="truncated or not a checkpoint") as caught:
        Training().load(checkpoint)
    assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("where", [-1, -200])
def test_a_flipped_bit_is_noticed(checkpoint, where):
    data = bytearray(checkpoint.read_bytes())
    data[where] ^= 1
    checkpoint.write_bytes(data)
    with pytest.raises(UserError, match="checksum"):
        Training().load(checkpoint)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / BEST
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(path)
    path.write_text("not a checkpoint at all, but long enough to hold a header")
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        load_checkpoint(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not a checkpoint of ipar_sparse"):
        load_checkpoint(path)
    save_file({"a": torch.zeros(2)}, path, {"format": "ipar_sparse.checkpoint", "version": "99"})
    with pytest.raises(UserError, match="format 99.*upgrade"):
        load_checkpoint(path)


def test_a_checkpoint_that_does_not_fit_changes_nothing(checkpoint):
    other = Training(width=6)
    before = {k: v.clone() for k, v in other.weights().items()}
    with pytest.raises(UserError, match=r"gate.weight has shape \(4, 3\) instead of \(6, 3\)"):
        other.load(checkpoint)
    assert all(torch.equal(before[k], v) for k, v in other.weights().items())
    with pytest.raises(UserError, match="model.1.weight is missing|model.0.weight is missing"):
        load_checkpoint(checkpoint, {"model": nn.Sequential(nn.ReLU(), nn.Linear(2, 2))})


def test_weights_alone_cannot_be_resumed(tmp_path):
    training = Training()
    save_checkpoint(tmp_path / BEST, training.modules, {})
    load_checkpoint(tmp_path / BEST, training.modules)
    with pytest.raises(UserError, match="weights only"):
        training.load(tmp_path / BEST)


def test_a_changed_optimizer_is_refused(checkpoint):
    other = Training()
    flat = [p for m in other.modules.values() for p in m.parameters()]
    other.optimizer = torch.optim.AdamW(flat)
    with pytest.raises(UserError, match="does not fit the configuration"):
        other.load(checkpoint)


def test_full_disk_keeps_the_old_checkpoint(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left") as caught:
        Training().save(checkpoint, epoch=3)
    assert str(checkpoint) in str(caught.value)
    assert checkpoint.read_bytes() == before
    assert [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_disk_that_is_really_full(tmp_path):
    with pytest.raises(UserError, match="no space left"):
        with atomic_path(tmp_path / "a.bin"):
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(b"x")


def test_ctrl_c_in_the_middle_of_writing(checkpoint):
    before = checkpoint.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        with atomic_path(checkpoint) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt
    assert checkpoint.read_bytes() == before
    assert [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_unwritable_folder_is_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        atomic_write(tmp_path / "missing" / "a.txt", "a")


@pytest.mark.parametrize("stage, step", [(None, 0), ("encoder", 9), ("gate", 9), ("model", 0)])
def test_a_run_without_a_trained_model_says_so(tmp_path, stage, step):
    if stage is not None:
        Training().save(tmp_path / LAST, stage=stage, step=step)
    with pytest.raises(UserError, match="stopped before its model was trained"):
        find_checkpoint(tmp_path)


def test_best_checkpoint_is_preferred_and_last_will_do(tmp_path):
    Training().save(tmp_path / LAST, stage="model", step=1)
    assert find_checkpoint(tmp_path).name == LAST
    Training().save(tmp_path / BEST)
    assert find_checkpoint(tmp_path).name == BEST
