"""What a PyG user expects of a layer: channels, flow, formats, explainers, wrappers, compilers."""

import copy
import math
import os

import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.explain import AttentionExplainer, Explainer, GNNExplainer
from torch_geometric.loader import NeighborLoader
from torch_geometric.nn import HeteroConv, Linear, to_hetero
from torch_geometric.utils import k_hop_subgraph

from ipar_sparse import EdgeGateSoft, IPALiteConv, IPALiteModel
from ipar_sparse.graph import NeighborTable, knn_candidates, validate_table
from ipar_sparse.nn import LOGIT_TERMS, PackedIPALiteConv

N, K, C = 40, 6, 12
SIZES = {"heads": 2, "head_channels": 8}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def scramble(module, std=0.3):
    """Weights away from the zero initialisation, in float64."""
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(module.named_parameters()):
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return module.double()


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def s():
    return draw(N, C, seed=1)


@pytest.fixture
def pos():
    return draw(N, 2, seed=2)


@pytest.fixture
def graph(s):
    return knn_candidates(s, K)


def close(ours, theirs, tolerance=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def turned(angle, mirrored=False):
    c, s = math.cos(angle), math.sin(angle)
    matrix = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return matrix @ torch.diag(matrix.new_tensor([1.0, -1.0])) if mirrored else matrix


# Flow and aggregation


@pytest.mark.parametrize("terms", [(), ("mono", "rbf", "point_ipa")])
def test_flow_from_target_to_source_reads_the_edges_backwards(s, pos, graph, terms):
    forth = scramble(IPALiteConv(C, terms=terms, **SIZES))
    back = IPALiteConv(C, terms=terms, flow="target_to_source", **SIZES).double()
    back.load_state_dict(forth.state_dict())
    bias, flipped = draw(N * K), graph.edge_index.flip(0)
    ours = back(s, pos, flipped, bias, return_attention_weights=True)
    theirs = forth(s, pos, graph.edge_index, bias, return_attention_weights=True)
    close(ours[:2], theirs[:2])
    assert torch.equal(ours[2][0], flipped)
    close([ours[2][1]], [theirs[2][1]])
    for name, logits in back.logit_terms(s, pos, flipped).items():
        close([logits], [forth.logit_terms(s, pos, graph.edge_index)[name]])


def test_flow_from_target_to_source_takes_pairs_in_the_order_of_the_edges():
    forth = scramble(IPALiteConv((C, 7), **SIZES))
    back = IPALiteConv((C, 7), flow="target_to_source", **SIZES).double()
    back.load_state_dict(forth.state_dict())
    s, pos = (draw(9, C), draw(5, 7)), (draw(9, 2), draw(5, 2, seed=3))
    edges = torch.tensor([[0, 1, 8, 3], [0, 0, 4, 4]])
    theirs = forth(s, pos, edges, size=(9, 5))
    close(back(s[::-1], pos[::-1], edges.flip(0), size=(5, 9)), theirs)


def test_flow_from_target_to_source_refuses_rows_of_in_edges(s, pos, graph):
    conv = IPALiteConv(C, flow="target_to_source").double()
    adj_t = torch.sparse_coo_tensor(graph.edge_index.flip(0), torch.ones(N * K), (N, N))
    for edges in (graph, adj_t):
        with pytest.raises(ValueError, match="takes an edge_index"):
            conv(s, pos, edges)


@pytest.mark.parametrize("aggr", ["mean", "max", None, ["add", "mean"], "softmax"])
def test_other_aggregations_are_refused(aggr):
    with pytest.raises(ValueError, match="aggr='add'"):
        IPALiteConv(C, aggr=aggr)


def test_a_sum_by_any_name_is_taken(s, pos, graph):
    conv = scramble(IPALiteConv(C, aggr="sum", **SIZES))
    close(conv(s, pos, graph.edge_index), conv(s, pos, graph))


# Channels


@pytest.mark.parametrize("terms", [(), tuple(LOGIT_TERMS)])
def test_sources_and_destinations_may_have_other_widths(terms):
    conv = scramble(IPALiteConv((C, 7), terms=terms, **SIZES))
    s, pos = (draw(9, C), draw(5, 7)), (draw(9, 2), draw(5, 2, seed=3))
    table = NeighborTable(torch.stack([torch.randperm(9)[:3] for _ in range(5)]).int(), 9)
    ours = conv(s, pos, table)
    assert ours[0].shape == (5, 7) and ours[1].shape == (5, 2)
    close(conv(s, pos, table.edge_index, size=(9, 5)), ours)
    assert str(conv).startswith("IPALiteConv((12, 7), heads=2")
    with pytest.raises(ValueError, match="states of width 12 and 7"):
        conv(s[::-1], pos[::-1], table)


@pytest.mark.parametrize(
    ("lazy", "known"), [(-1, C), ((-1, -1), (C, 7)), ((-1, 7), (C, 7)), ((C, -1), (C, 7))]
)
def test_widths_are_read_from_the_first_input(lazy, known):
    pair = isinstance(known, tuple)
    s = (draw(9, C), draw(9, 7)) if pair else draw(9, C)
    pos, graph = draw(9, 2), knn_candidates(draw(9, 3), 4)
    options = {"terms": ("mono", "point_ipa"), "qk_norm": True, **SIZES}
    conv = IPALiteConv(lazy, **options).double()
    held = list(conv.parameters())
    copied = copy.deepcopy(conv)
    torch.manual_seed(0)
    out = conv(s, pos, graph)
    assert conv.channels == known and out[0].dtype == torch.float64
    assert [id(p) for p in conv.parameters()] == [id(p) for p in held]
    twin = IPALiteConv(known, **options).double()
    assert str(conv) == str(twin)
    twin.load_state_dict(conv.state_dict())
    close(twin(s, pos, graph), out)
    scramble(twin)
    copied.load_state_dict(twin.state_dict())  # a lazy layer takes widths from a state dict too
    close(copied(s, pos, graph), twin(s, pos, graph))


def test_lazy_weights_are_drawn_as_others_are():
    torch.manual_seed(0)
    conv = IPALiteConv(-1, **SIZES)
    assert len(conv.state_dict()) == len(IPALiteConv(C, **SIZES).state_dict())
    conv.reset_parameters()  # nothing to draw yet
    conv(torch.zeros(3, C), torch.zeros(3, 2), torch.tensor([[0], [1]]))
    assert float(conv.lin_query.weight.abs().max()) == pytest.approx(C**-0.5, rel=0.05)
    assert float(conv.mlp[-1].weight.abs().max()) == 0


def test_destinations_without_states_count_as_zeros(pos):
    conv = scramble(IPALiteConv((C, 7), **SIZES))
    s, ends = draw(9, C), (draw(9, 2), draw(5, 2, seed=3))
    edges = torch.tensor([[0, 1, 8, 3], [0, 0, 4, 4]])
    ours = conv((s, None), ends, edges, size=(9, 5))
    close(ours, conv((s, draw(5, 7) * 0), ends, edges))
    table, _ = NeighborTable.from_edge_index(edges, 5, 9)
    close(conv((s, None), ends, table, size=(9, 5)), ours)
    with pytest.raises(ValueError, match="size"):
        conv((s, None), ends, edges, size=(9, 6))
    with pytest.raises(ValueError, match="positions of both ends"):
        conv((s, None), (ends[0], None), edges, size=(9, 5))
    with pytest.raises(ValueError, match="cannot read the width of destinations"):
        IPALiteConv((-1, -1)).double()((s, None), ends, edges)


def test_positions_of_another_width_are_refused(s, pos, graph):
    for edges in (graph, graph.edge_index):
        with pytest.raises(ValueError, match=r"needs positions \(n, 2\); given \(40, 3\)"):
            IPALiteConv(C).double()(s, draw(N, 3), edges)
        with pytest.raises(ValueError, match=r"positions \(39, 2\)"):
            IPALiteConv(C).double()(s, pos[1:], edges)
    conv = scramble(IPALiteConv(C, pos_channels=3, **SIZES))
    close(conv(s, draw(N, 3), graph), conv(s, draw(N, 3), graph.edge_index))


@pytest.mark.parametrize("terms", [(), tuple(LOGIT_TERMS)])
def test_int32_edges_are_int64_edges(s, pos, graph, terms):
    conv = scramble(IPALiteConv(C, terms=terms, **SIZES))
    close(conv(s, pos, graph.edge_index.int()), conv(s, pos, graph.edge_index))
    gate, edges = scramble(EdgeGateSoft(C)), graph.edge_index
    close([gate(s, edges.int())], [gate(s, edges)])
    model = scramble(IPALiteModel(C, pair_hidden=(8,), num_recycles=2)).eval()
    close([model(s, edges.int())], [model(s, edges)])
    table, _ = NeighborTable.from_edge_index(edges.int(), N)
    assert torch.equal(table.index, graph.index)


# Batches and subgraphs


def test_candidates_of_a_batch_are_those_of_its_graphs():
    h = torch.randn(31, 5)
    batch = torch.tensor([1] * 12 + [0] * 4 + [4] * 14 + [7])[torch.randperm(31)]
    table = validate_table(knn_candidates(h, 6, batch=batch))
    assert table.padded and table.k == 6
    for graph_id, degree in ((0, 3), (1, 6), (4, 6), (7, 0)):
        rows = (batch == graph_id).nonzero().squeeze(-1)
        found = table.index[rows]
        assert bool(((found >= 0).sum(1) == degree).all())
        alone = knn_candidates(h[rows], 6)
        assert torch.equal(found[:, :degree].long(), rows[alone.index.long()])


def test_candidates_of_graphs_of_equal_degree_need_no_padding():
    h, batch = torch.randn(20, 5), torch.arange(20) // 10
    table = knn_candidates(h, 3, batch=batch)
    parts = [knn_candidates(part, 3) for part in h.split(10)]
    assert not table.padded
    assert torch.equal(table.index, NeighborTable.block_diagonal(parts).index)
    assert torch.equal(knn_candidates(h, 3, batch=batch * 0).index, knn_candidates(h, 3).index)
    assert knn_candidates(h[:0], 3, batch=batch[:0]).index.shape[0] == 0
    with pytest.raises(ValueError, match="one graph a cell"):
        knn_candidates(h, 3, batch=batch[:5])


@pytest.mark.parametrize("form", ["edges", "table"])
def test_gradients_on_the_seeds_of_a_subgraph_are_those_of_the_whole(s, pos, graph, form):
    layers = [scramble(IPALiteConv(C, terms=("mono", "point_ipa"), **SIZES)) for _ in range(2)]
    parameters = [p for layer in layers for p in layer.parameters()]
    seeds, edges = torch.tensor([3, 17]), graph.edge_index

    def gradients(s, pos, edges, rows):
        s, pos = s.clone().requires_grad_(), pos.clone().requires_grad_()
        if form == "table":
            edges, _ = NeighborTable.from_edge_index(edges, s.size(0))
        state, place = s, pos
        for layer in layers:
            state, place = layer(state, place, edges)
        loss = (state[rows] ** 2).sum() + (place[rows] ** 3).sum()
        return torch.autograd.grad(loss, [s, pos, *parameters])

    nodes, part, rows, _ = k_hop_subgraph(seeds, 2, edges, relabel_nodes=True, num_nodes=N)
    assert nodes.numel() < N
    whole = gradients(s, pos, edges, seeds)
    sampled = gradients(s[nodes], pos[nodes], part, rows)
    close(sampled[2:], whole[2:])
    close(sampled[:2], [grad[nodes] for grad in whole[:2]])


@pytest.mark.ext
def test_a_neighbor_loader_has_the_whole_graphs_gradients(s, pos, graph):
    whole = Data(x=s, pos=pos, edge_index=graph.edge_index)
    try:
        batches = list(NeighborLoader(whole, [-1], batch_size=8))
    except ImportError as error:
        pytest.skip(f"the sampler is not built: {error}")
    conv = scramble(IPALiteConv(C, terms=("mono",), **SIZES))
    parameters = list(conv.parameters())
    state, place = conv(s, pos, graph)
    expected = torch.autograd.grad((state**2).sum() + (place**3).sum(), parameters)
    total = [torch.zeros_like(p) for p in parameters]
    for batch in batches:
        state, place = conv(batch.x, batch.pos, batch.edge_index)
        seeds = slice(batch.batch_size)
        loss = (state[seeds] ** 2).sum() + (place[seeds] ** 3).sum()
        for sum_, grad in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            sum_ += grad
    close(total, expected)


# Equivariance


@pytest.mark.parametrize(
    ("kind", "shape"), [("matrix", (2, 2, 2)), ("scalar", (2,)), ("complex", (2, 2))]
)
def test_the_coordinate_update_moves_with_what_its_weights_commute_with(s, pos, graph, kind, shape):
    conv = scramble(IPALiteConv(C, terms=("mono", "rbf"), pos_weight=kind, **SIZES))
    assert conv.weight_pos.shape == shape
    rotation, reflection, shift = turned(0.7), turned(0.7, mirrored=True), pos.new_tensor([3, -7])
    state, moved = conv(s, pos, graph)
    for matrix, holds in ((rotation, kind != "matrix"), (reflection, kind == "scalar")):
        again = conv(s, pos @ matrix.T + shift, graph)
        assert torch.allclose(again[1], moved @ matrix.T + shift, rtol=0, atol=1e-10) == holds
        close([again[0]], [state])
    close(conv(s, pos, graph.edge_index), (state, moved))


@pytest.mark.parametrize("kind", ["scalar", "complex"])
def test_each_form_of_weights_is_a_matrix_of_the_default(s, pos, graph, kind):
    conv = scramble(IPALiteConv(C, pos_weight=kind, **SIZES))
    default = IPALiteConv(C, **SIZES).double()
    weight = conv.weight_pos.detach()
    if kind == "scalar":
        matrices = [[[a, 0], [0, a]] for a in weight.tolist()]
    else:
        matrices = [[[a, -b], [b, a]] for a, b in weight.tolist()]
    default.load_state_dict(conv.state_dict() | {"weight_pos": weight.new_tensor(matrices)})
    close(conv(s, pos, graph), default(s, pos, graph))
    assert str(conv) == f"{str(default)[:-1]}, pos_weight={kind!r})"


@pytest.mark.parametrize("kind", ["matrix", "scalar", "complex"])
def test_each_form_of_weights_has_its_gradient(kind):
    conv = scramble(IPALiteConv(4, heads=2, head_channels=3, pos_weight=kind))
    table = knn_candidates(draw(6, 3), 3)
    names, values = zip(*conv.named_parameters(), strict=True)

    def outputs(s, pos, *given):
        named = dict(zip(names, given, strict=True))
        return torch.func.functional_call(conv, named, (s, pos, table))

    given = [draw(6, 4), draw(6, 2, seed=5), *values]
    given = [value.detach().clone().requires_grad_() for value in given]
    assert torch.autograd.gradcheck(outputs, given, fast_mode=True)


def test_a_model_of_scalar_weights_turns_with_its_initial_layout(s, pos, graph):
    model = scramble(IPALiteModel(C, pos_weight="scalar", terms=("mono",))).eval()
    matrix = turned(0.7, mirrored=True)
    close(
        [model(s, graph, initial=pos @ matrix.T)],
        [model(s, graph, initial=pos) @ matrix.T],
        tolerance=1e-9,
    )


def test_other_forms_of_weights_are_refused():
    with pytest.raises(ValueError, match="unknown pos_weight 'quaternion'"):
        IPALiteConv(C, pos_weight="quaternion")
    with pytest.raises(ValueError, match="needs pos_channels=2"):
        IPALiteConv(C, pos_weight="complex", pos_channels=3)


def test_default_state_dict_is_unchanged():
    conv = IPALiteConv(C, **SIZES)
    assert {name: tuple(value.shape) for name, value in conv.state_dict().items()} == {
        "weight_pos": (2, 2, 2),
        "lin_query.weight": (16, C),
        "lin_key.weight": (16, C),
        "lin_value.weight": (16, C),
        "norm.weight": (C,),
        "norm.bias": (C,),
        "mlp.0.weight": (2 * C, C + 16),
        "mlp.0.bias": (2 * C,),
        "mlp.2.weight": (C, 2 * C),
        "mlp.2.bias": (C,),
    }


# Explainers


class Layers(torch.nn.Module):
    """Two layers and a readout, on features alone, as explainers call a model."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(PackedIPALiteConv(C, **SIZES) for _ in range(2))
        self.out = Linear(C + 2, 3)

    def forward(self, x, edge_index):
        for layer in self.layers:
            x = layer(x, edge_index)
        return self.out(x)


def explain(model, algorithm, **masks):
    config = {"mode": "multiclass_classification", "task_level": "node", "return_type": "raw"}
    return Explainer(
        model, algorithm=algorithm, explanation_type="model", model_config=config, **masks
    )


def test_attention_explainer_finds_the_attention(s, pos, graph):
    model = scramble(Layers()).eval()
    x = torch.cat([s, pos], dim=-1)
    explainer = explain(model, AttentionExplainer(reduce="mean"), edge_mask_type="object")
    mask = explainer(x, graph.edge_index).edge_mask
    found = []
    for layer in model.layers:
        x, (_, alpha) = layer(x, graph.edge_index, return_attention_weights=True)
        found.append(alpha.mean(-1))
    close([mask], [torch.stack(found).mean(0)])


def test_attention_explainer_reads_the_recycles_of_a_model(s, graph):
    model = scramble(IPALiteModel(C, num_recycles=2)).eval()
    explainer = explain(model, AttentionExplainer(reduce="max"), edge_mask_type="object")
    mask = explainer(s, graph.edge_index).edge_mask
    _, attention = model(s, graph, return_attention_weights=True)
    close([mask], [torch.stack([alpha.amax(-1) for _, alpha in attention]).amax(0)])


def test_gnn_explainer_keeps_the_edges_that_reach_the_node(s, pos, graph):
    model = scramble(Layers()).eval()
    x, edges = torch.cat([s, pos], dim=-1).float(), graph.edge_index
    explainer = explain(
        model.float(), GNNExplainer(epochs=4), edge_mask_type="object", node_mask_type="attributes"
    )
    found = explainer(x, edges, index=3)
    assert float(found.edge_mask.max()) > 0 and float(found.node_mask.max()) > 0
    _, _, _, reach = k_hop_subgraph(3, 2, edges, num_nodes=N)
    assert bool((found.edge_mask[~reach] == 0).all())
    before = model(x, edges)
    close([model(x, graph)], [before], tolerance=1e-5)  # masks are gone again


# Heterogeneous graphs


def hetero_data():
    x = {"cell": draw(8, C + 2), "spot": draw(5, C + 2, seed=7)}
    edges = {
        ("cell", "near", "cell"): torch.tensor([[0, 1, 2, 7], [1, 0, 3, 3]]),
        ("spot", "holds", "cell"): torch.tensor([[0, 4, 2], [1, 3, 3]]),
        ("cell", "in", "spot"): torch.tensor([[0, 1, 6], [0, 0, 4]]),
    }
    return x, edges


@pytest.mark.parametrize("channels", [C, -1, (-1, -1)])
def test_hetero_conv_averages_the_relations(channels):
    x, edges = hetero_data()
    convs = {key: PackedIPALiteConv(channels, **SIZES).double() for key in edges}
    hetero = HeteroConv(convs, aggr="mean")
    hetero(x, edges)  # lazy widths
    scramble(hetero)
    out = hetero(x, edges)
    near, holds = list(edges)[:2]
    plain = IPALiteConv(C, **SIZES).double()
    expected = []
    for key in (near, holds):
        plain.load_state_dict(convs[key].state_dict())
        ends = (x[key[0]], x["cell"])
        s, pos = tuple(e[:, :C] for e in ends), tuple(e[:, C:] for e in ends)
        expected.append(torch.cat(plain(s, pos, edges[key]), dim=-1))
    close([out["cell"]], [torch.stack(expected).mean(0)])
    shifted = {
        name: value + torch.cat([value.new_zeros(C), value.new_tensor([5, -2])])
        for name, value in x.items()
    }
    close(
        [hetero(shifted, edges)["cell"][:, C:]],
        [out["cell"][:, C:] + x["cell"].new_tensor([5, -2])],
    )


def test_to_hetero_takes_packed_layers():
    x, edges = hetero_data()
    model = to_hetero(Layers().double(), (list(x), list(edges)), aggr="mean")
    out = scramble(model)(x, edges)
    assert {name: tuple(value.shape) for name, value in out.items()} == {
        "cell": (8, 3),
        "spot": (5, 3),
    }
    out["cell"].sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_packed_features_are_state_and_position(s, pos, graph):
    conv = scramble(PackedIPALiteConv(C, **SIZES))
    plain = IPALiteConv(C, **SIZES).double()
    plain.load_state_dict(conv.state_dict())
    bias = draw(N * K)
    out, (edges, alpha) = conv(torch.cat([s, pos], -1), graph, bias, return_attention_weights=True)
    theirs = plain(s, pos, graph, bias, return_attention_weights=True)
    close([out, alpha], [torch.cat(theirs[:2], -1), theirs[2][1]])
    with pytest.raises(ValueError, match="features of both ends"):
        conv((torch.cat([s, pos], -1), None), graph)


# Compilers


@pytest.fixture(params=["edges", "table", "padded"])
def edges(request, graph):
    if request.param == "edges":
        return graph.edge_index
    if request.param == "padded":
        graph, _ = NeighborTable.from_edge_index(graph.edge_index[:, :-3], N)
        assert graph.padded
    return graph


def compiled(module, **options):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager", **options)


def outputs_and_gradients(call, parameters, *given):
    given = [x.detach().clone().requires_grad_() for x in given]
    outputs = call(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((x**3).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(loss, [*given, *parameters])]


@pytest.mark.parametrize(
    ("terms", "heads_of_bias"), [((), None), (("mono", "rbf", "point_ipa"), None), ((), 2)]
)
def test_a_compiled_layer_is_the_layer(s, pos, edges, terms, heads_of_bias):
    conv = scramble(IPALiteConv(C, terms=terms, **SIZES))
    parameters, given = list(conv.parameters()), [s, pos]
    if heads_of_bias:
        count = edges.size(1) if isinstance(edges, torch.Tensor) else edges.num_edges
        given.append(draw(count, heads_of_bias))
    if isinstance(edges, NeighborTable) and not terms:
        edges.reverse()  # known reverse lists go along, and spare the backward pass a sort
    results = [
        outputs_and_gradients(
            lambda s, pos, *bias, run=run: run(s, pos, edges, *bias), parameters, *given
        )
        for run in (compiled(conv), conv)
    ]
    close(*results)


def test_a_compiled_model_and_gate_are_the_model_and_gate(s, edges):
    model = scramble(IPALiteModel(C, num_recycles=2, pair_hidden=(8,))).eval()
    gate = scramble(EdgeGateSoft(C, heads=4))
    parameters = [*model.parameters(), *gate.parameters()]

    def predict(s):
        return model(s, edges, edge_bias=gate(s, edges))

    results = [outputs_and_gradients(run, parameters, s) for run in (compiled(predict), predict)]
    close(*results)


def test_a_compiled_model_may_checkpoint_its_recycles(s, graph):
    plain = scramble(IPALiteModel(C, num_recycles=2)).eval()
    saving = IPALiteModel(C, num_recycles=2, checkpoint_recycles=True).double().eval()
    saving.load_state_dict(plain.state_dict())
    run = compiled(saving)
    close(
        outputs_and_gradients(lambda s: run(s, graph), saving.parameters(), s),
        outputs_and_gradients(lambda s: plain(s, graph), plain.parameters(), s),
    )


def test_a_compiled_layer_takes_graphs_of_other_sizes(s, pos):
    conv = scramble(IPALiteConv(C, **SIZES))
    run = compiled(conv, dynamic=True)
    for n in (N, 30, 21):
        graph = knn_candidates(s[:n], K)
        close(run(s[:n], pos[:n], graph), conv(s[:n], pos[:n], graph))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_the_operators_keep_what_torch_asks_of_them(s, graph, padded, known):
    if padded:
        graph, _ = NeighborTable.from_edge_index(graph.edge_index[:, :-3], N)
    reverse = list(graph.reverse()) if known else []
    given = [draw(N, 2, 4, seed=i) for i in range(3)] + [
        draw(N, 2),
        draw(N, 2),
        draw(graph.num_edges),
    ]
    given = [x.requires_grad_() for x in given]
    attention = torch.ops.ipar_sparse.edge_attention.default
    torch.library.opcheck(attention, (*given, graph.index, reverse, N, padded, "chunked"))
    weights = [p.detach().requires_grad_() for p in scramble(EdgeGateSoft(C)).parameters()]
    gate = torch.ops.ipar_sparse.edge_gate.default
    s = s.requires_grad_()
    torch.library.opcheck(gate, (s, graph.index, weights, True, padded, "chunked"))
    torch.library.opcheck(gate, (s, graph.edge_index, weights, False, False, "auto"))


class OnRows(torch.nn.Module):
    """A layer on the rows of a table, since a program takes tensors alone."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, s, pos, index):
        return self.conv(s, pos, NeighborTable(index))


@pytest.mark.parametrize("form", ["edges", "table"])
def test_an_exported_layer_runs_on_graphs_of_other_sizes(s, pos, graph, form):
    conv = scramble(IPALiteConv(C, terms=("mono",), **SIZES)).eval()
    n, count = torch.export.Dim("n", min=4), torch.export.Dim("count", min=4)
    if form == "table":
        program = torch.export.export(
            OnRows(conv), (s, pos, graph.index), dynamic_shapes=({0: n}, {0: n}, {0: n})
        )
    else:
        shapes = {"s": {0: n}, "pos": {0: n}, "edge_index": {1: count}}
        program = torch.export.export(conv, (s, pos, graph.edge_index), dynamic_shapes=shapes)
    smaller = knn_candidates(s[:25], K)
    given = smaller.index if form == "table" else smaller.edge_index
    close(program.module()(s[:25], pos[:25], given), conv(s[:25], pos[:25], smaller))


@pytest.mark.slow
def test_inductor_compiles_the_layer(s, pos, edges):
    conv = scramble(IPALiteConv(C, **SIZES))
    torch._dynamo.reset()
    run = torch.compile(conv, fullgraph=True)
    close(run(s, pos, edges), conv(s, pos, edges))


@pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="no CUDA device, and not interpreted"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_kernels_are_the_kernels(s, pos, graph, dtype, padded):
    pytest.importorskip("triton")
    device = "cpu" if INTERPRETED else "cuda"
    if padded:
        graph, _ = NeighborTable.from_edge_index(graph.edge_index[:, :-3], N)
    graph, s, pos = graph.to(device), s.to(device, dtype), pos.float().to(device)
    conv = scramble(IPALiteConv(C, **SIZES, backend="triton")).to(device, dtype)
    gate = scramble(EdgeGateSoft(C, heads=2, backend="triton")).to(device, torch.float32)

    def run(s, pos):
        return conv(s, pos, graph, gate(s.float(), graph))

    parameters = [*conv.parameters(), *gate.parameters()]
    ours, theirs = (outputs_and_gradients(f, parameters, s, pos) for f in (compiled(run), run))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        scale = max(1.0, float(b.detach().abs().max()))
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


# Several processes


def test_distributed_data_parallel_takes_the_layer(s, pos, graph, tmp_path):
    conv = scramble(IPALiteConv(C, **SIZES))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(conv)
        outputs = wrapped(s, pos, graph)
        (outputs[0].sum() + outputs[1].sum()).backward()
        assert all(p.grad is not None for p in conv.parameters())
        close(outputs, conv(s, pos, graph))
    finally:
        torch.distributed.destroy_process_group()
