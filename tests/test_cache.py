import errno
import io
import logging
import os

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import sparse

from ipar_sparse.config import load_config
from ipar_sparse.progress import Progress
from ipar_sparse.supervision.losses import e_geo
from ipar_sparse.train import cache, logs
from ipar_sparse.train.cache import cache_folder, cached, cached_record, content_key
from ipar_sparse.train.history import History, TensorBoard, read_history


class Builder:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        tensors = {"index": torch.arange(12, dtype=torch.int32).view(3, 4).t()}
        return tensors, {"recall": 0.1 + 0.2, "method": "exact"}


@pytest.fixture
def build():
    return Builder()


def test_second_time_comes_from_the_disk(tmp_path, build):
    h = torch.randn(5, 3)
    tensors, info = cached("candidates", {"h": h, "k": 3}, build, tmp_path)
    again, info_again = cached("candidates", {"h": h.clone(), "k": 3}, build, tmp_path)
    assert build.calls == 1
    assert torch.equal(tensors["index"], again["index"]) and again["index"].dtype == torch.int32
    assert info == info_again == {"recall": 0.1 + 0.2, "method": "exact"}


@pytest.mark.parametrize(
    "change",
    [
        {"h": torch.arange(6.0).view(3, 2)},
        {"h": torch.arange(6.0).double().view(2, 3)},
        {"h": torch.arange(6.0).view(2, 3) + torch.finfo(torch.float32).eps},
        {"k": 4},
        {"k": "3"},
        {"genes": np.array(["A", "C"])},
        {"counts": sparse.csr_matrix(np.diag([1.0, 3.0]))},
        {"options": {"metric": "cosine", "seed": None}},
    ],
)
def test_any_change_of_the_inputs_changes_the_key(change):
    inputs = {
        "h": torch.arange(6.0).view(2, 3),
        "k": 3,
        "genes": np.array(["A", "B"]),
        "counts": sparse.csr_matrix(np.diag([1.0, 2.0])),
        "options": {"metric": "euclidean", "seed": None},
    }
    assert content_key("graph", inputs) == content_key("graph", dict(reversed(inputs.items())))
    assert content_key("graph", inputs) != content_key("graph", {**inputs, **change})
    assert content_key("graph", inputs) != content_key("target", inputs)


