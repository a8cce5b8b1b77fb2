"""Evaluations of a trained run on a slide whose positions are known."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ipar_sparse.config import load_config
from ipar_sparse.data.expression import Expression, match_genes
from ipar_sparse.data.simulation import simulate
from ipar_sparse.errors import UserError
from ipar_sparse.evaluation.attention import recycle_records
from ipar_sparse.evaluation.layouts import ablation_layouts, expression_pca
from ipar_sparse.evaluation.scoring import e_geo_of_layouts, score_slide
from ipar_sparse.inference import steps
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.metrics.diagnostics import collapse_diagnostics
from ipar_sparse.metrics.layout import metric_info
from ipar_sparse.report import evaluate_slide
from ipar_sparse.report.slide import spatial_gene
from ipar_sparse.train.fit import fit

SMALL = [
    "encoder.steps=4",
    "encoder.hidden=[16]",
    "encoder.out=8",
    "model.dim=8",
    "model.channels=8",
    "model.heads=2",
    "model.head_channels=4",
    "model.recycles=2",
    "train.minisets=3",
    "train.miniset_min=30",
    "train.miniset_max=40",
    "train.epochs=1",
    "train.warmup_epochs=0",
    "train.ramp_epochs=1",
    "train.gate_steps=2",
    "train.val_minisets=1",
    "graph.k=10",
    "selection.mode=none",
    "refine.distance_correction_steps=5",
    "refine.steps=5",
]


@pytest.fixture(scope="module")
def slides():
    return simulate("cortex", slides=3, spots=140, genes=60, seed=5)


@pytest.fixture(scope="module")
def run(slides, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    fit(slides[:1], slides[1:2], load_config(None, SMALL), out)
    return out


@pytest.fixture
def predictor(run):
    return Predictor.load(run)


@pytest.fixture(scope="module")
def without_recycles(slides, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    settings = [*SMALL, "model.recycling=false", "model.init=atlas"]
    fit(slides[:2], [], load_config(None, settings), out)
    return Predictor.load(out)


def test_metrics_and_report_of_a_held_out_slide(predictor, slides, tmp_path):
    metrics = evaluate_slide(predictor, slides[2], tmp_path, command="ipar-sparse evaluate")
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved == pytest.approx(metrics)
    for name in ("distance_spearman", "E_geo_hgate", "E_geo_tedge", "candidate_recall@15"):
        assert np.isfinite(saved[name])
    assert saved["E_geo_floor"] == pytest.approx(0.0, abs=1e-9)
    assert saved["E_geo_hgate"] == saved["E_geo"]
    assert saved["true coordinates/distance_spearman"] == pytest.approx(1.0)
    assert "ridge/distance_spearman" in saved and "without gate/distance_spearman" in saved
    plain = [name for name in saved if "/" not in name and not name.endswith("_se")]
    assert not [name for name in plain if not metric_info(name).explanation]
    page = (tmp_path / "report.html").read_text()
    assert slides[2].name in page and "held out of every stage" in page
    assert "http://" not in page.split("<body")[1]


def test_collapse_is_measured_on_the_final_map(predictor, slides):
    always = {"refine.steps": 20, "refine.anchor_weight": 1.0, "refine.skip_if_overlap": 2.0}
    predictor.config = predictor.config.with_values(always)
    evaluation = score_slide(predictor, slides[2], baselines=False)
    shape = collapse_diagnostics(evaluation.pred)
    model = evaluation.methods["model"]
    assert evaluation.measures["lambda_ratio"] == model["lambda_ratio"] == shape["lambda_ratio"]
    assert shape["lambda_ratio"] != collapse_diagnostics(evaluation.trajectory[-1])["lambda_ratio"]


def test_each_ablation_lacks_one_part(predictor, slides):
    predictor.config = predictor.config.with_values({"refine.skip_if_overlap": 2.0})
    config, prediction = predictor.config, predictor.predict(slides[2])
    h = torch.from_numpy(prediction.embedding)
    found = ablation_layouts(predictor, prediction, h, slides[2].pos)
    assert list(found) == [
        "without gate",
        "without distance correction",
        "without refinement",
        "initial layout",
        "without recycles",
        "true neighbours",
    ]
    initial, last = (torch.from_numpy(prediction.trajectory[i]).float() for i in (0, -1))

    def correct(pos):
        return steps.correct_distances(pos, h, prediction.predictive_variance, config)

    def refine(pos):
        return steps.refine(pos, prediction.refinement_graph, config)

    ungated = steps.recycle(predictor.model, h, prediction.graph, None, initial)[-1]
    expected = {
        "without gate": refine(correct(ungated)),
        "without distance correction": refine(last),
        "without refinement": correct(last),
        "initial layout": initial,
        "without recycles": refine(correct(initial)),
    }
    for name, layout in expected.items():
        np.testing.assert_array_equal(found[name], layout.double().numpy(), err_msg=name)
        assert not np.allclose(found[name], prediction.pos)


def test_a_step_that_is_off_has_no_row_but_baselines_are_given_it(predictor, slides):
    off = {"refine.steps": 0, "refine.distance_correction_steps": 0}
    predictor.config = predictor.config.with_values(off)
    methods = score_slide(predictor, slides[2]).methods
    assert not {"without refinement", "without distance correction"} & set(methods)
    for name in ("PCA", "MLP", "atlas"):
        assert methods[f"{name} + refinement"] != methods[name]


def test_a_step_that_changes_nothing_is_noted(predictor, slides):
    predictor.config = predictor.config.with_values({"refine.skip_if_overlap": 0.0})
    evaluation = score_slide(predictor, slides[2], baselines=False)
    assert evaluation.methods["without refinement"] == evaluation.methods["model"]
    assert any('"without refinement" equals the model' in n for n in evaluation.provenance.notes)


def test_a_run_without_recycles_has_no_attention(without_recycles, slides, tmp_path):
    evaluation = score_slide(without_recycles, slides[2])
    rows = {"without gate", "without recycles", "true neighbours", "attention diffusion map"}
    assert not rows & set(evaluation.methods)
    assert "initial layout" in evaluation.methods and evaluation.focus is None
    assert not any(name.startswith(("attn", "logit", "gate")) for name in evaluation.measures)
    metrics = evaluate_slide(without_recycles, slides[2], tmp_path, baselines=False)
    assert "E_geo_hgate" in metrics and "E_geo_tedge" not in metrics
    page = (tmp_path / "report.html").read_text()
    assert "Recycle by recycle" not in page and 'id="attention"' not in page


def test_a_slide_of_the_training_set_is_recognised(predictor, slides):
    renamed = replace(slides[0], name="something else")
    assert score_slide(predictor, renamed, baselines=False).provenance.held_out is False


def test_slides_that_cannot_be_scored_are_refused(predictor, slides):
    with pytest.raises(UserError, match="no positions"):
        score_slide(predictor, replace(slides[2], pos=None))
    with pytest.raises(UserError, match="too few"):
        score_slide(predictor, slides[2].take(np.arange(2)))


def test_e_geo_is_zero_at_the_truth_and_not_elsewhere(slides):
    pos = slides[0].pos
    shuffled = pos[np.random.default_rng(0).permutation(len(pos))]
    values = e_geo_of_layouts({"model": shuffled, "true coordinates": pos * 3 + 7}, pos, seed=0)
    assert values["true coordinates"]["E_geo"] == pytest.approx(0, abs=1e-9)
    model = values["model"]
    assert model["E_geo"] > 0.5
    assert model["E_geo"] == pytest.approx(model["L_RW"] + 0.1 * model["L_stress"])


def test_recorded_attention_is_the_attention(predictor, slides):
    prediction = predictor.predict(slides[2])
    h, graph, model = torch.from_numpy(prediction.embedding), prediction.graph, predictor.model
    bias, _ = steps.gate_bias(predictor.gate, h, graph, predictor.config)
    records = list(recycle_records(model, h, graph, bias))
    _, weights = model(h, graph, edge_bias=bias, return_attention_weights=True)
    assert len(records) == 2
    for record, (_, attention) in zip(records, weights, strict=True):
        torch.testing.assert_close(record.attention, attention)


def test_spatial_gene_follows_the_tissue(slides):
    name, values = spatial_gene(slides[0], None)
    assert name in set(slides[0].genes) and values.shape == (140,)
    assert spatial_gene(slides[0], ["not there"]) is None


def test_expression_pca_is_that_of_the_slide_alone(slides):
    genes, _ = match_genes(slides)
    layout = expression_pca(slides[2], genes)
    x = Expression.from_slide(slides[2], genes).rows().astype(np.float64)
    values = np.linalg.svd(x, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(layout, axis=0), values[:2], rtol=1e-3)
