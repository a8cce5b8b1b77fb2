"""Refinement: what it minimises, what it leaves as it is, and what it gains."""

import math

import numpy as np
import pytest
import torch

from ipar_sparse.geometry.alignment import align
from ipar_sparse.geometry.gauge import gauge_fix
from ipar_sparse.graph import NeighborTable, knn
from ipar_sparse.layout.refinement import refine_layout, repulsion
from ipar_sparse.metrics.layout import evaluate_layout

K = 15


def objective(x, start, index, anchor_weight):
    """The definition, over all pairs and in float64."""
    unit = 0.5 * math.sqrt(index.shape[1] / len(x))
    square = (x[:, None] - x[None]).square().sum(-1)
    q = 1 / (1 + square / unit**2)
    attraction = -q.log().gather(1, index.long()).mean()
    off = ~torch.eye(len(x), dtype=torch.bool)
    return attraction + q[off].mean().log() + anchor_weight * (x - start).square().sum(-1).mean()


@pytest.fixture(scope="module")
def blurred():
    """Cells on a disc, and the layout of a model that knows each only to a few cells."""
    rng = np.random.default_rng(0)
    true = rng.uniform(-1, 1, (3000, 2))
    true = torch.from_numpy(true[(true**2).sum(1) < 1])
    blur = true + 0.08 * torch.from_numpy(rng.standard_normal(true.shape))
    return true, blur, knn(true, K)


