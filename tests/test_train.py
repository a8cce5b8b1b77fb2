"""The run from slides to a report: what is trained on what, resumed how, and scored how."""

import json
import math
import threading

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import sparse
from torch import nn

from ipar_sparse.config import load_config
from ipar_sparse.data.expression import Expression, match_genes
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.slide import Slide
from ipar_sparse.errors import UserError
from ipar_sparse.estimators import components
from ipar_sparse.estimators.components import principal_axes, spatial_axes
from ipar_sparse.estimators.relevant_components import RelevantComponents, narrowed
from ipar_sparse.estimators.scaler import EmbeddingScaler
from ipar_sparse.evaluation.scoring import (
    e_geo_of_layouts,
    evaluate_slide,
    expression_plane,
    recycle_records,
    score_slide,
    spatial_gene,
)
from ipar_sparse.geometry.alignment import align
from ipar_sparse.geometry.gauge import gauge_fix, leading_components, principal_plane
from ipar_sparse.graph import knn, pooled_candidates
from ipar_sparse.inference.checkpoint import BEST, LAST, load_checkpoint, read_meta
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.layout.distance_correction import correct_distances
from ipar_sparse.layout.refinement import refine_layout
from ipar_sparse.metrics.diagnostics import collapse_diagnostics
from ipar_sparse.metrics.layout import distance_metrics, evaluate_layout, metric_info
from ipar_sparse.nn import SharedEncoder
from ipar_sparse.train import fit as trainer_module
from ipar_sparse.train.batches import MinisetPool, TrainingSlide, build_unit, merge
from ipar_sparse.train.encoder import (
    ContrastiveSlide,
    _distance,
    _infonce,
    begin,
    encode,
    encoder_loss,
    finish,
    read_expression,
)
from ipar_sparse.train.fit import fit, term_weights
from ipar_sparse.train.history import HISTORY, read_history
from ipar_sparse.train.selection import weigh

SMALL = [
    "encoder.steps=6",
    "encoder.hidden=[24]",
    "encoder.out=16",
    "model.dim=16",
    "model.channels=16",
    "model.heads=2",
    "model.head_channels=8",
    "model.recycles=2",
    "train.minisets=4",
    "train.miniset_min=40",
    "train.miniset_max=60",
    "train.epochs=3",
    "train.warmup_epochs=1",
    "train.ramp_epochs=1",
    "train.gate_steps=3",
    "train.val_minisets=2",
    "graph.k=12",
    "data.max_genes=60",
    "model.start=pca",
]


@pytest.fixture(scope="module")
def slides():
    return simulate("cortex", slides=4, spots=140, genes=80, seed=3)


@pytest.fixture(scope="module")
def run(slides, tmp_path_factory):
    """A finished small run and its configuration."""
    out = tmp_path_factory.mktemp("run")
    config = load_config(None, SMALL)
    config.save(out)
    fit(slides[:2], slides[2:3], config, out)
    return out


def states(path):
    from safetensors.torch import load_file

    return load_file(path)


def test_run_directory_holds_what_it_promises(run, slides):
    meta = read_meta(run / BEST)
    assert len(meta["genes"]) == 60
    assert {s["role"] for s in meta["facts"]["slides"]} == {"train", "val"}
    rows = read_history(run / HISTORY)
    assert [r["step"] for r in rows] == sorted(r["step"] for r in rows)
    assert {r["stage"] for r in rows} == {"encoder", "gate", "joint"}
    epochs = [r for r in rows if "val_hgate_e_geo" in r]
    assert [r["epoch"] for r in epochs] == [0, 1, 2]
    assert all(math.isfinite(r["val_tedge_e_geo"]) for r in epochs)
    assert all(abs(r["val_e_geo_floor"]) < 1e-6 for r in epochs)
    assert list((run / "tensorboard").iterdir())


def test_best_epoch_comes_after_the_ramp(run):
    meta = read_meta(run / LAST)
    rows = [r for r in read_history(run / HISTORY) if "val_hgate_e_geo" in r]
    counted = rows[1:]  # warm-up 1 and ramp 1: the cap is reached as epoch 2 ends
    best = min(counted, key=lambda r: r["val_hgate_e_geo"])
    assert meta["best_epoch"] == best["epoch"]
    assert meta["best"] == pytest.approx(best["val_hgate_e_geo"], rel=1e-4)
    assert rows[0]["best"] == 0


def test_walk_weight_ramps_to_its_cap():
    settings = load_config(None, [], preset="record").train
    weights = [term_weights(t, settings).get("rw_kl", 0.0) for t in (0, 1, 4, 7, 20)]
    assert weights == pytest.approx([0, 0, 0.15, 0.3, 0.3])
    rest = term_weights(20, settings)
    assert (rest["stress_log"], rest["repulsion"], rest["entropy_reg"]) == (0.1, 0.01, 0.01)


