"""Training on a GPU: no waiting in a step, precision, node order, checkpoints."""

import gc
import math

import pytest
import torch

from ipar_sparse import EdgeGateSoft, IPALiteModel
from ipar_sparse.graph import NeighborTable, knn
from ipar_sparse.graph.order import local_order
from ipar_sparse.nn.model import REORDER_FROM
from ipar_sparse.supervision.losses import gate_loss, geometry_terms
from ipar_sparse.supervision.targets import build_target, gate_target

pytestmark = pytest.mark.gpu
WEIGHTS = {"rw_kl": 0.3, "stress_log": 0.1, "repulsion": 0.01, "entropy_reg": 0.01}


def sheet(n, width=32, seed=0, device="cuda"):
    """Positions of cells, and embeddings that are a smooth map of them."""
    generator = torch.Generator().manual_seed(seed)
    pos = torch.randn(n, 2, generator=generator)
    wave = 1.5 * torch.randn(2, width, generator=generator)
    h = torch.cos(pos @ wave + 6.28 * torch.rand(width, generator=generator))
    return pos, (h + 0.1 * torch.randn(n, width, generator=generator)).to(device)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_on_a_whole_slide_never_waits(tmp_path, monkeypatch, precision):
    pytest.importorskip("anndata")
    from ipar_sparse.config import load_config
    from ipar_sparse.data.simulation import simulate
    from ipar_sparse.train import model as training
    from ipar_sparse.train.fit import fit

    config = load_config(
        None,
        [
            "encoder.steps=2",
            "encoder.hidden=[24]",
            "train.batch_kind=slide",
            "train.epochs=2",
            "train.steps_per_epoch=3",
            "train.warmup_epochs=0",
            "train.ramp_epochs=0",
            "train.gate_steps=2",
            "train.val_minisets=1",
            "train.probe_rows=64",
            "train.lambda_long=0.1",
            "train.lambda_multiscale=0.1",
            "data.max_genes=60",
            "selection.mode=none",
            "train.device=cuda",
            f"train.precision={precision}",
        ],
    )
    step, watched = training.training_step, []

    def watch(*args):
        watched.append(len(watched))
        if len(watched) == 1:  # compiles kernels, and orders the graph
            return step(*args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(training, "training_step", watch)
    slides = simulate("cortex", slides=2, spots=1500, genes=80, seed=3)
    fit(slides[:1], slides[1:], config, tmp_path)
    assert watched == [0, 1]  # computed once, recorded once, and replayed from then on


def train(precision, seed, steps=200):
    """Mean loss of the first and of the last thirty steps of a small model."""
    torch.manual_seed(seed)
    pos, h = sheet(500)
    graph = knn(h, 60)
    target = build_target(pos, mode="exact")
    probability = gate_target(graph.to("cpu"), target.walk).float().cuda()
    target = target.to("cuda")
    gate = EdgeGateSoft(32).cuda()
    model = IPALiteModel(32, channels=32, heads=2, num_recycles=3).cuda()
    parameters = [*gate.parameters(), *model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    generator = torch.Generator("cuda").manual_seed(seed)
    losses = []
    for _ in range(steps):
        noisy = h + 0.1 * torch.empty_like(h).normal_(generator=generator)
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = gate(h, graph)
            found = model(noisy, graph, edge_bias=2.0 * logits.float(), generator=generator)
        terms = geometry_terms(found, target, WEIGHTS, generator=generator)
        loss = sum(weight * terms[name] for name, weight in WEIGHTS.items())
        loss = loss + 0.05 * gate_loss(logits.float(), graph, probability=probability)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    return float(losses[:30].mean()), float(losses[-30:].mean())


def test_bfloat16_converges_as_float32_does():
    reached = {
        precision: torch.tensor([train(precision, seed) for seed in range(4)])
        for precision in ("float32", "bfloat16")
    }
    first, last = reached["float32"].unbind(1)
    assert bool((last < 0.5 * first).all())
    noise = float(last.std())
    gap = reached["bfloat16"][:, 1] - last
    print(f"float32 {last.tolist()}, bfloat16 - float32 {gap.tolist()}")
    # Means of four differ by half of one run's noise, standard deviation, in each precision.
    assert abs(float(gap.mean())) < 2.5 * noise * math.sqrt(2 / 4)


@pytest.mark.parametrize("saving", [False, True])
def test_large_graphs_run_in_another_order_and_come_back(saving):
    n = 100_000  # of fewer, gradients are smaller beside the rounding of a sum that cancels
    assert n >= REORDER_FROM
    _, h = sheet(n, 16)
    index = knn(h, 12).index
    bias = torch.randn(n * 12, device="cuda")
    weigh = torch.randn(n, 2, device="cuda")
    results = []
    for reorder in (False, None):
        torch.manual_seed(0)
        model = IPALiteModel(
            16,
            channels=32,
            heads=2,
            num_recycles=3,
            reorder=reorder,
            checkpoint_recycles=saving,
            init_std=0.0,
        ).cuda()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        graph = NeighborTable(index)
        given = [h.clone().requires_grad_(), bias.clone().requires_grad_()]
        pos = model(given[0], graph, edge_bias=given[1])
        assert (local_order(graph) is not None) is (reorder is None)
        grads = torch.autograd.grad((pos * weigh).sum(), [*given, *model.parameters()])
        results.append([pos.detach(), *grads])
    # The gauge makes the gradient of the first positions' bias a sum that cancels to nothing.
    floor = 5e-3 * max(float(plain.norm()) for plain in results[0])
    for plain, ordered in zip(*results, strict=True):
        assert float((plain - ordered).norm()) <= 5e-4 * max(float(plain.norm()), floor)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_checkpointed_recycles_compute_the_same_in_less_memory(precision):
    n, k = 20_000, 20
    _, h = sheet(n, 32)
    graph = knn(h, k)
    torch.manual_seed(0)
    model = IPALiteModel(32, init_std=0.0).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    results, peaks = [], []
    for saving in (False, True, False, True):
        model.checkpoint_recycles = saving
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
            pos = model(h, graph)
        grads = torch.autograd.grad((pos**2)[:, 0].sum(), list(model.parameters()))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        results.append([pos.detach(), *grads])
    for plain, saved in zip(*results[:2], strict=True):
        assert torch.equal(plain, saved)
    assert peaks[3] < 0.6 * peaks[2]


def test_gate_products_follow_torchs_float32_precision():
    _, h = sheet(3000, 128)
    graph = knn(h, 40)
    torch.manual_seed(0)
    gate = EdgeGateSoft(128).cuda()
    grad = torch.rand(graph.num_edges, device="cuda")
    results = {}
    for name in ("exact", "highest", "high"):
        backend, dtype = ("reference", torch.float64) if name == "exact" else ("triton", None)
        gate.backend = backend
        module = gate.double() if dtype else gate.float()
        try:
            torch.set_float32_matmul_precision("high" if name == "high" else "highest")
            logits = module(h.to(dtype or h.dtype), graph)
            grads = torch.autograd.grad(logits, list(gate.parameters()), grad.to(logits.dtype))
        finally:
            torch.set_float32_matmul_precision("highest")
        results[name] = [t.double() for t in (logits.detach(), *grads)]

    def error(name, part):
        want = results["exact"][part]
        return float((results[name][part] - want).norm() / want.norm())

    assert error("highest", 0) < 1e-5 < error("high", 0) < 2e-3
    assert max(error("high", part) for part in range(1, 7)) < 5e-2


@pytest.mark.parametrize("n", [1500, 5000])
def test_targets_are_the_same_on_both_devices(n):
    pos, _ = sheet(n)
    host, device = build_target(pos, seed=2), build_target(pos.cuda(), seed=2)
    assert torch.equal(host.walk.pair, device.walk.pair.cpu())
    assert torch.equal(host.walk.transposed, device.walk.transposed.cpu())
    torch.testing.assert_close(host.walk.precision, device.walk.precision.cpu())
    assert torch.equal(host.stress.edge_index, device.stress.edge_index.cpu())
    torch.testing.assert_close(host.stress.dist, device.stress.dist.cpu())
    assert torch.equal(host.multiscale.edge_index, device.multiscale.edge_index.cpu())


def test_layout_steps_agree_with_the_host():
    from ipar_sparse.layout import correct_distances, refine_layout

    pos, h = sheet(3000, device="cpu")
    blurred = pos + 0.2 * torch.randn(pos.shape, generator=torch.Generator().manual_seed(1))
    graph, variance = knn(h, 15), torch.rand(3000, generator=torch.Generator().manual_seed(2))
    there = NeighborTable(graph.index.cuda())
    host = correct_distances(blurred, variance, h, steps=30)
    device = correct_distances(blurred.cuda(), variance.cuda(), h.cuda(), steps=30)
    assert float((host - device.cpu()).abs().max()) < 1e-3
    host = refine_layout(blurred, graph, steps=45, skip_if_overlap=2.0)
    device = refine_layout(blurred.cuda(), there, steps=45, skip_if_overlap=2.0)
    # cells between two others may pass either way
    assert float((host - device.cpu()).abs().mean()) < 2e-3


def test_expression_is_the_same_on_both_devices():
    pytest.importorskip("anndata")
    from ipar_sparse.data.expression import Expression
    from ipar_sparse.data.resident import resident
    from ipar_sparse.data.simulation import simulate
    from ipar_sparse.estimators.components import principal_axes

    slide = simulate("cortex", slides=1, spots=900, genes=80, seed=3)[0]
    slide.empty[[3, 700]] = True
    plain = Expression.from_slide(slide, slide.genes)
    near = knn(torch.from_numpy(slide.pos), 10).index.numpy()
    rows = torch.tensor([700, 3, 5, 5, 899])
    for expression in (plain, plain.smoothed(near)):
        host = torch.from_numpy(expression.rows(rows.numpy()))
        there = resident(expression, torch.device("cuda"))
        torch.testing.assert_close(there.rows(rows.cuda()).cpu(), host)
        torch.testing.assert_close(there.keep_dense().rows(rows.cuda()).cpu(), host)
        (axes, scale), (found, other) = (
            principal_axes([expression], 5, d) for d in ("cpu", "cuda")
        )
        torch.testing.assert_close(found, axes, atol=1e-4, rtol=0)
        assert other == pytest.approx(scale)


STILL = ["train.noise_h=0", "train.dropout_h=0", "train.edge_drop=0", "model.init=pca"]


def test_losses_and_gradients_of_a_step_agree_with_the_host():
    from small_run import small_config

    from ipar_sparse.inference.modules import build_gate_and_model
    from ipar_sparse.train.batches import EmbeddedSlide, build_batch
    from ipar_sparse.train.model import Trained, losses_of

    pos, h = sheet(300, 16, device="cpu")
    # what is drawn stays out: each device draws numbers of its own
    drawn = ("train.lambda_rep=0", "train.lambda_long=0", "model.init_std=0")
    config = small_config(*STILL, *drawn, "train.lambda_gram=1", "graph.k=20")
    batch = build_batch(EmbeddedSlide("a", h, pos.double()), config, seed=0)
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        gate, model = (part.to(device) for part in build_gate_and_model(config, 16))
        parts = Trained(gate, model, config, torch.device(device))
        losses = losses_of(parts, batch.to(device), torch.Generator(device), epoch=5.0)
        losses["loss"].backward()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in [*gate.parameters(), *model.parameters()] if p.grad is not None]
        )
        losses["norm"] = norm
        found.append({k: float(torch.as_tensor(v).detach()) for k, v in losses.items()})
    assert len(found[0]) > 6 and found[0]["loss"] > 0 and found[0]["norm"] > 0
    assert found[1] == pytest.approx(found[0], rel=2e-3, abs=1e-5)


