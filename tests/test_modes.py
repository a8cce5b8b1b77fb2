"""The most probable places of cells that may lie in several."""

import numpy as np
import pytest
import torch

from ipar_sparse.estimators.atlas import Atlas
from ipar_sparse.estimators.modes import SEPARATION, top_places


def two_sided(seed, n=1500):
    """A tissue whose left and right look alike: expression tells |x| and y alone."""
    rng = np.random.default_rng(seed)
    x = rng.uniform([-1.5, -1], [1.5, 1], (n, 2))
    h = np.stack([np.abs(x[:, 0]), x[:, 1]], axis=1) + 0.02 * rng.standard_normal((n, 2))
    return torch.from_numpy(h).float(), x


@pytest.fixture(scope="module")
def atlas():
    return Atlas(2).fit([two_sided(0)])


def test_both_sides_of_a_symmetric_tissue_are_found(atlas):
    h, x = two_sided(1)
    places, weights = top_places(atlas, h, 3)
    radius = np.sqrt(np.square(x - x.mean(0)).sum(1).mean())
    apart = np.abs(x[:, 0]) > 0.6  # else both sides are one place
    true = torch.from_numpy((x - x.mean(0)) / radius).float()[apart]
    mirrored = true * torch.tensor([-1.0, 1.0])
    for side in (true, mirrored):
        nearest = (places[apart, :2] - side[:, None]).norm(dim=2).nan_to_num(9).amin(1)
        assert float(nearest.median()) < 0.12 and float((nearest < 0.3).float().mean()) > 0.95
    assert float((weights[apart, 0] - weights[apart, 1]).abs().median()) < 0.2
    assert float(weights[apart, :2].sum(1).median()) > 0.9
    position = atlas(h)[apart]  # the mean of both lies where neither is
    assert float((position - true).norm(dim=1).median()) > 0.4


def test_weights_are_the_mass_around_each_place(atlas):
    h, _ = two_sided(2, n=40)
    places, weights = top_places(atlas, h, 4)
    grid, blocks = atlas.distribution(h)
    mass = torch.cat(list(blocks))
    torch.testing.assert_close(mass.sum(1), torch.ones(40), atol=1e-4, rtol=0)
    assert (weights.sum(1) <= 1 + 1e-4).all() and (weights.diff(dim=1) <= 1e-6).all()
    assert torch.equal(places.isnan().any(2), weights == 0)
    for cell in range(40):
        found = places[cell][weights[cell] > 0]
        distance = torch.cdist(found, grid)
        # the place itself is the mean of what is nearest to the maximum beside it
        near = mass[cell][(distance.amin(0) <= 1.5 * SEPARATION)].sum()
        assert float(weights[cell].sum()) <= float(near) + 1e-4
        if len(found) > 1:
            assert float(torch.pdist(found).amin()) > 0.5 * SEPARATION


def test_a_cell_that_has_one_place_has_one(atlas):
    h = torch.tensor([[0.0, 0.0]])
    places, weights = top_places(atlas, h, 3)
    assert float(weights[0, 0]) > 0.7 and float(places[0, 0].norm()) < 0.2
    assert top_places(atlas, h[:0], 2)[0].shape == (0, 2, 2)
