"""Typing right and wrong things at the command line."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import anndata
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ipar_sparse import cli
from ipar_sparse.config import MAIN_SETTINGS, RunConfig, describe, load_config
from ipar_sparse.config.schema import REQUESTED
from ipar_sparse.data.copies import slide_digest
from ipar_sparse.data.readers import read_slides
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.inference.run_folder import BEST, LAST, PREVIOUS, read_meta
from ipar_sparse.train.history import HISTORY, read_history
from ipar_sparse.train.run_folder import LOCK

FIT = importlib.import_module("ipar_sparse.train.fit")

TINY = {
    "data": {"max_genes": 40},
    "encoder": {"hidden": [16], "out": 8, "steps": 5, "batch_size": 32},
    "graph": {"k": 10},
    "model": {"dim": 8, "channels": 8, "heads": 2, "head_channels": 4, "recycles": 2},
    "train": {
        "epochs": 2,
        "minisets": 4,
        "val_minisets": 2,
        "miniset_min": 32,
        "miniset_max": 48,
        "gate_steps": 3,
        "warmup_epochs": 0,
        "ramp_epochs": 1,
    },
}


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    argv = f"simulate {folder} --slides 3 --spots 120 --genes 60".split()
    assert cli.run_command(argv) == 0
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return folder


@pytest.fixture(scope="module")
def run(slides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert cli.run_command(train_argv(slides, folder)) == 0
    return folder


def train_argv(slides, out, *more):
    return [
        "train",
        f"{slides}/cortex1.h5ad",
        "--val",
        f"{slides}/cortex2.h5ad",
        "--out",
        str(out),
        "--config",
        f"{slides}/tiny.yaml",
        *map(str, more),
    ]


@pytest.fixture
def refused(capfd, tmp_path):
    """Runs a command that must fail; gives its one line of error. Nothing new may be left."""

    def check(*argv, code=2, folder=tmp_path):
        before = listing(folder)
        capfd.readouterr()
        assert cli.run_command([str(a) for a in argv]) == code
        out, err = capfd.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in err
        assert listing(folder) == before
        return errors[0]

    return check


def listing(folder):
    found = sorted(path for path in folder.rglob("*") if path.name != LOCK)  # touched when held
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in found}


def broken(slides, path, change):
    """A copy of a slide with something wrong in it."""
    adata = anndata.read_h5ad(slides / "cortex1.h5ad")
    adata = change(adata) or adata
    adata.write_h5ad(path)
    return path


def drop_positions(adata):
    del adata.obsm["spatial"]


def nan_position(adata):
    adata.obsm["spatial"][5, 0] = np.nan


def negative_count(adata):
    adata.X = adata.X.toarray()
    adata.X[3, 2] = -1


def infinite_count(adata):
    adata.X = adata.X.toarray()
    adata.X[3, 2] = np.inf


def duplicate_names(adata):
    adata.obs_names = [adata.obs_names[0], *adata.obs_names[:-1]]


def other_genes(adata):
    adata.var_names = [f"Other{i}" for i in range(adata.n_vars)]


def too_few(adata):
    return adata[:20].copy()


@pytest.mark.parametrize(
    "change, words",
    [
        (drop_positions, ["spatial"]),
        (nan_position, ["NaN"]),
        (negative_count, ["negative"]),
        (infinite_count, ["finite"]),
        (duplicate_names, ["cortex1"]),
        (other_genes, ["gene"]),
        (too_few, ["20 cells", "32"]),
    ],
)
def test_a_bad_training_slide_stops_before_anything_is_made(
    slides, tmp_path, refused, change, words
):
    path = broken(slides, tmp_path / "bad.h5ad", change)
    line = refused(
        "train",
        slides / "cortex3.h5ad",
        path,
        "--val",
        slides / "cortex2.h5ad",
        "--out",
        tmp_path / "run",
        "--config",
        slides / "tiny.yaml",
    )
    assert "bad" in line
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "more, words",
    [
        (["--set", "train.epoch=3"], ["train.epoch", "did you mean train.epochs?"]),
        (["--set", "train.epochs"], ["section.key=value"]),
        (["--set", "train.lr=fast"], ["train.lr", "'fast'", "number"]),
        (["--config", "missing.yaml"], ["missing.yaml", "No such file"]),
        (["--preset", "v9"], ["unknown preset 'v9'", "v1"]),
        (["--select", "some"], ["--select", "'quick', 'full', 'none'"]),
        (
            ["--device", "cpu", "--set", "graph.backend=partitioned"],
            ["graph.backend=partitioned needs a GPU", "graph.backend=auto"],
        ),
        (["--device", "cpu", "--set", "model.backend=triton"], ["needs a GPU"]),
        (["--device", "abacus"], ["device 'abacus'", "cpu"]),
        (["--seed", "-1"], ["--seed"]),
        (["--epochs", "3"], ["--epochs", "train --help"]),
        (["--embedding", "obsm:X_none"], ["X_none"]),
        (["--layer", "none_such"], ["none_such"]),
        (["--slide-key", "none_such"], ["none_such"]),
        (["--resume", "--overwrite"], ["exclude each other"]),
        (["--resume"], ["leave out --config"]),
        (["--resume", "--donor-pattern", "."], ["leave out --config, --donor-pattern"]),
    ],
)
def test_a_wrong_option_says_what_to_do(slides, tmp_path, refused, more, words):
    line = refused(*train_argv(slides, tmp_path / "run", *more))
    for word in words:
        assert word in line


def test_slides_that_are_not_there_or_not_slides(slides, tmp_path, refused):
    (tmp_path / "text.h5ad").write_text("not HDF5")
    cut = (slides / "cortex1.h5ad").read_bytes()[:3000]
    (tmp_path / "cut.h5ad").write_bytes(cut)
    for name in ("none.h5ad", "text.h5ad", "cut.h5ad"):
        line = refused(
            "train", tmp_path / name, "--val", slides / "cortex2.h5ad", "--out", tmp_path / "run"
        )
        assert name in line


def test_a_score_on_a_training_slide_is_refused(slides, tmp_path, refused):
    one = slides / "cortex1.h5ad"
    assert "mean nothing" in refused("train", one, "--val", one, "--out", tmp_path / "run")
    assert "twice" in refused("train", one, one, "--out", tmp_path / "run")
    assert "at least one slide" in refused("train", "--out", tmp_path / "run")


def test_a_standing_run_is_not_touched(slides, run, refused):
    assert "--resume" in refused(*train_argv(slides, run), folder=run)
    foreign = run.parent / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("years of work")
    argv = train_argv(slides, foreign, "--overwrite")
    assert "not a run directory" in refused(*argv, folder=foreign)
    assert "is a file" in refused(*train_argv(slides, foreign / "chapter.tex"), folder=foreign)
    assert "is a file" in refused(*train_argv(slides, foreign / "chapter.tex" / "r"))


def test_a_failed_overwrite_brings_the_old_run_back(slides, tmp_path, refused, run, monkeypatch):
    old = tmp_path / "run"
    shutil.copytree(run, old)

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(FIT, "fit", fail)
    assert "out of memory" in refused(*train_argv(slides, old, "--overwrite"))
    assert "out of memory" in refused(*train_argv(slides, tmp_path / "new"))


def test_a_fault_of_the_program_is_called_one(slides, tmp_path, refused, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shape [3]\nmismatch")

    monkeypatch.setattr(FIT, "fit", fail)
    line = refused(*train_argv(slides, tmp_path / "run"), code=1)
    assert "RuntimeError: shape [3] mismatch" in line and "--debug" in line
    with pytest.raises(RuntimeError):
        cli.run_command([*train_argv(slides, tmp_path / "run"), "--debug"])


@pytest.fixture
def fitted(monkeypatch):
    """What ``fit`` is called with, in place of a training."""
    calls = []

    def fit(train, val, config, out, **named):
        calls.append({"train": train, "val": val, "config": config, "out": out, **named})
        return FIT.FitResult(out, None, None, config, {})

    monkeypatch.setattr(FIT, "fit", fit)
    return calls


def names(slides):
    return None if slides is None else [slide.name for slide in slides]


def test_training_is_asked_for_as_the_options_say(slides, tmp_path, fitted):
    donors = tmp_path / "donors.yaml"
    donors.write_text("{cortex1: a, cortex2: a, cortex3: b}")
    files = [str(slides / f"cortex{i}.h5ad") for i in (1, 2, 3)]
    argv = ["train", *files, "--out", str(tmp_path / "run"), "--config", f"{slides}/tiny.yaml"]
    more = ["--select", "none", "--seed", "7", "--preset", "v1-rbf", "--set", "train.epochs=3"]
    assert cli.run_command([*argv, *more, "--donor-map", str(donors), "--device", "cpu"]) == 0
    (call,) = fitted
    assert names(call["train"]) == ["cortex1", "cortex2", "cortex3"]
    assert call["val"] is None and not call["resume"] and call["out"] == tmp_path / "run"
    assert call["donors"] == {"cortex1": "a", "cortex2": "a", "cortex3": "b"}
    config = call["config"]
    assert (config.selection.mode, config.train.seed, config.train.epochs) == ("none", 7, 3)
    assert (config.preset, call["device"]) == ("v1-rbf", "cpu")
    assert config.model.terms == ("rbf",) and config.model.heads == 2
    assert config.data.normalized is None  # left to the files


def test_slides_of_one_name_are_told_apart(slides, tmp_path, fitted):
    (tmp_path / "other").mkdir()
    shutil.copy(slides / "cortex3.h5ad", tmp_path / "other" / "cortex1.h5ad")
    argv = ["train", f"{slides}/cortex1.h5ad", "--val", f"{tmp_path}/other/cortex1.h5ad"]
    assert cli.run_command([*argv, "--out", str(tmp_path / "run")]) == 0
    (call,) = fitted
    assert (names(call["train"]), names(call["val"])) == (["cortex1-1"], ["cortex1-2"])
    assert call["donors"] == {"cortex1-1": "cortex1-1"}


def stopped_run(slides, folder, roles, path=None):
    """The folder of a run that was stopped, as far as the command line reads it."""
    folder.mkdir()
    load_config(slides / "tiny.yaml").save_request(folder)
    (folder / LAST).touch()
    record = {"train": [], "val": [], "donors": {}}
    for name, source in sorted(roles.items()):
        (slide,) = read_slides(source)
        role, _, known = name.partition(" ")
        entry = {"name": known, "path": str(path or source), "digest": slide_digest(slide)}
        record[role].append({**entry, "cells": slide.num_cells})
    (folder / "inputs.json").write_text(json.dumps(record))
    return folder


def test_a_stopped_run_goes_on_with_the_slides_it_began_with(slides, tmp_path, fitted):
    one, two, three = (slides / f"cortex{i}.h5ad" for i in (1, 2, 3))
    roles = {"train a": three, "train b": one, "val c": two}
    run = stopped_run(slides, tmp_path / "run", roles)
    assert cli.run_command(["train", "--out", str(run), "--resume", "--device", "cpu"]) == 0
    # of slides whose files are elsewhere by now, the new place is given
    moved = [shutil.copy(path, tmp_path / f"{path.stem}_copy.h5ad") for path in (one, two, three)]
    assert cli.run_command(["train", *map(str, moved), "--out", str(run), "--resume"]) == 0
    for call in fitted:
        assert (names(call["train"]), names(call["val"])) == (["a", "b"], ["c"])
        assert call["resume"] and call["donors"] is None and call["config"].model.heads == 2
    assert [call["device"] for call in fitted] == ["cpu", None]


def test_slides_of_one_file_keep_their_roles_when_a_run_goes_on(slides, tmp_path, fitted):
    parts = [anndata.read_h5ad(slides / f"cortex{i}.h5ad") for i in (1, 2)]
    both = anndata.concat(parts, label="section", keys=["one", "two"], index_unique="-")
    both.write_h5ad(tmp_path / "both.h5ad")
    roles = {}
    for role, key in (("train", "one"), ("val", "two")):
        part = tmp_path / f"{key}.h5ad"
        both[both.obs["section"] == key].copy().write_h5ad(part)
        roles[f"{role} both-{key}"] = part
    run = stopped_run(slides, tmp_path / "run", roles, path=tmp_path / "both.h5ad")
    request = RunConfig.load_request(run).replace(data={"slide_key": "section"})
    request.save_request(run)
    assert cli.run_command(["train", "--out", str(run), "--resume"]) == 0
    assert (names(fitted[0]["train"]), names(fitted[0]["val"])) == (["both-one"], ["both-two"])


def test_a_run_does_not_go_on_with_other_slides(slides, tmp_path, refused, fitted):
    roles = {"train a": slides / "cortex1.h5ad"}
    run = stopped_run(slides, tmp_path / "run", roles)
    line = refused("train", slides / "cortex2.h5ad", "--out", run, "--resume")
    assert "none of the files holds this slide" in line
    (run / "inputs.json").write_text("{}")
    assert "inputs.json is missing or damaged" in refused("train", "--out", run, "--resume")
    (run / REQUESTED).unlink()
    assert "holds no run to resume" in refused("train", "--out", run, "--resume")
    assert not fitted


def test_a_finished_run_is_extended(slides, run, tmp_path, refused):
    longer = tmp_path / "run"
    shutil.copytree(run, longer)
    steps = read_meta(run / LAST)["step"]
    more = ["train", "--out", str(longer), "--resume", "--set"]
    assert "done 2 epochs" in refused(*more, "train.epochs=1")
    assert "leave out --set" in refused(*more, "train.lr=1")
    assert "train.epochs" in refused(*more, "train.epochs=many")
    assert cli.run_command([*more, "train.epochs=3"]) == 0
    assert read_meta(longer / LAST)["step"] == steps * 3 // 2
    assert RunConfig.load(longer).train.epochs == 3
    assert RunConfig.load_request(longer).train.epochs == 3
    assert RunConfig.load(run).train.epochs == 2
    epochs = [row["epoch"] for row in read_history(longer / HISTORY) if row.get("epoch")]
    assert epochs and len(read_history(longer / HISTORY)) > len(read_history(run / HISTORY))


def test_a_run_that_patience_ended_asks_for_more_of_it(run, tmp_path, refused, monkeypatch):
    meta = {**read_meta(run / LAST), "stale": 9}
    monkeypatch.setattr("ipar_sparse.train.run_folder.read_meta", lambda _: meta)
    monkeypatch.setattr("ipar_sparse.data.records.recorded_slides", lambda *_: ([], []))
    argv = ["train", "--out", run, "--resume", "--set", "train.epochs=9"]
    assert "train.patience" in refused(*argv, folder=run)


def test_a_run_records_how_it_was_made(slides, run, capsys):
    config = RunConfig.load(run)
    assert config.model.heads == 2 and config.train.epochs == 2
    assert not config.unresolved()
    written = {"requested.yaml", "inputs.json", "config.json", "selection.json"}
    assert {BEST, LAST, HISTORY, *written} <= {path.name for path in run.iterdir()}
    assert cli.run_command(["info", str(run)]) == 0
    shown = capsys.readouterr().out
    for word in ("cortex1.h5ad", "cortex2.h5ad", "model.heads = 2", "E_geo", "gate 6,337"):
        assert word in shown
    assert f"model.init = {config.model.init}" in shown  # selected, not asked for


def test_cross_validation_scores_are_told_with_their_noise(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    scores = {"score": 0.25, "score_se": 0.01, "distance_spearman": 0.5}
    choice = {
        "setting": "initial layout",
        "candidates": [{"name": "atlas", "values": {}, **scores}, {"name": "mlp", "values": {}}],
        "selected": "atlas",
        "reason": "the best score",
    }
    selection = {"mode": "quick", "donors": 3, "folds": [{}, {}], "choices": [choice]}
    (copy / "selection.json").write_text(json.dumps({**selection, "selected": {}}))
    assert cli.run_command(["info", str(copy)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 folds over 3 donors" in shown
    assert "initial layout atlas 0.250 ± 0.010 0.500 – yes" in shown
    assert "mlp – – –" in shown and "initial layout: the best score" in shown


def test_selected_settings_are_told(slides, tmp_path, capfd):
    files = [str(slides / f"cortex{i}.h5ad") for i in (1, 2)]
    config, out = str(slides / "tiny.yaml"), str(tmp_path / "run")
    asked = {"refine.steps": 0, "refine.distance_correction_steps": 0, "model.recycling": True}
    more = [word for key, value in asked.items() for word in ("--set", f"{key}={value}")]
    assert cli.run_command(["train", *files, "--out", out, "--config", config, *more]) == 0
    told = capfd.readouterr().err
    assert told.count("neighbour hit") == 1  # scores once, not after every choice
    assert not re.search("miniset|recycle|anchor", re.sub(r"\(train\..*?\)", "", told))
    assert cli.run_command(["info", out]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    for word in ("over 2 donors", "initial layout", "atlas 0.", "model.init =", "±", "yes"):
        assert word in shown


def test_predictions_are_added_to_a_copy(slides, run, tmp_path):
    source, out = slides / "cortex3.h5ad", tmp_path / "out.h5ad"
    before = source.read_bytes()
    assert cli.run_command(["predict", str(run), str(source), "--out", str(out)]) == 0
    assert source.read_bytes() == before
    old, new = anndata.read_h5ad(source), anndata.read_h5ad(out)
    pos = new.obsm["X_ipar"]
    assert pos.shape == (120, 2) and np.isfinite(pos).all()
    assert np.allclose(pos.mean(0), 0, atol=1e-4)
    assert np.isclose(np.square(pos).sum(1).mean(), 1, atol=1e-4)
    assert new.obsm["X_ipar_embedding"].shape == (120, 8)
    assert np.array_equal(old.obsm["spatial"], new.obsm["spatial"])
    assert (old.X != new.X).nnz == 0
    told = new.uns["ipar"]
    assert told["graphs"]["cortex3"]["k"] == 10 and told["graphs"]["cortex3"]["recall"] == 1.0
    used = RunConfig.model_validate(json.loads(told["config"]))
    assert used == RunConfig.load(run) == Predictor.load(run).config
    assert told["run"] == str(run) and told["version"] == "0.1.0"


def test_what_the_values_of_a_file_are_is_recognised_anew(slides, run, tmp_path, capfd):
    """Counts of the training slides say nothing of the next file's values."""

    def take_logs(adata):
        adata.X = np.log1p(adata.X.toarray())

    path = broken(slides, tmp_path / "logs.h5ad", take_logs)
    assert RunConfig.load(run).data.normalized is False
    assert cli.run_command(["predict", str(run), str(path), "--out", f"{tmp_path}/a.h5ad"]) == 0
    assert "values are log1p of counts: turned back" in capfd.readouterr().err
    argv = ["predict", str(run), str(path), "--out", f"{tmp_path}/b.h5ad", "--counts"]
    assert cli.run_command(argv) == 0
    assert "log1p of counts, but taken as counts" in capfd.readouterr().err


