"""Every variant on record: equal to its plain dense definition, selectable, trainable, refused."""

import math
import re
from pathlib import Path

import pytest
import torch
from ipar_sparse.metrics.diagnostics import diagnose
from torch.nn.functional import gelu, layer_norm, linear, softplus

from benchmarks.dense import dense_edges, dense_mask
from ipar_sparse import ops
from ipar_sparse.config import PRESETS, Term, load_config
from ipar_sparse.data.simulation import simulate
from ipar_sparse.errors import UserError
from ipar_sparse.evaluation.scoring import recycle_records
from ipar_sparse.evaluation.study import load_variants
from ipar_sparse.geometry.gauge import gauge_fix
from ipar_sparse.graph import NeighborTable, knn_candidates
from ipar_sparse.inference.checkpoint import BEST, load_checkpoint, read_meta, save_checkpoint
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.nn import LOGIT_TERMS, EdgeGateSoft, IPALiteConv, IPALiteModel, PairBias
from ipar_sparse.nn import model as model_module
from ipar_sparse.ops import edges as edges_module
from ipar_sparse.supervision.targets import gate_target
from ipar_sparse.train import fit as trainer
from ipar_sparse.train.batches import build_unit, merge, subsample_edges

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
    "v2": {"shared": False, "betas": (2.0, 2.0, 2.0)},
    "v2 geometry last": {"shared": False, "terms": ("mono",), "geo_schedule": (3,)},
    "pair": {"pair_hidden": (64, 64)},
    "pair, unshared": {"pair_hidden": (16, 8), "shared": False},
    "pair, one hidden layer": {"pair_hidden": (16,), "shared": False},
    "ipa-r": {
        "shared": False,
        "qk_norm": True,
        "qk_range": (1.0, 10.0),
        "betas": (0.5, 1.5, 2.0),
        "pair_hidden": (64,),
        "terms": ("point_ipa",),
        "geo_schedule": (3,),
        "step_gate": 0.2,
    },
}


def scramble(module, std=0.3, seed=0):
    """Weights away from their start, where terms without effect would hide."""
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
            beta = 2.5 * p["beta.theta"][r].sigmoid() if "betas" in options else 1.0
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
        eta = p["step.theta"][r].sigmoid() if "step_gate" in options else 1.0
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
    monkeypatch.setattr(edges_module, "_EDGES", 37)
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


def test_fresh_pair_rbf_and_weights_of_the_gate_start_as_v1():
    torch.manual_seed(0)
    plain = IPALiteModel(D, **SIZES, num_recycles=3, shared=False).double().eval()
    with torch.no_grad():
        for block in plain.blocks:
            torch.nn.init.normal_(block.weight_pos)
    h = random(N, D)
    graph = knn_candidates(h, K)
    bias = random(graph.num_edges, seed=1)
    options = {"terms": ("rbf",), "pair_hidden": (64, 64), "betas": (2.0,) * 3, "shared": False}
    model = IPALiteModel(D, **SIZES, num_recycles=3, **options).double().eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    assert_all_close(
        [model(h, graph, edge_bias=bias)], [plain(h, graph, edge_bias=2.0 * bias)], 1e-6
    )


@pytest.mark.parametrize("name", LOGIT_TERMS)
def test_updates_move_with_translations_and_turn_where_they_should(name):
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


def test_map_edges_gradients():
    src = torch.randint(0, 5, (2, 9))
    a, b, w = random(5, 2), random(5, 2, seed=1), random(3, seed=2)

    def function(a_j, b_i, w):
        return torch.stack([(a_j * b_i).sum(-1) * w[0], a_j[:, 0].sin() * w[1] * w[2]], dim=-1)

    def run(a, b, w):
        return ops.map_edges(function, src, [a], [b], [w])

    given = [t.requires_grad_() for t in (a, b, w)]
    assert torch.autograd.gradcheck(run, given)
    assert run(a, b, w).shape == (9, 2)


def count(module):
    return sum(p.numel() for p in module.parameters())


