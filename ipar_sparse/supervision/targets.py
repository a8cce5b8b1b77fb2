"""What a layout is supervised by: frozen targets built from true positions, training only.

Everything is built in the unit-RMS gauge (:func:`gauge_fix`). A target made of several graphs
(:func:`collate`) is block-diagonal, as a PyG ``Batch`` is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from ..geometry.gauge import gauge_fix
from ..graph import NeighborTable, knn
from ..ops import resolve_backend
from ..ops.segment import segment_softmax

__all__ = [
    "SlideTarget",
    "StressTarget",
    "WalkTarget",
    "build_stress_target",
    "build_target",
    "build_walk_target",
    "collate",
    "default_k",
    "default_steps",
    "gate_target",
    "gauge_fix",
    "target_graph",
]

MINISET_LIMIT = 384  # the largest miniset: up to here a target is the definition, edge for edge
EXACT_LIMIT = 4096  # beyond, all neighbours within 0.15 n are refused: O(n^2) pairs
PARTNERS = 32  # neighbours a node keeps of its 0.15 n nearest; with 213 as many as a miniset's
_SCALE_FACTOR = 8  # between the densities at which multiscale pairs are sampled
_SCALE_PARTNERS = 6
_RING = (20, 60)  # percentiles of all pairwise distances
_SMALLEST_SUBSET = 32
_SOFTENING = 0.25  # of the distance to the sixth neighbour
_ROWS = 1 << 16  # nodes whose neighbour coordinates are held at once


def default_k(num_nodes: int) -> int:
    """Neighbours of the target graph of a miniset: max(20, 0.15 n), at most n - 1."""
    return max(0, min(num_nodes - 1, max(20, 15 * num_nodes // 100)))


def default_steps(num_nodes: int) -> int:
    """Longest random walk that is compared: 3 up to 160 nodes, 4 up to 300, else 5."""
    return 3 if num_nodes <= 160 else 4 if num_nodes <= 300 else 5


@dataclass(frozen=True)
class _Tensors:
    """A record of tensors that moves between devices as one."""

    def to(self, device):
        """The same target on another device (itself where it is there already)."""
        moved = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, (Tensor, _Tensors)):
                moved[item.name] = value.to(device)
        moved = {k: v for k, v in moved.items() if v is not getattr(self, k)}
        if not moved:
            return self
        if hasattr(self, "_cache"):
            moved["_cache"] = {}
        return replace(self, **moved)


@dataclass(frozen=True)
class WalkTarget(_Tensors):
    r"""A random walk on a spatial graph whose edges and widths are frozen.

    .. math::
        W_{ij} = e^{-\|x_i - x_j\|^2 / (\sigma_i \sigma_j + 10^{-10})}, \quad
        T = D^{-1}\,\tfrac12 (W + W^\top)

    A pair that is a neighbour in one direction only carries half a weight. The pattern of T is
    symmetric; its 2P entries stand in CSR order (row by row, columns ascending).

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

        Worth it where one target is used many times, as in fitting one miniset.
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


@dataclass(frozen=True)
class StressTarget(_Tensors):
    """Unique undirected pairs and their true distances.

    Args:
        edge_index: pairs i < j (2, M), int64. Pairs at distance zero are left out: they have no
            logarithm.
        dist: distances in the unit-RMS gauge (M,).
        edge_batch: graph of each pair (M,), int64.
        num_graphs: number of graphs.
        softening: lengths (M,) below which a pair's distance stops mattering, None for none.
    """

    edge_index: Tensor
    dist: Tensor
    edge_batch: Tensor
    num_graphs: int = 1
    softening: Tensor | None = None


