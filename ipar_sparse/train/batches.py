"""What one training step sees: minisets and whole slides, with graphs and targets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import DataConfig, RunConfig, TrainConfig
from ..data.anndata_io import read_slides
from ..data.slide import Slide
from ..errors import UserError
from ..geometry.gauge import gauge_fix, principal_plane
from ..graph import NeighborTable, knn_candidates
from ..supervision.targets import SlideTarget, build_target, collate, gate_target, target_graph


@dataclass
class Unit:
    """A batch of one or more graphs, ready for a step.

    Args:
        h: embeddings (n, d).
        graph: candidate graph, kNN in H, nearest first; for an oracle the true neighbours.
        target: what supervises.
        gate_target: what the gate learns (E,): the reference walk on the edges, rows
            renormalised.
        whole: whether this is a whole slide, whose walk is compared by probe rows.
        start: layout (n, 2) the model begins from; None leaves it to the model.
    """

    h: Tensor
    graph: NeighborTable
    target: SlideTarget
    gate_target: Tensor
    whole: bool = False
    start: Tensor | None = None

    def to(self, device) -> "Unit":
        """The same unit on another device."""
        return Unit(
            h=self.h.to(device),
            graph=self.graph.to(device),
            target=self.target.to(device),
            gate_target=self.gate_target.to(device),
            whole=self.whole,
            start=None if self.start is None else self.start.to(device),
        )


def read_file(
    path: Path, data: DataConfig, *, require_pos: bool, min_cells: int = 1
) -> list[Slide]:
    """The slides of a file, read as a configuration says; see :func:`~ipar_sparse.data.anndata_io.read_slides`.

    Args:
        path: AnnData file.
        data: layer, embedding, keys.
        require_pos: refuse slides without positions.
        min_cells: refuse slides with fewer cells.
    """
    return read_slides(
        path,
        slide_key=data.slide_key,
        layer=None if data.layer == "X" else data.layer,
        normalized=data.normalized,
        embedding=data.embedding,
        spatial_key=data.spatial_key,
        require_pos=require_pos,
        min_cells=min_cells,
    )


@dataclass
class TrainingSlide:
    """A slide after stage A: frozen embeddings (n, d), positions (n, 2), float64, and where the
    atlas places its cells (n, 2), if the run begins from one."""

    name: str
    h: Tensor
    pos: Tensor
    start: Tensor | None = None


def build_unit(
    h: Tensor,
    pos: Tensor,
    config: RunConfig,
    seed: int,
    whole: bool = False,
    oracle: bool = False,
    start: Tensor | None = None,
) -> Unit:
    """Candidates and targets of one set of cells.

    Args:
        h: embeddings (n, d).
        pos: positions (n, 2).
        config: decides k, metric and targets.
        seed: of the sampled parts of the targets.
        whole: whether this is a whole slide.
        oracle: attend on the true neighbours in place of candidates.
        start: where the atlas places the cells (n, 2), if the run begins from one.
    """
    mode = config.graph.target_mode
    if oracle:
        graph = target_graph(pos, seed=seed, mode=mode)
    else:
        graph = knn_candidates(
            h, config.graph.k, metric=config.graph.metric, backend=config.graph.backend
        )
    extra = config.train.lambda_multiscale > 0
    target = build_target(pos, seed=seed, mode=mode, multiscale=extra)
    weights = {step: w for step, w in enumerate(config.train.gate_walk, start=1) if w > 0}
    walks = {step: gate_target(graph, target.walk, step) for step in weights}
    if len(walks) == 1:
        (walk,) = walks.values()
    else:
        walk = _per_row(graph, sum(w * walks[step] for step, w in weights.items()))
    if config.model.start == "pca":
        start = gauge_fix(principal_plane(h))
    return Unit(h, graph, target, walk.float(), whole, start)


def subsample_edges(unit: Unit, settings: TrainConfig, generator: torch.Generator) -> Unit:
    """The unit on a random part of its candidates, as a step of training sees it.

    ``k_range`` keeps the nearest candidates, a share of the cells drawn anew. Where all
    candidates are fewer than the largest share, on whole slides, it keeps that part of them.
    ``mutual_share`` of the draws keep an edge only if its two ends are candidates of each other,
    and the nearest candidate of every cell.

    Args:
        unit: its graph's rows list the nearest candidates first.
        settings: ``k_range`` and ``mutual_share``.
        generator: source of the draw.
    """
    graph, keep = unit.graph, unit.graph.index >= 0
    if not graph.k or (settings.k_range is None and settings.mutual_share == 0):
        return unit

    def draw() -> float:
        return float(torch.rand((), generator=generator, device=generator.device))

    if settings.k_range is not None:
        low, high = settings.k_range
        share = low + (high - low) * draw()
        counts = [max(1, round(share * min(n, graph.k / high))) for n in unit.target.sizes]
        count = torch.tensor(counts, device=graph.device)[unit.target.batch]
        keep = keep & (torch.arange(graph.k, device=graph.device) < count.unsqueeze(-1))
    if draw() < settings.mutual_share:
        dst, slot = keep.nonzero().T
        src = graph.index[dst, slot].long()
        n = graph.num_nodes
        mutual = torch.isin(src * n + dst, dst * n + src) | (slot == 0)
        keep = keep.clone()
        keep[dst, slot] = mutual
    width = int(keep.any(0).nonzero().max()) + 1
    index = graph.index.masked_fill(~keep, -1)[:, :width]
    drawn = replace(graph, index=index, padded=not bool(keep[:, :width].all()), _cache={})
    walk = unit.gate_target[graph.from_table(keep)]
    return replace(unit, graph=drawn, gate_target=_per_row(drawn, walk))


def _per_row(graph: NeighborTable, values: Tensor) -> Tensor:
    """Edge values (E,) divided by their row's sum; rows of zeros stay."""
    dst = graph.edge_index[1]
    total = values.new_zeros(graph.num_nodes).index_add_(0, dst, values)
    return values / torch.where(total > 0, total, 1.0)[dst]


