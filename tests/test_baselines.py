import math

import numpy as np
import pytest
import torch

from ipar_sparse.evaluation import baselines
from ipar_sparse.evaluation.baselines import BASELINES, run_baselines
from ipar_sparse.geometry.alignment import align, align_slides
from ipar_sparse.geometry.neighborhoods import unit_gauge
from ipar_sparse.graph import NeighborTable, knn
from ipar_sparse.metrics.layout import evaluate_layout


def slide(n, seed, noise=0.3, width=24):
    """A slide whose embedding knows its positions up to a smooth map and noise."""
    rng = np.random.default_rng(seed)
    pos = rng.uniform(-1, 1, (n, 2)) * [1.5, 1.0]
    fixed = np.random.default_rng(99)
    h = np.cos(pos @ fixed.normal(size=(2, width)) + fixed.uniform(0, 6, width))
    return h + noise * rng.normal(size=h.shape), pos


def turned(pos, angle, flip, scale):
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return scale * pos @ rotation * [1, -1 if flip else 1] + 9 * scale


def training():
    gauges = [(0.4, False, 1.0), (2.5, True, 30.0), (5.0, True, 0.01), (3.6, False, 7.0)]
    slides = [slide(250 + 50 * s, s) for s in range(4)]
    return [(h, turned(pos, *gauge)) for (h, pos), gauge in zip(slides, gauges, strict=True)]


def path_graph(n, k=1):
    """A ribbon: every cell linked to those up to k away along a line."""
    rows = []
    for i in range(n):
        near = [j for j in range(i - k, i + k + 1) if j != i and 0 <= j < n]
        rows.append(near + [-1] * (2 * k - len(near)))
    return NeighborTable(torch.tensor(rows, dtype=torch.int32), padded=True)


def test_every_baseline_beats_chance_where_the_embedding_knows_the_positions():
    h, pos = slide(400, 77)
    graph = knn(torch.from_numpy(h), 15)
    uniform = torch.full((graph.num_edges, 2), 1 / 15)
    names = [name for name in BASELINES if name != "UMAP"]  # compiles for half a minute
    layouts = run_baselines(h, graph, train=training(), operator=uniform, only=names)
    assert list(layouts) == names
    scores = {name: evaluate_layout(x, pos) for name, x in layouts.items()}
    assert abs(scores["random"]["distance_spearman"]) < 0.05
    for name in set(scores) - {"random"}:
        assert scores[name]["distance_spearman"] > 0.5, name
        assert scores[name]["neighbor_hit@15"] > 3 * 15 / 399, name
    assert scores["ridge"]["distance_spearman"] > 0.9
    assert scores["MLP"]["distance_spearman"] > 0.9


def test_training_slides_of_four_gauges_are_brought_into_one_frame():
    slides = training()
    aligned = align_slides(slides)
    true = [pos for _, pos in (slide(250 + 50 * s, s) for s in range(4))]
    for pos in aligned:
        assert np.square(pos).sum(1).mean() == pytest.approx(1.0)
    # one transform must then fit all slides at once
    joined = np.concatenate([unit_gauge(pos) for pos in true])
    moved, _ = align(np.concatenate(aligned), joined)
    assert np.square(moved - joined).sum() / np.square(joined).sum() < 0.01
    before = np.concatenate([unit_gauge(pos) for _, pos in slides])
    moved, _ = align(before, joined)
    assert np.square(moved - joined).sum() / np.square(joined).sum() > 0.3


def test_the_gauge_of_training_slides_does_not_change_the_prediction():
    h, _ = slide(100, 5)
    plain = training()
    other = [(f, turned(pos, s + 0.3, s == 1, 2.0)) for s, (f, pos) in enumerate(plain)]
    first = baselines.ridge_layout(h, plain)
    second = align(baselines.ridge_layout(h, other), first)[0]
    np.testing.assert_allclose(second, first, atol=1e-6)


def test_a_single_training_slide_is_enough():
    h, pos = slide(200, 5)
    for layout in (
        baselines.ridge_layout(h, training()[:1]),
        baselines.mlp_layout(h, training()[:1]),
    ):
        assert evaluate_layout(layout, pos)["distance_spearman"] > 0.85


@pytest.mark.parametrize("n", [120, 700])
def test_spectral_orders_a_ribbon_by_its_known_eigenvectors(n):
    """The Laplacian of a path has cosines as eigenvectors; both solvers must find the first."""
    graph = path_graph(n, k=4)
    layout = baselines.spectral_layout(np.random.default_rng(0).normal(size=(n, 3)), graph)
    cosine = np.cos(np.pi * (np.arange(n) + 0.5) / n)
    assert abs(np.corrcoef(layout[:, 0], cosine)[0, 1]) > 0.995
    cosine = np.cos(2 * np.pi * (np.arange(n) + 0.5) / n)
    assert abs(np.corrcoef(layout[:, 1], cosine)[0, 1]) > 0.98


