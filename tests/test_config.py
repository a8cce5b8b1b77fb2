import json

import pytest
import yaml

from ipar_sparse.config import PRESETS, RunConfig, describe, load_config
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


def test_saved_configuration_is_the_same_one(tmp_path):
    config = load_config(overrides=["train.epochs=3", "model.heads=2", "data.layer=counts"])
    config.save(tmp_path)
    assert RunConfig.load(tmp_path) == config
    as_yaml = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert as_yaml == json.loads((tmp_path / "config.json").read_text())
    assert load_config(tmp_path / "config.yaml") == config


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
        ("train.unit=cell", ["train.unit", "'cell'", "'miniset', 'slide' or 'mixed'"]),
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


def test_every_setting_is_explained():
    rows = describe()
    assert len(rows) == len({key for key, *_ in rows})
    assert all(kind and default and text for _, kind, default, text in rows)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_run_that_can_be_saved(preset, tmp_path):
    config = load_config(preset=preset)
    config.save(tmp_path)
    assert RunConfig.load(tmp_path) == config and config.preset == preset


def test_stage_a_is_as_long_as_its_cells_ask():
    settings = RunConfig().encoder
    assert settings.steps_for(500) == 400
    assert settings.steps_for(8000) == round(50 * 8000 / 512) == 781
    assert settings.steps_for(10**6) == 2000
    assert RunConfig().replace(encoder={"steps": 7}).encoder.steps_for(10**6) == 7


def test_a_run_saved_before_a_setting_existed_keeps_what_was_done_then(tmp_path):
    config = RunConfig().replace(
        data={"target_sum": 1e4},
        encoder={"standardize": 0.0, "spatial_genes": 0.0, "keep": 0.0, "kept": "principal"},
    )
    config.save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["data"]["target_sum"]
    for name in ("standardize", "spatial_genes", "keep", "kept"):
        del values["encoder"][name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert RunConfig.load(tmp_path) == config != RunConfig()


def test_a_run_saved_when_whole_slides_took_two_passes_is_read(tmp_path):
    config = RunConfig()
    config.save(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["graph"]["fine"] = 15  # how many candidates the second one looked at
    del values["refine"]["expected"]
    path.write_text(json.dumps(values))
    found = RunConfig.load(tmp_path)
    assert found.refine.expected == 0 and found.graph == config.graph
    with pytest.raises(UserError, match="unknown config key graph.fine"):
        load_config(None, ["graph.fine=5"])


def test_what_a_run_once_left_to_donors_is_read(tmp_path):
    RunConfig().save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["encoder"]["keep"] = None
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert RunConfig.load(tmp_path).encoder.keep == 0.5
