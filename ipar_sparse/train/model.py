"""Training of the gate, and of gate and model together: the steps, and the score of an epoch."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import progress
from ..config import RunConfig, TrainConfig
from ..inference import steps
from ..metrics.diagnostics import collapse_diagnostics, health_warnings
from ..nn import EdgeGateSoft, IPALiteModel
from ..ops.recording import Recorder
from ..supervision import e_geo, gate_loss, geometry_terms, target_graph
from .batches import Batches, GraphBatch, subsample_edges
from .history import SCORES, TERM_COLUMNS
from .loop import Loop, adamw, cosine, set_lr

logger = logging.getLogger(__name__)

_RECORD_CELLS = 50_000  # of a batch; larger ones take longer than their launches


@dataclass
class Trained:
    """What a training step works on.

    Args:
        gate: scores candidate edges.
        model: embeddings to positions.
        config: all settings.
        device: where both lie.
    """

    gate: EdgeGateSoft
    model: IPALiteModel
    config: RunConfig
    device: torch.device

    def optimizer(self, *modules: nn.Module) -> torch.optim.Optimizer:
        """AdamW on the parameters of some modules."""
        settings = self.config.train
        parameters = [p for module in modules for p in module.parameters()]
        return adamw(parameters, settings.lr, settings.weight_decay, self.device)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss, for float16 on a GPU alone."""
        half = self.config.train.precision == "float16" and self.device.type == "cuda"
        return torch.amp.GradScaler(self.device.type, enabled=half)

    def autocast(self):
        """The arithmetic of the forward pass."""
        precision = self.config.train.precision
        return torch.autocast(
            self.device.type, dtype=getattr(torch, precision), enabled=precision != "float32"
        )


def train_gate(parts: Trained, batches: Batches, loop: Loop) -> None:
    """Train the gate alone, on the reference walk over the candidate edges."""
    settings, gate = parts.config.train, parts.gate
    total = settings.gate_steps if parts.config.model.gated else 0
    optimizer, scaler = parts.optimizer(gate), parts.grad_scaler()
    gate.train()
    with loop.stage("gate", total, optimizer, scaler) as stage:
        for step in stage:
            generator = loop.generator("gate", step)
            batch = subsample_edges(batches.at("gate", step), settings, generator)
            h, _ = augment(batch, settings, generator)
            with parts.autocast():
                logits = gate(h, batch.graph)
            loss = gate_loss(logits.float(), batch.graph, probability=batch.gate_target)
            norm = update(loss, [*gate.parameters()], optimizer, scaler, settings.grad_clip)
            stage.record({"loss": loss, "l_gate": loss, "grad_norm": norm})


def train_model(parts: Trained, batches: Batches, loop: Loop) -> None:
    """Train gate and model together, and keep the weights of the best validated epoch."""
    settings = parts.config.train
    per_epoch = settings.steps_per_epoch
    total = settings.epochs * per_epoch
    optimizer = parts.optimizer(parts.gate, parts.model)
    scaler = parts.grad_scaler()
    parts.gate.train(), parts.model.train()
    recorded = RecordedSteps(parts, optimizer, scaler)
    with loop.stage("model", total, optimizer, scaler) as stage:
        while loop.state.step < total and loop.state.stale < settings.patience:
            epoch = loop.state.step // per_epoch
            for step in stage.until((epoch + 1) * per_epoch):
                set_lr(optimizer, cosine(step, total, settings.lr, settings.lr_min))
                batch = batches.at("joint", step)
                stage.record(recorded(batch, loop.seed_of("joint", step), step / per_epoch))
            whole = loop.state.step == (epoch + 1) * per_epoch
            if not whole:  # time is up: resuming goes on here, whatever the validation finds
                loop.save(stage)
            validate(parts, batches.val, epoch, loop)
            if whole:
                loop.save(stage)
                loop.between_steps(stage)
            if loop.late("model"):
                break
    if loop.state.best is None:
        if batches.val:
            logger.warning(
                "no epoch came after the random-walk weight reached its cap (epoch %d): "
                "the last weights are kept",
                first_counted_epoch(settings) + 1,
            )
        loop.save_best()


