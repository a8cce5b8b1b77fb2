"""The evaluation of a slide: the model, its ablations and baselines, its attention and errors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_run import small_config

from ipar_sparse.config import load_config
from ipar_sparse.data.expression import Expression, match_genes
from ipar_sparse.errors import UserError
from ipar_sparse.evaluation.attention import recycle_records
from ipar_sparse.evaluation.layouts import expression_pca
from ipar_sparse.evaluation.results import NO_CORRECTION, NO_GATE, NO_REFINEMENT, ORACLE
from ipar_sparse.evaluation.scoring import e_geo_of_layouts, score_slide
from ipar_sparse.geometry.alignment import align
from ipar_sparse.graph import knn_candidates
from ipar_sparse.inference import steps
from ipar_sparse.inference.modules import build_gate_and_model
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.layout.refinement import refine_layout
from ipar_sparse.metrics.diagnostics import collapse_diagnostics, diagnose
from ipar_sparse.metrics.layout import distance_metrics, metric_info
from ipar_sparse.report.slide import write_evaluation
from ipar_sparse.train.fit import fit

REFINE = {"steps": 20, "neighbors": 5, "anchor_weight": 3.0, "skip_if_overlap": 2.0}
BY_CANDIDATES = {"rca_power": 0.0, "pc_power": 0.0}


@pytest.fixture(scope="module")
def slide(small_slides):
    return small_slides[3]


@pytest.fixture
def predictor(small_run):
    return Predictor.load(small_run)


def with_settings(predictor, **sections):
    """The same run with other settings."""
    return replace(predictor, config=predictor.config.replace(**sections))


def test_an_evaluation_writes_metrics_and_a_report(predictor, slide, tmp_path):
    found = score_slide(predictor, slide, noise_samples=2)
    metrics = write_evaluation(predictor, slide, found, tmp_path)
    saved = json.loads((tmp_path / "metrics.json").read_text())
    names = ("distance_spearman", "neighbor_hit@15", "E_geo_hgate", "E_geo_tedge", "L_RW_hgate")
    for name in names:
        assert saved[name] == pytest.approx(metrics[name])
    assert saved["E_geo_floor"] == pytest.approx(0.0, abs=1e-9)
    assert saved["true coordinates/distance_spearman"] == pytest.approx(1.0)
    for method in ("ridge", NO_GATE, NO_REFINEMENT, ORACLE, "PCA + refinement"):
        assert f"{method}/distance_spearman" in saved
    page = (tmp_path / "report.html").read_text()
    assert slide.name in page and "http://" not in page.partition("<script")[0]
    told = [name for name in saved if "/" not in name and not name.endswith("_se")]
    assert not [name for name in told if not metric_info(name).explanation]


def test_the_map_that_is_handed_out_is_measured_and_not_that_of_the_last_recycle(predictor, slide):
    found = score_slide(with_settings(predictor, refine=REFINE), slide, baselines=False)
    shape = collapse_diagnostics(found.pred)
    assert found.measures["lambda_ratio"] == found.methods["model"]["lambda_ratio"]
    assert found.measures["lambda_ratio"] == shape["lambda_ratio"]
    assert shape["lambda_ratio"] != collapse_diagnostics(found.trajectory[-1])["lambda_ratio"]


def test_a_slide_of_the_training_set_is_recognised_under_any_name(
    predictor, small_slides, tmp_path
):
    renamed = replace(small_slides[0], name="something else")
    found = score_slide(predictor, renamed, baselines=False)
    write_evaluation(predictor, renamed, found, tmp_path)
    assert "took part in training" in (tmp_path / "report.html").read_text()
    assert score_slide(predictor, small_slides[3], baselines=False).provenance.held_out


def test_a_run_without_validation_can_be_evaluated(small_slides, tmp_path):
    fit(small_slides[:2], [], small_config("train.epochs=1"), tmp_path / "run")
    predictor, out = Predictor.load(tmp_path / "run"), tmp_path / "report"
    found = score_slide(predictor, small_slides[3], baselines=False)
    write_evaluation(predictor, small_slides[3], found, out)
    assert (out / "report.html").is_file()


def test_e_geo_is_zero_at_the_truth_and_not_elsewhere(slide):
    pos = slide.pos
    shuffled = pos[np.random.default_rng(0).permutation(len(pos))]
    values = e_geo_of_layouts({"model": shuffled, "true coordinates": pos * 3 + 7}, pos, seed=0)
    assert values["true coordinates"]["E_geo"] == pytest.approx(0, abs=1e-9)
    model = values["model"]
    assert model["E_geo"] > 0.5
    assert model["E_geo"] == pytest.approx(model["L_RW"] + 0.1 * model["L_stress"])


def test_a_row_without_a_step_is_the_model_without_it(predictor, slide):
    both = REFINE | BY_CANDIDATES | {"distance_correction_steps": 40}
    predictor = with_settings(predictor, refine=both)
    prediction = predictor.predict(slide)
    scored = score_slide(predictor, slide, baselines=False)
    assert {NO_CORRECTION, NO_REFINEMENT} <= scored.methods.keys()
    recycled = torch.from_numpy(prediction.trajectory[-1]).float()
    seed = predictor.config.train.seed
    refined = refine_layout(recycled, prediction.candidates, **REFINE, seed=seed)
    expected = distance_metrics(refined, slide.pos)["distance_spearman"]
    found = scored.methods[NO_CORRECTION]["distance_spearman"]
    assert found == pytest.approx(expected, abs=0.02)
    assert not any("equals the model" in note for note in scored.provenance.notes)


def test_a_step_that_left_the_layout_as_it_was_is_told(predictor, slide):
    idle = REFINE | {"skip_if_overlap": 0.0}  # every layout overlaps enough
    scored = score_slide(with_settings(predictor, refine=idle), slide, baselines=False)
    (note,) = (note for note in scored.provenance.notes if "equals the model" in note)
    assert note.startswith(f'"{NO_REFINEMENT}"')


def test_baselines_of_an_atlas_run_hold_the_atlas_itself(small_slides, tmp_path):
    fit(small_slides[:2], [], small_config("model.init=atlas", "train.epochs=1"), tmp_path)
    methods = score_slide(Predictor.load(tmp_path), small_slides[2], baselines=True).methods
    assert {"initial layout", "atlas"} <= methods.keys()
    expected = methods["atlas"]["distance_spearman"]  # of the same training slides
    assert methods["initial layout"]["distance_spearman"] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("preset", ["v1", "ipa-r", "v2-3r-geo-last", "v1-head-gate", "no-gate"])
def test_recorded_attention_is_the_attention_of_the_model(preset, slide):
    config = load_config(preset=preset)
    gate, model = build_gate_and_model(config, 128)
    model.eval()
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(slide.num_cells, 128, generator=generator)
    graph = knn_candidates(h, 12)
    with torch.no_grad():
        for weight in model.parameters():  # as little as a few steps of training
            weight += 1e-3 * torch.randn(weight.shape, generator=generator)
        bias, logits = steps.gate_bias(gate, h, graph, config)
        records = list(recycle_records(model, h, graph, bias))
        _, weights = model(h, graph, edge_bias=bias, return_attention_weights=True)
    assert len(records) == config.model.recycles
    for record, (_, attention) in zip(records, weights, strict=True):
        torch.testing.assert_close(record.attention, attention)
    wanted = {"qk"} | ({"gate"} if config.model.gated else set()) | set(config.model.terms)
    assert set(records[-1].terms) == wanted
    if preset == "ipa-r":
        measures = diagnose(graph, records, pos=slide.pos, gate_logits=logits)
        assert "point_ipa" not in records[0].terms and "pair" in records[0].terms
        assert measures["eta/r2"] == pytest.approx(0.2, abs=0.01)
        assert measures["beta/r0"] == pytest.approx(0.5, abs=0.01)
        assert measures["tau/r1"] == pytest.approx(32**0.5, abs=0.05)
        assert measures["sigma/r2/h3"] == pytest.approx(1.0, abs=0.01)
        assert 0 < measures["offset_norm/r2/h0"] < 0.1
        assert "term_spearman:point_ipa/r2/h0" in measures


def test_attention_is_recorded_from_the_layout_that_the_recycles_begin_from(predictor, slide):
    prediction = predictor.predict(slide)
    h = torch.from_numpy(prediction.embedding)
    initial = torch.as_tensor(prediction.trajectory[0]).to(h)
    bias, _ = steps.gate_bias(predictor.gate, h, prediction.graph, predictor.config)
    records = list(recycle_records(predictor.model, h, prediction.graph, bias, initial))
    _, weights = predictor.model(
        h, prediction.graph, edge_bias=bias, initial=initial, return_attention_weights=True
    )
    for record, (_, attention) in zip(records, weights, strict=True):
        torch.testing.assert_close(record.attention, attention)


def test_attention_is_judged_on_the_nearest_candidates(predictor, slide):
    """Among those of a random sample there are few neighbours to find."""
    near = score_slide(predictor, slide, baselines=False)
    sampling = with_settings(predictor, graph={"candidate_pool": 50})
    found = score_slide(sampling, slide, baselines=False)
    name = next(name for name in near.measures if name.startswith("attn_recall@30/r0"))
    assert found.measures[name] == pytest.approx(near.measures[name], abs=1e-4)
    graph = sampling.predict(slide).graph  # but what is shown is what the model looked at
    assert found.focus
    for focus in found.focus:
        assert set(focus.neighbors) <= set(graph.index[focus.cell].tolist())


def test_the_uncertainty_is_held_against_the_error(predictor, slide):
    found = score_slide(predictor, slide, noise_samples=4, baselines=False)
    error = np.linalg.norm(align(found.pred, slide.pos)[0] - slide.pos, axis=1)
    ranks = [np.argsort(np.argsort(x)) for x in (found.uncertainty, error)]
    expected = np.corrcoef(*ranks)[0, 1]
    assert found.measures["uncertainty_error_spearman"] == pytest.approx(expected, abs=1e-6)


def test_a_slide_that_cannot_be_scored_is_refused(predictor, slide):
    with pytest.raises(UserError, match="no positions to score against"):
        score_slide(predictor, replace(slide, pos=None))
    with pytest.raises(UserError, match="2 cells are too few"):
        score_slide(predictor, slide.take(np.arange(2)))


def test_pca_of_expression_is_that_of_the_slide_alone(small_slides, slide):
    genes, _ = match_genes(small_slides)
    layout = expression_pca(slide, genes)
    x = Expression.from_slide(slide, genes).rows().astype(np.float64)
    values = np.linalg.svd(x, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(layout, axis=0), values[:2], rtol=1e-3)


def test_classes_are_those_of_an_obs_column(predictor, small_slides):
    slide = small_slides[3]
    with pytest.raises(UserError, match="obs has no column 'lyer' of classes; did you mean"):
        score_slide(predictor, slide, class_key="lyer")
