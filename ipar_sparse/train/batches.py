"""What one training step sees: minisets or whole slides, with their graphs and targets."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..config import RunConfig, TrainConfig
from ..distributed import share_of, sharing_rows, size
from ..errors import UserError
from ..graph import NeighborTable
from ..graph.rows import HeldRows
from ..inference import steps
from ..inference.costs import MINISET_CELLS, WHOLE_CELL
from ..supervision import SlideTarget, build_target, gate_target, target_graph
from ..supervision import collate as collate_targets
from ..supervision.held import HeldWalk
from ..supervision.losses import Source
from ..supervision.walk import WalkTarget

SLIDE_STEPS = 100
"""Steps per epoch on whole slides, where none are asked for."""
_POWERS = 1 << 26  # entries of walks that are kept with minisets: 256 MiB
_AHEAD = 15  # minisets built together with the one that is asked for


@dataclass
class EmbeddedSlide:
    """A slide after the encoder.

    Args:
        name: of the slide.
        h: frozen embeddings (n, d).
        pos: positions (n, 2), float64, on the same device.
        initial: initial layout (n, 2) by the atlas of the run, if it has one.
    """

    name: str
    h: Tensor
    pos: Tensor
    initial: Tensor | None = None

    def take(self, rows: Tensor) -> EmbeddedSlide:
        """Some of its cells, by row number (m,)."""
        initial = None if self.initial is None else self.initial[rows]
        return EmbeddedSlide(self.name, self.h[rows], self.pos[rows], initial)

    def to(self, device: torch.device | str) -> EmbeddedSlide:
        """The same slide on another device."""
        initial = None if self.initial is None else self.initial.to(device)
        return EmbeddedSlide(self.name, self.h.to(device), self.pos.to(device), initial)


@dataclass
class GraphBatch:
    """One or more graphs, ready for a step.

    Args:
        h: embeddings (n, d).
        graph: candidate graph, nearest first; for an oracle the true neighbours.
        target: what supervises.
        gate_target: what the gate learns (E,): the reference walk on the edges, rows sum to 1.
        whole: whether this is a whole slide, whose walk is compared by probe rows.
        initial: layout (n, 2) that the recycles begin from; None leaves it to the model.
        stays: whether later steps get this very batch again.
        members: the batches of single graphs that it was collated from, if it was.
        rows: of the graph that this rank holds, where several share it. ``graph``, ``gate_target``
            and ``initial`` are then those of these rows.
    """

    h: Tensor
    graph: NeighborTable
    target: SlideTarget
    gate_target: Tensor
    whole: bool = False
    initial: Tensor | None = None
    stays: bool = False
    members: Sequence[GraphBatch] = ()
    rows: HeldRows | None = None

    def to(self, device: torch.device | str) -> GraphBatch:
        """The same batch on another device; itself where it is there already."""
        h = self.h.to(device)
        if h is self.h:
            return self
        return GraphBatch(
            h=h,
            graph=self.graph.to(device),
            target=self.target.to(device),
            gate_target=self.gate_target.to(device),
            whole=self.whole,
            initial=None if self.initial is None else self.initial.to(device),
        )


@dataclass
class Share:
    """What this rank computes of the batch of one step.

    Args:
        pieces: minisets as one collated batch, or whole slides one by one, where there was room
            for them; maybe none.
        numbers: of the graphs of each piece in the whole batch, which name their random numbers.
        cells: of the whole batch, over all ranks.
        graphs: of the whole batch, likewise.
    """

    pieces: list[GraphBatch]
    numbers: list[range]
    cells: int
    graphs: int

    @property
    def alone(self) -> GraphBatch | None:
        """The whole batch, where one rank computes all of it in one piece."""
        whole = len(self.pieces) == 1 and len(self.numbers[0]) == self.graphs
        return self.pieces[0] if whole and size() == 1 else None


def build_batch(
    slide: EmbeddedSlide,
    config: RunConfig,
    seed: int,
    whole: bool = False,
    oracle: bool = False,
    shared: bool = False,
) -> GraphBatch:
    """Candidates and targets of one set of cells.

    Args:
        slide: the cells.
        config: decides k, metric, targets and the initial layout.
        seed: of the sampled parts of the targets.
        whole: whether this is a whole slide.
        oracle: attend on the true neighbours in place of candidates.
        shared: whether all ranks build it at once, and each keeps some rows of the graph.
    """
    mode = config.graph.target_mode
    if oracle:
        graph = target_graph(slide.pos, seed=seed, mode=mode)
    else:
        with sharing_rows(len(slide.h)) if shared else nullcontext():
            graph = steps.candidate_graph(slide.h, config)
    rows = HeldRows(graph, slide.h) if shared else None
    multiscale = config.train.lambda_multiscale > 0
    build = partial(build_target, slide.pos, seed=seed, mode=mode, multiscale=multiscale)
    target = build(held=shared)
    weights = {s: w for s, w in enumerate(config.train.gate_target_weights, start=1) if w > 0}
    own = None if rows is None else rows.own
    reference = target.walk
    if isinstance(reference, HeldWalk) and not (reference.sampled and set(weights) == {1}):
        reference = build().walk  # powers are made of all rows
    walks = [gate_target(graph, reference, step, own) for step in weights]
    if shared:
        target = target.held(config.train.stress_pairs)
    graph, walk = graph if rows is None else rows.graph, walks[0]
    if len(walks) > 1:
        mixed = [w * own for w, own in zip(weights.values(), walks, strict=True)]
        walk = _per_row(graph, torch.stack(mixed).sum(0))
    initial = slide.initial
    if config.model.init == "pca":
        initial = steps.initial_layout(slide.h, config)[0]
    if own is not None and initial is not None:
        initial = initial[own]
    return GraphBatch(slide.h, graph, target, walk.float(), whole, initial, rows=rows)


def subsample_edges(batch: GraphBatch, settings: TrainConfig, generator: Source) -> GraphBatch:
    """The batch on a random part of its candidates, as a step of training sees it.

    ``k_fraction_range`` keeps the nearest candidates, a fraction of the cells drawn anew. Where all
    candidates are fewer than the largest fraction, on whole slides, it keeps that part of them.
    With probability ``mutual_prob`` an edge is kept only if its two ends are candidates of each
    other; the nearest candidate of every cell always is.

    Args:
        batch: its graph's rows list the nearest candidates first.
        settings: ``k_fraction_range`` and ``mutual_prob``.
        generator: source of the draw; several are one for each member of a batch.
    """
    graph, keep = batch.graph, batch.graph.index >= 0
    if not graph.k or (settings.k_fraction_range is None and settings.mutual_prob == 0):
        return batch
    if isinstance(generator, Sequence):
        each = zip(batch.members or [batch], generator, strict=True)
        return collate([subsample_edges(one, settings, source) for one, source in each])

    def draw() -> float:
        return float(torch.rand((), generator=generator, device=generator.device))

    if settings.k_fraction_range is not None:
        low, high = settings.k_fraction_range
        share = low + (high - low) * draw()
        counts = [max(1, round(share * min(n, graph.k / high))) for n in batch.target.sizes]
        count = torch.tensor(counts, device=graph.device)[batch.target.batch]
        keep = keep & (torch.arange(graph.k, device=graph.device) < count.unsqueeze(-1))
    if draw() < settings.mutual_prob:
        dst, slot = keep.nonzero().T
        src = graph.index[dst, slot].long()
        n = graph.num_nodes
        mutual = torch.isin(src * n + dst, dst * n + src) | (slot == 0)
        keep = keep.clone()
        keep[dst, slot] = mutual
    width = int(keep.any(0).nonzero().max()) + 1
    index = graph.index.masked_fill(~keep, -1)[:, :width]
    drawn = replace(graph, index=index, padded=not bool(keep[:, :width].all()), _cache={})
    walk = batch.gate_target[graph.from_table(keep)]
    return replace(batch, graph=drawn, gate_target=_per_row(drawn, walk))


def _per_row(graph: NeighborTable, values: Tensor) -> Tensor:
    """Edge values (E,) divided by their row's sum; rows of zeros stay."""
    dst = graph.edge_index[1]
    total = values.new_zeros(graph.num_nodes).index_add_(0, dst, values)
    return values / torch.where(total > 0, total, 1.0)[dst]