@pytest.mark.parametrize("stop_at", [("encoder", 4), ("gate", 2), ("joint", 6), ("joint", 8)])
def test_a_stopped_run_resumes_to_the_same_bits(run, slides, tmp_path, monkeypatch, stop_at):
    config = load_config(None, SMALL)
    config.save(tmp_path)
    stepped = trainer_module._Run._stepped

    def stop(self, stage, step, *rest):
        stepped(self, stage, step, *rest)
        if (stage, step) == stop_at:
            self.interrupted.set()

    monkeypatch.setattr(trainer_module._Run, "_stepped", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(slides[:2], slides[2:3], config, tmp_path)
    assert read_meta(tmp_path / LAST)["stage"] == stop_at[0]
    monkeypatch.setattr(trainer_module._Run, "_stepped", stepped)
    fit(slides[:2], slides[2:3], config, tmp_path, resume=True)
    for name in (BEST, LAST):
        ours, theirs = states(tmp_path / name), states(run / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    steps = [row["step"] for row in read_history(tmp_path / HISTORY)]
    assert steps == [row["step"] for row in read_history(run / HISTORY)]


def test_starts_of_training_slides_where_embeddings_are_flat(tmp_path):
    """Dimensions that hardly vary must not drown the others in the noise of training."""
    rng, own = np.random.default_rng(0), []
    for name in "ab":
        pos = rng.uniform(-1, 1, (300, 2)) * [1.0, 0.6]
        h = 1e-3 * rng.standard_normal((300, 32))
        h[:, :2] = pos + 0.05 * rng.standard_normal((300, 2))
        cells = np.array([f"{name}{i}" for i in range(300)])
        own.append(Slide(name, None, np.array([]), cells, pos=pos, embedding=h.astype(np.float32)))
    config = load_config(None, [*SMALL, "data.embedding=obsm:H", "model.start=atlas"])
    with trainer_module.Progress() as progress:
        run = trainer_module._Run(
            own, [], config, tmp_path, torch.device("cpu"), progress, threading.Event()
        )
        run.freeze_embeddings()
    for slide in run.train_data:
        assert evaluate_layout(slide.start.numpy(), slide.pos.numpy())["distance_spearman"] > 0.9


def test_a_gradient_that_is_not_finite_costs_one_step(slides, tmp_path, monkeypatch):
    config, terms, calls = load_config(None, SMALL), trainer_module.geometry_terms, []

    def spoiled(pos, *args, **options):
        found = terms(pos, *args, **options)
        calls.append(1)
        if len(calls) == 3:
            found["stress_log"] = found["stress_log"] + (0.0 * pos).sum().sqrt()  # 0 * inf
        return found

    config.save(tmp_path)
    monkeypatch.setattr(trainer_module, "geometry_terms", spoiled)
    fit(slides[:2], [], config, tmp_path)
    assert len(calls) == 12
    predictor = Predictor.load(tmp_path)
    assert all(p.isfinite().all() for p in predictor.model.parameters())


def test_a_short_run_that_was_stopped_keeps_its_last_weights(slides, tmp_path, monkeypatch):
    """No epoch counts before the ramp ends: the weights of the stop must not stay the best."""
    config = load_config(None, [*SMALL, "train.epochs=2", "train.ramp_epochs=5"])
    stepped = trainer_module._Run._stepped

    def stop(self, stage, step, *rest):
        stepped(self, stage, step, *rest)
        if (stage, step) == ("joint", 3):
            self.interrupted.set()

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module._Run, "_stepped", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(slides[:2], slides[2:3], config, tmp_path)
    stopped = states(tmp_path / BEST)
    fit(slides[:2], slides[2:3], config, tmp_path, resume=True)
    best, last = states(tmp_path / BEST), states(tmp_path / LAST)
    key = "model.mlp_state.0.weight"
    assert torch.equal(best[key], last[key]) and not torch.equal(best[key], stopped[key])


def test_another_seed_is_another_run(run, slides, tmp_path):
    config = load_config(None, [*SMALL, "train.seed=1", "train.epochs=1", "encoder.steps=2"])
    fit(slides[:2], slides[2:3], config, tmp_path)
    ours, theirs = states(tmp_path / BEST), states(run / BEST)
    assert not torch.equal(ours["model.mlp_state.0.weight"], theirs["model.mlp_state.0.weight"])


def test_validation_and_test_slides_change_no_trained_weight(run, slides, tmp_path):
    """Whatever the validation slide holds, the last weights are the same: no leak."""
    config = load_config(None, SMALL)
    fit(slides[:2], slides[3:4], config, tmp_path)
    ours, theirs = states(tmp_path / LAST), states(run / LAST)
    trained = [key for key in theirs if key.split(".")[0] in ("encoder", "scale", "gate", "model")]
    assert len(trained) > 20
    assert all(torch.equal(ours[key], theirs[key]) for key in trained)


@pytest.mark.parametrize("unit", ["slide", "mixed"])
def test_whole_slides_train(slides, tmp_path, unit):
    config = load_config(
        None,
        [
            *SMALL,
            f"train.unit={unit}",
            "train.steps_per_epoch=4",
            "train.probe_rows=16",
            "graph.target_mode=sketch",
            "train.lambda_long=0.1",
            "train.lambda_multiscale=0.1",
            "train.lambda_gram=0.1",
        ],
    )
    if unit == "mixed":
        config = config.replace(train={"batch_size": 2})
    fit(slides[:2], slides[2:3], config, tmp_path)
    row = [r for r in read_history(tmp_path / HISTORY) if "l_long" in r][-1]
    assert row["l_long"] > 0 and row["l_gram"] > 0 and row["l_multiscale"] > 0


def test_an_embedding_of_the_users_replaces_the_encoder(slides, tmp_path):
    generator = np.random.default_rng(0)
    turn = generator.normal(size=(2, 10))
    brought = simulate("cortex", slides=3, spots=90, genes=60, seed=5)
    for slide in brought:
        noise = generator.normal(size=(slide.num_cells, 10)) * 0.1
        slide.embedding = (slide.pos / slide.pos.std() @ turn + noise).astype(np.float32)
    config = load_config(None, [*SMALL, "data.embedding=obsm:X_pca"])
    config.save(tmp_path)
    fit(brought[:2], brought[2:], config, tmp_path)
    predictor = Predictor.load(tmp_path)
    assert predictor.encoder is None
    assert predictor.predict(brought[2]).pos.shape == (90, 2)
    with pytest.raises(UserError, match="--embedding"):
        predictor.predict(slides[0])


def test_too_small_slides_are_refused_by_name(slides, tmp_path):
    config = load_config(None, [*SMALL, "train.miniset_min=150", "train.miniset_max=200"])
    with pytest.raises(UserError, match=r"has 140 cells.*train\.miniset_min=140"):
        fit(slides[:2], slides[2:3], config, tmp_path)


def test_a_model_learns_where_cells_lie(tmp_path):
    """An embedding that holds the position, up to noise and a turn: the map must come out."""
    generator = np.random.default_rng(1)
    turn = generator.normal(size=(2, 16))
    made = simulate("cortex", slides=3, spots=200, genes=50, seed=9)
    for slide in made:
        pos = (slide.pos - slide.pos.mean(0)) / slide.pos.std()
        features = np.tanh(pos @ turn) + 0.05 * generator.normal(size=(200, 16))
        slide.embedding = features.astype(np.float32)
    config = load_config(
        None,
        [
            *SMALL,
            "data.embedding=obsm:x",
            "train.epochs=6",
            "train.minisets=30",
            "train.lr=2e-3",
            "model.recycles=3",
            "train.gate_steps=20",
        ],
    )
    config.save(tmp_path)
    fit(made[:2], made[2:], config, tmp_path)
    prediction = Predictor.load(tmp_path).predict(made[2])
    score = evaluate_layout(prediction.pos, made[2].pos)
    assert score["distance_spearman"] > 0.8
    assert score["neighbor_hit@15"] > 3 * score["neighbor_hit_chance@15"]


def test_prediction_does_not_look_at_positions(run, slides):
    predictor = Predictor.load(run)
    from dataclasses import replace

    blind = replace(slides[3], pos=None)
    first, second = predictor.predict(slides[3], seeds=2), predictor.predict(blind, seeds=2)
    assert np.array_equal(first.pos, second.pos)
    assert np.array_equal(first.uncertainty, second.uncertainty)
    assert first.uncertainty.shape == (140,) and (first.uncertainty > 0).all()
    assert np.square(first.pos).sum(1).mean() == pytest.approx(1.0, rel=1e-5)


def test_evaluation_writes_metrics_and_report(run, slides, tmp_path):
    metrics = evaluate_slide(Predictor.load(run), slides[3], tmp_path, seeds=2)
    saved = json.loads((tmp_path / "metrics.json").read_text())
    for name in (
        "distance_spearman",
        "neighbor_hit@15",
        "E_geo_hgate",
        "E_geo_tedge",
        "L_RW_hgate",
    ):
        assert saved[name] == pytest.approx(metrics[name])
    assert saved["E_geo_floor"] == pytest.approx(0.0, abs=1e-9)
    assert saved["true coordinates/distance_spearman"] == pytest.approx(1.0)
    assert "ridge/distance_spearman" in saved and "no gate/distance_spearman" in saved
    page = (tmp_path / "report.html").read_text()
    assert slides[3].name in page and "http://" not in page.split("<body")[1]
    # of the map that is handed out, not of the recycles' last
    predictor = Predictor.load(run)
    predictor.config = predictor.config.replace(
        refine={"steps": 20, "anchor": 1.0, "enough": 2.0, "narrow": 0.05}
    )
    bundle = score_slide(predictor, slides[3], baselines=False)
    model, shape = bundle.methods["model"], collapse_diagnostics(bundle.pred)
    assert bundle.diagnostics["lambda_ratio"] == model["lambda_ratio"] == shape["lambda_ratio"]
    assert shape["lambda_ratio"] != collapse_diagnostics(bundle.trajectory[-1])["lambda_ratio"]
    told = [name for name in saved if "/" not in name and not name.endswith("_se")]
    assert not [name for name in told if not metric_info(name).explanation]


def test_a_slide_of_the_training_set_is_recognised(run, slides, tmp_path):
    from dataclasses import replace

    renamed = replace(slides[0], name="something else")
    evaluate_slide(Predictor.load(run), renamed, tmp_path, baselines=False)
    assert "took part in training" in (tmp_path / "report.html").read_text()


def test_energies_are_zero_at_the_truth_and_not_elsewhere(slides):
    pos = slides[0].pos
    shuffled = pos[np.random.default_rng(0).permutation(len(pos))]
    values = e_geo_of_layouts({"model": shuffled, "true coordinates": pos * 3 + 7}, pos, seed=0)
    assert values["true coordinates"]["E_geo"] == pytest.approx(0, abs=1e-9)
    model = values["model"]
    assert model["E_geo"] > 0.5
    assert model["E_geo"] == pytest.approx(model["L_RW"] + 0.1 * model["L_stress"])


def test_recorded_attention_is_the_attention(run, slides):
    predictor = Predictor.load(run)
    h = torch.from_numpy(predictor.embed(slides[3]))
    prediction = predictor.predict(slides[3])
    bias, _ = predictor.edge_bias(h, prediction.graph)
    records = list(recycle_records(predictor.model, h, prediction.graph, bias))
    _, weights = predictor.model(h, prediction.graph, edge_bias=bias, return_attention_weights=True)
    assert len(records) == 2
    for record, (_, attention) in zip(records, weights, strict=True):
        torch.testing.assert_close(record.attention, attention)


def test_spatial_gene_follows_the_tissue(slides):
    name, values = spatial_gene(slides[0], None)
    assert name in set(slides[0].genes) and values.shape == (140,)
    assert spatial_gene(slides[0], ["not there"]) is None


@pytest.fixture
def units(slides):
    config = load_config(None, SMALL)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(140, 16, generator=generator)
    data = TrainingSlide("a", h, torch.from_numpy(slides[0].pos))
    return config, MinisetPool([data, data], 6, config, seed=0)


def test_minisets_are_balanced_random_subsets(units):
    config, pool = units
    assert [which for which, _ in pool.sets] == [0, 1] * 3
    for _, rows in pool.sets:
        assert config.train.miniset_min <= len(rows) <= config.train.miniset_max
        assert len(rows.unique()) == len(rows)
    assert not torch.equal(pool.sets[0][1][:40], pool.sets[2][1][:40])
    assert pool[0] is pool[0]


def test_merged_minisets_have_the_losses_of_each(units):
    from ipar_sparse.supervision.losses import gate_loss, rw_kl_loss

    _, pool = units
    parts = [pool[0], pool[1]]
    whole = merge(parts)
    generator = torch.Generator().manual_seed(0)
    pos = torch.randn(len(whole.h), 2, generator=generator, dtype=torch.float64)
    logits = torch.randn(whole.graph.num_edges, generator=generator)
    sizes = [len(p.h) for p in parts]
    each = [rw_kl_loss(x, p.target.walk) for x, p in zip(pos.split(sizes), parts, strict=True)]
    expected = sum(v * n for v, n in zip(each, sizes, strict=True)) / sum(sizes)
    torch.testing.assert_close(rw_kl_loss(pos, whole.target.walk), expected)
    edges = [p.graph.num_edges for p in parts]
    each = [
        gate_loss(x, p.graph, probability=p.gate_target)
        for x, p in zip(logits.split(edges), parts, strict=True)
    ]
    got = gate_loss(logits, whole.graph, probability=whole.gate_target)
    rows = [(p.graph.to_table(p.gate_target) > 0).any(1).sum() for p in parts]
    torch.testing.assert_close(got, sum(v * n for v, n in zip(each, rows, strict=True)) / sum(rows))


def test_dropped_edges_leave_one_a_cell(slides, tmp_path):
    config = load_config(None, [*SMALL, "train.edge_drop=0.97"])
    run = trainer_module._Run.__new__(trainer_module._Run)
    run.config = config
    unit = build_unit(torch.randn(140, 16), torch.from_numpy(slides[0].pos), config, 0)
    h, bias = run._augment(unit, torch.Generator().manual_seed(0))
    kept = torch.isfinite(unit.graph.to_table(bias))
    assert bool((kept.sum(1) >= 1).all())
    assert 0.01 < float(kept.float().mean()) < 0.2
    assert float((h == 0).float().mean()) == pytest.approx(0.1, abs=0.03)
    again = run._augment(unit, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], h) and torch.equal(again[1], bias)


def test_embedding_scale_keeps_neighbours():
    parts = [torch.randn(50, 6) * torch.tensor([9.0, 1, 1, 1, 1, 1]) + 4, torch.randn(30, 6)]
    scale = EmbeddingScaler(6).fit(parts)
    scaled = torch.cat([scale(p) for p in parts])
    ratio = torch.pdist(scaled) / torch.pdist(torch.cat(parts))
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_infonce_is_its_formula():
    settings = load_config(None, ["encoder.hard_negatives=1"]).encoder
    a, p = torch.randn(4, 8), torch.randn(4, 8)
    far = ~torch.eye(4, dtype=torch.bool)
    far[0, 1] = False
    value = _infonce(a, p, far, settings)
    expected = 0.0
    for i in range(4):
        sim = [float(torch.cosine_similarity(a[i], p[j], dim=0)) / 0.1 for j in range(4)]
        negatives = [sim[j] for j in range(4) if far[i, j]]
        negatives.append(max(negatives))
        expected -= sim[i] - math.log(math.exp(sim[i]) + sum(map(math.exp, negatives)))
    assert float(value) == pytest.approx(expected / 4, rel=1e-4)


@pytest.mark.parametrize("preset", ["v1", "record"])
def test_encoder_loss_has_its_parts(slides, preset):
    config = load_config(None, SMALL, preset=preset)
    genes, _ = match_genes(slides)
    data = ContrastiveSlide(Expression.from_slide(slides[0], genes), slides[0].pos, 15, 0.5)
    encoder = SharedEncoder(len(genes), (24,), 16, skip=preset == "v1")
    losses = encoder_loss(
        encoder, data, config.encoder, torch.Generator().manual_seed(0), torch.device("cpu")
    )
    weights = {"infonce": 0.3, "distance": 1.0}
    if preset == "record":
        weights = {"infonce": 1.0, "invariance": 25.0, "variance": 50.0, "covariance": 1.0}
    assert losses.keys() == {"loss", *weights}
    torch.testing.assert_close(losses["loss"], sum(w * losses[k] for k, w in weights.items()))
    losses["loss"].backward()
    behind = {"mlp.0.weight", "mlp.0.bias", "mlp.1.weight", "mlp.1.bias"}  # a last layer of zeros
    for name, weight in encoder.named_parameters():
        learns = bool(weight.grad.abs().sum() > 0)
        assert learns == (preset == "record" or name not in behind), name


def test_distance_loss_is_zero_on_any_scaled_copy_and_nowhere_else():
    generator = torch.Generator().manual_seed(0)
    pos = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    turned = 7 * pos @ torch.tensor([[0.6, -0.8, 0.0], [0.8, 0.6, 0.0]], dtype=torch.float64)
    assert float(_distance(turned, pos)) < 1e-6  # distances below the floor excepted
    log = torch.log
    other = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    i, j = torch.triu_indices(40, 40, 1)
    ratio = log((other[i] - other[j]).norm(dim=1)) - log(
        (pos[i] - pos[j]).norm(dim=1).clamp(min=0.02)
    )
    torch.testing.assert_close(_distance(other, pos), ratio.var(unbiased=False))
    doubled = torch.cat([other, other]).requires_grad_()
    _distance(doubled, torch.cat([pos, pos])).backward()
    assert bool(torch.isfinite(doubled.grad).all())


def test_an_untrained_encoder_with_a_linear_path_is_pca(slides):
    genes, _ = match_genes(slides)
    plain = [Expression.from_slide(slide, genes) for slide in slides[:2]]
    axes, scale = principal_axes(plain, 32)
    torch.testing.assert_close(axes.T @ axes, torch.eye(32), atol=1e-5, rtol=0)
    encoder = SharedEncoder(len(genes), (24,), 16, skip=True).eval()
    encoder.start_from(axes, scale)
    x = torch.from_numpy(plain[0].rows())
    torch.testing.assert_close(encoder(x), scale * x @ axes[:, :16])
    both = torch.cat([torch.from_numpy(p.rows()) for p in plain]).double()  # of equal sizes
    values = torch.linalg.eigvalsh(both.T @ both / len(both)).flip(0)
    found = (both @ axes.double()).square().mean(0)
    torch.testing.assert_close(found, values[:32], rtol=1e-4, atol=1e-6)
    assert float((scale**2 * found).sum()) == pytest.approx(1.0, rel=1e-4)


def test_smoothing_averages_with_the_nearest_in_expression(slides):
    genes, _ = match_genes(slides)
    plain = Expression.from_slide(slides[0], genes)
    encoder = SharedEncoder(len(genes), (24,), 16, smooth=4)
    encoder.start_from(*principal_axes([plain], 30))
    found = read_expression(slides[0], genes, encoder).rows()
    x = plain.rows().astype(np.float64)
    place = x @ encoder.axes.double().numpy()
    gap = np.square(place[:, None] - place[None]).sum(-1)
    np.fill_diagonal(gap, np.inf)
    near = np.argsort(gap, axis=1)[:, :4]
    np.testing.assert_allclose(found, (x + x[near].mean(1)) / 2, atol=1e-4)
    rows = np.array([7, 3])
    smoothed = read_expression(slides[0], genes, encoder)
    np.testing.assert_allclose(smoothed.rows(rows), found[rows], atol=1e-5)


def test_genes_are_weighted_before_anything_else(slides):
    genes, _ = match_genes(slides)
    config = load_config(None, ["encoder.hidden=[24]", "encoder.out=16", "model.dim=16"])
    config = weigh(config, 0.5, 0.25)
    encoder = trainer_module.build_encoder(config, len(genes))
    begin(encoder, slides[:2], genes, config)
    totals = [np.asarray(s.expression.sum(axis=1)) for s in slides[:2]]
    totals = [np.median(t[t > 0]) for t in totals]
    assert float(encoder.target_sum) == pytest.approx(np.median(totals))
    found = read_expression(slides[2], genes, encoder)
    found.mix = None
    plain = Expression.from_slide(slides[2], genes, float(encoder.target_sum))
    np.testing.assert_allclose(found.rows(), plain.rows() * encoder.gene_weight.numpy(), atol=1e-5)
    as_before = load_config(None, preset="record")
    assert trainer_module.build_encoder(as_before, len(genes)).gene_weight is None


@pytest.mark.parametrize("which", ["principal", "spatial"])
def test_a_finished_embedding_is_what_was_learned_beside_the_components(slides, which):
    """The best projection of the two side by side, in as many dimensions as before."""
    genes, _ = match_genes(slides)
    plain = [Expression.from_slide(slide, genes) for slide in slides[:2]]
    torch.manual_seed(0)
    encoder = SharedEncoder(len(genes), (24,), 16, skip=True).eval()
    nn.init.normal_(encoder.linear.weight, std=0.01)
    nn.init.normal_(encoder.mlp[-1].weight, std=0.1)
    nn.init.normal_(encoder.mlp[-1].bias)
    positions = [slide.pos for slide in slides[:2]]
    settings = load_config(None, [f"encoder.kept={which}"]).encoder
    if which == "principal":
        axes, _ = principal_axes(plain, 16)
    else:
        axes, _ = spatial_axes(plain, positions, 16)

    def covariance(parts):
        return sum(torch.cov(x.T, correction=0) for x in parts) / len(parts)

    learned = [encode(encoder, x, "cpu").double() for x in plain]
    kept = [torch.from_numpy(x.rows()).double() @ axes.double() for x in plain]
    factors = [1.0 / covariance(learned).trace().sqrt(), 0.5 / covariance(kept).trace().sqrt()]
    pairs = zip(learned, kept, strict=True)
    both = [torch.cat([factors[0] * h, factors[1] * p], 1) for h, p in pairs]
    values, vectors = torch.linalg.eigh(covariance(both))
    finish(encoder, plain, positions, settings)
    after = [encode(encoder, x, "cpu").double() for x in plain]
    expected = both[1] @ vectors[:, -16:]
    torch.testing.assert_close(torch.pdist(after[1]), torch.pdist(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        covariance(after).diagonal(), values[-16:].flip(0), rtol=1e-3, atol=1e-6
    )
    bare = SharedEncoder(len(genes), (24,), 16).eval()
    learned = encode(bare, plain[0], "cpu")
    finish(bare, plain, positions, settings)
    assert torch.equal(encode(bare, plain[0], "cpu"), learned)


def test_spatial_axes_are_the_directions_in_which_neighbors_agree():
    """Against the plain definition; a field that hardly varies comes before noise that does."""
    rng = np.random.default_rng(0)
    pos = [rng.uniform(-1, 1, (300, 2)) for _ in range(2)]
    mixing = rng.standard_normal((12, 12))
    parts = []
    for x in pos:
        field = np.column_stack([0.5 * np.sin(2 * x[:, 0]), 0.4 * x[:, 1], np.zeros((300, 10))])
        values = (field + rng.standard_normal((300, 12)) * np.r_[0.2, 0.2, [1.0] * 10]) @ mixing
        matrix = sparse.csr_matrix((values - values.mean(0)).astype(np.float32))
        parts.append(Expression(matrix, [f"g{i}" for i in range(12)]))
    axes, scale = spatial_axes(parts, pos, 12)
    dense = [part.rows().astype(np.float64) for part in parts]
    variance, alike = 0.0, 0.0
    for x, place in zip(dense, pos, strict=True):
        gap = np.linalg.norm(place[:, None] - place[None], axis=-1)
        np.fill_diagonal(gap, np.inf)
        around = x[np.argsort(gap, axis=1)[:, :15]].mean(1)
        cross = x.T @ (around - around.mean(0)) / 300
        alike = alike + (cross + cross.T) / 4
        variance = variance + np.cov(x.T, bias=True) / 2
    ridge = variance + 0.5 * np.trace(variance) / 12 * np.eye(12)
    mu, found = scipy.linalg.eigh(alike, ridge)
    mu = mu[::-1].clip(1e-4, 0.999)
    expected = found[:, ::-1] * np.sqrt(mu / (1 - mu))
    got = axes.double().numpy()
    np.testing.assert_allclose(np.abs(got), np.abs(expected), rtol=1e-3, atol=1e-5)
    total = np.mean([np.square(x @ got).sum(1).mean() for x in dense])
    assert scale**2 * total == pytest.approx(1.0, rel=1e-4)
    plain = principal_axes(parts, 12)[0].double().numpy()

    def told(directions):  # correlation of the two leading components with the place
        place = np.column_stack([pos[0], np.ones(300)])
        values = dense[0] @ directions[:, :2]
        fitted = place @ np.linalg.lstsq(place, values, rcond=None)[0]
        return fitted.var(0).sum() / values.var(0).sum()

    assert told(got) > 3 * told(plain)


def test_spatial_axes_of_a_slide_of_one_cell_are_not_asked(slides):
    genes, _ = match_genes(slides)
    one = Expression.from_slide(slides[0], genes)
    one = Expression(one.matrix[:1], genes)
    axes, scale = spatial_axes([one], [slides[0].pos[:1]], 4)
    assert bool(torch.isfinite(axes).all()) and np.isfinite(scale)


@pytest.mark.parametrize("setting", ["encoder.keep=0", "encoder.steps=0"])
def test_an_encoder_that_keeps_nothing_or_is_not_trained(slides, tmp_path, setting):
    """Nothing is added to what it learned; without training it is its components."""
    config = load_config(None, [*SMALL, setting])
    trainer_module.fit_encoder(slides[:2], config, tmp_path)
    meta = read_meta(tmp_path / LAST)
    genes, config = meta["genes"], trainer_module.settle(config, meta["facts"])
    encoder = trainer_module.build_encoder(config, len(genes))
    load_checkpoint(tmp_path / LAST, {"encoder": encoder})
    begun = trainer_module.build_encoder(config, len(genes))
    begin(begun, slides[:2], genes, config)
    same = torch.equal(encoder.linear.weight, begun.linear.weight)
    assert same == (setting == "encoder.steps=0")
    if same:
        assert not encoder.mlp[-1].weight.any()


def test_a_foreign_checkpoint_is_refused(run, tmp_path):
    config = load_config(None, [*SMALL, "model.channels=24"])
    with pytest.raises(UserError):
        _, model = trainer_module.build_gate_and_model(config, 16)
        load_checkpoint(run / BEST, {"model": model})


def test_on_a_slide_larger_than_a_miniset_candidates_reach_as_far_as_in_one(run, slides):
    """Nearest in a random sample, unless there is none; those nearest of all are kept."""
    predictor = Predictor.load(run)
    near = predictor.predict(slides[3])
    assert near.graph is near.candidates
    predictor.config = predictor.config.replace(graph={"pool": 50})
    far = predictor.predict(slides[3])
    h = torch.from_numpy(near.embedding)
    settings = predictor.config.graph
    sampled = pooled_candidates(
        h,
        settings.k,
        50,
        metric=settings.metric,
        generator=torch.Generator().manual_seed(predictor.config.train.seed),
    )
    assert torch.equal(far.graph.index, sampled.index)
    assert torch.equal(far.candidates.index, near.candidates.index)
    for found in (near, far):  # both begin from the plane
        plane = gauge_fix(principal_plane(h))
        np.testing.assert_allclose(found.trajectory[0], plane, atol=1e-5)

    def reach(graph):
        source, target = graph.edge_index
        return float((h[source] - h[target]).norm(dim=1).mean())

    assert reach(far.graph) > 1.1 * reach(near.graph)
    assert not np.allclose(far.pos, near.pos)
    predictor.config = predictor.config.replace(train={"unit": "slide"})
    np.testing.assert_array_equal(predictor.predict(slides[3]).pos, near.pos)


def test_distances_are_as_expected_before_neighbors_are_drawn_together(run, slides):
    predictor = Predictor.load(run)
    predictor.config = predictor.config.replace(refine={"expected": 0, "steps": 0})
    plain = predictor.predict(slides[3])
    np.testing.assert_allclose(plain.pos, plain.trajectory[-1], atol=1e-6)
    predictor.config = predictor.config.replace(refine={"expected": 40})
    found = predictor.predict(slides[3])
    recycled = torch.from_numpy(found.trajectory[-1]).float()
    h = torch.from_numpy(found.embedding)
    seed = predictor.config.train.seed
    expected = correct_distances(recycled, None, h, steps=40, seed=seed)
    np.testing.assert_allclose(found.pos, expected.double(), atol=1e-4)
    assert not np.allclose(found.pos, plain.pos, atol=1e-3)
    drawn = {"steps": 20, "neighbors": 5, "anchor": 3.0, "enough": 2.0}
    predictor.config = predictor.config.replace(refine=drawn | {"whiten": 0.0, "power": 0.0})
    both = refine_layout(expected, found.candidates, **drawn, seed=seed)
    np.testing.assert_allclose(predictor.predict(slides[3]).pos, both.double(), atol=1e-3)
    scored = score_slide(predictor, slides[3], baselines=False)
    assert {"not expected", "not refined"} <= scored.methods.keys()
    only = refine_layout(recycled, found.candidates, **drawn, seed=seed)
    want = distance_metrics(only, slides[3].pos)["distance_spearman"]
    assert scored.methods["not expected"]["distance_spearman"] == pytest.approx(want, abs=0.02)
    assert not any("the model itself" in note for note in scored.notes)
    predictor.config = predictor.config.replace(refine={"enough": 0.0})  # it is always enough
    scored = score_slide(predictor, slides[3], baselines=False)
    (note,) = (note for note in scored.notes if "the model itself" in note)
    assert note.startswith('"not refined"')


def test_leading_components_count_by_how_they_vary():
    h = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7)
    centred = h - h.mean(0)
    u, spread, _ = torch.linalg.svd(centred, full_matrices=False)
    for power in (0.0, 0.5, 1.0):
        expected = u * spread * (spread / spread[0]) ** power
        found = leading_components(h + 3, power)
        found, expected = found.double(), expected.double()
        torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=0, atol=1e-3)
    assert (leading_components(torch.ones(5, 3)) == 0).all()