def test_noise_adds_to_the_uncertainty(slides, run, tmp_path):
    out = tmp_path / "out.h5ad"
    argv = ["predict", str(run), f"{slides}/cortex3.h5ad", "--out", str(out)]
    assert cli.run_command([*argv, "--noise-samples", "2"]) == 0
    uncertainty = anndata.read_h5ad(out).obs["ipar_uncertainty"]
    assert (uncertainty > 0).all() and uncertainty.std() > 0


def test_positions_do_not_depend_on_measured_ones(slides, run, tmp_path):
    blind = broken(slides, tmp_path / "blind.h5ad", drop_positions)
    for source, out in ((slides / "cortex1.h5ad", "a.h5ad"), (blind, "b.h5ad")):
        argv = ["predict", str(run), str(source), "--out", str(tmp_path / out)]
        assert cli.run_command(argv) == 0
    a, b = (anndata.read_h5ad(tmp_path / name).obsm["X_ipar"] for name in ("a.h5ad", "b.h5ad"))
    assert np.array_equal(a, b)


def test_placing_a_slide_of_the_run_says_so(slides, run, tmp_path, capfd):
    for name, words in (("cortex1", "was trained on"), ("cortex2", "decided when training stop")):
        out = tmp_path / f"{name}.h5ad"
        argv = ["predict", str(run), f"{slides}/{name}.h5ad", "--out", str(out)]
        assert cli.run_command(argv) == 0
        assert f"{name} {words}" in " ".join(capfd.readouterr().err.split())
    argv = ["predict", run, f"{slides}/cortex3.h5ad", "--out", tmp_path / "c.h5ad"]
    assert cli.run_command([str(a) for a in argv]) == 0
    assert "says nothing" not in capfd.readouterr().err