def collate(batches: Sequence[GraphBatch]) -> GraphBatch:
    """Several minisets as one block-diagonal batch."""
    if len(batches) == 1:
        return batches[0]
    initial = None
    if batches[0].initial is not None:
        initial = torch.cat([batch.initial for batch in batches])
    return GraphBatch(
        h=torch.cat([batch.h for batch in batches]),
        graph=NeighborTable.block_diagonal([batch.graph for batch in batches]),
        target=collate_targets([batch.target for batch in batches]),
        gate_target=torch.cat([batch.gate_target for batch in batches]),
        initial=initial,
        members=batches,
    )


def sample_minisets(
    slides: Sequence[EmbeddedSlide], count: int, settings: TrainConfig, seed: int
) -> list[tuple[int, Tensor]]:
    """Which cells make each miniset: (slide, rows), balanced over the slides.

    A miniset is a uniform random subset of one slide's cells, so that it covers the slide as
    densely as the slide is covered. Sizes are uniform between ``miniset_min`` and ``miniset_max``
    (all of a slide that is smaller).

    Raises:
        UserError: if a slide is smaller than the smallest miniset.
    """
    for slide in slides:
        if len(slide.h) < settings.miniset_min:
            raise UserError(
                f"{slide.name} has {len(slide.h)} cells, fewer than the smallest miniset "
                f"({settings.miniset_min}); leave it out or --set train.miniset_min={len(slide.h)}"
            )
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for number in range(count):
        which = number % len(slides)
        n = len(slides[which].h)
        high = min(settings.miniset_max, n)
        size = int(torch.randint(settings.miniset_min, high + 1, (), generator=generator))
        rows = torch.randperm(n, generator=generator)[:size].sort().values
        sets.append((which, rows))
    return sets


