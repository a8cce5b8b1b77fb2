"""Cells and slides that are unlike the training cells are told from those that are like them."""

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.stats import kstest

from ipar_sparse.config import TypicalityConfig
from ipar_sparse.data.expression import normalized_expression
from ipar_sparse.data.simulation import simulate
from ipar_sparse.estimators import Typicality
from ipar_sparse.train.typicality import donor_or_quarter

GENES = 120


def features(slide):
    return normalized_expression(slide, slide.genes)


@pytest.fixture(scope="module")
def slides():
    return simulate("cortex", slides=4, spots=260, genes=GENES, seed=1)


@pytest.fixture(scope="module")
def fitted(slides):
    folds = [np.full(slide.num_cells, number) for number, slide in enumerate(slides[:3])]
    found = Typicality(GENES, GENES).fit([features(slide) for slide in slides[:3]], folds, 600)
    return found


@pytest.fixture(scope="module")
def held_out(fitted, slides):
    return fitted.assess(features(slides[3]))


def test_on_a_slide_like_the_training_slides_p_values_are_uniform(held_out):
    assert kstest(held_out.p_value, "uniform").statistic < 0.15
    assert held_out.share_unlike < 0.1
    assert held_out.mean_agreement > 0.9 and held_out.coexpression > 0.7
    assert held_out.offset < 2


def test_few_cells_of_a_slide_are_judged_as_few_training_cells(fitted, slides):
    values = features(slides[3])
    for start in range(0, 75, 15):
        assert fitted.assess(values[start : start + 15]).coexpression > 0.45
    rng = np.random.default_rng(0)
    shuffled = values[:60][:, rng.permutation(GENES)]
    assert fitted.assess(shuffled).coexpression < 0.3


def test_cells_of_another_tissue_among_others_have_small_p_values(fitted, slides):
    (other,) = simulate("lobules", slides=1, spots=60, genes=GENES, seed=2)
    foreign = features(other)[:26]
    mixed = sparse.vstack([features(slides[3]), foreign]).tocsr()
    p_value = fitted.assess(mixed).p_value
    assert (p_value[-26:] <= 0.05).mean() > 0.8
    assert (p_value[:-26] <= 0.05).mean() < 0.1


def spoil(kind, slide, rng):
    values = features(slide).toarray()
    if kind == "another tissue":
        return features(simulate("lobules", slides=1, spots=200, genes=GENES, seed=2)[0])
    if kind == "shuffled names":
        return values[:, rng.permutation(GENES)]
    if kind == "noise with the totals of cells":
        return rng.permuted(values, axis=1)
    return rng.permuted(values, axis=0)


@pytest.mark.parametrize(
    "kind",
    [
        "another tissue",
        "shuffled names",
        "noise with the totals of cells",
        "noise with the means of genes",
    ],
)
def test_another_tissue_and_noise_disagree_in_means_or_coexpression(fitted, slides, kind):
    found = fitted.assess(spoil(kind, slides[3], np.random.default_rng(0)))
    limits = TypicalityConfig()
    assert (
        found.mean_agreement < limits.unlike_means
        or found.coexpression < limits.unlike_coexpression
    )


def test_genes_that_a_slide_lacks_take_no_part(fitted, slides, held_out):
    present = np.arange(GENES) % 3 > 0
    values = features(slides[3]).toarray()
    values[:, ~present] = 7.0
    found = fitted.assess(values, present)
    assert found.shared == 80 and found.mean_agreement > 0.9
    assert kstest(found.p_value, "uniform").statistic < 0.15
    none = fitted.assess(values, np.zeros(GENES, dtype=bool))
    assert none.shared == 0 and (none.p_value < 0.01).all() and none.mean_agreement == 0


def test_cells_left_out_get_none_and_change_nothing(fitted, slides, held_out):
    whole = features(slides[3])
    empty = sparse.csr_matrix((5, GENES), dtype=np.float32)
    left_out = np.r_[np.zeros(whole.shape[0], bool), np.ones(5, bool)]
    found = fitted.assess(sparse.vstack([whole, empty]).tocsr(), left_out=left_out)
    assert np.isnan(found.p_value[-5:]).all()
    np.testing.assert_array_equal(found.p_value[:-5], held_out.p_value)


def test_dense_and_sparse_features_and_repeated_calls_agree(fitted, slides, held_out):
    dense = fitted.assess(features(slides[3]).toarray())
    np.testing.assert_array_equal(dense.p_value, held_out.p_value)
    torch.manual_seed(123)
    np.testing.assert_array_equal(fitted.assess(features(slides[3])).p_value, dense.p_value)


