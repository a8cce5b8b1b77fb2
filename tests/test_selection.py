"""What a run leaves open is selected on left-out donors, saved, and used."""

import json

import numpy as np
import pytest
import torch

from ipar_sparse.config import RunConfig, load_config
from ipar_sparse.config.presets import DEFAULT_SELECTION
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.slide import Slide
from ipar_sparse.inference import costs
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.inference.run_folder import LAST, read_meta
from ipar_sparse.layout.uncertainty import square_errors
from ipar_sparse.train import brief, encoder
from ipar_sparse.train.brief import load_kernels
from ipar_sparse.train.cross_validation import donor_folds
from ipar_sparse.train.fit import fit, fit_encoder
from ipar_sparse.train.loop import TrainingLoop
from ipar_sparse.train.model import RecordedSteps
from ipar_sparse.train.selection import best_candidate, resolve_from_data, select_settings

SMALL = [
    "train.minisets=6",
    "train.epochs=2",
    "train.ramp_epochs=1",
    "train.gate_steps=3",
    "train.miniset_min=40",
    "train.miniset_max=60",
    "encoder.steps=8",
    "encoder.hidden=[24]",
    "encoder.out=16",
    "model.dim=16",
    "model.recycles=2",
    "model.channels=16",
    "model.head_channels=8",
    "graph.k=12",
    "train.device=cpu",
]
BROUGHT = [*SMALL, "data.embedding=obsm:H", "model.recycling=false"]


def slide(name, dims, seed, nuisance=0.0, n=200):
    """Cells whose position stands in two dimensions of the embedding, noise in the others."""
    rng = np.random.default_rng(seed)
    pos = rng.uniform(-1, 1, (n, 2)) * [1.0, 0.6]
    h = 0.05 * rng.standard_normal((n, 8))
    h[:, dims] += pos
    h[:, 7] += nuisance * rng.standard_normal(n)  # what cells differ in, wherever they lie
    cells = np.array([f"{name}-{i}" for i in range(n)])
    return Slide(name, None, np.array([]), cells, pos=pos, embedding=h.astype(np.float32))


def selected(slides, folder, donors=None, settings=BROUGHT):
    with TrainingLoop(folder, 0, torch.device("cpu")) as loop:
        return select_settings(slides, donors, load_config(None, settings), None, loop)


def table(result, setting):
    return next(choice for choice in result.choices if choice["setting"] == setting)


def test_an_atlas_is_the_initial_layout_where_donors_share_a_plan(tmp_path):
    slides = [slide(name, [0, 1], seed, 2.0) for seed, name in enumerate("abc")]
    config, result = selected(slides, tmp_path)
    assert config.model.init in ("atlas", "mlp") and result.donors == 3
    scores = {row["name"]: row for row in table(result, "initial layout")["candidates"]}
    assert scores["atlas"]["distance_spearman"] > 0.9 > 0.6 > scores["pca"]["distance_spearman"]


def test_the_principal_plane_is_where_every_donor_is_its_own(tmp_path):
    slides = [slide(name, [2 * i, 2 * i + 1], i) for i, name in enumerate("abc")]
    config, result = selected(slides, tmp_path)
    assert config.model.init == "pca"
    assert config.refine.distance_correction_steps == 0  # nothing tells how uncertain places are
    assert config.uncertainty.error_slope == 0
    chosen = table(result, "initial layout")
    assert "over atlas" in chosen["reason"] and chosen["selected"] == "pca"


def test_slides_of_one_donor_are_left_out_together(tmp_path):
    """Sections of one donor agree, which says nothing of the next donor."""
    pairs = [
        slide(f"{d}{i}", [2 * j, 2 * j + 1], 2 * j + i) for j, d in enumerate("ab") for i in (1, 2)
    ]
    donors = {s.name: s.name[0] for s in pairs}
    folds = donor_folds(pairs, donors, 3, 3)
    assert [[s.name for s in test] for _, test in folds] == [["a1", "a2"], ["b1", "b2"]]
    assert not {s.name[0] for s in folds[0][0]} & {s.name[0] for s in folds[0][1]}
    config, result = selected(pairs, tmp_path, donors)
    assert config.model.init == "pca" and result.donors == 2


def test_a_donor_of_many_slides_counts_by_some_of_them():
    many = [slide(f"a{i}", [0, 1], i, n=30) for i in range(7)] + [slide("b", [0, 1], 9, n=30)]
    donors = {s.name: s.name[0] for s in many}
    (_, first), (_, second) = donor_folds(many, donors, 3, 3)
    assert [s.name for s in first] == ["a0", "a3", "a6"]
    assert [s.name for s in second] == ["b"]


def test_from_six_donors_on_all_are_left_out_once():
    many = [slide(name, [0, 1], i, n=30) for i, name in enumerate("abcdefg")]
    held = [[s.name for s in test] for _, test in donor_folds(many, None, 3, 3)]
    assert held == [["a", "d", "g"], ["b", "e"], ["c", "f"]]


