"""An atlas places cells by Bayes' rule and by the nearest training cells."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from ipar_sparse.estimators.atlas import Atlas, atlas_layout, fit_tissue_field
from ipar_sparse.estimators.regression import ridge_layout
from ipar_sparse.geometry.alignment import align, align_slides
from ipar_sparse.metrics.layout import evaluate_layout


def slide(seed, n=600, noise=0.05, angle=0.0):
    """A folded sheet in five dimensions, and noise; positions rotated as under a microscope."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (n, 2))
    sheet = [x[:, 0], x[:, 1], np.sin(4 * x[:, 0]), np.cos(4 * x[:, 1]), x[:, 0] * x[:, 1]]
    h = np.stack(sheet, axis=1) + noise * rng.standard_normal((n, 5))
    c, s = np.cos(angle), np.sin(angle)
    return torch.from_numpy(h).float(), 30 * x @ np.array([[c, -s], [s, c]])


def test_it_places_cells_of_a_new_slide():
    train, (h, pos) = [slide(0), slide(1, angle=2.0), slide(2, angle=4.0)], slide(3, noise=0.15)
    placed = evaluate_layout(atlas_layout(h, train), pos)
    ridge = evaluate_layout(ridge_layout(h.numpy(), train), pos)
    assert placed["procrustes"] < 0.5 * ridge["procrustes"] < 0.05
    assert placed["neighbor_hit@15"] > ridge["neighbor_hit@15"]


def posterior(h, learned, temperature):
    """Weights (n, P) of the grid points that are tissue, and these points (P, 2)."""
    tissue = learned.log_density.isfinite()
    square = torch.cdist(h @ learned.whiten, learned.field[tissue]).square()
    log_weight = learned.log_density[tissue] - temperature / 2 * square
    return log_weight.softmax(1), learned.grid[tissue]


def test_it_is_the_mean_of_posterior_and_nearest_cells():
    train, (h, _) = [slide(0), slide(1)], slide(2, n=20)
    atlas, h = Atlas(5, temperature=0.7).double().fit(train), h.double()
    weight, grid = posterior(h, atlas, 0.7)
    torch.testing.assert_close(atlas(h, nearest=False), weight @ grid)
    known = torch.cat([g for g, _ in train]).double()
    places = align_slides([(g.numpy(), pos) for g, pos in train])
    for neighbors in (15, 4):
        nearest = torch.cdist(h, known).argsort(1)[:, :neighbors]
        near = torch.from_numpy(np.concatenate(places))[nearest].mean(1)
        found = Atlas(5, temperature=0.7, neighbors=neighbors).double().fit(train)
        torch.testing.assert_close(found(h), (weight @ grid + near) / 2)


def test_its_density_is_the_mean_of_bumps_around_cells():
    rng, angle = np.random.default_rng(0), np.linspace(0, 6, 300)
    ring = np.stack([np.cos(angle), 0.6 * np.sin(angle)], axis=1)  # holes hold no tissue
    places = [torch.from_numpy(ring + 0.05 * rng.standard_normal(ring.shape)) for _ in range(2)]
    weight = torch.tensor([0.3, 0.7], dtype=torch.float64)
    learned = fit_tissue_field(places, places, weight)
    bumps = [torch.exp(-torch.cdist(learned.grid, x).square() / (2 * 0.08**2)) for x in places]
    density = sum(w * one.mean(1) for w, one in zip(weight, bumps, strict=True))
    tissue = density >= 0.1 * density.mean()
    assert torch.equal(learned.log_density.isfinite(), tissue) and 0 < tissue.sum() < len(tissue)
    torch.testing.assert_close(learned.log_density[tissue], density[tissue].log())


