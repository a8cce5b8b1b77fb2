"""Typing right and wrong things at the command line."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ipar_sparse import cli
from ipar_sparse.config import RunConfig
from ipar_sparse.inference.checkpoint import BEST, LAST, read_meta
from ipar_sparse.train import fit as trainer
from ipar_sparse.train.history import HISTORY, read_history

ROOT = Path(__file__).resolve().parents[1]

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
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


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
        (["--device", "abacus"], ["device 'abacus'", "cpu"]),
        (["--seed", "-1"], ["--seed"]),
        (["--epochs", "3"], ["--epochs", "train --help"]),
        (["--embedding", "obsm:X_none"], ["X_none"]),
        (["--layer", "none_such"], ["none_such"]),
        (["--slide-key", "none_such"], ["none_such"]),
        (["--resume", "--overwrite"], ["exclude each other"]),
        (["--resume"], ["leave out --config"]),
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
    import shutil

    old = tmp_path / "run"
    shutil.copytree(run, old)

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(trainer, "fit", fail)
    assert "out of memory" in refused(*train_argv(slides, old, "--overwrite"), code=1)
    assert "out of memory" in refused(*train_argv(slides, tmp_path / "new"), code=1)


def test_a_fault_of_the_program_is_called_one(slides, tmp_path, refused, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shape [3]\nmismatch")

    monkeypatch.setattr(trainer, "fit", fail)
    line = refused(*train_argv(slides, tmp_path / "run"), code=1)
    assert "RuntimeError: shape [3] mismatch" in line and "--debug" in line
    with pytest.raises(RuntimeError):
        cli.run_command([*train_argv(slides, tmp_path / "run"), "--debug"])


def test_a_run_records_how_it_was_made(slides, run, capsys):
    config = RunConfig.load(run)
    assert config.model.heads == 2 and config.train.epochs == 2
    assert {BEST, LAST, HISTORY, "config.yaml", "inputs.json"} <= {p.name for p in run.iterdir()}
    assert cli.run_command(["info", str(run)]) == 0
    shown = capsys.readouterr().out
    for word in ("cortex1.h5ad", "cortex2.h5ad", "model.heads = 2", "E_geo", "gate 6,337"):
        assert word in shown


def test_what_donors_left_out_showed_is_told(slides, tmp_path, capsys):
    files = [str(slides / f"cortex{i}.h5ad") for i in (1, 2)]
    config, out = str(slides / "tiny.yaml"), str(tmp_path / "run")
    assert cli.run_command(["train", *files, "--out", out, "--config", config]) == 0
    assert cli.run_command(["info", out]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    told = "on 2 donors left out", "genes alike 0.", "encoder.kept", "refine.steps", "firm 0."
    for word in told:
        assert word in shown


def test_the_slide_that_decides_when_to_stop_is_one_that_can_be_spared(
    slides, tmp_path, monkeypatch
):
    assert cli.run_command(f"simulate {tmp_path} --slides 4 --spots 60 --genes 60".split()) == 0
    donors = tmp_path / "donors.yaml"
    donors.write_text("{cortex1: a, cortex2: a, cortex3: b, cortex4: c}")
    seen = []

    def taken(train, val, config, out, **named):
        seen.append(([s.name for s in train], [s.name for s in val]))

    monkeypatch.setattr(trainer, "fit", taken)
    monkeypatch.setattr(cli, "_check_resume", lambda *given: None)
    files = [str(tmp_path / f"cortex{i}.h5ad") for i in (1, 2, 3, 4)]
    tiny = ["--config", str(slides / "tiny.yaml")]

    def train(name, *more):
        return cli.run_command(["train", "--out", str(tmp_path / name), *more])

    assert train("run", *files, *tiny, "--donor-map", str(donors)) == 0
    assert train("run", "--resume") == 0
    assert seen == [(["cortex1", "cortex3", "cortex4"], ["cortex2"])] * 2
    # nobody's in particular: the last; and so it was before all donors were recorded
    assert train("other", *files, *tiny) == 0
    inputs = tmp_path / "run" / "inputs.json"
    text = json.loads(inputs.read_text())
    del text["donors"]["cortex4"]
    inputs.write_text(json.dumps(text))
    assert train("run", "--resume") == 0
    assert seen[2:] == [(["cortex1", "cortex2", "cortex3"], ["cortex4"])] * 2


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
    graph = new.uns["ipar"]["graphs"]["cortex3"]
    assert graph["k"] == 10 and graph["recall"] == 1.0


def test_positions_do_not_depend_on_measured_ones(slides, run, tmp_path):
    blind = broken(slides, tmp_path / "blind.h5ad", drop_positions)
    for source, out in ((slides / "cortex1.h5ad", "a.h5ad"), (blind, "b.h5ad")):
        argv = ["predict", str(run), str(source), "--out", str(tmp_path / out)]
        assert cli.run_command(argv) == 0
    a, b = (anndata.read_h5ad(tmp_path / name).obsm["X_ipar"] for name in ("a.h5ad", "b.h5ad"))
    assert np.array_equal(a, b)


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


def test_empty_cells_are_kept_flagged_and_counted(slides, run, tmp_path, capfd):
    def empty_cells(adata):
        adata.X = adata.X.toarray()
        adata.X[[4, 7]] = 0

    path = broken(slides, tmp_path / "some.h5ad", empty_cells)
    argv = ["predict", str(run), str(path), "--out", str(tmp_path / "out.h5ad")]
    assert cli.run_command(argv) == 0
    assert "2 of 120 cells have no counts" in capfd.readouterr().err
    out = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert list(np.flatnonzero(out.obs["ipar_empty"])) == [4, 7]
    assert np.isfinite(out.obsm["X_ipar"]).all()


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
    assert ".h5ad or .zarr" in refused("predict", run, cells, "--out", tmp_path / "o.csv")
    line = refused("predict", run, cells, "--out", tmp_path / "o.h5ad", "--embedding", "obsm:a")
    assert "its own encoder" in line
    (tmp_path / "o.h5ad").write_text("mine")
    assert "--overwrite" in refused("predict", run, cells, "--out", tmp_path / "o.h5ad")


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing"])
def test_a_damaged_checkpoint_is_named(slides, run, tmp_path, refused, damage):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    data = (copy / BEST).read_bytes()
    for name in (BEST, LAST):
        (copy / name).unlink()
    if damage != "missing":
        (copy / BEST).write_bytes(data[:-100] if damage == "truncated" else b"x" * 500)
    line = refused("predict", copy, slides / "cortex3.h5ad", "--out", tmp_path / "o.h5ad")
    assert ("holds no checkpoint" if damage == "missing" else "truncated or not") in line


def test_evaluate_leaves_metrics_and_a_report(slides, run, tmp_path):
    import json

    out = tmp_path / "report"
    argv = ["evaluate", str(run), str(slides / "cortex3.h5ad"), "--out", str(out)]
    assert cli.run_command(argv) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert -1 <= metrics["distance_spearman"] <= 1
    assert metrics["E_geo_hgate"] > 0
    assert (out / "report.html").stat().st_size > 1000


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
    assert "--spots" in refused("simulate", slides, "--spots", "0", folder=slides)
    assert "--tissue" in refused("simulate", slides, "--tissue", "bone", folder=slides)
    line = refused("simulate", slides / "tiny.yaml", folder=slides)
    assert "is a file" in line


def test_benchmark_sizes_are_checked(tmp_path, refused):
    assert "'a,b'" in refused("benchmark", "--sizes", "a,b", "--out", tmp_path / "b")
    (tmp_path / "mine.txt").write_text("mine")
    assert "--overwrite" in refused("benchmark", "--sizes", "64", "--out", tmp_path)


def test_the_parser_suggests(refused):
    assert "simulate" in refused("simulat")
    assert "--out" in refused("train", "a.h5ad", "--ot", "r")
    assert "settin" in refused("config", "settin")


def test_help_and_version(capsys):
    for argv in ([], ["--help"], ["train", "--help"]):
        assert cli.run_command(argv) == 0
        assert "Usage" in capsys.readouterr().out
    assert cli.run_command(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"
    assert cli.run_command(["config", "train.lr"]) == 0
    assert "0.0005" in capsys.readouterr().out


def test_help_does_not_load_torch():
    code = (
        "import sys\nfrom ipar_sparse.cli import run_command\nrun_command(['--help'])\n"
        "sys.exit(int('torch' in sys.modules or 'anndata' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


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


def test_every_package_is_installed():
    with open(ROOT / "pyproject.toml", "rb") as file:
        declared = set(tomllib.load(file)["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "ipar_sparse").rglob("__init__.py")
    }
    assert declared == found | {"ipar_sparse.benchmarks"}


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
