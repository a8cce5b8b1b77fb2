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
from ipar_sparse.data.anndata_io import write_slide
from ipar_sparse.evaluation.study import (
    Study,
    find_donors,
    load_variants,
    plan_folds,
    plan_study,
    run_study,
)
from safetensors.torch import load_file

from ipar_sparse import cli
from ipar_sparse.config import load_config
from ipar_sparse.data.simulation import simulate
from ipar_sparse.errors import UserError
from ipar_sparse.evaluation import study as study_module
from ipar_sparse.evaluation.comparison import Record, compare
from ipar_sparse.inference.checkpoint import BEST, LAST, read_meta
from ipar_sparse.report.study import answers
from ipar_sparse.train import fit as trainer
from ipar_sparse.train.fit import fit

SMALL = {
    "encoder.steps": 4,
    "encoder.hidden": [16],
    "encoder.out": 8,
    "model.dim": 8,
    "model.channels": 8,
    "model.heads": 2,
    "model.head_channels": 4,
    "model.recycles": 2,
    "train.minisets": 3,
    "train.miniset_min": 30,
    "train.miniset_max": 40,
    "train.epochs": 2,
    "train.warmup_epochs": 0,
    "train.ramp_epochs": 1,
    "train.gate_steps": 2,
    "train.val_minisets": 1,
    "train.lr": 5e-3,
    "graph.k": 10,
    "data.max_genes": 50,
}
SETTINGS = [f"{key}={value}" for key, value in SMALL.items()]


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
    outcome = run_study(plan, out, jobs=1)
    assert (outcome.done, outcome.total, outcome.failed) == (8, 8, {})
    return out


@pytest.fixture
def copy(done, tmp_path):
    shutil.copytree(done, tmp_path / "copy")
    return tmp_path / "copy"


def rows(out):
    with open(out / "results.csv") as file:
        return list(csv.DictReader(file))


def records(values, method, role="variant", metric="distance_spearman"):
    """Records of one method from a table of slides x seeds."""
    return [
        Record(method, role, f"s{i}", j, metric, float(v))
        for i, line in enumerate(values)
        for j, v in enumerate(line)
    ]


def test_means_and_paired_differences_are_those_by_hand():
    ours = np.array([[0.5, 0.6], [0.3, 0.3], [0.7, 0.9]])
    theirs = np.array([[0.4, 0.4], [0.3, 0.2], [0.5, 0.8]])
    weak = np.zeros((3, 2))
    found = compare(
        [
            *records(theirs, "ridge", "baseline"),
            *records(weak, "random", "baseline"),
            *records(ours, "v1"),
            *records(ours - 0.5, "v2"),
        ],
        "v1",
    )
    own = found.of("distance_spearman", "v1")
    assert own.mean == pytest.approx(0.55)
    assert own.sd == pytest.approx(np.std([0.5, 0.6], ddof=1))  # of the means of each seed
    assert own.se == pytest.approx(np.std([0.55, 0.3, 0.8], ddof=1) / math.sqrt(3))
    gap = own.vs_baseline
    per_slide = [0.15, 0.05, 0.15]
    assert gap.other == "ridge" and (gap.over, gap.count) == ("slides", 3)
    assert gap.mean == pytest.approx(np.mean(per_slide))
    assert gap.se == pytest.approx(np.std(per_slide, ddof=1) / math.sqrt(3))
    assert gap.verdict == "better"
    assert own.vs_reference is None
    assert found.of("distance_spearman", "v2").vs_reference.mean == pytest.approx(-0.5)
    assert found.of("distance_spearman", "v2").vs_reference.verdict == "worse"
    assert list(found.roles) == ["v1", "v2", "ridge", "random"]


def test_lower_is_better_where_it_is():
    low, high = np.full((3, 1), 0.2) + [[0], [0.01], [0.02]], np.full((3, 1), 0.6)
    found = compare(
        [
            *records(low, "v1", metric="procrustes"),
            *records(high, "a", "baseline", "procrustes"),
            *records(high + 0.1, "b", "baseline", "procrustes"),
        ],
        "v1",
    )
    assert found.best_baseline["procrustes"] == "a"
    assert found.of("procrustes", "v1").vs_baseline.verdict == "better"


