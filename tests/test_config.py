import json

import pytest
import yaml

from ipar_sparse.config import (
    DECIDED_FROM_DATA,
    DEFAULT_SELECTION,
    MAIN_SETTINGS,
    PRESETS,
    RunConfig,
    describe,
    load_config,
)
from ipar_sparse.errors import UserError


def test_defaults_are_the_recipe_on_record():
    config = load_config()
    assert config == RunConfig()
    assert (config.train.lr, config.train.rw_cap, config.train.patience) == (5e-4, 0.3, 4)
    assert (config.graph.k, config.model.beta, config.model.recycles) == (100, 2.0, 5)
    assert config.encoder.hidden == (512, 256) and config.encoder.out == 128


def test_override_beats_file_beats_preset(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "fast", {"train": {"epochs": 2, "lr": 0.1, "seed": 7}})
    path = tmp_path / "run.yaml"
    path.write_text("preset: fast\ntrain:\n  lr: 0.01\n  epochs: 3\ndata:\n")
    config = load_config(path, ["train.epochs=4", "encoder.hidden=[32, 16]"])
    assert (config.train.epochs, config.train.lr, config.train.seed) == (4, 0.01, 7)
    assert config.encoder.hidden == (32, 16)
    assert config.preset == "fast"


def test_values_are_read_as_yaml():
    config = load_config(
        overrides=["data.max_genes=none", "train.lr=1e-3", "model.shared=false", "eval.ks=[5]"]
    )
    assert config.data.max_genes is None
    assert config.train.lr == 1e-3
    assert config.model.shared is False
    assert config.eval.ks == (5,)


def decided(**sections):
    """A configuration that leaves nothing open."""
    return load_config(**sections).with_values(
        {
            **DEFAULT_SELECTION,
            "data.normalized": False,
            "data.target_sum": 1e4,
            "encoder.steps": 400,
            "train.batch_kind": "miniset",
            "train.steps_per_epoch": 120,
        }
    )


def test_saved_configuration_is_the_same_one(tmp_path):
    config = decided(train={"epochs": 3}, model={"heads": 2}, data={"layer": "counts"})
    config.save(tmp_path)
    assert RunConfig.load(tmp_path) == config
    assert json.loads((tmp_path / "config.json").read_text())["train"]["epochs"] == 3


def test_saved_request_is_the_same_one(tmp_path):
    request = load_config(overrides=["train.epochs=3", "model.heads=2", "selection.mode=none"])
    request.save_request(tmp_path)
    assert RunConfig.load_request(tmp_path) == request
    assert load_config(tmp_path / "requested.yaml") == request
    assert yaml.safe_load((tmp_path / "requested.yaml").read_text())["model"]["init"] == "auto"


def test_a_configuration_with_open_values_is_not_saved(tmp_path):
    request = load_config()
    assert set(request.unresolved()) == set(DECIDED_FROM_DATA)
    with pytest.raises(ValueError, match="model.init"):
        request.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert decided().unresolved() == []


def test_named_defaults_are_settings_that_can_be_left_open():
    assert set(DEFAULT_SELECTION) <= set(DECIDED_FROM_DATA)
    assert not DEFAULT_SELECTION["uncertainty.calibrated"]


def test_none_is_a_mode_of_selection_and_no_missing_value(tmp_path):
    assert load_config(overrides=["selection.mode=none"]).selection.mode == "none"
    (tmp_path / "run.yaml").write_text("selection: {mode: none}")
    assert load_config(tmp_path / "run.yaml").selection.mode == "none"


def test_values_are_read_and_changed_by_key():
    config = RunConfig().with_values({"train.epochs": 3, "model.init": "pca"})
    assert (config.get("train.epochs"), config.get("model.init")) == (3, "pca")
    with pytest.raises(UserError, match="did you mean train.epochs"):
        config.with_values({"train.epoch": 3})


