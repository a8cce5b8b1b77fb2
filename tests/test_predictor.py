"""Placing cells with a trained run: which steps follow each other, and what they are given."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_run import small_config

from ipar_sparse.errors import UserError
from ipar_sparse.estimators.relevant_components import RelevantComponents
from ipar_sparse.geometry.gauge import gauge_fix, leading_components, principal_plane
from ipar_sparse.graph import knn, pooled_candidates
from ipar_sparse.inference import steps
from ipar_sparse.inference.checkpoint import load_checkpoint
from ipar_sparse.inference.modules import build_gate_and_model
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.inference.run_folder import BEST
from ipar_sparse.layout.distance_correction import correct_distances
from ipar_sparse.layout.refinement import refine_layout

REFINE = {"steps": 20, "neighbors": 5, "anchor_weight": 3.0, "skip_if_overlap": 2.0}
PLAIN = {"rca_power": 0.0, "pc_power": 0.0, "distance_correction_steps": 0}


@pytest.fixture(scope="module")
def slide(small_slides):
    return small_slides[3]


@pytest.fixture
def predictor(small_run):
    return Predictor.load(small_run)


def with_settings(predictor, **sections):
    """The same run with other settings."""
    return replace(predictor, config=predictor.config.replace(**sections))


def recycled(prediction):
    return torch.from_numpy(prediction.trajectory[-1]).float()


def test_positions_are_not_looked_at(predictor, slide):
    blind = replace(slide, pos=None)
    first, second = (predictor.predict(s, noise_samples=2) for s in (slide, blind))
    assert np.array_equal(first.pos, second.pos)
    assert np.array_equal(first.uncertainty, second.uncertainty)
    assert first.uncertainty.shape == (140,) and (first.uncertainty > 0).all()


def test_a_prediction_is_in_the_unit_gauge_and_repeats(predictor, slide):
    found = predictor.predict(slide)
    assert np.square(found.pos).sum(1).mean() == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_allclose(found.pos.mean(0), 0, atol=1e-6)
    assert np.array_equal(predictor.predict(slide).pos, found.pos)
    assert len(found.trajectory) == predictor.config.model.recycles + 1


def test_without_an_atlas_typical_cells_are_as_uncertain_as_each_other(predictor, slide):
    found = predictor.predict(slide)
    assert found.predictive_variance is None
    typical = found.uncertainty[found.typicality.p_value > 0.5]
    assert typical.std() < 1e-4 and typical[0] == pytest.approx(np.sqrt(0.75), abs=1e-4)
    assert predictor.predict(slide, noise_samples=2).uncertainty.std() > 0.001


def test_a_run_of_other_widths_is_refused(small_run):
    _, model = build_gate_and_model(small_config("model.channels=24"), 16)
    with pytest.raises(UserError, match="does not fit the configuration"):
        load_checkpoint(small_run / BEST, {"model": model})


def test_genes_that_a_slide_lacks_are_told(predictor, slide, caplog):
    genes = predictor.meta["genes"]
    kept = np.array([gene not in genes[:3] for gene in slide.genes])
    fewer = replace(slide, expression=slide.expression[:, kept], genes=slide.genes[kept])
    with caplog.at_level("WARNING"):
        assert predictor.embed(fewer).shape == (140, 16)
    assert f"lacks 3 of the {len(genes)} genes of the run" in caplog.text


def test_on_a_slide_larger_than_a_miniset_candidates_reach_as_far_as_in_one(predictor, slide):
    """They are the nearest in a random sample; refinement keeps those nearest of all."""
    near = predictor.predict(slide)
    assert near.graph is near.candidates
    sampling = with_settings(predictor, graph={"candidate_pool": 50})
    far = sampling.predict(slide)
    h = torch.from_numpy(near.embedding)
    sampled = pooled_candidates(
        h,
        predictor.config.graph.k,
        50,
        metric=predictor.config.graph.metric,
        generator=torch.Generator().manual_seed(predictor.config.train.seed),
    )
    assert torch.equal(far.graph.index, sampled.index)
    assert torch.equal(far.candidates.index, near.candidates.index)
    for found in (near, far):  # both begin from the plane
        np.testing.assert_allclose(found.trajectory[0], gauge_fix(principal_plane(h)), atol=1e-5)

    def reach(graph):
        source, target = graph.edge_index
        return float((h[source] - h[target]).norm(dim=1).mean())

    assert reach(far.graph) > 1.1 * reach(near.graph)
    assert not np.allclose(far.pos, near.pos)
    whole = with_settings(sampling, train={"batch_kind": "slide"})
    np.testing.assert_array_equal(whole.predict(slide).pos, near.pos)


def test_distances_are_corrected_before_neighbours_are_drawn_together(predictor, slide):
    seed = predictor.config.train.seed
    plain = with_settings(predictor, refine=PLAIN | {"steps": 0}).predict(slide)
    np.testing.assert_allclose(plain.pos, plain.trajectory[-1], atol=1e-6)
    correcting = PLAIN | {"distance_correction_steps": 40}
    found = with_settings(predictor, refine=correcting | {"steps": 0}).predict(slide)
    h = torch.from_numpy(found.embedding)
    corrected = correct_distances(recycled(found), None, h, steps=40, seed=seed)
    np.testing.assert_allclose(found.pos, corrected.double(), atol=1e-4)
    assert not np.allclose(found.pos, plain.pos, atol=1e-3)
    both = with_settings(predictor, refine=correcting | REFINE).predict(slide)
    expected = refine_layout(corrected, found.candidates, **REFINE, seed=seed)
    np.testing.assert_allclose(both.pos, expected.double(), atol=1e-3)


def test_refinement_may_go_by_leading_components(predictor, slide):
    plain = with_settings(predictor, refine=PLAIN | REFINE).predict(slide)
    assert plain.refinement_graph is plain.candidates
    found = with_settings(predictor, refine=PLAIN | REFINE | {"pc_power": 1.0}).predict(slide)
    expected = knn(leading_components(torch.from_numpy(found.embedding)), 15)
    assert torch.equal(found.refinement_graph.index, expected.index)
    assert torch.equal(found.candidates.index, plain.candidates.index)
    seed = predictor.config.train.seed
    own = refine_layout(recycled(found), expected, **REFINE, seed=seed)
    np.testing.assert_allclose(found.pos, own.double(), atol=1e-4)
    assert not np.allclose(found.pos, plain.pos, atol=1e-2)


def test_refinement_goes_by_what_neighbours_of_the_training_slides_differ_in(
    predictor, small_slides, slide
):
    known = [(torch.from_numpy(predictor.embed(s)), s.pos) for s in small_slides[:2]]
    expected = RelevantComponents(16).fit(known)
    components = predictor.relevant_components
    torch.testing.assert_close(components.covariance, expected.covariance, rtol=1e-3, atol=1e-5)
    for power in (1.0, 0.5):
        asked = REFINE | {"rca_power": power, "pc_power": 0.0}
        found = with_settings(predictor, refine=asked).predict(slide)
        space = components(torch.from_numpy(found.embedding), power)
        assert torch.equal(found.refinement_graph.index, knn(space, 15).index)


def test_without_refinement_no_second_graph_is_sought(predictor, slide):
    asked = {"steps": 0, "rca_power": 1.0}
    found = with_settings(predictor, refine=asked).predict(slide)
    assert found.refinement_graph is found.candidates


def test_a_layout_that_needs_an_atlas_is_not_made_without_one():
    config = small_config("model.init=atlas")
    with pytest.raises(ValueError, match="needs the atlas of the run"):
        steps.initial_layout(torch.randn(5, 16), config)
    left_to_the_model = small_config("model.init=mlp")
    assert steps.initial_layout(torch.randn(5, 16), left_to_the_model) == (None, None)
