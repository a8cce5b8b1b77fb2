"""Every variant of the model equals its plain dense definition, forward and gradients."""

import math

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear, softplus

from benchmarks.dense import dense_edges, dense_mask
from ipar_sparse import ops
from ipar_sparse.geometry.gauge import gauge_fix
from ipar_sparse.graph import NeighborTable, knn_candidates
from ipar_sparse.nn import LOGIT_TERMS, EdgeGateSoft, IPALiteConv, IPALiteModel, PairBias
from ipar_sparse.nn.model import BETA_BOUNDS
from ipar_sparse.ops import edges as edges_module

N, K, D, C, HEADS, HC = 30, 8, 10, 24, 4, 8
SIZES = {"channels": C, "heads": HEADS, "head_channels": HC}

VARIANTS = {
    "v1": {},
    "mono": {"terms": ("mono",)},
    "mono clamped": {"terms": ("mono_clamped",)},
    "rbf": {"terms": {"rbf": {"b_max": 0.4}}},
    "point ipa": {"terms": ("point_ipa",)},
    "mono in recycles 1 and 3": {"terms": ("mono",), "geo_schedule": (1, 3)},
    "qk norm": {"qk_norm": True},
    "no qk": {"qk": False},
    "v2": {"shared": False, "learned_betas": (2.0, 2.0, 2.0)},
    "v2 geometry last": {"shared": False, "terms": ("mono",), "geo_schedule": (3,)},
    "pair": {"pair_hidden": (64, 64)},
    "pair, unshared": {"pair_hidden": (16, 8), "shared": False},
    "pair, one hidden layer": {"pair_hidden": (16,), "shared": False},
    "ipa-r": {
        "shared": False,
        "qk_norm": True,
        "qk_range": (1.0, 10.0),
        "learned_betas": (0.5, 1.5, 2.0),
        "pair_hidden": (64,),
        "terms": ("point_ipa",),
        "geo_schedule": (3,),
        "init_step_size": 0.2,
    },
}