@dataclass(frozen=True)
class SlideTarget(_Tensors):
    """All that supervises one slide, one miniset or a batch of them.

    Args:
        pos: true positions (n, 2), unit-RMS gauge, float64.
        walk: the random walk.
        stress: the distances of E_geo.
        batch: graph of each node (n,), int64.
        ptr: first node of each graph, and the end (graphs + 1,), int64.
        sizes: number of nodes of each graph.
        multiscale: equally many pairs at every scale from the nearest neighbour upwards, for
            :func:`ipar_sparse.supervision.losses.log_stress_loss`; whole slides only, not part of E_geo.
    """

    pos: Tensor
    walk: WalkTarget
    stress: StressTarget
    batch: Tensor
    ptr: Tensor
    sizes: tuple[int, ...]
    multiscale: StressTarget | None = None

    @property
    def num_graphs(self) -> int:
        return len(self.sizes)


def build_walk_target(pos, k: int | None = None, steps: int | None = None) -> WalkTarget:
    """The random walk on all spatial neighbours (random-walk family of IPA-Lite).

    With the default k this is O(n^2) pairs; :func:`build_target` sketches it for large n.

    Args:
        pos: positions (n, 2), any units; brought into the unit-RMS gauge.
        k: neighbours a node, default max(20, 0.15 n); min(k, n - 1) are used.
        steps: longest walk, default 3, 4 or 5 by n.
    """
    pos = _reference(pos)
    return walk_from_neighbors(pos, _neighbors(pos, k), steps)


def walk_from_neighbors(
    pos: Tensor, index: np.ndarray, steps: int | None = None, sampled: bool = False
) -> WalkTarget:
    """The random walk on given directed neighbour lists.

    Args:
        pos: positions (n, 2) float64, already in the unit-RMS gauge.
        index: neighbours (n, k), no self and no duplicate in a row; the farthest sets sigma.
        steps: longest walk, default 3, 4 or 5 by n.
        sampled: whether the lists are a sample of the nodes within sigma.
    """
    n, k = len(pos), index.shape[1]
    xy = pos.numpy()
    sigma = np.full(n, 1e-8)
    if k:
        for start in range(0, n, _ROWS):
            rows = slice(start, start + _ROWS)
            span = xy[index[rows]] - xy[rows, None]
            sigma[rows] = np.sqrt(np.square(span).sum(-1).max(-1)).clip(1e-8)
    dst = np.repeat(np.arange(n, dtype=np.int64), k)
    src = index.reshape(-1).astype(np.int64)
    low, high, count = _unique_pairs(dst, src, n)
    num_pairs = len(low)
    row, col = np.concatenate([low, high]), np.concatenate([high, low])
    order = np.argsort(row * n + col)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(2 * num_pairs)
    rowptr = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(np.bincount(row, minlength=n), out=rowptr[1:])
    steps = default_steps(n) if steps is None else steps
    tensors = {
        "pair": np.stack([low, high]),
        "log_multiplicity": np.log(count / 2),
        "precision": 1 / (sigma[low] * sigma[high] + 1e-10),
        "row": row[order],
        "col": col[order],
        "rowptr": rowptr,
        "entry_pair": order % max(num_pairs, 1),
        "transposed": inverse[(order + num_pairs) % max(2 * num_pairs, 1)],
        "sigma": sigma,
        "row_steps": np.full(n, steps),
    }
    tensors = {name: torch.from_numpy(value) for name, value in tensors.items()}
    return WalkTarget(pos=pos, **tensors, steps=steps, sizes=(n,), sampled=sampled)


def build_stress_target(
    pos, seed: int = 0, *, k: int | None = None, ring: int = 10, landmarks: int | None = None
) -> StressTarget:
    """Multiscale distances: neighbours, ring partners, landmarks (stress family of IPA-Lite).

    All spatial neighbour pairs; for every node random partners between the 20th and 60th
    percentile of all pairwise distances; every node to its nearest farthest-point landmark.

    Args:
        pos: positions (n, 2), any units; brought into the unit-RMS gauge.
        seed: of the ring partners.
        k: neighbours a node, default max(20, 0.15 n).
        ring: ring partners a node.
        landmarks: number of landmarks, default max(8, n // 16).

    Raises:
        ValueError: on positions that are not a finite (n, 2) matrix, or more than 4096 of them.
    """
    pos = _reference(pos)
    _refuse_large(len(pos))
    return _family_pairs(pos, _neighbors(pos, k), seed, ring=ring, landmarks=landmarks)