class MinisetPool:
    """Minisets built when first asked for and kept, or built again where they are too many.

    They are built on the host, a few at a time side by side, and kept on the device.

    Args:
        slides: where the cells come from.
        count: minisets in the pool.
        config: sizes, k, targets.
        seed: of the choice of cells.
        oracle: attend on the true neighbours in place of candidates.
        keep_cells: cells over all kept minisets.
        device: where minisets are wanted.
    """

    def __init__(
        self,
        slides: Sequence[EmbeddedSlide],
        count: int,
        config: RunConfig,
        seed: int,
        oracle: bool = False,
        keep_cells: int = MINISET_CELLS,
        device: torch.device | str = "cpu",
    ):
        self.slides, self.config, self.seed, self.oracle = slides, config, seed, oracle
        self.device = torch.device(device)
        self.sets = sample_minisets(slides, count, config.train, seed)
        kept = torch.tensor([len(rows) for _, rows in self.sets]).cumsum(0) <= keep_cells
        self._missing = [number for number in range(count) if kept[number]]
        self._kept: dict[int, GraphBatch] = {}
        self._room = _POWERS

    def __len__(self) -> int:
        return len(self.sets)

    def __getitem__(self, number: int) -> GraphBatch:
        if number in self._missing:
            self._missing.remove(number)
            ahead, self._missing = self._missing[:_AHEAD], self._missing[_AHEAD:]
            numbers = [number, *ahead]
            cells = [self._cells(one) for one in numbers]
            for one, batch in zip(numbers, _side_by_side(self._build, numbers, cells), strict=True):
                self._kept[one] = batch.to(self.device)
                self._kept[one].stays = True
                self._keep_powers(self._kept[one].target.walk)
        if number in self._kept:
            return self._kept[number]
        return self._build(number, self._cells(number)).to(self.device)

    def _keep_powers(self, walk: WalkTarget | HeldWalk) -> None:
        """Keep the powers of the reference walk, which every step compares with, if they fit."""
        needed = walk.steps * len(walk.pos) ** 2
        if needed <= self._room and isinstance(walk, WalkTarget):
            self._room -= needed
            walk.cache_reference()

    def _cells(self, number: int) -> EmbeddedSlide:
        which, rows = self.sets[number]
        return self.slides[which].take(rows).to("cpu")

    def _build(self, number: int, cells: EmbeddedSlide) -> GraphBatch:
        return build_batch(cells, self.config, self.seed + number, oracle=self.oracle)


def _side_by_side(build: Callable[..., GraphBatch], *given: Sequence) -> list[GraphBatch]:
    """The results of a function on the host, on all cores, one thread of torch each."""
    threads = torch.get_num_threads()
    if threads == 1:
        return list(map(build, *given))
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(build, *given))
    finally:
        torch.set_num_threads(threads)


