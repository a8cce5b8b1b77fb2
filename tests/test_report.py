"""Reports of a slide: what they say, what they show, and the figures they are made of."""

import dataclasses
import html
import json
import math
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import sparse

from ipar_sparse import pl
from ipar_sparse.evaluation.results import MODEL, Provenance, SlideEvaluation
from ipar_sparse.files import write_json
from ipar_sparse.geometry.alignment import align
from ipar_sparse.geometry.neighborhoods import unit_gauge
from ipar_sparse.metrics.diagnostics import AttentionFocus
from ipar_sparse.metrics.layout import evaluate_layout
from ipar_sparse.pl.oklab import to_oklab
from ipar_sparse.pl.style import MAX_POINTS
from ipar_sparse.report.cells import CellTable
from ipar_sparse.report.headline import summarize
from ipar_sparse.report.slide import write_report
from ipar_sparse.report.tables import group_table, main_table, metric_table

matplotlib.use("Agg")


def cells(n, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, 2)) * [1.5, 1.0]


def noisy(pos, noise, seed=1):
    return unit_gauge(pos) + noise * np.random.default_rng(seed).normal(size=pos.shape)


def history():
    rows = [{"stage": "gate", "step": 0, "l_gate": 3.0}]
    for step in range(0, 100, 10):
        rows.append(
            {
                "stage": "model",
                "step": step,
                "epoch": step // 20,
                "loss": 3 / (step + 1),
                "l_rw": "0.5",
                "l_gate": "",
                "best": None,
            }
        )
        rows.append(
            {
                "stage": "model",
                "step": step,
                "epoch": step // 20,
                "best": int(step == 40),
                "val_hgate_e_geo": 2 / (step + 3),
                "val_tedge_e_geo": math.nan,
                "val_e_geo_floor": 0.01,
            }
        )
    return rows


def full_evaluation(n=300, **changes):
    true = cells(n)
    pred = noisy(true, 0.15)
    rng = np.random.default_rng(3)
    layouts = {
        "model": pred,
        "without gate": noisy(true, 0.3),
        "PCA": noisy(true, 0.5),
        "random": rng.normal(size=(n, 2)),
        "true coordinates": true,
    }
    methods = {name: evaluate_layout(layout, true) for name, layout in layouts.items()}
    for name in ("model", "true coordinates"):
        methods[name]["E_geo"] = 0.4 if name == "model" else 0.01
    measures = {
        f"{name}/r{r}/h{h}": 0.5 + 0.1 * h
        for name in ("attn_recall@30", "logit_std")
        for r in range(3)
        for h in range(4)
    }
    neighbors = np.arange(40)
    fields = {
        "slide": "slide C",
        "pred": pred,
        "true": true,
        "methods": methods,
        "measures": {"E_geo_hgate": 0.4, "candidate_recall@15": 0.5, **measures},
        "trajectory": [noisy(true, s) for s in (1, 0.5, 0.3, 0.15)],
        "focus": [AttentionFocus(c, neighbors, rng.dirichlet(np.ones(40))) for c in range(4)],
        "uncertainty": rng.gamma(2.0, 0.1, n),
        "provenance": Provenance(
            training=["slide A", "slide B"],
            held_out=True,
            settings={"train": {"lr": 5e-4}, "seed": 0},
            versions={"torch": torch.__version__},
        ),
    }
    return SlideEvaluation(**{**fields, **changes})


def of_page(n=300, **changes):
    counts = sparse.csr_matrix(np.random.default_rng(3).poisson(1.0, (n, 1)).astype(float))
    shown = CellTable(np.arange(n).astype(str), {}, counts, ["Reln"])
    command = "ipar-sparse evaluate run c.h5ad"
    return {"cells": shown, "history": history(), "command": command, **changes}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    path = write_report(out, full_evaluation(), **of_page())
    return path, path.read_text()


def test_the_page_holds_everything_itself(page):
    path, html = page
    assert html.count("data:image/webp;base64,") == 9
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", html.partition("<script")[0])
    assert "default-src &#39;none&#39;" in html
    figures = {p.stem for p in (path.parent / "figures").glob("*.png")}
    assert figures == {
        "map",
        "gene",
        "methods",
        "distances",
        "uncertainty",
        "recycles",
        "attention",
        "diagnostics",
        "training",
    }
    assert {p.name for p in path.parent.iterdir()} == {"report.html", "figures"}