def test_few_slides_of_a_group_are_placed_and_all_others_learned_from():
    many = [slide(name, [0, 1], i, n=30) for i, name in enumerate("abcdefg")]
    (train, test), *_ = donor_folds(many, None, 3, 3, left_out=2)
    assert [s.name for s in test] == ["a", "g"]
    assert [s.name for s in train] == ["b", "c", "e", "f"]


def test_a_quick_selection_is_short_and_a_full_one_tries_more(tmp_path):
    """Quick places two slides of a donor, and no run on real sets took what it leaves out."""
    slides = [slide(f"{d}{i}", [0, 1], i, n=70) for d in "ab" for i in range(3)]
    donors = {s.name: s.name[0] for s in slides}
    tried, left_out = {}, {}
    for mode in ("quick", "full"):
        settings = [*BROUGHT, f"selection.mode={mode}", "refine.steps=20"]
        _, result = selected(slides, tmp_path / mode, donors, settings)
        tried[mode] = {row["name"] for choice in result.choices for row in choice["candidates"]}
        left_out[mode] = [len(fold["held_out"]) for fold in result.folds]
    assert left_out == {"quick": [2, 2], "full": [3, 3]}
    assert tried["full"] - tried["quick"] >= {"mlp"} and "pca" in tried["quick"]


def test_one_donor_tells_nothing_and_defaults_are_taken(tmp_path):
    slides = [slide("a", [0, 1], 0), slide("b", [0, 1], 1)]
    config, result = selected(slides, tmp_path, {"a": "x", "b": "x"})
    assert result.donors == 0 and not result.choices
    assert config.model.init == "atlas" and not config.uncertainty.calibrated
    assert config.unresolved() == []


def test_no_selection_takes_the_named_defaults_at_once(tmp_path):
    slides = [slide(name, [0, 1], seed) for seed, name in enumerate("abc")]
    settings = [*SMALL, "data.embedding=obsm:H", "selection.mode=none"]
    config, result = selected(slides, tmp_path, settings=settings)
    assert {key: config.get(key) for key in DEFAULT_SELECTION} == DEFAULT_SELECTION
    assert result.mode == "none" and result.selected.keys() >= DEFAULT_SELECTION.keys()


def test_what_is_asked_for_is_not_tried(tmp_path):
    slides = [slide(name, [2 * i, 2 * i + 1], i) for i, name in enumerate("abc")]
    asked = [*BROUGHT, "model.init=atlas", "refine.anchor_weight=3", "refine.rca_power=0.25"]
    config, result = selected(slides, tmp_path, settings=asked)
    assert config.model.init == "atlas" and config.refine.anchor_weight == 3
    tried = {choice["setting"] for choice in result.choices}
    assert tried == {"distance correction", "refinement"}


def test_a_candidate_must_gain_a_standard_error():
    first = np.array([0.50, 0.50, 0.50])
    noisy = first + np.array([0.20, -0.14, 0.0])  # mean +0.02, standard error 0.10
    steady = first + np.array([0.011, 0.010, 0.009])
    assert best_candidate([first, noisy]) == 0
    assert best_candidate([first, noisy, steady]) == 2
    assert best_candidate([first, steady, first + 0.02]) == 2
    assert best_candidate([first, first - 0.1]) == 0


def test_the_error_model_is_that_of_the_left_out_cells(tmp_path):
    slides = [slide(name, [0, 1], seed) for seed, name in enumerate("abc")]
    asked = load_config(None, [*BROUGHT, "model.init=atlas"])
    fit(slides[:2], [], asked, tmp_path / "run")
    found = Predictor.load(tmp_path / "run")
    assert found.config.uncertainty.calibrated
    prediction = found.predict(slides[2])
    typical = prediction.typicality.p_value > 0.1
    said = np.square(prediction.uncertainty[typical]).mean()
    seen = square_errors(prediction.pos, slides[2].pos)[typical].mean()
    assert 0.4 < said / seen < 2.5
    assert found.config.uncertainty.error_intercept < 0.1  # the embedding tells the positions


@pytest.fixture(scope="module")
def slides():
    return simulate("cortex", slides=3, spots=150, genes=60)


