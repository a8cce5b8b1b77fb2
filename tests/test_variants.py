"""Presets: parameter counts, training, and settings that cannot be combined."""

import math
import re

import pytest
import torch
from small_run import SMALL

from ipar_sparse.config import PRESETS, Term, load_config
from ipar_sparse.errors import UserError
from ipar_sparse.graph import NeighborTable, knn_candidates
from ipar_sparse.inference.checkpoint import load_checkpoint, save_checkpoint
from ipar_sparse.inference.modules import build_gate_and_model
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.nn import LOGIT_TERMS
from ipar_sparse.train.fit import fit

SETTINGS = [text for text in SMALL if not text.startswith(("model.recycles", "model.heads"))]
SETTINGS += ["model.heads=4", "train.minisets=2", "train.epochs=1", "train.gate_steps=2"]
SETTINGS += ["train.warmup_epochs=0", "train.ramp_epochs=0", "encoder.steps=2"]


def scramble(module, std=0.3, seed=0):
    """Weights away from their initial values, at which some terms have no effect."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(module.named_parameters()):
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return module


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(loss, tensors):
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]


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
    gate, model = build_gate_and_model(load_config(preset=preset), 128)
    assert count(gate) == (37_252 if preset == "v1-head-gate" else 37_057)
    same_as = {"spec-later": "v1-qk-norm-geo"}.get(preset, preset)
    assert count(model) == COUNTS.get(same_as, COUNTS["v1"])


def test_v2_of_five_recycles_with_geometry_in_three_has_the_largest_count_on_record():
    overrides = ["model.terms=[mono]", "model.geo_schedule=[3, 4, 5]"]
    config = load_config(overrides=overrides, preset="v2-5r")
    assert count(build_gate_and_model(config, 128)[1]) == 549_891
    plain = load_config(overrides=["model.learned_betas=none"], preset="v2-5r")
    assert count(build_gate_and_model(plain, 128)[1]) == 549_874


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_of_a_preset_gets_a_gradient_and_its_checkpoint_comes_back(
    preset, tmp_path
):
    config = load_config(overrides=SETTINGS, preset=preset)
    modules = dict(zip(("gate", "model"), build_gate_and_model(config, 16), strict=True))
    for module in modules.values():
        scramble(module)
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
    fresh = dict(zip(("gate", "model"), build_gate_and_model(config, 16), strict=True))
    assert load_checkpoint(tmp_path / "a.safetensors", fresh) == {"preset": preset}
    modules["model"].eval(), fresh["model"].eval()
    assert torch.equal(
        modules["model"](h, graph, edge_bias=bias), fresh["model"](h, graph, edge_bias=bias)
    )


@pytest.mark.parametrize(
    "preset", ["ipa-r", "v2-3r-geo-last", "v1-head-gate", "gate-mix", "target-edges", "spec-later"]
)
def test_a_preset_trains_and_places_cells(preset, small_slides, tmp_path):
    config = load_config(overrides=SETTINGS, preset=preset)
    result = fit(small_slides[:2], small_slides[2:3], config, tmp_path)
    assert math.isfinite(result.best) and result.config.preset == preset
    prediction = Predictor.load(tmp_path).predict(small_slides[3])
    assert len(prediction.trajectory) == config.model.recycles + 1
    assert torch.from_numpy(prediction.pos).isfinite().all() and prediction.pos.std() > 0.5
    assert (prediction.gate_logits is not None) == config.model.gated


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
        ("model.qk_norm=true model.qk_range=[6,10]", "must hold the initial value"),
        ("model.gate_heads=2", "gate_heads must be 1 or heads (4), got 2"),
        ("model.gate_heads=4 model.beta=0", "beta=0 removes it"),
        ("model.learned_betas=[1,1]", "each of 5 recycles, got 2"),
        ("model.learned_betas=[1,1,1,1,1] model.beta=0", "in place of beta=0"),
        ("model.learned_betas=[1,1,1,1,2.5]", "less than 2.5"),
        ("model.init_step_size=1", "less than 1"),
        ("model.rbf_max=2", "rbf_max needs rbf"),
        ("model.pair_hidden=[64]", "pair_hidden needs pair"),
        ("model.terms=[pair] model.pair_hidden=[8,8,8]", "one or two widths"),
        ("train.attention_graph=target", "set model.beta=0"),
        (
            "train.attention_graph=target model.beta=0 train.mutual_prob=0.1",
            "choose among candidates",
        ),
        ("train.gate_target_weights=[0,0]", "one of them above 0"),
        ("train.gate_target_weights=[0,1] model.beta=0", "supervises the gate"),
        ("train.k_fraction_range=[0.2,0.1]", "k_fraction_range must rise"),
    ],
)
def test_what_cannot_be_combined_is_refused_in_one_line(overrides, words):
    with pytest.raises(UserError) as caught:
        load_config(overrides=overrides.replace(", ", ",").split(" "))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_recycle_count_that_does_not_fit_a_preset_is_refused():
    with pytest.raises(UserError, match="each of 5 recycles, got 3"):
        load_config(overrides=["model.recycles=5"], preset="ipa-r")


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
        gate, model = build_gate_and_model(settings, 128)
        scramble(gate, 0.05, seed=1), scramble(model, 0.05).eval()
        gate.to(device, dtype), model.to(device, dtype)
        table, embedding = graph.to(device), h.to(device, dtype)
        bias = None
        if config.model.gated:
            bias = config.model.gate_weight * gate(embedding, table)
        pos = model(embedding, table, edge_bias=bias)
        factor = random(300, 2, seed=2).to(device, dtype)
        grads = gradients((pos * factor).sum(), [*gate.parameters(), *model.parameters()])
        results.append([t.detach().cpu().double() for t in (pos, *grads)])
    for ours, theirs in zip(*results[::-1], strict=True):
        error = float((ours - theirs).norm())
        assert error <= 2e-3 * float(theirs.norm()) + 1e-4


def test_configuration_names_the_terms_there_are():
    assert set(Term.__args__) == {*LOGIT_TERMS, "pair"}
