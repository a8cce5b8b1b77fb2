"""Simulated slides: what they promise about counts, shapes and identifiability."""

import numpy as np
import pytest
from scipy.spatial import cKDTree
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from ipar_sparse.data.expression import Expression, select_genes
from ipar_sparse.data.simulation import Region, simulate, zero_inflated_negative_binomial


@pytest.fixture(scope="module")
def tissues():
    return {name: simulate(name, slides=3, spots=1500, seed=0) for name in ("cortex", "lobules")}


def regress(slides):
    """R^2 per tissue axis on the last slide, from expression alone, best of ridge and kNN."""
    genes = select_genes(slides[:-1], slides[0].genes, 800)
    x = [Expression.from_slide(s, genes).rows() for s in slides]
    y = [np.column_stack([s.obs["tissue_x"], s.obs["tissue_y"]]) for s in slides]
    y = [v - v.mean(axis=0) for v in y]
    train_x, train_y = np.vstack(x[:-1]), np.vstack(y[:-1])
    pca = PCA(20, random_state=0).fit(train_x)
    ridge = Ridge(1000.0).fit(train_x, train_y).predict(x[-1])
    near = KNeighborsRegressor(15).fit(pca.transform(train_x), train_y)
    predictions = [ridge, near.predict(pca.transform(x[-1]))]
    return np.max([r2_score(y[-1], p, multioutput="raw_values") for p in predictions], axis=0)


def test_position_can_be_read_from_cortex(tissues):
    assert regress(tissues["cortex"]).min() > 0.9


def test_position_in_lobules_is_only_partly_identifiable(tissues):
    along, across = regress(tissues["lobules"])
    assert 0.15 < along < 0.8
    assert across < 0.15


def test_zone_can_be_read_from_lobules(tissues):
    slides = tissues["lobules"]
    genes = select_genes(slides[:-1], slides[0].genes, 800)
    x = [Expression.from_slide(s, genes).rows() for s in slides]
    pca = PCA(20, random_state=0).fit(np.vstack(x[:-1]))
    zones = np.concatenate([s.obs["zone"] for s in slides[:-1]])
    model = KNeighborsClassifier(20).fit(pca.transform(np.vstack(x[:-1])), zones)
    assert model.score(pca.transform(x[-1]), slides[-1].obs["zone"]) > 0.75
    assert np.unique(zones, return_counts=True)[1].max() < 0.6 * len(zones)