def test_the_last_step_may_go_by_leading_components(run, slides):
    predictor = Predictor.load(run)
    asked = {"steps": 20, "neighbors": 5, "anchor": 3.0, "enough": 2.0}
    none = {"whiten": 0.0, "power": 0.0, "expected": 0}
    predictor.config = predictor.config.replace(refine=asked | none)
    plain = predictor.predict(slides[3])
    assert plain.nearest is plain.candidates
    predictor.config = predictor.config.replace(refine={"power": 1.0})
    found = predictor.predict(slides[3])
    expected = knn(leading_components(torch.from_numpy(found.embedding)), 15)
    assert torch.equal(found.nearest.index, expected.index)
    assert torch.equal(found.candidates.index, plain.candidates.index)
    before = torch.from_numpy(found.trajectory[-1]).float()
    own = refine_layout(before, expected, **asked, seed=predictor.config.train.seed)
    np.testing.assert_allclose(found.pos, own.double(), atol=1e-4)
    assert not np.allclose(found.pos, plain.pos, atol=1e-2)


def test_the_last_step_may_leave_the_first_axis_alone(run, slides):
    predictor = Predictor.load(run)
    asked = {"steps": 20, "neighbors": 5, "anchor": 3.0, "enough": 2.0}
    predictor.config = predictor.config.replace(
        refine=asked | {"whiten": 0.0, "power": 0.0, "expected": 0, "narrow": 0.1}
    )
    found = predictor.predict(slides[3])
    recycled, h = torch.from_numpy(found.trajectory[-1]).float(), torch.from_numpy(found.embedding)
    narrow = narrowed(recycled, h, predictor.nearness, 0.1)
    own = refine_layout(
        recycled, found.candidates, **asked, seed=predictor.config.train.seed, begin=narrow
    )
    np.testing.assert_allclose(found.pos, own.double(), atol=1e-3)
    (caution,) = score_slide(predictor, slides[3], baselines=False).warnings
    assert caution.startswith("Only along its long axis") and "(refine.narrow 0.1)" in caution
    predictor.config = predictor.config.replace(refine={"steps": 0})  # the whole of it, or none
    assert not predictor.predict(slides[3]).cautions
    predictor.config = predictor.config.replace(refine={"steps": 20, "enough": 0.0})
    left = predictor.predict(slides[3])  # nothing to sharpen: as it is, and not narrow
    np.testing.assert_allclose(left.pos, left.trajectory[-1], atol=1e-6)
    assert not left.cautions
    np.testing.assert_allclose(predictor.predict(slides[3]).pos, found.trajectory[-1], atol=1e-6)


