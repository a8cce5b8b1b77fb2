"""Rows that an evaluation scores beside the model: one for each part that the run has."""

import numpy as np
import pytest
import torch
from small_run import small_config

from ipar_sparse.evaluation.layouts import ablation_layouts
from ipar_sparse.evaluation.scoring import score_slide
from ipar_sparse.inference import steps
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.report import write_evaluation
from ipar_sparse.train.fit import fit


@pytest.fixture
def slide(small_slides):
    return small_slides[3]


def predictor_with(run, **values):
    predictor = Predictor.load(run)
    refine = {f"refine.{name}": value for name, value in values.items()}
    predictor.config = predictor.config.with_values(refine)
    return predictor


def test_each_ablation_lacks_one_part(small_run, slide):
    settings = {"steps": 5, "distance_correction_steps": 5, "skip_if_overlap": 2.0}
    predictor = predictor_with(small_run, **settings)
    config, prediction = predictor.config, predictor.predict(slide)
    h = torch.from_numpy(prediction.embedding)
    found = ablation_layouts(predictor, prediction, h, slide.pos)
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
    assert list(found) == [*expected, "true neighbours"]
    for name, layout in expected.items():
        np.testing.assert_array_equal(found[name], layout.double().numpy(), err_msg=name)
        assert not np.allclose(found[name], prediction.pos)


def test_a_step_that_is_off_has_no_row_but_baselines_are_given_it(small_run, slide):
    predictor = predictor_with(small_run, steps=0, distance_correction_steps=0)
    methods = score_slide(predictor, slide).methods
    assert not {"without refinement", "without distance correction"} & set(methods)
    for name in ("PCA", "MLP", "atlas"):
        assert methods[f"{name} + refinement"] != methods[name]


def test_a_run_without_recycles_has_no_attention(small_slides, slide, tmp_path):
    config = small_config("model.recycling=false", "model.init=atlas")
    fit(small_slides[:2], [], config, tmp_path / "run")
    predictor = Predictor.load(tmp_path / "run")
    evaluation = score_slide(predictor, slide)
    rows = {"without gate", "without recycles", "true neighbours", "attention diffusion map"}
    assert not rows & set(evaluation.methods)
    assert "initial layout" in evaluation.methods and evaluation.focus is None
    assert not any(name.startswith(("attn", "logit", "gate")) for name in evaluation.measures)
    evaluation = score_slide(predictor, slide, baselines=False)
    metrics = write_evaluation(predictor, slide, evaluation, tmp_path / "out")
    assert "E_geo_hgate" in metrics and "E_geo_tedge" not in metrics
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Recycle by recycle" not in page and 'id="attention"' not in page