def test_slides_of_one_file_are_placed_apart(slides, run, tmp_path):
    parts = [anndata.read_h5ad(slides / f"cortex{i}.h5ad") for i in (1, 3)]
    both = anndata.concat(parts, label="section", keys=["one", "three"])
    order = np.random.default_rng(0).permutation(both.n_obs)
    both[order].copy().write_h5ad(tmp_path / "both.h5ad")
    argv = [
        "predict",
        run,
        tmp_path / "both.h5ad",
        "--slide-key",
        "section",
        "--out",
        tmp_path / "out.h5ad",
    ]
    assert cli.run_command(list(map(str, argv))) == 0
    out = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert set(out.uns["ipar"]["graphs"]) == {"both-one", "both-three"}
    for key in ("one", "three"):
        pos = out[out.obs["section"] == key].obsm["X_ipar"]
        assert np.isclose(np.square(pos).sum(1).mean(), 1, atol=1e-4)


def test_empty_cells_are_flagged_and_get_no_place_unless_asked_for(slides, run, tmp_path, capfd):
    def empty_cells(adata):
        adata.X = adata.X.toarray()
        adata.X[[4, 7]] = 0

    path = broken(slides, tmp_path / "some.h5ad", empty_cells)
    argv = ["predict", str(run), str(path), "--out", str(tmp_path / "out.h5ad")]
    assert cli.run_command(argv) == 0
    assert "2 of 120 cells have no counts" in capfd.readouterr().err
    out = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert list(np.flatnonzero(out.obs["ipar_empty"])) == [4, 7]
    placed = np.isfinite(out.obsm["X_ipar"]).all(1)
    assert list(np.flatnonzero(~placed)) == [4, 7]
    assert list(np.flatnonzero(np.isnan(out.obs["ipar_uncertainty"]))) == [4, 7]
    assert cli.run_command([*argv, "--overwrite", "--keep-empty"]) == 0
    kept = anndata.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(kept.obsm["X_ipar"][placed], out.obsm["X_ipar"][placed])
    assert (
        not kept.obsm["X_ipar"][[4, 7]].any()
        and (kept.obs["ipar_uncertainty"].iloc[[4, 7]] == 1).all()
    )