def test_replace_checks_what_it_is_given():
    config = RunConfig().replace(train={"epochs": 3}, model={"dim": 64}, encoder={"out": 64})
    assert (config.train.epochs, config.model.dim, config.train.lr) == (3, 64, 5e-4)
    with pytest.raises(UserError, match="train.epochs"):
        config.replace(train={"epochs": 0})


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.epoch=3", ["unknown config key train.epoch", "did you mean train.epochs?"]),
        ("epochs=3", ["unknown config key epochs", "did you mean train.epochs?"]),
        ("gate_step=3", ["did you mean train.gate_steps?"]),
        ("zzz.q=1", ["unknown config key zzz", "ipar-sparse config"]),
        ("train.lr=fast", ["train.lr", "'fast'", "number"]),
        ("train.lr=-1", ["train.lr", "-1", "greater than 0"]),
        ("train.lr=.nan", ["train.lr", "nan"]),
        ("model.heads=2.5", ["model.heads", "2.5", "integer"]),
        (
            "train.batch_kind=cell",
            ["batch_kind", "'cell'", "'miniset', 'slide' or 'mixed'"],
        ),
        ("selection.mode=fast", ["selection.mode", "'quick', 'full' or 'none'"]),
        ("refine.rca_power=-1", ["refine.rca_power", "greater than or equal to 0"]),
        ("train.k_fraction_range=[0.2,0.1]", ["k_fraction_range must rise, got 0.2 to 0.1"]),
        ("eval.ks=10", ["eval.ks", "a list"]),
        ("model.gate_heads=3", ["gate_heads must be 1 or heads (4), got 3"]),
        ("train.miniset_min=500", ["miniset_min (500)", "miniset_max (384)"]),
        ("model.dim=64", ["model.dim (64)", "encoder.out (128)"]),
        ("data.embedding='obsm:'", ["obsm:X_pca"]),
        ("preset=v9", ["unknown preset 'v9'", "v1"]),
        ("train=3", ["config section train", "3"]),
        ("train.lr", ["section.key=value"]),
        ("train..lr=1", ["section.key=value"]),
        ("train.lr=[1", ["not valid YAML"]),
    ],
)
def test_bad_override_is_one_line_that_names_it(override, words):
    with pytest.raises(UserError) as caught:
        load_config(overrides=[override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "text, words",
    [
        ("train: [1, 2", ["not valid YAML", "line"]),
        ("- 1\n- 2\n", ["must hold sections", "list"]),
        ("train:\n  epochz: 3\n", ["train.epochz", "did you mean train.epochs?"]),
    ],
)
def test_bad_file_is_one_line_that_names_it(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert "\n" not in message and "bad.yaml" in message
    for word in words:
        assert word in message


def test_missing_file_and_foreign_folder(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="not a run directory"):
        RunConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        RunConfig.load(tmp_path)


def test_a_run_of_another_format_is_refused(tmp_path):
    decided().save(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for found in (1, 99, None):
        path.write_text(json.dumps({**values, "format": found}))
        with pytest.raises(UserError, match=f"run format {found}, this version reads format 2"):
            RunConfig.load(tmp_path)


def test_a_run_stopped_before_anything_was_decided_says_how_to_go_on(tmp_path):
    load_config().save_request(tmp_path)
    with pytest.raises(UserError, match="train --resume --out"):
        RunConfig.load(tmp_path)
    (tmp_path / "requested.yaml").write_text("[1, 2")
    with pytest.raises(UserError, match="requested.yaml cannot be read"):
        RunConfig.load_request(tmp_path)


def test_every_setting_is_explained():
    settings = describe()
    assert len(settings) == len({setting.key for setting in settings})
    for key, values, default, text in settings:
        assert values and default, key
        assert text.endswith(".") and "\n" not in text, key


def test_the_settings_that_matter_most_are_settings():
    keys = [key for group in MAIN_SETTINGS.values() for key in group]
    assert len(keys) == len(set(keys)) <= 16
    assert set(keys) <= {setting.key for setting in describe()}


def test_values_are_told_in_words():
    told = {setting.key: (setting.values, setting.default) for setting in describe()}
    assert told["selection.mode"] == ("quick | full | none", "quick")
    assert told["data.max_genes"] == ("integer | none", "2000")
    assert told["model.geo_schedule"] == ("all | last | list of integer", "all")
    assert told["train.k_fraction_range"] == ("list of number | none", "none")
    assert told["model.shared"] == ("true | false", "true")
    assert told["eval.ks"] == ("list of integer", "[10, 15]")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_run_that_can_be_saved(preset, tmp_path):
    config = decided(preset=preset)
    config.save(tmp_path)
    assert RunConfig.load(tmp_path) == config and config.preset == preset


def test_an_encoder_is_trained_for_as_many_steps_as_its_cells_ask_for():
    settings = RunConfig().encoder
    assert settings.steps_for(500) == 400
    assert settings.steps_for(8000) == round(50 * 8000 / 512) == 781
    assert settings.steps_for(10**6) == 2000
    assert RunConfig().replace(encoder={"steps": 7}).encoder.steps_for(10**6) == 7


def test_a_model_without_recycles_has_no_use_for_a_gate():
    assert RunConfig().model.gated
    for values in ({"beta": 0.0}, {"recycling": False}):
        assert not RunConfig().replace(model=values).model.gated
    load_config(preset="gate-mix").replace(model={"recycling": False})  # as selection may find


def test_a_file_in_place_of_a_run_is_told(tmp_path):
    slide = tmp_path / "slide.h5ad"
    slide.write_bytes(b"")
    with pytest.raises(UserError, match="is a file and no run; give the --out folder"):
        RunConfig.load(slide)
