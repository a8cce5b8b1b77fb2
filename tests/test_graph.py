"""NeighborTable and the kNN backends: one contract, whatever finds the neighbours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipar_sparse.graph import NeighborTable, knn, knn_candidates, pooled_candidates, validate_table
from ipar_sparse.graph import knn as knn_fn


def plain_knn(points, k, metric="euclidean"):
    """Sorted neighbour distances by the definition, n x n."""
    points = points.double()
    if metric == "cosine":
        points = torch.nn.functional.normalize(points, dim=-1)
    distance = (points.unsqueeze(1) - points.unsqueeze(0)).square().sum(-1)
    distance.fill_diagonal_(torch.inf)
    return distance, distance.sort(dim=-1).values[:, :k]


def available(backend):
    module = {"faiss": "faiss", "torch_cluster": "torch_cluster"}.get(backend)
    if module:
        pytest.importorskip(module)
    return backend


BACKENDS = [
    "exact",
    "kdtree",
    "faiss",
    pytest.param("torch_cluster", marks=pytest.mark.ext),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_backends_find_the_nearest(backend, metric):
    torch.manual_seed(0)
    points = torch.randn(211, 3 if backend == "kdtree" else 24)
    table = knn(points, 13, metric=metric, backend=available(backend))
    distance, nearest = plain_knn(points, 13, metric)
    found = distance.gather(-1, table.index.long()).sort(dim=-1).values
    torch.testing.assert_close(found, nearest, rtol=1e-5, atol=1e-6)
    assert table.index.dtype == torch.int32
    assert table.method == backend and table.metric == metric


@pytest.mark.parametrize("backend", BACKENDS)
def test_duplicate_points_keep_k_neighbours_and_never_self(backend):
    points = torch.randn(6, 3).repeat_interleave(20, dim=0)
    table = knn(points, 30, backend=available(backend))
    assert table.index.shape == (120, 30)
    validate_table(table)
    distance, nearest = plain_knn(points, 30)
    found = distance.gather(-1, table.index.long()).sort(dim=-1).values
    torch.testing.assert_close(found, nearest, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 60), d=st.integers(1, 5), grid=st.booleans())
def test_exact_search_on_odd_sizes_and_ties(n, k, d, grid):
    points = torch.randn(n, d, generator=torch.Generator().manual_seed(n * 61 + k))
    points = points.round() if grid else points
    table = knn(points, k, backend="exact")
    assert table.index.shape == (n, min(k, n - 1))
    distance, nearest = plain_knn(points, table.k)
    found = distance.gather(-1, table.index.long())
    torch.testing.assert_close(found, nearest, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 400),
    k=st.integers(1, 90),
    d=st.integers(1, 3),
    kind=st.sampled_from(["even", "grid", "clumps", "outlier"]),
)
def test_search_in_boxes_is_exact(n, k, d, kind):
    points = torch.randn(n, d, generator=torch.Generator().manual_seed(n * 91 + k)).double()
    if kind == "grid":
        points = points.mul(2).round()
    if kind == "clumps":
        points = points * torch.linspace(0, 1, n).unsqueeze(1).double() ** 6
    if kind == "outlier":
        points[0] = 1e5
    table = knn(points, k, backend="boxes")
    distance, nearest = plain_knn(points, table.k)
    found = distance.gather(-1, table.index.long())
    torch.testing.assert_close(found, nearest, rtol=1e-9, atol=1e-9)


def test_unordered_pairs_are_each_once_and_every_edge_has_its_own():
    table = knn(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), 6)
    pair, number = table.pairs()
    assert bool((pair[0] < pair[1]).all())
    assert len(set(map(tuple, pair.T.tolist()))) == pair.size(1) < table.num_edges
    assert torch.equal(pair[:, number], table.edge_index.sort(dim=0).values)


def test_exact_search_in_blocks_is_the_search_in_one(monkeypatch):
    import sys

    module = sys.modules["ipar_sparse.graph.knn"]
    points = torch.randn(300, 8)
    whole = knn(points, 7, backend="exact").index
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 2048)
    assert torch.equal(knn(points, 7, backend="exact").index, whole)


@pytest.mark.parametrize("backend", ["exact", "faiss"])
def test_neighbours_far_from_the_origin_survive_float32(backend):
    points = torch.randn(200, 16) + 1000.0
    distance, nearest = plain_knn(points, 10)
    found = distance.gather(-1, knn(points, 10, backend=available(backend)).index.long())
    torch.testing.assert_close(found, nearest, rtol=1e-4, atol=1e-4)


def test_permuting_points_permutes_the_table():
    points, perm = torch.randn(80, 6), torch.randperm(80)
    table = knn(points, 9).permute(perm)
    assert torch.equal(table.index.sort().values, knn(points[perm], 9).index.sort().values)


def test_approximate_search_reports_its_recall(monkeypatch):
    import sys

    pytest.importorskip("faiss")
    monkeypatch.setattr(sys.modules["ipar_sparse.graph.knn"], "FAISS_FLAT_LIMIT", 1000)
    points = torch.randn(3000, 8)
    table = knn(points, 10, backend="faiss")
    distance, _ = plain_knn(points, 10)
    true = distance.topk(10, largest=False).indices
    hits = (table.index.long().unsqueeze(-1) == true.unsqueeze(1)).any(-1).float().mean(-1)
    assert 0.5 < table.recall <= 1.0
    assert table.recall == pytest.approx(hits.mean().item(), abs=4 * hits.std().item() / 1000**0.5)
    assert knn(points, 10, backend="exact").recall is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": torch.zeros(4)}, r"\(n, d\)"),
        ({"points": torch.zeros(4, 2, dtype=torch.int64)}, "floating"),
        ({"k": 0}, "k >= 1"),
        ({"metric": "manhattan"}, "manhattan"),
        ({"backend": "magic"}, "magic"),
        ({"points": torch.tensor([[0.0], [float("nan")], [1.0]])}, "point 1"),
        ({"points": torch.zeros(9, 4), "backend": "kdtree"}, "d <= 3"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        knn(**{"points": torch.randn(9, 2), "k": 3, **arguments})


def test_candidates_default_to_a_hundred():
    assert knn_candidates(torch.randn(150, 8)).k == 100
    assert knn_candidates(torch.randn(30, 8)).k == 29
    assert knn_fn is knn


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1], [1]], "row 1 has itself"),
        ([[1], [2]], "row 1 has a source out of range"),
        ([[1], [-1]], "row 1 has a padding mark"),
        ([[1, 2], [2, 2], [0, 1]], "row 1 has a neighbour twice"),
    ],
)
def test_validator_names_the_broken_row(rows, message):
    with pytest.raises(ValueError, match=message):
        validate_table(NeighborTable(torch.tensor(rows, dtype=torch.int32)))


def test_edge_index_is_row_major_and_round_trips():
    torch.manual_seed(1)
    edge_index = torch.randint(0, 12, (2, 50))
    values = torch.randn(50)
    table, perm = NeighborTable.from_edge_index(edge_index, 12)
    assert table.padded and table.num_edges == 50
    assert torch.equal(table.edge_index, edge_index[:, perm])
    assert bool((table.edge_index[1].diff() >= 0).all())
    laid_out = table.to_table(values[perm], fill=7.0)
    assert torch.equal(table.from_table(laid_out), values[perm])
    assert int((laid_out == 7.0).sum()) == table.num_nodes * table.k - 50


def test_reverse_lists_hold_every_edge_by_source():
    table = knn(torch.randn(60, 4), 7)
    rowptr, edge, dst = table.reverse()
    src = table.edge_index[0]
    for j in range(60):
        mine = edge[rowptr[j] : rowptr[j + 1]]
        assert bool((src[mine] == j).all())
        assert bool((mine.diff() > 0).all())
    assert torch.equal(table.edge_index[1][edge], dst)
    assert torch.equal(edge.sort().values, torch.arange(table.num_edges))


def test_edges_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"source outside 0\.\.2"):
        NeighborTable.from_edge_index(torch.tensor([[3], [0]]), 3)


def test_block_diagonal_keeps_each_graph_apart():
    tables = [knn(torch.randn(n, 3), 6) for n in (9, 4, 12)]
    whole = NeighborTable.block_diagonal(tables)
    assert whole.padded and whole.num_nodes == 25  # four cells have three neighbours each
    edges = [t.edge_index + o for t, o in zip(tables, (0, 9, 13), strict=True)]
    assert torch.equal(whole.edge_index, torch.cat(edges, dim=1))
    assert NeighborTable.block_diagonal(tables[:1]) is tables[0]


@pytest.mark.parametrize("n, pool, k", [(50, 20, 8), (700, 40, 100), (3, 2, 5)])
def test_pooled_candidates_are_the_nearest_of_a_sample(n, pool, k):
    h = torch.randn(n, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    graph = pooled_candidates(h, k, pool, generator=torch.Generator().manual_seed(0))
    validate_table(graph)
    again = pooled_candidates(h, k, pool, generator=torch.Generator().manual_seed(0))
    assert torch.equal(graph.index, again.index)
    assert graph.k == min(k, pool - 1)
    gap = (h.unsqueeze(1) - h[graph.index.long()]).norm(dim=-1)
    assert bool((gap.diff(dim=1) >= 0).all())  # nearest first
    if n > 256:  # they reach as far as 1 in n / pool of all the others
        rank = (torch.cdist(h, h).unsqueeze(1) < gap.unsqueeze(-1)).sum(-1).double()
        expected = torch.arange(1, graph.k + 1) * n / pool
        assert float((rank.mean(0) / expected).mean()) == pytest.approx(1.0, abs=0.15)


def test_pooled_candidates_refuse_a_pool_of_all():
    with pytest.raises(ValueError, match="pool must be between"):
        pooled_candidates(torch.randn(10, 3), 4, 10)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("backend", ["exact", "faiss"])
def test_neighbours_do_not_depend_on_a_power_of_two(backend, metric):
    if backend == "faiss":
        pytest.importorskip("faiss")
    points = torch.randn(300, 24)
    points[7] = points[9]
    expected = knn(points, 12, backend=backend, metric=metric).index
    pooled = pooled_candidates(points, 12, 90, generator=torch.Generator().manual_seed(0)).index
    for power in (-120, -64, -31, 1, 40, 90, 124):
        scaled = points * 2.0 ** (power // 2) * 2.0 ** (power - power // 2)
        assert torch.isfinite(scaled).all()
        assert torch.equal(knn(scaled, 12, backend=backend, metric=metric).index, expected)
        generator = torch.Generator().manual_seed(0)
        assert torch.equal(pooled_candidates(scaled, 12, 90, generator=generator).index, pooled)
