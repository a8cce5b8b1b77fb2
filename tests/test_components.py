"""Linear components of expression and of embeddings."""

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import sparse

from ipar_sparse.data.expression import Expression
from ipar_sparse.data.simulation import simulate
from ipar_sparse.estimators.components import principal_axes, project, spatial_axes
from ipar_sparse.geometry.gauge import leading_components


@pytest.fixture
def expressions():
    slides = simulate("cortex", slides=2, spots=150, genes=60)
    return [Expression.from_slide(slide, slide.genes) for slide in slides]


def test_principal_axes_are_orthonormal_and_ordered_by_variance(expressions):
    axes, scale = principal_axes(expressions, 32)
    torch.testing.assert_close(axes.T @ axes, torch.eye(32), atol=1e-5, rtol=0)
    both = torch.cat([torch.from_numpy(e.rows()) for e in expressions]).double()  # of equal sizes
    values = torch.linalg.eigvalsh(both.T @ both / len(both)).flip(0)
    found = (both @ axes.double()).square().mean(0)
    torch.testing.assert_close(found, values[:32], rtol=1e-4, atol=1e-6)
    assert float((scale**2 * found).sum()) == pytest.approx(1.0, rel=1e-4)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())
    rows = np.array([7, 3, 7])
    scores = torch.from_numpy(project(expressions[0], axes, rows)).float()
    expected = torch.from_numpy(expressions[0].rows(rows)) @ axes
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_principal_axes_are_the_same_without_a_covariance_matrix(expressions, monkeypatch):
    expressions[0].empty[:3] = True
    dense, scale = principal_axes(expressions, 5)
    monkeypatch.setattr("ipar_sparse.estimators.components.DENSE_GENES", 8)
    found, other = principal_axes(expressions, 5)
    torch.testing.assert_close(found, dense, atol=1e-4, rtol=0)
    assert other == pytest.approx(scale, rel=1e-5)


def test_spatial_axes_are_the_directions_in_which_neighbours_agree():
    """A smooth function of the place comes first, even if noise varies more."""
    rng = np.random.default_rng(0)
    pos = [rng.uniform(-1, 1, (300, 2)) for _ in range(2)]
    mixing = rng.standard_normal((12, 12))
    parts = []
    for x in pos:
        field = np.column_stack([0.5 * np.sin(2 * x[:, 0]), 0.4 * x[:, 1], np.zeros((300, 10))])
        values = (field + rng.standard_normal((300, 12)) * np.r_[0.2, 0.2, [1.0] * 10]) @ mixing
        matrix = sparse.csr_matrix((values - values.mean(0)).astype(np.float32))
        parts.append(Expression(matrix, [f"g{i}" for i in range(12)]))
    axes, scale = spatial_axes(parts, pos, 12)
    dense = [part.rows().astype(np.float64) for part in parts]
    variance, shared = 0.0, 0.0
    for x, place in zip(dense, pos, strict=True):
        gap = np.linalg.norm(place[:, None] - place[None], axis=-1)
        np.fill_diagonal(gap, np.inf)
        around = x[np.argsort(gap, axis=1)[:, :15]].mean(1)
        cross = x.T @ (around - around.mean(0)) / 300
        shared = shared + (cross + cross.T) / 4
        variance = variance + np.cov(x.T, bias=True) / 2
    ridge = variance + 0.5 * np.trace(variance) / 12 * np.eye(12)
    mu, found = scipy.linalg.eigh(shared, ridge)
    mu = mu[::-1].clip(1e-4, 0.999)
    expected = found[:, ::-1] * np.sqrt(mu / (1 - mu))
    got = axes.double().numpy()
    np.testing.assert_allclose(np.abs(got), np.abs(expected), rtol=1e-3, atol=1e-5)
    total = np.mean([np.square(x @ got).sum(1).mean() for x in dense])
    assert scale**2 * total == pytest.approx(1.0, rel=1e-4)
    plain = principal_axes(parts, 12)[0].double().numpy()

    def explained(directions):  # share of two leading components that the place explains
        place = np.column_stack([pos[0], np.ones(300)])
        values = dense[0] @ directions[:, :2]
        fitted = place @ np.linalg.lstsq(place, values, rcond=None)[0]
        return fitted.var(0).sum() / values.var(0).sum()

    assert explained(got) > 3 * explained(plain)


def test_spatial_axes_of_a_slide_of_one_cell_stay_finite(expressions):
    one = Expression(expressions[0].matrix[:1], expressions[0].genes)
    axes, scale = spatial_axes([one], [np.zeros((1, 2))], 4)
    assert bool(torch.isfinite(axes).all()) and np.isfinite(scale)


def test_leading_components_are_weighted_by_their_standard_deviation():
    h = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7)
    centred = h - h.mean(0)
    u, spread, _ = torch.linalg.svd(centred, full_matrices=False)
    for power in (0.0, 0.5, 1.0):
        expected = u * spread * (spread / spread[0]) ** power
        found = leading_components(h + 3, power)
        found, expected = found.double(), expected.double()
        torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=0, atol=1e-3)
    assert (leading_components(torch.ones(5, 3)) == 0).all()