def build_target(
    pos,
    *,
    seed: int = 0,
    mode: str = "auto",
    partners: int = PARTNERS,
    multiscale: bool | None = None,
) -> SlideTarget:
    """All targets of one miniset or one whole slide.

    ``"exact"`` keeps every neighbour within 0.15 n: the definition, O(n^2) pairs. ``"sketch"``
    keeps the same reach with O(n) pairs: each node gets the nearest of a random subset of the
    slide, so many that they are a random sample of its 0.15 n nearest. Its ring partners and
    landmarks are as many a node as those of a miniset of 384, so that E_geo means the same at
    every n. ``"auto"`` is exact up to 384 nodes.

    Args:
        pos: positions (n, 2), any units, finite.
        seed: of every random choice.
        mode: ``"auto"``, ``"exact"`` or ``"sketch"``.
        partners: neighbours a node in a sketch.
        multiscale: whether to add multiscale pairs; with a sketch if left out.

    Raises:
        ValueError: on positions that are not a finite (n, 2) matrix, an unknown mode, or an exact
            target of more than 4096 nodes.
    """
    pos = _reference(pos)
    n = len(pos)
    sketch = _is_sketch(n, mode)
    neighbors = _sketch_neighbors(pos, partners, seed) if sketch else _neighbors(pos)
    sampled = neighbors.shape[1] < default_k(n)
    multiscale = sketch if multiscale is None else multiscale
    return SlideTarget(
        pos=pos,
        walk=walk_from_neighbors(pos, neighbors, sampled=sampled),
        stress=_family_pairs(pos, neighbors, seed, sampled=sampled),
        batch=torch.zeros(n, dtype=torch.int64),
        ptr=torch.tensor([0, n]),
        sizes=(n,),
        multiscale=_balanced_pairs(pos, seed) if multiscale else None,
    )


def target_graph(
    pos, *, seed: int = 0, mode: str = "auto", partners: int = PARTNERS
) -> NeighborTable:
    """The neighbour lists a target of the same arguments is built on, as a graph to attend on."""
    pos = _reference(pos)
    sketch = _is_sketch(len(pos), mode)
    neighbors = _sketch_neighbors(pos, partners, seed) if sketch else _neighbors(pos)
    method = "sketch" if sketch else "kdtree"
    return NeighborTable(torch.from_numpy(neighbors).int(), metric="euclidean", method=method)


def collate(targets: Sequence[SlideTarget]) -> SlideTarget:
    """Targets of several graphs as one block-diagonal target.

    Nodes are numbered graph after graph, as in a PyG ``Batch`` of the same graphs.
    """
    if not targets:
        raise ValueError("collate needs at least one target")
    if len(targets) == 1:
        return targets[0]
    sizes = tuple(n for target in targets for n in target.sizes)
    graph = _offsets(target.num_graphs for target in targets)
    node = _offsets(len(target.pos) for target in targets)
    ends = [target.ptr[1:] + s for target, s in zip(targets, node, strict=True)]
    extras = [target.multiscale for target in targets]
    return SlideTarget(
        pos=torch.cat([target.pos for target in targets]),
        walk=collate_walks([target.walk for target in targets]),
        stress=_collate_stress([target.stress for target in targets], node),
        batch=torch.cat([target.batch + s for target, s in zip(targets, graph, strict=True)]),
        ptr=torch.cat([targets[0].ptr[:1], *ends]),
        sizes=sizes,
        multiscale=None if any(m is None for m in extras) else _collate_stress(extras, node),
    )