def test_a_key_is_of_content_not_of_layout():
    x = np.arange(12.0).reshape(3, 4)
    assert content_key("a", {"x": x}) == content_key("a", {"x": np.asfortranarray(x)})
    assert content_key("a", {"x": x}) == content_key("a", {"x": torch.from_numpy(x)})
    with pytest.raises(TypeError, match="cannot key a cache by object"):
        content_key("a", {"x": object()})


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_a_damaged_entry_is_built_again(tmp_path, build, damage, caplog):
    first, _ = cached("graph", {"k": 3}, build, tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
    path.write_bytes(
        {"truncated": data[: len(data) // 2], "flipped": data, "foreign": b"hello"}[damage]
    )
    with caplog.at_level(logging.WARNING):
        again, _ = cached("graph", {"k": 3}, build, tmp_path)
    assert build.calls == 2 and "damaged" in caplog.text
    assert torch.equal(first["index"], again["index"])
    cached("graph", {"k": 3}, build, tmp_path)
    assert build.calls == 2


def test_a_full_disk_costs_the_cache_and_nothing_else(tmp_path, build, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        tensors, _ = cached("graph", {"k": 3}, build, tmp_path)
    assert tensors["index"].shape == (4, 3)
    assert "without the cache" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_oldest_entries_make_room(tmp_path, build, monkeypatch):
    for k in range(3):
        cached("graph", {"k": k}, build, tmp_path)
    for age, k in enumerate((1, 0, 2)):
        name = f"graph-{content_key('graph', {'k': k})[:40]}.safetensors"
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    size = (tmp_path / name).stat().st_size
    monkeypatch.setattr(cache, "SIZE_LIMIT", int(2.5 * size))
    cached("graph", {"k": 9}, build, tmp_path)
    kept = {p.name for p in tmp_path.iterdir()}
    expected = {f"graph-{content_key('graph', {'k': k})[:40]}.safetensors" for k in (1, 9)}
    assert kept == expected


def test_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("IPAR_SPARSE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("IPAR_SPARSE_CACHE")
    assert cache_folder().name == "ipar_sparse"


COLUMNS = ["step", "epoch", "loss", "E_geo_hgate", "phase"]


def test_history_survives_exactly(tmp_path):
    history = History(tmp_path / "h.csv", COLUMNS)
    history.write({"step": 1, "epoch": 0, "loss": 0.1 + 0.2, "phase": "gate"})
    history.write({"step": 2, "epoch": 0, "loss": float("nan"), "E_geo_hgate": 1e-17})
    rows = read_history(tmp_path / "h.csv")
    assert rows[0] == {"step": 1, "epoch": 0, "loss": 0.1 + 0.2, "phase": "gate"}
    assert rows[1]["E_geo_hgate"] == 1e-17 and np.isnan(rows[1]["loss"])
    with pytest.raises(ValueError, match="lr"):
        history.write({"step": 3, "lr": 1.0})
    history.close()


def test_resuming_cuts_off_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "h.csv"
    history = History(path, COLUMNS)
    for step in range(1, 6):
        history.write({"step": step, "loss": step / 3})
    history.close()
    path.write_text(path.read_text() + "6,0,0.12")  # killed in the middle of a line
    history = History(path, COLUMNS, resume_step=3)
    history.write({"step": 4, "loss": 7.0})
    history.close()
    assert [(r["step"], r["loss"]) for r in read_history(path)] == [
        (1, 1 / 3),
        (2, 2 / 3),
        (3, 1.0),
        (4, 7.0),
    ]
    History(path, COLUMNS).close()
    assert read_history(path) == []


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    board.write(1, {"loss": 0.5, "phase": "gate", "bad": float("nan")})
    board.write(2, {"loss": 0.25})
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_the_losses(monkeypatch, terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    monkeypatch.setattr(logs, "console", console)
    with Progress(interval=0) as progress:
        with progress.task("Training", total=3) as task:
            for loss in (0.5, 0.25, 0.125):
                task.advance(loss=loss)
        assert list(progress.track([1, 2], "Reading")) == [1, 2]
    text = out.getvalue()
    assert "Training" in text and "Reading" in text and "0.125" in text and "3/3" in text
    assert ("\x1b[" in text) == terminal
    assert ("loss 0.25" in text) or terminal


def test_targets_and_graphs_come_back_as_they_were(tmp_path, monkeypatch):
    from ipar_sparse.train.batches import Unit, build_unit

    monkeypatch.setenv("IPAR_SPARSE_CACHE", str(tmp_path))
    config = load_config(None, ["graph.k=9", "graph.target_mode=sketch"])
    config = config.replace(train={"lambda_multiscale": 0.1})
    generator = torch.Generator().manual_seed(0)
    h, pos = torch.randn(60, 8, generator=generator), torch.rand(60, 2, generator=generator)
    calls = []

    def build():
        calls.append(1)
        return build_unit(h, pos, config, 0, True)

    first, again = (cached_record("unit", {"h": h}, Unit, build) for _ in range(2))
    assert len(calls) == 1
    assert torch.equal(first.graph.edge_index, again.graph.edge_index)
    assert torch.equal(first.gate_target, again.gate_target) and again.whole
    for name in ("pair", "precision", "transposed", "sigma"):
        assert torch.equal(getattr(first.target.walk, name), getattr(again.target.walk, name))
    assert torch.equal(first.target.multiscale.dist, again.target.multiscale.dist)
    assert again.target.sizes == first.target.sizes and again.graph.method == first.graph.method
    layout = torch.randn(60, 2, generator=generator)
    torch.testing.assert_close(
        e_geo(layout, again.target)["e_geo"], e_geo(layout, first.target)["e_geo"]
    )
