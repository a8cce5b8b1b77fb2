"""Tiles of shared sources hold every edge of a graph once, in its slot."""

import pytest
import torch

from ipar_sparse.graph import NeighborTable, knn
from ipar_sparse.ops.tiles import NO_EDGE, destination_tiles, source_tiles


def graph_of(kind, n, k, n_src=None):
    generator = torch.Generator().manual_seed(n * k)
    index = torch.randint(0, n_src or n, (n, k), generator=generator)
    if kind == "padded":
        index = index.masked_fill(torch.rand(n, k, generator=generator) < 0.4, -1)
        index[: max(1, n // 5)] = -1
    return NeighborTable(index.int(), num_src_nodes=n_src, padded=kind == "padded")


def by_source(graph):
    source = graph.index.flatten()
    edge = torch.sort(source, stable=True).indices.int()
    return edge[int((source < 0).sum()) :]


def edges_of(tiles):
    """(member's number, column, slot) of every entry that is an edge."""
    width, group = tiles.column.size(1), tiles.words.size(2)
    slots = tiles.words.contiguous().view(torch.uint8)
    slots = slots.view(-1, width // 4, group, 4).transpose(1, 2).reshape(-1, group, width)
    owner = torch.searchsorted(tiles.first.long(), torch.arange(len(slots)), right=True) - 1
    tile, member, column = (slots != NO_EDGE).nonzero().T
    node = owner[tile] * group + member
    found = torch.stack([node, tiles.column[tile, column].long(), slots[tile, member, column]])
    return sorted(map(tuple, found.T.tolist()))


@pytest.mark.parametrize("kind", ["random", "padded"])
@pytest.mark.parametrize("n,k,n_src", [(1, 1, None), (40, 9, None), (70, 5, 33), (20, 6, 90)])
def test_tiles_hold_every_edge_once(kind, n, k, n_src):
    graph = graph_of(kind, n, k, n_src)
    row, slot = (graph.index >= 0).nonzero().T
    source = graph.index[row, slot].long()
    given = (graph, 16, 8), (graph, by_source(graph), 16, 8)
    for build, args, ends in (
        (destination_tiles, given[0], (row, source)),
        (source_tiles, given[1], (source, row)),
    ):
        tiles = build(*args)
        if not graph.num_edges:
            assert tiles is None
            continue
        want = sorted(map(tuple, torch.stack([*ends, slot]).T.tolist()))
        assert edges_of(tiles) == want
        assert tiles.density == pytest.approx(graph.num_edges / (16 * 8 * int(tiles.first[-1])))
        again = build(*args)
        assert torch.equal(tiles.words, again.words) and torch.equal(tiles.column, again.column)


def test_chunks_join_to_the_same_tiles(monkeypatch):
    graph = graph_of("random", 100, 7)
    whole = destination_tiles(graph, 16, 8), source_tiles(graph, by_source(graph), 16, 8)
    monkeypatch.setattr("ipar_sparse.ops.tiles._EDGES", 200)
    parts = destination_tiles(graph, 16, 8), source_tiles(graph, by_source(graph), 16, 8)
    for a, b in zip(whole, parts, strict=True):
        assert edges_of(a) == edges_of(b) and torch.equal(a.first, b.first)


def test_tiles_are_refused_where_few_sources_are_shared_or_one_has_all_edges():
    line = knn(torch.arange(2000.0).unsqueeze(-1), 8)
    assert destination_tiles(line, 64, 32, density=0.08) is not None
    apart = line.permute(torch.randperm(2000, generator=torch.Generator().manual_seed(0)))
    assert destination_tiles(apart, 64, 32, density=0.08) is None
    hub = NeighborTable(torch.cat([line.index, torch.zeros(2000, 1, dtype=torch.int32)], dim=1))
    assert source_tiles(line, by_source(line), 16, 8) is not None
    assert source_tiles(hub, by_source(hub), 16, 8) is None