class RecordedSteps:
    """Steps of gate and model, which a GPU replays where it has seen their batch before.

    Args:
        parts: gate, model and settings.
        optimizer: of both.
        scaler: of gradients.
    """

    def __init__(
        self, parts: Trained, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ):
        self.parts, self.optimizer, self.scaler = parts, optimizer, scaler
        settings = parts.config.train
        self.generator = torch.Generator(parts.device)
        # what is drawn on the host, and what a float16 scale decides there, cannot be replayed
        varies = settings.k_fraction_range is not None or settings.mutual_prob > 0
        self.record = Recorder(
            parts.device, self.generator, enabled=not (varies or scaler.is_enabled())
        )
        self.walk_weight: Tensor | None = None
        if self.record.enabled and settings.rw_cap > 0:
            self.walk_weight = torch.zeros((), device=parts.device)

    def __call__(self, batch: GraphBatch, seed: int, epoch: float) -> dict[str, Any]:
        """One step on a batch; returns its losses, see :func:`losses_of`."""
        settings = self.parts.config.train
        self.generator.manual_seed(seed)
        if self.walk_weight is not None:
            self.walk_weight.fill_(walk_weight(epoch, settings))

        def step() -> dict[str, Any]:
            drawn = subsample_edges(batch, settings, self.generator)
            losses = training_step(
                self.parts,
                drawn,
                self.generator,
                epoch,
                self.optimizer,
                self.scaler,
                self.walk_weight,
            )
            return {
                name: value.detach() if isinstance(value, Tensor) else value
                for name, value in losses.items()
            }

        if not batch.stays or len(batch.h) > _RECORD_CELLS:
            return step()
        return self.record(id(batch), step)


def training_step(
    parts: Trained,
    batch: GraphBatch,
    generator: torch.Generator,
    epoch: float,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    rw_weight: Tensor | None = None,
) -> dict[str, Any]:
    """One step of gate and model; returns its losses, see :func:`losses_of`.

    On a GPU it never waits for the device, but for float16's scale.
    """
    losses = losses_of(parts, batch, generator, epoch, rw_weight)
    parameters = [*parts.gate.parameters(), *parts.model.parameters()]
    clip = parts.config.train.grad_clip
    losses["grad_norm"] = update(losses["loss"], parameters, optimizer, scaler, clip)
    return losses


def losses_of(
    parts: Trained,
    batch: GraphBatch,
    generator: torch.Generator,
    epoch: float,
    rw_weight: Tensor | None = None,
) -> dict[str, Any]:
    """The losses of one training step, by the columns of the history.

    Args:
        parts: gate, model and settings.
        batch: on the device.
        generator: source of augmentation, dropped edges and sampled pairs.
        epoch: time in epochs, which decides the weight of the random-walk loss.
        rw_weight: that weight on the device, where it changes between replays of a recorded step.
    """
    config, settings, target = parts.config, parts.config.train, batch.target
    h, dropped = augment(batch, settings, generator)
    with parts.autocast():
        bias, l_gate = dropped, h.new_zeros(())
        if config.model.gated:
            seen = h if settings.gate_noise else batch.h
            logits = parts.gate(seen, batch.graph)
            gate_bias = config.model.gate_weight * logits.float()
            drop = dropped.unsqueeze(-1) if gate_bias.dim() == 2 else dropped
            bias = gate_bias.masked_fill(torch.isinf(drop), -math.inf)
        pos = parts.model(
            h,
            batch.graph,
            edge_bias=bias,
            batch=target.batch if target.num_graphs > 1 else None,
            num_graphs=target.num_graphs,
            generator=generator,
            initial=batch.initial,
        )
    if config.model.gated:
        l_gate = gate_loss(logits.float(), batch.graph, probability=batch.gate_target)
    weights = term_weights(epoch, settings, rw_weight)
    terms = geometry_terms(
        pos,
        target,
        weights,
        probe_rows=settings.probe_rows if batch.whole else None,
        stress_pairs=settings.stress_pairs if batch.whole else None,
        generator=generator,
    )
    loss = sum(weight * terms[name] for name, weight in weights.items())
    loss = loss + settings.lambda_gate * l_gate
    named = {TERM_COLUMNS[name]: value for name, value in terms.items()}
    return {**named, "loss": loss, "l_gate": l_gate, "w_rw": weights.get("rw_kl", 0.0)}


def update(
    loss: Tensor,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    clip: float,
) -> Tensor:
    """One optimiser step with clipped gradients; returns their norm before clipping.

    Five recycles can multiply a gradient beyond what a float holds. Such a gradient says nothing
    and is taken as zero.
    """
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    bad = ~norm.isfinite()
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(bad, 0.0)
    scaler.step(optimizer)
    scaler.update()
    return norm


