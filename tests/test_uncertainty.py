"""Uncertainties compared with errors of a known distribution."""

import numpy as np
import pytest
import torch
from scipy.stats import false_discovery_control

from ipar_sparse.layout.uncertainty import (
    ErrorModel,
    calibration_metrics,
    disc_radius,
    false_discovery_rate,
    fit_error_model,
    predict_rmse,
    square_errors,
    widen,
)


def drawn(n=4000, a=0.1, b=2.0, seed=0):
    """Square errors in the plane whose means are a + b v."""
    rng = np.random.default_rng(seed)
    variance = rng.gamma(2.0, 0.2, n)
    return (a + b * variance) * rng.exponential(size=n), variance


def test_square_errors_are_in_radii_whatever_the_units():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(300, 2)) + 7
    off = true + 0.1 * rng.normal(size=true.shape)
    found = square_errors(off, true)
    moved = off @ [[0.0, -3.0], [-3.0, 0.0]] + 40
    np.testing.assert_allclose(square_errors(moved, 250 * true), found, rtol=1e-8)
    assert found.mean() == pytest.approx(0.02 / 2, rel=0.15)
    assert (square_errors(true, true) < 1e-20).all()


def test_the_error_model_is_found():
    found = fit_error_model([[drawn(seed=0), drawn(seed=1)], [drawn(seed=2)]])
    assert found.slope == pytest.approx(2.0, abs=0.12)
    # what does not follow the variance of a cell follows that of its slide
    assert found.intercept == 0 and found.slide_slope * 0.4 == pytest.approx(0.1, abs=0.05)
    error, variance = drawn()
    assert fit_error_model([[(error, None)]]) == pytest.approx((error.mean(), 0.0, 0.0))
    # errors that fall with the variance: the slope is 0 then
    falling = fit_error_model([[(error, 2.0 - variance)]])
    assert falling.slope == 0 and falling.slide_slope > 0
    np.testing.assert_allclose(
        falling.square(2.0 - variance, len(variance)).mean(), error.mean(), rtol=1e-6
    )
    assert fit_error_model([[(error, torch.from_numpy(variance))]]).slope > 0


def test_donors_have_equal_weight_however_many_cells_and_slides_they_have():
    few, many = np.full(10, 1.0), np.full(1000, 3.0)
    assert fit_error_model([[(few, None)], [(many, None), (many, None)]])[0] == pytest.approx(2.0)
    assert fit_error_model([[(few, None), (many, None)]])[0] == pytest.approx(2.0)
    donors = [[(few, None)], [(many, None)]]
    assert disc_radius(ErrorModel(1.0, 0.0, 0.0), donors, 0.4) == 1.0
    assert disc_radius(ErrorModel(1.0, 0.0, 0.0), donors, 0.6) == pytest.approx(np.sqrt(3))


def test_the_mean_error_of_a_slide_follows_the_law_of_its_variance():
    variance = np.array([0.1, 0.3])
    model = ErrorModel(0.0, 0.5, 1.0)
    np.testing.assert_allclose(model.square(variance, 2), [0.2, 0.4])
    known = model.square(variance, 2, 1.0)
    assert known.mean() == pytest.approx(1 - 0.8**1.8)
    assert known[1] / known[0] == pytest.approx(2.0)
    between = model.square(variance, 2, 0.5).mean()
    assert between == pytest.approx(np.sqrt(0.3 * (1 - 0.8**1.8)))
    far = ErrorModel(0.0, 0.05, 0.1)  # donors show errors far smaller than the law's
    np.testing.assert_allclose(far.square(variance, 2, 1.0), 1.5 * far.square(variance, 2))
    np.testing.assert_array_equal(ErrorModel(0.7, 1.0, 2.0).square(None, 2, 1.0), [0.7, 0.7])


def test_the_disc_holds_its_share_of_new_cells():
    model = fit_error_model([[drawn(seed=0)], [drawn(seed=1)]])
    radius = disc_radius(model, [[drawn(seed=0)], [drawn(seed=1)]])
    error, variance = drawn(20_000, seed=2)
    inside = np.sqrt(error) <= radius * np.sqrt(model.square(variance, len(error)))
    assert inside.mean() == pytest.approx(0.8, abs=0.02)


def test_noise_orders_cells_without_changing_the_mean_square_error():
    displacement = np.array([0.0, 1.0, 2.0])
    flat = predict_rmse(np.full(3, 0.81), displacement)
    assert (np.diff(flat) > 0).all() and np.square(flat).mean() == pytest.approx(0.81)
    strong = predict_rmse(np.full(3, 0.81), displacement, noise_share=1.0)
    np.testing.assert_allclose(strong, 0.9 * np.sqrt(displacement))
    np.testing.assert_allclose(predict_rmse(np.full(3, 0.25), np.zeros(3)), 0.5)


def test_uncertainty_grows_to_that_of_no_information_as_cells_become_unlike():
    rmse, p = np.full(5, 0.6), np.array([1.0, 0.05, 0.025, 0.0, np.nan])
    found = np.square(widen(rmse, p, 0.05))
    np.testing.assert_allclose(found, [0.36, 0.36, 0.664, 1.0, 1.0])
    np.testing.assert_array_equal(widen(rmse, p, 0.05, unlike=True), np.ones(5))
    assert widen(np.array([1.2]), np.array([0.0]), 0.05) == 1.2  # never less than before
    # p-values that a slide like the training slides has as well move nothing
    usual = np.linspace(0.001, 1, 1000)
    np.testing.assert_allclose(widen(np.full(1000, 0.6), usual, 0.05), 0.6)
    foreign = np.concatenate([usual, np.full(200, 0.002)])
    assert widen(np.full(1200, 0.6), foreign, 0.05)[-1] > 0.97


def test_a_calibrated_uncertainty_is_as_large_as_the_error():
    error, variance = drawn(20_000)
    found = calibration_metrics(np.sqrt(0.1 + 2 * variance), np.sqrt(error))
    for name in ("", "_low", "_high"):
        assert found[f"uncertainty_error_ratio{name}"] == pytest.approx(1.0, abs=0.03)
    assert found["uncertainty_coverage"] == pytest.approx(1 - np.exp(-1), abs=0.01)
    raw = calibration_metrics(np.sqrt(variance), np.sqrt(error))
    assert raw["uncertainty_error_ratio_low"] < 0.6
    few = calibration_metrics(np.ones(3), np.ones(3))  # fewer cells than fifths
    assert few["uncertainty_error_ratio"] == few["uncertainty_coverage"] == 1.0


def test_p_values_are_adjusted_as_in_scipy():
    p = np.random.default_rng(0).uniform(size=500)
    p[:100], p[100:200] = 0.02, p[100:200] ** 6  # equal ones, and small ones
    np.testing.assert_allclose(false_discovery_rate(p), false_discovery_control(p), rtol=1e-12)
