"""Studies: what is held out, that nothing leaks, what is run again, and the table at the end."""

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_run import SMALL, stop_after

from ipar_sparse import cli
from ipar_sparse.config import load_config
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.splits import plan_folds
from ipar_sparse.data.writers import write_slide
from ipar_sparse.errors import UserError
from ipar_sparse.evaluation import study_run
from ipar_sparse.evaluation.block_bootstrap import study_gains
from ipar_sparse.evaluation.naive import NAIVE
from ipar_sparse.evaluation.study_plan import (
    Study,
    baseline_variants,
    cv_groups,
    encoder_task,
    load_plan,
    load_variants,
    plan_study,
    study_jobs,
)
from ipar_sparse.evaluation.study_results import Row, as_record
from ipar_sparse.evaluation.study_run import check_study_folder, run_study
from ipar_sparse.evaluation.study_workers import threads_per_job
from ipar_sparse.inference.run_folder import BEST, LAST, read_meta
from ipar_sparse.report import write_study_report
from ipar_sparse.train.fit import fit, fit_encoder

SETTINGS = [
    *SMALL,
    "train.minisets=3",
    "train.miniset_min=30",
    "train.epochs=2",
    "refine.distance_correction_steps=5",
    "refine.steps=5",
]


@pytest.fixture(scope="module")
def slides():
    return simulate("cortex", slides=4, spots=90, genes=60, seed=5)