def test_a_difference_within_the_noise_has_no_verdict():
    values = np.array([[0.5], [0.3], [0.7]])
    noisy = values + [[0.2], [-0.2], [0.1]]
    found = compare([*records(values, "v1"), *records(noisy, "v2")], "v1")
    assert found.of("distance_spearman", "v2").vs_reference.verdict == ""
    two = compare([*records(values[:2], "v1"), *records(values[:2] + 0.1, "v2")], "v1")
    gap = two.of("distance_spearman", "v2").vs_reference
    assert gap.se == pytest.approx(0, abs=1e-12) and gap.verdict == ""


def test_one_slide_is_compared_over_seeds_and_missing_runs_are_left_out_in_pairs():
    ours, theirs = np.array([[0.5, 0.6, 0.8]]), np.array([[0.4, 0.4, 0.5]])
    found = compare([*records(theirs, "v1"), *records(ours, "v2")], "v1")
    gap = found.of("distance_spearman", "v2").vs_reference
    assert (gap.over, gap.count) == ("seeds", 3)
    assert gap.se == pytest.approx(np.std([0.1, 0.2, 0.3], ddof=1) / math.sqrt(3))
    some = [r for r in records(ours, "v2") if r.seed != 2]
    gap = compare([*records(theirs, "v1"), *some], "v1").of("distance_spearman", "v2").vs_reference
    assert gap.count == 2 and gap.mean == pytest.approx(0.15)
    lost = [*some, Record("v2", "variant", "s0", 2, "distance_spearman", math.nan)]
    again = compare([*records(theirs, "v1"), *lost], "v1")
    assert again.of("distance_spearman", "v2").vs_reference == gap


DONORS = {"A1": "A", "A2": "A", "A3": "A", "B1": "B", "C1": "C", "C2": "C"}


def test_each_slide_is_held_out_once():
    folds, notes = plan_folds(DONORS, "slide")
    assert [fold.test for fold in folds] == [(name,) for name in DONORS] and not notes
    for fold in folds:
        assert {*fold.test, *fold.train, fold.val} == set(DONORS)
        assert len(fold.train) == 4 and fold.val not in fold.train
        # the one slide of B is never taken away from training, nor a sister of what is held out
        assert fold.val != "B1" and DONORS[fold.val] not in {DONORS[name] for name in fold.test}
    assert {fold.val for fold in folds[3:]} == {"A1", "A2", "A3"}  # A has most
    assert {fold.val for fold in folds[:3]} == {"C1", "C2"}
    alone, _ = plan_folds(dict.fromkeys(DONORS, "A"), "slide")
    assert len({fold.val for fold in alone}) > 3


def test_a_donor_is_held_out_with_all_its_slides():
    folds, _ = plan_folds(DONORS, "donor")
    assert [fold.test for fold in folds] == [("A1", "A2", "A3"), ("B1",), ("C1", "C2")]
    for fold in folds:
        held = {DONORS[name] for name in fold.test}
        assert not held & {DONORS[name] for name in fold.seen}
    # three slides are too few to take one away from training, five are not
    assert [fold.val is None for fold in folds] == [True, False, False]
    named, _ = plan_folds(DONORS, "C, A2")
    assert [fold.test for fold in named] == [("C1", "C2"), ("A2",)]


def test_what_cannot_be_held_out_is_said():
    with pytest.raises(UserError, match="one donor"):
        plan_folds({"a": "x", "b": "x"}, "donor")
    with pytest.raises(UserError, match="D: no such slide or donor"):
        plan_folds(DONORS, "A1,D")
    with pytest.raises(UserError, match="leaves no slide"):
        plan_folds({"a": "x"}, "slide")
    with pytest.raises(UserError, match="b cannot be held out"):
        plan_folds({"b1": "b", "b2": "b"}, "b")
    folds, notes = plan_folds({"a": "x", "b": "y"}, "slide")
    assert [fold.train for fold in folds] == [("b",), ("a",)] and not notes


