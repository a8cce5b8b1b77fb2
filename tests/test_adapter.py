"""The adapter: where cells of another assay are placed, and when."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse
from small_run import small_config

from ipar_sparse.config.prediction import AdapterConfig
from ipar_sparse.data.assay import dissociate
from ipar_sparse.data.input_profile import informative
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.writers import to_anndata
from ipar_sparse.estimators.adapter import (
    Adapter,
    Reference,
    mean_and_variance,
    mixture,
    spatial_neighbors,
)
from ipar_sparse.evaluation.layouts import ablation_layouts
from ipar_sparse.evaluation.results import NO_GATE, NO_RECYCLES, NO_REFINEMENT, ORACLE
from ipar_sparse.graph import knn
from ipar_sparse.inference.adapting import shares_of, why_adapted
from ipar_sparse.inference.mapping import map_to_spots
from ipar_sparse.inference.placing import place_cells
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.inference.reference import find_reference
from ipar_sparse.metrics.layout import distance_spearman, evaluate_layout
from ipar_sparse.train.fit import fit


def corners(cells_per_spot, rng, genes=40, spots=240):
    """Spots in four corners of a square; each corner has ten genes of its own, others are noise."""
    corner = rng.integers(0, 4, spots)
    pos = np.array([[0, 0], [0, 9], [9, 0], [9, 9]])[corner] + rng.normal(0, 0.5, (spots, 2))
    rate = np.full((spots, genes), 0.3)
    for own in range(4):
        rate[corner == own, 10 * own : 10 * own + 10] = 1.5
    return corner, pos, sparse.csr_matrix(rng.poisson(cells_per_spot * rate).astype(np.float32))


@pytest.fixture(scope="module")
def spots():
    return corners(12, np.random.default_rng(0))


@pytest.fixture(scope="module")
def adapter(spots):
    _, pos, counts = spots
    return Adapter(40).fit([Reference(counts, pos, pos)])


def placed(adapter, counts, measured=None):
    measured = np.ones(40, dtype=bool) if measured is None else measured
    return mean_and_variance(adapter.posterior(counts, measured), adapter.places)


def test_single_cells_land_in_the_corner_whose_genes_they_express(adapter):
    corner, pos, counts = corners(1, np.random.default_rng(1))
    mean, variance = placed(adapter, counts)
    centres = torch.tensor([[0.0, 0.0], [0.0, 9.0], [9.0, 0.0], [9.0, 9.0]])
    nearest = torch.cdist(mean, centres).argmin(1).numpy()
    assert (nearest == corner).mean() > 0.95
    # the variance is that of the posterior: it says how far cells lie from their mean places
    square = ((mean.numpy() - pos) ** 2).sum(1)
    assert 0.4 < square.mean() / variance.mean() < 2.5


def test_depth_and_the_factor_of_an_assay_on_each_gene_change_little(adapter):
    rng = np.random.default_rng(2)
    _, _, counts = corners(3, rng)
    mean, _ = placed(adapter, counts)
    factor = sparse.diags(np.exp(rng.normal(0, 0.7, 40)))
    other, _ = placed(adapter, (7 * counts @ factor).tocsr())
    assert evaluate_layout(other.numpy(), mean.numpy())["distance_spearman"] > 0.8
    same, _ = placed(adapter, (sparse.diags(rng.uniform(0.1, 9, 240)) @ counts).tocsr())
    torch.testing.assert_close(same, mean, atol=2e-3, rtol=0)


def test_genes_that_the_cells_lack_are_left_out(adapter, spots):
    corner, _, counts = corners(2, np.random.default_rng(3))
    measured = np.arange(40) % 2 == 0
    mean, _ = placed(adapter, counts, measured)
    # what stands in the columns of genes that were not measured means nothing
    junk = counts.toarray()
    junk[:, ~measured] = 99
    other, _ = placed(adapter, sparse.csr_matrix(junk), measured)
    torch.testing.assert_close(other, mean)
    # and what remains is what an adapter of the measured genes alone finds
    half = Adapter(20).fit([Reference(spots[2][:, ::2], spots[1], spots[1])])
    alone, _ = mean_and_variance(half.posterior(counts[:, ::2], np.ones(20, bool)), half.places)
    assert evaluate_layout(alone.numpy(), mean.numpy())["distance_spearman"] > 0.98


def test_rows_are_probabilities_and_slides_count_alike(spots):
    _, pos, counts = spots
    both = Adapter(40).fit(
        [Reference(counts, pos, pos), Reference(counts[:40], pos[:40], pos[:40] + 100)]
    )
    rows = torch.cat(list(both.posterior(counts[:50], np.ones(40, bool))))
    torch.testing.assert_close(rows.sum(1), torch.ones(50))
    # the second slide has a sixth of the cells, and about half of the weight
    share = rows[:, both.origin == 1].sum(1).mean()
    assert both.cells == 280 and 0.35 < share < 0.65


def test_some_cells_and_their_neighbours_give_nearly_the_weights_of_all():
    _, pos, counts = corners(12, np.random.default_rng(3), spots=4000)
    near = spatial_neighbors(pos)
    all_cells = Adapter(40).fit([Reference(counts, pos, pos)])
    given = Adapter(40).fit([Reference(counts, pos, pos, near)])
    assert torch.equal(given.weight, all_cells.weight)
    assert torch.equal(given.shares, all_cells.shares)

    rows = np.concatenate([np.arange(1500), np.setdiff1d(near[:1500], np.arange(1500))])
    number = np.zeros(len(pos), dtype=np.int64)
    number[rows] = np.arange(len(rows))
    some = Adapter(40).fit([Reference(counts[rows], pos[rows], pos[rows], number[near[:1500]])])
    assert (some.weight / all_cells.weight - 1).abs().max() < 0.15
    assert (some.detected - all_cells.detected).abs().max() < 0.05
    assert set(map(tuple, some.places.tolist())) <= set(
        map(tuple, pos[:1500].astype("f4").tolist())
    )


def test_a_mixture_spreads_as_far_as_its_parts_disagree():
    zero, one = torch.zeros(3, 2), torch.tensor([[2.0, 0.0]]).expand(3, 2)
    mean, variance = mixture([(zero, torch.full((3,), 0.5)), (one, torch.full((3,), 1.5))])
    torch.testing.assert_close(mean, one / 2)
    torch.testing.assert_close(variance, torch.full((3,), 1.0 + 1.0))


def as_spots(slide, cells=8):
    """A slide of spots: each cell with the cells beside it, all counts together."""
    near = knn(torch.from_numpy(slide.pos), cells - 1).index.numpy()
    rows = np.repeat(np.arange(slide.num_cells), cells - 1)
    beside = sparse.csr_matrix((np.ones(near.size, np.float32), (rows, near.ravel())))
    return slide.with_genes((slide.expression + beside @ slide.expression).tocsr(), slide.genes)


@pytest.fixture(scope="module")
def cells():
    """Two slides of spots, a third, and single cells of it by another assay."""
    slides = simulate("cortex", slides=3, spots=400, genes=200, seed=3)
    return [as_spots(s) for s in slides], dissociate(slides[2], depth=0.3, panel=150, seed=1)


@pytest.fixture(scope="module")
def run(cells, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapter") / "run"
    settings = ["model.init=atlas", "encoder.steps=60", "data.max_genes=200", "refine.steps=0"]
    fit(cells[0][:2], [], small_config(*settings), out)
    return Predictor.load(out)


def truth(cells):
    return np.column_stack([cells.obs["tissue_x"], cells.obs["tissue_y"]])


def test_cells_of_another_assay_are_placed_with_the_adapter_and_slides_of_the_run_are_not(
    run, cells
):
    slides, other = cells
    assert run.predict(slides[2]).adapted is None
    found, without = run.predict(other), run.predict(other, adapt=False)
    assert "times as many genes as a training cell" in found.adapted
    assert without.adapted is None and without.places is None
    true = truth(informative(run.conform(other)))
    scores = [evaluate_layout(x.pos, true)["distance_spearman"] for x in (found, without)]
    assert scores[0] > scores[1] + 0.03 > 0.1
    # the frame is that of the training slides, where their positions are
    mean, variance = run.frame_places(found)
    assert mean.shape == (len(true), 2) and (variance > 0).all()
    assert evaluate_layout(mean, true)["distance_spearman"] > 0.3
    # one place of each cell is its mean place, many are where its distribution lies
    grid, blocks = run.distribution(found)
    weight = torch.cat(list(blocks))
    torch.testing.assert_close(weight.sum(1), torch.ones(len(true)))
    np.testing.assert_allclose((weight @ grid).numpy(), mean, atol=0.05)
    places, share = run.top_places(found, 2)
    assert places.shape == (len(true), 2, 2) and (share[:, 0] >= share[:, 1]).all()


def test_rows_without_a_step_keep_the_other_settings_of_adapted_cells(run, cells):
    refine = {"steps": 5, "neighbors": 10, "anchor_weight": 0.5}
    refined = replace(run, config=run.config.replace(refine=refine))
    found = refined.predict(cells[1])
    assert found.settings.refine.anchor_weight == run.config.adapter.anchor_weight
    assert refined.predict(cells[1], adapt=False).settings == refined.config
    pos, h = truth(informative(run.conform(cells[1]))), torch.from_numpy(found.embedding)
    rows = set(ablation_layouts(refined, found, h, pos))
    assert NO_REFINEMENT in rows and not rows & {NO_GATE, NO_RECYCLES, ORACLE}


def test_nothing_but_a_switch_makes_it_place_a_slide_of_the_run(run, cells):
    slide = cells[0][2]
    before = run.predict(slide)
    assert run.predict(slide, adapt=True).adapted == "adapter.mode=always"
    np.testing.assert_array_equal(run.predict(slide).pos, before.pos)
    added = place_cells(run, [slide, cells[1]])
    assert list(added.uns["adapted"]) == [cells[1].name]


def test_it_is_used_where_the_run_was_trained_for_the_cells_or_detection_differs(run, cells):
    slides, other = cells
    from ipar_sparse.data.copies import record_of

    def why(slide, recorded=(), **settings):
        slide = run.conform(slide)
        shares = shares_of(slide, run.meta["genes"], run.profile)
        return why_adapted(run.adapter, slide, shares, recorded, AdapterConfig(**settings))

    assert why(slides[2]) is None
    assert "trained for these cells" in why(slides[2], [record_of(slides[2])])
    assert why(slides[2], [record_of(other)]) is None
    assert "genes as a training cell" in why(other)
    assert why(other, detection_ratio=50) is None
    assert why(other, [record_of(other)], mode="never") is None
    assert why(slides[2], mode="always") == "adapter.mode=always"


def test_a_mapping_onto_spots_agrees_with_the_places_of_adapted_cells(run, cells):
    reference = find_reference(run.run, to_anndata(cells[0][0]))
    slides = [run.conform(cells[1])]
    near = {}
    for adapt in (True, False):
        added = place_cells(run, slides, reference=reference, keep_foreign=True, adapt=adapt)
        mapping = map_to_spots(run, slides, added, reference)
        filled = np.isfinite(added.obsm["X_ipar_reference"]).all(1)
        np.testing.assert_allclose(mapping.X.sum(1).A1[filled], 1, atol=1e-5)
        mean = (mapping.X @ mapping.varm["spatial"])[filled]
        near[adapt] = distance_spearman(mean, added.obsm["X_ipar_reference"][filled])
        stated = added.obs["ipar_uncertainty_reference"] / reference.radius
        at_least = added.obs["ipar_uncertainty"] * (1 if adapt else 0)
        assert (stated >= at_least - 1e-9)[filled].all()
    # the largest 100 of 400 spots are kept, so that means are not quite the same
    assert min(near.values()) > 0.9