def augment(
    batch: GraphBatch, settings: TrainConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A noisy embedding (n, d), and an edge bias (E,) of 0 or, on dropped edges, -inf."""
    h, noise_h, dropout_h = batch.h, settings.noise_h, settings.dropout_h
    if settings.vary_augmentation:
        level = torch.empty(2, device=h.device).uniform_(0.5, 1.5, generator=generator)
        noise_h, dropout_h = noise_h * level[0], dropout_h * level[1]
    noise = torch.empty_like(h).normal_(generator=generator)
    keep = torch.empty_like(h).uniform_(generator=generator) >= dropout_h
    h = (h + noise_h * noise) * keep
    chance = torch.empty(batch.graph.num_edges, device=h.device).uniform_(generator=generator)
    # the edge with the best chance of each cell survives in any case
    table = batch.graph.to_table(chance, fill=-1.0)
    drop = table < settings.edge_drop
    if table.size(1):
        drop = drop & (table < table.amax(dim=1, keepdim=True))
    dropped = torch.zeros_like(chance).masked_fill(batch.graph.from_table(drop), -math.inf)
    return h, dropped


def validate(parts: Trained, batches: Sequence[GraphBatch], epoch: int, loop: Loop) -> None:
    """Score an epoch, and keep its weights if it is the best that counts.

    Epochs before the random-walk weight has reached its cap do not count.
    """
    if not batches:
        return
    settings, state = parts.config.train, loop.state
    with progress.stage("Validating"):
        scores = score(parts, batches, loop)
    counted = epoch >= first_counted_epoch(settings)
    # a model trained on the true neighbours is judged there: candidates are foreign to it
    graph = "tedge" if settings.attention_graph == "target" else "hgate"
    value = scores[f"{graph}_e_geo"]
    better = counted and (state.best is None or value < state.best)
    if counted:
        state.stale = 0 if better else state.stale + 1
    if better:
        state.best, state.best_epoch = value, epoch
    row = {f"val_{name}": value for name, value in scores.items()}
    loop.log("model", {**row, "epoch": epoch, "best": int(better)})
    logger.info(
        "epoch %d: validation E_geo (lower is better) %.3f, %.3f if true neighbours were known%s",
        epoch + 1,
        scores["hgate_e_geo"],
        scores["tedge_e_geo"],
        " (best so far)" if better else "" if counted else " (warm-up, not counted)",
    )
    if counted:
        names = ("lambda_ratio", "median_distance")
        for warning in health_warnings({name: scores[f"hgate_{name}"] for name in names}):
            logger.warning("epoch %d: %s", epoch + 1, warning)
    if better:
        loop.save_best()


@torch.no_grad()
def score(parts: Trained, batches: Sequence[GraphBatch], loop: Loop) -> dict[str, float]:
    """E_geo on the true neighbours (``tedge``) and on gated candidates (``hgate``), and its floor.

    Means over the batches; beside E_geo its two parts and the measures of collapse.
    """
    gate, model, config = parts.gate.eval(), parts.model.eval(), parts.config
    sums: dict[str, Any] = {}
    for number, batch in enumerate(batches):
        batch = batch.to(parts.device)
        bias, _ = steps.gate_bias(gate, batch.h, batch.graph, config)
        true = target_graph(batch.target.pos, mode=config.graph.target_mode).to(parts.device)
        layouts = {
            "hgate": model(batch.h, batch.graph, edge_bias=bias, initial=batch.initial),
            "tedge": model(batch.h, true, initial=batch.initial),
        }
        probes = config.train.probe_rows if batch.whole else None
        for kind, pos in layouts.items():
            generator = loop.generator("validation", number)
            values: dict[str, Any] = e_geo(pos.float(), batch.target, probes, generator)
            values |= collapse_diagnostics(pos)
            for name in SCORES:
                key = f"{kind}_{name}"
                sums[key] = sums.get(key, 0.0) + torch.as_tensor(values[name]).float().cpu()
        generator = loop.generator("validation", number)
        floor = e_geo(batch.target.pos.float(), batch.target, probes, generator)["e_geo"]
        sums["e_geo_floor"] = sums.get("e_geo_floor", 0.0) + floor.cpu()
    gate.train(), model.train()
    return {name: float(value) / len(batches) for name, value in sums.items()}


def term_weights(
    epoch: float, settings: TrainConfig, rw_weight: Tensor | None = None
) -> dict[str, Any]:
    """Weights of the geometry terms at a time in epochs; terms of weight 0 are not computed.

    A weight of the random walk that lies on the device is taken as it is.
    """
    weights: dict[str, Any] = {
        "rw_kl": walk_weight(epoch, settings),
        "stress_log": settings.lambda_stress,
        "multiscale": settings.lambda_multiscale,
        "gram": settings.lambda_gram,
        "long_range": settings.lambda_long,
        "repulsion": settings.lambda_rep,
        "entropy_reg": settings.lambda_ent,
    }
    found = {name: weight for name, weight in weights.items() if weight > 0}
    return found if rw_weight is None else found | {"rw_kl": rw_weight}


def walk_weight(epoch: float, settings: TrainConfig) -> float:
    """Weight of the random-walk loss: 0 in the warm-up, then a linear ramp to its cap."""
    if settings.ramp_epochs == 0:
        return settings.rw_cap if epoch >= settings.warmup_epochs else 0.0
    ramp = (epoch - settings.warmup_epochs) / settings.ramp_epochs
    return settings.rw_cap * min(1.0, max(0.0, ramp))


def first_counted_epoch(settings: TrainConfig) -> int:
    """The first epoch at whose end the random-walk weight has reached its cap."""
    return max(0, settings.warmup_epochs + settings.ramp_epochs - 1)