def test_donors_are_found_by_name_column_or_file(slides, tmp_path):
    named = [replace(s, name=n) for s, n in zip(slides[:2], ("A1", "B7"), strict=True)]
    assert find_donors(named) == {"A1": "A1", "B7": "B7"}
    assert find_donors(named, pattern="^.") == {"A1": "A", "B7": "B"}
    assert find_donors(named, pattern=r"\D(\d)") == {"A1": "1", "B7": "7"}
    table = tmp_path / "donors.yaml"
    table.write_text("A1: x\nB7: 3\n")
    assert find_donors(named, table=table) == {"A1": "x", "B7": "3"}
    marked = [replace(s, obs={"animal": np.full(90, 1)}) for s in named]
    assert find_donors(marked, key="animal") == {"A1": "1", "B7": "1"}
    for wrong in ({"key": "animal"}, {"pattern": "^C"}, {"pattern": "("}):
        with pytest.raises(UserError, match="animal|does not match|regular"):
            find_donors(named, **wrong)
    table.write_text("A1: x\n")
    with pytest.raises(UserError, match="B7"):
        find_donors(named, table=table)
    with pytest.raises(UserError, match="one of"):
        find_donors(named, key="animal", pattern="^.")


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
    path.write_text("variants: {v1: , other: {preset: no-gate, train.k_range: null}}")
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


def test_the_answer_names_the_best_baseline():
    ours = np.array([[0.5], [0.3], [0.7]])
    found = compare(
        [
            *records(ours, "v1"),
            *records(ours - 0.2, "ridge", "baseline"),
            *records(ours - 0.1, "v2"),
        ],
        "v1",
    )
    first, second = answers(found)
    assert "0.500, better than the best baseline, ridge (0.300" in first
    assert second == "v2 against v1: worse on Distance correlation (Spearman)."


def test_variants_share_an_encoder_that_is_the_one_they_would_train(done, slides, plan, tmp_path):
    assert len(list((done / "encoders").glob("*/A1/seed0"))) == 1
    folder = done / "runs" / "base" / "A1" / "seed0"
    config = plan.config("base", 0)
    fold = plan.fold("A1")
    by_name = dict(zip(("A1", "A2", "B1", "B2"), slides, strict=True))
    donors = {slide.name: plan.donors[name] for name, slide in by_name.items()}
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
        patch.setattr(study_module, "score_slide", stop)
        with pytest.raises(KeyboardInterrupt):
            run_study(plan, copy, jobs=1)
    assert "6 of 8 runs finished" in (copy / "report.html").read_text()
    trained = (lost[0] / LAST).stat().st_mtime_ns
    outcome = run_study(plan, copy, jobs=1)
    assert outcome.done == 8
    assert (copy / "results.csv").read_text() == (done / "results.csv").read_text()
    assert all(p.stat().st_mtime_ns == at for p, at in kept.items())
    assert (lost[0] / LAST).stat().st_mtime_ns == trained


def test_a_study_stopped_in_an_encoder_goes_on_with_it(copy, done, plan, monkeypatch):
    """What an encoder that several runs wait for has left behind is no trained encoder."""
    shutil.rmtree(next(copy.glob("encoders/*/B2/seed1")))
    for variant in ("base", "blind"):
        shutil.rmtree(copy / "runs" / variant / "B2" / "seed1")
    saves, stopped = trainer._Run._stop_if_asked, []

    def press(run, stage, *saved):
        if stage == "encoder" and run.state.step == 2 and not stopped:
            stopped.append(run.out)
            run.interrupted.set()
        saves(run, stage, *saved)

    monkeypatch.setattr(trainer._Run, "_stop_if_asked", press)
    with pytest.raises(KeyboardInterrupt):
        run_study(plan, copy, jobs=1)
    (folder,) = stopped
    meta = read_meta(folder / LAST)
    assert (meta["stage"], meta["step"]) == ("encoder", 2)
    outcome = run_study(plan, copy, jobs=1)
    assert outcome.done == 8 and not outcome.failed
    assert "resuming encoder at step 2" in (folder / "log.txt").read_text()
    assert (copy / "results.csv").read_text() == (done / "results.csv").read_text()


