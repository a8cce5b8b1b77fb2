"""NeighborTable: a directed graph in which every destination has a row of sources."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

_ROWS = 1 << 20  # rows renumbered at once


@dataclass
class NeighborTable:
    """A directed graph as a table: row i lists the sources j of the in-edges of destination i.

    A kNN graph has this form. Edge e of an unpadded table is slot ``e % k`` of row ``e // k``.
    Per-edge tensors everywhere in this package follow this row-major order, with padding slots
    left out. In PyG's terms ``edge_index[0]`` is the source (the neighbour) and
    ``edge_index[1]`` the destination (the node that attends).

    Args:
        index: sources (n, k), int32; -1 marks padding and is allowed only if ``padded``.
        num_src_nodes: number of source nodes; n unless the graph is bipartite.
        padded: whether rows may have fewer than k neighbours.
        recall: sampled recall@k against exact search, None where the search was exact.
        metric: the metric of the search.
        method: the backend that found the neighbours.
    """

    index: Tensor
    num_src_nodes: int = None  # set in __post_init__
    padded: bool = False
    recall: float | None = None
    metric: str | None = None
    method: str | None = None
    _cache: dict = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.index.dim() != 2 or self.index.dtype != torch.int32:
            raise ValueError(
                f"NeighborTable needs an int32 table (n, k); given {self.index.dtype} of shape "
                f"{tuple(self.index.shape)}. Build one with knn() or NeighborTable.from_edge_index."
            )
        if self.num_src_nodes is None:
            self.num_src_nodes = self.index.size(0)
        self.index = self.index.contiguous()

    @property
    def num_nodes(self) -> int:
        """Number of destination nodes n."""
        return self.index.size(0)

    @property
    def k(self) -> int:
        """Number of slots a row."""
        return self.index.size(1)

    @property
    def device(self) -> torch.device:
        """Where the table lies."""
        return self.index.device

    @property
    def num_edges(self) -> int:
        """Number of edges E, padding left out."""
        if not self.padded:
            return self.index.numel()
        return self._cached("num_edges", lambda: int(self.mask.sum()))

    @property
    def mask(self) -> Tensor:
        """True where a slot holds an edge, (n, k)."""
        return self._cached("mask", lambda: self.index >= 0)

    @property
    def has_loops(self) -> bool:
        """Whether some node is its own neighbour; never so in a kNN graph."""
        row = torch.arange(self.num_nodes, dtype=torch.int32, device=self.device).unsqueeze(-1)
        return self._cached("has_loops", lambda: bool((self.index == row).any()))

    @property
    def is_simple(self) -> bool:
        """Whether no row lists a source twice; so in a kNN graph, and not where rows are padded."""

        def check() -> bool:
            ordered = self.index.sort(dim=-1).values
            return not bool((ordered[:, 1:] == ordered[:, :-1]).any())

        return not self.padded and self._cached("is_simple", check)

    @property
    def edge_index(self) -> Tensor:
        """PyG's edge list (2, E), int64: sources first, destinations second, row-major."""
        return self._cached("edge_index", self._edge_index)

    @property
    def rowptr(self) -> Tensor:
        """CSR row pointer over destinations (n + 1,), int64."""
        return self._cached("rowptr", self._rowptr)

    def rows(self, part: slice, first: bool = False) -> "NeighborTable":
        """Some rows of a table of one node set, as a graph of all sources.

        Args:
            part: the rows.
            first: renumber the nodes, round about, so that those of the rows come first.
        """
        index, n = self.index[part], self.num_src_nodes
        if first:
            moved = (index - part.start).remainder_(n)
            index = torch.where(index < 0, index, moved) if self.padded else moved
        return NeighborTable(index, n, self.padded, self.recall, self.metric, self.method)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The edges as unordered pairs of nodes.

        Returns:
            ``pair`` (2, P), int64, each once; ``number`` (E,), int64: the pair of each edge.
        """
        return self._cached("pairs", self._pairs)

    def reverse(self) -> tuple[Tensor, Tensor, Tensor]:
        """The edges sorted by source, for loops over a node's out-edges.

        Returns:
            ``rowptr`` (n_src + 1,), int64; ``edge`` (E,), int64: the row-major number of each
            edge; ``dst`` (E,), int64: its destination. Stable: edges of one source keep their
            order, so that sums over them are the same in every run.
        """
        return self._cached("reverse", self._reverse)

    @property
    def known_reverse(self) -> list[Tensor]:
        """The result of :meth:`reverse` where it has been called before, else nothing."""
        return list(self._cache.get("reverse", ()))

    def set_reverse(self, rowptr: Tensor, edge: Tensor, dst: Tensor) -> None:
        """Hand over the result of :meth:`reverse` on an equal table, which saves a sort."""
        self._cache["reverse"] = (rowptr, edge, dst)

    def to_table(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Per-edge values (E, ...) as (n, k, ...), ``fill`` in padding slots."""
        shape = (self.num_nodes, self.k, *values.shape[1:])
        if not self.padded:
            return values.reshape(shape)
        table = values.new_full((self.num_nodes * self.k, *values.shape[1:]), fill)
        return table.index_copy(0, self._slots(), values).reshape(shape)

    def from_table(self, table: Tensor) -> Tensor:
        """Table values (n, k, ...) as per-edge values (E, ...)."""
        flat = table.reshape(self.num_nodes * self.k, *table.shape[2:])
        return flat.index_select(0, self._slots()) if self.padded else flat

    def to(self, device: torch.device | str) -> "NeighborTable":
        """The same graph on another device (itself where it is there already)."""
        index = self.index.to(device)
        return self if index is self.index else replace(self, index=index, _cache={})

    def permute(self, perm: Tensor) -> "NeighborTable":
        """The same graph with nodes renumbered: new node i is old node ``perm[i]``.

        Args:
            perm: a permutation of the n nodes (n,), integer.

        Raises:
            ValueError: on a bipartite table.
        """
        if self.num_src_nodes != self.num_nodes:
            raise ValueError("permute needs one node set; this table is bipartite")
        perm = perm.to(self.device).long()
        inverse = torch.empty(perm.numel() + 1, dtype=torch.int32, device=self.device)
        inverse[perm] = torch.arange(perm.numel(), dtype=torch.int32, device=self.device)
        inverse[-1] = -1  # the padding mark -1 indexes the last entry and maps to itself
        index = torch.empty_like(self.index)
        for rows, part in zip(perm.split(_ROWS), index.split(_ROWS), strict=True):
            part.copy_(inverse[self.index[rows].long()])
        return replace(self, index=index, _cache={})

    @classmethod
    def from_edge_index(
        cls, edge_index: Tensor, num_nodes: int | None = None, num_src_nodes: int | None = None
    ) -> tuple["NeighborTable", Tensor]:
        """A table from an edge list; rows of fewer than the largest in-degree are padded.

        Args:
            edge_index: (2, E), sources first.
            num_nodes: number of destinations; read from the edges if left out.
            num_src_nodes: number of sources; ``num_nodes`` if left out.

        Returns:
            The table, and the permutation (E,) that brings per-edge values into its order:
            ``values[perm]``.

        Raises:
            ValueError: if ``edge_index`` is not (2, E), or a node is out of range.
        """
        if edge_index.dim() != 2 or edge_index.size(0) != 2:
            raise ValueError(f"edge_index must be (2, E); given {tuple(edge_index.shape)}")
        src, dst = edge_index[0].long(), edge_index[1].long()
        if num_nodes is None:
            num_nodes = int(edge_index.max()) + 1 if edge_index.numel() else 0
        num_src_nodes = num_nodes if num_src_nodes is None else num_src_nodes
        if edge_index.numel():
            for what, ids, limit in (
                ("source", src, num_src_nodes),
                ("destination", dst, num_nodes),
            ):
                if int(ids.min()) < 0 or int(ids.max()) >= limit:
                    raise ValueError(
                        f"edge_index has a {what} outside 0..{limit - 1}: "
                        f"{int(ids.min())}..{int(ids.max())}"
                    )
        perm = torch.argsort(dst, stable=True)
        degree = torch.bincount(dst, minlength=num_nodes)
        width = int(degree.max()) if degree.numel() else 0
        start = degree.cumsum(0) - degree
        slot = torch.arange(dst.numel(), device=dst.device) - start[dst[perm]]
        index = torch.full((num_nodes, width), -1, dtype=torch.int32, device=dst.device)
        index[dst[perm], slot] = src[perm].int()
        padded = bool((degree < width).any())
        return cls(index, num_src_nodes=num_src_nodes, padded=padded), perm

    @classmethod
    def block_diagonal(cls, tables: Sequence["NeighborTable"]) -> "NeighborTable":
        """Several graphs as one, nodes numbered graph after graph, as in a PyG ``Batch``.

        Per-edge values of the whole are those of the parts, concatenated.
        """
        if len(tables) == 1:
            return tables[0]
        width = max(table.k for table in tables)
        rows, start = [], 0
        for table in tables:
            shifted = torch.where(table.index >= 0, table.index + start, table.index)
            missing = shifted.new_full((table.num_nodes, width - table.k), -1)
            rows.append(torch.cat([shifted, missing], dim=1))
            start += table.num_src_nodes
        padded = any(table.padded or table.k < width for table in tables)
        first = tables[0]
        return cls(
            torch.cat(rows),
            num_src_nodes=start,
            padded=padded,
            metric=first.metric,
            method=first.method,
            _cache={"joined": True},  # made anew in each step: nothing costly is found for it
        )

    def _cached(self, name: str, build: Callable[[], Any]) -> Any:
        if name not in self._cache:
            self._cache[name] = build()
        return self._cache[name]

    def _slots(self) -> Tensor:
        return self._cached("slots", lambda: self.mask.flatten().nonzero().squeeze(-1))

    def _edge_index(self) -> Tensor:
        dst = torch.arange(self.num_nodes, device=self.device).unsqueeze(-1).expand_as(self.index)
        src = self.from_table(self.index).long()
        return torch.stack([src, self.from_table(dst)])

    def _rowptr(self) -> Tensor:
        if not self.padded:
            return torch.arange(self.num_nodes + 1, device=self.device) * self.k
        ends = self.mask.sum(-1).cumsum(0)
        return torch.cat([ends.new_zeros(1), ends])

    def _pairs(self) -> tuple[Tensor, Tensor]:
        src, dst = self.edge_index
        size = max(self.num_nodes, self.num_src_nodes)
        key = torch.minimum(src, dst) * size + torch.maximum(src, dst)
        key, number = key.unique(return_inverse=True)
        return torch.stack([key.div(size, rounding_mode="floor"), key.remainder(size)]), number

    def _reverse(self) -> tuple[Tensor, Tensor, Tensor]:
        known = self._cache.get("edge_index")  # of a large graph it would weigh most, if kept
        src, dst = self._edge_index() if known is None else known
        edge = torch.argsort(src, stable=True)
        ends = torch.bincount(src, minlength=self.num_src_nodes).cumsum(0)
        return torch.cat([ends.new_zeros(1), ends]), edge, dst[edge]


def validate_table(table: NeighborTable) -> NeighborTable:
    """Check the result of a kNN backend, and return it.

    No self-loop, no padding unless declared, no source out of range, no duplicate in a row.

    Args:
        table: the table to check.

    Raises:
        ValueError: naming the first row that breaks a rule.
    """
    index = table.index
    if not index.numel():
        return table
    rules = {"a source out of range": index >= table.num_src_nodes}
    rules["a padding mark or negative source"] = index < -1 if table.padded else index < 0
    if table.num_src_nodes == table.num_nodes:
        own = torch.arange(table.num_nodes, dtype=torch.int32, device=index.device)
        rules["itself as a neighbour"] = index == own.unsqueeze(-1)
    ordered = index.sort(dim=-1).values
    rules["a neighbour twice"] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    for rule, broken in rules.items():
        if bool(broken.any()):
            row = int(broken.any(dim=-1).nonzero()[0])
            raise ValueError(
                f"neighbour table from {table.method or 'an unnamed source'}: row {row} has {rule}"
            )
    return table