def scramble(module, std=0.3, seed=0):
    """Weights away from their initial values, at which some terms have no effect."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(module.named_parameters()):
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return module.double()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(options, **more):
    sizes = SIZES | {"num_recycles": 3} | options | more
    return scramble(IPALiteModel(D, **sizes)).eval()


def assert_all_close(ours, theirs, tolerance=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        scale = max(1.0, float(b.detach().abs().max()))
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


def gradients(loss, tensors):
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]


def dense_model(model, options, h, mask, bias):
    """The n x n definition, written from the formulas on the parameters of a sparse model."""
    p = dict(model.named_parameters())
    steps, shared = model.num_recycles, options.get("shared", True)
    schedule = options.get("geo_schedule") or range(1, steps + 1)
    n = len(h)

    def mlp(x, name, act):
        x = act(linear(x, p[f"{name}.0.weight"], p[f"{name}.0.bias"]))
        return linear(x, p[f"{name}.2.weight"], p[f"{name}.2.bias"])

    state, pos = mlp(h, "mlp_state", gelu), gauge_fix(mlp(h, "mlp_pos", gelu))
    for r in range(steps):
        at = 0 if shared else r
        block = f"blocks.{at}."
        logits = torch.zeros(n, n, HEADS, dtype=h.dtype)
        if options.get("qk", True):
            q, k = (
                linear(state, p[f"{block}lin_{name}.weight"]).view(n, HEADS, HC)
                for name in ("query", "key")
            )
            scale = 1 / math.sqrt(HC)
            if options.get("qk_norm"):
                q, k = layer_norm(q, (HC,)), layer_norm(k, (HC,))
                scale = p[f"{block}qk_scale.theta"]
                if "qk_range" in options:
                    low, high = options["qk_range"]
                    scale = (low + (high - low) * scale.sigmoid()) / math.sqrt(HC)
            logits = scale * torch.einsum("ihc,jhc->ijh", q, k)
        if bias is not None:
            beta = 2.5 * p["beta.theta"][r].sigmoid() if "learned_betas" in options else 1.0
            logits = logits + beta * (bias if bias.dim() == 3 else bias.unsqueeze(-1))
        if "pair_hidden" in options:
            h_i, h_j = h.unsqueeze(1).expand(n, n, -1), h.unsqueeze(0).expand(n, n, -1)
            z = torch.cat([h_i, h_j, (h_i - h_j).abs(), h_i * h_j], dim=-1)
            for layer in range(len(options["pair_hidden"]) + 1):
                z = z.relu() if layer else z
                name = f"pair.mlp.{2 * layer}."
                z = linear(z, p[f"{name}weight"], p[f"{name}bias"])
            logits = logits + linear(z, p["pair.read_out"][at])
        if options.get("terms") and r + 1 in schedule:
            (name,) = options["terms"]
            logits = logits + dense_term(
                name, p, f"{block}terms.{name}.", pos, state, mask, options
            )
        logits = logits.masked_fill(~mask.unsqueeze(-1), -torch.inf)
        attention = torch.nan_to_num(logits.softmax(dim=1))
        moves = torch.einsum("ijh,ijb->ihb", attention, pos.unsqueeze(0) - pos.unsqueeze(1))
        value = linear(state, p[f"{block}lin_value.weight"]).view(n, HEADS, HC)
        out = torch.einsum("ijh,jhc->ihc", attention, value).reshape(n, -1)
        eta = p["step.theta"][r].sigmoid() if "init_step_size" in options else 1.0
        step = eta * torch.einsum("hab,ihb->ia", p[f"{block}weight_pos"], moves)
        normed = layer_norm(state, (C,), p[f"{block}norm.weight"], p[f"{block}norm.bias"])
        state = state + mlp(torch.cat([normed, out], dim=-1), f"{block}mlp", gelu)
        pos = gauge_fix(pos + step)
    return pos


def dense_term(name, p, prefix, pos, state, mask, options):
    gap = pos.unsqueeze(1) - pos.unsqueeze(0)
    square = gap.square().sum(-1)
    if name.startswith("mono"):
        term = -softplus(p[f"{prefix}gamma"]) * square.unsqueeze(-1)
        return term.clamp(-10, 0) if name == "mono_clamped" else term
    if name == "rbf":
        distance = (square + torch.eye(len(pos))).sqrt()  # the diagonal is masked
        scale = distance[mask].detach().median()
        center = torch.linspace(0, 2, 16, dtype=pos.dtype)
        kernel = (-0.5 * ((distance / scale).unsqueeze(-1) - center).square() / (2 / 15) ** 2).exp()
        b_max = options["terms"]["rbf"]["b_max"]
        return linear(kernel, p[f"{prefix}weight"]).clamp(-b_max, b_max)
    own, other = (
        pos.unsqueeze(1) + linear(state, p[f"{prefix}lin_{end}.weight"]).view(-1, HEADS, 2)
        for end in ("query", "key")
    )
    square = (own.unsqueeze(1) - other.unsqueeze(0)).square().sum(-1)
    return (-square / p[f"{prefix}log_sigma"].exp() ** 2).clamp(-10, 0)


@pytest.mark.parametrize("gate_heads", [1, HEADS])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_is_its_dense_definition(name, backend, gate_heads, monkeypatch):
    """Outputs and all gradients, on tables and on edge lists, in blocks of few edges."""
    monkeypatch.setattr(edges_module, "BLOCK_EDGES", 37)
    options = VARIANTS[name]
    model = build(options, backend=backend)
    if "terms" in options and "rbf" in options["terms"]:
        for block in model.blocks:
            torch.nn.init.normal_(block.terms["rbf"].weight, std=0.5)
    h = random(N, D).requires_grad_()
    graph = knn_candidates(h, K)
    shape = (graph.num_edges, gate_heads)[:gate_heads]
    bias = random(*shape, seed=1).requires_grad_()
    given = [h, bias, *model.parameters()]
    weigh = random(N, 2, seed=2)
    theirs = dense_model(model, options, h, dense_mask(graph), dense_edges(bias, graph))
    expected = gradients((theirs * weigh).sum(), given)
    assert float(expected[0].abs().max()) > 1e-3
    for edges in (graph, graph.edge_index):
        ours = model(h, edges, edge_bias=bias)
        assert_all_close([ours], [theirs])
        assert_all_close(gradients((ours * weigh).sum(), given), expected, 1e-9)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "v1"])
def test_variant_differs_from_v1_with_the_same_weights(name):
    """So that no option is silently dropped."""
    options = VARIANTS[name]
    model, plain = build(options), build({}, shared=options.get("shared", True))
    plain.load_state_dict(model.state_dict(), strict=False)
    h = random(N, D)
    graph = knn_candidates(h, K)
    bias = random(graph.num_edges, seed=1)
    difference = model(h, graph, edge_bias=bias) - plain(h, graph, edge_bias=bias)
    assert float(difference.abs().max()) > 1e-4


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("qk norm", "no qk")])
def test_switched_off_terms_leave_v1(name):
    """Terms at zero, step size and weight of the gate at one are the plain model."""
    # Normalised queries and keys are another attention, not a term: left out of IPA-R here.
    options = {k: v for k, v in VARIANTS[name].items() if not k.startswith("qk")}
    model, plain = build(options), build({}, shared=options.get("shared", True))
    plain.load_state_dict(model.state_dict(), strict=False)
    off = {"gamma": -1e9, "terms.rbf.weight": 0.0, "log_sigma": 400.0, "read_out": 0.0}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            for end, value in off.items():
                if key.endswith(end):
                    parameter.fill_(value)
        if model.beta is not None:
            model.beta.theta.fill_(-math.log(1.5))  # 2.5 sigmoid = 1
        if model.step is not None:
            model.step.theta.fill_(100.0)
    h = random(N, D)
    graph = knn_candidates(h, K)
    bias = random(graph.num_edges, seed=1)
    assert_all_close([model(h, graph, edge_bias=bias)], [plain(h, graph, edge_bias=bias)])


def test_fresh_pair_rbf_and_learned_betas_are_v1():
    torch.manual_seed(0)
    plain = IPALiteModel(D, **SIZES, num_recycles=3, shared=False).double().eval()
    with torch.no_grad():
        for block in plain.blocks:
            torch.nn.init.normal_(block.weight_pos)
    h = random(N, D)
    graph = knn_candidates(h, K)
    bias = random(graph.num_edges, seed=1)
    options = {
        "terms": ("rbf",),
        "pair_hidden": (64, 64),
        "learned_betas": (2.0,) * 3,
        "shared": False,
    }
    model = IPALiteModel(D, **SIZES, num_recycles=3, **options).double().eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    assert_all_close(
        [model(h, graph, edge_bias=bias)], [plain(h, graph, edge_bias=2.0 * bias)], 1e-6
    )


@pytest.mark.parametrize("name", LOGIT_TERMS)
def test_updates_are_equivariant_where_they_should_be(name):
    """Squared distance and rbf turn with the layout; point offsets are fixed vectors in it."""
    conv = scramble(IPALiteConv(C, HEADS, HC, terms=(name,)))
    with torch.no_grad():  # scaled rotations, which commute with rotations
        a, b = random(2, HEADS, seed=3)
        conv.weight_pos.copy_(
            torch.stack([torch.stack([a, -b], -1), torch.stack([b, a], -1)], dim=1)
        )
    s, pos = random(N, C), random(N, 2, seed=1)
    graph = knn_candidates(pos, K)
    moved = conv(s, pos, graph)[1]
    shift = torch.tensor([3.0, -7.0], dtype=torch.float64)
    torch.testing.assert_close(conv(s, pos + shift, graph)[1], moved + shift)
    angle = torch.tensor(0.9, dtype=torch.float64)
    turn = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )
    turned = conv(s, pos @ turn.T, graph)[1]
    if name == "point_ipa":
        assert float((turned - moved @ turn.T).abs().max()) > 1e-3
    else:
        torch.testing.assert_close(turned, moved @ turn.T)


@pytest.mark.parametrize("name", ["rbf", "pair, one hidden layer", "ipa-r"])
def test_batched_slides_are_predicted_as_alone(name):
    model = build(VARIANTS[name])
    parts = list(random(N, D).split([11, 19]))
    graphs = [knn_candidates(part, 6) for part in parts]
    alone = torch.cat([model(h, g) for h, g in zip(parts, graphs, strict=True)])
    batch = torch.arange(N) >= 11
    together = model(torch.cat(parts), NeighborTable.block_diagonal(graphs), batch=batch.long())
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["rbf", "pair", "ipa-r"])
def test_checkpointed_recycles_and_removed_edges_have_finite_equal_gradients(name):
    h = random(N, D)
    graph = knn_candidates(h, K)
    bias = random(graph.num_edges, seed=1)
    bias[::3] = -math.inf
    bias.requires_grad_()
    results = []
    for saving in (False, True):
        model = build(VARIANTS[name], checkpoint_recycles=saving)
        pos = model(h, graph, edge_bias=bias)
        results.append([pos, *gradients((pos**3).sum(), [bias, *model.parameters()])])
    assert all(bool(torch.isfinite(t).all()) for t in results[0])
    assert_all_close(*results)


def test_coinciding_cells_give_no_nan():
    for name in LOGIT_TERMS:
        conv = scramble(IPALiteConv(C, HEADS, HC, terms=(name,)))
        pos = torch.zeros(N, 2, dtype=torch.float64, requires_grad=True)
        out = conv(random(N, C), pos, knn_candidates(random(N, 2), K))
        (grad,) = torch.autograd.grad(out[1].sum() + out[0].sum(), pos)
        assert bool(torch.isfinite(grad).all() and torch.isfinite(out[0]).all()), name


@pytest.mark.parametrize("name", LOGIT_TERMS)
def test_terms_keep_scalars_only(name):
    """Nothing wider than heads is kept an edge between forward and backward."""
    graph = knn_candidates(random(200, 2).float(), 50)
    term = LOGIT_TERMS[name](C, HEADS)
    pos = torch.randn(200, 2, requires_grad=True)
    s, kept = torch.randn(200, C), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        term(pos, pos, s, s, graph.edge_index)
    assert max(t.numel() for t in kept if t is not graph.edge_index) <= graph.num_edges * HEADS


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("name", ["rbf", "qk norm", "no qk", "ipa-r"])
def test_autocast_stays_near_full_precision(name, dtype):
    model = scramble(build(VARIANTS[name]), std=0.1).float()
    h = random(N, D).float()
    graph = knn_candidates(h, K)
    exact = model(h, graph, edge_bias=torch.zeros(graph.num_edges))
    with torch.autocast("cpu", dtype):
        low = model(h, graph, edge_bias=torch.zeros(graph.num_edges))
    assert low.dtype == torch.float32
    assert float((low - exact).norm() / exact.norm()) < 0.05


def test_apply_edges_gradients():
    src = torch.randint(0, 5, (2, 9))
    a, b, w = random(5, 2), random(5, 2, seed=1), random(3, seed=2)

    def function(a_j, b_i, w):
        return torch.stack([(a_j * b_i).sum(-1) * w[0], a_j[:, 0].sin() * w[1] * w[2]], dim=-1)

    def run(a, b, w):
        return ops.apply_edges(function, src, [a], [b], [w])

    given = [t.requires_grad_() for t in (a, b, w)]
    assert torch.autograd.gradcheck(run, given)
    assert run(a, b, w).shape == (9, 2)


def test_learned_scalars_start_at_their_initial_values_and_stay_in_range():
    model = IPALiteModel(128, num_recycles=3, **VARIANTS["ipa-r"])
    s = torch.zeros(1, 96)
    found = [model.learned_scalars(recycle, s) for recycle in range(3)]
    assert [float(f["beta"]) for f in found] == pytest.approx([0.5, 1.5, 2.0])
    assert [float(f["eta"]) for f in found] == pytest.approx([0.2] * 3)
    assert [float(f["tau"]) for f in found] == pytest.approx([math.sqrt(32)] * 3)
    assert [list(block.terms) for block in model.blocks] == [[], [], ["point_ipa"]]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e3)
    found = model.learned_scalars(0, s)
    assert float(found["beta"]) == pytest.approx(2.5) and float(found["tau"]) == pytest.approx(10)


def test_normalised_attention_has_logits_of_the_stated_standard_deviation():
    """Scale 1 gives sqrt(32), 1 / sqrt(32) gives 1; the scale of sqrt(32) would be one-hot."""
    s, edges = random(400, 96).float(), torch.randint(0, 400, (2, 4000))
    for scale, expected in ((1.0, math.sqrt(32)), (1 / math.sqrt(32), 1.0)):
        conv = IPALiteConv(96, qk_norm=True, qk_scale=scale)
        logits = conv.logit_terms(s, torch.zeros(400, 2), edges)["qk"]
        assert float(logits.detach().std()) == pytest.approx(expected, rel=0.15)


def test_wrong_arguments_are_named():
    for options, words in (
        ({"terms": ("mono",), "geo_schedule": (6,)}, "geo_schedule must name recycles 1..5"),
        ({"terms": ("mono",), "geo_schedule": ()}, "geo_schedule"),
        ({"learned_betas": (1.0,)}, "each of 5 recycles"),
        ({"learned_betas": (2.5,) * 5}, "strictly inside"),
        ({"init_step_size": 1.0}, "strictly inside"),
        ({"qk": False, "qk_norm": True}, "qk=False"),
        ({"pair_hidden": ()}, "one or two hidden layers"),
        ({"terms": ("nope",)}, "unknown logit terms"),
    ):
        with pytest.raises(ValueError, match=words):
            IPALiteModel(D, **options)
    assert BETA_BOUNDS == (0.0, 2.5)
    assert "PairBias(10, heads=4" in str(PairBias(10, 4))
    assert "qk_norm=True" in str(IPALiteConv(8, qk_norm=True))
    assert EdgeGateSoft(128, heads=4).heads == 4


@pytest.mark.parametrize("name", LOGIT_TERMS)
def test_a_term_tells_its_learned_scalars(name):
    term, states = LOGIT_TERMS[name](C, HEADS), torch.randn(7, C)
    found = term.learned_scalars(states, states)
    assert found
    for value in found.values():
        assert value.shape in ((), (HEADS,)) and value.isfinite().all()