def merge(units: Sequence[Unit]) -> Unit:
    """Several minisets as one block-diagonal unit."""
    if len(units) == 1:
        return units[0]
    return Unit(
        h=torch.cat([unit.h for unit in units]),
        graph=NeighborTable.block_diagonal([unit.graph for unit in units]),
        target=collate([unit.target for unit in units]),
        gate_target=torch.cat([unit.gate_target for unit in units]),
        start=None if units[0].start is None else torch.cat([unit.start for unit in units]),
    )


def sample_minisets(
    slides: Sequence[TrainingSlide], count: int, config: RunConfig, seed: int
) -> list[tuple[int, Tensor]]:
    """Which cells make each miniset: (slide, rows), balanced over the slides.

    A miniset is a uniform random subset of one slide's cells, so that it covers the slide as
    densely as the slide is covered. Sizes are uniform between ``train.miniset_min`` and
    ``train.miniset_max`` (all of a slide that is smaller).

    Raises:
        UserError: if a slide is smaller than the smallest miniset.
    """
    settings = config.train
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

    Building one takes a tenth of the step that uses it, so what does not fit is not worth disk.

    Args:
        slides: where the cells come from.
        count: minisets in the pool.
        config: sizes, k, targets.
        seed: of the choice of cells.
        oracle: attend on the true neighbours in place of candidates.
        keep_cells: cells over all kept minisets; about 4 kB each.
    """

    def __init__(
        self,
        slides: Sequence[TrainingSlide],
        count: int,
        config: RunConfig,
        seed: int,
        oracle: bool = False,
        keep_cells: int = 500_000,
    ):
        self.slides, self.config, self.seed, self.oracle = slides, config, seed, oracle
        self.sets = sample_minisets(slides, count, config, seed)
        self._room = keep_cells
        self._kept: dict[int, Unit] = {}

    def __len__(self) -> int:
        return len(self.sets)

    def __getitem__(self, number: int) -> Unit:
        if number in self._kept:
            return self._kept[number]
        which, rows = self.sets[number]
        slide = self.slides[which]
        seed = self.seed + number
        unit = build_unit(
            slide.h[rows],
            slide.pos[rows],
            self.config,
            seed,
            oracle=self.oracle,
            start=None if slide.start is None else slide.start[rows],
        )
        if len(rows) <= self._room:
            self._room -= len(rows)
            self._kept[number] = unit
        return unit
