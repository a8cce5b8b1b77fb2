"""The size of uncertainties, held against errors whose law is known."""

import numpy as np
import pytest
import torch

from ipar_sparse.config import RunConfig
from ipar_sparse.inference.predictor import _errors
from ipar_sparse.layout.uncertainty import (
    calibration_metrics,
    fit_error_model,
    predict_rmse,
    square_errors,
)
from ipar_sparse.train import selection as transfer
from ipar_sparse.train.selection import Transfer, _choose, _Left


def drawn(n=4000, a=0.1, b=2.0, seed=0):
    """Square errors in the plane whose means are a + b v."""
    rng = np.random.default_rng(seed)
    doubt = rng.gamma(2.0, 0.2, n)
    return (a + b * doubt) * rng.exponential(size=n), doubt


def test_square_errors_are_in_radii_whatever_the_units():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(300, 2)) + 7
    off = true + 0.1 * rng.normal(size=true.shape)
    found = square_errors(off, true)
    turned = off @ [[0.0, -3.0], [-3.0, 0.0]] + 40
    np.testing.assert_allclose(square_errors(turned, 250 * true), found, rtol=1e-8)
    assert found.mean() == pytest.approx(0.02 / 2, rel=0.15)
    assert (square_errors(true, true) < 1e-20).all()


def test_the_law_of_errors_is_found():
    a, b = fit_error_model([[drawn(seed=0), drawn(seed=1)], [drawn(seed=2)]])
    assert (a, b) == pytest.approx((0.1, 2.0), abs=0.12)
    error, doubt = drawn()
    assert fit_error_model([[(error, None)]]) == pytest.approx((error.mean(), 0.0))
    # errors that fall with what is said of them: nothing is said then
    a, b = fit_error_model([[(error, -doubt)]])
    assert b == 0 and a == pytest.approx(error.mean())
    a, b = fit_error_model([[(error, torch.from_numpy(doubt))]])
    assert a > 0 and b > 0


def test_donors_count_alike_however_many_cells_and_slides_they_have():
    few, many = np.full(10, 1.0), np.full(1000, 3.0)
    assert fit_error_model([[(few, None)], [(many, None), (many, None)]])[0] == pytest.approx(2.0)
    assert fit_error_model([[(few, None), (many, None)]])[0] == pytest.approx(2.0)


def test_what_is_said_is_the_law_and_noise_orders_cells_without_changing_the_size():
    doubt = np.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(predict_rmse((0.25, 2.0), doubt), np.sqrt([0.25, 1.25, 2.25]))
    moved = np.array([0.0, 1.0, 2.0])
    flat = predict_rmse((0.81, 0.0), None, moved)
    assert (np.diff(flat) > 0).all() and np.square(flat).mean() == pytest.approx(0.81)
    both = predict_rmse((0.25, 2.0), np.full(3, 0.5), moved)
    np.testing.assert_allclose(both, flat * np.sqrt(1.25 / 0.81))
    assert predict_rmse((0.25, 2.0), None) is None
    np.testing.assert_allclose(predict_rmse((0.25, 0.0), None, np.zeros(3)), 0.5)


def test_an_honest_uncertainty_is_as_large_as_the_error():
    error, doubt = drawn(20_000)
    found = calibration_metrics(np.sqrt(0.1 + 2 * doubt), np.sqrt(error))
    for name in ("", "_low", "_high"):
        assert found[f"uncertainty_error_ratio{name}"] == pytest.approx(1.0, abs=0.03)
    assert found["uncertainty_coverage"] == pytest.approx(1 - np.exp(-1), abs=0.01)
    raw = calibration_metrics(np.sqrt(doubt), np.sqrt(error))
    assert raw["uncertainty_error_ratio_low"] < 0.6
    few = calibration_metrics(np.ones(3), np.ones(3))  # fewer cells than fifths
    assert few["uncertainty_error_ratio"] == few["uncertainty_coverage"] == 1.0


def left_out(a, b, n=3000, seed=0):
    """A slide of which an atlas knows every place but for noise of the size of its doubt."""
    rng = np.random.default_rng(seed)
    pos = rng.normal(size=(n, 2)) / np.sqrt(2)
    doubt = rng.uniform(0, 0.4, n)
    noise = np.sqrt((a + b * doubt) / 2)[:, None] * rng.normal(size=(n, 2))
    noise[pos[:, 0] < 0] *= -1
    placed = {"plane": pos[:, :1] * [1.0, 0.0], "map": pos, "atlas": pos + noise}
    return _Left(
        torch.from_numpy(pos).float(), pos, placed, {"atlas": torch.from_numpy(doubt).float()}
    )


def test_donors_left_out_tell_a_run_how_far_off_its_places_are():
    config = RunConfig().replace(refine={"steps": 0, "expected": 0})
    found = _choose([[left_out(0.02, 0.3)]], config, Transfer(), {})
    a, b = found.errors["atlas"]
    # a layout is laid on the truth a little smaller than it is, which takes some of the error
    assert a + 0.2 * b == pytest.approx(0.08, abs=0.01) and 0.15 < b < 0.35
    assert found.errors["pca"] == pytest.approx((0.5, 0.0), abs=0.03)
    assert found.errors["mlp"] == pytest.approx((0.0, 0.0), abs=1e-12)
    facts = {"transfer": found.as_dict()}
    assert _errors("atlas", facts) == (a, b)
    assert _errors("fields", facts) == transfer._ERRORS["fields"]  # not tried
    old = {"transfer": {"start": "atlas"}}  # of a run before there was any
    assert _errors("atlas", old) == _errors("atlas", {}) == transfer._ERRORS["atlas"]
