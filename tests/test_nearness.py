"""What true neighbours differ in, against its definition."""

import numpy as np
import pytest
import torch

from ipar_sparse.gauge import gauge_fix, leading_components
from ipar_sparse.graph import knn
from ipar_sparse.nearness import Nearness, compared, narrowed


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
    found = Nearness(6).fit(slides)
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-5, atol=1e-5)


def test_powers_divide_out_what_neighbours_differ_in():
    slides = [slide(seed=0)]
    nearness = Nearness(6).fit(slides)
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
        found = Nearness(4).fit(slides)(h)
        assert found.isfinite().all()
        torch.testing.assert_close(torch.cdist(found, found), torch.cdist(h, h))
    for slides in ([], [(torch.zeros(5, 3), np.zeros((5, 2)))]):
        with pytest.raises(ValueError, match=r"slides of embeddings \(n, 4\)"):
            Nearness(4).fit(slides)


def test_what_is_compared():
    h = slide()[0].float()
    nearness = Nearness(6).fit([slide(seed=1)])
    assert compared(h, None, 1.0, 0.0) is h
    torch.testing.assert_close(compared(h, nearness, 0.5, 0.0), nearness(h, 0.5))
    expected = leading_components(nearness(h, 0.5), 1.0)
    torch.testing.assert_close(compared(h, nearness, 0.5, 1.0), expected)


@pytest.mark.parametrize("known", [True, False])
def test_a_narrow_layout_keeps_its_first_axis_and_tells_neighbours_across(known):
    h = slide(seed=2)[0] + 5
    nearness = Nearness(6).fit([slide(seed=1)]) if known else None
    rng = np.random.default_rng(0)
    pos = torch.from_numpy(rng.normal(size=(300, 2)) * (3, 1) @ [[0.8, 0.6], [-0.6, 0.8]]) + 2
    found = narrowed(7 * pos, h, nearness, 0.1)

    def first(x):  # component, by its definition
        x = x - x.mean(0)
        return torch.linalg.svd(x, full_matrices=False)[0][:, :1] * len(x) ** 0.5

    u = first(pos)
    rest = nearness(h, 1.0) if known else h
    design = torch.cat([torch.ones_like(u), u], 1)
    rest = rest - design @ torch.linalg.lstsq(design, rest).solution
    expected = gauge_fix(torch.cat([u, 0.1 * first(rest)], 1))
    torch.testing.assert_close(torch.pdist(found), torch.pdist(expected), rtol=1e-5, atol=1e-5)
    spread = torch.linalg.svdvals(found - found.mean(0))
    assert float(spread[1] / spread[0]) == pytest.approx(0.1, rel=1e-4)
    assert narrowed(pos, h, nearness, 0.0) is pos


def test_what_cannot_be_narrowed_is_left_as_it_is():
    h = torch.randn(9, 4)
    for pos in (torch.full((9, 2), torch.nan), torch.randn(2, 2)):
        assert narrowed(pos, h[: len(pos)], None, 0.1) is pos
    for pos, own in ((torch.zeros(9, 2), h), (torch.randn(9, 2), torch.zeros(9, 4))):
        assert narrowed(pos, own, None, 0.1).isfinite().all()
