"""Modules against their dense definitions, and what PyG expects of a layer."""

import pytest
import torch
from torch_geometric import EdgeIndex
from torch_geometric.data import Batch, Data

from benchmarks.dense import DenseBlock, DenseGate, DenseModel, dense_edges, dense_mask
from ipar_sparse import EdgeGateSoft, IPALiteConv, IPALiteModel, SharedEncoder
from ipar_sparse.geometry.gauge import gauge_fix, principal_plane
from ipar_sparse.graph import NeighborTable, knn_candidates
from ipar_sparse.nn import LOGIT_TERMS
from ipar_sparse.ops import chunked
from ipar_sparse.ops.selective_checkpoint import saved_or

N, K, D = 60, 12, 16


def scramble(module, seed=0, std=0.3):
    """Weights away from the zero initialisation, the same for equal state_dicts."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(module.named_parameters()):
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return module.double()


@pytest.fixture
def h():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, D, generator=generator, dtype=torch.float64)


@pytest.fixture
def graph(h):
    return knn_candidates(h, K)


def grads_of(loss, module, *tensors):
    given = [*tensors, *module.parameters()]
    grads = torch.autograd.grad(loss, given, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, given, strict=True)]


def assert_all_close(ours, theirs, tolerance=1e-10):
    """Equal to 1e-10 of the largest entry (of 1, where all are smaller)."""
    for a, b in zip(ours, theirs, strict=True):
        scale = max(1.0, float(b.detach().abs().max()))
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts():
    assert count(EdgeGateSoft(128)) == 37_057
    assert count(EdgeGateSoft(128, heads=4)) == 37_252
    assert count(IPALiteModel(128)) == 154_674
    assert count(IPALiteModel(128, terms=("mono",))) == 154_678


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("heads", [1, 4])
def test_gate_is_the_dense_gate(h, graph, backend, heads):
    sparse = scramble(EdgeGateSoft(D, heads=heads, backend=backend))
    dense = DenseGate(D, heads=heads).double()
    dense.load_state_dict(sparse.state_dict())
    assert list(sparse.state_dict())[:2] == ["mlp.0.weight", "mlp.0.bias"]
    src, dst = graph.edge_index
    h.requires_grad_()
    ours, theirs = sparse(h, graph), dense(h)[dst, src]
    assert_all_close([ours], [theirs])
    weigh = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view(ours.shape)
    assert_all_close(
        grads_of((ours * weigh).sum(), sparse, h), grads_of((theirs * weigh).sum(), dense, h)
    )


def test_gate_takes_an_edge_index_and_does_not_gate_self_loops(h, graph):
    gate = scramble(EdgeGateSoft(D))
    shuffle = torch.randperm(graph.num_edges)
    loops = torch.arange(N).repeat(2, 1)
    edge_index = torch.cat([graph.edge_index[:, shuffle], loops], dim=1)
    logits = gate(h, edge_index)
    torch.testing.assert_close(logits[:-N], gate(h, graph)[shuffle])
    assert bool((logits[-N:] == 0).all())
    table, perm = NeighborTable.from_edge_index(edge_index, N)
    torch.testing.assert_close(gate(h, table), logits[perm])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("bias_heads", [0, 1, 4])
def test_block_is_the_dense_block(graph, backend, bias_heads):
    generator = torch.Generator().manual_seed(1)
    conv = scramble(IPALiteConv(24, heads=4, head_channels=8, backend=backend))
    dense = DenseBlock(24, heads=4, head_channels=8).double()
    dense.load_state_dict(conv.state_dict())
    s = torch.randn(N, 24, generator=generator, dtype=torch.float64).requires_grad_()
    pos = torch.randn(N, 2, generator=generator, dtype=torch.float64).requires_grad_()
    given, bias, matrix = [s, pos], None, None
    if bias_heads:
        shape = (graph.num_edges, bias_heads)[:bias_heads]
        bias = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        matrix = dense_edges(bias, graph)
        given.append(bias)
    theirs = dense(s, pos, dense_mask(graph), matrix)
    expected = grads_of((theirs[0] ** 2).sum() + (theirs[1] ** 3).sum(), dense, *given)
    for edges in (graph, graph.edge_index):
        ours = conv(s, pos, edges, bias)
        assert_all_close(ours, theirs)
        got = grads_of((ours[0] ** 2).sum() + (ours[1] ** 3).sum(), conv, *given)
        assert_all_close(got, expected)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_model_is_the_dense_model(h, graph, shared, backend):
    sizes = {"channels": 24, "heads": 4, "head_channels": 8, "shared": shared}
    sparse = scramble(IPALiteModel(D, **sizes, backend=backend)).eval()
    dense = DenseModel(D, **sizes).double()
    dense.load_state_dict(sparse.state_dict())
    bias = torch.randn(graph.num_edges, dtype=torch.float64).requires_grad_()
    h.requires_grad_()
    ours = sparse(h, graph, edge_bias=bias)
    theirs = dense(h, dense_mask(graph), dense_edges(bias, graph))
    assert_all_close([ours], [theirs])
    weigh = torch.linspace(-1, 1, 2 * N, dtype=torch.float64).view(N, 2)
    assert_all_close(
        grads_of((ours * weigh).sum(), sparse, h, bias),
        grads_of((theirs * weigh).sum(), dense, h, bias),
    )


def test_the_gate_changes_the_output(h, graph):
    model, gate = scramble(IPALiteModel(D)).eval(), scramble(EdgeGateSoft(D))
    without = model(h, graph)
    with_gate = model(h, graph, edge_bias=2.0 * gate(h, graph))
    assert float((with_gate - without).abs().max()) > 1e-3
    constant = model(h, graph, edge_bias=torch.full((graph.num_edges,), 3.0).double())
    torch.testing.assert_close(constant, without)  # softmax does not see a constant


def test_a_fresh_model_returns_its_initial_layout(h, graph):
    model = IPALiteModel(D).double().eval()
    pos, trajectory = model(h, graph, return_trajectory=True)
    assert len(trajectory) == 6
    torch.testing.assert_close(pos, trajectory[0])
    torch.testing.assert_close(pos.mean(0), torch.zeros(2).double(), atol=1e-12, rtol=0)
    assert float(pos.square().sum(-1).mean()) == pytest.approx(1.0)


def test_batched_slides_are_predicted_as_alone(h):
    model = scramble(IPALiteModel(D)).eval()
    parts = [h[:25], h[25:]]
    graphs = [knn_candidates(part, 7) for part in parts]
    alone = torch.cat([model(p, g) for p, g in zip(parts, graphs, strict=True)])
    batch = Batch.from_data_list(
        [Data(x=p, edge_index=g.edge_index) for p, g in zip(parts, graphs, strict=True)]
    )
    together = model(batch.x, batch.edge_index, batch=batch.batch)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
    table, _ = NeighborTable.from_edge_index(batch.edge_index, N)
    assert not table.padded
    torch.testing.assert_close(model(batch.x, table, batch=batch.batch), alone, atol=1e-10, rtol=0)


def test_renumbering_cells_renumbers_positions(h, graph):
    model, gate = scramble(IPALiteModel(D)).eval(), scramble(EdgeGateSoft(D))
    perm = torch.randperm(N)
    pos = model(h, graph, edge_bias=gate(h, graph))
    moved = graph.permute(perm)
    again = model(h[perm], moved, edge_bias=gate(h[perm], moved))
    torch.testing.assert_close(again, pos[perm], rtol=0, atol=1e-9)


def test_coordinate_update_moves_with_translation(graph):
    conv = scramble(IPALiteConv(24, heads=2, head_channels=8))
    s, pos = torch.randn(N, 24).double(), torch.randn(N, 2).double()
    shift = torch.tensor([3.0, -7.0]).double()
    s1, pos1 = conv(s, pos, graph)
    s2, pos2 = conv(s, pos + shift, graph)
    torch.testing.assert_close(pos2, pos1 + shift)
    torch.testing.assert_close(s2, s1)


def test_coordinate_update_rotates_where_its_matrices_commute(graph):
    conv = scramble(IPALiteConv(24, heads=2, head_channels=8))
    a, b = torch.randn(2, 2).double()
    with torch.no_grad():  # scaled rotations commute with rotations
        conv.weight_pos.copy_(
            torch.stack([torch.stack([a, -b], -1), torch.stack([b, a], -1)], dim=1)
        )
    angle = torch.tensor(0.7).double()
    turn = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )
    s, pos = torch.randn(N, 24).double(), torch.randn(N, 2).double()
    torch.testing.assert_close(conv(s, pos @ turn.T, graph)[1], conv(s, pos, graph)[1] @ turn.T)


def test_all_adjacencies_of_pyg_agree(graph):
    conv = scramble(IPALiteConv(24, heads=4, head_channels=8))
    s, pos = torch.randn(N, 24).double(), torch.randn(N, 2).double()
    bias = torch.randn(graph.num_edges).double()
    expected = conv(s, pos, graph, bias)
    edge_index = graph.edge_index
    assert_all_close(conv(s, pos, edge_index, bias), expected)
    assert_all_close(conv(s, pos, EdgeIndex(edge_index, sparse_size=(N, N)), bias), expected)
    adj_t = torch.sparse_coo_tensor(
        edge_index.flip(0), torch.arange(graph.num_edges), (N, N)
    ).coalesce()
    order = adj_t.values()
    assert_all_close(conv(s, pos, adj_t.to_sparse_csr(), bias[order]), expected)


def test_attention_weights_are_probabilities(graph):
    conv = scramble(IPALiteConv(24, heads=4, head_channels=8))
    s, pos = torch.randn(N, 24).double(), torch.randn(N, 2).double()
    s_out, pos_out, (edge_index, attention) = conv(s, pos, graph, return_attention_weights=True)
    assert torch.equal(edge_index, graph.edge_index)
    assert attention.shape == (N * K, 4)
    assert float(attention.min()) >= 0
    torch.testing.assert_close(attention.view(N, K, 4).sum(1), torch.ones(N, 4).double())
    assert_all_close([s_out, pos_out], conv(s, pos, graph))


def test_bipartite_layer(graph):
    conv = scramble(IPALiteConv(24, heads=2, head_channels=8))
    s = (torch.randn(9, 24).double(), torch.randn(5, 24).double())
    pos = (torch.randn(9, 2).double(), torch.randn(5, 2).double())
    index = torch.stack([torch.randperm(9)[:3] for _ in range(5)]).int()
    table = NeighborTable(index, num_src_nodes=9)
    ours = conv(s, pos, table)
    assert ours[0].shape == (5, 24) and ours[1].shape == (5, 2)
    assert_all_close(ours, conv(s, pos, table.edge_index, size=(9, 5)))


def test_nodes_without_edges_stay_finite():
    conv = scramble(IPALiteConv(24, heads=2, head_channels=8))
    s, pos = torch.randn(4, 24).double(), torch.randn(4, 2).double()
    edge_index = torch.tensor([[1], [0]])
    table, _ = NeighborTable.from_edge_index(edge_index, 4)
    for edges in (edge_index, table):
        s_out, pos_out = conv(s, pos, edges)
        assert bool(torch.isfinite(s_out).all())
        torch.testing.assert_close(pos_out[1:], pos[1:])


def test_message_hooks_are_served(graph):
    conv = scramble(IPALiteConv(24, heads=2, head_channels=8))
    s, pos = torch.randn(N, 24).double(), torch.randn(N, 2).double()
    expected, seen = conv(s, pos, graph), []
    handle = conv.register_message_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    assert_all_close(conv(s, pos, graph), expected)
    assert seen == [(N * K, 2, 10)]
    handle.remove()


def test_reset_and_repr():
    conv = scramble(IPALiteConv(96))
    conv.reset_parameters()
    assert float(conv.weight_pos.abs().max()) == 0
    assert float(conv.lin_query.weight.abs().max()) > 0
    assert str(conv) == "IPALiteConv(96, heads=4, head_channels=32)"
    assert str(EdgeGateSoft(128)) == "EdgeGateSoft(128, heads=1)"
    assert str(IPALiteModel(128)) == "IPALiteModel(128, channels=96, num_recycles=5, shared=True)"


def test_autocast_keeps_coordinates_in_float32(graph):
    model = scramble(IPALiteModel(D), std=0.05).float().eval()
    h = torch.randn(N, D)
    exact = model(h, graph)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(h, graph, edge_bias=torch.zeros(graph.num_edges))
    assert low.dtype == torch.float32
    assert float((low - exact).norm() / exact.norm()) < 0.05


def test_checkpointed_recycles_have_the_same_gradients(h, graph):
    plain = scramble(IPALiteModel(D))
    saving = IPALiteModel(D, checkpoint_recycles=True).double()
    saving.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, saving):
        pos = model(h, graph, generator=torch.Generator().manual_seed(1))
        results.append([pos, *grads_of((pos**3).sum(), model)])
    assert_all_close(*results)


def test_checkpointed_recycles_do_not_attend_twice(h, graph, monkeypatch):
    model, calls = scramble(IPALiteModel(D, checkpoint_recycles=True)), []

    def counted(compute):
        return saved_or(lambda: calls.append(1) or compute())

    monkeypatch.setattr(chunked, "saved_or", counted)
    (model(h, graph) ** 3).sum().backward()
    assert len(calls) == model.num_recycles


@pytest.mark.parametrize("bias_heads", [0, 1, 4])
def test_reordering_inside_is_invisible(h, graph, bias_heads):
    plain = scramble(IPALiteModel(D, reorder=False)).eval()
    ordered = IPALiteModel(D, reorder=True).double().eval()
    ordered.load_state_dict(plain.state_dict())
    h.requires_grad_()
    given, bias = [h], None
    if bias_heads:
        bias = torch.randn((graph.num_edges, bias_heads)[:bias_heads]).double().requires_grad_()
        given.append(bias)
    batch = (torch.arange(N) >= 25).long()
    results = []
    for model in (plain, ordered):
        pos, trajectory = model(h, graph, bias, batch=batch, return_trajectory=True)
        results.append([pos, *trajectory, *grads_of((pos**3).sum(), model, *given)])
    assert_all_close(*results)


def test_initial_noise_follows_the_generator(h, graph):
    model = scramble(IPALiteModel(D))
    first, again, other = (
        model(h, graph, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", sorted(LOGIT_TERMS))
def test_each_term_changes_the_output_alike_on_every_path(graph, name):
    conv = scramble(IPALiteConv(24, heads=2, head_channels=8, terms=(name,)))
    plain = IPALiteConv(24, heads=2, head_channels=8).double()
    plain.load_state_dict(conv.state_dict(), strict=False)
    s, pos = torch.randn(N, 24).double(), torch.randn(N, 2).double()
    bias = torch.randn(graph.num_edges).double()
    ours = conv(s, pos, graph, bias)
    assert float((ours[1] - plain(s, pos, graph, bias)[1]).abs().max()) > 1e-4
    assert_all_close(conv(s, pos, graph.edge_index, bias), ours)


def test_squared_distance_is_its_formula(graph):
    term = LOGIT_TERMS["mono"](4, 3).double()
    pos, s = torch.randn(N, 2).double(), torch.zeros(N, 4).double()
    src, dst = graph.edge_index
    logits = term(pos, pos, s, s, graph.edge_index)
    expected = -(pos[src] - pos[dst]).square().sum(-1, keepdim=True).expand(-1, 3)
    torch.testing.assert_close(logits, expected)  # softplus starts at 1


def test_gauge_is_unit_and_centred_per_graph():
    pos, batch = torch.randn(30, 2).double() * 40 + 7, torch.arange(30) // 10
    fixed = gauge_fix(pos, batch)
    for graph_id in range(3):
        torch.testing.assert_close(fixed[batch == graph_id], gauge_fix(pos[batch == graph_id]))
    assert bool((gauge_fix(torch.ones(5, 2)) == 0).all())
    assert gauge_fix(torch.zeros(0, 2)).shape == (0, 2)


def test_wrong_widths_are_named():
    graph = knn_candidates(torch.randn(9, 4), 3)
    with pytest.raises(ValueError, match=r"IPALiteModel\(8\) needs embeddings \(n, 8\)"):
        IPALiteModel(8)(torch.zeros(9, 4), graph)
    with pytest.raises(ValueError, match="needs states of width 16"):
        IPALiteConv(16)(torch.zeros(9, 4), torch.zeros(9, 2), graph)
    with pytest.raises(ValueError, match="unknown logit terms"):
        IPALiteConv(16, terms=("nope",))


def test_encoder_shapes_and_dropout():
    encoder = SharedEncoder(50)
    assert [tuple(p.shape) for p in encoder.parameters() if p.dim() == 2] == [
        (512, 50),
        (256, 512),
        (128, 256),
    ]
    x = torch.randn(7, 50)
    assert encoder(x).shape == (7, 128)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))


def test_recycles_begin_from_a_given_layout():
    torch.manual_seed(0)
    h = torch.randn(60, 8, dtype=torch.float64)
    graph = knn_candidates(h, 10)
    model = IPALiteModel(8, channels=12, heads=2, head_channels=4, num_recycles=2).double().eval()
    plane = principal_plane(h)
    pos, trajectory = model(h, graph, initial=5 * plane + 3, return_trajectory=True)
    torch.testing.assert_close(trajectory[0], gauge_fix(plane))
    torch.testing.assert_close(pos, gauge_fix(plane))  # untrained blocks move nothing
    assert not torch.allclose(model(h, graph), pos)
    torch.nn.init.normal_(model.blocks[0].weight_pos, std=0.1)
    model.reorder = True
    ordered = model(h, graph, initial=plane)
    model.reorder = False
    torch.testing.assert_close(ordered, model(h, graph, initial=plane))
    with pytest.raises(ValueError, match="initial needs shape"):
        model(h, graph, initial=plane[:5])


@pytest.mark.parametrize("shared", [True, False])
def test_without_recycles_the_model_is_its_initial_layout(h, graph, shared):
    """Whatever options the blocks would have had."""
    options = {"terms": ("mono",), "pair_hidden": (8,), "init_step_size": 0.2, "reorder": True}
    model = scramble(IPALiteModel(D, num_recycles=0, shared=shared, **options)).eval()
    assert {name.split(".")[0] for name in model.state_dict()} == {"mlp_state", "mlp_pos"}
    bias = torch.zeros(graph.num_edges).double()
    pos, trajectory = model(h, graph, edge_bias=bias, return_trajectory=True)
    assert len(trajectory) == 1 and trajectory[0] is pos
    torch.testing.assert_close(pos, gauge_fix(model.mlp_pos(h)))
    plane = principal_plane(h)
    torch.testing.assert_close(model(h, graph, initial=plane), gauge_fix(plane))
    model.train()
    noisy = model(h, graph, initial=plane, generator=torch.Generator().manual_seed(0))
    assert 0.01 < float((noisy - gauge_fix(plane)).std()) < 0.1
    with pytest.raises(ValueError, match="at least 0"):
        IPALiteModel(D, num_recycles=-1)


def test_principal_plane_is_pca_and_takes_narrow_embeddings():
    torch.manual_seed(0)
    h = torch.randn(50, 6, dtype=torch.float64) * torch.tensor([3.0, 2, 1, 1, 1, 1])
    plane = principal_plane(h)
    values = torch.linalg.svdvals(h - h.mean(0))
    torch.testing.assert_close(plane.norm(dim=0), values[:2])
    assert float((plane[:, 0] @ plane[:, 1]).abs()) < 1e-9
    one = principal_plane(h[:, :1])
    assert one.shape == (50, 2) and bool((one[:, 1] == 0).all())
    assert bool(torch.isfinite(principal_plane(torch.zeros(4, 3))).all())
