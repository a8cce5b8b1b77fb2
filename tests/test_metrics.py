import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import procrustes as scipy_procrustes
from scipy.spatial.distance import pdist, squareform
from scipy.stats import pearsonr, rankdata, spearmanr

from ipar_sparse.geometry.alignment import align
from ipar_sparse.geometry.gauge import gauge_fix
from ipar_sparse.geometry.neighborhoods import TrueNeighborhoods, unit_gauge
from ipar_sparse.metrics.correlation import spearman
from ipar_sparse.metrics.layout import (
    distance_metrics,
    distance_ranks,
    distance_spearman,
    evaluate_layout,
    metric_info,
    mid_ranks,
    neighborhood_metrics,
    procrustes_metrics,
)
from ipar_sparse.metrics.shape import collapse_diagnostics


def tissue(n, seed=0):
    """An irregular outline with a hole."""
    rng = np.random.default_rng(seed)
    pos = rng.uniform(-1, 1, (4 * n + 40, 2)) * [1.6, 1.0]
    hole = np.square((pos - [0.5, 0.2]) / [0.4, 0.3]).sum(1) < 1
    return 300.0 * pos[~hole][:n] + [5e3, -2e3]


def noisy(pos, noise, seed=1):
    return unit_gauge(pos) + noise * np.random.default_rng(seed).normal(size=pos.shape)


def moved_by(pos, angle=0.7, flip=True, scale=37.0, shift=(11.0, -4.0)):
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    if flip:
        rotation = rotation @ np.diag([1.0, -1.0])
    return scale * pos @ rotation + np.asarray(shift)


def neighbor_sets(pos, k):
    distance = squareform(pdist(pos))
    np.fill_diagonal(distance, np.inf)
    return np.argsort(distance, axis=1, kind="stable")[:, :k]


def test_distance_metrics_equal_their_definitions():
    true = tissue(120)
    pred = moved_by(noisy(true, 0.3))
    d, delta = pdist(pred), pdist(true)
    got = distance_metrics(pred, true)
    assert distance_spearman(pred, true) == pytest.approx(got["distance_spearman"], abs=1e-12)
    assert got["distance_spearman"] == pytest.approx(spearmanr(d, delta)[0], abs=1e-9)
    assert got["distance_pearson"] == pytest.approx(pearsonr(d, delta)[0], abs=1e-9)
    scales = np.linspace(0, 3, 20001) * d.mean() / delta.mean()
    residual = [np.square(d - b * delta).sum() / np.square(d).sum() for b in scales]
    assert got["stress_1"] == pytest.approx(math.sqrt(min(residual)), abs=1e-6)
    assert "stress_1_se" not in got


@pytest.mark.parametrize("values", [[3.0, 1.0, 3.0, 3.0, 2.0, 1.0], [0.5], [2.0, 2.0], [2.0, 1.0]])
def test_equal_values_share_the_mean_of_their_ranks(values):
    assert mid_ranks(torch.tensor(values)).tolist() == rankdata(values).tolist()


def test_distances_have_the_same_ranks_wherever_they_are_found():
    grid = np.stack(np.meshgrid(np.arange(12.0), np.arange(9.0)), -1).reshape(-1, 2)
    for pos in (grid, tissue(120), np.zeros((20, 2))):
        there = torch.pdist(gauge_fix(torch.from_numpy(pos))).round(decimals=10)
        assert np.array_equal(mid_ranks(there).numpy(), distance_ranks(pos))


def test_procrustes_equals_scipy_and_misplacement_is_its_root():
    true = tissue(80)
    pred = moved_by(noisy(true, 0.4))
    got = procrustes_metrics(pred, true)
    assert got["procrustes"] == pytest.approx(scipy_procrustes(true, pred)[2], abs=1e-12)
    assert got["misplacement"] == pytest.approx(math.sqrt(got["procrustes"]))


def test_neighbor_hit_equals_set_intersection():
    true = tissue(150)
    pred = noisy(true, 0.1)
    got = neighborhood_metrics(pred, true, ks=(1, 10, 15))
    for k in (1, 10, 15):
        sets = zip(neighbor_sets(pred, k), neighbor_sets(true, k), strict=True)
        expected = np.mean([len(set(a) & set(b)) / k for a, b in sets])
        assert got[f"neighbor_hit@{k}"] == pytest.approx(expected, abs=1e-12)
        assert got[f"neighbor_hit_chance@{k}"] == pytest.approx(k / 149)


