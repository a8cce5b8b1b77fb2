"""Targets: which pairs, which distances, which weights."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from ipar_sparse.geometry.gauge import gauge_fix
from ipar_sparse.supervision.targets import (
    build_target,
    build_walk_target,
    collate,
    default_k,
    default_steps,
)


def points(n, seed=0):
    return 1000 * np.random.default_rng(seed).random((n, 2))


def plain_sets(xy):
    """Neighbour pairs, ring limits and landmark pairs, from the full distance matrix."""
    n = len(xy)
    distance = cdist(xy, xy)
    order = np.argsort(distance + np.where(np.eye(n), np.inf, 0), axis=1)
    k = min(n - 1, max(20, math.floor(0.15 * n)))
    near = {(min(i, j), max(i, j)) for i in range(n) for j in order[i, :k]}
    limits = np.percentile(distance[np.triu_indices(n, 1)], [20, 60])
    chosen = [int(np.argmax(np.linalg.norm(xy, axis=1)))]
    while len(chosen) < min(n, max(8, n // 16)):
        chosen.append(int(distance[:, chosen].min(1).argmax()))
    landmark = {
        (min(i, j), max(i, j))
        for i in range(n)
        if (j := chosen[int(distance[i, chosen].argmin())]) != i
    }
    return distance, near, limits, landmark


@pytest.mark.parametrize(
    ("n", "k", "steps"), [(1, 0, 3), (10, 9, 3), (96, 20, 3), (161, 24, 4), (384, 57, 5)]
)
def test_neighbours_and_steps_by_size(n, k, steps):
    assert (default_k(n), default_steps(n)) == (k, steps)
    walk = build_walk_target(points(n))
    assert walk.steps == steps and (walk.row_steps == steps).all()


@pytest.mark.parametrize("n", [30, 150])
def test_walk_pairs_widths_and_halves(n):
    walk = build_walk_target(points(n))
    xy = gauge_fix(torch.from_numpy(points(n))).numpy()
    distance = cdist(xy, xy) + np.where(np.eye(n), np.inf, 0)
    k = default_k(n)
    order = np.argsort(distance, axis=1)[:, :k]
    lists = [set(row) for row in order.tolist()]
    sigma = np.sort(distance, axis=1)[:, k - 1]
    np.testing.assert_allclose(walk.sigma.numpy(), sigma, atol=1e-14)
    halves = 0
    for p, (i, j) in enumerate(walk.pair.T.tolist()):
        directions = (j in lists[i]) + (i in lists[j])
        assert i < j and directions >= 1
        assert walk.log_multiplicity[p].item() == pytest.approx(math.log(directions / 2))
        halves += directions == 1
    assert walk.pair.size(1) == len({frozenset((i, j)) for i in range(n) for j in lists[i]})
    assert halves > 0


@pytest.mark.parametrize("sizes", [(40,), (25, 60, 31)])
def test_pattern_is_symmetric_csr(sizes):
    target = collate([build_target(points(n, n)) for n in sizes])
    walk = target.walk
    n = sum(sizes)
    key = walk.row * n + walk.col
    assert (key[1:] > key[:-1]).all()
    assert torch.equal(walk.row[walk.transposed], walk.col)
    assert torch.equal(walk.col[walk.transposed], walk.row)
    ends = torch.stack([walk.row, walk.col]).sort(0).values
    assert torch.equal(walk.pair[:, walk.entry_pair], ends)
    counts = torch.bincount(walk.row, minlength=n)
    assert torch.equal(walk.rowptr.diff(), counts)
    rows = torch.zeros(n, dtype=torch.float64).index_add_(0, walk.row, walk.reference())
    torch.testing.assert_close(rows, torch.ones(n, dtype=torch.float64))
    assert torch.equal(target.batch[walk.row], target.batch[walk.col])
    assert torch.equal(walk.edge_index, torch.stack([walk.col, walk.row]))
    assert target.sizes == tuple(sizes)
    assert torch.equal(target.batch.bincount(), torch.tensor(sizes))


@pytest.mark.parametrize("n", [40, 130])
def test_stress_pairs_are_the_three_families(n):
    stress = build_target(points(n), seed=3).stress
    xy = gauge_fix(torch.from_numpy(points(n))).numpy()
    distance, near, (low, high), landmark = plain_sets(xy)
    pairs = {tuple(pair) for pair in stress.edge_index.T.tolist()}
    assert len(pairs) == stress.edge_index.size(1) and all(i < j for i, j in pairs)
    assert near <= pairs and landmark <= pairs
    ring = pairs - near - landmark
    assert ring and all(low <= distance[i, j] <= high for i, j in ring)
    for i in range(n):
        inside = ((distance[i] >= low) & (distance[i] <= high)).sum()
        partners = [p for p in pairs if i in p and low <= distance[p] <= high]
        assert len(partners) >= min(10, inside)
    first, second = stress.edge_index.numpy()
    np.testing.assert_allclose(stress.dist.numpy(), distance[first, second], atol=1e-14)


def test_stress_edge_counts_of_minisets():
    for n, expected in ((96, 1800), (384, 16100)):
        count = build_target(points(n)).stress.edge_index.size(1)
        assert count == pytest.approx(expected, rel=0.08)


def test_stress_is_deterministic_in_the_seed():
    first, again, other = (build_target(points(90), seed=seed).stress for seed in (1, 1, 2))
    assert torch.equal(first.edge_index, again.edge_index)
    assert not torch.equal(first.edge_index, other.edge_index)


def test_targets_are_gauge_free():
    first = build_target(points(80))
    second = build_target(points(80) * 0.001 - 5)
    torch.testing.assert_close(first.pos, second.pos, atol=1e-9, rtol=0)
    assert torch.equal(first.walk.pair, second.walk.pair)
    torch.testing.assert_close(first.pos.square().sum(-1).mean(), torch.tensor(1.0).double())


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 60), grid=st.integers(1, 8), seed=st.integers(0, 50))
def test_duplicates_and_ties_build(n, grid, seed):
    xy = np.random.default_rng(seed).integers(0, grid, size=(n, 2)).astype(float)
    target = build_target(xy, seed=seed)
    walk, stress = target.walk, target.stress
    assert (walk.sigma > 0).all() and (stress.dist > 0).all()
    values = walk.reference()
    assert torch.isfinite(values).all()
    rows = torch.zeros(n, dtype=torch.float64).index_add_(0, walk.row, values)
    expected = (walk.rowptr.diff() > 0).double()
    torch.testing.assert_close(rows, expected)
    assert (walk.rowptr.diff() >= min(n - 1, 20)).all()


def test_bad_positions_are_named():
    bad = points(5)
    bad[3, 1] = np.nan
    with pytest.raises(ValueError, match="node 3"):
        build_target(bad)
    with pytest.raises(ValueError, match=r"\(n, 2\)"):
        build_target(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="at least one"):
        collate([])


def test_moving_to_a_device_keeps_everything():
    target = collate([build_target(points(20)), build_target(points(30))])
    assert target.to("cpu") is target
    moved = target.to("meta")
    assert moved.walk.row.is_meta and moved.stress.dist.is_meta and moved.sizes == (20, 30)
