"""Does a map learned on some donors hold on another? Tried before it is relied on.

Some tissues share a plan: layers of a cortex, the axes of an embryo. A map from expression to
position that was learned on other animals holds there, and is the best start. Others do not:
where every tumour is its own, a map from other patients misleads, and the cells are better placed
by how they differ from one another. Each donor of the training slides is therefore left out in
turn, a short stage A is trained on the rest, and what places the cells of the donor left out
better is what the run begins from. Slides that are held out of the run take no part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..atlas import atlas_layout
from ..baselines import ridge_layout
from ..config import EncoderConfig, RunConfig
from ..gauge import principal_plane
from ..metrics import distance_metrics
from ..nn import SharedEncoder
from ..slide import Slide
from .stage_a import ContrastSlide, begin, encode, encoder_loss, finish, read_expression

logger = logging.getLogger(__name__)

_CELLS = 3000  # of a slide; more do not change a mean over slides
_DONORS = 3  # left out at most
_PART = 0.5  # of the steps of stage A

PLANE, MAP, ATLAS = "plane", "map", "atlas"
_STARTS = {PLANE: "pca", MAP: "mlp", ATLAS: "atlas"}


@dataclass(frozen=True)
class Transfer:
    """What a run begins from, and why.

    Args:
        start: ``"mlp"`` or ``"atlas"`` where a learned map or an atlas holds on other donors, else
            ``"pca"``.
        donors: how many were left out in turn; with one donor nothing is tried.
        scores: distance Spearman on donors left out, means over them: ``plane`` (principal plane
            of the embedding), ``map`` (ridge regression from it) and ``atlas`` (of it).
    """

    start: str = "pca"
    donors: int = 0
    scores: dict[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)


def try_transfer(
    slides: Sequence[Slide],
    donors: Mapping[str, str] | None,
    config: RunConfig,
    build: Callable[[], SharedEncoder] | None,
    genes: Sequence[str] | None,
    device: torch.device,
    step_done: Callable[[], None] = lambda: None,
) -> Transfer:
    """Leave each donor of the training slides out in turn, and see what places its cells.

    Args:
        slides: training slides with positions.
        donors: slide name to donor; every slide is its own donor if left out.
        config: the run's; its seed, steps and losses of stage A.
        build: makes an untrained encoder; None where embeddings are brought along.
        genes: of the encoder.
        device: where encoders are trained.
        step_done: called after every step; may raise to stop.
    """
    groups: dict[str, list[Slide]] = {}
    for slide in slides:
        groups.setdefault((donors or {}).get(slide.name, slide.name), []).append(slide)
    if len(groups) < 2:
        return Transfer()
    small = {slide.name: _sample(slide) for slide in slides}
    found: dict[str, list[float]] = {}
    for number, (left_out, test) in enumerate(list(groups.items())[:_DONORS]):
        train = [small[s.name] for name, group in groups.items() if name != left_out for s in group]
        scores = _leave_out(
            train, [small[slide.name] for slide in test], config, build, genes, device,
            config.train.seed * _DONORS + number, step_done,
        )  # fmt: skip
        for name, values in scores.items():
            found.setdefault(name, []).append(float(np.mean(values)))
    mean = {name: float(np.mean(values)) for name, values in found.items()}
    start = _STARTS[max(_STARTS, key=mean.__getitem__)]
    logger.info(
        "%d donors left out in turn: a learned map places their cells with distance Spearman "
        "%.3f, an atlas with %.3f, the plane of the embedding with %.3f; model.start is %s",
        min(len(groups), _DONORS), mean[MAP], mean[ATLAS], mean[PLANE], start,
    )  # fmt: skip
    return Transfer(start, min(len(groups), _DONORS), mean)


def _leave_out(train, test, config, build, genes, device, seed, step_done) -> dict[str, list]:
    if build is None:
        h = {id(s): torch.from_numpy(s.embedding).float() for s in (*train, *test)}
        return _scores(h, train, test)
    settings = config.encoder
    torch.manual_seed(seed)
    encoder = build().to(device)
    begin(encoder, train, genes, config)
    read = {id(s): read_expression(s, genes, encoder) for s in (*train, *test)}

    steps = round(_PART * settings.steps_for(sum(s.num_cells for s in train)))
    if steps:
        fit = [
            ContrastSlide(read[id(s)], s.pos, settings.neighbors, settings.far_quantile)
            for s in train
        ]
        _train(encoder, fit, settings, steps, seed, device, step_done)
        finish(encoder, [slide.expression for slide in fit], settings, device)
    h = {key: encode(encoder, expression, device) for key, expression in read.items()}
    return _scores(h, train, test)


def _train(
    encoder: nn.Module,
    slides: Sequence[ContrastSlide],
    settings: EncoderConfig,
    steps: int,
    seed: int,
    device: torch.device,
    step_done: Callable[[], None],
) -> None:
    optimizer = torch.optim.AdamW(
        encoder.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, settings.lr * 0.01)
    generator = torch.Generator().manual_seed(seed)
    encoder.train()
    for step in range(steps):
        loss = encoder_loss(encoder, slides[step % len(slides)], settings, generator, device)
        optimizer.zero_grad(set_to_none=True)
        loss["loss"].backward()
        optimizer.step()
        schedule.step()
        step_done()
    encoder.eval()


def _scores(h: dict[int, Tensor], train, test) -> dict[str, list[float]]:
    """Distance Spearman of each way to place the cells of each slide left out."""
    known = [(h[id(slide)].numpy(), slide.pos) for slide in train]
    scores: dict[str, list[float]] = {name: [] for name in _STARTS}
    for slide in test:
        layouts = {
            PLANE: principal_plane(h[id(slide)]).numpy(),
            MAP: ridge_layout(h[id(slide)].numpy(), known),
            ATLAS: atlas_layout(h[id(slide)], known),
        }
        for name, layout in layouts.items():
            scores[name].append(distance_metrics(layout, slide.pos)["distance_spearman"])
    return scores


def _sample(slide: Slide) -> Slide:
    """At most so many cells of a slide, drawn at random."""
    n = slide.num_cells
    if n <= _CELLS:
        return slide
    rows = np.sort(np.random.default_rng(0).choice(n, _CELLS, replace=False))

    def take(values):
        return None if values is None else values[rows]

    return replace(
        slide, expression=take(slide.expression), cell_names=slide.cell_names[rows],
        pos=take(slide.pos), embedding=take(slide.embedding), empty=slide.empty[rows],
        obs={}, rows=slide.rows[rows],
    )  # fmt: skip