def test_trustworthiness_and_continuity_equal_sklearn():
    from sklearn.manifold import trustworthiness

    true = tissue(200)
    pred = noisy(true, 0.5)
    got = neighborhood_metrics(pred, true, trust_k=12)
    expected = trustworthiness(true, pred, n_neighbors=12)
    assert got["trustworthiness@12"] == pytest.approx(expected, abs=1e-12)
    expected = trustworthiness(pred, true, n_neighbors=12)
    assert got["continuity@12"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("n", [3, 60, 2500])
def test_no_metric_sees_the_gauge(n, flip):
    true = tissue(n)
    pred = noisy(true, 0.2)
    before = evaluate_layout(pred, true, num_rows=200)
    after = evaluate_layout(
        moved_by(pred, flip=flip), moved_by(true, 2.1, False, 1e-3), num_rows=200
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name] == pytest.approx(value, abs=1e-6), name


def test_the_truth_scores_perfectly_on_a_regular_grid_in_float32():
    """Spot grids are full of ties, which rounding must not turn into errors."""
    grid = np.stack(np.meshgrid(np.arange(24.0), np.arange(18.0)), -1).reshape(-1, 2)
    grid[:, 0] += 0.5 * (grid[:, 1] % 2)
    pred = torch.from_numpy(moved_by(grid)).float()
    got = evaluate_layout(pred, torch.from_numpy(grid))
    assert got["neighbor_hit@10"] == got["neighbor_hit@15"] == 1.0
    assert got["trustworthiness@15"] > 0.9995
    assert got["distance_spearman"] > 0.9999
    assert got["procrustes"] < 1e-10
    tied = TrueNeighborhoods(grid, (15,))
    assert got["neighbor_hit_chance@15"] == pytest.approx(tied.size[15].mean() / (len(grid) - 1))
    assert tied.size[15].max() > 15


def test_sampled_estimates_agree_within_their_standard_error():
    """z-scores of 12 independent samples against the full computation: mean 0, variance 1."""
    true = tissue(1400)
    pred = noisy(true, 0.25)
    pairs = distance_metrics(pred, true)
    ranks = neighborhood_metrics(pred, true)
    median = collapse_diagnostics(pred)["median_distance"]
    z = {}
    for seed in range(12):
        got = distance_metrics(pred, true, seed=seed, num_pairs=4000, max_exact=10)
        got |= neighborhood_metrics(pred, true, seed=seed, num_rows=300, max_exact=10)
        got |= collapse_diagnostics(pred, seed=seed, num_pairs=4000, max_exact=10)
        exact = pairs | ranks | {"median_distance": median}
        for name in exact:
            if f"{name}_se" in got:
                z.setdefault(name, []).append((got[name] - exact[name]) / got[f"{name}_se"])
    assert len(z) == 6
    for name, scores in z.items():
        assert abs(np.mean(scores)) < 3.5 / math.sqrt(12), (name, scores)
        assert 0.4 < np.std(scores) < 1.8, (name, scores)


def test_standard_error_of_spearman_is_that_of_repeated_samples():
    rng = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(300):
        x = rng.normal(size=400)
        y = np.round(x + rng.normal(size=400), 1)  # with ties
        rho, influence = spearman(x, y)
        assert rho == pytest.approx(spearmanr(x, y)[0], abs=1e-12)
        values.append(rho)
        errors.append(influence.std() / math.sqrt(400))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.12)


def test_align_recovers_a_transform():
    true = tissue(50)
    moved = moved_by(true, 1.1, True, 0.01)
    aligned, transform = align(moved, true)
    np.testing.assert_allclose(aligned, true, atol=1e-8)
    assert transform.reflects and transform.scale == pytest.approx(100)


@pytest.mark.parametrize("n", [3, 40, 1600, 2600])
def test_a_collapsed_map_scores_what_chance_and_ignorance_score(n):
    true = tissue(n)
    true = true[np.argsort(true[:, 0])]  # row numbers are spatial
    got = evaluate_layout(np.full((n, 2), 0.1), true)
    assert all(math.isfinite(value) for value in got.values())
    assert got["distance_spearman"] == got["distance_pearson"] == 0.0
    for name in ("stress_1", "procrustes", "misplacement"):
        assert got[name] == pytest.approx(1.0, abs=1e-12)
    assert got["lambda_ratio"] == got["median_distance"] == 0.0
    if n >= 40:
        error = 4 * math.sqrt(got["neighbor_hit_chance@15"] / (15 * n))
        assert got["neighbor_hit@15"] == pytest.approx(
            got["neighbor_hit_chance@15"], abs=max(error, 0.03)
        )
        assert got["trustworthiness@15"] == pytest.approx(0.5, abs=0.08)
        assert got["continuity@15"] == pytest.approx(0.5, abs=0.08)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(3, 30),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["line", "duplicates", "outlier", "tiny", "huge", "integer"]),
)
def test_odd_predictions_give_values_in_range(n, seed, kind):
    rng = np.random.default_rng(seed)
    pred = rng.normal(size=(n, 2))
    if kind == "line":
        pred[:, 1] = 0
    elif kind == "duplicates":
        pred = pred[rng.integers(0, 2, n)]
    elif kind == "outlier":
        pred[0] = 1e12
    elif kind == "integer":
        pred = pred.astype(int)
    else:
        pred *= 1e-200 if kind == "tiny" else 1e200
    true = rng.integers(0, 4, (n, 2)).astype(float)
    true[0] = 5  # apart from all others: one point is refused
    got = evaluate_layout(pred, true, seed=seed)
    assert all(math.isfinite(value) for value in got.values())
    for name in ("stress_1", "procrustes", "misplacement", "neighbor_hit@10", "trustworthiness@15"):
        assert -1e-9 <= got[name] <= 1 + 1e-9, name
    for name in ("distance_spearman", "distance_pearson"):
        assert -1 <= got[name] <= 1, name


def test_bad_input_is_refused_with_the_reason():
    true = tissue(10)
    broken = true.copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match="row 3 has NaN"):
        evaluate_layout(broken, true)
    with pytest.raises(ValueError, match="same cells; given 9 and 10"):
        evaluate_layout(true[:9], true)
    with pytest.raises(ValueError, match="at least 3"):
        evaluate_layout(true[:2], true[:2])
    with pytest.raises(ValueError, match=r"must be \(n, 2\)"):
        evaluate_layout(true[:, 0], true)
    with pytest.raises(ValueError, match="one point"):
        evaluate_layout(true, np.ones((10, 2)))


def test_every_reported_metric_can_be_read():
    for name in evaluate_layout(tissue(30), tissue(30)):
        assert metric_info(name).explanation, name
    assert metric_info("E_geo_hgate").better == "lower"
    assert "gated" in metric_info("E_geo_hgate").label
    assert metric_info("neighbor_hit@15").label.endswith("@15")
    assert metric_info("embedding_hit@15").label == "Neighbour hit of the embedding @15"
    assert metric_info("something_else").label == "something_else"
