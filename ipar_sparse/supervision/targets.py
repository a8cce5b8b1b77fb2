"""Frozen targets of layouts, built from true positions and used in training alone.

Everything is built in the unit-RMS gauge (:func:`~ipar_sparse.geometry.gauge_fix`). A target made
of several graphs (:func:`collate`) is block-diagonal, as a PyG ``Batch`` is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..graph import NeighborTable
from .held import HeldStress, HeldWalk, held_stress, held_walk
from .neighbors import (
    default_k,
    reference_positions,
    refuse_large,
    sketch_neighbors,
    spatial_neighbors,
)
from .record import TensorRecord, offsets
from .stress import (
    MINISET_LIMIT,
    StressTarget,
    collate_stress,
    multiscale_pairs,
    stress_from_neighbors,
)
from .walk import (
    WalkTarget,
    build_walk_target,
    collate_walks,
    default_steps,
    gate_target,
    walk_from_neighbors,
)

__all__ = [
    "SlideTarget",
    "StressTarget",
    "WalkTarget",
    "build_target",
    "build_walk_target",
    "collate",
    "collate_walks",
    "default_k",
    "default_steps",
    "gate_target",
    "target_graph",
]

PARTNERS = 32  # neighbours a node keeps of its 0.15 n nearest; with 213 as many as a miniset's


@dataclass(frozen=True)
class SlideTarget(TensorRecord):
    """All that supervises one slide, one miniset or a batch of them.

    Args:
        pos: true positions (n, 2), unit-RMS gauge, float64.
        walk: the random walk.
        stress: the distances of E_geo.
        batch: graph of each node (n,), int64.
        ptr: first node of each graph, and the end (graphs + 1,), int64.
        sizes: number of nodes of each graph.
        multiscale: equally many pairs at every scale from the nearest neighbour upwards, a
            further term of the training loss on whole slides; not part of E_geo.
    """

    pos: Tensor
    walk: WalkTarget | HeldWalk
    stress: StressTarget | HeldStress
    batch: Tensor
    ptr: Tensor
    sizes: tuple[int, ...]
    multiscale: StressTarget | HeldStress | None = None

    @property
    def num_graphs(self) -> int:
        """Number of graphs in the batch."""
        return len(self.sizes)

    def held(self, drawn: int) -> "SlideTarget":
        """The target with this rank's part of the pairs of its one slide.

        Args:
            drawn: pairs that a step draws of each kind.
        """
        multiscale = None if self.multiscale is None else held_stress(self.multiscale, drawn)
        return replace(self, stress=held_stress(self.stress, drawn), multiscale=multiscale)


def build_target(
    pos: Tensor | np.ndarray,
    *,
    seed: int = 0,
    mode: str = "auto",
    partners: int = PARTNERS,
    multiscale: bool | None = None,
    held: bool = False,
) -> SlideTarget:
    """All targets of one miniset or one whole slide.

    ``"exact"`` keeps every neighbour within 0.15 n: the definition, O(n^2) pairs. ``"sketch"``
    keeps the same reach with O(n) pairs. Each node gets its nearest in a random subset of the
    slide, which are a random sample of its 0.15 n nearest. A node has as many ring partners and
    landmarks as in a miniset of 384, so that E_geo means the same at every n. ``"auto"`` is
    exact up to 384 nodes.

    Args:
        pos: positions (n, 2), any units, finite. The targets are built where they are.
        seed: of every random choice.
        mode: ``"auto"``, ``"exact"`` or ``"sketch"``.
        partners: neighbours a node in a sketch.
        multiscale: whether to add multiscale pairs; with a sketch if left out.
        held: whether this rank keeps some rows of the walk alone; all ranks build it at once.

    Raises:
        ValueError: on positions that are not a finite (n, 2) matrix, an unknown mode, or an exact
            target of more than 4096 nodes.
    """
    pos = reference_positions(pos)
    n = len(pos)
    neighbors, sketch = _neighbor_lists(pos, mode, partners, seed)
    sampled = neighbors.size(1) < default_k(n)
    multiscale = sketch if multiscale is None else multiscale
    return SlideTarget(
        pos=pos,
        walk=(held_walk if held else walk_from_neighbors)(
            pos, neighbors, default_steps(n), sampled
        ),
        stress=stress_from_neighbors(pos, neighbors, seed, sampled=sampled),
        batch=torch.zeros(n, dtype=torch.int64, device=pos.device),
        ptr=torch.tensor([0, n], device=pos.device),
        sizes=(n,),
        multiscale=multiscale_pairs(pos, seed) if multiscale else None,
    )


def target_graph(
    pos: Tensor | np.ndarray, *, seed: int = 0, mode: str = "auto", partners: int = PARTNERS
) -> NeighborTable:
    """The true neighbours on which :func:`build_target` of the same arguments builds, as a graph.

    Args:
        pos: positions (n, 2), any units, finite.
        seed: of the sample.
        mode: ``"auto"``, ``"exact"`` or ``"sketch"``, see :func:`build_target`.
        partners: neighbours a node in a sketch.
    """
    pos = reference_positions(pos)
    neighbors, sketch = _neighbor_lists(pos, mode, partners, seed)
    method = "sketch" if sketch else "kdtree"
    return NeighborTable(neighbors.int(), metric="euclidean", method=method)


def collate(targets: Sequence[SlideTarget]) -> SlideTarget:
    """Targets of several graphs as one block-diagonal target.

    Nodes are numbered graph after graph, as in a PyG ``Batch`` of the same graphs.

    Raises:
        ValueError: without a target.
    """
    if not targets:
        raise ValueError("collate needs at least one target")
    if len(targets) == 1:
        return targets[0]
    sizes = tuple(n for target in targets for n in target.sizes)
    graph = offsets(target.num_graphs for target in targets)
    node = offsets(len(target.pos) for target in targets)
    ends = [target.ptr[1:] + s for target, s in zip(targets, node, strict=True)]
    multiscale: list[Any] = [t.multiscale for t in targets if t.multiscale is not None]
    walks: list[Any] = [target.walk for target in targets]
    stresses: list[Any] = [target.stress for target in targets]
    return SlideTarget(
        pos=torch.cat([target.pos for target in targets]),
        walk=collate_walks(walks),
        stress=collate_stress(stresses, node),
        batch=torch.cat([target.batch + s for target, s in zip(targets, graph, strict=True)]),
        ptr=torch.cat([targets[0].ptr[:1], *ends]),
        sizes=sizes,
        multiscale=collate_stress(multiscale, node) if len(multiscale) == len(targets) else None,
    )


def _neighbor_lists(pos: Tensor, mode: str, partners: int, seed: int) -> tuple[Tensor, bool]:
    """Neighbours (n, k) in one of the modes of :func:`build_target`, and whether it is a sketch."""
    if mode not in ("auto", "exact", "sketch"):
        raise ValueError(f"unknown mode {mode!r}; choose 'auto', 'exact' or 'sketch'")
    if mode == "exact":
        refuse_large(len(pos))
    if mode == "sketch" or (mode == "auto" and len(pos) > MINISET_LIMIT):
        return sketch_neighbors(pos, partners, seed), True
    return spatial_neighbors(pos), False
