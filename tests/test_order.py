"""Node orders: permutations that bring neighbours together and change no result."""

import pytest
import torch

from ipar_sparse import ops
from ipar_sparse.graph import knn
from ipar_sparse.graph.order import bisection_order, reorder, source_reuse


@pytest.mark.parametrize("n", [1, 2, 31, 33, 100, 1000])
def test_orders_are_permutations(n):
    perm = bisection_order(torch.randn(n, 5))
    assert torch.equal(perm.sort().values, torch.arange(n))


def test_an_order_of_equal_points_is_a_permutation():
    assert bisection_order(torch.ones(500, 20)).unique().numel() == 500


def test_empty():
    assert bisection_order(torch.empty(0, 3)).numel() == 0


def test_bisection_sorts_a_line():
    x = torch.randperm(4096).float()
    perm = bisection_order(torch.stack([x, torch.zeros_like(x)], dim=1), leaf=1)
    ordered = x[perm]
    assert torch.equal(ordered, torch.arange(4096.0)) or torch.equal(
        ordered, torch.arange(4095.0, -1, -1)
    )


def test_an_order_brings_neighbours_together():
    points = torch.rand(4000, 2)
    graph, perm = knn(points, 16), bisection_order(points)
    assert torch.equal(perm.sort().values, torch.arange(4000))
    assert source_reuse(graph.permute(perm), 64) > 3 * source_reuse(graph, 64)


def test_source_reuse_counts():
    graph = knn(torch.arange(6.0).unsqueeze(-1), 2)
    rows = [set(row.tolist()) for row in graph.index]
    distinct = sum(len(set().union(*rows[i : i + 3])) for i in (0, 3))
    assert source_reuse(graph, 3) == pytest.approx(12 / distinct)


def test_reordered_graph_gives_the_same_results():
    n, heads = 300, 2
    points = torch.randn(n, 8)
    graph = knn(points, 12)
    local, perm, inverse = reorder(graph, points)
    assert reorder(graph, points)[0] is local
    q, k, v = torch.randn(3, n, heads, 16, dtype=torch.float64)
    x, bias = torch.randn(n, 2, dtype=torch.float64), torch.randn(n, 12, dtype=torch.float64)
    want = ops.edge_attention(q, k, v, x, bias.flatten(), graph, backend="reference")
    got = ops.edge_attention(
        q[perm], k[perm], v[perm], x[perm], bias[perm].flatten(), local, backend="reference"
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[inverse], b, rtol=0, atol=1e-12)


def test_order_is_found_under_autocast():
    h = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    graph = knn(h, 5)
    with torch.autocast("cpu", torch.bfloat16):
        perm = reorder(graph, h)[1]
    assert torch.equal(perm, bisection_order(h))
