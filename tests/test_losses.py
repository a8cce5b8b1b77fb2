"""Losses against their plain dense definitions, written out here."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipar_sparse.geometry.gauge import gauge_fix
from ipar_sparse.graph import NeighborTable, knn
from ipar_sparse.supervision.losses import (
    e_geo,
    gate_loss,
    geometry_terms,
    log_stress_loss,
    repulsion_loss,
    rw_kl_loss,
    walk_entropy_loss,
)
from ipar_sparse.supervision.targets import build_target, build_walk_target, collate, gate_target

SIZES = [24, 96, 200, 330]  # 3, 3, 4 and 5 steps


def points(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 + 50 * torch.rand(n, 2, generator=generator, dtype=torch.float64)


def layout(n, seed=1, true=None, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    start = torch.zeros(n, 2, dtype=torch.float64) if true is None else true
    return gauge_fix(start + noise * torch.randn(n, 2, generator=generator, dtype=torch.float64))


def plain_walk(pos, reference):
    """D^-1 (W + W^T) / 2 at ``pos``, neighbours and widths of ``reference``; (n, n)."""
    n = len(reference)
    k = min(n - 1, max(20, math.floor(0.15 * n)))
    distance = torch.cdist(reference, reference, compute_mode="donot_use_mm_for_euclid_dist")
    distance.fill_diagonal_(math.inf)
    near = distance.topk(k, largest=False)
    sigma = near.values[:, -1].clamp(min=1e-8)
    member = torch.zeros(n, n, dtype=pos.dtype).scatter(1, near.indices, 1.0)
    square = (pos[:, None] - pos[None]).square().sum(-1)
    weight = member * torch.exp(-square / (sigma[:, None] * sigma[None] + 1e-10))
    weight = 0.5 * (weight + weight.T)
    return weight / weight.sum(1, keepdim=True)


def plain_rw_kl(pos, reference):
    n = len(reference)
    steps = 3 if n <= 160 else 4 if n <= 300 else 5
    true, walk = plain_walk(reference, reference), plain_walk(pos, reference)
    total = 0.0
    for s in range(1, steps + 1):
        p, q = torch.linalg.matrix_power(true, s), torch.linalg.matrix_power(walk, s)
        rows = (p * (p.clamp(min=1e-8).log() - q.clamp(min=1e-8).log())).sum(1)
        total = total + 0.5 ** (s - 1) * rows.mean()
    return total


def gradient(loss, pos):
    pos = pos.clone().requires_grad_()
    value = loss(pos)
    return value.detach(), torch.autograd.grad(value, pos)[0]


@pytest.mark.parametrize("n", SIZES)
def test_rw_kl_equals_plain_definition(n):
    true = gauge_fix(points(n))
    pos = layout(n, true=true)
    walk = build_walk_target(points(n))
    value, grad = gradient(lambda x: rw_kl_loss(x, walk), pos)
    plain_value, plain_grad = gradient(lambda x: plain_rw_kl(x, true), pos)
    assert plain_value > 0.01
    torch.testing.assert_close(value, plain_value, atol=1e-10, rtol=0)
    torch.testing.assert_close(grad, plain_grad, atol=1e-10, rtol=0)


@pytest.mark.parametrize("n", [24, 200])
def test_probe_rows_are_exact_when_all_are_drawn(n, monkeypatch):
    walk = build_walk_target(points(n))
    pos = layout(n, true=walk.pos)
    value, grad = gradient(lambda x: rw_kl_loss(x, walk), pos)
    monkeypatch.setattr("ipar_sparse.supervision.losses.DENSE_LIMIT", 0)
    monkeypatch.setattr("ipar_sparse.supervision.losses.BLOCK_ELEMENTS", 7 * n)
    sparse_value, sparse_grad = gradient(lambda x: rw_kl_loss(x, walk, probe_rows=n), pos)
    torch.testing.assert_close(sparse_value, value, atol=1e-12, rtol=0)
    torch.testing.assert_close(sparse_grad, grad, atol=1e-12, rtol=0)


def test_probe_rows_are_unbiased():
    n, m = 60, 7
    walk = build_walk_target(points(n))
    pos = layout(n, true=walk.pos)
    generator = torch.Generator().manual_seed(3)
    draws = torch.stack([rw_kl_loss(pos, walk, m, generator) for _ in range(2000)])
    exact = rw_kl_loss(pos, walk)
    error = draws.std() / len(draws) ** 0.5
    assert error < 0.02 * exact
    assert abs(draws.mean() - exact) < 4 * error


def test_probe_rows_follow_the_generator():
    walk = build_walk_target(points(60))
    pos = layout(60, true=walk.pos)
    first, again, other = (
        rw_kl_loss(pos, walk, 5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_gradcheck():
    target = build_target(points(14))
    pos = layout(14, true=target.pos).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rw_kl_loss(x, target.walk), pos)
    assert torch.autograd.gradcheck(
        lambda x: rw_kl_loss(x, target.walk, 5, torch.Generator().manual_seed(0)), pos
    )
    assert torch.autograd.gradcheck(lambda x: log_stress_loss(x, target.stress), pos)
    assert torch.autograd.gradcheck(lambda x: walk_entropy_loss(x, target.walk), pos)
    near = (0.1 * pos).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: repulsion_loss(x, torch.Generator().manual_seed(0)), near
    )
    graph = knn(target.pos, 5)
    logits = torch.randn(graph.num_edges, 2, dtype=torch.float64, requires_grad=True)
    p = gate_target(graph, target.walk)
    assert torch.autograd.gradcheck(lambda g: gate_loss(g, graph, p), logits)


@pytest.mark.parametrize("n", SIZES)
def test_log_stress_equals_plain_definition(n):
    target = build_target(points(n))
    pos = layout(n, true=target.pos)

    def plain(x):
        ratio = []
        for i, j in target.stress.edge_index.T.tolist():
            true = (target.pos[i] - target.pos[j]).norm()
            ratio.append((x[i] - x[j]).norm().log() - true.log())
        ratio = torch.stack(ratio)
        return ((ratio - ratio.mean()) ** 2).mean()

    value, grad = gradient(lambda x: log_stress_loss(x, target.stress), pos)
    plain_value, plain_grad = gradient(plain, pos)
    assert plain_value > 0.01
    torch.testing.assert_close(value, plain_value, atol=1e-10, rtol=0)
    torch.testing.assert_close(grad, plain_grad, atol=1e-10, rtol=0)


@pytest.mark.parametrize("n", SIZES)
def test_walk_entropy_equals_plain_definition(n):
    walk = build_walk_target(points(n))
    pos = layout(n, true=walk.pos)

    def plain(x):
        step = plain_walk(x, walk.pos)
        return (step * step.clamp(min=1e-8).log()).sum(1).mean()

    value, grad = gradient(lambda x: walk_entropy_loss(x, walk), pos)
    plain_value, plain_grad = gradient(plain, pos)
    assert plain_value < -1
    torch.testing.assert_close(value, plain_value, atol=1e-10, rtol=0)
    torch.testing.assert_close(grad, plain_grad, atol=1e-10, rtol=0)


@pytest.mark.parametrize("step", [1, 2])
def test_gate_loss_equals_plain_definition(step):
    n, k = 90, 12
    walk = build_walk_target(points(n))
    embedding = torch.cat([walk.pos, 0.5 * torch.randn(n, 3, dtype=torch.float64)], 1)
    graph = knn(embedding, k)
    logits = torch.randn(graph.num_edges, dtype=torch.float64)

    def plain(g):
        true = torch.linalg.matrix_power(plain_walk(walk.pos, walk.pos), step)
        rows = []
        for i in range(n):
            p = true[i, graph.index[i].long()]
            if p.sum() == 0:
                continue
            p = p / p.sum()
            q = g.view(n, k)[i].softmax(0)
            rows.append(sum(a * (a / b).log() for a, b in zip(p, q, strict=True) if a > 0))
        return torch.stack(rows).mean()

    value, grad = gradient(lambda g: gate_loss(g, graph, gate_target(graph, walk, step)), logits)
    plain_value, plain_grad = gradient(plain, logits)
    torch.testing.assert_close(value, plain_value, atol=1e-10, rtol=0)
    torch.testing.assert_close(grad, plain_grad, atol=1e-10, rtol=0)


def test_gate_loss_leaves_out_rows_without_overlap_and_padding():
    walk = build_walk_target(points(60), k=4)
    full = knn(walk.pos, 59)
    far = full.index[:, -3:].clone()
    near = full.index[:, :3].clone()
    index = torch.where(torch.arange(60)[:, None] < 20, far, near)
    index[40:, 2] = -1
    index[59] = -1
    graph = NeighborTable(index, padded=True)
    logits = torch.randn(graph.num_edges, dtype=torch.float64, requires_grad=True)
    p = gate_target(graph, walk)
    loss = gate_loss(logits, graph, p)
    grad = graph.to_table(torch.autograd.grad(loss, logits)[0])
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
    assert (grad[:20] == 0).all() and (grad[20:59].abs().sum(1) > 0).all()
    rows = graph.to_table(p).sum(1)
    expected = torch.cat([torch.zeros(20), torch.ones(39), torch.zeros(1)]).double()
    torch.testing.assert_close(rows, expected)


def test_gate_loss_vanishes_at_the_reference_and_takes_heads():
    walk = build_walk_target(points(60))
    graph = knn(walk.pos, 10)
    p = gate_target(graph, walk)
    logits = p.log()
    assert gate_loss(logits, graph, p).abs() < 1e-12
    heads = torch.stack([logits, torch.randn_like(logits)], 1)
    expected = 0.5 * gate_loss(heads[:, 1], graph, p)
    torch.testing.assert_close(gate_loss(heads, graph, probability=p), expected)


def test_everything_vanishes_at_the_true_positions():
    for n in (*SIZES, 2, 3):
        target = build_target(points(n))
        walk = target.walk
        assert torch.equal(walk.transition(target.pos), walk.reference())
        assert rw_kl_loss(target.pos, walk).abs() < 1e-15
        assert rw_kl_loss(target.pos, walk, 3).abs() < 1e-15
        assert log_stress_loss(target.pos, target.stress) < 1e-28
        assert rw_kl_loss(target.pos.float(), walk).abs() < 1e-7
        assert log_stress_loss(target.pos.float(), target.stress) < 1e-10


def test_e_geo_is_gauge_free_and_adds_up():
    target = build_target(points(120))
    pos = layout(120, true=target.pos)
    angle = torch.tensor(0.7)
    turn = torch.tensor([[angle.cos(), angle.sin()], [angle.sin(), -angle.cos()]]).double()
    moved = 7.0 * pos @ turn + torch.tensor([3.0, -20.0])
    first, second = e_geo(pos, target), e_geo(moved, target)
    for name in ("e_geo", "l_rw", "l_stress"):
        torch.testing.assert_close(first[name], second[name], atol=1e-11, rtol=0)
    torch.testing.assert_close(first["e_geo"], first["l_rw"] + 0.1 * first["l_stress"])
    at_truth = e_geo(points(120) * 4 - 3, target)
    assert at_truth["e_geo"].abs() < 1e-14


def test_permutation_of_the_nodes_permutes_the_gradient():
    n = 80
    true = points(n)
    perm = torch.randperm(n)
    pos = layout(n, true=gauge_fix(true))
    walk, moved = build_walk_target(true), build_walk_target(true[perm])
    value, grad = gradient(lambda x: rw_kl_loss(x, walk), pos)
    moved_value, moved_grad = gradient(lambda x: rw_kl_loss(x, moved), pos[perm])
    torch.testing.assert_close(value, moved_value, atol=1e-13, rtol=0)
    torch.testing.assert_close(grad[perm], moved_grad, atol=1e-13, rtol=0)


def test_batches_are_the_graphs_side_by_side():
    sizes = [30, 170, 320]
    targets = [build_target(points(n, seed=n)) for n in sizes]
    batch = collate(targets)
    layouts = [layout(n, true=t.pos) for n, t in zip(sizes, targets, strict=True)]
    pos = torch.cat(layouts)
    parts = [e_geo(x, t) for x, t in zip(layouts, targets, strict=True)]
    merged = e_geo(pos, batch)
    share = torch.tensor(sizes).double() / sum(sizes)
    l_rw = sum(w * part["l_rw"] for w, part in zip(share, parts, strict=True))
    l_stress = sum(part["l_stress"] for part in parts) / 3
    torch.testing.assert_close(merged["l_rw"], l_rw, atol=1e-12, rtol=0)
    torch.testing.assert_close(merged["l_stress"], l_stress, atol=1e-12, rtol=0)
    probe = e_geo(pos, batch, probe_rows=519, generator=torch.Generator().manual_seed(0))
    assert abs(probe["l_rw"] - merged["l_rw"]) < 0.02 * merged["l_rw"]


def test_batched_probe_rows_keep_each_graphs_steps(monkeypatch):
    targets = [build_target(points(n, seed=n)) for n in (30, 170)]
    batch = collate(targets)
    pos = torch.cat([layout(len(t.pos), true=t.pos) for t in targets])
    value, grad = gradient(lambda x: rw_kl_loss(x, batch.walk), pos)
    monkeypatch.setattr("ipar_sparse.supervision.losses.DENSE_LIMIT", 0)
    sparse_value, sparse_grad = gradient(lambda x: rw_kl_loss(x, batch.walk), pos)
    torch.testing.assert_close(sparse_value, value, atol=1e-12, rtol=0)
    torch.testing.assert_close(sparse_grad, grad, atol=1e-12, rtol=0)


def test_repulsion_stays_within_graphs():
    pos = torch.tensor([[0.0, 0], [0.1, 0], [9, 0], [9, 0.1], [5, 5]], dtype=torch.float64)
    one_graph = repulsion_loss(pos, torch.Generator().manual_seed(0), num_pairs=4000)
    assert one_graph == pytest.approx(math.exp(-1) * 2 * 2 / 20, rel=0.1)
    batched = repulsion_loss(pos, torch.Generator().manual_seed(0), 50, sizes=(2, 2, 1))
    assert batched == pytest.approx(math.exp(-1) * 2 / 3, rel=1e-12)


def test_autocast_and_dtype():
    target = build_target(points(100))
    pos = layout(100, true=target.pos)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = rw_kl_loss(pos.float(), target.walk)
    assert value.dtype == torch.float32
    assert abs(value - rw_kl_loss(pos, target.walk)) < 1e-5
    assert rw_kl_loss(pos, target.walk).dtype == torch.float64


def test_far_layouts_keep_finite_losses_and_gradients():
    target = build_target(points(200))
    pos = 40 * layout(200).float()
    value, grad = gradient(lambda x: rw_kl_loss(x, target.walk), pos)
    assert torch.isfinite(value) and torch.isfinite(grad).all()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    copies=st.integers(1, 30),
    collapsed=st.booleans(),
    seed=st.integers(0, 100),
)
def test_odd_inputs_give_no_nan(n, copies, collapsed, seed):
    rng = np.random.default_rng(seed)
    xy = rng.integers(0, max(1, n // copies + 1), size=(n, 2)).astype(float)
    target = build_target(xy, seed=seed)
    start = torch.zeros(n, 2) if collapsed else target.pos
    pos = start.double().clone().requires_grad_()
    loss = (
        rw_kl_loss(pos, target.walk)
        + rw_kl_loss(pos, target.walk, max(1, n // 2))
        + log_stress_loss(pos, target.stress)
        + walk_entropy_loss(pos, target.walk)
        + repulsion_loss(pos)
        + e_geo(pos, target)["e_geo"]
    )
    grad = torch.autograd.grad(loss, pos)[0]
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
    if not collapsed:
        assert rw_kl_loss(pos, target.walk).abs() < 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(96, 384), (20_000,)])
def test_losses_on_cuda_never_wait_and_agree_with_cpu(sizes):
    target = collate([build_target(points(n, n), multiscale=True) for n in sizes])
    pos = layout(sum(sizes), true=target.pos).float()
    probes = None if len(sizes) > 1 else 64
    names = ["rw_kl", "stress_log", "multiscale", "gram", "long_range", "repulsion", "entropy_reg"]

    def losses(x, at):
        generator = torch.Generator().manual_seed(0)
        terms = geometry_terms(x, at, names, probe_rows=probes, generator=generator)
        torch.stack(list(terms.values())).sum().backward()
        return terms

    start = pos.clone().requires_grad_()
    expected = losses(start, target)
    target, moved = target.to("cuda"), pos.cuda().requires_grad_()
    losses(moved, target)  # fills the caches
    moved.grad = None
    torch.cuda.synchronize()
    generator = torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        geometry_terms(moved, target, names, probe_rows=probes, generator=generator)
        found = losses(moved, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in names:
        torch.testing.assert_close(found[name].cpu(), expected[name], rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(moved.grad.cpu(), start.grad, rtol=1e-2, atol=1e-4)


def test_mistakes_are_named():
    target = build_target(points(20))
    graph = knn(target.pos, 4)
    with pytest.raises(ValueError, match="probe_rows"):
        rw_kl_loss(target.pos, target.walk, 0)
    with pytest.raises(ValueError, match="do not match"):
        rw_kl_loss(target.pos[:10], target.walk)
    with pytest.raises(ValueError, match="one logit"):
        gate_loss(torch.zeros(3), graph, gate_target(graph, target.walk))