def test_the_last_step_goes_by_what_neighbours_of_the_training_slides_differ_in(run, slides):
    predictor = Predictor.load(run)
    known = [(torch.from_numpy(predictor.embed(s)), s.pos) for s in slides[:2]]
    expected = RelevantComponents(known[0][0].size(1)).fit(known)
    torch.testing.assert_close(
        predictor.nearness.covariance, expected.covariance, rtol=1e-3, atol=1e-5
    )
    h = torch.from_numpy(predictor.embed(slides[3]))
    candidates = predictor.candidates(h)
    for asked in (1.0, 0.5):
        predictor.config = predictor.config.replace(refine={"whiten": asked, "power": 0.0})
        found = predictor.nearest(h, candidates)
        assert torch.equal(found.index, knn(predictor.nearness(h, asked), 15).index)
    predictor.config = predictor.config.replace(refine={"whiten": None})  # not tried
    assert torch.equal(predictor.nearest(h, candidates).index, found.index)
    predictor.nearness = None  # a run saved before there was any
    assert predictor.nearest(h, candidates) is candidates


def test_attention_is_judged_on_the_nearest_candidates(run, slides):
    """Among those of a random sample there are few neighbours to find."""
    predictor = Predictor.load(run)
    near = score_slide(predictor, slides[3], baselines=False)
    predictor.config = predictor.config.replace(graph={"pool": 50})
    found = score_slide(predictor, slides[3], baselines=False)
    name = next(name for name in near.diagnostics if name.startswith("attn_recall@30/r0"))
    assert found.diagnostics[name] == pytest.approx(near.diagnostics[name], abs=1e-4)
    graph = predictor.predict(slides[3]).graph  # but what is shown is what the model looked at
    for focus in found.focus:
        assert set(focus.neighbors) <= set(graph.index[focus.cell].tolist())


