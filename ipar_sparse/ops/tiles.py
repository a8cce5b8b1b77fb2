"""Edges as tiles: groups of nodes beside the union of the nodes that they share edges with."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..graph import NeighborTable

NO_EDGE = 255  # in a tile of slots
_EDGES = 1 << 24  # edges whose unions are found at once
_MEMORY = 1 / 16  # of the device's memory that the tiles of one pass may take
_LONGEST = 32  # times the mean number of tiles; a group with more would be waited for


@dataclass
class Tiles:
    """The other ends of the edges of every group of nodes, each once, in tiles of fixed width.

    Args:
        column: nodes of the tiles (tiles, width), int32; the last tile of a group is filled up
            with its first node.
        words: the slot in its destination's row of the edge that joins a node of the group and
            one of the tile, 255 for none; four columns a word (tiles, width / 4, group), int32.
        first: number of the first tile of every group, and the number of all (groups + 1), int32.
        density: edges over entries of the tiles.
    """

    column: Tensor
    words: Tensor
    first: Tensor
    density: float

    @property
    def shape(self) -> dict[str, int]:
        """Arguments of a kernel."""
        return {"G": self.words.size(2), "U": self.column.size(1)}

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.first.numel() - 1


def destination_tiles(
    graph: NeighborTable, group: int, width: int, density: float = 0.0
) -> Tiles | None:
    """Groups of consecutive destinations beside the union of their sources.

    Args:
        graph: of rows of fewer than 255 slots.
        group: nodes of a group.
        width: columns of a tile, a multiple of 4.
        density: the least share of entries that are edges.

    Returns:
        The tiles; None if fewer entries are edges, or if they take too much memory.
    """
    n, k = graph.index.shape

    def parts() -> Iterator[_Part]:
        step = max(1, _EDGES // (group * max(k, 1))) * group
        slot = torch.arange(k, device=graph.device)
        for index in graph.index.split(step):
            row = torch.arange(index.size(0), device=graph.device).unsqueeze(1)
            edges = index >= 0
            row, column, slots = (t.expand_as(index)[edges] for t in (row, index.long(), slot))
            yield _tiles(row, column, slots, -(-index.size(0) // group), group, width)

    return _joined(parts(), group, width, density)


def source_tiles(
    graph: NeighborTable, edge: Tensor, group: int, width: int, density: float = 0.0
) -> Tiles | None:
    """Groups of consecutive sources beside the union of their destinations.

    Args:
        graph: as for :func:`destination_tiles`; so are the others.
        edge: positions of the edges in the flat table, sorted by source, stable (E,), int32.
    """

    def parts() -> Iterator[_Part]:
        source = graph.index.flatten()[edge.long()]
        groups = -(-graph.num_src_nodes // group)
        step = max(1, groups * _EDGES // max(edge.numel(), 1))
        borders = torch.arange(0, groups + step, step, device=graph.device).clamp(max=groups)
        ends = torch.searchsorted(source, (borders * group).int()).tolist()
        for number, (begin, end) in enumerate(pairwise(ends)):
            position = edge[begin:end].long()
            row = source[begin:end].long() - number * step * group
            given = row, position // graph.k, position % graph.k
            yield _tiles(*given, min(step, groups - number * step), group, width)

    return _joined(parts(), group, width, density)


class _Part(NamedTuple):
    """Tiles of some groups: nodes, slots, number of tiles of each group, number of edges."""

    column: Tensor
    words: Tensor
    tiles: Tensor
    edges: int


def _joined(parts: Iterator[_Part], group: int, width: int, density: float) -> Tiles | None:
    found: list[_Part] = []
    edges = entries = 0
    for part in parts:
        edges += part.edges
        entries += part.column.numel() * group
        if edges < density * entries or entries > _limit(part.column.device):
            return None
        found.append(part)
    if not edges:
        return None
    count = torch.cat([part.tiles for part in found])
    if int(count.max()) > _LONGEST * max(1.0, entries / (group * width * count.numel())):
        return None
    # Two tiles more than there are: a program reads ahead.
    column, words = found[0].column.new_zeros(2, width), found[0].words
    words = words.new_full((2, width // 4, group), -1)
    column = torch.cat([*(part.column for part in found), column])
    words = torch.cat([*(part.words for part in found), words])
    first = torch.cat([count.new_zeros(1), count.cumsum(0)]).int()
    return Tiles(column, words, first, edges / entries)


def _limit(device: torch.device) -> float:
    """Bytes that tiles may take on a device."""
    if device.type != "cuda":
        return float("inf")
    return _MEMORY * torch.cuda.get_device_properties(device).total_memory


def _tiles(row: Tensor, column: Tensor, slot: Tensor, groups: int, group: int, width: int) -> _Part:
    """Edges come in the order of their rows. Where a row has a column twice, the second one is a
    column of its own.
    """
    edges, device = row.numel(), row.device
    size = int(column.max()) + 1 if edges else 1
    key, rank = (row // group * size + column).sort(stable=True)
    row, slot = row[rank], slot[rank]
    again = _repeats(key, row)
    copies = int(again.max()) + 1 if edges else 1
    if copies > 1:
        key, rank = (key * copies + again).sort(stable=True)
        row, slot = row[rank], slot[rank]
    new = torch.ones_like(key, dtype=torch.bool)
    new[1:] = key[1:] != key[:-1]
    column = (key[new] // copies % size).int()
    owner = row // group
    count = torch.bincount(owner[new], minlength=groups)
    tiles = (count + width - 1) // width
    ends, tile_ends = count.cumsum(0), tiles.cumsum(0)
    place = new.cumsum(0) - 1 + ((tile_ends - tiles) * width - (ends - count))[owner]
    total = int(tile_ends[-1]) if groups else 0
    held = tiles > 0
    filled = torch.repeat_interleave(column[(ends - count)[held]], tiles[held])
    filled = filled.unsqueeze(1).repeat(1, width)
    filled.view(-1)[place[new]] = column
    table = torch.full((total, width // 4, group, 4), NO_EDGE, dtype=torch.uint8, device=device)
    table.view(-1)[(place // 4 * group + row % group) * 4 + place % 4] = slot.to(torch.uint8)
    return _Part(filled, table.view(torch.int32).squeeze(-1), tiles, edges)


def _repeats(key: Tensor, row: Tensor) -> Tensor:
    """How many equal (key, row) pairs come before each one; equal ones lie side by side."""
    position = torch.arange(key.numel(), device=key.device)
    start = torch.ones_like(key, dtype=torch.bool)
    start[1:] = (key[1:] != key[:-1]) | (row[1:] != row[:-1])
    return position - torch.where(start, position, 0).cummax(0).values if key.numel() else key
