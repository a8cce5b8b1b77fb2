"""The run from slides to checkpoints, top to bottom: encoder, gate, model.

Everything random in a step comes from a generator seeded by the run's seed, the stage and the
step, so a run that was stopped and resumed computes what an unbroken one does, bit for bit on
CPU.
"""

from __future__ import annotations

import hashlib
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from .. import __version__
from ..config import RunConfig, resolve_device
from ..data.expression import match_genes, select_genes
from ..data.slide import Slide
from ..errors import UserError
from ..estimators.atlas import Atlas, CountAtlas
from ..estimators.relevant_components import RelevantComponents
from ..estimators.scaler import EmbeddingScaler
from ..files import atomic_write
from ..geometry.gauge import gauge_fix
from ..graph import NeighborTable, knn_candidates
from ..inference.checkpoint import BEST, LAST, load_checkpoint, read_meta, save_checkpoint
from ..metrics.diagnostics import candidate_recall, collapse_diagnostics, health_warnings
from ..nn import CountComponents, EdgeGateSoft, IPALiteModel, SharedEncoder
from ..progress import Progress
from ..supervision.losses import e_geo, gate_loss, geometry_terms
from ..supervision.targets import target_graph
from .batches import MinisetPool, TrainingSlide, Unit, build_unit, merge, subsample_edges
from .cache import cached_record
from .counts import GeneFields, count_atlas, fit_fields, have_counts, require_counts, slide_counts
from .encoder import ContrastiveSlide, begin, encode, encoder_loss, finish, read_expression
from .history import HISTORY, History, TensorBoard
from .selection import Transfer, trial_steps, try_transfer, weigh

logger = logging.getLogger(__name__)

REFERENCE = "reference.safetensors"
"""Embeddings and positions of (at most 5,000 cells of) each training slide, for baselines."""

STAGES = ("encoder", "gate", "joint")
_BYTES_A_CELL = 10_000  # of a whole slide: embedding, graph both ways, targets, k = 100
_SLIDE_STEPS = 100  # steps an epoch on whole slides, where none are asked for
_LOG_EVERY = 10
TRANSFER = "transfer"
"""Where the facts of a run hold what became of leaving donors out."""

TERM_COLUMNS = {
    "rw_kl": "l_rw",
    "stress_log": "l_stress",
    "multiscale": "l_multiscale",
    "gram": "l_gram",
    "long_range": "l_long",
    "repulsion": "l_rep",
    "entropy_reg": "l_ent",
}
"""Terms of the supervision, and the columns of the history that hold them."""
SCORES = ("e_geo", "l_rw", "l_stress", "lambda_ratio", "median_distance")
COLUMNS = (
    "step",
    "stage",
    "epoch",
    "seconds",
    "lr",
    "w_rw",
    "grad_norm",
    "loss",
    *TERM_COLUMNS.values(),
    "l_gate",
    "infonce",
    "distance",
    "invariance",
    "variance",
    "covariance",
    *(f"val_{kind}_{name}" for kind in ("tedge", "hgate") for name in SCORES),
    "val_e_geo_floor",
    "best",
)


@dataclass
class TrainState:
    """How far a run has come; saved with every checkpoint."""

    stage: str = "encoder"
    step: int = 0  # of the stage
    best: float | None = None
    best_epoch: int | None = None
    stale: int = 0
    log_step: int = 0  # rows of the history are numbered over all stages
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class FitResult:
    """What :func:`fit` leaves behind.

    Args:
        out: the run directory.
        best_epoch: epoch of the kept weights, None where none was eligible.
        best: its H-gate E_geo on the validation slides.
        facts: genes, cells, candidate recall of the unseen slides, and the like.
    """

    out: Path
    best_epoch: int | None
    best: float | None
    facts: dict[str, Any]


def fit(
    train_slides: list[Slide],
    val_slides: list[Slide],
    config: RunConfig,
    out: Path,
    resume: bool = False,
    encoder: Path | None = None,
    donors: Mapping[str, str] | None = None,
) -> FitResult:
    """Train encoder, gate and model, and write a run directory.

    Validation slides decide when to stop and nothing else: genes, encoder, gate and model never
    see them. Without any, all epochs are run and the last weights kept.

    Args:
        train_slides: slides with positions.
        val_slides: slides with positions, none of them trained on; may be none.
        config: everything that decides what is computed.
        out: the run directory; exists.
        resume: continue from its last checkpoint.
        encoder: directory that :func:`fit_encoder` wrote with the same slides, encoder settings
            and seed; its encoder is taken instead of training the same one again.
        donors: slide name to donor, for what is tried on donors left out; every slide is its own
            donor if left out.

    Raises:
        UserError: on slides that cannot be trained on.
        KeyboardInterrupt: after ctrl-C, once the state is saved.
    """
    device = resolve_device(config.train.device)
    with _interrupt_between_steps() as interrupted, Progress() as progress:
        run = _Run(
            train_slides, val_slides, config, Path(out), device, progress, interrupted, donors
        )
        if resume:
            run.load()
        elif encoder is not None:
            run.take_encoder(encoder)
        run.try_out()
        run.train_encoder()
        run.freeze_embeddings()
        run.train_gate()
        run.train_joint()
        run.close()
    state = run.state
    return FitResult(Path(out), state.best_epoch, state.best, state.facts)


