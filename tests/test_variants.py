"""Presets of the variants: parameter counts, training, and combinations that are refused."""

import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks.dense import dense_mask
from ipar_sparse.config import PRESETS, Term, load_config
from ipar_sparse.data.simulation import simulate
from ipar_sparse.errors import UserError
from ipar_sparse.evaluation.scoring import recycle_records
from ipar_sparse.evaluation.study import load_variants
from ipar_sparse.graph import NeighborTable, knn_candidates
from ipar_sparse.inference.checkpoint import BEST, load_checkpoint, read_meta, save_checkpoint
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.metrics.diagnostics import diagnose
from ipar_sparse.nn import LOGIT_TERMS
from ipar_sparse.supervision.targets import gate_target
from ipar_sparse.train import fit as trainer
from ipar_sparse.train.batches import build_unit, merge, subsample_edges


def scramble(module, std=0.3, seed=0):
    """Weights away from their start, where terms without effect would hide."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(module.named_parameters()):
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return module.double()


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
