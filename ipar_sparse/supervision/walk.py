"""Random walks on spatial neighbour graphs: the random-walk family of IPA-Lite."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from ..graph import NeighborTable
from ..ops import resolve_backend, segment_softmax
from .neighbors import directed_pairs, reference_positions, spatial_neighbors, unique_pairs
from .record import TensorRecord, offsets

LOG_FLOOR = 1e-8  # probabilities are not told apart below
_ROWS = 1 << 16  # nodes whose neighbour coordinates are held at once


def default_steps(num_nodes: int) -> int:
    """Longest random walk that is compared: 3 up to 160 nodes, 4 up to 300, else 5."""
    return 3 if num_nodes <= 160 else 4 if num_nodes <= 300 else 5


@dataclass(frozen=True)
class WalkTarget(TensorRecord):
    r"""A random walk on a spatial graph whose edges and widths are frozen.

    .. math::
        W_{ij} = e^{-\|x_i - x_j\|^2 / (\sigma_i \sigma_j + 10^{-10})}, \quad
        T = D^{-1}\,\tfrac12 (W + W^\top)

    A pair of which only one node is a neighbour of the other carries half a weight. The pattern
    of T is symmetric; its 2P entries stand in CSR order (row by row, columns ascending).

    Args:
        pos: reference positions (n, 2), unit-RMS gauge.
        pair: unique undirected pairs i < j (2, P), int64.
        log_multiplicity: log of 1 (neighbours in both directions) or 1/2 (in one), (P,).
        precision: :math:`1 / (\sigma_i \sigma_j + 10^{-10})` of each pair (P,).
        row, col: rows and columns of the entries of T (2P,), int64.
        rowptr: CSR row pointer (n + 1,), int64.
        entry_pair: the pair each entry belongs to (2P,), int64.
        transposed: the entry (j, i) of each entry (i, j), (2P,), int64.
        sigma: distance of each node to its last neighbour (n,), clamped at 1e-8.
        row_steps: longest walk compared for each row (n,), int64.
        steps: the largest of ``row_steps``.
        sizes: number of nodes of each graph in the batch.
        sampled: whether the neighbours are a sample of those within ``sigma``.
    """

    pos: Tensor
    pair: Tensor
    log_multiplicity: Tensor
    precision: Tensor
    row: Tensor
    col: Tensor
    rowptr: Tensor
    entry_pair: Tensor
    transposed: Tensor
    sigma: Tensor
    row_steps: Tensor
    steps: int
    sizes: tuple[int, ...]
    sampled: bool = False
    _cache: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_nodes(self) -> int:
        """Number of nodes n."""
        return self.pos.size(0)

    @property
    def edge_index(self) -> Tensor:
        """Entries of T as a PyG edge list (2, 2P): entry (i, j) is the edge j -> i."""
        return torch.stack([self.col, self.row])

    def transition(self, pos: Tensor) -> Tensor:
        """One step of the walk between other positions, on the same edges and widths.

        The row-wise softmax of log-weights, which is :math:`D^{-1} W` without its underflow.

        Args:
            pos: positions (n, 2) in the unit-RMS gauge.

        Returns:
            Entries of T (2P,), differentiable in ``pos``; rows without an edge have none.
        """
        if pos.shape != self.pos.shape:
            raise ValueError(
                f"positions {tuple(pos.shape)} do not match the target's {tuple(self.pos.shape)}"
            )
        if pos.dtype == torch.float32 and resolve_backend("auto", pos) == "triton":
            from ..ops import triton_walk

            return triton_walk.transition(pos, self)
        difference = pos.index_select(0, self.pair[0]) - pos.index_select(0, self.pair[1])
        square = difference.square().sum(-1)
        logit = self.log_multiplicity.to(pos.dtype) - square * self.precision.to(pos.dtype)
        logit = logit.index_select(0, self.entry_pair)
        return segment_softmax(logit, self.row, self.num_nodes)[0]

    def reference(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Entries of the reference walk (2P,): :meth:`transition` at the true positions."""
        if ("reference", dtype) not in self._cache:
            self._cache["reference", dtype] = self.transition(self.pos.to(dtype)).detach()
        return self._cache["reference", dtype]

    def dense(self, values: Tensor) -> Tensor:
        """Entries of T as dense blocks (graphs, n_max, n_max), zero-padded."""
        if "dense_index" not in self._cache:
            sizes = torch.tensor(self.sizes)
            graph = torch.arange(len(self.sizes)).repeat_interleave(sizes)
            local = torch.arange(self.num_nodes) - (sizes.cumsum(0) - sizes)[graph]
            graph, local = graph.to(self.row.device), local.to(self.row.device)
            n = max(self.sizes)
            index = (graph[self.row] * n + local[self.row]) * n + local[self.col]
            self._cache["dense_index"] = index
            self._cache["dense_row"] = graph * n + local
        n = max(self.sizes)
        flat = values.new_zeros(len(self.sizes) * n * n)
        return flat.scatter(0, self._cache["dense_index"], values).view(-1, n, n)

    def dense_row_weight(self, weight: Tensor) -> Tensor:
        """Per-row values (n,) in the row layout of :meth:`dense`, (graphs, n_max)."""
        n = max(self.sizes)
        flat = weight.new_zeros(len(self.sizes) * n)
        return flat.scatter(0, self._cache["dense_row"], weight).view(-1, n)

    def cache_reference(self, dtype: torch.dtype = torch.float32) -> "WalkTarget":
        """Keep the dense powers of the reference walk: steps x graphs x n_max^2 numbers.

        Useful where one target is used many times, as in fitting one miniset.
        """
        self._cache["powers", dtype] = self._powers(dtype)
        return self

    def reference_powers(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Dense T, T^2, ... at the true positions, each (graphs, n_max, n_max)."""
        return self._cache.get(("powers", dtype)) or self._powers(dtype)

    def _powers(self, dtype: torch.dtype) -> list[Tensor]:
        powers = [self.dense(self.reference(dtype))]
        while len(powers) < self.steps:
            powers.append(powers[-1] @ powers[0])
        return powers


def build_walk_target(
    pos: Tensor | np.ndarray, k: int | None = None, steps: int | None = None
) -> WalkTarget:
    """The random walk on all spatial neighbours (random-walk family of IPA-Lite).

    With the default k this is O(n^2) pairs; :func:`~ipar_sparse.supervision.build_target` samples
    them for large n.

    Args:
        pos: positions (n, 2), any units; brought into the unit-RMS gauge.
        k: neighbours a node, default max(20, 0.15 n); min(k, n - 1) are used.
        steps: longest walk, default 3, 4 or 5 by n.

    Raises:
        ValueError: on positions that are not a finite (n, 2) matrix.
    """
    pos = reference_positions(pos)
    return walk_from_neighbors(pos, spatial_neighbors(pos, k), steps)


def walk_from_neighbors(
    pos: Tensor, index: Tensor, steps: int | None = None, sampled: bool = False
) -> WalkTarget:
    """The random walk on given directed neighbour lists.

    Args:
        pos: positions (n, 2) float64, already in the unit-RMS gauge.
        index: neighbours (n, k), no self and no duplicate in a row; the farthest sets sigma.
        steps: longest walk, default 3, 4 or 5 by n.
        sampled: whether the lists are a sample of the nodes within sigma.
    """
    n = len(pos)
    sigma = sigma_of(pos, index)
    low, high, count = unique_pairs([directed_pairs(index)], n)
    num_pairs = len(low)
    row, col = torch.cat([low, high]), torch.cat([high, low])
    key = row * n + col
    order = order_of(key)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(2 * num_pairs, device=pos.device)
    rowptr = torch.zeros(n + 1, dtype=torch.int64, device=pos.device)
    torch.cumsum(torch.bincount(row, minlength=n), 0, out=rowptr[1:])
    steps = default_steps(n) if steps is None else steps
    return WalkTarget(
        pos=pos,
        pair=torch.stack([low, high]),
        log_multiplicity=(count.double() / 2).log(),
        precision=1 / (sigma[low] * sigma[high] + 1e-10),
        row=row[order],
        col=col[order],
        rowptr=rowptr,
        entry_pair=order % max(num_pairs, 1),
        transposed=inverse[(order + num_pairs) % max(2 * num_pairs, 1)],
        sigma=sigma,
        row_steps=torch.full((n,), steps, device=pos.device),
        steps=steps,
        sizes=(n,),
        sampled=sampled,
    )


def collate_walks(walks: Sequence[WalkTarget]) -> WalkTarget:
    """Walks on several graphs as one block-diagonal walk."""
    node = offsets(walk.num_nodes for walk in walks)
    pair = offsets(walk.pair.size(1) for walk in walks)
    entry = offsets(walk.row.numel() for walk in walks)

    def joined(name: str, shift: Sequence[int] | None = None) -> Tensor:
        parts = [getattr(walk, name) for walk in walks]
        if shift is not None:
            parts = [part + s for part, s in zip(parts, shift, strict=True)]
        return torch.cat(parts, dim=-1 if name == "pair" else 0)

    ends = [walk.rowptr[1:] + s for walk, s in zip(walks, entry, strict=True)]
    return WalkTarget(
        pos=joined("pos"),
        pair=joined("pair", node),
        log_multiplicity=joined("log_multiplicity"),
        precision=joined("precision"),
        row=joined("row", node),
        col=joined("col", node),
        rowptr=torch.cat([walks[0].rowptr[:1], *ends]),
        entry_pair=joined("entry_pair", pair),
        transposed=joined("transposed", entry),
        sigma=joined("sigma"),
        row_steps=joined("row_steps"),
        steps=max(walk.steps for walk in walks),
        sizes=tuple(n for walk in walks for n in walk.sizes),
        sampled=any(walk.sampled for walk in walks),
    )


def gate_target(
    graph: NeighborTable, walk: Any, step: int = 1, rows: Tensor | None = None
) -> Tensor:
    """The reference walk restricted to the candidate edges and renormalised in each row.

    Where the walk's neighbours are a sample, most candidates are not among them. The weight of a
    candidate is then that of a walk on all neighbours within sigma.

    Args:
        graph: candidates of the same n nodes.
        walk: the reference walk; one whose rows are held gives the weights of a sample alone.
        step: power of the walk; beyond 1 a sparse product of entries is formed.
        rows: of the graph that are wanted (m,); all of them if left out.

    Returns:
        Probabilities (E,) in the edge order of these rows; rows without overlap are all zero.

    Raises:
        ValueError: if graph and walk have different numbers of nodes.
    """
    if graph.num_nodes != walk.num_nodes:
        raise ValueError(
            f"candidates of {graph.num_nodes} nodes do not match a walk on {walk.num_nodes}"
        )
    rows = torch.arange(graph.num_nodes, device=graph.device) if rows is None else rows
    full = step == 1 and walk.sampled
    found = [walk.pos.new_zeros(0)]
    for part in rows.split(_ROWS) if full else [rows]:
        index = graph.index[part]
        row, slot = (index >= 0).nonzero().T
        src, dst = index[row, slot].long(), part[row]
        weight = _full_weight(walk, src, dst) if full else _entry_weight(walk, src, dst, step)
        total = weight.new_zeros(len(part)).index_add_(0, row, weight)
        found.append(weight / torch.where(total > 0, total, torch.ones_like(total))[row])
    return torch.cat(found)


def order_of(key: Tensor) -> Tensor:
    """The order in which keys (E,) ascend."""
    return key.argsort() if key.is_cuda else torch.from_numpy(np.argsort(key.numpy()))


def csr(rowptr: Tensor, col: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """A sparse matrix from the parts of its rows, which are not checked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR layout a beta, once a process
        return torch.sparse_csr_tensor(rowptr, col, values, size, check_invariants=False)


def sigma_of(pos: Tensor, index: Tensor) -> Tensor:
    """Distance of each node to the farthest of its neighbours (n,), clamped at 1e-8."""
    sigma = torch.full_like(pos[:, 0], 1e-8)
    if index.size(1):
        for start in range(0, len(pos), _ROWS):
            rows = slice(start, start + _ROWS)
            span = pos[index[rows]] - pos[rows].unsqueeze(1)
            sigma[rows] = span.square().sum(-1).amax(-1).sqrt().clamp(min=1e-8)
    return sigma


def _full_weight(walk: Any, src: Tensor, dst: Tensor) -> Tensor:
    """Weights (E,) of a walk on all neighbours within sigma."""
    square = (walk.pos[src] - walk.pos[dst]).square().sum(-1)
    multiplicity = (square <= walk.sigma[dst].square()).double()
    multiplicity += (square <= walk.sigma[src].square()).double()
    kernel = (-square / (walk.sigma[src] * walk.sigma[dst] + 1e-10)).exp()
    return 0.5 * multiplicity * kernel


def _entry_weight(walk: WalkTarget, src: Tensor, dst: Tensor, step: int) -> Tensor:
    """Entries (dst, src) of a power of the reference walk (E,)."""
    n = walk.num_nodes
    matrix = csr_array(
        (walk.reference().cpu().numpy(), walk.col.cpu().numpy(), walk.rowptr.cpu().numpy()), (n, n)
    )
    power = matrix
    for _ in range(step - 1):
        power = power @ matrix
    power.sort_indices()
    row = np.repeat(np.arange(n, dtype=np.int64), np.diff(power.indptr))
    key = row * n + power.indices
    wanted = (dst * n + src).cpu().numpy()
    at = np.searchsorted(key, wanted).clip(max=max(len(key) - 1, 0))
    found = key[at] == wanted if len(key) else np.zeros(len(wanted), dtype=bool)
    value = np.where(found, power.data[at], 0.0) if len(key) else np.zeros(len(wanted))
    return torch.from_numpy(value).to(src.device)