def test_the_page_opens_with_the_headline(page):
    _, html = page
    headline = summarize(full_evaluation()).text
    assert html.index(headline) < html.index("<img")
    assert "better than every baseline on every measure" in headline
    assert "slide C" in html and "held out of every stage" in html
    assert "train.lr" in html and "0.0005" in html


def test_text_of_the_user_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>"
    evaluation = full_evaluation(
        slide=evil,
        methods={"model": {"distance_spearman": 0.5}, evil: {"distance_spearman": 0.4}},
        provenance=Provenance(
            training=[evil],
            notes=[evil],
            cautions=[evil],
            settings={evil: evil},
            versions={evil: evil},
        ),
    )
    page = of_page(command=evil)
    page["cells"].genes = [evil]
    html = write_report(tmp_path, evaluation, **page).read_text()
    assert evil not in html
    assert html.count("&lt;script&gt;") >= 9


def test_what_is_missing_is_left_out_or_explained(tmp_path):
    html = write_report(tmp_path, SlideEvaluation("cells", cells(60))).read_text()
    assert "It was not compared with measured positions" in html
    assert html.count("data:image/webp;base64,") == 1
    for word in ("Uncertainty", "Scores", "Training", "Attention", "Recycle"):
        assert f">{word}" not in html
    alone = full_evaluation(trajectory=[cells(300)], focus=None, measures={}, uncertainty=None)
    html = write_report(tmp_path, alone).read_text()
    assert "Recycle by recycle" not in html and "Attention" not in html
    assert "Not shown" in html and "--noise-samples" in html


def test_arrays_of_other_cells_are_refused(tmp_path):
    with pytest.raises(ValueError, match="pred has 300 cells, names has 7"):
        write_report(tmp_path, full_evaluation(), cells=CellTable(np.arange(7).astype(str)))
    assert not list(tmp_path.iterdir())


def methods(model, rival, se=0.0, name="distance_spearman"):
    return {
        "model": {name: model, f"{name}_se": se},
        "ridge": {name: rival, f"{name}_se": se},
        "without gate": {name: 2.0},
        "true coordinates": {name: 3.0},
    }


@pytest.mark.parametrize(
    ("model", "rival", "se", "said", "wins"),
    [
        (0.80, 0.70, 0.01, "The best baseline (ridge) reaches 0.70", "better than every"),
        (0.80, 0.70, 0.05, "no different from the best baseline", "on no measure"),
        (0.60, 0.70, 0.01, "The baseline ridge does better: 0.70", "on no measure"),
        (0.700, 0.697, 0.0, "no different from the best baseline", "on no measure"),
    ],
)
def test_the_headline_claims_only_what_exceeds_the_noise(model, rival, se, said, wins):
    evaluation = SlideEvaluation("s", cells(20), cells(20), methods(model, rival, se))
    headline = summarize(evaluation)
    assert said in headline.evidence[0]
    assert wins in headline.text


def test_lower_is_better_is_read_as_such():
    evaluation = SlideEvaluation("s", cells(20), cells(20), methods(0.3, 0.5, name="misplacement"))
    assert "The best baseline (ridge) reaches 0.50" in summarize(evaluation).evidence[0]


@pytest.mark.parametrize(
    ("rho", "words"),
    [(0.95, "recovered well"), (0.75, "mostly"), (0.5, "partly"), (0.2, "hardly"), (0.0, "not ")],
)
def test_the_grade_follows_the_correlation(rho, words):
    evaluation = SlideEvaluation("s", cells(20), cells(20), {MODEL: {"distance_spearman": rho}})
    assert words in summarize(evaluation).text


def test_a_slide_that_was_trained_on_is_called_so():
    evaluation = full_evaluation(
        provenance=Provenance(held_out=False), measures={"lambda_ratio": 0.001}
    )
    warnings = summarize(evaluation).warnings
    assert "took part in training" in warnings[0]
    assert "collapsed to a line" in warnings[1]


def test_what_is_wrong_inside_the_model_stands_beside_its_attention(tmp_path):
    """The map may be good all the same, which is for its scores to say."""
    evaluation = full_evaluation(
        n=60,
        measures={"logit_std/r0/h0": 32.0, "lambda_ratio": 0.3},
        **dict.fromkeys(("trajectory", "focus", "uncertainty")),
    )
    assert not summarize(evaluation).warnings
    page = write_report(tmp_path, evaluation).read_text()
    top, _, below = page.partition('<details id="attention"')
    assert "one-hot" in below.partition("</details>")[0] and "one-hot" not in top
    assert 'class="warnings"' not in page  # an alarm is for the map
    score = {"distance_spearman": 0.4}
    for more, ends in (
        ({"without recycles": score}, '"model" and "without recycles"'),
        ({"without refinement": score}, '"without refinement" and "initial layout"'),
        ({}, '"model" and "initial layout"'),
    ):
        methods = {**evaluation.methods, "initial layout": score, **more}
        given = dataclasses.replace(evaluation, methods=methods)
        page = html.unescape(write_report(tmp_path, given).read_text())
        assert f"is the difference between {ends} among" in page


