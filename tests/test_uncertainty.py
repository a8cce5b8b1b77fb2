"""Uncertainties compared with errors of a known distribution."""

import numpy as np
import pytest
import torch

from ipar_sparse.layout.uncertainty import (
    calibration_metrics,
    fit_error_model,
    predict_rmse,
    square_errors,
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
    a, b = fit_error_model([[drawn(seed=0), drawn(seed=1)], [drawn(seed=2)]])
    assert (a, b) == pytest.approx((0.1, 2.0), abs=0.12)
    error, variance = drawn()
    assert fit_error_model([[(error, None)]]) == pytest.approx((error.mean(), 0.0))
    # errors that fall with the variance: the slope is 0 then
    a, b = fit_error_model([[(error, -variance)]])
    assert b == 0 and a == pytest.approx(error.mean())
    a, b = fit_error_model([[(error, torch.from_numpy(variance))]])
    assert a > 0 and b > 0


def test_donors_have_equal_weight_however_many_cells_and_slides_they_have():
    few, many = np.full(10, 1.0), np.full(1000, 3.0)
    assert fit_error_model([[(few, None)], [(many, None), (many, None)]])[0] == pytest.approx(2.0)
    assert fit_error_model([[(few, None), (many, None)]])[0] == pytest.approx(2.0)


def test_noise_orders_cells_without_changing_the_mean_square_error():
    variance = np.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(predict_rmse((0.25, 2.0), variance), np.sqrt([0.25, 1.25, 2.25]))
    displacement = np.array([0.0, 1.0, 2.0])
    flat = predict_rmse((0.81, 0.0), None, displacement)
    assert (np.diff(flat) > 0).all() and np.square(flat).mean() == pytest.approx(0.81)
    both = predict_rmse((0.25, 2.0), np.full(3, 0.5), displacement)
    np.testing.assert_allclose(both, flat * np.sqrt(1.25 / 0.81))
    strong = predict_rmse((0.81, 0.0), None, displacement, noise_share=1.0)
    np.testing.assert_allclose(strong, 0.9 * np.sqrt(displacement))
    assert predict_rmse((0.25, 2.0), None) is None
    np.testing.assert_allclose(predict_rmse((0.25, 0.0), None, np.zeros(3)), 0.5)


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