COUNTS = {
    "v1": 154_674,
    "v1-mono": 154_678,
    "v1-rbf": 154_738,
    "v1-point-ipa": 156_214,
    "v1-pair": 193_874,
    "v1-qk-norm": 154_675,
    "v1-qk-norm-geo": 154_679,
    "no-qk": 130_098,
    # on record
    "v2-3r": 352_277,
    "v2-3r-geo-last": 352_281,
    "v2-5r": 549_879,
    "ipa-r": 389_119,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_counts(preset):
    gate, model = trainer.build_gate_and_model(load_config(preset=preset), 128)
    assert count(gate) == (37_252 if preset == "v1-head-gate" else 37_057)
    same_as = {"later": "v1-qk-norm-geo"}.get(preset, preset)
    assert count(model) == COUNTS.get(same_as, COUNTS["v1"])


def test_v2_of_five_recycles_with_geometry_in_three_has_the_largest_count_on_record():
    overrides = ["model.terms=[mono]", "model.geo_schedule=[3, 4, 5]"]
    config = load_config(overrides=overrides, preset="v2-5r")
    assert count(trainer.build_gate_and_model(config, 128)[1]) == 549_891
    plain = load_config(overrides=["model.betas=none"], preset="v2-5r")
    assert count(trainer.build_gate_and_model(plain, 128)[1]) == 549_874


def test_starts_are_those_on_record():
    model = trainer.build_gate_and_model(load_config(preset="ipa-r"), 128)[1]
    torch.testing.assert_close(model.beta(), torch.tensor([0.5, 1.5, 2.0]))
    torch.testing.assert_close(model.step(), torch.full((3,), 0.2))
    taus = torch.stack([block.measures(torch.zeros(1, 96))["tau"] for block in model.blocks])
    torch.testing.assert_close(taus, torch.full((3,), math.sqrt(32)))
    assert [list(block.terms) for block in model.blocks] == [[], [], ["point_ipa"]]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e3)
    assert float(model.beta().max()) == pytest.approx(2.5)
    assert float(model.blocks[0].measures(torch.zeros(1, 96))["tau"]) == pytest.approx(10.0)


def test_normalised_attention_has_logits_of_the_stated_spread():
    """Scale 1 gives sqrt(32), 1 / sqrt(32) gives 1; the scale of sqrt(32) would be one-hot."""
    s, edges = random(400, 96).float(), torch.randint(0, 400, (2, 4000))
    for scale, expected in ((1.0, math.sqrt(32)), (1 / math.sqrt(32), 1.0)):
        conv = IPALiteConv(96, qk_norm=True, qk_scale=scale)
        logits = conv.logit_terms(s, torch.zeros(400, 2), edges)["qk"]
        assert float(logits.detach().std()) == pytest.approx(expected, rel=0.15)


SMALL = [
    "encoder.steps=2",
    "encoder.hidden=[24]",
    "encoder.out=16",
    "model.dim=16",
    "model.channels=16",
    "model.heads=4",
    "model.head_channels=8",
    "train.minisets=2",
    "train.miniset_min=40",
    "train.miniset_max=60",
    "train.epochs=1",
    "train.warmup_epochs=0",
    "train.ramp_epochs=0",
    "train.gate_steps=2",
    "train.val_minisets=1",
    "graph.k=12",
    "data.max_genes=60",
]


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds_runs_and_round_trips(preset, tmp_path):
    config = load_config(overrides=SMALL, preset=preset)
    modules = dict(zip(("gate", "model"), trainer.build_gate_and_model(config, 16), strict=True))
    for module in modules.values():
        scramble(module).float()
    h = random(60, 16).float()
    graph = knn_candidates(h, config.graph.k)
    logits = modules["gate"](h, graph)
    bias = config.model.gate_weight * logits if config.model.gated else None
    pos = modules["model"](h, graph, edge_bias=bias)
    pos.pow(3).sum().backward()
    last = f"blocks.{config.model.recycles - 1}."
    for name, parameter in modules["model"].named_parameters():
        if name.startswith(last) and re.search("norm|mlp|lin_value", name):
            continue  # no recycle comes after it, so nothing reads its states
        assert bool(torch.isfinite(parameter.grad).all()), name
    assert (modules["gate"].mlp[0].weight.grad is not None) == config.model.gated
    save_checkpoint(tmp_path / "a.safetensors", modules, {"preset": preset})
    fresh = dict(zip(("gate", "model"), trainer.build_gate_and_model(config, 16), strict=True))
    assert load_checkpoint(tmp_path / "a.safetensors", fresh) == {"preset": preset}
    modules["model"].eval(), fresh["model"].eval()
    assert torch.equal(
        modules["model"](h, graph, edge_bias=bias), fresh["model"](h, graph, edge_bias=bias)
    )


