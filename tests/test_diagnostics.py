import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform
from scipy.stats import entropy, spearmanr

from ipar_sparse.graph import NeighborTable, knn
from ipar_sparse.metrics import edges
from ipar_sparse.metrics.attention import (
    attention_entropy,
    attention_term_spearman,
    attn_recall,
    head_diversity,
    logit_std,
)
from ipar_sparse.metrics.candidates import (
    candidate_recall,
    gate_precision_recall,
    sampled_candidate_recall,
)
from ipar_sparse.metrics.diagnostics import HEALTHY, RecycleRecord, diagnose, health_warnings
from ipar_sparse.metrics.shape import (
    boundary_mass,
    collapse_diagnostics,
    density_correlation,
    step_sizes,
)


def cells(n, seed=0):
    return torch.rand(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_graph(n, k, seed=0, padded=False):
    rng = np.random.default_rng(seed)
    rows = [rng.permutation([j for j in range(n) if j != i])[:k] for i in range(n)]
    index = torch.from_numpy(np.stack(rows)).int()
    if padded:
        index[::3, k // 2 :] = -1
        index[1] = -1
    return NeighborTable(index, padded=padded)


def spatial_sets(pos, k):
    distance = squareform(pdist(pos.numpy()))
    np.fill_diagonal(distance, np.inf)
    return [set(row) for row in np.argsort(distance, axis=1)[:, :k]]


def softmax(graph, logits):
    table = graph.to_table(logits, fill=-math.inf)
    return graph.from_table(table.softmax(dim=1))


def rows_of(graph, values):
    """Per destination: its sources and the per-edge values."""
    src, dst = graph.edge_index
    return [(src[dst == i].numpy(), values[dst == i].numpy()) for i in range(graph.num_nodes)]


@pytest.mark.parametrize("padded", [False, True])
def test_candidate_recall_counts_true_neighbors_and_chance(padded):
    pos, graph = cells(60), random_graph(60, 20, padded=padded)
    truth = spatial_sets(pos, 8)
    rows = rows_of(graph, torch.zeros(graph.num_edges))
    expected = np.mean([len(set(src) & truth[i]) / 8 for i, (src, _) in enumerate(rows)])
    got = candidate_recall(graph, pos, 8)
    assert got["candidate_recall@8"] == pytest.approx(expected)
    assert got["candidate_recall_chance@8"] == pytest.approx(graph.num_edges / (60 * 59))
    assert "candidate_recall_lift" not in got  # a third of all cells: no lift to be had
    near = candidate_recall(knn(pos, 8), pos, 8)
    assert near["candidate_recall@8"] == 1.0
    assert near["candidate_recall_lift"] == pytest.approx(59 / 8)


@pytest.mark.parametrize("padded", [False, True])
def test_gate_precision_and_recall_equal_their_definitions(padded):
    pos, graph = cells(50, 1), random_graph(50, 24, padded=padded)
    logits = torch.randn(graph.num_edges, generator=torch.Generator().manual_seed(2))
    truth = spatial_sets(pos, 9)
    precision, recall, inside = [], [], 0
    for i, (src, value) in enumerate(rows_of(graph, logits)):
        inside += len(set(src) & truth[i])
        if len(src):
            best = set(src[np.argsort(-value)][:14])
            precision.append(len(best & truth[i]) / len(best))
            recall.append(len(best & truth[i]) / 9)
    got = gate_precision_recall(logits, graph, pos, k=14, true_k=9)
    assert got["gate_precision@14"] == pytest.approx(np.mean(precision))
    assert got["gate_recall@14"] == pytest.approx(np.mean(recall))
    assert got["candidate_precision"] == pytest.approx(inside / graph.num_edges)
    assert got["gate_lift"] == pytest.approx(np.mean(precision) * graph.num_edges / inside)


def test_a_gate_that_knows_the_distances_is_perfect():
    pos = cells(80, 3)
    graph = knn(pos, 60)
    src, dst = graph.edge_index
    got = gate_precision_recall(-(pos[src] - pos[dst]).norm(dim=-1), graph, pos, 30)
    assert got["gate_precision@30"] == got["gate_recall@30"] == 1.0
    assert got["candidate_precision"] == pytest.approx(0.5)


def test_attn_recall_looks_at_each_head_alone():
    pos = cells(70, 4)
    graph = knn(pos, 40)
    src, dst = graph.edge_index
    distance = (pos[src] - pos[dst]).norm(dim=-1)
    attention = softmax(graph, torch.stack([-distance, distance], dim=-1))
    near, far = attn_recall(attention, graph, pos, k=15)
    assert near == 1.0
    assert far == 0.0
    assert attn_recall(attention, graph, pos, k=15, true_k=25)[0] == 1.0


@pytest.mark.parametrize("padded", [False, True])
def test_entropy_std_and_spearman_equal_scipy(padded):
    graph = random_graph(40, 12, 5, padded)
    generator = torch.Generator().manual_seed(6)
    logits = 2 * torch.randn(graph.num_edges, 2, generator=generator, dtype=torch.float64)
    term = torch.randn(graph.num_edges, generator=generator, dtype=torch.float64) + logits[:, 0]
    attention = softmax(graph, logits)
    for h in range(2):
        rows = [
            (a, t)
            for (_, a), (_, t) in zip(
                rows_of(graph, attention[:, h]), rows_of(graph, term), strict=True
            )
            if len(a)
        ]
        expected = np.mean([entropy(a) for a, _ in rows])
        assert attention_entropy(attention, graph)[h] == pytest.approx(expected)
        expected = np.mean([entropy(a) / math.log(len(a)) for a, _ in rows])
        relative = attention_entropy(attention, graph, relative=True)
        assert relative[h] == pytest.approx(expected)
        expected = np.mean([spearmanr(a, t)[0] for a, t in rows])
        got = attention_term_spearman(attention, term, graph)
        assert got[h] == pytest.approx(expected)
    expected = logits.numpy().std(axis=0)
    np.testing.assert_allclose(logit_std(logits, graph), expected)
    removed = logits.clone()
    removed[::4] = -math.inf
    kept = torch.isfinite(removed[:, 0])
    expected = logits[kept].numpy().std(axis=0)
    np.testing.assert_allclose(logit_std(removed, graph), expected)


def test_a_constant_term_has_no_correlation():
    graph = random_graph(20, 6)
    attention = softmax(graph, torch.randn(graph.num_edges, 1))
    constant = torch.ones(graph.num_edges)
    assert attention_term_spearman(attention, constant, graph)[0] == 0.0


def test_head_diversity_is_mean_total_variation():
    graph = random_graph(30, 8)
    a = softmax(graph, torch.randn(graph.num_edges, 3, dtype=torch.float64))
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = np.mean([0.5 * (a[:, g] - a[:, h]).abs().sum().item() / 30 for g, h in pairs])
    assert head_diversity(a, graph) == pytest.approx(expected)
    assert head_diversity(a[:, :1].expand(-1, 3), graph) == 0.0


def test_blocks_of_rows_do_not_change_the_diagnostics(monkeypatch):
    pos, graph = cells(50, 1), random_graph(50, 24, padded=True)
    attention = softmax(graph, torch.randn(graph.num_edges, 2, dtype=torch.float64))
    whole = diagnose(graph, [RecycleRecord(attention, attention)], pos=pos, k=10)
    monkeypatch.setattr(edges, "ROW_BLOCK", 7)
    parts = diagnose(graph, [RecycleRecord(attention, attention)], pos=pos, k=10)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, abs=1e-12), name


def test_collapse_is_seen_and_does_not_depend_on_units():
    angle = torch.linspace(0, 2 * math.pi, 400)
    ring = torch.stack([angle.cos(), angle.sin()], -1)
    line = torch.stack([angle, 0.01 * angle.sin()], -1)
    disc = cells(4000) - 0.5
    disc = disc[disc.norm(dim=-1) < 0.5]
    assert boundary_mass(ring) > 0.95
    assert boundary_mass(disc) == pytest.approx(0.2, abs=0.03)
    assert boundary_mass(torch.ones(5, 2)) == 0.0
    assert collapse_diagnostics(line)["lambda_ratio"] < 0.001
    got = collapse_diagnostics(1e5 * disc[:500] + 7.0)
    unit = disc[:500] - disc[:500].mean(0)
    unit = unit / unit.square().sum(-1).mean().sqrt()
    assert got["median_distance"] == pytest.approx(np.median(pdist(unit.numpy())))
    small, large = np.linalg.eigvalsh(np.cov(unit.numpy().T))
    assert got["lambda_ratio"] == pytest.approx(small / large)
    assert collapse_diagnostics(torch.zeros(1, 2))["median_distance"] == 0.0


def test_density_correlation_follows_density_not_position():
    dense = torch.randn(600, 2, dtype=torch.float64)
    assert density_correlation(dense.flip(-1) * 3, dense) == pytest.approx(1.0)
    assert abs(density_correlation(cells(600), dense)) < 0.2
    assert density_correlation(torch.zeros(600, 2), dense) == 0.0


def test_step_sizes_are_root_mean_square_movements():
    pos = cells(100) - 0.5
    pos = pos - pos.mean(0)
    pos = pos / pos.square().sum(-1).mean().sqrt()
    turned = pos @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    assert step_sizes([pos, pos, turned]) == pytest.approx([0.0, math.sqrt(2)])


def test_health_warnings_give_value_place_and_meaning():
    found = {
        "attn_recall@30/r0/h0": 0.62,
        "attn_recall@30/r0/h1": 0.31,
        "attn_recall@30/r1/h0": 0.05,
        "logit_std/r0/h0": 33.0,
        "lambda_ratio": 0.3,
        "median_distance": math.nan,
        "unheard_of": -1.0,
    }
    lines = health_warnings(found)
    assert len(lines) == 3
    recall, std, median = lines
    assert "attn_recall@30 is 0.05 at recycle 2, head 1" in recall
    assert "at least 0.4; 2 of 3 places" in recall
    assert "logit_std is 33" in std and "one-hot" in std and "4 to 8" in std
    assert "median_distance" in median and "Undefined" in median
    assert not health_warnings({"attn_recall@30/r0/h0": 0.41, "logit_std/r0/h0": 5.0})


def test_diagnose_gathers_everything_that_has_a_healthy_range():
    pos = cells(200, 8)
    graph = knn(pos, 40)
    logits = torch.randn(graph.num_edges, 4)
    scalars = {"beta": torch.tensor(1.5), "eta": 0.2, "offset_norm": torch.tensor([0.1, 3.0])}
    terms = {"gate": logits[:, 0], "qk": logits}
    records = (RecycleRecord(softmax(graph, logits), logits, terms, scalars) for _ in range(2))
    got = diagnose(
        graph, records, pos=pos, trajectory=[pos, pos + 0.1 * pos.flip(0)], gate_logits=logits[:, 0]
    )
    assert {name.split("/")[0] for name in got} >= set(HEALTHY)
    assert got["term_spearman:gate/r1/h0"] == pytest.approx(1.0)
    assert "term_std:qk/r1/h3" in got and "step_size/r0" in got
    assert got["beta/r1"] == 1.5 and got["offset_norm/r0/h1"] == 3.0
    assert any("offsets reach across" in line for line in health_warnings(got))
    assert all(isinstance(value, float) for value in got.values())
    line = pos * torch.tensor([1.0, 0.01])
    after = diagnose(graph, pos=pos, trajectory=[pos, pos], final=line)
    assert after["lambda_ratio"] < 0.001 < 0.1 < got["lambda_ratio"] and after["step_size/r0"] == 0
    assert after["boundary_mass"] == boundary_mass(line)
    assert any("collapsed to a line" in text for text in health_warnings(after))


def test_one_cell_and_no_edges_are_not_an_error():
    graph = NeighborTable(torch.empty(1, 0, dtype=torch.int32))
    got = diagnose(
        graph,
        [RecycleRecord(torch.empty(0, 2))],
        pos=torch.zeros(1, 2),
        trajectory=[torch.zeros(1, 2)] * 2,
        gate_logits=torch.empty(0),
    )
    assert all(math.isfinite(value) for value in got.values())


def test_attention_of_another_graph_is_refused():
    graph = random_graph(10, 4)
    with pytest.raises(ValueError, match="E = 40 edges"):
        attention_entropy(torch.rand(39, 2), graph)
    with pytest.raises(ValueError, match="10 cells; given 9"):
        attn_recall(torch.rand(40, 2), graph, torch.rand(9, 2))


def test_recall_of_a_sample_is_that_of_all_cells_within_its_error():
    generator = torch.Generator().manual_seed(4)
    pos = torch.randn(900, 2, generator=generator).double()
    h = torch.cat([pos, pos.sin()], 1).float() + 0.3 * torch.randn(900, 4, generator=generator)
    whole = candidate_recall(knn(h, 30), pos)
    same = sampled_candidate_recall(h, pos, 30, cells=900)
    assert {name: same[name] for name in whole} == pytest.approx(whole)
    some = sampled_candidate_recall(h, pos, 30, cells=200)
    gap = abs(some["candidate_recall@15"] - whole["candidate_recall@15"])
    assert 0 < gap < 4 * some["candidate_recall_se@15"]