def test_a_loaded_state_gives_the_same(fitted, slides, held_out):
    copy = Typicality(**fitted.sizes)
    copy.load_state_dict(fitted.state_dict())
    np.testing.assert_array_equal(copy.assess(features(slides[3])).p_value, held_out.p_value)


def test_scores_agree_with_the_plain_definition():
    """Every cell of a slide stands for it, and all components are kept."""
    rng = np.random.default_rng(0)
    width, count, k, contrast = 5, 40, 4, 2.0
    known = [rng.normal(size=(count, width)).astype(np.float32) for _ in range(2)]
    new = rng.normal(size=(count, width)).astype(np.float32)
    new[:3] += 4
    estimator = Typicality(width, width, components=width, neighbors=k, contrast=contrast).double()
    folds = [np.zeros(count, int), np.ones(count, int)]
    estimator.fit(known, folds, 2 * count)
    found = estimator.assess(new).p_value

    def scored(slide, others):
        sd = others.std(0)
        weight = np.maximum(sd, 0.1 * np.sqrt((sd**2).mean())) ** -0.5
        slide, others = slide * weight, others * weight
        far = np.linalg.norm(slide[:, None] - others[None], axis=2)
        own = np.linalg.norm(slide[:, None] - slide[None], axis=2)
        np.fill_diagonal(own, np.inf)
        near = np.argsort(own, axis=1)[:, :k]
        log_far = np.log(np.sort(far, axis=1)[:, :k].mean(1))
        log_own = np.log(np.take_along_axis(own, near, 1).mean(1))
        raw = log_far + contrast * (log_far - log_own)
        return 0.5 * raw + 0.5 * raw[near].mean(1)

    centred = [x.astype(np.float64) - x.astype(np.float64).mean(0) for x in known]
    slide = new - new.astype(np.float64).mean(0)
    expected = []
    for fold, others in ((0, centred[1]), (1, centred[0])):
        calibration, scores = scored(centred[fold], others), scored(slide, others)

        low, middle = np.quantile(calibration, [0.16, 0.5])
        own_low, own_middle = np.quantile(scores, [0.16, 0.5])
        spread = middle - low
        ratio = np.clip(spread / (own_middle - own_low), 0.5, 2)
        excess = max(own_middle - middle - 3 * spread, 0)
        scores = middle + excess + ratio * (scores - own_middle)
        higher = (calibration[None] >= scores[:, None]).sum(1)
        expected.append((1 + higher) / (1 + count))
    # centring in float32 is all that differs
    np.testing.assert_allclose(found, np.mean(expected, axis=0), atol=1.5 / count)
    assert np.mean(found == pytest.approx(np.mean(expected, axis=0))) > 0.9
    assert found[:3].max() < 0.1


def test_donors_are_left_out_or_quarters_of_the_one_donor(slides):
    donors = {slide.name: "ab"[number % 2] for number, slide in enumerate(slides)}
    found = donor_or_quarter(slides, donors)
    assert [np.unique(fold).tolist() for fold in found] == [[0], [1], [0], [1]]
    (quarters,) = donor_or_quarter(slides[:1], None)
    sizes = np.bincount(quarters)
    assert len(sizes) == 4 and sizes.min() > 20
    right = slides[0].pos[:, 0] >= np.median(slides[0].pos[:, 0])
    assert len(np.unique(quarters[right])) == 2
    one = Typicality(GENES, GENES).fit([features(slides[0])], [quarters], 260)
    found = one.assess(features(slides[3]))
    # quarters differ more than slides do, which makes p-values larger, never smaller
    assert found.share_unlike < 0.05 and found.mean_agreement > 0.9


def test_an_embedding_far_off_is_told_by_its_offset():
    rng = np.random.default_rng(0)
    known = [rng.normal(size=(200, 8)) * np.arange(1, 9) + rng.normal(size=8) for _ in range(3)]
    folds = [np.full(200, number) for number in range(3)]
    fitted = Typicality(8, 8).fit(known, folds, 600)
    like = rng.normal(size=(200, 8)) * np.arange(1, 9) + rng.normal(size=8)
    assert fitted.assess(like).offset < TypicalityConfig().part_offset
    unlike = 0.3 * rng.normal(size=(200, 8)) * np.arange(1, 9) + 6
    assert fitted.assess(unlike).offset > TypicalityConfig().unlike_offset
