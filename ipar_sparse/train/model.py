"""Training of the gate, and of gate and model together: the steps, and the score of an epoch."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import progress
from ..config import RunConfig, TrainConfig
from ..distributed import shared_out
from ..inference import steps
from ..metrics.diagnostics import collapse_diagnostics, health_warnings
from ..nn import EdgeGateSoft, IPALiteModel
from ..ops.recording import Recorder
from ..supervision import e_geo, gate_loss, geometry_terms, target_graph
from ..supervision.losses import BY_CELL, Source
from .augmentation import augment
from .batches import Batches, GraphBatch, Share, subsample_edges
from .history import SCORES, TERM_COLUMNS
from .loop import Loop
from .optimizers import adamw, cosine, set_lr
from .sharing import SharedSteps, Sources

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

    def parameters(self) -> list[nn.Parameter]:
        """Those of gate and model."""
        return [*self.gate.parameters(), *self.model.parameters()]

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
    parameters, sources = [*gate.parameters()], Sources(parts.device)
    gate.train()

    def losses(batch: GraphBatch, source: Source, shares: Tensor | None = None):
        h, _ = augment(batch, settings, source)
        with parts.autocast():
            logits = gate(h, batch.graph)
        loss = gate_loss(in_full(logits), batch.graph, probability=batch.gate_target)
        loss = loss if shares is None else shares[2] * loss
        return {"loss": loss, "l_gate": loss}

    def step_on(share: Share, seeds: list[list[int]]) -> dict[str, Any]:
        draw = partial(_drawn, share, seeds, sources, parts)
        if share.alone is None:
            return shared(share, draw, ["loss", "l_gate"], losses)
        found = losses(*draw(0))
        norm = update(found["loss"], parameters, optimizer, scaler, settings.grad_clip)
        return {**found, "grad_norm": norm}

    take = partial(take_step, parameters, optimizer, scaler, settings.grad_clip)
    shared = SharedSteps(parameters, take, scaler, Recorder(parts.device, enabled=False))
    with loop.stage("gate", total, optimizer, scaler) as stage:
        for step in stage:
            share = batches.at("gate", step)
            stage.record(step_on(share, loop.seeds_of("gate", step, share.numbers)))


def _drawn(
    share: Share, seeds: list[list[int]], sources: Sources, parts: Trained, number: int
) -> tuple[GraphBatch, Source]:
    """A piece of a share on the candidates that its step sees, and the source of what is next."""
    source = sources(seeds[number])
    piece = share.pieces[number].to(parts.device)
    return subsample_edges(piece, parts.config.train, source), source


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
                share = batches.at("joint", step)
                seeds = loop.seeds_of("joint", step, share.numbers)
                stage.record(recorded(share, seeds, step / per_epoch))
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
        settings, self.sources = parts.config.train, Sources(parts.device)
        # what is drawn on the host, what a float16 scale decides there, and the plain kernels of
        # float64 cannot be replayed
        varies = settings.k_fraction_range is not None or settings.mutual_prob > 0
        exact = next(parts.model.parameters()).dtype == torch.float64
        self.record = Recorder(
            parts.device, *self.sources.all, enabled=not (varies or exact or scaler.is_enabled())
        )
        self.walk_weight: Tensor | None = None
        if self.record.enabled and settings.rw_cap > 0:
            self.walk_weight = torch.zeros((), device=parts.device)
        parameters = parts.parameters()
        take = partial(take_step, parameters, optimizer, scaler, settings.grad_clip)
        self.shared = SharedSteps(parameters, take, scaler, self.record)

    def __call__(self, share: Share, seeds: list[list[int]], epoch: float) -> dict[str, Any]:
        """One step on a batch; returns its losses, see :func:`losses_of`.

        Args:
            share: of the batch.
            seeds: of the graphs of its pieces.
            epoch: time in epochs.
        """
        parts, settings = self.parts, self.parts.config.train
        if self.walk_weight is not None:
            self.walk_weight.fill_(walk_weight(epoch, settings))
        draw = partial(_drawn, share, seeds, self.sources, parts)
        if share.alone is None:
            weights = term_weights(epoch, settings, self.walk_weight)
            names = ["loss", "l_gate", *(TERM_COLUMNS[name] for name in weights)]

            def losses(piece: GraphBatch, source: Source, shares: Tensor):
                return losses_of(parts, piece, source, epoch, self.walk_weight, shares)

            found = self.shared(share, draw, names, losses, _RECORD_CELLS)
            return {**found, "w_rw": weights.get("rw_kl", 0.0)}
        batch, source = draw(0)

        def step() -> dict[str, Any]:
            given = (epoch, self.optimizer, self.scaler, self.walk_weight)
            losses = training_step(parts, batch, source, *given)
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
    generator: Source,
    epoch: float,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    rw_weight: Tensor | None = None,
) -> dict[str, Any]:
    """One step of gate and model; returns its losses, see :func:`losses_of`.

    On a GPU it never waits for the device, but for float16's scale.
    """
    losses = losses_of(parts, batch, generator, epoch, rw_weight)
    clip = parts.config.train.grad_clip
    losses["grad_norm"] = update(losses["loss"], parts.parameters(), optimizer, scaler, clip)
    return losses


def losses_of(
    parts: Trained,
    batch: GraphBatch,
    generator: Source,
    epoch: float,
    rw_weight: Tensor | None = None,
    shares: Tensor | None = None,
) -> dict[str, Any]:
    """The losses of one training step, by the columns of the history.

    Args:
        parts: gate, model and settings.
        batch: on the device.
        generator: source of augmentation, dropped edges and sampled pairs; several are one for
            each member of a batch.
        epoch: time in epochs, which decides the weight of the random-walk loss.
        rw_weight: that weight on the device, where it changes between replays of a recorded step.
        shares: (3,) of all cells, graphs and cells with a true neighbour among their candidates
            that this part of a larger batch has. Losses are then its part of their means.
    """
    config, settings, target = parts.config, parts.config.train, batch.target
    h, dropped = augment(batch, settings, generator)
    rows, noise = batch.rows, None
    if rows is not None or isinstance(generator, Sequence):
        noise = _start_noise(batch, generator)
    clean = batch.h if rows is None or settings.gate_noise else batch.h[rows.nodes]
    seen = h if settings.gate_noise else clean
    if rows is not None:
        h, noise = h[: len(rows.own)], noise[rows.own]
    with parts.autocast():
        bias, l_gate = dropped, h.new_zeros(())
        if config.model.gated:
            logits = parts.gate(seen, batch.graph)
            gate_bias = config.model.gate_weight * in_full(logits)
            drop = dropped.unsqueeze(-1) if gate_bias.dim() == 2 else dropped
            bias = gate_bias.masked_fill(torch.isinf(drop), -math.inf)
        pos = parts.model(
            h,
            batch.graph,
            edge_bias=bias,
            batch=target.batch if target.num_graphs > 1 else None,
            num_graphs=target.num_graphs,
            generator=None if isinstance(generator, Sequence) else generator,
            initial=batch.initial,
            noise=noise,
            rows=rows,
        )
    pos = pos if rows is None else rows.whole(pos)
    if config.model.gated:
        l_gate = gate_loss(in_full(logits), batch.graph, probability=batch.gate_target)
    weights = term_weights(epoch, settings, rw_weight)
    terms = geometry_terms(
        pos,
        target,
        weights,
        probe_rows=settings.probe_rows if batch.whole else None,
        stress_pairs=settings.stress_pairs if batch.whole else None,
        generator=generator,
    )
    if shares is not None:
        terms = {n: shares[0 if n in BY_CELL else 1] * value for n, value in terms.items()}
        l_gate = shares[2] * l_gate
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
    return take_step(parameters, optimizer, scaler, clip)


def take_step(
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    clip: float,
) -> Tensor:
    """The step of :func:`update` with the gradients that parameters hold."""
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    bad = ~norm.isfinite()
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(bad, 0.0)
    scaler.step(optimizer)
    scaler.update()
    return norm


def in_full(values: Tensor) -> Tensor:
    """Values in float32, or float64 where they are."""
    return values if values.dtype == torch.float64 else values.float()


def _start_noise(batch: GraphBatch, sources: Source) -> Tensor:
    """Standard normal numbers (n, 2) for the first positions, each member's from its source."""
    sources = sources if isinstance(sources, Sequence) else [sources]
    kind = torch.float64 if batch.h.dtype == torch.float64 else torch.float32
    each = zip(batch.target.sizes, sources, strict=True)
    return torch.cat(
        [torch.randn(n, 2, generator=g, device=batch.h.device, dtype=kind) for n, g in each]
    )


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

    def scores_of(number: int) -> dict[str, float]:
        batch = batches[number].to(parts.device)
        bias, _ = steps.gate_bias(gate, batch.h, batch.graph, config)
        true = target_graph(batch.target.pos, mode=config.graph.target_mode).to(parts.device)
        layouts = {
            "hgate": model(batch.h, batch.graph, edge_bias=bias, initial=batch.initial),
            "tedge": model(batch.h, true, initial=batch.initial),
        }
        probes = config.train.probe_rows if batch.whole else None
        found: dict[str, Any] = {}
        for kind, pos in layouts.items():
            generator = loop.generator("validation", number)
            values: dict[str, Any] = e_geo(pos.float(), batch.target, probes, generator)
            values |= collapse_diagnostics(pos)
            found |= {f"{kind}_{name}": values[name] for name in SCORES}
        generator = loop.generator("validation", number)
        floor = e_geo(batch.target.pos.float(), batch.target, probes, generator)
        found["e_geo_floor"] = floor["e_geo"]
        return {name: float(torch.as_tensor(value).float()) for name, value in found.items()}

    scores = shared_out(range(len(batches)), scores_of)
    gate.train(), model.train()
    return {name: sum(one[name] for one in scores) / len(scores) for name in scores[0]}


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
