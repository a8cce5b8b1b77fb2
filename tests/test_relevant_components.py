"""Relevant component analysis against its definition, and the space of the candidate search."""

import numpy as np
import pytest
import torch

from ipar_sparse.estimators.relevant_components import RelevantComponents, search_space
from ipar_sparse.geometry.gauge import leading_components
from ipar_sparse.graph import knn


def slide(n=300, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.arange(1.0, d + 1)
    return h, torch.rand(n, 2, generator=generator, dtype=torch.float64).numpy()


def test_covariance_is_the_mean_over_pairs_of_neighbours_with_equal_weight_of_slides():
    slides = [slide(300, seed=0), slide(80, seed=1)]
    for k in (15, 4):
        expected = np.zeros((6, 6))
        for h, pos in slides:
            neighbors = knn(torch.from_numpy(pos), k).index.tolist()
            pairs = [(i, j) for i, row in enumerate(neighbors) for j in row]
            for i, j in pairs:
                gap = (h[i] - h[j]).numpy()
                expected += np.outer(gap, gap) / 2 / len(pairs) / 2
        found = RelevantComponents(6, neighbors=k).fit(slides)
        np.testing.assert_allclose(found.covariance, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shrinkage", [0.1, 0.5])
def test_a_power_shrinks_directions_in_which_neighbours_differ(shrinkage):
    rca = RelevantComponents(6, shrinkage=shrinkage).fit([slide(seed=0)])
    covariance = rca.covariance.double()
    shrunk = covariance + shrinkage * covariance.trace() / 6 * torch.eye(6, dtype=torch.float64)
    h = slide(50, seed=3)[0]
    assert rca(h, 0) is h
    for power in (0.5, 1.0, 2.0):
        values, axes = torch.linalg.eigh(shrunk)
        expected = h @ axes * values ** (-power / 2)
        ratio = torch.pdist(expected) / torch.pdist(rca(h, power))
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-5, atol=0)
        assert (torch.pdist(rca(h, power)) / torch.pdist(h)).std() > 0.05


def test_slides_without_differences_leave_distances_as_they_are():
    one_cell = (torch.zeros(1, 4), np.zeros((1, 2)))
    constant = (torch.zeros(5, 4), np.random.default_rng(0).normal(size=(5, 2)))
    h = torch.randn(9, 4)
    for slides in ([one_cell], [constant]):
        found = RelevantComponents(4).fit(slides)(h)
        assert found.isfinite().all()
        torch.testing.assert_close(torch.cdist(found, found), torch.cdist(h, h))
    for slides in ([], [(torch.zeros(5, 3), np.zeros((5, 2)))]):
        with pytest.raises(ValueError, match=r"slides of embeddings \(n, 4\)"):
            RelevantComponents(4).fit(slides)


def test_the_search_space_is_whitened_first_and_weighted_after():
    h = slide()[0].float()
    rca = RelevantComponents(6).fit([slide(seed=1)])
    assert search_space(h, None, 1.0, 0.0) is h
    torch.testing.assert_close(search_space(h, rca, 0.5), rca(h, 0.5))
    expected = leading_components(rca(h, 0.5), 1.0)
    torch.testing.assert_close(search_space(h, rca, 0.5, 1.0), expected)