def test_a_prediction_agrees_with_the_host(small_run, small_slides):
    from ipar_sparse.inference.predictor import Predictor

    slide = small_slides[2]
    host, there = (
        Predictor.load(small_run, torch.device(device)).predict(slide) for device in ("cpu", "cuda")
    )
    assert abs(host.embedding - there.embedding).max() < 1e-3
    for one, other in zip(host.trajectory, there.trajectory, strict=True):
        assert abs(one - other).mean() < 5e-3  # in radii; ties of candidates may fall either way
    assert abs(host.pos - there.pos).mean() < 2e-2
    assert abs(host.uncertainty - there.uncertainty).mean() < 1e-2


def test_slides_that_come_from_the_host_train_as_resident_ones_do(
    small_slides, tmp_path, monkeypatch
):
    from safetensors.torch import load_file
    from small_run import small_config

    from ipar_sparse.inference.run_folder import LAST
    from ipar_sparse.train import batches
    from ipar_sparse.train.fit import fit

    config = small_config("train.batch_kind=slide", "train.steps_per_epoch=6", "train.epochs=2")
    config = config.replace(train={"device": "cuda"})
    took, weights = [], []
    at = batches.Batches.at
    for name, cost in (("resident", batches.WHOLE_CELL), ("streamed", 1 << 50)):
        monkeypatch.setattr(batches, "WHOLE_CELL", cost)
        kept = []

        def watch(self, stage, step, kept=kept):
            kept.append({one.h.device.type for one in self.whole.values()})
            return at(self, stage, step)

        monkeypatch.setattr(batches.Batches, "at", watch)
        fit(small_slides[:2], small_slides[2:3], config, tmp_path / name)
        took.append(kept[-1])
        weights.append(load_file(tmp_path / name / LAST))
    assert took == [{"cuda"}, {"cpu"}]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-4)