@pytest.fixture(scope="module")
def files(slides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    paths = [folder / f"{name}.h5ad" for name in ("A1", "A2", "B1", "B2")]
    for slide, path in zip(slides, paths, strict=True):
        write_slide(slide, path)
    return paths


@pytest.fixture(scope="module")
def plan(files):
    variants = {
        "base": load_config(None, SETTINGS),
        "blind": load_config(None, [*SETTINGS, "model.beta=0"]),
    }
    return plan_study(files, variants, hold_out="A1,B2", seeds=(0, 1), donor_pattern="^.")


@pytest.fixture(scope="module")
def done(plan, tmp_path_factory):
    """A finished study."""
    out = tmp_path_factory.mktemp("study") / "out"
    results = run_study(plan, out, jobs=1, on_collect=write_study_report)
    assert (results.done, results.total, results.failed) == (8, 8, {})
    return out


@pytest.fixture
def copy(done, tmp_path):
    shutil.copytree(done, tmp_path / "copy")
    return tmp_path / "copy"


def rows(out):
    with open(out / "results.csv") as file:
        return list(csv.DictReader(file))


def test_a_study_places_cells_of_another_assay_from_all_slides(slides, files, tmp_path):
    cells = tmp_path / "cells.h5ad"
    panel = slides[3].with_genes(slides[3].expression[:, :45], slides[3].genes[:45])
    write_slide(panel, cells)
    variants = {"base": load_config(None, SETTINGS)}
    study = plan_study(files[:3], variants, seeds=(0,), cells=[cells], frame="A2")
    (fold,) = study.folds
    assert (fold.name, fold.test, fold.val, fold.train) == (
        "cells",
        ("cells",),
        None,
        ("A1", "A2", "B1"),
    )
    out = tmp_path / "out"
    results = run_study(study, out, jobs=1)
    assert (results.done, results.failed) == (1, {})
    assert load_plan(out) == study
    inputs = json.loads((out / "runs/base/cells/seed0/inputs.json").read_text())
    assert [one["name"] for one in inputs["cells"]] == ["cells"]
    assert set(inputs["profile"]["genes"]) <= set(panel.genes)
    found = {row["method"]: row for row in rows(out) if row["metric"] == "distance_spearman"}
    assert {"model", "atlas", *NAIVE} <= set(found)
    assert float(found["20 most alike"]["value"]) > 0.05
    write_slide(slides[0], tmp_path / "again.h5ad")
    with pytest.raises(UserError, match="the same cells"):
        plan_study(files, study.variants, seeds=(0,), cells=[tmp_path / "again.h5ad"])
    assert any(row["metric"] == "frame_error" for row in rows(out))
    other = tmp_path / "cells.program.npz"
    names = np.array([str(name) for name in panel.cell_names])[::-1]
    np.savez(other, cells=names, pos=panel.pos[::-1])  # in another order, and right
    gains = study_gains(out, study, [other])["cells"]
    assert {"atlas", *NAIVE, "program"} <= set(gains)
    assert not {"model", "true coordinates", "without gate"} & set(gains)
    score = {name: float(row["value"]) for name, row in found.items()}
    assert gains["atlas"].mean == pytest.approx(score["model"] - score["atlas"], abs=1e-4)
    assert gains["program"].mean == pytest.approx(score["model"] - 1, abs=1e-4)
    assert 0 < gains["program"].se < 0.3
    with pytest.raises(UserError, match="no run is trained on such a slide; give A1, A2, B1"):
        plan_study(files[:3], variants, seeds=(0,), cells=[cells], frame="B2")
    with pytest.raises(UserError, match="both called A1"):
        plan_study(files[:1], study.variants, seeds=(0,), cells=files[:1])


def test_a_study_file_holds_variants(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "reference": "k60",
                "seeds": "0-1",
                "set": {"train.epochs": 4, "train.minisets": 7},
                "variants": {"k60": {"graph.k": 60}, "short": {"train.epochs": 2}, "v1": None},
            }
        )
    )
    configs, said = load_variants([], [path], ["train.epochs=3", "train.gate_steps=9"])
    assert list(configs) == ["k60", "short", "v1"]
    assert said == {"reference": "k60", "seeds": "0-1"}
    # own settings of a variant come last, or it would no longer be that variant
    assert [c.train.epochs for c in configs.values()] == [3, 2, 3]
    assert all((c.train.minisets, c.train.gate_steps) == (7, 9) for c in configs.values())
    assert configs["k60"].graph.k == 60 and configs["v1"].graph.k != 60
    for text, message in (
        ("variant: {}", "unknown key 'variant'"),
        ("variants: {a: {graph.kk: 3}}", "graph.kk"),
        ("variants: {a: {preset: v99}}", "v99"),
        ("variants: {a: 3}", "a needs settings"),
        ("seeds: 3", "needs `variants:`"),
        ("a: [", "not valid YAML"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_variants([], [path])
    path.write_text("variants: {v1: , other: {preset: no-gate, train.k_fraction_range: null}}")
    both, _ = load_variants(["v1"], [path, path])
    assert list(both) == ["v1", "other"] and both["other"].model.beta == 0
    path.write_text("variants: {v1: {graph.k: 3}}")
    with pytest.raises(UserError, match="v1 is given elsewhere"):
        load_variants(["v1"], [path])


def test_the_table_holds_every_run_once(done, plan):
    table = rows(done)
    scores = [r for r in table if r["metric"] == "distance_spearman"]
    found = {
        (r["variant"], r["fold"], r["seed"], r["slide"]) for r in scores if r["role"] == "variant"
    }
    assert found == {(v, f, s, f) for v in ("base", "blind") for f in ("A1", "B2") for s in "01"}
    assert {r["donor"] for r in table if r["slide"] == "B2"} == {"B"}
    baselines = [r for r in scores if r["role"] == "baseline"]
    # once for each held-out slide and seed, not once for each variant
    assert {r["variant"] for r in baselines} == {"base"}
    assert {r["method"] for r in baselines} >= {"random", "PCA", "spectral", "ridge", "MLP"}
    assert len(baselines) == 4 * len({r["method"] for r in baselines})
    floor = [float(r["value"]) for r in table if r["role"] == "floor" and r["metric"] == "E_geo"]
    assert len(floor) == 8 and max(map(abs, floor)) < 1e-9
    assert not any(r["metric"].endswith(("_hgate", "_floor", "_tedge")) for r in table)


def test_the_summary_is_that_of_the_table(done):
    table = [r for r in rows(done) if r["metric"] == "procrustes" and r["role"] == "variant"]
    of = {
        v: {(r["slide"], r["seed"]): float(r["value"]) for r in table if r["variant"] == v}
        for v in ("base", "blind")
    }
    summary = json.loads((done / "summary.json").read_text())
    entry = summary["metrics"]["procrustes"]["blind"]
    assert entry["mean"] == pytest.approx(np.mean(list(of["blind"].values())))
    gaps = {key: of["blind"][key] - of["base"][key] for key in of["base"]}
    per_slide = [np.mean([gaps[slide, seed] for seed in "01"]) for slide in ("A1", "B2")]
    assert entry["vs_reference"]["mean"] == pytest.approx(np.mean(per_slide))
    assert entry["vs_reference"]["se"] == pytest.approx(np.std(per_slide, ddof=1) / math.sqrt(2))
    assert entry["vs_baseline"]["other"] == summary["best_baseline"]["procrustes"]
    assert [fold["test"] for fold in summary["folds"]] == [["A1"], ["B2"]]


def test_the_page_shows_variants_baselines_and_folds(done):
    page = (done / "report.html").read_text()
    for text in ("base", "blind", "ridge", "model.beta=0.0", "8 of 8 runs finished", "B2"):
        assert text in page
    assert "http://" not in page.split("<body")[1]
    assert (done / "figures" / "study.png").stat().st_size > 1000


def test_variants_share_an_encoder_that_is_the_one_they_would_train(done, slides, plan, tmp_path):
    assert len(list((done / "encoders").glob("*/A1/seed0"))) == 1
    folder = done / "runs" / "base" / "A1" / "seed0"
    config = plan.config("base", 0)
    fold = plan.fold("A1")
    by_name = dict(zip(("A1", "A2", "B1", "B2"), slides, strict=True))
    groups = cv_groups(plan, fold)
    donors = {by_name[n].name: groups[n] for n in fold.train}
    fit([by_name[n] for n in fold.train], [], config, tmp_path, donors=donors)
    alone, shared = load_file(tmp_path / BEST), load_file(folder / BEST)
    assert alone.keys() == shared.keys()
    for name, value in alone.items():
        assert torch.equal(value, shared[name]), name
    other = load_file(done / "runs" / "blind" / "A1" / "seed0" / BEST)
    assert all(torch.equal(alone[k], other[k]) for k in alone if k.startswith("encoder."))
    assert any(not torch.equal(alone[k], other[k]) for k in alone if k.startswith("model."))


def test_nothing_of_a_held_out_slide_reaches_training(done, slides, files, plan, tmp_path):
    """Other cells, genes and places on the held-out slide: the same weights to the last bit."""
    other = simulate("lobules", slides=1, spots=70, genes=60, seed=99)[0]
    changed = [tmp_path / path.name for path in files]
    for slide, path in zip([other, *slides[1:]], changed, strict=True):
        write_slide(slide, path)
    one = plan_study(
        changed, {"base": plan.variants["base"]}, hold_out="A1", seeds=(0,), donor_pattern="^."
    )
    run_study(one, tmp_path / "out", jobs=1)
    place = Path("runs") / "base" / "A1" / "seed0"
    before, after = load_file(done / place / BEST), load_file(tmp_path / "out" / place / BEST)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    scores = [
        json.loads((out / place / "metrics.json").read_text()) for out in (done, tmp_path / "out")
    ]
    assert scores[0]["validation_e_geo"] == scores[1]["validation_e_geo"]
    assert scores[0]["slides"] != scores[1]["slides"]


def test_a_stopped_study_goes_on_where_it_was(copy, done, plan, monkeypatch):
    """Of two unfinished runs one is stopped while it is scored; the next call does the rest."""
    lost = [copy / "runs" / v / "B2" / "seed1" for v in ("base", "blind")]
    (lost[0] / "metrics.json").unlink()
    shutil.rmtree(lost[1])
    kept = {p: p.stat().st_mtime_ns for p in copy.glob("runs/*/*/*/metrics.json")}
    assert len(kept) == 6

    def stop(*given, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study_run, "score_slide", stop)
        with pytest.raises(KeyboardInterrupt):
            run_study(plan, copy, jobs=1, on_collect=write_study_report)
    assert "6 of 8 runs finished" in (copy / "report.html").read_text()
    trained = (lost[0] / LAST).stat().st_mtime_ns
    results = run_study(plan, copy, jobs=1)
    assert results.done == 8
    assert (copy / "results.csv").read_text() == (done / "results.csv").read_text()
    assert all(p.stat().st_mtime_ns == at for p, at in kept.items())
    assert (lost[0] / LAST).stat().st_mtime_ns == trained


def test_a_study_stopped_in_an_encoder_goes_on_with_it(copy, done, plan, monkeypatch):
    """What a stopped encoder, for which several runs wait, has left behind is not used."""
    shutil.rmtree(next(copy.glob("encoders/*/B2/seed1")))
    for variant in ("base", "blind"):
        shutil.rmtree(copy / "runs" / variant / "B2" / "seed1")
    folders = []

    with monkeypatch.context() as patch:
        asked = stop_after(patch, "encoder", 2)

        def press(slides, config, out, *, stop, **named):
            folders.append(out)
            fit_encoder(slides, config, out, stop=asked, **named)

        patch.setattr(study_run, "fit_encoder", press)
        with pytest.raises(KeyboardInterrupt):
            run_study(plan, copy, jobs=1)
    (folder,) = folders
    meta = read_meta(folder / LAST)
    assert (meta["stage"], meta["step"]) == ("encoder", 2)
    results = run_study(plan, copy, jobs=1)
    assert results.done == 8 and not results.failed
    assert "resuming the encoder at step 2" in (folder / "log.txt").read_text()
    assert (copy / "results.csv").read_text() == (done / "results.csv").read_text()


def test_worker_processes_do_what_this_one_does(copy, done, plan):
    for variant in ("base", "blind"):
        shutil.rmtree(copy / "runs" / variant / "A1" / "seed0")
    shutil.rmtree(next(copy.glob("encoders/*/A1/seed0")))
    results = run_study(plan, copy, jobs=2)
    assert (results.done, results.failed) == (8, {})
    for ours, theirs in zip(rows(copy), rows(done), strict=True):
        # the number of threads decides in which order sums are made
        value = float(theirs.pop("value"))
        assert float(ours.pop("value")) == pytest.approx(value, rel=0.05, abs=0.05)
        assert ours == theirs


def test_a_failed_run_is_on_record_and_the_others_go_on(copy, plan, monkeypatch):
    for variant in ("base", "blind"):
        shutil.rmtree(copy / "runs" / variant / "A1" / "seed1")

    def fails(train, val, config, *given, **named):
        if config.model.beta == 0:
            raise RuntimeError("no such\nluck")
        return fit(train, val, config, *given, **named)

    monkeypatch.setattr(study_run, "fit", fails)
    results = run_study(plan, copy, jobs=1, on_collect=write_study_report)
    assert results.done == 7
    assert results.failed == {"runs/blind/A1/seed1": "RuntimeError: no such luck"}
    assert "no such luck" in (copy / "report.html").read_text()
    folder = copy / "runs" / "blind" / "A1" / "seed1"
    assert "Traceback" in (folder / "log.txt").read_text()
    monkeypatch.undo()
    assert run_study(plan, copy, jobs=1).failed == {}
    assert not (folder / "error.txt").exists()


def test_a_folder_is_taken_for_the_same_study_only(copy, plan, files, tmp_path):
    smaller = replace(plan, folds=plan.folds[:1])
    with pytest.raises(UserError, match="another study .held-out slides"):
        run_study(smaller, copy)
    with pytest.raises(UserError, match="seeds"):
        run_study(replace(plan, seeds=(0,)), copy)
    changed = {**plan.variants, "blind": plan.variants["blind"].replace(graph={"k": 9})}
    with pytest.raises(UserError, match="variant blind"):
        run_study(replace(plan, variants=changed), copy)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds no study"):
        run_study(plan, tmp_path / "mine")
    more = {**plan.variants, "again": plan.variants["base"]}
    check_study_folder(replace(plan, variants=more, seeds=(0, 1, 2)), copy)


def test_a_study_is_overwritten_on_demand_and_nothing_else_is(copy, plan, tmp_path, monkeypatch):
    monkeypatch.setattr("ipar_sparse.evaluation.study_run.run_jobs", lambda *_, **__: [])
    smaller = replace(plan, folds=plan.folds[:1])
    results = run_study(smaller, copy, overwrite=True)
    assert not results.done and load_plan(copy).folds == smaller.folds
    assert not (copy / "runs").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds no study"):
        run_study(plan, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "letter.txt").is_file()


def test_plans_that_cannot_be_run_are_refused(files, plan, slides, tmp_path):
    base = plan.variants["base"]
    with pytest.raises(UserError, match="reference 'x'"):
        plan_study(files, {"base": base}, reference="x")
    with pytest.raises(UserError, match="a/b"):
        plan_study(files, {"a/b": base})
    with pytest.raises(UserError, match="fewer than the smallest miniset"):
        large = base.replace(train={"miniset_min": 100, "miniset_max": 120})
        plan_study(files, {"base": large})
    with pytest.raises(UserError, match="called A1"):
        plan_study([*files, files[0]], {"base": base})
    again = tmp_path / "again.h5ad"
    shutil.copy(files[0], again)
    with pytest.raises(UserError, match="A1 and again hold the same cells"):
        plan_study([*files, again], {"base": base})


@pytest.fixture
def refused(capsys):
    """Runs a command that must be refused with one line, and returns it."""

    def run(*argv):
        assert cli.run_command([str(a) for a in argv]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(lines) == 1
        return lines[0]

    return run


def test_mistakes_at_the_command_line_are_one_line(files, refused, tmp_path):
    out = ("--out", tmp_path / "new")
    assert "give the slides" in refused("experiment", "v1", *out)
    assert "v1x" in refused("experiment", "v1x", "--slides", *files, *out)
    assert "no such slide" in refused("experiment", "--hold-out", "Z", "--slides", *files, *out)
    assert "--seeds" in refused("experiment", "--seeds", "0..4", "--slides", *files, *out)
    assert "smaller first" in refused("experiment", "--seeds", "4-0", "--slides", *files, *out)
    donors = ("--donor-pattern", "[0-9]$|.", "--donor-map", tmp_path)
    line = refused("experiment", "--hold-out", "donor", *donors, "--slides", *files, *out)
    assert "one of --donor-key" in line
    assert not (tmp_path / "new").exists()


def test_each_donor_is_held_out_by_the_command_line(files, tmp_path, capsys):
    sets = [word for text in (*SETTINGS, "eval.baselines=false") for word in ("--set", text)]
    out = tmp_path / "out"
    argv = ["experiment", *map(str, files), "--hold-out", "donor", "--donor-pattern", "^."]
    argv += ["--out", str(out), "--seeds", "0", "--jobs", "1", *sets]
    assert cli.run_command(argv) == 0
    table = rows(out)
    held = {(r["fold"], r["slide"]) for r in table}
    assert held == {("A", "A1"), ("A", "A2"), ("B", "B1"), ("B", "B2")}
    assert {r["role"] for r in table} == {"variant", "ablation", "floor"}
    printed = capsys.readouterr().out
    assert "distance spearman" in printed and str(out / "report.html") in printed


def test_baselines_are_told_apart_where_encoders_differ(plan):
    other = plan.variants["base"].replace(encoder={"steps": 5})
    study = replace(plan, variants={**plan.variants, "other": other})
    assert sum(job.key.kind == "encoder" for job in study_jobs(study)) == 2 * 4
    base, blind, other = (encoder_task(study, v, "A1", 0) for v in ("base", "blind", "other"))
    assert base == blind != other
    names = [
        as_record(
            Row(variant, "A1", 0, "A1", "A", "ridge", "baseline", "procrustes", 0.5),
            baseline_variants(study),
        ).method
        for variant in ("base", "other")
    ]
    assert names == ["ridge [base]", "ridge [other]"]


@pytest.mark.parametrize(
    ("change", "shared"),
    [
        ({"model.beta": 0}, True),
        # what is left open would be decided as the other variant asked for it
        ({"refine.steps": 0}, False),
        ({"model.beta": 0, "selection.mode": "quick"}, False),
    ],
)
def test_an_encoder_is_shared_where_all_that_is_decided_with_it_is_the_same(plan, change, shared):
    base = plan.variants["base"]
    if mode := change.get("selection.mode"):
        base = base.with_values({"selection.mode": mode})
    study = replace(plan, variants={"base": base, "other": base.with_values(change)})
    first, second = (encoder_task(study, variant, "A1", 0) for variant in study.variants)
    assert (first == second) == shared


@pytest.mark.parametrize(
    ("asked", "share", "threads"),
    [(None, 4, 4), ("1", 4, 1), ("8", 4, 4), ("", 4, 4), ("2,4", 4, 4), ("0", 4, 1), (None, 0, 1)],
)
def test_a_run_takes_no_more_threads_than_the_user_allows(monkeypatch, asked, share, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads_per_job(share) == threads


def test_cross_validation_groups_slides_as_the_study_holds_them_out():
    """By donor where new donors are held out, by slide where a slide of a known donor is."""
    donors = {"A1": "A", "A2": "A", "B1": "B", "B2": "B", "C1": "C"}

    def groups(hold_out, name):
        folds, _ = plan_folds(donors, hold_out)
        study = Study((), {}, donors, {}, tuple(folds), (0,), "v1")
        return cv_groups(study, study.fold(name))

    assert groups("donor", "A") == {"B1": "B", "B2": "B", "C1": "C"}
    assert groups("slide", "A1") == {name: name for name in ("A2", "B1", "B2", "C1")}
    assert groups("slide", "C1") == {"A1": "A", "A2": "A", "B1": "B", "B2": "B"}