@pytest.fixture(scope="module")
def slides():
    return simulate("cortex", slides=3, spots=90, genes=70, seed=3)


@pytest.mark.parametrize(
    "preset", ["ipa-r", "v2-3r-geo-last", "v1-head-gate", "gate-mix", "target-edges", "later"]
)
def test_preset_trains_and_its_attention_is_recorded(preset, slides, tmp_path):
    config = load_config(overrides=SMALL, preset=preset)
    config.save(tmp_path)
    trainer.fit(slides[:2], slides[2:], config, tmp_path)
    scores = read_meta(tmp_path / BEST)
    assert math.isfinite(scores["best"])
    predictor = Predictor.load(tmp_path)
    prediction = predictor.predict(slides[2])
    h = torch.from_numpy(prediction.embedding)
    bias, logits = predictor.edge_bias(h, prediction.graph)
    records = list(recycle_records(predictor.model, h, prediction.graph, bias))
    _, weights = predictor.model(h, prediction.graph, edge_bias=bias, return_attention_weights=True)
    assert len(records) == config.model.recycles
    for record, (_, attention) in zip(records, weights, strict=True):
        torch.testing.assert_close(record.attention, attention)
    wanted = {"qk"} | ({"gate"} if config.model.gated else set()) | set(config.model.terms)
    assert set(records[-1].terms) == wanted
    measures = diagnose(prediction.graph, records, pos=slides[2].pos, gate_logits=logits)
    if preset == "ipa-r":
        assert "point_ipa" not in records[0].terms and "pair" in records[0].terms
        assert measures["eta/r2"] == pytest.approx(0.2, abs=0.01)
        assert measures["beta/r0"] == pytest.approx(0.5, abs=0.01)
        assert measures["tau/r1"] == pytest.approx(math.sqrt(8), abs=0.05)
        assert measures["sigma/r2/h3"] == pytest.approx(1.0, abs=0.01)
        assert 0 < measures["offset_norm/r2/h0"] < 0.1
        assert "term_spearman:point_ipa/r2/h0" in measures


def unit_of(slides, *overrides, **kwargs):
    config = load_config(overrides=[*SMALL, *overrides])
    n = slides[0].num_cells
    pos = torch.from_numpy(slides[0].pos)
    return build_unit(random(n, 16).float(), pos, config, 0, **kwargs), config


def test_target_edges_are_the_true_neighbours(slides):
    unit, _ = unit_of(slides, "model.beta=0", "train.edges=target", oracle=True)
    distance = torch.cdist(*[torch.from_numpy(slides[0].pos)] * 2).fill_diagonal_(math.inf)
    nearest = distance.topk(20, largest=False).values[:, -1:]
    held = distance.gather(1, unit.graph.index.long())
    assert unit.graph.k == 20 and bool((held <= nearest + 1e-9).all())


def test_gate_walks_mix_as_stated(slides):
    parts = {}
    for weights in ("[1]", "[0, 1]", "[0.25, 0.75]"):
        unit, _ = unit_of(slides, f"train.gate_walk={weights}")
        parts[weights] = unit.gate_target
        rows = unit.graph.to_table(unit.gate_target).sum(1)
        assert bool(((rows - 1).abs() < 1e-5).logical_or(rows == 0).all())
    one, two = (gate_target(unit.graph, unit.target.walk, step).float() for step in (1, 2))
    torch.testing.assert_close(parts["[1]"], one)
    torch.testing.assert_close(parts["[0, 1]"], two)
    both = (unit.graph.to_table(one).sum(1) > 0)[unit.graph.edge_index[1]]
    mixed = 0.25 * one + 0.75 * two
    torch.testing.assert_close(parts["[0.25, 0.75]"][both], mixed[both])
    assert not torch.allclose(one, two)