@pytest.mark.parametrize("tissue", ["cortex", "lobules"])
def test_slides_are_deterministic_and_differ(tissue):
    first, again = (simulate(tissue, slides=2, spots=300, genes=200, seed=4) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert (a.expression != b.expression).nnz == 0
        np.testing.assert_array_equal(a.pos, b.pos)
    other = simulate(tissue, slides=3, spots=300, genes=200, seed=4)
    np.testing.assert_array_equal(other[1].pos, first[1].pos)
    shifted = simulate(tissue, slides=1, spots=300, genes=200, seed=5)[0]
    for a, b in ((first[0], first[1]), (first[0], shifted)):
        assert np.abs(np.sort(a.pos[:, 0]) - np.sort(b.pos[:, 0])).max() > 1
        assert (a.expression != b.expression).nnz > 0
    outlines = [np.ptp(s.pos, axis=0) for s in other]
    assert np.std([o[0] / o[1] for o in outlines]) > 0.02


def test_slides_of_different_seeds_are_the_same_tissue(tissues):
    assert regress([*tissues["cortex"][:2], *simulate("cortex", slides=1, seed=9)]).min() > 0.85


@pytest.mark.parametrize("tissue", ["cortex", "lobules"])
def test_order_of_spots_does_not_carry_position(tissues, tissue):
    for slide in tissues[tissue]:
        order = np.arange(slide.num_cells)
        correlation = [abs(np.corrcoef(order, slide.pos[:, axis])[0, 1]) for axis in (0, 1)]
        assert max(correlation) < 4 / np.sqrt(slide.num_cells)
        step = np.linalg.norm(np.diff(slide.pos, axis=0), axis=1).mean()
        anywhere = np.linalg.norm(slide.pos - slide.pos[::-1], axis=1).mean()
        assert step > 0.9 * anywhere


def test_positions_are_a_similarity_of_the_tissue(tissues):
    for slide in tissues["cortex"]:
        place = np.column_stack([slide.obs["tissue_x"], slide.obs["tissue_y"]])
        rng = np.random.default_rng(0)
        i, j = rng.integers(0, slide.num_cells, (2, 500))
        there = np.linalg.norm(place[i] - place[j], axis=1)
        here = np.linalg.norm(slide.pos[i] - slide.pos[j], axis=1)
        ratio = here[i != j] / there[i != j]
        assert np.ptp(ratio) < 1e-6 * ratio.mean()
        nearest = cKDTree(slide.pos).query(slide.pos, k=2)[0][:, 1]
        assert 30 < np.median(nearest) < 150
        assert nearest.min() > 0


def test_a_hole_is_empty():
    round_curve = (np.zeros(2), np.ones(2), np.zeros(1), np.zeros(1))
    hole = (np.array([0.3, 0.0]), np.full(2, 0.2), np.zeros(1), np.zeros(1))
    region = Region([round_curve, hole])
    points = np.array([[0.0, 0.0], [0.3, 0.0], [0.45, 0.1], [0.51, 0.0], [0.0, 1.01], [0.0, 0.99]])
    assert list(region.contains(points)) == [True, False, False, True, False, True]


def test_outlines_have_holes():
    for slide in simulate("cortex", slides=4, spots=4000, genes=50, seed=1):
        tree = cKDTree(slide.pos)
        low, high = slide.pos.min(axis=0), slide.pos.max(axis=0)
        grid = np.stack(np.meshgrid(*np.linspace(low, high, 60).T, indexing="ij"), -1)
        far = (tree.query(grid.reshape(-1, 2))[0] > 150).reshape(60, 60)
        outside = np.zeros_like(far)
        outside[[0, -1], :] = far[[0, -1], :]
        outside[:, [0, -1]] |= far[:, [0, -1]]
        for _ in range(120):
            spread = outside.copy()
            spread[1:] |= outside[:-1]
            spread[:-1] |= outside[1:]
            spread[:, 1:] |= outside[:, :-1]
            spread[:, :-1] |= outside[:, 1:]
            outside = spread & far
        assert (far & ~outside).sum() >= 5


def test_counts_are_zero_inflated_negative_binomial():
    n = 200_000
    mean = np.array([0.2, 2.0, 30.0, 300.0])
    dispersion = np.array([0.5, 0.2, 0.3, 0.1])
    dropout = np.array([0.1, 0.3, 0.2, 0.0])
    row, column, count = zero_inflated_negative_binomial(
        np.tile(mean, (n, 1)).astype(np.float32), dispersion, dropout, np.random.default_rng(0)
    )
    assert count.min() == 1 and np.all(np.diff(row) >= 0)
    r = 1 / dispersion
    expected_zero = dropout + (1 - dropout) * (r / (r + mean)) ** r
    for g in range(4):
        values = count[column == g].astype(float)
        zeros = 1 - len(values) / n
        assert abs(zeros - expected_zero[g]) < 5 * np.sqrt(0.25 / n)
        average = values.sum() / n
        assert average == pytest.approx((1 - dropout[g]) * mean[g], rel=0.02)
        second = (values**2).sum() / n
        plain = (1 - dropout[g]) * (mean[g] + mean[g] ** 2 * (1 + dispersion[g]))
        assert second == pytest.approx(plain, rel=0.05)


def test_slides_carry_batch_effects_and_overdispersion(tissues):
    a, b = (np.asarray(s.expression.mean(axis=0)).ravel() for s in tissues["lobules"][:2])
    ratio = np.log(a[(a > 0.2) & (b > 0.2)] / b[(a > 0.2) & (b > 0.2)])
    assert 0.15 < np.std(ratio) < 0.8
    counts = tissues["lobules"][0].expression.toarray()
    mean, variance = counts.mean(axis=0), counts.var(axis=0)
    assert np.mean(variance[mean > 0.5] > 1.2 * mean[mean > 0.5]) > 0.9
    assert 0.15 < (counts > 0).mean() < 0.6
    np.testing.assert_array_equal(counts, np.rint(counts))


@pytest.mark.parametrize("spots", [1, 2, 7])
def test_tiny_slides(spots):
    for tissue in ("cortex", "lobules"):
        for slide in simulate(tissue, slides=2, spots=spots, genes=60):
            assert slide.num_cells == spots and np.isfinite(slide.pos).all()


def test_chunks_do_not_change_what_a_slide_is(monkeypatch):
    monkeypatch.setattr("ipar_sparse.data.simulation.CHUNK", 1000)
    slide = simulate("cortex", slides=1, spots=503, genes=100)[0]
    assert slide.expression.shape == (503, 100) and slide.expression.has_sorted_indices
    assert not slide.empty.any() and slide.expression.data.min() == 1


def test_unknown_tissue_and_sizes():
    with pytest.raises(ValueError, match="'brain', expected one of cortex, lobules"):
        simulate("brain")
    with pytest.raises(ValueError, match="genes is 10, expected at least 50"):
        simulate("cortex", genes=10)
    with pytest.raises(ValueError, match="spots is 0"):
        simulate("cortex", spots=0)


@pytest.mark.slow
def test_a_large_slide_stays_sparse():
    slide = simulate("cortex", slides=1, spots=100_000, genes=300)[0]
    assert slide.expression.shape == (100_000, 300)
    assert slide.expression.nnz < 0.6 * 100_000 * 300
    assert len(np.unique(slide.pos, axis=0)) == 100_000


@pytest.mark.parametrize("genes", [60, 77])
def test_counts_drawn_on_all_cores_are_those_of_one_sequence(genes, monkeypatch):
    """Odd numbers of genes and cells end a part in the middle of a step of the generator."""

    def drawn(chunk):
        monkeypatch.setattr("ipar_sparse.data.simulation.CHUNK", chunk)
        return simulate("lobules", slides=2, spots=333, genes=genes, seed=3)

    for parts, whole in zip(drawn(7 * genes), drawn(10**9), strict=True):
        assert (parts.expression != whole.expression).nnz == 0
        assert np.array_equal(parts.pos, whole.pos)  # drawn after the counts