def test_a_left_out_slide_scores_on_a_gpu_what_it_does_on_the_host():
    from ipar_sparse.train.cross_validation import HeldOutSlide

    generator = torch.Generator().manual_seed(0)
    pos, h = (torch.randn(900, width, generator=generator) for width in (2, 4))
    slide, layout = HeldOutSlide("donor", h, pos.numpy()), pos + 0.2 * h[:, :2]
    host, there = slide.score(layout), slide.score(layout.to("cuda"))
    assert 0.5 < host[0] < 1 and host[1] > 0.1
    assert there == pytest.approx(host, rel=1e-6)


def test_what_a_gpu_trains_with_is_loaded_before_a_selection():
    from ipar_sparse.config import RunConfig
    from ipar_sparse.config.presets import DEFAULT_SELECTION
    from ipar_sparse.train.brief import load_kernels

    config, before = RunConfig().with_values(DEFAULT_SELECTION), torch.cuda.memory_allocated()
    config = config.with_values({"data.target_sum": 1e4, "data.normalized": False})
    genes = [f"gene{number}" for number in range(300)]
    load_kernels(config, config.encoder.out, torch.device("cuda"), genes)
    gc.collect()
    # workspaces of libraries stay, 32 MiB for each stream that multiplies matrices
    assert torch.cuda.memory_allocated() - before < 160 << 20
