"""What one training step sees: minisets and whole slides, with graphs and targets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import DataConfig, RunConfig
from ..errors import UserError
from ..graph import NeighborTable, knn_candidates
from ..io import read_slides
from ..slide import Slide
from ..targets import SlideTarget, build_target, collate, gate_target


@dataclass
class Unit:
    """A batch of one or more graphs, ready for a step.

    Args:
        h: embeddings (n, d).
        graph: candidate graph, kNN in H.
        target: what supervises.
        gate_target: reference walk on the candidate edges (E,), rows renormalised.
        whole: whether this is a whole slide, whose walk is compared by probe rows.
    """

    h: Tensor
    graph: NeighborTable
    target: SlideTarget
    gate_target: Tensor
    whole: bool = False

    def to(self, device) -> "Unit":
        """The same unit on another device."""
        return Unit(
            h=self.h.to(device),
            graph=self.graph.to(device),
            target=self.target.to(device),
            gate_target=self.gate_target.to(device),
            whole=self.whole,
        )


def read_file(
    path: Path, data: DataConfig, *, require_pos: bool, min_cells: int = 1
) -> list[Slide]:
    """The slides of a file, read as a configuration says; see :func:`~ipar_sparse.io.read_slides`.

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
    """A slide after stage A: frozen embeddings (n, d) and positions (n, 2), float64."""

    name: str
    h: Tensor
    pos: Tensor


def build_unit(h: Tensor, pos: Tensor, config: RunConfig, seed: int, whole: bool = False) -> Unit:
    """Candidates and targets of one set of cells.

    Args:
        h: embeddings (n, d).
        pos: positions (n, 2).
        config: decides k, metric and targets.
        seed: of the sampled parts of the targets.
        whole: whether this is a whole slide.
    """
    graph = knn_candidates(
        h, config.graph.k, metric=config.graph.metric, backend=config.graph.backend
    )
    extra = config.train.lambda_multiscale > 0
    mode = config.graph.target_mode
    target = build_target(pos, seed=seed, mode=mode, multiscale=extra)
    return Unit(h, graph, target, gate_target(graph, target.walk).float(), whole)


def merge(units: Sequence[Unit]) -> Unit:
    """Several minisets as one block-diagonal unit."""
    if len(units) == 1:
        return units[0]
    return Unit(
        h=torch.cat([unit.h for unit in units]),
        graph=NeighborTable.block_diagonal([unit.graph for unit in units]),
        target=collate([unit.target for unit in units]),
        gate_target=torch.cat([unit.gate_target for unit in units]),
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
        keep_cells: cells over all kept minisets; about 4 kB each.
    """

    def __init__(
        self,
        slides: Sequence[TrainingSlide],
        count: int,
        config: RunConfig,
        seed: int,
        keep_cells: int = 500_000,
    ):
        self.slides, self.config, self.seed = slides, config, seed
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
        unit = build_unit(slide.h[rows], slide.pos[rows], self.config, self.seed + number)
        if len(rows) <= self._room:
            self._room -= len(rows)
            self._kept[number] = unit
        return unit