def gate_target(graph: NeighborTable, walk: WalkTarget, step: int = 1) -> Tensor:
    """What the gate should give to each candidate edge: the reference walk, renormalised.

    Where the walk's neighbours are a sample, the weight of a candidate is that of the whole
    neighbourhood within sigma, which a sample would mostly miss.

    Args:
        graph: candidates of the same n nodes.
        walk: the reference walk.
        step: power of the walk; beyond 1 a sparse product of entries is formed.

    Returns:
        Probabilities (E,) in the graph's edge order; rows without overlap are all zero.
    """
    if graph.num_nodes != walk.num_nodes:
        raise ValueError(
            f"candidates of {graph.num_nodes} nodes do not match a walk on {walk.num_nodes}"
        )
    src, dst = graph.edge_index
    if step == 1 and walk.sampled:
        weight = _full_weight(walk, src, dst)
    else:
        weight = _entry_weight(walk, src, dst, step)
    total = weight.new_zeros(graph.num_nodes).index_add_(0, dst, weight)
    return weight / torch.where(total > 0, total, torch.ones_like(total))[dst]


def _reference(pos) -> Tensor:
    pos = torch.as_tensor(pos).detach().to("cpu", torch.float64)
    if pos.dim() != 2 or pos.size(1) != 2 or not len(pos):
        raise ValueError(f"positions must be (n, 2) with n >= 1; given {tuple(pos.shape)}")
    if not bool(torch.isfinite(pos).all()):
        row = int((~torch.isfinite(pos)).any(-1).nonzero()[0])
        raise ValueError(f"positions must be finite; node {row} has NaN or infinity")
    return gauge_fix(pos)


def _neighbors(pos: Tensor, k: int | None = None) -> np.ndarray:
    k = default_k(len(pos)) if k is None else min(k, len(pos) - 1)
    if k < 1:
        return np.empty((len(pos), 0), dtype=np.int64)
    return knn(pos, k, backend="kdtree").index.numpy()


def _is_sketch(n: int, mode: str) -> bool:
    if mode not in ("auto", "exact", "sketch"):
        raise ValueError(f"unknown mode {mode!r}; choose 'auto', 'exact' or 'sketch'")
    if mode == "exact":
        _refuse_large(n)
    return mode == "sketch" or (mode == "auto" and n > MINISET_LIMIT)


def _refuse_large(n: int) -> None:
    if n > EXACT_LIMIT:
        raise ValueError(
            f"an exact target of {n} nodes needs O(n^2) pairs; use build_target(mode='sketch') "
            f"beyond {EXACT_LIMIT}"
        )


