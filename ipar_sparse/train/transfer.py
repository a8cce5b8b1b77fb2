"""What holds on another donor? Tried before it is relied on.

Some tissues share a plan: layers of a cortex, the axes of an embryo. A map from expression to
position that was learned on other animals holds there, and is the best start. Others do not:
where every tumour is its own, a map from other patients misleads, and the cells are better placed
by how they differ from one another. In some, what the encoder dropped of the expression would
have told neighbours apart; in some, the last step gathers cells that were well apart. Each donor of
the training slides is therefore left out in turn, a short stage A is trained on the rest, and
what serves the donor left out better is what the run does. Slides that are held out of the run
take no part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..atlas import atlas_layout
from ..baselines import ridge_layout
from ..config import EncoderConfig, RunConfig
from ..diagnostics import candidate_recall
from ..gauge import principal_plane
from ..graph import NeighborTable, knn
from ..metrics import distance_metrics
from ..nn import SharedEncoder
from ..refine import refine_layout
from ..slide import Slide
from .stage_a import ContrastSlide, begin, encode, encoder_loss, finish, read_expression

REFINE_STEPS = 200
"""Steps of the last step, where it is taken."""

logger = logging.getLogger(__name__)

_CELLS = 3000  # of a slide; more do not change a mean over slides
_DONORS = 3  # left out at most
_PART = 0.5  # of the steps of stage A

PLANE, MAP, ATLAS = "plane", "map", "atlas"
_STARTS = {PLANE: "pca", MAP: "mlp", ATLAS: "atlas"}
_KEEP = 0.5  # of the principal components of the expression, where they are kept
_NEIGHBORS = 15  # by which embeddings and layouts are compared


@dataclass(frozen=True)
class Transfer:
    """What a run begins from, and why.

    Args:
        start: ``"mlp"`` or ``"atlas"`` where a learned map or an atlas holds on other donors, else
            ``"pca"``.
        keep: principal components in the embedding, ``encoder.keep``.
        refine: of the last step after each of the starts, ``refine.steps``.
        donors: how many were left out in turn; with one donor nothing is tried.
        scores: means over donors left out. Distance Spearman: ``plane`` (principal plane of the
            embedding), ``map`` (ridge regression from it) and ``atlas`` (of it). Neighbour hit
            @15: ``keep 0`` and ``keep 0.5`` (nearest cells in the embedding); ``plane hit`` and
            ``plane refined`` (before and after the last step), and so for the other two.
    """

    start: str = "pca"
    keep: float = _KEEP
    refine: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(_STARTS.values(), REFINE_STEPS)
    )
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
    found: dict[float, list[list[_Left]]] = {}
    for number, (left_out, test) in enumerate(list(groups.items())[:_DONORS]):
        train = [small[s.name] for name, group in groups.items() if name != left_out for s in group]
        left = _leave_out(
            train, [small[slide.name] for slide in test], config, build, genes, device,
            config.train.seed * _DONORS + number, step_done,
        )  # fmt: skip
        for keep, slides_left in left.items():
            found.setdefault(keep, []).append(slides_left)
    return _choose(found, config)


def _choose(found: dict[float, list[list[_Left]]], config: RunConfig) -> Transfer:
    """The choices, and the scores behind them, of what each donor left out showed."""
    hits = {keep: _mean(donors, _Left.embedding_hit) for keep, donors in found.items()}
    keep = max(hits, key=hits.__getitem__)
    donors = found[keep]
    scores = {name: _mean(donors, lambda left, n=name: left.spearman(n)) for name in _STARTS}
    start = _STARTS[max(_STARTS, key=scores.__getitem__)]
    scores |= {f"keep {value:g}": hit for value, hit in hits.items()}
    refine = dict.fromkeys(_STARTS.values(), config.refine.steps)
    if config.refine.steps is None:
        for name, value in _STARTS.items():
            for title, steps in ((f"{name} hit", 0), (f"{name} refined", REFINE_STEPS)):
                scores[title] = _mean(donors, lambda left, n=name, s=steps: left.layout_hit(n, s))
            refine[value] = REFINE_STEPS if scores[f"{name} refined"] > scores[f"{name} hit"] else 0
    logger.info(
        "%d donors left out in turn: a learned map places their cells with distance Spearman "
        "%.3f, an atlas with %.3f, the plane of the embedding with %.3f; model.start is %s, "
        "encoder.keep %g, refine.steps %d",
        len(donors), scores[MAP], scores[ATLAS], scores[PLANE], start, keep, refine[start],
    )  # fmt: skip
    return Transfer(start, keep, refine, len(donors), scores)


def _mean(donors: list[list[_Left]], score: Callable[[_Left], float]) -> float:
    return float(np.mean([np.mean([score(left) for left in slides]) for slides in donors]))


class _Left:
    """A slide left out, its embedding, and where each start would place its cells.

    Args:
        h: embedding (n, d).
        pos: true positions (n, 2).
        known: pairs (embedding, positions) of the slides trained on.
    """

    def __init__(self, h: Tensor, pos, known):
        self.pos = np.asarray(pos)
        self.layouts = {
            PLANE: principal_plane(h).numpy(),
            MAP: ridge_layout(h.numpy(), known),
            ATLAS: atlas_layout(h, known),
        }
        self.graph = knn(h, _NEIGHBORS)

    def spearman(self, name: str) -> float:
        return distance_metrics(self.layouts[name], self.pos)["distance_spearman"]

    def embedding_hit(self) -> float:
        return self._hit(self.graph)

    def layout_hit(self, name: str, steps: int) -> float:
        layout = torch.from_numpy(np.asarray(self.layouts[name], dtype=np.float64)).float()
        layout = refine_layout(layout, self.graph, steps=steps)
        return self._hit(knn(layout.double(), _NEIGHBORS))

    def _hit(self, graph: NeighborTable) -> float:
        return candidate_recall(graph, self.pos, _NEIGHBORS)[f"candidate_recall@{_NEIGHBORS}"]


def _leave_out(
    train, test, config, build, genes, device, seed, step_done
) -> dict[float, list[_Left]]:
    """The slides left out as a short stage A shows them, by ``encoder.keep``."""

    def look(h: dict[int, Tensor]) -> list[_Left]:
        known = [(h[id(slide)].numpy(), slide.pos) for slide in train]
        return [_Left(h[id(slide)], slide.pos, known) for slide in test]

    if build is None:
        return {0.0: look({id(s): torch.from_numpy(s.embedding).float() for s in (*train, *test)})}
    settings = config.encoder
    torch.manual_seed(seed)
    encoder = build().to(device)
    begin(encoder, train, genes, config)
    read = {id(s): read_expression(s, genes, encoder) for s in (*train, *test)}

    def embed() -> list[_Left]:
        return look({key: encode(encoder, expression, device) for key, expression in read.items()})

    steps = round(_PART * settings.steps_for(sum(s.num_cells for s in train)))
    if steps:
        fit = [
            ContrastSlide(read[id(s)], s.pos, settings.neighbors, settings.far_quantile)
            for s in train
        ]
        _train(encoder, fit, settings, steps, seed, device, step_done)
    keep = settings.keep
    found = {0.0: embed()} if not keep else {}
    if keep is None and settings.skip:
        keep = _KEEP
    if keep:
        finish(encoder, [read[id(s)] for s in train], keep, device)
        found[keep] = embed()
    return found


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
