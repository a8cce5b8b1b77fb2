"""An atlas reads the embedding's field over the tissue backwards."""

import numpy as np
import pytest
import torch
from ipar_sparse.metrics.layout import evaluate_layout
from scipy.stats import spearmanr

from ipar_sparse.config import load_config
from ipar_sparse.data.simulation import simulate
from ipar_sparse.estimators.atlas import Atlas, atlas_layout
from ipar_sparse.estimators.regression import ridge_layout
from ipar_sparse.evaluation.scoring import score_slide
from ipar_sparse.geometry.alignment import align, align_slides
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.layout.distance_correction import relative_variance
from ipar_sparse.train.fit import fit


def slide(seed, n=600, noise=0.05, turn=0.0):
    """A folded sheet in five dimensions, and noise; positions turned as under a microscope."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (n, 2))
    sheet = [x[:, 0], x[:, 1], np.sin(4 * x[:, 0]), np.cos(4 * x[:, 1]), x[:, 0] * x[:, 1]]
    h = np.stack(sheet, axis=1) + noise * rng.standard_normal((n, 5))
    c, s = np.cos(turn), np.sin(turn)
    return torch.from_numpy(h).float(), 30 * x @ np.array([[c, -s], [s, c]])


def test_it_places_cells_of_a_slide_it_has_not_seen():
    train, (h, pos) = [slide(0), slide(1, turn=2.0), slide(2, turn=4.0)], slide(3, noise=0.15)
    placed = evaluate_layout(atlas_layout(h, train), pos)
    ridge = evaluate_layout(ridge_layout(h.numpy(), train), pos)
    assert placed["procrustes"] < 0.5 * ridge["procrustes"] < 0.05
    assert placed["neighbor_hit@15"] > ridge["neighbor_hit@15"]


def test_it_is_the_posterior_mean_of_its_definition():
    train, (h, _) = [slide(0), slide(1)], slide(2, n=20)
    atlas = Atlas(5, temperature=0.7).double().fit(train)

    def posterior_mean(learned):
        tissue = learned.log_density.isfinite()
        white = h.double() @ learned.whiten
        square = (white.unsqueeze(1) - learned.field[tissue]).square().sum(-1)
        posterior = torch.softmax(learned.log_density[tissue] - 0.7 / 2 * square, dim=1)
        return posterior @ learned.grid[tissue]

    alike = posterior_mean(atlas)
    torch.testing.assert_close(atlas(h.double(), nearest=False), alike)
    known = torch.cat([g for g, _ in train]).double()
    places = align_slides([(g.numpy(), pos) for g, pos in train])
    nearest = torch.cdist(h.double(), known).argsort(1)[:, :15]
    near = torch.from_numpy(np.concatenate(places))[nearest].mean(1)
    mean = posterior_mean(atlas._like(nearest))  # slides weighted, which is told below
    torch.testing.assert_close(atlas(h.double()), (mean + near) / 2)

    # runs saved before it was known of which slides cells are, and before any were remembered
    older = Atlas(5, temperature=0.7, cells=1200).double()
    older.load_state_dict({k: v for k, v in atlas.state_dict().items() if k != "origin"})
    torch.testing.assert_close(older(h.double()), (alike + near) / 2)
    older = Atlas(5, temperature=0.7).double()
    older.load_state_dict(
        {k: v for k, v in atlas.state_dict().items() if k not in ("known", "places", "origin")}
    )
    assert older.cells == 0
    torch.testing.assert_close(older(h.double()), alike)


def test_a_slide_counts_by_how_often_its_cells_are_the_nearest():
    sisters, (h, _) = [slide(0, n=400), slide(1, n=700)], slide(4)
    train = sisters + [slide(i, noise=0.7) for i in (5, 6, 7)]
    atlas, h = Atlas(5).double().fit(train), h.double()
    nearest = torch.cdist(h, torch.cat([g for g, _ in train]).double()).argsort(1)[:, :15]
    ends = np.cumsum([0] + [len(g) for g, _ in train])
    share = [
        ((nearest >= a) & (nearest < b)).sum() / (b - a)
        for a, b in zip(ends, ends[1:], strict=False)
    ]
    weight = torch.stack(share).double().square()
    weight = weight / weight.sum()
    assert 1 / weight.square().sum() < 2.5  # of five
    torch.testing.assert_close(atlas._likeness(nearest), weight)

    # what is left around the field of such slides is white, if they count so
    like, left = atlas._like(nearest), 0
    for w, (g, _), x in zip(weight, train, map(torch.from_numpy, align_slides(train)), strict=True):
        rest = g.double() @ like.whiten - like.field[torch.cdist(x, like.grid).argmin(1)]
        left = left + w * rest.T @ rest / len(g)
    torch.testing.assert_close(left, torch.eye(5).double(), atol=0.35, rtol=0)
    assert torch.equal(atlas.moments(h)[0], atlas(h))

    # of three it is like more than half: they count alike, and nothing is learned again
    atlas = Atlas(5).double().fit(train[:3])
    nearest = atlas._neighbors(h)
    assert atlas._likeness(nearest) is None and atlas._like(nearest) is atlas
    assert atlas(h[:0]).shape == (0, 2)


def test_slides_that_are_like_nothing_have_no_say():
    """A tumour of its own, along other genes: its cells lie elsewhere, and so do their places."""
    (h, _), sisters = slide(3, noise=0.15), [slide(0), slide(1, turn=2.0)]
    other = [
        (5 + g[:, torch.randperm(5, generator=torch.Generator().manual_seed(i))], x)
        for i, (g, x) in enumerate((slide(7), slide(8), slide(9)))
    ]
    atlas = Atlas(5).fit(sisters + other)
    assert atlas._likeness(atlas._neighbors(h))[:2].sum() > 0.999
    alone = Atlas(5).fit(sisters)(h).double().numpy()

    def moved():
        aligned, _ = align(atlas(h).double().numpy(), alone)
        return np.square(aligned - alone).mean() / np.square(alone).mean()

    weighted = moved()
    atlas.origin = None
    assert weighted < 0.002 < 0.01 < moved()


def test_its_spread_is_the_standard_deviation_of_what_it_averages():
    train, (h, _) = [slide(0), slide(1)], slide(2, n=20)
    atlas, h = Atlas(5, temperature=0.7).double().fit(train), h.double()

    def posterior_of(learned):
        square = (torch.cdist(h @ learned.whiten, learned.field[tissue])).square()
        return torch.softmax(learned.log_density[tissue] - 0.7 / 2 * square, dim=1)

    nearest = torch.cdist(h, atlas.known).argsort(1)[:, :15]
    like = atlas._like(nearest)
    tissue = like.log_density.isfinite()
    posterior = posterior_of(like)
    places = torch.cat([atlas.grid[tissue].expand(20, -1, 2), atlas.places[nearest]], dim=1)
    weights = torch.cat([posterior, torch.full((20, 15), 1 / 15).double()], dim=1) / 2
    mean = (weights.unsqueeze(-1) * places).sum(1)
    torch.testing.assert_close(atlas(h), mean)
    variance = (weights * (places - mean.unsqueeze(1)).square().sum(-1)).sum(1)
    torch.testing.assert_close(atlas.spread(h), variance.sqrt())

    older = Atlas(5, temperature=0.7).double()  # remembers no cells
    older.load_state_dict(
        {k: v for k, v in atlas.state_dict().items() if k not in ("known", "places", "origin")}
    )
    tissue = atlas.log_density.isfinite()
    posterior = posterior_of(atlas)
    mean = posterior @ atlas.grid[tissue]
    apart = (atlas.grid[tissue] - mean.unsqueeze(1)).square().sum(-1)
    torch.testing.assert_close(older.spread(h), (posterior * apart).sum(1).sqrt())


def test_its_spread_is_as_large_as_its_errors():
    """Cells of which much is known, and cells of which little is."""
    train = [slide(0), slide(1), slide(2)]
    noise = np.where(np.arange(600) % 2, 0.05, 0.6)[:, None]
    train = [
        (h + torch.from_numpy(noise * np.random.default_rng(i).standard_normal(h.shape)).float(), x)
        for i, (h, x) in enumerate(train)
    ]
    h, pos = slide(3)
    h = h + torch.from_numpy(noise * np.random.default_rng(9).standard_normal(h.shape)).float()
    atlas = Atlas(5).fit(train)
    spread, (aligned, _) = atlas.spread(h).numpy(), align(atlas(h).double().numpy(), pos)
    radius = np.sqrt(np.square(pos - pos.mean(0)).sum(1).mean())
    error = np.linalg.norm(aligned - pos, axis=1) / radius
    assert spearmanr(spread, error).statistic > 0.3
    for third in np.array_split(np.argsort(spread), 3):
        assert 0.5 < np.sqrt(np.square(error[third]).mean() / np.square(spread[third]).mean()) < 2


def test_kinds_of_cells_side_by_side_are_told_apart():
    """Two kinds that lie in two halves, mirror images of one another: no field describes them."""

    def mosaic(seed):
        rng = np.random.default_rng(seed)
        x = rng.uniform(-1, 1, (900, 2))
        kind = np.sign(rng.uniform(-1, 1, 900) + 0.8 * x[:, 0])
        h = np.column_stack([kind, kind * x[:, 0], x[:, 1], 0.3 * rng.standard_normal((900, 3))])
        return torch.from_numpy(h).float(), 30 * x

    train, (h, pos) = [mosaic(0), mosaic(1)], mosaic(2)
    atlas = Atlas(6).fit(train)
    both = evaluate_layout(atlas(h).double().numpy(), pos)["distance_spearman"]
    atlas.known = None
    field = evaluate_layout(atlas(h).double().numpy(), pos)["distance_spearman"]
    assert both > field + 0.05


def test_each_slide_of_many_is_remembered_alike():
    atlas = Atlas(5).fit([slide(seed, n=9000) for seed in range(3)])
    assert atlas.cells == 3 * (20_000 // 3) and atlas.places.shape == (atlas.cells, 2)


def test_noise_is_white_to_it():
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


def test_bad_inputs_are_told():
    atlas = Atlas(5)
    with pytest.raises(ValueError, match="fitted on slides"):
        atlas.fit([])
    with pytest.raises(ValueError, match=r"embeddings \(n, 5\)"):
        atlas.fit([(torch.zeros(9, 4), np.zeros((9, 2)))])
    with pytest.raises(ValueError, match=r"needs embeddings \(n, 5\)"):
        atlas(torch.zeros(9, 4))
    assert atlas.fit([slide(0)])(torch.zeros(0, 5)).shape == (0, 2)


def test_a_run_begins_from_it_and_its_checkpoint_holds_it(tmp_path):
    slides = simulate("cortex", slides=3, spots=150, genes=60)
    config = load_config(
        None,
        [
            "model.start=atlas",
            "train.minisets=6",
            "train.epochs=2",
            "train.ramp_epochs=1",
            "train.gate_steps=3",
            "train.miniset_min=40",
            "train.miniset_max=60",
            "encoder.steps=8",
            "encoder.hidden=[24]",
            "encoder.out=16",
            "model.dim=16",
            "model.recycles=2",
            "model.channels=16",
            "model.head_channels=8",
            "graph.k=12",
            "train.device=cpu",
        ],
    )
    for name in ("whole", "again"):
        (tmp_path / name).mkdir()
        config.save(tmp_path / name)
    fit(slides[:2], [], config, tmp_path / "whole")
    predictor = Predictor.load(tmp_path / "whole")
    h = torch.from_numpy(predictor.embed(slides[2]))
    first = predictor.predict(slides[2]).trajectory[0]
    np.testing.assert_allclose(first, predictor.start(h, slides[2])[0].numpy(), atol=1e-5)
    one, more = (predictor.predict(slides[2], seeds=n).uncertainty for n in (1, 3))
    place, variance = predictor.atlas.moments(h)
    (a, b), said = predictor.errors, relative_variance(place, variance).numpy()
    np.testing.assert_allclose(np.square(one), a + b * said, atol=1e-5)
    assert not np.allclose(one, more) and more.mean() == pytest.approx(one.mean(), rel=0.1)
    known = [(torch.from_numpy(predictor.embed(s)), s.pos) for s in slides[:2]]
    np.testing.assert_allclose(Atlas(16).fit(known)(h), predictor.atlas(h), atol=1e-3)
    methods = score_slide(predictor, slides[2], baselines=True).methods
    assert {"first layout", "atlas"} <= methods.keys()
    expected = methods["atlas"]["distance_spearman"]  # of the same training slides
    assert methods["first layout"]["distance_spearman"] == pytest.approx(expected, abs=0.02)

    # a run that is taken up again fits it anew
    half = config.replace(train={"epochs": 1})
    fit(slides[:2], [], half, tmp_path / "again")
    fit(slides[:2], [], half, tmp_path / "again", resume=True)
    assert Predictor.load(tmp_path / "again").atlas is not None