def test_spectral_survives_no_convergence(monkeypatch):
    graph = path_graph(600, k=4)

    def stubborn(*args, **kwargs):
        raise baselines.ArpackNoConvergence("no", np.empty(0), np.empty((600, 0)))

    monkeypatch.setattr(baselines, "eigsh", stubborn)
    layout = baselines.spectral_layout(np.random.default_rng(0).normal(size=(600, 3)), graph)
    cosine = np.cos(np.pi * (np.arange(600) + 0.5) / 600)
    assert abs(np.corrcoef(layout[:, 0], cosine)[0, 1]) > 0.9


def test_components_are_placed_by_the_embedding():
    a, pos_a = slide(150, 1)
    h = np.concatenate([a, a + 40.0, a[:2] + 90.0])
    blocks = [knn(torch.from_numpy(h[:150]), 10).index, knn(torch.from_numpy(h[150:300]), 10).index]
    index = torch.full((302, 10), -1, dtype=torch.int32)
    index[:150], index[150:300] = blocks[0], blocks[1] + 150
    layout = baselines.spectral_layout(h, NeighborTable(index, padded=True))
    assert np.isfinite(layout).all()
    near, far = layout[:150].mean(0), layout[150:300].mean(0)
    radius = np.sqrt(np.square(layout[:150] - near).sum(1).mean())
    assert np.linalg.norm(near - far) > 5 * radius
    assert evaluate_layout(layout[:150], pos_a)["distance_spearman"] > 0.5


def test_diffusion_map_follows_the_weights():
    """Edges of zero weight are no edges: a ribbon is found inside a complete graph."""
    n = 60
    index = torch.tensor([[j for j in range(n) if j != i] for i in range(n)], dtype=torch.int32)
    graph = NeighborTable(index)
    src, dst = graph.edge_index
    weights = ((src - dst).abs() <= 2).float()
    layout = baselines.diffusion_map(graph, weights, np.random.default_rng(0).normal(size=(n, 3)))
    cosine = np.cos(np.pi * (np.arange(n) + 0.5) / n)
    assert abs(np.corrcoef(layout[:, 0], cosine)[0, 1]) > 0.99
    with pytest.raises(ValueError, match="one an edge"):
        baselines.diffusion_map(graph, -weights, torch.zeros(n, 2))


def test_results_repeat_and_follow_the_cells():
    h, _ = slide(300, 8)
    graph = knn(torch.from_numpy(h), 12)
    names = ["PCA", "spectral", "ridge"]
    first = run_baselines(h, graph, train=training(), only=names)
    again = run_baselines(h, graph, train=training(), only=names)
    perm = np.random.default_rng(3).permutation(300)
    shuffled = run_baselines(
        h[perm], graph.permute(torch.from_numpy(perm)), train=training(), only=names
    )
    assert list(first) == names
    for name in names:
        np.testing.assert_array_equal(first[name], again[name])
        moved = align(shuffled[name], first[name][perm])[0]
        np.testing.assert_allclose(moved, first[name][perm], atol=1e-4 * np.abs(moved).max())


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_few_cells_and_no_training_slides(n):
    h = np.random.default_rng(0).normal(size=(n, 4))
    h[-1] = h[0]
    layouts = run_baselines(h, knn(torch.from_numpy(h), 3))
    assert {"random", "PCA", "spectral"} <= set(layouts)
    assert all(x.shape == (n, 2) for x in layouts.values())
    assert "ridge" not in layouts


def test_what_does_not_fit_is_refused():
    h, _ = slide(50, 1)
    graph = knn(torch.from_numpy(h), 5)
    with pytest.raises(ValueError, match="width 7"):
        run_baselines(h, graph, train=[(np.ones((4, 7)), np.ones((4, 2)))])
    with pytest.raises(ValueError, match="choose from"):
        run_baselines(h, graph, only=["pca2"])
    with pytest.raises(ValueError, match="finite"):
        run_baselines(np.full((50, 3), np.nan), graph)


@pytest.mark.slow
def test_umap_repeats():
    pytest.importorskip("umap", reason="umap-learn is not installed")
    h, pos = slide(200, 2)
    first = baselines.umap_layout(h, seed=3)
    np.testing.assert_array_equal(first, baselines.umap_layout(h, seed=3))
    assert evaluate_layout(first, pos)["distance_spearman"] > 0.3


def test_umap_of_too_many_cells_is_left_out_and_said(monkeypatch, caplog):
    h, _ = slide(60, 2)
    monkeypatch.setattr(baselines, "find_spec", lambda name: name)
    monkeypatch.setattr(baselines, "_UMAP_CELLS", 50)
    monkeypatch.setattr(baselines, "umap_layout", lambda h, seed: 1 / 0)
    with caplog.at_level("INFO"):
        assert not baselines.run_baselines(h, knn(torch.from_numpy(h), 8), only=["UMAP"])
    assert "UMAP left out: 60 cells, run on 50 at most" in caplog.text


@pytest.mark.slow
def test_umap_leaves_threads_as_they_were():
    """Numba shares OpenMP with torch; a run after it would have taken every core."""
    pytest.importorskip("umap", reason="umap-learn is not installed")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        baselines.umap_layout(slide(100, 2)[0])
        assert torch.get_num_threads() == 1
        assert "omp_get_max_threads() : 1" in torch.__config__.parallel_info()
    finally:
        torch.set_num_threads(before)
