"""The fused search against the definition: nothing lost, ties by number, the same in every run.

On a GPU it runs compiled. Without one, TRITON_INTERPRET=1 runs the same tests at small sizes in
Triton's interpreter on the CPU.
"""

import os

import pytest
import torch

pytest.importorskip("triton")

from ipar_sparse.graph import knn
from ipar_sparse.graph.triton_knn import search, search_partitioned

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
N = 300 if INTERPRETED else 2000
SIZES = [(2, 1, 1), (5, 2, 4), (128, 3, 7), (260, 20, 60), (300, 130, 12)]
if not INTERPRETED:
    SIZES += [(1000, 128, 100), (1999, 512, 256), (2000, 33, 1), (1500, 257, 31), (20_000, 64, 50)]


def assert_nearest(index, points, k, rows=None):
    """The k smallest distances of the centred points in float64, nearest first, no self."""
    rows = torch.arange(len(points), device=points.device) if rows is None else rows
    work = (points.float() - points.float().mean(dim=0)).double()
    for row in rows.split(256):
        distance = torch.cdist(work[row], work, compute_mode="donot_use_mm_for_euclid_dist")
        distance.scatter_(1, row.unsqueeze(1), torch.inf)
        nearest = distance.topk(k, dim=-1, largest=False).values
        found = distance.gather(1, index[row].long())
        torch.testing.assert_close(found, nearest, rtol=2e-6, atol=1e-30)
        assert bool((index[row].long().sort(-1).values.diff() > 0).all())


@pytest.mark.parametrize(("n", "d", "k"), SIZES)
def test_the_nearest_are_found_exactly(n, d, k):
    points = torch.randn(n, d).to(DEVICE)
    index, lost = search(points, k)
    assert index.shape == (n, k) and index.dtype == torch.int32
    assert not lost.numel()
    assert_nearest(index, points, k)


@pytest.mark.parametrize("spread", [1e-3, 1e-5])
def test_tight_clusters_far_apart_lose_nothing(spread):
    centres = 1000 + 100 * torch.randn(30, 24)
    points = centres[torch.randint(0, 30, (N,))] + 1000 * spread * torch.randn(N, 24)
    points = points.to(DEVICE)
    index, lost = search(points, 8)
    kept = torch.ones(N, dtype=torch.bool, device=DEVICE)
    kept[lost] = False
    assert bool(kept.any())
    assert_nearest(index, points, 8, kept.nonzero().squeeze(-1))
    assert_nearest(knn(points, 8, backend="triton").index, points, 8)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**96])
def test_tiny_and_huge_coordinates_and_an_outlier(scale):
    points = torch.randn(N, 5)
    points[7] *= 1e5
    index, lost = search((points * scale).to(DEVICE), 5)
    assert lost.tolist() in ([], [7])  # from far away all others look equally near
    rows = torch.cat([torch.arange(7), torch.arange(8, N)]).to(DEVICE)
    assert_nearest(index, points.to(DEVICE), 5, rows)


def test_ties_go_by_number():
    points = torch.arange(N).float().unsqueeze(1).to(DEVICE)
    index, lost = search(points, 4)
    assert not lost.numel()
    inner = torch.arange(2, N - 2, dtype=torch.int32, device=DEVICE).unsqueeze(1)
    offsets = torch.tensor([-1, 1, -2, 2], dtype=torch.int32, device=DEVICE)
    assert torch.equal(index[2:-2], inner + offsets)


def test_rows_with_more_candidates_than_room_are_reported():
    points = torch.randn(300, 16).to(DEVICE)
    index, lost = search(points, 60, capacity=128)
    assert 0 < lost.numel() < 300
    kept = torch.ones(300, dtype=torch.bool, device=DEVICE)
    kept[lost] = False
    assert_nearest(index, points, 60, kept.nonzero().squeeze(-1))


def test_many_duplicates_fall_back_to_the_plain_search():
    points = torch.randn(2, 6).repeat(N, 1).to(DEVICE)
    _, lost = search(points, 5)
    assert lost.numel() >= N
    index = knn(points, 5, backend="triton").index
    assert_nearest(index, points, 5)
    assert bool(((index - torch.arange(2 * N, device=DEVICE).unsqueeze(1)) % 2 == 0).all())


def test_two_runs_give_the_same_table():
    points = torch.randn(N, 40).half().to(DEVICE)
    first, second = search(points, 30), search(points, 30)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_it_agrees_with_the_exact_backend_in_either_metric():
    points = (torch.randn(N, 12) + 5).to(DEVICE)
    for metric in ("euclidean", "cosine"):
        found, want = (knn(points, 9, metric=metric, backend=b) for b in ("triton", "exact"))
        assert found.method == "triton" and found.recall is None
        assert float((found.index == want.index).float().mean()) > 0.999


def _curved(n):
    """Points of a curved sheet, with noise: near ones lie in few tiles."""
    generator = torch.Generator().manual_seed(0)
    place = torch.randn(n, 2, generator=generator)
    turned = place @ torch.randn(2, 16, generator=generator)
    return (turned.cos() + 0.1 * torch.randn(n, 16, generator=generator)).to(DEVICE)


def test_a_partitioned_search_of_all_tiles_loses_nothing():
    points = _curved(N)  # the last tile is not full
    assert_nearest(search_partitioned(points, 8, tiles=-(-N // 128)), points, 8)


def test_a_partitioned_search_finds_most_in_few_tiles_and_the_same_twice():
    n, tiles = (600, 3) if INTERPRETED else (200_000, 128)
    points = _curved(n)
    found = search_partitioned(points, 8, tiles=tiles)
    assert torch.equal(found, search_partitioned(points, 8, tiles=tiles))
    rows = torch.arange(0, n, max(1, n // 500), device=points.device)
    distance = torch.cdist(points[rows], points)
    distance[torch.arange(len(rows), device=rows.device), rows] = torch.inf
    true = distance.topk(8, largest=False).indices
    assert bool((found[rows].long() != rows.unsqueeze(1)).all())
    assert bool((found[rows].sort(-1).values.diff() > 0).all())
    recall = (found[rows].long().unsqueeze(-1) == true.unsqueeze(1)).any(-1).float().mean()
    assert recall > (0.85 if INTERPRETED else 0.98)


@pytest.mark.parametrize(
    ("points", "k", "message"),
    [
        (torch.zeros(300, 2), 257, "k up to 256"),
        (torch.zeros(4, 513), 2, "512 dimensions"),
        (torch.zeros(4, 2, dtype=torch.float64), 2, "float32"),
    ],
)
def test_what_it_cannot_take_is_said(points, k, message):
    with pytest.raises(ValueError, match=message):
        knn(points.to(DEVICE), k, backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="auto asks for a CUDA device")
def test_auto_takes_it_where_it_pays():
    assert knn(torch.randn(20_000, 16, device="cuda"), 5).method == "triton"
    assert knn(torch.randn(20_000, 16, device="cuda").double(), 5).method == "exact"
    assert knn(torch.randn(100, 16, device="cuda"), 5).method == "exact"