def test_check_says_what_to_expect_and_writes_nothing(slides, run, tmp_path, capfd):
    def half_and_logs(adata):
        x = adata.X.toarray()
        adata.X = np.log1p(x / np.maximum(x.sum(1, keepdims=True), 1) * 1e4)
        return adata[:, : adata.n_vars // 2].copy()

    logs = broken(slides, tmp_path / "logs.h5ad", half_and_logs)
    foreign = broken(slides, tmp_path / "foreign.h5ad", other_genes)
    before = listing(tmp_path), listing(run)
    assert cli.run_command(["check", str(run), f"{slides}/cortex3.h5ad"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "cortex3: can be placed"
    told = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[1:]}
    assert told["cells"] == "120" and told["values"] == "counts"
    assert told["tissue"].startswith("This slide is ")
    assert told["genes"].endswith("that the run reads") and "of memory" in told["takes"]
    argv = ["check", str(run), f"{slides}/cortex1.h5ad", str(logs), str(foreign), "no.h5ad"]
    assert cli.run_command(argv) == 2
    out, err = capfd.readouterr()
    assert "cortex1: can be placed, but see the warnings" in out
    assert "warning   was trained on" in out
    assert "note      logarithms turned back" in out and "lacks" in out
    assert "foreign: cannot be placed" in out and "why       foreign: shares no gene" in out
    assert "no.h5ad: cannot be placed" in out and "no such file" in out
    assert err.count("error: ") == 1 and "2 of the slides cannot be placed" in err
    assert before == (listing(tmp_path), listing(run))
    assert cli.run_command(["info", str(run)]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "values counts, scaled to" in shown and "gene names symbols" in shown


def test_embed_writes_the_embedding_alone(slides, run, tmp_path):
    argv = ["embed", str(run), str(slides / "cortex3.h5ad"), "--out", str(tmp_path / "out.h5ad")]
    assert cli.run_command(argv) == 0
    out = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert out.obsm["X_ipar_embedding"].shape == (120, 8) and "X_ipar" not in out.obsm


def test_bad_prediction_input(slides, run, tmp_path, refused):
    cells = slides / "cortex3.h5ad"
    foreign = broken(slides, tmp_path / "foreign.h5ad", other_genes)
    assert "gene" in refused("predict", run, foreign, "--out", tmp_path / "o.h5ad")
    assert "not a run directory" in refused("predict", slides, cells, "--out", tmp_path / "o.h5ad")
    assert "no such file" in refused("predict", run, "no.h5ad", "--out", tmp_path / "o.h5ad")
    assert "input itself" in refused("predict", run, foreign, "--out", foreign)
    assert ".csv or .csv.gz" in refused("predict", run, cells, "--out", tmp_path / "o.txt")
    line = refused("predict", run, cells, "--out", tmp_path / "o.h5ad", "--embedding", "obsm:a")
    assert "its own encoder" in line
    (tmp_path / "o.h5ad").write_text("mine")
    assert "--overwrite" in refused("predict", run, cells, "--out", tmp_path / "o.h5ad")


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing"])
def test_a_damaged_checkpoint_is_named(slides, run, tmp_path, refused, damage):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    data = (copy / BEST).read_bytes()
    for name in (BEST, LAST, PREVIOUS):
        (copy / name).unlink()
    if damage != "missing":
        (copy / BEST).write_bytes(data[:-100] if damage == "truncated" else b"x" * 500)
    line = refused("predict", copy, slides / "cortex3.h5ad", "--out", tmp_path / "o.h5ad")
    said = "before its model was trained" if damage == "missing" else "truncated or not"
    assert said in line


def test_evaluate_answers_and_leaves_metrics_and_a_report(slides, run, tmp_path, capfd):
    out = tmp_path / "report"
    argv = ["evaluate", str(run), str(slides / "cortex3.h5ad"), "--out", str(out)]
    assert cli.run_command(argv) == 0
    answer, scores, _ = capfd.readouterr().out.strip().splitlines()
    assert answer.startswith("cortex3: ") and "overall layout of the tissue was" in answer
    metrics = json.loads((out / "metrics.json").read_text())
    assert f"distance Spearman {metrics['distance_spearman']:.3f}" in scores
    assert -1 <= metrics["distance_spearman"] <= 1
    assert metrics["E_geo_hgate"] > 0
    assert (out / "report.html").stat().st_size > 1000


def test_a_prediction_comes_with_a_page_where_asked(slides, run, tmp_path, capfd, refused):
    cells, out, page = slides / "cortex3.h5ad", tmp_path / "o.h5ad", tmp_path / "page"
    gene = anndata.read_h5ad(cells).var_names[-1]
    argv = ["predict", run, cells, "--out", out]
    assert "add --report" in refused(*argv, "--genes", gene)
    assert "no gene 'nix'" in refused(*argv, "--report", page, "--genes", f"{gene},nix")
    argv += ["--report", page, "--genes", gene]
    assert cli.run_command([str(arg) for arg in argv]) == 0
    assert f"report: {page / 'report.html'}" in capfd.readouterr().out
    text = (page / "report.html").read_text()
    assert f"Genes: {gene}, as asked for" in text and "not compared with measured positions" in text
    out.unlink()
    assert "another --report" in refused(*argv)


def test_shells_complete_commands_and_options():
    for words, offered in (
        ("ipar-sparse pre", "predict"),
        ("ipar-sparse predict --rep", "--report"),
    ):
        env = {"_IPAR_SPARSE_COMPLETE": "complete_bash", "COMP_WORDS": words}
        env |= {"COMP_CWORD": str(words.count(" "))}
        done = subprocess.run(
            [sys.executable, "-m", "ipar_sparse"],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
        )
        assert done.stdout.split() == [offered]


def test_evaluate_refuses_what_it_cannot_score(slides, run, tmp_path, refused):
    blind = broken(slides, tmp_path / "blind.h5ad", drop_positions)
    assert "spatial" in refused("evaluate", run, blind, "--out", tmp_path / "report")
    assert "is a file" in refused("evaluate", run, blind, "--out", blind)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("a")
    assert "--overwrite" in refused(
        "evaluate", run, slides / "cortex3.h5ad", "--out", tmp_path / "full"
    )


def test_simulate_refuses_to_replace(slides, refused):
    assert "--overwrite" in refused("simulate", slides, folder=slides)
    assert "--spots" in refused("simulate", slides, "--spots", "3", folder=slides)
    assert "--tissue" in refused("simulate", slides, "--tissue", "bone", folder=slides)
    line = refused("simulate", slides / "tiny.yaml", folder=slides)
    assert "is a file" in line


def test_benchmark_sizes_are_checked(tmp_path, refused):
    assert "'a,b'" in refused("benchmark", "--sizes", "a,b", "--out", tmp_path / "b")
    more = ("--sizes", "64", "--out", tmp_path / "b")
    assert "tidy" in refused("benchmark", "--tasks", "tidy", *more)
    assert "sparser" in refused("benchmark", "--implementations", "sparser", *more)
    (tmp_path / "mine.txt").write_text("mine")
    assert "--overwrite" in refused("benchmark", "--sizes", "64", "--out", tmp_path)


def test_the_parser_suggests(refused):
    assert "simulate" in refused("simulat")
    assert "--out" in refused("train", "a.h5ad", "--ot", "r")
    assert "'settinn'" in refused("config", "settinn")


def test_help_and_version(capsys):
    for argv in ([], ["--help"], ["train", "--help"]):
        assert cli.run_command(argv) == 0
        assert "Usage" in capsys.readouterr().out
    assert cli.run_command(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"


def test_settings_are_listed_found_and_explained(capsys):
    def shown(*argv):
        assert cli.run_command(["config", *argv]) == 0
        return capsys.readouterr().out

    main, everything = shown(), shown("--all")
    keys = {setting.key for setting in describe()}
    assert {key for key in keys if key in everything} == keys
    for heading, group in MAIN_SETTINGS.items():
        assert heading in main and all(key in main for key in group)
    assert "train.rw_cap" not in main and "--all" in main
    assert "0.0005" in shown("train.lr") and "train.epochs" not in shown("train.lr")
    assert "train.mutual_prob" in shown("Mutual nearest")  # in its help text


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["info", "{run}"],
        ["predict", "{run}", "none.h5ad", "--out", "{out}.h5ad"],
        ["embed", "none", "{slide}", "--out", "{out}.h5ad"],
        ["evaluate", "{run}", "{slide}", "--slide-key", "nowhere", "--out", "{out}"],
        ["experiment", "v1", "--slides", "{slide}", "--layer", "nowhere", "--out", "{out}"],
        ["train", "{slide}", "--embedding", "obsm:nowhere", "--out", "{out}"],
        ["train", "{slide}", "--device", "cpus", "--out", "{out}"],
        ["benchmark", "--sizes", "many", "--out", "{out}"],
    ],
)
def test_what_options_and_headers_can_answer_waits_for_no_library(argv, run, slides, tmp_path):
    fill = {"run": run, "slide": slides / "cortex1.h5ad", "out": tmp_path / "out"}
    argv = [word.format(**fill) for word in argv]
    code = (
        "import sys\nfrom ipar_sparse.cli import run_command\n"
        f"code = run_command({argv})\n"
        "slow = {'torch', 'anndata', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded {slow}' if slow else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == (0 if argv[0] in ("--help", "info") else 2), done.stderr
    assert len(done.stderr.splitlines()) == done.returncode // 2
    assert not (tmp_path / "out").exists()


def test_without_the_extra_it_says_how_to_get_it():
    for module, extra in (("typer", "cli"), ("yaml", "cli")):
        code = (
            f"import sys\nsys.modules[{module!r}] = None\n"
            "from ipar_sparse.cli import main\nsys.argv = ['ipar-sparse', 'config']\nmain()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert f"pip install 'ipar_sparse[{extra}]'" in done.stderr


def test_results_alone_are_those_of_a_copy(run, slides, tmp_path):
    cells, copy, alone = f"{slides}/cortex3.h5ad", tmp_path / "copy.h5ad", tmp_path / "alone.h5ad"
    assert cli.run_command(["predict", str(run), cells, "-o", str(copy)]) == 0
    assert cli.run_command(["predict", str(run), cells, "-o", str(alone), "--out-obsm-only"]) == 0
    whole, part = anndata.read_h5ad(copy), anndata.read_h5ad(alone)
    for key in ("X_ipar", "X_ipar_embedding"):
        assert np.array_equal(whole.obsm[key], part.obsm[key])
    assert np.array_equal(whole.obs["ipar_uncertainty"], part.obs["ipar_uncertainty"])
    assert part.n_vars == 0 and alone.stat().st_size < copy.stat().st_size


def test_out_of_memory_midway_is_one_line_and_keeps_the_checkpoint(
    slides, tmp_path, capfd, monkeypatch
):
    model, steps = importlib.import_module("ipar_sparse.train.model"), []

    def step(*given, original=model.training_step):
        steps.append(given)
        if len(steps) == 6:  # in the second epoch; as torch says it on a CPU
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(model, "training_step", step)
        assert cli.run_command(train_argv(slides, tmp_path / "run")) == 2
    (line,) = [one for one in capfd.readouterr().err.splitlines() if "error" in one]
    assert "out of memory (Training the model)" in line and "--resume" in line
    assert read_meta(tmp_path / "run" / LAST)["step"] == 4
    assert cli.run_command(["train", "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert read_meta(tmp_path / "run" / LAST)["step"] == 8


def test_a_run_whose_time_is_up_predicts_and_goes_on(slides, tmp_path, capfd):
    out, placed = tmp_path / "run", tmp_path / "placed.h5ad"
    assert cli.run_command(train_argv(slides, out, "--max-minutes", "0")) == 0
    shown = capfd.readouterr()
    assert "--resume" in shown.out and "cut short" in shown.err
    assert read_meta(out / LAST)["metadata"]["cut_short"] == ["encoder", "gate", "model"]
    assert cli.run_command(["predict", str(out), f"{slides}/cortex3.h5ad", "-o", str(placed)]) == 0
    assert np.isfinite(anndata.read_h5ad(placed).obsm["X_ipar"]).all()
    assert cli.run_command(["train", "--out", str(out), "--resume"]) == 0
    meta = read_meta(out / LAST)
    assert (meta["stage"], meta["step"]) == ("model", 8)
    assert meta["metadata"]["cut_short"] == ["encoder", "gate"]


def test_a_selection_whose_time_is_up_takes_defaults(slides, tmp_path):
    more = f"{slides}/cortex3.h5ad --max-minutes 0 --select quick".split()
    assert cli.run_command(train_argv(slides, tmp_path / "run", *more)) == 0
    config = RunConfig.load(tmp_path / "run")
    assert (config.model.init, config.model.recycling) == ("atlas", True)
    assert "selection" in read_meta(tmp_path / "run" / LAST)["metadata"]["cut_short"]


def test_ctrl_c_leaves_a_run_that_goes_on_bit_for_bit(slides, tmp_path):
    """Stopped once in the middle and resumed, a run equals one that was left alone."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    more = ["--set", "train.epochs=15", "--set", "train.patience=100"]
    threads = torch.get_num_threads()
    process = subprocess.Popen(
        [sys.executable, "-m", "ipar_sparse", *train_argv(slides, stopped, *more)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (stopped / BEST).exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in err and "Traceback" not in err
    assert read_meta(stopped / LAST)["step"] < 60

    assert cli.run_command(["train", "--out", str(stopped), "--resume"]) == 0
    assert cli.run_command(train_argv(slides, whole, *more)) == 0
    for name in (BEST, LAST):
        assert read_meta(stopped / name) == read_meta(whole / name)
        one, other = load_file(stopped / name), load_file(whole / name)
        assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())
    a, b = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_history(r / HISTORY)]
        for r in (stopped, whole)
    )
    assert a == b


def test_a_command_that_loaded_torch_ends_at_once_after_what_libraries_still_do():
    code = (
        "import atexit, sys, torch\n"
        "from ipar_sparse.cli import main\n"
        "class Kept:\n"
        "    def __del__(self):\n"
        "        print('freed')\n"
        "kept = Kept()\n"
        "command = lambda argv: (atexit.register(print, 'closed'), 3)[1]\n"
        "sys.modules['ipar_sparse.cli.app'].run_command = command\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "closed\n", "")