def test_the_uncertainty_is_held_against_the_error(run, slides):
    found = score_slide(Predictor.load(run), slides[3], seeds=4, baselines=False)
    error = np.linalg.norm(align(found.pred, slides[3].pos)[0] - slides[3].pos, axis=1)
    ranks = [np.argsort(np.argsort(x)) for x in (found.uncertainty, error)]
    expected = np.corrcoef(*ranks)[0, 1]
    assert found.metrics["uncertainty_error_spearman"] == pytest.approx(expected, abs=1e-6)


def test_training_without_validation_runs_every_epoch(slides, tmp_path):
    config = load_config(None, SMALL)
    run, out = tmp_path / "run", tmp_path / "report"
    run.mkdir()
    config.save(run)
    result = fit(slides[:2], [], config, run)
    assert result.best is None and result.best_epoch is None
    rows = read_history(run / HISTORY)
    assert sum(row["stage"] == "joint" for row in rows) >= 1
    assert read_meta(run / LAST)["step"] == config.train.epochs * config.train.minisets
    best, last = states(run / BEST), states(run / LAST)
    assert all(torch.equal(best[key], last[key]) for key in best)
    evaluate_slide(Predictor.load(run), slides[3], out, baselines=False)
    assert (out / "report.html").is_file()


def test_expression_plane_is_pca_of_the_slide_alone(slides):
    genes, _ = match_genes(slides)
    plane = expression_plane(slides[3], genes)
    x = Expression.from_slide(slides[3], genes).rows().astype(np.float64)
    values = np.linalg.svd(x, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(plane, axis=0), values[:2], rtol=1e-3)


def test_principal_axes_of_many_genes_form_no_covariance(slides, monkeypatch):
    genes, _ = match_genes(slides)
    plain = [Expression.from_slide(slide, genes) for slide in slides[:2]]
    plain[0].empty[:3] = True
    dense, scale = principal_axes(plain, 5)
    monkeypatch.setattr(components, "_DENSE_GENES", 8)
    found, other = principal_axes(plain, 5)
    torch.testing.assert_close(found, dense, atol=1e-4, rtol=0)
    assert other == pytest.approx(scale, rel=1e-5)