def fit_encoder(
    train_slides: list[Slide],
    config: RunConfig,
    out: Path,
    donors: Mapping[str, str] | None = None,
    resume: bool = False,
) -> None:
    """Train the encoder alone, for :func:`fit` to take it into several runs.

    Args:
        train_slides: slides with positions.
        config: of any of these runs.
        out: directory to write to; exists.
        donors: slide name to donor; every slide is its own donor if left out.
        resume: continue from its last checkpoint.

    Raises:
        UserError: on slides that cannot be trained on.
        KeyboardInterrupt: after ctrl-C, once the state is saved.
    """
    device = resolve_device(config.train.device)
    with _interrupt_between_steps() as interrupted, Progress() as progress:
        run = _Run(train_slides, [], config, Path(out), device, progress, interrupted, donors)
        if resume:
            run.load()
        run.try_out()
        run.train_encoder()
        run.close()


class _Run:
    """A run in progress: modules, data, and how far it has come."""

    def __init__(
        self, train_slides, val_slides, config, out, device, progress, interrupted, donors=None
    ):
        self.config, self.out, self.device = config, out, device
        self.train_slides, self.val_slides = train_slides, val_slides
        self.progress, self.interrupted, self.donors = progress, interrupted, donors
        self.state = TrainState()
        self._pending: dict[str, Any] | None = None  # meta of the checkpoint resumed from
        for slide in (*train_slides, *val_slides):
            for note in slide.notes:
                logger.info("%s: %s", slide.name, note)
        torch.manual_seed(config.train.seed)
        if config.data.embedding is None:
            genes, missing = match_genes(train_slides)
            if config.data.max_genes is not None and len(genes) > config.data.max_genes:
                genes = select_genes(train_slides, genes, config.data.max_genes)
            if missing:
                logger.info("%d genes are not on every training slide: left out", len(missing))
            if config.encoder.input == "counts":
                require_counts((*train_slides, *val_slides), genes)
            if config.model.start == "fields":
                asked = "model.start=fields", "model.start=atlas"
                require_counts((*train_slides, *val_slides), genes, *asked)
            self.genes: list[str] | None = list(genes)
            self.encoder: nn.Module | None = build_encoder(config, len(genes)).to(device)
            dim = config.encoder.out
        else:
            self.genes, self.encoder = None, None
            dim = _embedding_width([*train_slides, *val_slides])
            self.state.stage = "gate"
        self.dim = dim
        self.scale = EmbeddingScaler(dim).to(device)
        self.gate, self.model = build_gate_and_model(config, dim)
        self.gate.to(device), self.model.to(device)
        self.atlas: Atlas | CountAtlas | None = None
        self.nearness: RelevantComponents | None = None
        self.fields: GeneFields | None = None
        self.state.facts = {
            "genes": len(self.genes) if self.genes else 0,
            "train_cells": sum(s.num_cells for s in train_slides),
            "val_cells": sum(s.num_cells for s in val_slides),
            "slides": [
                {"name": s.name, "role": role, "digest": slide_digest(s)}
                for role, slides in (("train", train_slides), ("val", val_slides))
                for s in slides
            ],
        }
        self.history: History | None = None
        self.board: TensorBoard | None = None

    def try_out(self) -> None:
        """Settle what the settings left open mean, once; a checkpoint remembers it."""
        if not _is_open(self.config):
            return
        if TRANSFER not in self.state.facts:
            build, steps = None, None
            if self.encoder is not None:
                steps = trial_steps(self.train_slides, self.donors, self.config)
                if self.config.encoder.input is None and not have_counts(
                    self.val_slides, self.genes
                ):
                    self.config = self.config.replace(encoder={"input": "log"})

                def build(config):
                    return build_encoder(config, len(self.genes))

            with self.progress.task("Leaving donors out", total=steps or None) as task:

                def step_done():
                    task.advance()
                    self._stop_if_asked("encoder")

                found = try_transfer(
                    self.train_slides,
                    self.donors,
                    self.config,
                    build,
                    self.genes,
                    self.device,
                    step_done,
                )
            self.state.facts[TRANSFER] = found.as_dict()
        self._settle()

    def _settle(self) -> None:
        """Take what donors left out have settled, and the encoder that reads what they favour."""
        self.config = settle(self.config, self.state.facts)
        counts = self.config.encoder.input == "counts"
        if self.encoder is not None and counts != (self.encoder.counts is not None):
            torch.manual_seed(self.config.train.seed)
            self.encoder = build_encoder(self.config, len(self.genes)).to(self.device)

    def train_encoder(self) -> None:
        if self.encoder is None or self.state.stage != "encoder":
            return
        settings = self.config.encoder
        if self.state.step == 0:
            if self.encoder.counts is not None:
                self.fields = fit_fields(self.train_slides, self.genes, self.device)
            read = begin(self.encoder, self.train_slides, self.genes, self.config, self.fields)
        else:
            read = [read_expression(s, self.genes, self.encoder) for s in self.train_slides]
        slides = [
            ContrastiveSlide(expression, s.pos, settings.neighbors, settings.far_quantile)
            for expression, s in zip(read, self.train_slides, strict=True)
        ]
        optimizer = torch.optim.AdamW(
            self.encoder.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self._restore(optimizer)
        self.encoder.train()
        total = settings.steps_for(sum(slide.num_cells for slide in self.train_slides))
        with self._steps("Encoder", total) as task:
            for step in range(self.state.step, total):
                generator = self._generator("encoder", step, "cpu")
                torch.manual_seed(generator.initial_seed())  # dropout draws from the global one
                _set_lr(optimizer, _cosine(step, total, settings.lr, settings.lr * 0.01))
                slide = slides[step % len(slides)]
                losses = encoder_loss(self.encoder, slide, settings, generator, self.device)
                optimizer.zero_grad(set_to_none=True)
                losses["loss"].backward()
                optimizer.step()
                self._stepped("encoder", step + 1, optimizer, losses, task)
                self._stop_if_asked("encoder", optimizer)
        if total:
            finish(self.encoder, read, [slide.pos for slide in self.train_slides], settings)
        self.encoder.eval().requires_grad_(False)
        self._advance("gate")

    def take_encoder(self, trained: Path) -> None:
        """The encoder of another directory, in place of training it."""
        meta = read_meta(Path(trained) / LAST)
        if meta["genes"] != self.genes or meta["stage"] == "encoder":
            raise UserError(
                f"{trained} holds no trained encoder of these slides' genes; train it again"
            )
        if TRANSFER in meta["facts"]:
            self.state.facts[TRANSFER] = meta["facts"][TRANSFER]
            self._settle()
        load_checkpoint(Path(trained) / LAST, {"encoder": self.encoder})
        self.encoder.eval().requires_grad_(False)
        self._advance("gate")

    def freeze_embeddings(self) -> None:
        """Embed all slides once; from here on the encoder is not used."""
        with self.progress.task("Embedding", total=len(self.train_slides) + len(self.val_slides)):
            raw = {}
            for slide in (*self.train_slides, *self.val_slides):
                raw[id(slide)] = embed_raw(slide, self.encoder, self.genes, self.device)
        self.scale.fit([raw[id(slide)].to(self.device) for slide in self.train_slides])
        scaled = {key: self.scale(h.to(self.device)).detach().cpu() for key, h in raw.items()}
        self.train_data, self.val_data = (
            [TrainingSlide(s.name, scaled[id(s)], torch.from_numpy(s.pos)) for s in slides]
            for slides in (self.train_slides, self.val_slides)
        )
        self.nearness = RelevantComponents(self.dim).fit([(s.h, s.pos) for s in self.train_data])
        if self.config.model.start == "atlas":
            self._fit_atlas()
        elif self.config.model.start == "fields":
            self._fit_count_atlas()
        if "candidate_recall" not in self.state.facts:
            self.state.facts["candidate_recall"] = self._candidate_recall()
        self._save_reference()
        self._build_units()

    def _fit_atlas(self) -> None:
        """An atlas of the training slides, and where it places all cells.

        It knows its own slides too well. Their cells are placed under the noise of training and
        without the cells most like them, which are themselves, or the model would learn to trust
        their places more than those on a new slide. Placed by an atlas of the other slides, which
        is worse than that of all, they teach it to trust too little: it ends further from the
        truth on new embryos and on new prefrontal cortices. No dimension takes more noise than it
        varies: an atlas weighs dimensions by how little they leave unsaid, and noise where there
        is nothing else would be all it sees.
        """
        with self.progress.task("Atlas"):
            self.atlas = Atlas(self.dim).fit([(s.h, s.pos) for s in self.train_data])
            self.atlas.to(self.device)
            self.state.facts |= {"atlas_cells": self.atlas.cells, "atlas_origins": True}
            spread = torch.stack([s.h.std(0, correction=0) for s in self.train_data]).mean(0)
            level = spread.clamp(max=self.config.train.noise_h)
            for number, slide in enumerate((*self.train_data, *self.val_data)):
                generator = self._generator("atlas", number, "cpu")
                seen = number < len(self.train_data)
                noise = torch.randn(slide.h.shape, generator=generator) * seen
                h = slide.h + level * noise
                slide.start = gauge_fix(self.atlas(h.to(self.device), nearest=not seen).cpu())

    def _fit_count_atlas(self) -> None:
        """An atlas of the training slides that reads counts, and where it places all cells.

        Its own slides are placed as a new one is. That is a little better than a new one will be
        placed, and does no harm: where counts tell the place there is little to add to it.
        """
        with self.progress.task("Atlas"):
            slides, genes = self.train_slides, self.genes
            self.atlas = count_atlas(slides, genes, self.device, self.fields)
            self.fields = None
            for slide, data in zip(
                (*slides, *self.val_slides), (*self.train_data, *self.val_data), strict=True
            ):
                data.start = gauge_fix(self.atlas(slide_counts(slide, genes)).cpu())

    def train_gate(self) -> None:
        if self.state.stage != "gate":
            return
        steps = self.config.train.gate_steps if self.config.model.gated else 0
        optimizer = self._optimizer(self.gate)
        self._restore(optimizer)
        self.gate.train()
        with self._steps("Gate", steps) as task:
            for step in range(self.state.step, steps):
                generator = self._generator("gate", step)
                unit = self._unit("gate", step).to(self.device)
                unit = subsample_edges(unit, self.config.train, generator)
                h, _ = self._augment(unit, generator)
                with self._autocast():
                    logits = self.gate(h, unit.graph)
                loss = gate_loss(logits.float(), unit.graph, probability=unit.gate_target)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(self.gate.parameters(), self.config.train.grad_clip)
                optimizer.step()
                losses = {"loss": loss, "l_gate": loss, "grad_norm": norm}
                self._stepped("gate", step + 1, optimizer, losses, task)
                self._stop_if_asked("gate", optimizer)
        self._advance("joint")

    def train_joint(self) -> None:
        settings = self.config.train
        per_epoch = self.steps_per_epoch
        total = settings.epochs * per_epoch
        optimizer = self._optimizer(self.gate, self.model)
        scaler = torch.amp.GradScaler(
            self.device.type, enabled=settings.precision == "float16" and self.device.type == "cuda"
        )
        self._restore(optimizer, scaler)
        self.gate.train(), self.model.train()
        with self._steps("Model", total) as task:
            step = self.state.step
            while step < total and not self._stop_early():
                generator = self._generator("joint", step)
                unit = self._unit("joint", step).to(self.device)
                unit = subsample_edges(unit, self.config.train, generator)
                _set_lr(optimizer, _cosine(step, total, settings.lr, settings.lr_min))
                losses = self._joint_step(unit, generator, step / per_epoch, optimizer, scaler)
                step += 1
                self._stepped("joint", step, optimizer, losses, task)
                if step % per_epoch == 0:
                    self._validate(step // per_epoch - 1, optimizer, scaler)
                self._stop_if_asked("joint", optimizer, scaler)
        if self.state.best is None:
            if self.val_units:
                logger.warning(
                    "no epoch came after the random-walk weight reached its cap (epoch %d): "
                    "the last weights are kept",
                    self._first_counted_epoch() + 1,
                )
            self._save(self.out / BEST)

    def close(self) -> None:
        for log in (self.history, self.board):
            if log is not None:
                log.close()

    def _joint_step(self, unit: Unit, generator, epoch: float, optimizer, scaler) -> dict:
        """One step; on a GPU it never waits for the device, but for float16's scale."""
        losses = self._joint_losses(unit, generator, epoch)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(losses["loss"]).backward()
        scaler.unscale_(optimizer)
        parameters = [*self.gate.parameters(), *self.model.parameters()]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.train.grad_clip)
        # five recycles can multiply a gradient beyond what a float holds: that step says nothing
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~norm.isfinite(), 0.0)
        losses["grad_norm"] = norm
        scaler.step(optimizer)
        scaler.update()
        return losses

    def _joint_losses(self, unit: Unit, generator: torch.Generator, epoch: float) -> dict:
        settings, target = self.config.train, unit.target
        h, dropped = self._augment(unit, generator)
        with self._autocast():
            bias, l_gate = dropped, h.new_zeros(())
            if self.config.model.gated:
                logits = self.gate(h if settings.gate_noise else unit.h, unit.graph)
                gate_bias = self.config.model.gate_weight * logits.float()
                drop = dropped.unsqueeze(-1) if gate_bias.dim() == 2 else dropped
                bias = gate_bias.masked_fill(torch.isinf(drop), -math.inf)
            pos = self.model(
                h,
                unit.graph,
                edge_bias=bias,
                batch=target.batch if target.num_graphs > 1 else None,
                num_graphs=target.num_graphs,
                generator=generator,
                start=unit.start,
            )
        if self.config.model.gated:
            l_gate = gate_loss(logits.float(), unit.graph, probability=unit.gate_target)
        weights = term_weights(epoch, settings)
        terms = geometry_terms(
            pos,
            target,
            weights,
            probe_rows=settings.probe_rows if unit.whole else None,
            stress_pairs=settings.stress_pairs if unit.whole else None,
            generator=generator,
        )
        loss = sum(weight * terms[name] for name, weight in weights.items())
        loss = loss + settings.lambda_gate * l_gate
        named = {TERM_COLUMNS[name]: value for name, value in terms.items()}
        return {**named, "loss": loss, "l_gate": l_gate, "w_rw": weights.get("rw_kl", 0.0)}

    def _augment(self, unit: Unit, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A noisy embedding, and an edge bias of 0 or, on dropped edges, -inf."""
        settings, h = self.config.train, unit.h
        noise_h, dropout_h = settings.noise_h, settings.dropout_h
        if settings.vary_augmentation:
            level = torch.empty(2, device=h.device).uniform_(0.5, 1.5, generator=generator)
            noise_h, dropout_h = noise_h * level[0], dropout_h * level[1]
        noise = torch.empty_like(h).normal_(generator=generator)
        keep = torch.empty_like(h).uniform_(generator=generator) >= dropout_h
        h = (h + noise_h * noise) * keep
        chance = torch.empty(unit.graph.num_edges, device=h.device).uniform_(generator=generator)
        # The edge with the best chance of each cell survives in any case.
        table = unit.graph.to_table(chance, fill=-1.0)
        drop = table < settings.edge_drop
        if table.size(1):
            drop = drop & (table < table.amax(dim=1, keepdim=True))
        dropped = torch.zeros_like(chance).masked_fill(unit.graph.from_table(drop), -math.inf)
        return h, dropped

    def _validate(self, epoch: int, optimizer, scaler) -> None:
        if not self.val_units:
            self._save(self.out / LAST, optimizer, scaler)
            return
        scores = self.score(self.val_units)
        counted = epoch >= self._first_counted_epoch()
        # A model trained on the true neighbours is judged there: candidates are foreign to it.
        oracle = self.config.train.edges == "target"
        score = scores["tedge_e_geo" if oracle else "hgate_e_geo"]
        better = counted and (self.state.best is None or score < self.state.best)
        if counted:
            self.state.stale = 0 if better else self.state.stale + 1
        if better:
            self.state.best, self.state.best_epoch = score, epoch
        row = {f"val_{name}": value for name, value in scores.items()}
        self._log("joint", {**row, "epoch": epoch, "best": int(better)})
        logger.info(
            "epoch %d: validation E_geo %.3f on gated candidates, %.3f on true neighbours%s",
            epoch + 1,
            scores["hgate_e_geo"],
            scores["tedge_e_geo"],
            " (best so far)" if better else "" if counted else " (warming up, not counted)",
        )
        for warning in (
            health_warnings(
                {
                    "lambda_ratio": scores["hgate_lambda_ratio"],
                    "median_distance": scores["hgate_median_distance"],
                }
            )
            if counted
            else []
        ):
            logger.warning("epoch %d: %s", epoch + 1, warning)
        if better:
            self._save(self.out / BEST)
        self._save(self.out / LAST, optimizer, scaler)

    @torch.no_grad()
    def score(self, units: Sequence[Unit]) -> dict[str, float]:
        """E_geo on the true neighbours (the oracle's graph) and on gated candidates (a user's)."""
        self.gate.eval(), self.model.eval()
        sums: dict[str, Tensor] = {}
        for number, unit in enumerate(units):
            unit = unit.to(self.device)
            layouts = {
                "hgate": self.model(
                    unit.h, unit.graph, edge_bias=self._gate_bias(unit), start=unit.start
                ),
                "tedge": self.model(unit.h, self._true_graph(unit), start=unit.start),
            }
            probes = self.config.train.probe_rows if unit.whole else None
            for kind, pos in layouts.items():
                generator = self._generator("validation", number)
                values = e_geo(pos.float(), unit.target, probes, generator)
                values |= collapse_diagnostics(pos)
                for name in SCORES:
                    key = f"{kind}_{name}"
                    sums[key] = sums.get(key, 0.0) + torch.as_tensor(values[name]).float().cpu()
            generator = self._generator("validation", number)
            floor = e_geo(unit.target.pos.float(), unit.target, probes, generator)["e_geo"]
            sums["e_geo_floor"] = sums.get("e_geo_floor", 0.0) + floor.cpu()
        self.gate.train(), self.model.train()
        return {name: float(value) / len(units) for name, value in sums.items()}

    def _true_graph(self, unit: Unit) -> NeighborTable:
        mode = self.config.graph.target_mode
        return target_graph(unit.target.pos, mode=mode).to(self.device)

    def _gate_bias(self, unit: Unit) -> Tensor | None:
        if not self.config.model.gated:
            return None
        return self.config.model.gate_weight * self.gate(unit.h, unit.graph)

    def _first_counted_epoch(self) -> int:
        """Epochs before the walk's weight has reached its cap are no candidates for the best."""
        settings = self.config.train
        return max(0, settings.warmup_epochs + settings.ramp_epochs - 1)

    def _stop_early(self) -> bool:
        return self.state.stale >= self.config.train.patience

    def _build_units(self) -> None:
        settings = self.config.train
        pool = settings.unit in ("miniset", "mixed")
        oracle = settings.edges == "target"
        self.pool = MinisetPool(
            self.train_data, settings.minisets, self.config, settings.seed, oracle=oracle
        )
        self.whole: list[Unit] = []
        if settings.unit in ("slide", "mixed"):
            for slide in self.progress.track(self.train_data, "Graphs and targets"):
                self.whole.append(self._whole_unit(slide, oracle))
            self.whole = self._resident(self.whole)
            self.val_units = [self._whole_unit(slide) for slide in self.val_data]
        else:
            count = settings.val_minisets if self.val_data else 0
            val = MinisetPool(self.val_data, count, self.config, settings.seed + 1)
            self.val_units = [val[i] for i in range(len(val))]
        every = math.ceil(len(self.pool) / settings.batch_size) if pool else _SLIDE_STEPS
        self.steps_per_epoch = settings.steps_per_epoch or every

    def _resident(self, units: list[Unit]) -> list[Unit]:
        """Units on the device, with all that a step finds out about their graphs, if they fit."""
        if self.device.type != "cuda":
            return units
        needed = _BYTES_A_CELL * sum(len(unit.h) for unit in units)
        room = torch.cuda.get_device_properties(self.device).total_memory // 4
        return [unit.to(self.device) for unit in units] if needed <= room else units

    def _whole_unit(self, slide: TrainingSlide, oracle: bool = False) -> Unit:
        """Graph and targets of a whole slide, from the disk where they were made before."""
        settings = self.config.train
        inputs = {
            "h": slide.h,
            "pos": slide.pos,
            "graph": self.config.graph.model_dump(mode="json"),
            "start": self.config.model.start,
            "first": slide.start,
            "gate_walk": list(settings.gate_walk),
            "multiscale": settings.lambda_multiscale > 0,
            "seed": settings.seed,
            "oracle": oracle,
        }
        return cached_record(
            "whole-slide",
            inputs,
            Unit,
            lambda: build_unit(
                slide.h, slide.pos, self.config, settings.seed, True, oracle, slide.start
            ),
        )

    def _unit(self, stage: str, step: int) -> Unit:
        """The unit of a step: minisets in a new order each epoch, slides in turn."""
        settings = self.config.train
        if settings.unit == "slide" or (settings.unit == "mixed" and step % 2):
            return self.whole[(step // (2 if settings.unit == "mixed" else 1)) % len(self.whole)]
        if settings.unit == "mixed":
            step //= 2
        size = settings.batch_size
        per_pass = math.ceil(len(self.pool) / size)
        generator = self._generator(f"{stage} order", step // per_pass, "cpu")
        order = torch.randperm(len(self.pool), generator=generator)
        start = step % per_pass * size
        return merge([self.pool[int(i)] for i in order[start : start + size]])

    def _candidate_recall(self) -> dict[str, dict[str, float]]:
        """How much of space kNN(H) finds, on training slides and on unseen ones."""
        found = {}
        for role, slides in (("train", self.train_data), ("val", self.val_data)):
            for slide in slides:
                graph = knn_candidates(
                    slide.h, self.config.graph.k, metric=self.config.graph.metric
                )
                recall = candidate_recall(graph, slide.pos, k=15)
                found[f"{role}:{slide.name}"] = recall
                if role == "val":
                    logger.info(
                        "%s (unseen): kNN in the embedding finds %.0f %% of the true neighbours, "
                        "%.0f %% by chance",
                        slide.name,
                        100 * recall["candidate_recall@15"],
                        100 * recall["candidate_recall_chance@15"],
                    )
        return found

    def _save_reference(self) -> None:
        tensors = {}
        for number, slide in enumerate(self.train_data):
            generator = torch.Generator().manual_seed(0)
            rows = torch.randperm(len(slide.h), generator=generator)[:5000]
            tensors[f"{number}.h"] = slide.h[rows].contiguous()
            tensors[f"{number}.pos"] = slide.pos[rows].contiguous()
        atomic_write(self.out / REFERENCE, save(tensors))

    def _modules(self) -> dict[str, nn.Module]:
        modules = {"scale": self.scale, "gate": self.gate, "model": self.model}
        if self.atlas is not None:
            modules["atlas"] = self.atlas
        if self.nearness is not None:
            modules["nearness"] = self.nearness
        return modules if self.encoder is None else {"encoder": self.encoder, **modules}

    def _save(self, path: Path, optimizer=None, scaler=None) -> None:
        state = self.state
        meta = {
            "ipar_sparse": __version__,
            "stage": state.stage,
            "step": state.step,
            "log_step": state.log_step,
            "best": state.best,
            "best_epoch": state.best_epoch,
            "stale": state.stale,
            "dim": self.dim,
            "genes": self.genes,
            "facts": state.facts,
            "modules": list(self._modules()),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        save_checkpoint(path, self._modules(), meta, optimizer=optimizer)

    def load(self) -> None:
        """Take up the last checkpoint; its optimiser waits for the stage it belongs to."""
        meta = read_meta(self.out / LAST)
        if meta["genes"] != self.genes:
            raise UserError(
                f"{self.out} was trained on {len(meta['genes'] or [])} genes that these slides do "
                "not give; resume with the slides the run was started with"
            )
        if TRANSFER in meta["facts"]:
            self.state.facts[TRANSFER] = meta["facts"][TRANSFER]
            self._settle()
        load_checkpoint(self.out / LAST, self._modules())
        names = ("stage", "step", "best", "best_epoch", "stale", "log_step", "facts")
        self.state = TrainState(**{name: meta[name] for name in names})
        self._pending = meta
        if self.encoder is not None and self.state.stage != "encoder":
            self.encoder.eval().requires_grad_(False)
        logger.info("resuming %s at step %d", self.state.stage, self.state.step)

    def _restore(self, optimizer, scaler=None) -> None:
        """Restore the optimiser that a resumed run was stopped with, once."""
        meta, self._pending = self._pending, None
        if meta is None or meta["step"] == 0:
            return
        load_checkpoint(self.out / LAST, optimizer=optimizer)
        if scaler is not None and meta["scaler"]:
            scaler.load_state_dict(meta["scaler"])

    def _advance(self, stage: str) -> None:
        self.state.stage, self.state.step = stage, 0
        self._save(self.out / LAST)

    def _stepped(self, stage, step, optimizer, losses, task) -> None:
        """After every step: count, and log now and then."""
        self.state.step = step
        self.state.log_step += 1
        if step % _LOG_EVERY == 0 or step == 1:
            values = {name: float(torch.as_tensor(v).detach()) for name, v in losses.items()}
            if not math.isfinite(values["loss"]):
                raise UserError(
                    f"the loss became {values['loss']} at step {step} of the {stage} stage; "
                    "lower train.lr, or use train.precision=float32"
                )
            values["lr"] = optimizer.param_groups[0]["lr"]
            self._log(stage, values)
            shown, self._shown = self._shown, step
            task.advance(step - shown, loss=values["loss"])

    def _stop_if_asked(self, stage, *saved) -> None:
        """If ctrl-C was pressed, leave a checkpoint to resume from, and to predict with."""
        if self.interrupted.is_set():
            self._save(self.out / LAST, *saved)
            if stage == "joint" and not (self.out / BEST).exists():
                self._save(self.out / BEST)
            self.close()
            raise KeyboardInterrupt

    def _log(self, stage: str, values: dict[str, Any]) -> None:
        if self.history is None:
            start = self.state.log_step if self._resumed_log else None
            self.history = History(self.out / HISTORY, COLUMNS, resume_step=start)
            self.board = TensorBoard(self.out / "tensorboard", resume_step=start)
            self._clock = time.monotonic()
        step = self.state.log_step
        seconds = round(time.monotonic() - self._clock, 3)
        row = {"step": step, "stage": stage, "seconds": seconds, **values}
        self.history.write({name: value for name, value in row.items() if name in COLUMNS})
        self.board.write(step, {f"{stage}/{name}": value for name, value in values.items()})

    @property
    def _resumed_log(self) -> bool:
        return (self.out / LAST).exists() and (self.out / HISTORY).exists()

    @contextmanager
    def _steps(self, name: str, total: int):
        with self.progress.task(name, total=total) as task:
            self._shown = self.state.step  # steps the display has counted
            if self._shown:
                task.advance(self._shown)
            yield task

    def _optimizer(self, *modules: nn.Module) -> torch.optim.Optimizer:
        parameters = [p for module in modules for p in module.parameters()]
        settings = self.config.train
        return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)

    def _autocast(self):
        precision = self.config.train.precision
        return torch.autocast(
            self.device.type, dtype=getattr(torch, precision), enabled=precision != "float32"
        )

    def _generator(self, stage: str, step: int, device=None) -> torch.Generator:
        text = f"{self.config.train.seed}/{stage}/{step}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
        return torch.Generator(device or self.device).manual_seed(seed)


def settle(config: RunConfig, facts: Mapping[str, Any]) -> RunConfig:
    """A run's configuration with what it left open (``model.start``, ``refine``, and of the
    encoder ``input``, ``standardize``, ``spatial_genes`` and ``kept``) as donors left out have
    settled it.

    Args:
        config: of the run.
        facts: of its checkpoint.

    Raises:
        UserError: the run was stopped before that was settled.
    """
    if not _is_open(config):
        return config
    if TRANSFER not in facts:
        raise UserError(
            "the run was stopped before its training began; go on with it first: "
            "ipar-sparse train --resume --out RUN"
        )
    found, sections = facts[TRANSFER], {}
    if (start := config.model.start) == "auto":
        start = found["start"]
        sections["model"] = {"start": start}
    if None in (config.refine.steps, config.refine.expected):
        last = found["refine"].get(start, Transfer().refine[start])
        if not isinstance(last, Mapping):
            last = {"steps": last}  # a run from when that alone was tried
        own = config.refine.model_dump(exclude_none=True)
        if "steps" in own:  # what is asked for is not added to
            last = {"expected": last.get("expected", 0)}
        sections["refine"] = {name: value for name, value in last.items() if name not in own}
    if "keep" in found:  # a run from when that was tried instead
        sections["encoder"] = {"keep": found["keep"]}
    if config.encoder.kept is None:
        sections["encoder"] = {"kept": found["kept"]}
    return weigh(
        config.replace(**sections),
        found.get("standardize"),
        found.get("spatial_genes"),
        found.get("input", "log"),
    )


def _is_open(config: RunConfig) -> bool:
    """Whether anything that the run will use is left to donors left out."""
    if config.model.start == "auto" or config.refine.steps is None:
        return True
    if config.refine.expected is None and config.model.start in ("atlas", "fields"):
        return True
    encoder = config.encoder
    kept = encoder.skip and encoder.keep and encoder.kept is None
    weights = encoder.input != "counts" and None in (encoder.standardize, encoder.spatial_genes)
    return config.data.embedding is None and (kept or weights)


def build_encoder(config: RunConfig, num_genes: int) -> SharedEncoder:
    """The encoder a configuration describes."""
    settings = config.encoder
    counts = CountComponents(num_genes) if settings.input == "counts" else None
    return SharedEncoder(
        num_genes if counts is None else counts.channels,
        tuple(settings.hidden),
        settings.out,
        settings.dropout,
        skip=settings.skip,
        smooth=settings.smooth,
        prepare=counts is None
        and (config.data.target_sum, settings.standardize, settings.spatial_genes)
        != (1e4, 0.0, 0.0),
        counts=counts,
    )


def build_gate_and_model(config: RunConfig, dim: int) -> tuple[EdgeGateSoft, IPALiteModel]:
    """The gate and the model a configuration describes, on embeddings of width ``dim``."""
    settings = config.model
    gate = EdgeGateSoft(dim, heads=settings.gate_heads, backend=settings.backend)
    geometry, schedule = settings.geometry, settings.geo_schedule
    terms = {} if geometry is None else {geometry: {}}
    if geometry == "rbf":
        terms["rbf"] = {"b_max": settings.rbf_max}
    schedules = {"all": None, "last": (settings.recycles,)}
    model = IPALiteModel(
        dim,
        channels=settings.channels,
        heads=settings.heads,
        head_channels=settings.head_channels,
        num_recycles=settings.recycles,
        shared=settings.shared,
        terms=terms,
        geo_schedule=schedules[schedule] if isinstance(schedule, str) else schedule,
        qk=settings.qk,
        qk_norm=settings.qk_norm,
        qk_scale=settings.qk_scale,
        qk_range=settings.qk_range,
        pair_hidden=settings.pair_hidden if "pair" in settings.terms else None,
        betas=settings.betas,
        step_gate=settings.step_gate,
        init_noise=settings.init_noise,
        checkpoint_recycles=settings.checkpoint_recycles,
        backend=settings.backend,
    )
    return gate, model


def embed_raw(slide: Slide, encoder: nn.Module | None, genes, device) -> Tensor:
    """Embeddings (n, d) of a slide before scaling: the encoder's, or those the user brought.

    Raises:
        UserError: if the run uses the user's embedding and the slide has none.
    """
    if encoder is not None:
        if slide.expression is None:
            raise UserError(f"{slide.name}: no expression to embed; give X or --layer")
        return encode(encoder, read_expression(slide, genes, encoder), device)
    if slide.embedding is None:
        raise UserError(f"{slide.name}: this run uses an embedding; give --embedding obsm:KEY")
    return torch.from_numpy(slide.embedding).float()


def slide_digest(slide: Slide) -> str:
    """A digest of a slide's cells and positions, by which it is known under any file name."""
    digest = hashlib.sha256("\0".join(map(str, slide.cell_names)).encode())
    digest.update(np.ascontiguousarray(slide.pos, dtype=np.float64).tobytes())
    return digest.hexdigest()[:16]


def term_weights(epoch: float, settings) -> dict[str, float]:
    """Weights of the geometry terms at a time in epochs; terms of weight 0 are not computed."""
    weights = {
        "rw_kl": walk_weight(epoch, settings),
        "stress_log": settings.lambda_stress,
        "multiscale": settings.lambda_multiscale,
        "gram": settings.lambda_gram,
        "long_range": settings.lambda_long,
        "repulsion": settings.lambda_rep,
        "entropy_reg": settings.lambda_ent,
    }
    return {name: weight for name, weight in weights.items() if weight > 0}


def walk_weight(epoch: float, settings) -> float:
    """Weight of the random-walk loss: 0 in the warm-up, then a linear ramp to its cap."""
    if settings.ramp_epochs == 0:
        return settings.rw_cap if epoch >= settings.warmup_epochs else 0.0
    ramp = (epoch - settings.warmup_epochs) / settings.ramp_epochs
    return settings.rw_cap * min(1.0, max(0.0, ramp))


def _embedding_width(slides: Sequence[Slide]) -> int:
    widths = {}
    for slide in slides:
        if slide.embedding is None:
            raise UserError(f"{slide.name} carries no embedding; check --embedding obsm:KEY")
        widths.setdefault(slide.embedding.shape[1], slide.name)
    if len(widths) > 1:
        (a, one), (b, other) = list(widths.items())[:2]
        raise UserError(
            f"the embeddings of {one} and {other} have {a} and {b} dimensions; "
            "they must come from one model"
        )
    return next(iter(widths))


def _cosine(step: int, total: int, high: float, low: float) -> float:
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@contextmanager
def _interrupt_between_steps() -> Iterator[threading.Event]:
    """Turn the first ctrl-C into an event that is looked at between steps; the second stops."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        logger.warning("stopping after this step; press ctrl-C again to stop at once")

    signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
