"""The field's own measures against their plain definitions."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr

from ipar_sparse.metrics.published import cell_spearman, contact_f1, published_metrics, rssd


def layouts(n, seed=0, noise=0.6):
    rng = np.random.default_rng(seed)
    true = rng.random((n, 2)) * [3.0, 1.0]
    return true + noise * rng.normal(size=true.shape), true


def plain_cell_spearman(pred, true):
    d, delta = cdist(pred, pred), cdist(true, true)
    others = ~np.eye(len(pred), dtype=bool)
    return [spearmanr(d[i, others[i]], delta[i, others[i]]).statistic for i in range(len(pred))]


def test_cell_spearman_is_that_of_scipy_cell_by_cell():
    pred, true = layouts(60)
    rho = plain_cell_spearman(pred, true)
    found = cell_spearman(pred, true)
    assert found["cell_spearman"] == pytest.approx(np.median(rho), abs=1e-9)
    assert found["cell_spearman_mean"] == pytest.approx(np.mean(rho), abs=1e-9)
    turned = 7 * pred[:, ::-1] @ [[0.6, 0.8], [-0.8, 0.6]] + 5
    assert cell_spearman(turned, true)["cell_spearman"] == pytest.approx(found["cell_spearman"])
    grid = np.stack(np.meshgrid(np.arange(7.0), np.arange(5.0)), -1).reshape(-1, 2)
    assert cell_spearman(grid / 3, grid)["cell_spearman"] == pytest.approx(1.0)
    assert cell_spearman(np.zeros((60, 2)), true)["cell_spearman"] == 0


def test_a_sampled_cell_spearman_is_within_its_error():
    pred, true = layouts(2000)
    exact, errors, apart = cell_spearman(pred, true, max_exact=2000), [], []
    for seed in range(20):
        found = cell_spearman(pred, true, seed=seed, num_rows=150, max_exact=100)
        for name in exact:
            apart.append((found[name] - exact[name]) / found[f"{name}_se"])
        errors.append(found["cell_spearman_se"])
    assert 0.7 < np.std(apart) < 1.4 and np.mean(errors) < 0.05


def test_contact_f1_counts_the_nearest_pairs():
    pred, true = layouts(40)
    pairs = np.triu_indices(40, 1)
    d, delta = cdist(pred, pred)[pairs], cdist(true, true)[pairs]
    for q in (0.01, 0.1):
        a, b = d < np.quantile(d, q), delta < np.quantile(delta, q)
        expected = 2 * (a & b).sum() / (a.sum() + b.sum())
        assert contact_f1(pred, true)[f"contact_f1@{q:g}"] == pytest.approx(expected)
    assert contact_f1(3 * true + 1, true)["contact_f1@0.1"] == 1
    assert contact_f1(np.zeros((40, 2)), true)["contact_f1@0.1"] == 0
    doubled = np.repeat(true, 2, axis=0)  # pairs at one point are no contacts
    assert 0 < contact_f1(doubled, doubled)["contact_f1@0.1"] <= 1


def test_a_sampled_contact_f1_is_within_its_error():
    pred, true = layouts(1200, noise=0.1)
    exact = contact_f1(pred, true)["contact_f1@0.1"]
    apart = []
    for seed in range(20):
        found = contact_f1(pred, true, seed=seed, num_pairs=5000, max_exact=100)
        apart.append((found["contact_f1@0.1"] - exact) / found["contact_f1@0.1_se"])
    assert abs(np.mean(apart)) < 0.9 and 0.5 < np.std(apart) < 1.6


def test_rssd_turns_but_does_not_mirror():
    _, true = layouts(50)
    turn = np.array([[0.6, 0.8], [-0.8, 0.6]])
    assert rssd(true @ turn * 9 + 4, true)["rssd"] == pytest.approx(0, abs=1e-6)
    mirrored = rssd(true * [1, -1], true)["rssd"]
    unit = (true - true.mean(0)) / np.sqrt(np.square(true - true.mean(0)).sum(1).mean())
    angles = np.linspace(0, 2 * np.pi, 20001)
    c, s = np.cos(angles), np.sin(angles)
    turned = np.stack(
        [
            c[:, None] * unit[:, 0] + s[:, None] * unit[:, 1],
            s[:, None] * unit[:, 0] - c[:, None] * unit[:, 1],
        ],
        -1,
    )
    assert mirrored == pytest.approx(np.sqrt(np.square(turned - unit).sum((1, 2)).min()), rel=1e-5)


def test_rssd_by_class_is_the_sum_over_classes():
    pred, true = layouts(30)
    classes = np.array(["a", "b", "c"])[np.arange(30) % 3]
    both = published_metrics(pred, true, classes)
    alone = published_metrics(pred, true, np.zeros(30))
    assert alone["rssd_by_class"] == pytest.approx(alone["rssd"])
    assert 0 < both["rssd_by_class"] and "rssd_by_class" not in published_metrics(pred, true)
    perfect = true.copy()
    for label, angle in zip("abc", (0.3, 1.0, 2.0), strict=True):  # each class turned by itself
        c, s = np.cos(angle), np.sin(angle)
        own = classes == label
        perfect[own] = (true[own] - true[own].mean(0)) @ [[c, s], [-s, c]] + true[own].mean(0)
    scaled = rssd(perfect, true, classes)["rssd_by_class"]
    assert scaled < 0.2 * rssd(perfect, true)["rssd"]