def test_the_table_marks_the_best_competitor_and_no_other():
    table = metric_table(
        SlideEvaluation(
            "s",
            cells(9),
            cells(9),
            {
                "model": {
                    "procrustes": 0.30,
                    "distance_spearman": 0.7,
                    "distance_spearman_se": 0.004,
                },
                "PCA": {"procrustes": 0.2, "distance_spearman": 0.70001},
                "broken": {"procrustes": math.nan},
                "true coordinates": {"procrustes": 0.0, "distance_spearman": 1.0},
            },
        )
    )
    assert [c["arrow"] for c in table["columns"]] == ["↑", "↓"]
    rows = {row["name"]: row for row in table["rows"]}
    assert [cell["best"] for cell in rows["model"]["cells"]] == [True, False]
    assert [cell["best"] for cell in rows["PCA"]["cells"]] == [True, True]
    assert not any(cell["best"] for cell in rows["true coordinates"]["cells"])
    assert rows["model"]["cells"][0]["error"] == "± 0.004"
    assert rows["broken"]["cells"][1]["text"] == "–"
    assert [rows[m]["role"] for m in rows] == ["model", "baseline", "baseline", "floor"]


def test_metrics_file_is_strict_json(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(
        path,
        {
            "E_geo_hgate": np.float32(0.5),
            "nan": math.nan,
            "inf": np.inf,
            "n": np.int64(3),
            "tensor": torch.tensor(2.0),
            "nested": {"x": [np.nan, 1.0]},
            "name": "µ",
        },
    )
    got = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert got == {
        "E_geo_hgate": 0.5,
        "nan": None,
        "inf": None,
        "n": 3,
        "tensor": 2.0,
        "nested": {"x": [None, 1.0]},
        "name": "µ",
    }


def test_position_colors_stay_apart_for_colour_blind_readers():
    """Corners and edges stay distinct after simulated deuteranopia (Machado et al., 2009)."""
    deuteranopia = np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    )
    grid = np.stack(np.meshgrid([0.0, 0.5, 1.0], [0.0, 0.5, 1.0]), -1).reshape(-1, 2)
    rgb = pl.position_colors(np.repeat(grid, 50, axis=0))[::50]
    assert rgb.min() >= 0 and rgb.max() <= 1
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ deuteranopia.T, 0, 1)
    seen = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = to_oklab(seen)
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert distance[~np.eye(9, dtype=bool)].min() > 0.07


def test_layout_pair_turns_the_prediction_onto_the_truth():
    true = cells(80)
    pred = 5 * true @ np.array([[0.0, 1.0], [1.0, 0.0]]) + 3
    axes = pl.layout_pair(true, pred)
    left, right = (np.sort(ax.collections[0].get_offsets(), axis=0) for ax in axes)
    np.testing.assert_allclose(right, left, atol=1e-9)
    assert all(ax.get_aspect() == 1 for ax in axes)


def test_trajectory_keeps_one_rotation_for_all_layouts():
    true = cells(80)
    half_turn = [-unit_gauge(true), unit_gauge(true)]
    axes = pl.trajectory(half_turn, true=true)
    first, last = (ax.collections[0].get_offsets() for ax in axes)
    np.testing.assert_allclose(first, -last, atol=1e-9)


def test_many_cells_are_subsampled_and_it_says_so():
    pos = cells(MAX_POINTS + 50_000)
    ax = pl.layout(pos, ax=Figure().subplots())
    assert len(ax.collections[0].get_offsets()) == MAX_POINTS
    assert ax.get_xlabel() == "1,000,000 of 1,050,000 cells drawn"
    assert pl.layout(pos[:50], ax=Figure().subplots()).get_xlabel() == ""


def test_distance_density_of_a_perfect_map_lies_on_the_diagonal():
    true = cells(200)
    ax = pl.distance_density(align(true, true)[0] * 7, true, ax=Figure().subplots())
    at = ax.collections[0].get_offsets()
    step = ax.get_xlim()[1] / 55
    assert np.abs(at[:, 0] - at[:, 1]).max() < 2 * step