def test_the_objective_falls_to_where_its_own_gradient_leads():
    rng = torch.Generator().manual_seed(0)
    true = torch.randn(150, 2, generator=rng, dtype=torch.float64)
    pos = gauge_fix(true + 0.7 * torch.randn(150, 2, generator=rng, dtype=torch.float64))
    graph = knn(true, K)
    x = pos.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([x], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = objective(x, pos, graph.index, 2.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    best, start = objective(x.detach(), pos, graph.index, 2.0), objective(pos, pos, graph.index, 2)
    # the gauge of the result is the start's again; the anchor allows for that
    own = refine_layout(pos, graph, steps=1000, neighbors=K, anchor_weight=2.0)
    found, _ = align(own, x.detach())
    reached = objective(torch.from_numpy(found), pos, graph.index, 2.0)
    assert start - best > 0.2
    assert reached - best < 0.1 * (start - best)


def test_cells_repel_as_in_the_objective():
    """With all shifts the estimate is exact, whatever the number of near cells."""
    n, unit = 60, 0.3
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_(True)
    off = ~torch.eye(n, dtype=torch.bool)
    q = 1 / (1 + (x[:, None] - x[None]).square().sum(-1)[off] / unit**2)
    (wanted,) = torch.autograd.grad(q.mean().log(), x)
    x = x.detach()
    for count in (1, 8, n - 1):
        near = knn(x, count).index.long()
        reach = (x - x[near[:, -1]]).square().sum(1)
        found = repulsion(x, unit, near, reach, list(range(1, n)))
        torch.testing.assert_close(-4 / unit**2 / n * found, wanted, rtol=1e-9, atol=1e-12)
    # one shift is right on average, also after cells have moved since the search
    near = knn(x, 8).index.long()
    reach = (x - x[near[:, -1]]).square().sum(1)
    moved = x + 0.05 * torch.randn(n, 2, generator=torch.Generator().manual_seed(1))
    draws = torch.stack([repulsion(moved, unit, near, reach, [s, n - s]) for s in range(1, n)])
    assert float((draws - draws.mean(0)).norm()) > 0.1
    whole = repulsion(moved, unit, near, reach, list(range(1, n)))
    assert float((draws.mean(0) - whole).norm() / whole.norm()) < 0.1


def test_a_blurred_layout_becomes_sharp_and_stays_in_place(blurred):
    true, blur, graph = blurred
    before, after = (
        evaluate_layout(x.numpy(), true.numpy()) for x in (blur, refine_layout(blur, graph))
    )
    assert before["neighbor_hit@15"] < 0.45
    assert after["neighbor_hit@15"] > before["neighbor_hit@15"] + 0.25
    assert after["distance_spearman"] > before["distance_spearman"]
    assert after["procrustes"] < before["procrustes"]


def test_scale_and_numbering_do_not_matter(blurred):
    _, blur, graph = blurred
    one = refine_layout(blur, graph, seed=3)
    # rounding decides between cells that are as good as equally near
    scaled = (refine_layout(7 * blur + 2, graph, seed=3) - one).norm(dim=-1)
    assert float(scaled.median()) < 2e-3 and float(scaled.quantile(0.99)) < 2e-2
    perm = torch.randperm(len(blur), generator=torch.Generator().manual_seed(1))
    other = refine_layout(blur[perm], graph.permute(perm), seed=3)
    # another random order, the same landscape
    assert float((other - one[perm]).norm(dim=-1).median()) < 0.02


def test_two_runs_give_the_same_bits(blurred):
    _, blur, graph = blurred
    assert torch.equal(refine_layout(blur, graph), refine_layout(blur, graph))


def test_missing_candidates_attract_nobody(blurred):
    _, blur, graph = blurred
    index = torch.nn.functional.pad(graph.index, (0, 3), value=-1)[:, :K]
    ragged = index.clone()
    ragged[::2, 5:] = -1
    padded = refine_layout(blur, NeighborTable(ragged, padded=True))
    assert torch.isfinite(padded).all()
    assert not torch.equal(padded, refine_layout(blur, graph))
    same = NeighborTable(graph.index, padded=True)
    torch.testing.assert_close(refine_layout(blur, same), refine_layout(blur, graph))


def test_a_strong_anchor_keeps_the_layout(blurred):
    _, blur, graph = blurred
    start = gauge_fix(blur)
    moved = [
        float((refine_layout(blur, graph, anchor_weight=a) - start).norm(dim=-1).mean())
        for a in (0.0, 1000.0)
    ]
    assert moved[1] < 0.1 * moved[0]


def test_a_layout_whose_neighbours_are_its_candidates_is_left_as_it_is(blurred):
    true, blur, graph = blurred
    overlaps = []
    for share in (0.2, 0.5, 0.8):  # of the way from the truth to the blur
        pos = true + share * (blur - true)
        near = knn(pos, K).index.long()
        hit = (graph.index.long().unsqueeze(2) == near.unsqueeze(1)).any(2).double().mean()
        overlaps.append(float(hit))
        assert refine_layout(pos, graph, skip_if_overlap=float(hit) - 0.02) is pos
        assert refine_layout(pos, graph, skip_if_overlap=float(hit) + 0.02) is not pos
    assert overlaps[0] > 0.6 > overlaps[1] > overlaps[2]


def test_a_layout_that_diverged_is_returned_as_it_is(blurred):
    _, blur, graph = blurred
    broken = blur * math.nan
    assert refine_layout(broken, graph) is broken


def test_coinciding_cells_stay_finite():
    pos = torch.zeros(100, 2)
    pos[50:] = 1.0
    found = refine_layout(pos, knn(torch.randn(100, 3), K))
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("steps, n", [(0, 100), (400, 39), (400, 3)])
def test_no_steps_and_too_few_cells_leave_a_layout_as_it_is(steps, n):
    pos = torch.randn(n, 2)
    assert refine_layout(pos, knn(torch.randn(n, 3), K), steps=steps) is pos


def test_a_graph_of_other_cells_is_refused():
    with pytest.raises(ValueError, match="100 cells and a graph of 90"):
        refine_layout(torch.randn(100, 2), knn(torch.randn(90, 3), K))


@pytest.mark.gpu
def test_on_the_gpu_it_is_the_same_layout(blurred):
    _, blur, graph = blurred
    here = refine_layout(blur.float(), graph)
    there = [refine_layout(blur.float().cuda(), graph.to("cuda")) for _ in range(2)]
    assert torch.equal(*there)
    assert float((there[0].cpu() - here).norm(dim=-1).median()) < 1e-2
