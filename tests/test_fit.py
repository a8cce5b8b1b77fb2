"""A training run: what it leaves in its folder, how it is resumed, and what it learns from."""

import json
import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_run import small_config, stop_after

from ipar_sparse.config import RunConfig
from ipar_sparse.data.copies import sketch, slide_digest
from ipar_sparse.data.input_profile import InputProfile
from ipar_sparse.data.simulation import simulate
from ipar_sparse.errors import UserError
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.inference.run_folder import BEST, LAST, read_meta, unfinished
from ipar_sparse.metrics.layout import evaluate_layout
from ipar_sparse.train.fit import REFERENCE, fit, fit_encoder
from ipar_sparse.train.history import HISTORY, read_history
from ipar_sparse.train.members import divide


def same_tensors(a, b):
    ours, theirs = load_file(a), load_file(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


def brought(slides, width, noise, seed, squash=lambda x: x):
    """Gives slides an embedding that holds their positions, mixed and noisy."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(2, width))
    for slide in slides:
        pos = (slide.pos - slide.pos.mean(0)) / slide.pos.std()
        values = squash(pos @ mixing) + noise * rng.normal(size=(slide.num_cells, width))
        slide.embedding = values.astype(np.float32)
    return slides


def test_a_run_folder_holds_all_that_prediction_and_readers_need(small_run, small_slides):
    train, val = small_slides[:2], small_slides[2:3]
    meta = read_meta(small_run / BEST)
    assert len(meta["genes"]) == meta["metadata"]["genes"] == 60
    assert meta["metadata"]["train_cells"] == 280 and meta["metadata"]["val_cells"] == 140
    assert meta["metadata"]["slides"] == [
        {"name": slide.name, "role": role, "digest": slide_digest(slide)}
        for role, slides in (("train", train), ("val", val))
        for slide in slides
    ]
    names = [f"train:{slide.name}" for slide in train] + [f"val:{val[0].name}"]
    assert list(meta["metadata"]["candidate_recall"]) == names
    assert set(meta["modules"]) == {
        "adapter",
        "encoder",
        "scaler",
        "gate",
        "model",
        "relevant_components",
        "typicality",
        "atlas",
    }
    assert RunConfig.load(small_run).unresolved() == []
    assert RunConfig.load_request(small_run) == small_config()
    inputs = json.loads((small_run / "inputs.json").read_text())
    assert [one["name"] for one in inputs["train"]] == [slide.name for slide in train]
    (held,) = inputs["val"]
    assert held.pop("sketch") == sketch(val[0]) and len(held.pop("places")) == 140
    assert held == {
        "name": val[0].name,
        "path": None,
        "digest": slide_digest(val[0]),
        "cells": 140,
    }
    profile = InputProfile.from_dict(inputs["profile"])
    assert profile.genes == meta["genes"] and len(profile.shared) == 80
    assert (profile.scaling, profile.values, profile.identifiers) == ("total", "counts", "symbols")
    assert json.loads((small_run / "selection.json").read_text())["mode"] == "none"
    reference = load_file(small_run / REFERENCE)
    assert reference.keys() == {"0.h", "0.pos", "1.h", "1.pos"}
    assert reference["1.h"].shape == (140, 16) and reference["1.pos"].shape == (140, 2)
    assert list((small_run / "tensorboard").iterdir())


def test_the_history_has_every_stage_in_order_and_a_row_for_every_epoch(small_run):
    rows = read_history(small_run / HISTORY)
    assert [r["step"] for r in rows] == sorted(r["step"] for r in rows)
    assert list(dict.fromkeys(r["stage"] for r in rows)) == ["encoder", "gate", "model"]
    epochs = [r for r in rows if "val_hgate_e_geo" in r]
    assert [r["epoch"] for r in epochs] == [0, 1, 2]
    assert all(math.isfinite(r["val_tedge_e_geo"]) for r in epochs)
    assert all(abs(r["val_e_geo_floor"]) < 1e-6 for r in epochs)
    losses = [r for r in rows if "loss" in r]
    assert all(r["lr"] > 0 and math.isfinite(r["loss"]) for r in losses)


def test_the_kept_epoch_is_the_best_of_those_after_the_ramp(small_run):
    meta = read_meta(small_run / LAST)
    rows = [r for r in read_history(small_run / HISTORY) if "val_hgate_e_geo" in r]
    counted = rows[1:]  # warm-up 1 and ramp 1: the cap is reached as epoch 2 ends
    best = min(counted, key=lambda r: r["val_hgate_e_geo"])
    assert meta["best_epoch"] == best["epoch"]
    assert meta["best"] == pytest.approx(best["val_hgate_e_geo"], rel=1e-4)
    assert rows[0]["best"] == 0


@pytest.mark.parametrize("stage, step", [("encoder", 4), ("gate", 2), ("model", 6), ("model", 8)])
def test_a_stopped_run_resumes_to_the_same_bits(
    small_run, small_slides, tmp_path, monkeypatch, stage, step
):
    train, val = small_slides[:2], small_slides[2:3]
    with pytest.raises(KeyboardInterrupt):
        fit(train, val, small_config(), tmp_path, stop=stop_after(monkeypatch, stage, step))
    stopped = read_meta(tmp_path / LAST)
    assert (stopped["stage"], stopped["step"]) == (stage, step)
    assert f"was stopped at step {step if stage == 'model' else 0} of " in unfinished(tmp_path)
    fit(train, val, out=tmp_path, resume=True)
    assert unfinished(tmp_path) is None
    for name in (BEST, LAST, REFERENCE):
        assert same_tensors(tmp_path / name, small_run / name), name
    assert read_meta(tmp_path / LAST) == read_meta(small_run / LAST)
    histories = [read_history(folder / HISTORY) for folder in (tmp_path, small_run)]
    for row in (row for rows in histories for row in rows):
        del row["seconds"]
    assert histories[0] == histories[1]


def test_a_finished_run_that_is_resumed_is_left_as_it_is(small_slides, tmp_path):
    train, val = small_slides[:2], small_slides[2:3]
    first = fit(train, val, small_config("train.epochs=2"), tmp_path)
    before = (tmp_path / LAST).read_bytes()
    again = fit(train, val, out=tmp_path, resume=True)
    assert again == first and (tmp_path / LAST).read_bytes() == before


def test_a_resumed_run_takes_its_settings_from_its_folder(
    small_run, small_slides, tmp_path, monkeypatch
):
    train, val = small_slides[:2], small_slides[2:3]
    with pytest.raises(KeyboardInterrupt):
        fit(train, val, small_config(), tmp_path, stop=stop_after(monkeypatch, "gate", 1))
    fit(train, val, small_config("train.seed=9", "train.epochs=1"), tmp_path, resume=True)
    assert RunConfig.load(tmp_path) == RunConfig.load(small_run)
    assert RunConfig.load_request(tmp_path) == small_config()
    assert same_tensors(tmp_path / BEST, small_run / BEST)


def test_a_folder_that_holds_a_run_is_not_trained_into(small_run, small_slides):
    before = (small_run / BEST).read_bytes()
    with pytest.raises(UserError, match="holds a run; resume it"):
        fit(small_slides[:2], [], small_config("train.seed=5"), small_run)
    assert (small_run / BEST).read_bytes() == before


def test_a_run_does_not_resume_on_other_genes_or_from_nothing(small_slides, tmp_path, monkeypatch):
    stop = stop_after(monkeypatch, "encoder", 2)
    with pytest.raises(KeyboardInterrupt):
        fit(small_slides[:2], [], small_config(), tmp_path, stop=stop)
    others = simulate("cortex", slides=2, spots=140, genes=60, seed=4)
    with pytest.raises(UserError, match="was not started with this slide"):
        fit(others, [], out=tmp_path, resume=True)
    fewer = [
        replace(slide, expression=slide.expression[:, :50], genes=slide.genes[:50])
        for slide in small_slides[:2]
    ]
    with pytest.raises(UserError, match="was not started with this slide"):
        fit(fewer, [], out=tmp_path, resume=True)
    with pytest.raises(UserError, match="stopped before its model was trained"):
        Predictor.load(tmp_path)
    with pytest.raises(UserError, match="requested.yaml cannot be read"):
        fit(small_slides[:2], [], out=tmp_path / "new", resume=True)


@pytest.mark.parametrize("embedding", [False, True])
def test_a_run_stopped_in_its_cross_validation_begins_it_again_with_the_same_donors(
    small_slides, tmp_path, embedding
):
    settings = ["selection.mode=quick", "encoder.component_kind=principal", "model.recycling=false"]
    settings += ["refine.anchor_weight=5", "refine.rca_power=0.5"]
    slides = small_slides[:3]
    if embedding:
        slides = brought([replace(slide) for slide in slides], 8, 0.1, seed=0)
        settings.append("data.embedding=obsm:X_pca")
    names = [slide.name for slide in slides]
    donors = dict(zip(names, "aab", strict=True))
    stop = threading.Event()
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        fit(slides, [], small_config(*settings), tmp_path, donors=donors, stop=stop)
    with pytest.raises(UserError, match="train --resume"):
        Predictor.load(tmp_path)
    result = fit(slides, [], out=tmp_path, resume=True)
    assert result.config.unresolved() == []
    table = json.loads((tmp_path / "selection.json").read_text())
    assert [choice["setting"] for choice in table["choices"]] == ["refinement"]
    assert [fold["held_out"] for fold in table["folds"]] == [names[:2], names[2:]]


def test_a_run_stopped_before_any_epoch_counts_keeps_its_last_weights(
    small_slides, tmp_path, monkeypatch
):
    """The weights of the stop must not stay the best."""
    config = small_config("train.epochs=2", "train.ramp_epochs=5")
    train, val = small_slides[:2], small_slides[2:3]
    with pytest.raises(KeyboardInterrupt):
        fit(train, val, config, tmp_path, stop=stop_after(monkeypatch, "model", 3))
    stopped = load_file(tmp_path / BEST)
    fit(train, val, out=tmp_path, resume=True)
    best, last = load_file(tmp_path / BEST), load_file(tmp_path / LAST)
    key = "model.mlp_state.0.weight"
    assert torch.equal(best[key], last[key]) and not torch.equal(best[key], stopped[key])


def test_another_seed_is_another_run(small_run, small_slides, tmp_path):
    config = small_config("train.seed=1", "train.epochs=1", "encoder.steps=2")
    fit(small_slides[:2], small_slides[2:3], config, tmp_path)
    ours, theirs = load_file(tmp_path / BEST), load_file(small_run / BEST)
    assert not torch.equal(ours["model.mlp_state.0.weight"], theirs["model.mlp_state.0.weight"])


def test_validation_slides_change_no_trained_weight(small_run, small_slides, tmp_path):
    """Whatever cells and genes the validation slide holds, the last weights are the same."""
    other = small_slides[3]
    lacking = np.isin(other.genes, read_meta(small_run / LAST)["genes"][:5])
    other = replace(other, expression=other.expression[:, ~lacking], genes=other.genes[~lacking])
    fit(small_slides[:2], [other], small_config(), tmp_path)
    ours, theirs = load_file(tmp_path / LAST), load_file(small_run / LAST)
    assert {"encoder", "scaler", "gate", "model"} <= {key.split(".")[0] for key in theirs}
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert read_meta(tmp_path / LAST)["genes"] == read_meta(small_run / LAST)["genes"]


def test_one_of_more_than_three_slides_is_kept_to_decide_when_to_stop(small_slides, tmp_path):
    config = small_config("train.epochs=1", "train.gate_steps=0", "encoder.steps=1")
    donors = {slide.name: "abbb"[i] for i, slide in enumerate(small_slides)}
    fit(small_slides, None, config, tmp_path / "four", donors=donors)
    inputs = json.loads((tmp_path / "four" / "inputs.json").read_text())
    names = {role: [one["name"] for one in inputs[role]] for role in ("train", "val")}
    assert sorted(names["train"] + names["val"]) == sorted(donors)
    assert len(names["val"]) == 1 and donors[names["val"][0]] == "b"
    fit(small_slides[:3], None, config, tmp_path / "three")
    inputs = json.loads((tmp_path / "three" / "inputs.json").read_text())
    assert len(inputs["train"]) == 3 and inputs["val"] == []


def test_training_without_validation_runs_every_epoch_and_keeps_the_last_weights(
    small_slides, tmp_path
):
    result = fit(small_slides[:2], [], small_config(), tmp_path)
    assert result.best is None and result.best_epoch is None
    settings = small_config().train
    meta = read_meta(tmp_path / LAST)
    assert (meta["stage"], meta["step"]) == ("model", settings.epochs * settings.minisets)
    best, last = load_file(tmp_path / BEST), load_file(tmp_path / LAST)
    assert all(torch.equal(best[key], last[key]) for key in best)


@pytest.mark.parametrize("kind", ["slide", "mixed"])
def test_whole_slides_are_trained_on_with_all_losses(small_slides, tmp_path, kind):
    config = small_config(
        f"train.batch_kind={kind}",
        f"train.batch_size={2 if kind == 'mixed' else 1}",
        "train.steps_per_epoch=4",
        "train.probe_rows=16",
        "train.lambda_long=0.1",
        "train.lambda_multiscale=0.1",
        "train.lambda_gram=0.1",
        "graph.target_mode=sketch",
    )
    fit(small_slides[:2], small_slides[2:3], config, tmp_path)
    row = [r for r in read_history(tmp_path / HISTORY) if "l_long" in r][-1]
    assert row["l_long"] > 0 and row["l_gram"] > 0 and row["l_multiscale"] > 0


def test_an_embedding_of_the_user_replaces_the_encoder(small_slides, tmp_path):
    slides = brought(simulate("cortex", slides=3, spots=90, genes=60, seed=5), 10, 0.1, seed=0)
    config = small_config("data.embedding=obsm:X_pca")
    fit(slides[:2], slides[2:], config, tmp_path)
    assert {row["stage"] for row in read_history(tmp_path / HISTORY)} == {"gate", "model"}
    predictor = Predictor.load(tmp_path)
    assert predictor.encoder is None
    assert predictor.predict(slides[2]).pos.shape == (90, 2)
    with pytest.raises(UserError, match="--embedding"):
        predictor.predict(small_slides[0])
    narrow = replace(slides[2], embedding=slides[2].embedding[:, :4])
    with pytest.raises(UserError, match="has 4 dimensions, the run was trained on 10"):
        predictor.predict(narrow)
    with pytest.raises(UserError, match="have 10 and 4 dimensions"):
        fit([*slides[:2], replace(narrow, name="narrow")], [], config, tmp_path / "b")
    with pytest.raises(UserError, match="carries no embedding"):
        fit(small_slides[:2], [], config, tmp_path / "c")


def test_slides_that_cannot_be_trained_on_are_refused_by_name(small_slides, tmp_path):
    config = small_config("train.miniset_min=150", "train.miniset_max=200", "encoder.steps=0")
    with pytest.raises(UserError, match=r"has 140 cells.*train\.miniset_min=140"):
        fit(small_slides[:2], small_slides[2:3], config, tmp_path)
    blind = replace(small_slides[1], pos=None)
    with pytest.raises(UserError, match=f"{blind.name}: no positions to train on"):
        fit([small_slides[0], blind], [], small_config(), tmp_path)
    with pytest.raises(UserError, match="no slide to train on"):
        fit([], [], small_config(), tmp_path)


def test_a_model_learns_where_cells_lie(tmp_path):
    """An embedding that holds the position, up to noise and a mixing: the map must come out.

    Without training, the same model reaches a Spearman correlation of 0.66 and 4.6 times chance.
    """
    slides = simulate("cortex", slides=3, spots=200, genes=50, seed=9)
    slides = brought(slides, 16, 0.05, seed=1, squash=np.tanh)
    config = small_config(
        "data.embedding=obsm:x",
        "train.epochs=4",
        "train.minisets=24",
        "train.lr=2e-3",
        "train.gate_steps=10",
        "model.init=mlp",
        "model.recycles=3",
        "refine.steps=0",
    )
    fit(slides[:2], slides[2:], config, tmp_path)
    prediction = Predictor.load(tmp_path).predict(slides[2])
    score = evaluate_layout(prediction.pos, slides[2].pos)
    assert score["distance_spearman"] > 0.87
    assert score["neighbor_hit@15"] > 8 * score["neighbor_hit_chance@15"]


def test_a_shared_encoder_gives_the_same_run_as_its_own(small_run, small_slides, tmp_path):
    encoder, run = tmp_path / "encoder", tmp_path / "run"
    fit_encoder(small_slides[:2], small_config(), encoder)
    assert read_meta(encoder / LAST)["stage"] == "gate"
    fit(small_slides[:2], small_slides[2:3], small_config(), run, encoder=encoder)
    for name in (BEST, LAST):
        assert same_tensors(run / name, small_run / name)
    others = simulate("cortex", slides=2, spots=140, genes=60, seed=3)
    with pytest.raises(UserError, match="no trained encoder of these slides' genes"):
        fit(others, [], small_config(), tmp_path / "other", encoder=encoder)


def test_an_encoder_that_was_stopped_is_resumed_to_the_same_bits_and_not_shared_before(
    small_slides, tmp_path, monkeypatch
):
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    fit_encoder(small_slides[:2], small_config(), whole)
    with pytest.raises(KeyboardInterrupt):
        stop = stop_after(monkeypatch, "encoder", 3)
        fit_encoder(small_slides[:2], small_config(), halved, stop=stop)
    with pytest.raises(UserError, match="no trained encoder"):
        fit(small_slides[:2], [], small_config(), tmp_path / "run", encoder=halved)
    fit_encoder(small_slides[:2], small_config(), halved, resume=True)
    assert same_tensors(halved / LAST, whole / LAST)


@pytest.mark.parametrize(
    ("count", "level", "said"),
    [(1, "WARNING", "score the run on another slide"), (2, "INFO", "does not stop early")],
)
def test_one_slide_alone_is_a_warning(small_slides, caplog, count, level, said):
    with caplog.at_level("INFO", logger="ipar_sparse"):
        divide(small_slides[:count], [], None)
    (told,) = caplog.records
    assert told.levelname == level and said in told.message