def _sketch_neighbors(pos: Tensor, partners: int, seed: int) -> np.ndarray:
    """A random sample, one list a node, of its 0.15 n nearest; all of them where n is small."""
    n = len(pos)
    groups = 15 * n // (100 * max(partners, 1)) if default_k(n) > 20 else 1
    groups = max(1, groups)
    rng = np.random.default_rng([seed, 1])
    return _subset_neighbors(pos.numpy(), default_k(n) // groups, groups, rng)


def _subset_neighbors(xy: np.ndarray, k: int, groups: int, rng) -> np.ndarray:
    """For each node its k nearest in one of ``groups`` random parts of the slide, (n, k).

    The k nearest of a random n / groups nodes are a random k of the k * groups nearest.
    """
    if groups == 1:
        return _neighbors(torch.from_numpy(xy), k)
    n = len(xy)
    index = np.empty((n, k), dtype=np.int64)
    members = np.array_split(rng.permutation(n), groups)
    askers = np.array_split(rng.permutation(n), groups)
    for member, asker in zip(members, askers, strict=True):
        found = member[cKDTree(xy[member]).query(xy[asker], k + 1)[1]]
        own = found == asker[:, None]
        own[:, -1] |= ~own.any(-1)
        index[asker] = found[~own].reshape(len(asker), k)
    return index


def _balanced_pairs(pos: Tensor, seed: int) -> StressTarget:
    """As many pairs a node at every scale; softened, as near-duplicates would rule a logarithm."""
    n = len(pos)
    k = min(_SCALE_PARTNERS, n - 1)
    rng = np.random.default_rng([seed, 2])
    lists, groups = [], 1
    while groups == 1 or n // groups >= _SMALLEST_SUBSET:
        lists.append(_subset_neighbors(pos.numpy(), k, groups, rng))
        groups *= _SCALE_FACTOR
    stress = _stress_from_pairs(pos, np.concatenate([_directed(index) for index in lists], axis=1))
    if not k:
        return stress
    nearest = torch.from_numpy(lists[0])
    reach = (pos[nearest] - pos.unsqueeze(1)).square().sum(-1).amax(-1).sqrt()
    first, second = stress.edge_index
    return replace(stress, softening=_SOFTENING * (reach[first] * reach[second]).sqrt())


def _directed(index: np.ndarray) -> np.ndarray:
    n, k = index.shape
    return np.stack([index.reshape(-1).astype(np.int64), np.repeat(np.arange(n), k)])


def _family_pairs(
    pos: Tensor,
    neighbors: np.ndarray,
    seed: int,
    *,
    sampled: bool = False,
    ring: int = 10,
    landmarks: int | None = None,
) -> StressTarget:
    xy = pos.numpy()
    if landmarks is None:
        landmarks = max(8, (MINISET_LIMIT if sampled else len(pos)) // 16)
    partners = _sampled_ring_pairs if sampled else _ring_pairs
    pairs = [_directed(neighbors), partners(xy, ring, seed), _landmark_pairs(xy, landmarks)]
    return _stress_from_pairs(pos, np.concatenate(pairs, axis=1))


def _ring_pairs(xy: np.ndarray, partners: int, seed: int) -> np.ndarray:
    n = len(xy)
    if n < 3:
        return np.empty((2, 0), dtype=np.int64)
    rng = np.random.default_rng(seed)
    condensed = pdist(xy)
    low, high = np.percentile(condensed, _RING)
    distance = squareform(condensed)
    inside = (distance >= low) & (distance <= high)
    np.fill_diagonal(inside, False)
    order = np.where(inside, rng.random((n, n)), 2.0)
    take = min(partners, n - 1)
    chosen = np.argpartition(order, take - 1, axis=1)[:, :take]
    src, dst = chosen.reshape(-1), np.repeat(np.arange(n), take)
    keep = inside[dst, src]
    return np.stack([src[keep], dst[keep]])


def _sampled_ring_pairs(xy: np.ndarray, partners: int, seed: int) -> np.ndarray:
    """Ring partners by rejection: the first so many of random draws that lie in the ring."""
    n = len(xy)
    rng = np.random.default_rng([seed, 3])
    first, second = rng.integers(0, n, (2, 200_000))
    sample = np.sqrt(np.square(xy[first] - xy[second]).sum(-1))[first != second]
    low, high = np.percentile(sample, _RING)
    pairs = []
    for start in range(0, n, _ROWS):
        dst = np.arange(start, min(n, start + _ROWS))
        src = rng.integers(0, n, (len(dst), 6 * partners))
        distance = np.sqrt(np.square(xy[src] - xy[dst, None]).sum(-1))
        inside = (distance >= low) & (distance <= high)
        row, slot = np.nonzero(inside & (inside.cumsum(1) <= partners))
        pairs.append(np.stack([src[row, slot], dst[row]]))
    return np.concatenate(pairs, axis=1)


def _landmark_pairs(xy: np.ndarray, count: int) -> np.ndarray:
    """Every node with its nearest landmark; the first is the node farthest from the centre."""
    n = len(xy)
    nearest = np.zeros(n, dtype=np.int64)
    best = np.full(n, np.inf)
    landmark = int(np.square(xy).sum(-1).argmax())
    for _ in range(min(count, n)):
        square = np.square(xy - xy[landmark]).sum(-1)
        nearest = np.where(square < best, landmark, nearest)
        best = np.minimum(best, square)
        landmark = int(best.argmax())
    node = np.arange(n)
    keep = nearest != node
    return np.stack([nearest[keep], node[keep]])


def _unique_pairs(first: np.ndarray, second: np.ndarray, n: int):
    """Undirected pairs low < high, each once in ascending order, and how often each occurred."""
    key = np.minimum(first, second) * n + np.maximum(first, second)
    key.sort()
    start = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])[: len(key)])
    low, high = np.divmod(key[start], max(n, 1))
    return low, high, np.diff(start, append=len(key))


