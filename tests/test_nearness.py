"""What true neighbours differ in, against its definition."""

import numpy as np
import pytest
import torch

from ipar_sparse.estimators.relevant_components import RelevantComponents, compared
from ipar_sparse.geometry.gauge import gauge_fix, leading_components
from ipar_sparse.graph import knn


def slide(n=300, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.arange(1.0, d + 1)
    return h, torch.rand(n, 2, generator=generator, dtype=torch.float64).numpy()


def test_it_is_the_mean_over_pairs_of_neighbours_slides_alike():
    slides = [slide(300, seed=0), slide(80, seed=1)]
    expected = np.zeros((6, 6))
    for h, pos in slides:
        neighbors = knn(torch.from_numpy(pos), 15).index.tolist()
        pairs = [(i, j) for i, row in enumerate(neighbors) for j in row]
        for i, j in pairs:
            gap = (h[i] - h[j]).numpy()
            expected += np.outer(gap, gap) / 2 / len(pairs) / 2
    found = RelevantComponents(6).fit(slides)
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-5, atol=1e-5)


def test_powers_divide_out_what_neighbours_differ_in():
    slides = [slide(seed=0)]
    nearness = RelevantComponents(6).fit(slides)
    spread = nearness.covariance.double()
    shrunk = spread + 0.1 * spread.trace() / 6 * torch.eye(6, dtype=torch.float64)
    h = slide(50, seed=3)[0]
    assert nearness(h, 0) is h
    for power in (0.5, 1.0, 2.0):
        values, axes = torch.linalg.eigh(shrunk)
        turned = h @ axes * values ** (-power / 2)
        ratio = torch.pdist(turned) / torch.pdist(nearness(h, power))
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-5, atol=0)
        assert (torch.pdist(nearness(h, power)) / torch.pdist(h)).std() > 0.05


def test_cells_and_slides_that_tell_nothing():
    alone = (torch.zeros(1, 4), np.zeros((1, 2)))
    h = torch.randn(9, 4)
    same = (torch.zeros(5, 4), np.random.default_rng(0).normal(size=(5, 2)))
    for slides in ([alone], [same]):
        found = RelevantComponents(4).fit(slides)(h)
        assert found.isfinite().all()
        torch.testing.assert_close(torch.cdist(found, found), torch.cdist(h, h))
    for slides in ([], [(torch.zeros(5, 3), np.zeros((5, 2)))]):
        with pytest.raises(ValueError, match=r"slides of embeddings \(n, 4\)"):
            RelevantComponents(4).fit(slides)


def test_what_is_compared():
    h = slide()[0].float()
    nearness = RelevantComponents(6).fit([slide(seed=1)])
    assert compared(h, None, 1.0, 0.0) is h
    torch.testing.assert_close(compared(h, nearness, 0.5, 0.0), nearness(h, 0.5))
    expected = leading_components(nearness(h, 0.5), 1.0)
    torch.testing.assert_close(compared(h, nearness, 0.5, 1.0), expected)


@pytest.mark.parametrize("known", [True, False])