def test_drawn_candidates_are_the_nearest_and_mutual(slides):
    unit, config = unit_of(slides, "graph.k=40", "train.k_range=[0.12, 0.18]")
    generator = torch.Generator().manual_seed(0)
    n, seen = slides[0].num_cells, set()
    for _ in range(40):
        drawn = subsample_edges(unit, config.train, generator)
        assert torch.equal(drawn.graph.index, unit.graph.index[:, : drawn.graph.k])
        seen.add(drawn.graph.k)
    assert min(seen) == round(0.12 * n) and max(seen) == round(0.18 * n)
    rows = drawn.graph.to_table(drawn.gate_target).sum(1)
    assert bool(((rows - 1).abs() < 1e-5).logical_or(rows == 0).all())

    config = load_config(overrides=[*SMALL, "train.mutual_share=0.999"])
    drawn = subsample_edges(unit, config.train, generator).graph
    mask = dense_mask(unit.graph)
    expected = mask & mask.T
    expected[torch.arange(n), unit.graph.index[:, 0].long()] = True
    assert torch.equal(dense_mask(drawn), expected)
    assert drawn.padded and drawn.num_edges == int(expected.sum())
    assert subsample_edges(unit, load_config(overrides=SMALL).train, generator) is unit


def test_drawn_candidates_of_a_batch_follow_each_graphs_size(slides):
    parts = []
    for rows in (30, 80):
        config = load_config(overrides=[*SMALL, "graph.k=20", "train.k_range=[0.2, 0.2001]"])
        pos = torch.from_numpy(slides[0].pos[:rows])
        parts.append(build_unit(random(rows, 16).float(), pos, config, 0))
    drawn = subsample_edges(merge(parts), config.train, torch.Generator().manual_seed(0))
    degree = (drawn.graph.index >= 0).sum(1)
    assert degree[:30].unique().tolist() == [6]
    assert degree[30:].unique().tolist() == [16]


def test_augmentation_levels_vary_around_their_value(slides):
    unit, config = unit_of(slides, "train.vary_augmentation=true", "train.dropout_h=0.2")
    run = trainer._Run.__new__(trainer._Run)
    run.config, generator = config, torch.Generator().manual_seed(0)
    shares = torch.tensor(
        [float((run._augment(unit, generator)[0] == 0).float().mean()) for _ in range(60)]
    )
    assert float(shares.mean()) == pytest.approx(0.2, abs=0.02)
    assert float(shares.min()) < 0.14 and float(shares.max()) > 0.26


@pytest.mark.parametrize(
    "overrides, words",
    [
        ("model.terms=[nope]", "'nope'"),
        ("model.terms=[mono, rbf]", "one geometry term, got mono and rbf"),
        ("model.terms=[pair, pair]", "names one twice"),
        ("model.geo_schedule=last", "geo_schedule needs a geometry term"),
        ("model.terms=[pair] model.geo_schedule=last", "geo_schedule needs a geometry term"),
        ("model.terms=[point_ipa] model.geo_schedule=[]", "names no recycle"),
        ("model.terms=[point_ipa] model.geo_schedule=[5,6]", "1 to 5, each once; got 5, 6"),
        ("model.terms=[point_ipa] model.geo_schedule=[2,2]", "each once"),
        ("model.qk=false model.qk_norm=true", "qk=false removes them"),
        ("model.qk=false model.beta=0", "nothing to attend by"),
        ("model.qk_scale=0.2", "belong to qk_norm"),
        ("model.qk_range=[1,10]", "belong to qk_norm"),
        ("model.qk_norm=true model.qk_range=[6,10]", "must hold the start"),
        ("model.gate_heads=2", "gate_heads must be 1 or heads (4), got 2"),
        ("model.gate_heads=4 model.beta=0", "beta=0 removes it"),
        ("model.betas=[1,1]", "each of 5 recycles, got 2"),
        ("model.betas=[1,1,1,1,1] model.beta=0", "in place of beta=0"),
        ("model.betas=[1,1,1,1,2.5]", "less than 2.5"),
        ("model.step_gate=1", "less than 1"),
        ("model.rbf_max=2", "rbf_max needs rbf"),
        ("model.pair_hidden=[64]", "pair_hidden needs pair"),
        ("model.terms=[pair] model.pair_hidden=[8,8,8]", "one or two widths"),
        ("train.edges=target", "set model.beta=0"),
        ("train.edges=target model.beta=0 train.mutual_share=0.1", "choose among candidates"),
        ("train.gate_walk=[0,0]", "one of them above 0"),
        ("train.gate_walk=[0,1] model.beta=0", "supervises the gate"),
        ("train.k_range=[0.2,0.1]", "k_range must rise"),
    ],
)
def test_what_cannot_be_combined_is_refused_in_one_line(overrides, words):
    with pytest.raises(UserError) as caught:
        load_config(overrides=overrides.replace(", ", ",").split(" "))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_recycle_count_that_does_not_fit_a_preset_is_refused():
    with pytest.raises(UserError, match="each of 5 recycles, got 3"):
        load_config(overrides=["model.recycles=5"], preset="ipa-r")


