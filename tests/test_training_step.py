"""One step of gate and model: noise, dropped edges, loss weights, and gradients gone wrong."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_run import small_config

from ipar_sparse.config import load_config
from ipar_sparse.errors import UserError
from ipar_sparse.graph import NeighborTable
from ipar_sparse.inference.modules import build_gate_and_model
from ipar_sparse.train import augmentation
from ipar_sparse.train.augmentation import augment
from ipar_sparse.train.batches import Batches, EmbeddedSlide, build_batch
from ipar_sparse.train.history import HISTORY, read_history
from ipar_sparse.train.loop import Loop, TrainingLoop
from ipar_sparse.train.model import (
    Trained,
    first_counted_epoch,
    losses_of,
    term_weights,
    train_gate,
    train_model,
    training_step,
    update,
)

CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def slide(small_slides):
    pos = torch.from_numpy(small_slides[0].pos)
    return EmbeddedSlide("a", torch.randn(140, 16, generator=seeded()), pos)


def parts_of(config):
    torch.manual_seed(0)
    return Trained(*build_gate_and_model(config, 16), config, CPU)


def test_the_walk_weight_ramps_to_its_cap():
    settings = load_config(preset="spec").train
    weights = [term_weights(t, settings).get("rw_kl", 0.0) for t in (0, 1, 4, 7, 20)]
    assert weights == pytest.approx([0, 0, 0.15, 0.3, 0.3])
    rest = term_weights(20, settings)
    assert (rest["stress_log"], rest["repulsion"], rest["entropy_reg"]) == (0.1, 0.01, 0.01)
    assert "gram" not in rest and "multiscale" not in rest
    assert first_counted_epoch(settings) == 6
    at_once = small_config("train.warmup_epochs=2", "train.ramp_epochs=0").train
    assert [term_weights(t, at_once).get("rw_kl", 0.0) for t in (1.9, 2)] == [0.0, 0.3]


def test_dropped_edges_leave_one_a_cell(slide):
    config = small_config("train.edge_drop=0.97")
    batch = build_batch(slide, config, 0)
    h, bias = augment(batch, config.train, seeded())
    kept = torch.isfinite(batch.graph.to_table(bias))
    assert bool((kept.sum(1) >= 1).all())
    assert 0.01 < float(kept.float().mean()) < 0.2
    assert float((h == 0).float().mean()) == pytest.approx(0.1, abs=0.03)
    again = augment(batch, config.train, seeded())
    assert torch.equal(again[0], h) and torch.equal(again[1], bias)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cells", [50, 1000])
def test_rows_that_a_rank_holds_are_drawn_as_those_of_all(slide, padded, cells, monkeypatch):
    monkeypatch.setattr(augmentation, "DRAWN_CELLS", cells)
    config = small_config("train.edge_drop=0.5", "train.vary_augmentation=true")
    batch = build_batch(slide, config, 0)
    index = batch.graph.index.clone()
    if padded:
        index[torch.rand(index.shape, generator=seeded()) < 0.3] = -1
        index[60:110] = -1  # a block without an edge
    batch.graph = NeighborTable(index, padded=padded)
    h, bias = augment(batch, config.train, seeded(1))
    assert not torch.equal(h[:50] == 0, h[50:100] == 0)

    nodes = torch.randperm(140, generator=seeded(2))[:90]
    own, held = nodes[:40], SimpleNamespace(nodes=nodes, own=nodes[:40], rowptr=batch.graph.rowptr)
    graph = NeighborTable(index[own], num_src_nodes=90, padded=padded)  # its sources do not matter
    some = augment(replace(batch, graph=graph, rows=held), config.train, seeded(1))
    assert torch.equal(some[0], h[nodes])
    assert torch.equal(graph.to_table(some[1]), batch.graph.to_table(bias)[own])


def test_augmentation_levels_vary_around_their_value(slide):
    config = small_config("train.vary_augmentation=true", "train.dropout_h=0.2")
    batch, generator = build_batch(slide, config, 0), seeded()
    shares = torch.tensor(
        [float((augment(batch, config.train, generator)[0] == 0).float().mean()) for _ in range(60)]
    )
    assert float(shares.mean()) == pytest.approx(0.2, abs=0.02)
    assert float(shares.min()) < 0.14 and float(shares.max()) > 0.26


def test_the_loss_is_the_weighted_sum_of_its_terms(slide):
    config = small_config("train.lambda_long=0.2", "train.lambda_gate=0.5")
    parts, batch = parts_of(config), build_batch(slide, config, 0)
    losses = losses_of(parts, batch, seeded(), epoch=1.5)
    weights = {"l_rw": losses["w_rw"], "l_stress": 0.1, "l_gram": 1.0, "l_long": 0.2}
    weights |= {"l_rep": 0.01, "l_ent": 0.01, "l_gate": 0.5}
    assert losses["w_rw"] == pytest.approx(0.15)
    torch.testing.assert_close(losses["loss"], sum(w * losses[k] for k, w in weights.items()))
    ungated = small_config("model.beta=0")
    losses = losses_of(parts_of(ungated), build_batch(slide, ungated, 0), seeded(), epoch=0.0)
    assert float(losses["l_gate"]) == 0 and "l_rw" not in losses


def test_a_gradient_that_is_not_finite_costs_one_step_and_no_weight(slide):
    """The step changes weights as one whose gradient is zero does."""
    config, found = small_config(), []
    batch = build_batch(slide, config, 0)
    for factor in (0.0, math.nan):
        parts = parts_of(config)
        optimizer, scaler = parts.optimizer(parts.gate, parts.model), parts.grad_scaler()
        training_step(parts, batch, seeded(1), 2.0, optimizer, scaler)
        before = copy.deepcopy(parts.model.state_dict())
        loss = losses_of(parts, batch, seeded(2), 2.0)["loss"] * factor
        parameters = [*parts.gate.parameters(), *parts.model.parameters()]
        norm = update(loss, parameters, optimizer, scaler, clip=1.0)
        assert math.isfinite(norm) == (factor == 0)
        found.append(parts.model.state_dict())
    for key, value in found[0].items():
        assert torch.equal(found[1][key], value), key
    assert any(not torch.equal(before[key], value) for key, value in found[1].items())


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    with TrainingLoop(tmp_path, 0, CPU) as loop, loop.stage("gate", 3, optimizer) as stage:
        with pytest.raises(
            UserError, match="loss became nan at step 1 of the gate; lower train.lr"
        ):
            for _ in stage:
                stage.record({"loss": torch.tensor(math.nan)})


def test_a_row_in_ten_is_logged_with_the_present_learning_rate(tmp_path):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with TrainingLoop(tmp_path, 0, CPU) as loop, loop.stage("gate", 25, optimizer) as stage:
        for step in stage:
            optimizer.param_groups[0]["lr"] = 0.1 + step
            stage.record({"loss": torch.tensor(float(step)), "unknown": 3.0})
    rows = read_history(tmp_path / HISTORY)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0), (10, 9), (20, 19)]
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 9.1, 19.1])
    assert (loop.state.stage, loop.state.step) == ("model", 0) and not loop.finished("model")
    assert loop.finished("gate")


def test_short_trainings_call_after_every_step_and_leave_no_file(slide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small_config("train.steps_per_epoch=4", "train.epochs=2")
    parts, calls = parts_of(config), []
    batches, loop = Batches([slide], [], config, CPU), Loop(0, CPU, lambda: calls.append(1))
    before = copy.deepcopy(parts.model.state_dict())
    train_gate(parts, batches, loop)
    train_model(parts, batches, loop)
    assert len(calls) == config.train.gate_steps + 8 and not list(tmp_path.iterdir())
    after = parts.model.state_dict()
    assert any(not torch.equal(before[key], value) for key, value in after.items())
    assert loop.state.best is None


def test_training_stops_when_the_validation_score_no_longer_improves(slide):
    config = small_config("train.steps_per_epoch=2", "train.epochs=9", "train.patience=2")
    still = {"lr": 1e-30, "lr_min": 0.0, "weight_decay": 0.0}
    config = config.replace(train=still)
    calls: list[int] = []
    loop, batches = Loop(0, CPU, lambda: calls.append(1)), Batches([slide], [slide], config, CPU)
    loop.state.stage = "model"
    train_model(parts_of(config), batches, loop)
    first = first_counted_epoch(config.train)
    assert loop.state.best_epoch == first == 1
    assert len(calls) == 2 * (first + 1 + 2)