def test_its_state_can_be_loaded_into_an_atlas_of_as_many_cells():
    fitted = Atlas(5).fit([slide(0, n=80), slide(1, n=60), slide(2, n=50)])
    loaded = Atlas(5, cells=fitted.cells)
    with pytest.raises(ValueError, match="needs embeddings"):
        loaded(torch.zeros(3, 4))
    loaded.load_state_dict(fitted.state_dict())
    h = slide(3, n=40)[0]
    for found, wanted in zip(loaded.mean_and_variance(h), fitted.mean_and_variance(h), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(loaded.slide_weights(h), fitted.slide_weights(h))
    with pytest.raises(RuntimeError, match="not fitted"):
        Atlas(5)(h)


def test_settings_of_the_field_take_effect():
    train, (h, _) = [slide(0), slide(1)], slide(2, n=20)
    usual = Atlas(5).fit(train)(h, nearest=False)
    for setting in ({"knots": 6}, {"knot_width": 0.4}, {"ridge": 0.1}, {"shrinkage": 0.9}):
        found = Atlas(5, **setting).fit(train)(h, nearest=False)
        assert 1e-4 < float((found - usual).norm(dim=1).max()) < 1.0, setting


def test_a_slide_counts_by_how_often_its_cells_are_the_nearest():
    train = [slide(0, n=400), slide(1, n=700)] + [slide(i, noise=0.7) for i in (5, 6, 7)]
    atlas, h = Atlas(5).double().fit(train), slide(4)[0].double()
    nearest = torch.cdist(h, torch.cat([g for g, _ in train]).double()).argsort(1)[:, :15]
    ends = np.cumsum([0] + [len(g) for g, _ in train])
    share = [
        ((nearest >= a) & (nearest < b)).sum() / (b - a)
        for a, b in zip(ends, ends[1:], strict=False)
    ]
    weight = torch.stack(share).double().square()
    weight = weight / weight.sum()
    assert 1 / weight.square().sum() < 2.5  # of five
    torch.testing.assert_close(atlas.slide_weights(h), weight)

    # the field is then the one of slides with these weights, and its residuals are white
    embeddings = [g.double() for g, _ in train]
    places = [torch.from_numpy(x) for x in align_slides(train)]
    learned = fit_tissue_field(embeddings, places, weight)
    white = 0.0
    for w, g, x in zip(weight, embeddings, places, strict=True):
        rest = g @ learned.whiten - learned.field[torch.cdist(x, learned.grid).argmin(1)]
        white = white + w * rest.T @ rest / len(g)
    torch.testing.assert_close(white, torch.eye(5).double(), atol=0.35, rtol=0)
    grid_weight, grid = posterior(h, learned, 0.5)
    near = torch.cat(places)[nearest].mean(1)
    torch.testing.assert_close(atlas(h), (grid_weight @ grid + near) / 2)


def test_slides_have_equal_weight_if_the_new_cells_are_like_most_of_them():
    train = [slide(0, n=400), slide(1, n=700), slide(5, noise=0.7)]
    atlas, h = Atlas(5).double().fit(train), slide(4)[0].double()
    torch.testing.assert_close(atlas.slide_weights(h), torch.full((3,), 1 / 3).double())
    assert atlas(h[:0]).shape == (0, 2)


def test_slides_that_the_new_cells_are_unlike_do_not_count():
    """Tumours of other donors: their cells differ in other genes, and lie in other places."""
    (h, _), alike = slide(3, noise=0.15), [slide(0), slide(1, angle=2.0)]
    unlike = [
        (5 + g[:, torch.randperm(5, generator=torch.Generator().manual_seed(i))], x)
        for i, (g, x) in enumerate((slide(7), slide(8), slide(9)))
    ]
    alone, atlas = Atlas(5).fit(alike), Atlas(5).fit(alike + unlike)
    assert atlas.slide_weights(h)[:2].sum() > 0.999

    def moved(nearest):
        wanted = alone(h, nearest).double().numpy()
        aligned, _ = align(atlas(h, nearest).double().numpy(), wanted)
        return np.square(aligned - wanted).mean() / np.square(wanted).mean()

    # the posterior mean alone weights slides equally
    assert moved(nearest=True) < 0.002 < 0.01 < moved(nearest=False)


def test_its_variance_is_that_of_what_it_averages():
    train, (h, _) = [slide(0), slide(1)], slide(2, n=20)
    atlas, h = Atlas(5, temperature=0.7).double().fit(train), h.double()
    grid_weight, grid = posterior(h, atlas, 0.7)
    nearest = torch.cdist(h, atlas.known).argsort(1)[:, :15]
    places = torch.cat([grid.expand(20, -1, 2), atlas.places[nearest]], dim=1)
    weights = torch.cat([grid_weight, torch.full((20, 15), 1 / 15).double()], dim=1) / 2
    mean = (weights.unsqueeze(-1) * places).sum(1)
    variance = (weights * (places - mean.unsqueeze(1)).square().sum(-1)).sum(1)
    found = atlas.mean_and_variance(h)
    torch.testing.assert_close(found[0], mean)
    torch.testing.assert_close(found[1], variance)
    assert torch.equal(atlas(h), found[0]) and torch.equal(atlas.std(h), found[1].sqrt())


def test_its_standard_deviation_is_as_large_as_its_errors():
    """With cells whose embedding says much, and cells whose embedding says little."""
    train = [slide(0), slide(1), slide(2)]
    noise = np.where(np.arange(600) % 2, 0.05, 0.6)[:, None]
    train = [
        (h + torch.from_numpy(noise * np.random.default_rng(i).standard_normal(h.shape)).float(), x)
        for i, (h, x) in enumerate(train)
    ]
    h, pos = slide(3)
    h = h + torch.from_numpy(noise * np.random.default_rng(9).standard_normal(h.shape)).float()
    atlas = Atlas(5).fit(train)
    std, (aligned, _) = atlas.std(h).numpy(), align(atlas(h).double().numpy(), pos)
    radius = np.sqrt(np.square(pos - pos.mean(0)).sum(1).mean())
    error = np.linalg.norm(aligned - pos, axis=1) / radius
    assert spearmanr(std, error).statistic > 0.3
    for third in np.array_split(np.argsort(std), 3):
        assert 0.5 < np.sqrt(np.square(error[third]).mean() / np.square(std[third]).mean()) < 2


def test_cell_types_that_lie_side_by_side_are_told_apart():
    """The embeddings of two mixed types mirror each other: no smooth field describes them."""

    def mosaic(seed):
        rng = np.random.default_rng(seed)
        x = rng.uniform(-1, 1, (900, 2))
        kind = np.sign(rng.uniform(-1, 1, 900) + 0.8 * x[:, 0])
        h = np.column_stack([kind, kind * x[:, 0], x[:, 1], 0.3 * rng.standard_normal((900, 3))])
        return torch.from_numpy(h).float(), 30 * x

    train, (h, pos) = [mosaic(0), mosaic(1)], mosaic(2)
    atlas = Atlas(6).fit(train)
    both, field = (
        evaluate_layout(atlas(h, nearest).double().numpy(), pos)["distance_spearman"]
        for nearest in (True, False)
    )
    assert both > field + 0.05


def test_as_many_cells_of_every_slide_are_remembered():
    atlas = Atlas(5).fit([slide(seed, n=9000) for seed in range(3)])
    assert atlas.cells == 3 * (20_000 // 3) and atlas.places.shape == (atlas.cells, 2)
    assert atlas.origin.bincount().tolist() == [20_000 // 3] * 3


def test_residuals_of_the_field_are_white():
    h, pos = slide(0, n=4000, noise=0.2)
    atlas = Atlas(5).double().fit([(h, pos)])
    (place,) = align_slides([(h.numpy(), pos)])
    nearest = torch.cdist(torch.from_numpy(place), atlas.grid).argmin(1)
    rest = h.double() @ atlas.whiten - atlas.field[nearest]
    torch.testing.assert_close(rest.T @ rest / 4000, torch.eye(5).double(), atol=0.2, rtol=0)


def test_cells_without_information_end_in_the_middle():
    train = [slide(0), slide(1)]
    rng = np.random.default_rng(5)
    blank = [(torch.from_numpy(rng.standard_normal((600, 5))).float(), pos) for _, pos in train]
    placed = Atlas(5).fit(blank)(torch.from_numpy(rng.standard_normal((50, 5))).float())
    assert placed.norm(dim=1).max() < 0.5  # of the RMS radius


def test_embeddings_of_another_width_are_refused():
    atlas = Atlas(5)
    with pytest.raises(ValueError, match="fitted on slides"):
        atlas.fit([])
    with pytest.raises(ValueError, match=r"embeddings \(n, 5\)"):
        atlas.fit([(torch.zeros(9, 4), np.zeros((9, 2)))])
    with pytest.raises(ValueError, match=r"needs embeddings \(n, 5\)"):
        atlas(torch.zeros(9, 4))
    assert atlas.fit([slide(0)])(torch.zeros(0, 5)).shape == (0, 2)
