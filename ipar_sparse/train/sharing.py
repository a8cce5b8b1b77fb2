"""Steps whose batch is computed in parts: by several ranks, or slide by slide on one device.

Every loss is a mean over the cells or over the graphs of the whole batch. A part of it gives its
share of that mean, so that sums over parts and ranks are what one pass over the batch gives.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import RunConfig
from ..distributed import from_first, size, summed
from ..inference.costs import SHARED_CELLS
from ..ops.recording import Recorder
from ..supervision.losses import Source
from .batches import GraphBatch, Share, shares_rows

logger = logging.getLogger(__name__)

Losses = Callable[[GraphBatch, Source, Tensor], Mapping[str, Any]]
"""Losses of a part, by name and weighted by three shares: of cells, of graphs, and of the cells
that the gate learns from."""


def gate_cells(batch: GraphBatch) -> Tensor:
    """How many cells have a true neighbour among their candidates; a scalar."""
    return (batch.graph.to_table(batch.gate_target) > 0).any(1).sum()


class Sources:
    """Random numbers of a step: those of each graph come from a source of its own.

    Args:
        device: where they are drawn.
    """

    def __init__(self, device: torch.device):
        self.device, self.all = device, [torch.Generator(device)]

    def __call__(self, seeds: Sequence[int]) -> Source:
        """Seeded sources; of one graph it is always the same."""
        while len(self.all) < len(seeds):
            self.all.append(torch.Generator(self.device))
        found = [one.manual_seed(seed) for one, seed in zip(self.all, seeds, strict=False)]
        return found[0] if len(found) == 1 else found


class SharedSteps:
    """Adds the gradients of all parts of a batch, over all ranks, and takes one step with them.

    Args:
        parameters: that are trained.
        update: takes a step with their gradients, and returns the norm of these.
        scaler: of gradients.
        recorder: of parts and updates.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        update: Callable[[], Tensor],
        scaler: torch.amp.GradScaler,
        recorder: Recorder,
    ):
        self.parameters, self.update, self.scaler = list(parameters), update, scaler
        self.record = recorder
        self.used: list[bool] = []  # whether a loss depends on each parameter
        self.fresh = True
        self.ends = torch.tensor([p.numel() for p in self.parameters]).cumsum(0).tolist()
        self.shares = torch.zeros_like(self.parameters[0]).new_zeros(3)
        self.sums = self.part = self.shares  # gradients, then losses: of the batch, of a part

    def __call__(
        self,
        share: Share,
        draw: Callable[[int], tuple[GraphBatch, Source]],
        names: Sequence[str],
        losses: Losses,
        keep: int = 0,
    ) -> dict[str, Tensor]:
        """One step; returns the losses of the whole batch and ``grad_norm``.

        Args:
            share: what this rank computes.
            draw: a piece, by its number, as this step sees it, and the source of what is drawn
                next.
            names: of the losses, on all ranks in one order; ``loss`` is among them.
            losses: of a piece.
            keep: pieces of up to so many cells are recorded where they stay.
        """
        numbers, width = range(len(share.pieces)), self.ends[-1] + len(names)
        cells = [gate_cells(draw(number)[0]) for number in numbers]
        learned = summed(sum(cells, torch.zeros_like(self.shares[0], dtype=torch.int64)))
        if len(self.sums) != width:
            self.sums, self.part = (self.shares.new_zeros(width) for _ in range(2))
        self.sums.zero_()
        for number in numbers:
            piece, source = draw(number)
            graphs, alike = len(share.numbers[number]), 1 if piece.rows is None else size()
            part = (len(piece.h) / share.cells / alike, graphs / share.graphs / alike, 0.0)
            self.shares.copy_(torch.tensor(part, dtype=torch.float64))
            self.shares[2] = cells[number].to(self.shares) / learned.clamp(min=1)

            def compute(piece=piece, source=source):
                self._compute(losses(piece, source, self.shares), names)

            if piece.stays and len(piece.h) <= keep:
                self.record((id(piece), width), compute)
            else:
                compute()
            self.sums += self.part
        if self.fresh:  # the first rank has a part of every batch
            self.used, self.fresh = from_first(self.used), False
        summed(self.sums)
        norm = self.record(("update", width), self._update)
        found = zip(names, self.sums[self.ends[-1] :].clone(), strict=True)
        return {**dict(found), "grad_norm": norm}

    def _compute(self, values: Mapping[str, Any], names: Sequence[str]) -> None:
        """Gradients and losses of a part."""
        loss = self.scaler.scale(values["loss"])
        grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        self.used = self.used or [grad is not None for grad in grads]
        flat = [
            torch.zeros_like(p).view(-1) if grad is None else grad.reshape(-1)
            for p, grad in zip(self.parameters, grads, strict=True)
        ]
        flat += [torch.as_tensor(values[name]).detach().to(self.part).view(1) for name in names]
        torch.cat(flat, out=self.part)

    def _update(self) -> Tensor:
        starts = [0, *self.ends[:-1]]
        views = zip(self.parameters, starts, self.ends, self.used, strict=True)
        for p, start, end, used in views:
            p.grad = self.sums[start:end].view_as(p) if used else None
        return self.update()


def fill_ranks(config: RunConfig, slides: Sequence[int]) -> RunConfig:
    """Settings with which every rank has a part of each step; what they become is said.

    A batch that is smaller than the number of ranks becomes that number. So many fewer steps see
    as much, and the learning rate grows by the square root, as is usual with Adam. Whole slides
    that are few or large are not more a step: ranks share the rows of each.

    Args:
        config: of a run, decided.
        slides: numbers of cells of those to train on.
    """
    settings, ranks = config.train, size()
    minisets = max(settings.batch_size, min(ranks, settings.minisets))
    by_rows = shares_rows(config) and (len(slides) < ranks or max(slides) > SHARED_CELLS)
    whole = max(settings.slides_per_step, 1 if by_rows else min(ranks, len(slides)))
    more = {"miniset": minisets / settings.batch_size, "slide": whole / settings.slides_per_step}
    used = [k for k in more if settings.batch_kind in (k, "mixed")]
    growth = min(more[kind] for kind in used)
    if max(more[kind] for kind in used) == 1:
        return config
    of = {"miniset": ("batch_size", minisets), "slide": ("slides_per_step", whole)}
    changed = dict(of[kind] for kind in used)
    changed["steps_per_epoch"] = math.ceil(settings.steps_per_epoch / growth)
    changed["gate_steps"] = math.ceil(settings.gate_steps / growth)
    changed |= {name: getattr(settings, name) * growth**0.5 for name in ("lr", "lr_min")}
    told = ", ".join(
        f"train.{n}={v:.3g} (was {getattr(settings, n):.3g})" for n, v in changed.items()
    )
    logger.info("so that each of %d ranks has a part of every step: %s", ranks, told)
    return config.replace(train=changed)