def test_dots_of_one_slide_show_standard_errors_and_leave_out_methods_without_the_metric():
    ax = pl.metric_dots(
        {"model": {"s": 0.2}, "PCA": {"s": 0.4}, "none": {}},
        "stress_1",
        errors={"model": 0.01, "PCA": None},
        lines={"true coordinates": 0.0},
        ax=Figure().subplots(),
    )
    assert [label.get_text() for label in ax.get_yticklabels()] == ["model", "PCA"]
    assert 0.0 in [line.get_xdata()[0] for line in ax.lines]
    assert ax.get_xlabel() == "lower is better"


def test_the_main_table_has_six_rows_the_best_baselines_among_them():
    values = {"model": 0.5, "without gate": 0.4, "random": 0.0, "true coordinates": 1.0}
    values |= {name: place / 10 for place, name in enumerate("abcdef")}
    methods = {name: {"distance_spearman": value} for name, value in values.items()}
    table = main_table(SlideEvaluation("s", cells(9), cells(9), methods))
    names = [row["name"] for row in table["rows"]]
    assert names == ["model", "f", "e", "d", "random", "true coordinates"]


def test_what_is_not_to_be_trusted_begins_with_the_verdict(tmp_path):
    evaluation = full_evaluation(verdict="Unlike the training slides: no <gene> agrees")
    page = html.unescape(write_report(tmp_path, evaluation).read_text())
    trust = page.partition('id="trust"')[2].partition("</section>")[0]
    said = re.sub(r"<h2>.*?</h2>|</?b>|<p>", "", trust.partition(">")[2]).strip()
    assert said.startswith("Unlike the training slides: no <gene> agrees.")


def test_labels_come_by_their_uncertainty(tmp_path):
    evaluation = full_evaluation()
    labels = np.where(evaluation.uncertainty > np.median(evaluation.uncertainty), "far", "near")
    shown = CellTable(np.arange(300).astype(str), {"number": np.arange(300), "zone": labels})
    table = group_table(evaluation, shown)
    assert table["name"] == "zone" and table["scored"]
    assert [(row["label"], row["cells"]) for row in table["rows"]] == [("far", 150), ("near", 150)]
    page = write_report(tmp_path, evaluation, cells=shown).read_text()
    assert "By zone, the most uncertain cells are those of far" in page


def test_loss_curves_read_the_csv_and_mark_the_kept_epoch():
    left, right = pl.loss_curves(history(), axes=Figure().subplots(1, 2))
    labels = left.get_legend_handles_labels()[1]
    assert labels == ["total", "random walk"]
    kept = [line for line in right.lines if line.get_marker() == "*"]
    assert kept[0].get_xdata()[0] == 3
    left, right = pl.loss_curves([], axes=Figure().subplots(1, 2))
    assert left.texts[0].get_text() == "not recorded"


def test_calibration_of_honest_uncertainty_lies_on_the_line():
    rng = np.random.default_rng(0)
    spread = rng.gamma(2.0, 0.2, 5000)
    ax = pl.uncertainty_calibration(spread, np.abs(rng.normal(0, spread)), ax=Figure().subplots())
    said, seen = ax.lines[0].get_data(orig=False)
    assert len(seen) == 10 and seen[-1] > 3 * seen[0]
    np.testing.assert_allclose(seen, said, rtol=0.15)
    np.testing.assert_array_equal(*ax.lines[-1].get_data(orig=False))


def test_a_report_of_three_cells_with_constant_values(tmp_path):
    true = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    scores = evaluate_layout(np.ones((3, 2)), true)
    evaluation = SlideEvaluation(
        "tiny",
        np.ones((3, 2)),
        true,
        {"model": scores, "PCA": scores},
        uncertainty=np.zeros(3),
        trajectory=[np.zeros((3, 2)), np.ones((3, 2))],
    )
    shown = CellTable(np.array(list("abc")), {}, sparse.csr_matrix((3, 1)), ["g"])
    page = write_report(tmp_path, evaluation, cells=shown)
    assert "not recovered" in page.read_text()


def test_reports_do_not_pile_up_pyplot_figures(tmp_path):
    before = plt.get_fignums()
    write_report(tmp_path, SlideEvaluation("s", cells(50), cells(50)))
    assert plt.get_fignums() == before
