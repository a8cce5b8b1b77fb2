"""Targets of a slide of which ranks hold parts, on one rank: the definition, and bounded memory.

Several ranks are in ``test_distributed.py``.
"""

import pytest
import torch

from ipar_sparse import distributed as ranks
from ipar_sparse.graph import knn
from ipar_sparse.supervision import build_target, gate_target, geometry_terms, held
from ipar_sparse.supervision.held import held_stress, held_walk
from ipar_sparse.supervision.neighbors import sketch_neighbors
from ipar_sparse.supervision.walk import walk_from_neighbors

TERMS = ["rw_kl", "entropy_reg", "stress_log", "multiscale"]


def points(n, seed=0):
    return torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("probes", [20, 500])
@pytest.mark.parametrize("budget", [1, 3 << 30])
def test_a_held_target_is_the_whole_one(probes, budget, monkeypatch):
    monkeypatch.setattr(held, "STATE_BYTES", budget)
    monkeypatch.setattr(held, "_ENTRIES", 1000)
    found = []
    for whole in (True, False):
        target = build_target(points(450), multiscale=True, held=not whole)
        if not whole:
            target = target.held(100)
            assert type(target.stress) is type(target.multiscale) is held.HeldStress
        pos = (target.pos + 0.1 * points(450, 1)).requires_grad_()
        source = torch.Generator().manual_seed(2)
        draw = {"probe_rows": probes, "stress_pairs": 100, "generator": source}
        terms = geometry_terms(pos, target, TERMS, **draw)
        slopes = [torch.autograd.grad(one, pos, retain_graph=True)[0] for one in terms.values()]
        found.append([*terms.values(), *slopes])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_rows_of_all_ranks_are_the_walk(monkeypatch):
    pos = build_target(points(450)).pos
    index = sketch_neighbors(pos, 32, seed=0)
    walk = walk_from_neighbors(pos, index)
    entries = []
    monkeypatch.setattr(held, "size", lambda: 4)
    for number in range(4):
        monkeypatch.setattr(held, "rank", lambda number=number: number)
        part = held_walk(pos, index, 5, sampled=True)
        values = part.transition(pos)
        entries.append(torch.stack([part.row + part.start, part.col, values]))
        assert part.num_rows == len(range(450)[113 * number : 113 * (number + 1)])
    row, col, value = torch.cat(entries, 1)
    assert torch.equal(row.long(), walk.row) and torch.equal(col.long(), walk.col)
    torch.testing.assert_close(value, walk.reference(), rtol=1e-12, atol=0)


def test_a_held_walk_tells_the_gate_what_the_whole_one_does():
    pos, graph = points(450), knn(torch.randn(450, 3), 9)
    whole, part = (build_target(pos, held=one).walk for one in (False, True))
    rows = torch.randperm(450)[:100]
    found = gate_target(graph, part, rows=rows)
    assert torch.equal(found, graph.to_table(gate_target(graph, whole))[rows].flatten())
    assert float(found.sum()) > 50


def test_few_pairs_stay_on_every_rank():
    stress = build_target(points(50)).stress
    assert held_stress(stress, stress.dist.numel()) is stress
    part = held_stress(stress, 10)
    numbers = torch.tensor([3, 0, 3, 40])
    for name in ("edge_index", "dist", "edge_batch"):
        assert torch.equal(getattr(part.drawn(numbers), name), getattr(stress, name)[..., numbers])
    assert held_stress(part, 10) is part


def test_rows_are_gathered_with_zeros_where_there_are_fewer():
    rows = torch.arange(6.0).view(3, 2)
    assert torch.equal(ranks.gathered_rows(rows, 4), torch.cat([rows, torch.zeros(1, 2)]))