class Batches:
    """What this rank computes of the batch of every training step, and the validation's batches.

    Args:
        train: slides to train on.
        val: slides that decide when to stop.
        config: kind and number of the batches.
        device: where steps are computed; whole slides stay there if they fit.
    """

    def __init__(
        self,
        train: Sequence[EmbeddedSlide],
        val: Sequence[EmbeddedSlide],
        config: RunConfig,
        device: torch.device,
    ):
        settings = config.train
        self.config, self.device, kind = config, device, settings.batch_kind
        self.slides, self.per_step = train, min(settings.slides_per_step, len(train))
        self.by_rows = self.per_step < size() and shares_rows(config)
        self.own = range(self.per_step) if self.by_rows else share_of(self.per_step)
        oracle = settings.attention_graph == "target"
        self.pool = MinisetPool(
            train, settings.minisets, config, settings.seed, oracle=oracle, device=device
        )
        self.whole: dict[int, GraphBatch] = {}
        if kind in ("slide", "mixed"):
            own_slides = {self._slides_of(t)[p] for t in range(len(train)) for p in self.own}
            for i in sorted(own_slides):
                given = train[i], config, settings.seed, True, oracle
                self.whole[i] = build_batch(*given, shared=self.by_rows)
            held = {i: build_batch(s, config, settings.seed, True) for i, s in enumerate(val)}
            _make_room({} if self.by_rows else self.whole, held, device)
            self.val = [*held.values()]
        else:
            count = settings.val_minisets if val else 0
            minisets = MinisetPool(val, count, config, settings.seed + 1, device=device)
            self.val = [minisets[number] for number in range(len(minisets))]

    def at(self, stage: str, step: int) -> Share:
        """The batch of a step: minisets in a new order each epoch, slides in turn.

        It is the same whatever the number of ranks, each of which computes a part of it.
        """
        settings = self.config.train
        if settings.batch_kind == "slide":
            return self._share_of_slides(step)
        if settings.batch_kind == "mixed":
            if step % 2:
                return self._share_of_slides(step // 2)
            step //= 2
        width = settings.batch_size
        per_pass = math.ceil(len(self.pool) / width)
        generator = step_generator(settings.seed, f"{stage} order", step // per_pass)
        order = torch.randperm(len(self.pool), generator=generator).tolist()
        start = step % per_pass * width
        chosen = order[start : start + width]
        cells, own = sum(len(self.pool.sets[i][1]) for i in chosen), share_of(len(chosen))
        if not own:
            return Share([], [], cells, len(chosen))
        piece = collate([self.pool[chosen[place]] for place in own])
        return Share([piece], [own], cells, len(chosen))

    def _slides_of(self, turn: int) -> list[int]:
        return [(turn * self.per_step + place) % len(self.slides) for place in range(self.per_step)]

    def _share_of_slides(self, turn: int) -> Share:
        chosen = self._slides_of(turn)
        pieces = [self.whole[chosen[place]] for place in self.own]
        cells = sum(len(self.slides[i].h) for i in chosen)
        return Share(pieces, [range(place, place + 1) for place in self.own], cells, len(chosen))


def shares_rows(config: RunConfig) -> bool:
    """Whether ranks can share the rows of one slide: terms of the logits that measure a whole
    layout, and candidates that are drawn anew in each step, are not shared."""
    settings = config.train
    drawn = settings.k_fraction_range is not None or settings.mutual_prob > 0
    return not drawn and not set(config.model.terms) - {"pair"}


def step_generator(
    seed: int, stage: str, step: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The source of all random numbers of one step of a stage."""
    return torch.Generator(device).manual_seed(step_seed(seed, stage, step))


def step_seed(seed: int, stage: str, step: int) -> int:
    """The seed of :func:`step_generator`."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _make_room(
    train: dict[int, GraphBatch], val: dict[int, GraphBatch], device: torch.device
) -> None:
    """Whole slides stay on the device if they fit; else only the one in use is there."""
    if device.type != "cuda":
        return
    room = torch.cuda.get_device_properties(device).total_memory // 4
    for batches in (train, val):
        for number, batch in batches.items():
            room -= WHOLE_CELL * len(batch.h)
            batches[number] = batch.to(device if room >= 0 else "cpu")
            batches[number].stays = room >= 0