def _stress_from_pairs(pos: Tensor, pairs: np.ndarray) -> StressTarget:
    n = len(pos)
    low, high, _ = _unique_pairs(*pairs, n)
    xy = pos.numpy()
    dist = np.sqrt(np.square(xy[low] - xy[high]).sum(-1))
    keep = dist > 1e-8
    edge_index = torch.from_numpy(np.stack([low[keep], high[keep]]))
    edge_batch = torch.zeros(edge_index.size(1), dtype=torch.int64)
    return StressTarget(edge_index, torch.from_numpy(dist[keep]), edge_batch)


def collate_walks(walks: Sequence[WalkTarget]) -> WalkTarget:
    node = _offsets(walk.num_nodes for walk in walks)
    pair = _offsets(walk.pair.size(1) for walk in walks)
    entry = _offsets(walk.row.numel() for walk in walks)
    shift = {"pair": node, "row": node, "col": node, "entry_pair": pair, "transposed": entry}
    merged = {
        name: torch.cat([getattr(w, name) + s for w, s in zip(walks, offset, strict=True)], dim=-1)
        for name, offset in shift.items()
    }
    for name in ("pos", "log_multiplicity", "precision", "sigma", "row_steps"):
        merged[name] = torch.cat([getattr(walk, name) for walk in walks])
    ends = [walk.rowptr[1:] + s for walk, s in zip(walks, entry, strict=True)]
    return WalkTarget(
        **merged,
        rowptr=torch.cat([walks[0].rowptr[:1], *ends]),
        steps=max(walk.steps for walk in walks),
        sizes=tuple(n for walk in walks for n in walk.sizes),
        sampled=any(walk.sampled for walk in walks),
    )


def _collate_stress(stresses: Sequence[StressTarget], node: list[int]) -> StressTarget:
    graph = _offsets(stress.num_graphs for stress in stresses)
    soft = [stress.softening for stress in stresses]
    return StressTarget(
        edge_index=torch.cat([s.edge_index + o for s, o in zip(stresses, node, strict=True)], -1),
        dist=torch.cat([s.dist for s in stresses]),
        edge_batch=torch.cat([s.edge_batch + o for s, o in zip(stresses, graph, strict=True)]),
        num_graphs=sum(s.num_graphs for s in stresses),
        softening=None if any(x is None for x in soft) else torch.cat(soft),
    )


def _offsets(sizes) -> list[int]:
    return [0, *np.cumsum(list(sizes)).tolist()][:-1]


def _full_weight(walk: WalkTarget, src: Tensor, dst: Tensor) -> Tensor:
    square = (walk.pos[src] - walk.pos[dst]).square().sum(-1)
    multiplicity = (square <= walk.sigma[dst].square()).double()
    multiplicity += (square <= walk.sigma[src].square()).double()
    kernel = (-square / (walk.sigma[src] * walk.sigma[dst] + 1e-10)).exp()
    return 0.5 * multiplicity * kernel


def _entry_weight(walk: WalkTarget, src: Tensor, dst: Tensor, step: int) -> Tensor:
    from scipy.sparse import csr_array

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
