"""Errors of a gain on one slide, over blocks of the tissue and over seeds."""

import math

import numpy as np
import pytest

from ipar_sparse.evaluation.block_bootstrap import block_bootstrap, block_of
from ipar_sparse.metrics.layout import distance_spearman


def near(true, noise, rng):
    return true + rng.normal(0, noise, true.shape)


def test_blocks_cut_the_bounding_box_into_equal_parts():
    pos = np.array([[0.0, 0.0], [9.9, 0.0], [10.1, 0.0], [100.0, 50.0], [0.0, 4.9], [0.0, 5.1]])
    assert block_of(pos).tolist() == [0, 0, 10, 99, 0, 1]


def test_a_method_gains_nothing_over_itself():
    rng = np.random.default_rng(0)
    true = rng.random((300, 2))
    own = [near(true, 0.1, rng) for _ in range(2)]
    (gain,) = block_bootstrap(own, {"same": own}, true, repeats=5, num_pairs=500).values()
    assert (gain.mean, gain.se, gain.seeds) == (0.0, 0.0, 2)


def test_with_one_block_the_error_is_that_of_seeds_alone():
    rng = np.random.default_rng(1)
    true = rng.random((400, 2))
    own, other = [near(true, s, rng) for s in (0.05, 0.4)], near(true, 0.2, rng)
    found = block_bootstrap(own, {"x": [other]}, true, blocks=1, repeats=200, num_pairs=10_000)
    one, two = (distance_spearman(pos, true) - distance_spearman(other, true) for pos in own)
    assert found["x"].mean == pytest.approx((one + two) / 2)
    # the mean of two draws from two values
    assert found["x"].se == pytest.approx(abs(one - two) / 2 / math.sqrt(2), rel=0.15)


def errors_of_patches(seed, blocks):
    """Gain and its error, by so many blocks a side, of layouts that go wrong region by region."""
    rng = np.random.default_rng(seed)
    true = rng.random((400, 2))
    patch = block_of(true, 5)
    own, other = (true + rng.normal(0, 0.2, (25, 2))[patch] for _ in range(2))
    draws = {"blocks": blocks, "repeats": 30, "num_pairs": 2000}
    found = block_bootstrap([own], {"x": [other]}, true, **draws)["x"]
    return found.mean, found.se


def test_the_error_of_blocks_is_the_deviation_between_tissues():
    gains, errors = zip(*(errors_of_patches(seed, 5) for seed in range(40)), strict=True)
    assert np.mean(errors) == pytest.approx(np.std(gains, ddof=1), rel=0.35)
    cells_alone = [errors_of_patches(seed, 200)[1] for seed in range(10)]
    assert np.mean(cells_alone) < 0.6 * np.mean(errors)  # what cells by themselves would claim