def test_a_failed_run_is_on_record_and_the_others_go_on(copy, plan, monkeypatch):
    for variant in ("base", "blind"):
        shutil.rmtree(copy / "runs" / variant / "A1" / "seed1")

    def fails(train, val, config, *given, **named):
        if config.model.beta == 0:
            raise RuntimeError("no such\nluck")
        return fit(train, val, config, *given, **named)

    monkeypatch.setattr(study_module, "fit", fails)
    outcome = run_study(plan, copy, jobs=1)
    assert outcome.done == 7
    assert outcome.failed == {"runs/blind/A1/seed1": "RuntimeError: no such luck"}
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
    study_module._take_folder(replace(plan, variants=more, seeds=(0, 1, 2)), copy)


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
    with pytest.raises(UserError, match="A1 and again are the same cells"):
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
    line = refused(
        "experiment",
        "--hold-out",
        "donor",
        "--donor-pattern",
        "[0-9]$|.",
        "--donor-map",
        tmp_path,
        "--slides",
        *files,
        *out,
    )
    assert "one of --donor-key" in line
    assert "takes a run and a slide" in refused("evaluate", tmp_path, *out)
    line = refused("evaluate", tmp_path, files[0], "--jobs", "2", *out)
    assert "--jobs belongs to --protocol" in line
    assert not (tmp_path / "new").exists()


def test_evaluate_by_protocol(files, tmp_path, capsys):
    sets = [word for text in SETTINGS for word in ("--set", text)]
    argv = [
        "evaluate",
        "--protocol",
        "leave-one-donor-out",
        *map(str, files),
        "--donor-pattern",
        "^.",
        "--out",
        str(tmp_path / "out"),
        "--seeds",
        "1",
        "--jobs",
        "1",
        "--no-baselines",
        *sets,
    ]
    assert cli.run_command(argv) == 0
    table = rows(tmp_path / "out")
    held = {(r["fold"], r["slide"]) for r in table}
    assert held == {("A", "A1"), ("A", "A2"), ("B", "B1"), ("B", "B2")}
    assert {r["role"] for r in table} == {"variant", "form", "floor"}
    assert "distance spearman" in capsys.readouterr().out


def test_baselines_are_told_apart_where_encoders_differ(plan):
    other = plan.variants["base"].replace(encoder={"steps": 5})
    study = replace(plan, variants={**plan.variants, "other": other})
    jobs = study.jobs()
    assert sum(job.key.kind == "encoder" for job in jobs) == 2 * 4
    assert study.encoder_task("blind", "A1", 0) == study.encoder_task("base", "A1", 0)
    assert study.encoder_task("other", "A1", 0) != study.encoder_task("base", "A1", 0)
    names = {
        variant: study_module._record(
            study, (variant, "A1", 0, "A1", "A", "ridge", "baseline", "procrustes", 0.5)
        ).method
        for variant in ("base", "other")
    }
    assert names == {"base": "ridge [base]", "other": "ridge [other]"}


@pytest.mark.parametrize(
    ("asked", "share", "threads"),
    [(None, 4, 4), ("1", 4, 1), ("8", 4, 4), ("", 4, 4), ("2,4", 4, 4), ("0", 4, 1), (None, 0, 1)],
)
def test_a_run_takes_no_more_threads_than_the_user_allows(monkeypatch, asked, share, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert study_module._threads(share) == threads


def test_what_is_tried_is_left_out_as_what_is_held_out_is():
    """Donors where new donors are held out; slides where a slide of a known donor is."""
    donors = {"A1": "A", "A2": "A", "B1": "B", "B2": "B", "C1": "C"}

    def tried(hold_out, name):
        folds, _ = plan_folds(donors, hold_out)
        study = Study((), {}, donors, {}, tuple(folds), (0,), "v1")
        return study.left_out_together(study.fold(name))

    assert tried("donor", "A") == {"B1": "B", "B2": "B", "C1": "C"}
    assert tried("slide", "A1") == {name: name for name in ("A2", "B1", "B2", "C1")}
    assert tried("slide", "C1") == {"A1": "A", "A2": "A", "B1": "B", "B2": "B"}