@pytest.fixture(scope="module")
def run(slides, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    fit(slides[:2], [slides[2]], load_config(None, SMALL), out)
    return out


def test_a_run_saves_the_request_the_table_and_what_was_decided(run, slides):
    assert "model.init" in RunConfig.load_request(run).unresolved()
    config = RunConfig.load(run)
    assert config.unresolved() == []
    found = json.loads((run / "selection.json").read_text())
    assert found["donors"] == 2 and len(found["folds"]) == 2
    assert {key: config.get(key) for key in found["selected"]} == found["selected"]
    for choice in found["choices"]:
        rows = {row["name"]: row for row in choice["candidates"]}
        assert choice["selected"] in rows and choice["reason"]
        assert all(row["score_se"] >= 0 for row in rows.values())
    assert Predictor.load(run).config == config
    held_out = slides[2].name
    assert all(held_out not in fold["held_out"] + fold["train"] for fold in found["folds"])


def test_a_selection_is_the_same_every_time(run, slides, tmp_path):
    fit(slides[:2], [slides[2]], load_config(None, SMALL), tmp_path)
    for name in ("config.json", "selection.json"):
        assert (tmp_path / name).read_text() == (run / name).read_text()


def test_a_shared_encoder_brings_its_selection_along(run, slides, tmp_path):
    encoder, other = tmp_path / "encoder", tmp_path / "other"
    fit_encoder(slides[:2], load_config(None, SMALL), encoder)
    fit(slides[:2], [slides[2]], load_config(None, SMALL), other, encoder=encoder)
    assert RunConfig.load(other) == RunConfig.load(run)
    assert read_meta(encoder / LAST)["stage"] == "gate"


def test_a_run_without_recycles_hands_out_its_initial_layout(slides, tmp_path):
    settings = [*SMALL, "selection.mode=none", "model.recycling=false", "refine.steps=0"]
    settings += ["refine.distance_correction_steps=0"]
    fit(slides[:2], [slides[2]], load_config(None, settings), tmp_path)
    prediction = Predictor.load(tmp_path).predict(slides[2])
    assert len(prediction.trajectory) == 1
    np.testing.assert_array_equal(prediction.pos, prediction.trajectory[0])


def test_a_run_says_and_saves_what_its_steps_see(slides, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(costs, "KIND_FROM_CELLS", {"cpu": {0: "miniset", 100: "mixed"}})
    settings = [*SMALL, "selection.mode=none", "model.recycling=true"]
    fit_encoder(
        slides[:2], load_config(None, [*settings, "train.batch_kind=slide"]), tmp_path / "e"
    )
    with caplog.at_level("INFO"):
        fit(slides[:2], [], load_config(None, settings), tmp_path / "run", encoder=tmp_path / "e")
    said = [line for line in caplog.messages if "train.batch_kind=" in line]
    assert len(said) == 1 and said[0].startswith("each step sees a few hundred cells and a whole")
    assert "best for slides of 150 cells on the CPU (train.batch_kind=mixed)" in said[0]
    assert RunConfig.load(tmp_path / "run").train.batch_kind == "mixed"
    assert RunConfig.load_request(tmp_path / "run").train.batch_kind == "auto"


def test_what_follows_from_the_data_is_decided_from_the_training_slides(slides):
    config = resolve_from_data(load_config(None, []), slides)
    totals = [np.median(np.asarray(s.expression.sum(1)).ravel()) for s in slides]
    assert config.data.target_sum == pytest.approx(np.median(totals))
    assert config.data.normalized is False
    assert config.encoder.steps == 400
    assert config.train.steps_per_epoch == config.train.minisets
    assert config.train.batch_kind == "miniset"


@pytest.mark.parametrize("init", ["atlas", "pca", "mlp"])
def test_kernels_are_loaded_by_steps_on_walks_of_every_length(init, monkeypatch):
    """On a GPU, before anything is timed; here the same steps are taken on the CPU."""
    step, taken = RecordedSteps.__call__, {}

    def noted(self, share, seeds, epoch):
        losses = step(self, share, seeds, epoch)
        walk = share.alone.target.walk
        taken[share.cells] = walk.steps, float(losses["loss"]), float(losses["w_rw"])
        return losses

    monkeypatch.setattr(RecordedSteps, "__call__", noted)
    small = [one for one in BROUGHT[:-1] if "miniset" not in one]
    config = load_config(None, [*small, f"model.init={init}"])
    load_kernels(resolve_from_data(config, [slide("a", [0, 1], 0)]), 8, torch.device("cpu"))
    assert {walk for walk, _, _ in taken.values()} == {3, 4, 5}
    assert {n % 16 == 0 for n in taken} == {True, False} and max(taken) == 384
    assert all(np.isfinite(loss) and weight > 0 for _, loss, weight in taken.values())


def test_kernels_of_encoder_and_placing_are_loaded_too(monkeypatch):
    loss, refine, taken = encoder.encoder_loss, brief.steps.refine, {"losses": [], "moved": []}

    def noted_loss(*given):
        found = loss(*given)
        taken["losses"].append(float(found["loss"].detach()))
        return found

    def noted_refine(pos, graph, config):
        found = refine(pos, graph, config)
        taken["moved"].append(float((found - pos).norm()))
        return found

    monkeypatch.setattr(encoder, "encoder_loss", noted_loss)
    monkeypatch.setattr(brief.steps, "refine", noted_refine)
    values = {**DEFAULT_SELECTION, "data.target_sum": 1e4, "data.normalized": False}
    config = load_config(None, SMALL).with_values({**values, "train.steps_per_epoch": 6})
    load_kernels(config, 16, torch.device("cpu"), [f"gene{number}" for number in range(60)])
    assert len(taken["losses"]) == 3 and np.isfinite(taken["losses"]).all()
    assert len(taken["moved"]) == 1 and 0 < taken["moved"][0] < np.inf
