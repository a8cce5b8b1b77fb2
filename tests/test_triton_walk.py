"""The fused random walk against plain sparse products in float64, value and gradient.

On a GPU, or with TRITON_INTERPRET=1 at small sizes on the CPU.
"""

import os

import pytest
import torch

pytest.importorskip("triton")

from ipar_sparse.ops import triton_held_walk, triton_walk
from ipar_sparse.supervision import held
from ipar_sparse.supervision.held import held_walk
from ipar_sparse.supervision.losses import probe_kl, rw_kl_loss
from ipar_sparse.supervision.neighbors import spatial_neighbors
from ipar_sparse.supervision.targets import build_walk_target, collate_walks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
N, K, PROBES = (40, 4, 19) if INTERPRETED else (4000, 20, 150)


def points(n, seed=0):
    return torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def walk_of(kind):
    if kind == "one step":
        return build_walk_target(points(N), K, steps=1)
    if kind == "batch":
        return collate_walks(
            [build_walk_target(points(n), K, steps) for n, steps in ((N // 2, 2), (N, 4))]
        )
    if kind == "duplicates":
        return build_walk_target(points(N).round(), K)
    return build_walk_target(points(N), K, steps=5)


def relative(got, want):
    return float((got.cpu().double() - want).norm() / want.norm().clamp(min=1e-6))


@pytest.mark.parametrize("kind", ["plain", "one step", "batch", "duplicates"])
def test_transition_and_divergence_are_the_definition(kind):
    walk = walk_of(kind)
    n = walk.num_nodes
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(1))[:PROBES]
    start = walk.pos + 0.1 * points(n, 2)

    exact = start.clone().requires_grad_()
    values = walk.transition(exact)
    loss = probe_kl(values, walk, rows)
    (grad,) = torch.autograd.grad(loss, exact)

    found, there = start.float().to(DEVICE).requires_grad_(), walk.to(DEVICE)
    steps = torch.arange(1, walk.steps + 1, device=DEVICE).unsqueeze(-1)
    rows = rows.to(DEVICE)
    weight = (there.row_steps[rows] >= steps) * 0.5 ** (steps - 1)
    for _ in range(2):
        ours = triton_walk.transition(found, there)
        total = triton_walk.probe_divergence(ours, there, rows, weight)
        (slope,) = torch.autograd.grad(total, found)
        results = [ours.detach(), total.detach(), slope]
    again = triton_walk.probe_divergence(ours.detach(), there, rows, weight)
    assert torch.equal(again, results[1])
    assert relative(results[0], values.detach()) < 1e-5
    assert relative(results[1], loss.detach()) < 1e-4
    assert relative(results[2], grad) < 1e-4


def test_walks_in_parts_add_up(monkeypatch):
    walk = walk_of("plain").to(DEVICE)
    pos = (walk.pos + 0.1 * points(N, 2).to(DEVICE)).float()
    rows = torch.arange(PROBES, device=DEVICE)
    weight = torch.rand(walk.steps, PROBES, device=DEVICE)
    totals = []
    for size in (1 << 40, 1):
        monkeypatch.setattr(triton_walk, "STATE_BYTES", size)
        values = triton_walk.transition(pos, walk).requires_grad_()
        total = triton_walk.probe_divergence(values, walk, rows, weight)
        totals.append((total.detach(), *torch.autograd.grad(total, values)))
    for one, other in zip(*totals, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_true_positions_cost_nothing():
    walk = walk_of("plain").to(DEVICE)
    values = triton_walk.transition(walk.pos.float(), walk)
    rows = torch.arange(PROBES, device=DEVICE)
    weight = torch.ones(walk.steps, PROBES, device=DEVICE)
    limit = 1e-5 if INTERPRETED else 0.0  # there the reference is computed by torch
    assert abs(float(triton_walk.probe_divergence(values, walk, rows, weight))) <= limit
    assert abs(float(rw_kl_loss(walk.pos.float(), walk, PROBES))) < 1e-5


@pytest.mark.parametrize("number", [0, 1])
def test_rows_of_one_rank_are_the_definition(number, monkeypatch):
    monkeypatch.setattr(held, "size", lambda: 2)
    monkeypatch.setattr(held, "rank", lambda: number)
    true = points(N - 1)
    walk = held_walk(true, spatial_neighbors(true, K), 5, sampled=True)
    pos = (true + 0.1 * points(N - 1, 2)).requires_grad_()
    values, logit, norm = held._Transition.apply(pos, walk)
    grad = torch.randn(values.shape, generator=torch.Generator().manual_seed(3)).double()
    (slope,) = torch.autograd.grad(values, pos, grad)

    there, found = walk.to(DEVICE), pos.detach().float().to(DEVICE)
    ours = triton_held_walk.transition(found, there)
    back = triton_held_walk.transition_backward(found, ours[0], grad.float().to(DEVICE), there)
    for got, want in zip((*ours, back), (values, logit, norm, slope), strict=True):
        assert relative(got, want.detach()) < 1e-5


@pytest.mark.parametrize("steps", [1, 5])
def test_walks_on_held_rows_are_the_definition(steps):
    true, width = points(N), 16
    walk = held_walk(true, spatial_neighbors(true, K), steps, sampled=True)
    pos = (true + 0.1 * points(N, 2)).requires_grad_()
    rows = torch.randperm(N, generator=torch.Generator().manual_seed(1))[:PROBES]
    values, turned = walk.both_ways(pos)
    reference = walk.reference(torch.float64)
    total = held._Divergence.apply(values, turned, reference, walk, rows)
    (slope,) = torch.autograd.grad(total, values)

    there = walk.to(DEVICE)
    given = [one.detach().float().to(DEVICE) for one in (values, turned, reference)]
    for learns in (True, False):
        ours = triton_held_walk.divergence(*given, there, rows.to(DEVICE), width, learns)
        assert relative(ours[0], total.detach()) < 1e-4
    assert not ours[1].any()
    slopes = triton_held_walk.divergence(*given, there, rows.to(DEVICE), width, True)[1]
    assert relative(slopes, slope) < 1e-4
