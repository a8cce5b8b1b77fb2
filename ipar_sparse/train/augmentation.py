"""What a step draws for cells and candidate edges: noise, dropout, and edges that are dropped.

A graph of many cells is drawn block by block, each block from a source of its own. So ranks that
share the rows of one slide hold no more than a block beside their own rows, and draw the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TrainConfig
from ..graph import NeighborTable
from ..supervision.losses import Source
from .batches import GraphBatch, step_generator

DRAWN_CELLS = 1 << 16
"""Cells of a block; a graph of no more is drawn at once."""

_Places = Tensor | slice


@dataclass
class _Block:
    """Consecutive cells of a graph, and those of them that this rank needs.

    Args:
        cells, edges: how many are drawn.
        nodes: where the cells of which an embedding is needed stand: among those, in the block,
            and in the graph.
        rows: where the rows that are held stand: among those, and in the block.
        first_edge: of these rows, counted from that of the block (m,), where rows are padded.
    """

    cells: int
    edges: int
    nodes: tuple[_Places, _Places, _Places]
    rows: tuple[_Places, _Places]
    first_edge: Tensor | None = None


def augment(batch: GraphBatch, settings: TrainConfig, generator: Source) -> tuple[Tensor, Tensor]:
    """A noisy embedding (n, d), and an edge bias (E,) of 0 or, on dropped edges, -inf.

    Where ranks share the graph, they are those of the nodes and edges which this one holds.
    """
    if isinstance(generator, Sequence):
        each = zip(batch.members, generator, strict=True)
        noisy, dropped = zip(*(augment(one, settings, g) for one, g in each), strict=True)
        return torch.cat(noisy), torch.cat(dropped)
    h, graph, noise_h, dropout_h = batch.h, batch.graph, settings.noise_h, settings.dropout_h
    if settings.vary_augmentation:
        level = torch.empty(2, device=h.device).uniform_(0.5, 1.5, generator=generator)
        noise_h, dropout_h = noise_h * level[0], dropout_h * level[1]
    blocks = graph._cached("drawn", lambda: _blocks(batch))
    noisy = h.new_empty(graph.num_src_nodes, h.size(1))
    table = torch.empty(graph.index.shape, device=h.device)
    for number, block in enumerate(blocks):
        source = generator
        if len(blocks) > 1:
            source = step_generator(generator.initial_seed(), "block", number, h.device)
        noise = h.new_empty(block.cells, h.size(1)).normal_(generator=source)
        keep = torch.empty_like(noise).uniform_(generator=source) >= dropout_h
        chance = torch.empty(block.edges, device=h.device).uniform_(generator=source)
        to, inside, cells = block.nodes
        noisy[to] = (h[cells] + noise_h * noise[inside]) * keep[inside]
        table[block.rows[0]] = _of_rows(chance, block, graph)
    # the edge with the best chance of each cell survives in any case
    drop = table < settings.edge_drop
    if table.size(1):
        drop = drop & (table < table.amax(dim=1, keepdim=True))
    drop = graph.from_table(drop)
    return noisy, torch.zeros(drop.shape, device=h.device).masked_fill_(drop, -math.inf)


def _of_rows(chance: Tensor, block: _Block, graph: NeighborTable) -> Tensor:
    """What was drawn for the edges of a block (E,), in the rows that are held; -1 in padding."""
    to, inside = block.rows
    if block.first_edge is None:
        return chance.view(block.cells, -1)[inside]
    mask = graph.mask[to]
    if not len(chance):
        return torch.full(mask.shape, -1.0, device=chance.device)
    slot = block.first_edge.unsqueeze(-1) + mask.cumsum(1) - 1
    return torch.where(mask, chance[slot.clamp(0, len(chance) - 1)], -1.0)


def _blocks(batch: GraphBatch) -> list[_Block]:
    """The blocks of a graph; found once, since lengths are read from the device."""
    n, graph, held = len(batch.h), batch.graph, batch.rows
    starts = list(range(0, n, DRAWN_CELLS)) or [0]
    ends = [*starts[1:], n]
    first = None
    if graph.padded:
        first = graph.rowptr if held is None else held.rowptr
        edges = first[torch.tensor([*starts, n], device=first.device)].diff().tolist()
    else:
        edges = [graph.k * (end - start) for start, end in zip(starts, ends, strict=True)]
    nodes = None if held is None else _split(held.nodes, ends)
    rows = None if held is None else _split(held.own, ends)
    blocks = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        every, here = slice(None), slice(start, end)
        of_nodes, of_rows, own = (here, every, here), (here, every), here
        if held is not None:
            cells, own = held.nodes[nodes[number]], held.own[rows[number]]
            of_nodes = nodes[number], cells - start, cells
            of_rows = rows[number], own - start
        before = None if first is None else first[own] - first[start]
        blocks.append(_Block(end - start, edges[number], of_nodes, of_rows, before))
    return blocks


def _split(numbers: Tensor, ends: list[int]) -> list[Tensor]:
    """Where numbers stand that lie before each end and not before the one before it."""
    ordered, places = numbers.sort()
    counts = torch.searchsorted(ordered, torch.tensor(ends, device=numbers.device))
    return list(places.split(counts.diff(prepend=counts.new_zeros(1)).tolist()))