STUDIES = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_differ_from_their_reference(path):
    variants, said = load_variants([], [path])
    reference = variants.pop(said["reference"])
    for name, config in variants.items():
        changed = config.model_dump(exclude={"preset"})
        assert changed != reference.model_dump(exclude={"preset"}), name


def test_every_preset_is_in_a_study():
    assert set(PRESETS) <= {name for path in STUDIES for name in load_variants([], [path])[0]}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_on_the_gpu_is_the_reference(preset):
    """Fused kernels in float32 against plain gathers in float64, gradients included."""
    config = load_config(preset=preset)
    h = random(300, 128).float()
    graph = knn_candidates(h, 100)
    index = graph.index.clone()
    index[::3, 60:] = -1  # as mutual candidates leave it
    graph = NeighborTable(index, padded=True)
    results = []
    for device, backend, dtype in (
        ("cpu", "reference", torch.float64),
        ("cuda", "triton", torch.float32),
    ):
        settings = config.replace(model={"backend": backend})
        gate, model = trainer.build_gate_and_model(settings, 128)
        scramble(gate, 0.05, seed=1), scramble(model, 0.05).eval()
        gate.to(device, dtype), model.to(device, dtype)
        table, embedding = graph.to(device), h.to(device, dtype)
        bias = None
        if config.model.gated:
            bias = config.model.gate_weight * gate(embedding, table)
        pos = model(embedding, table, edge_bias=bias)
        weigh = random(300, 2, seed=2).to(device, dtype)
        grads = gradients((pos * weigh).sum(), [*gate.parameters(), *model.parameters()])
        results.append([t.detach().cpu().double() for t in (pos, *grads)])
    for ours, theirs in zip(*results[::-1], strict=True):
        error = float((ours - theirs).norm())
        assert error <= 2e-3 * float(theirs.norm()) + 1e-4


def test_configuration_names_the_terms_there_are():
    assert set(Term.__args__) == {*LOGIT_TERMS, "pair"}


def test_wrong_arguments_are_named():
    for options, words in (
        ({"terms": ("mono",), "geo_schedule": (6,)}, "geo_schedule must name recycles 1..5"),
        ({"terms": ("mono",), "geo_schedule": ()}, "geo_schedule"),
        ({"betas": (1.0,)}, "each of 5 recycles"),
        ({"betas": (2.5,) * 5}, "strictly inside"),
        ({"step_gate": 1.0}, "strictly inside"),
        ({"qk": False, "qk_norm": True}, "qk=False"),
        ({"pair_hidden": ()}, "one or two hidden layers"),
        ({"terms": ("nope",)}, "unknown logit terms"),
    ):
        with pytest.raises(ValueError, match=words):
            IPALiteModel(D, **options)
    assert model_module.BETA_BOUNDS == (0.0, 2.5)
    assert "PairBias(10, heads=4" in str(PairBias(10, 4))
    assert "qk_norm=True" in str(IPALiteConv(8, qk_norm=True))
    assert EdgeGateSoft(128, heads=4).heads == 4
