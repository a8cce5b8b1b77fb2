"""Pairs of nodes and their true distances: the stress family of IPA-Lite, and multiscale pairs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from .neighbors import directed_pairs, sampled_neighbors, unique_pairs
from .record import TensorRecord, offsets

MINISET_LIMIT = 384  # nodes of the largest miniset; a target is exact up to here
_RING = (20, 60)  # percentiles of all pairwise distances
_PARTNERS = 10  # in the ring, of a node
_SCALE_FACTOR = 8  # between the densities at which multiscale pairs are sampled
_SCALE_PARTNERS = 6
_SMALLEST_SUBSET = 32
_SOFTENING = 0.25  # of the distance to the sixth neighbour
_PAIRS = 1 << 24  # whose distances are computed at once
_ROWS = 1 << 16  # nodes whose candidate partners are held at once


@dataclass(frozen=True)
class StressTarget(TensorRecord):
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

    def drawn(self, numbers: Tensor) -> "StressTarget":
        """Some of the pairs, by their numbers (c,)."""
        return StressTarget(
            edge_index=self.edge_index[:, numbers],
            dist=self.dist[numbers],
            edge_batch=self.edge_batch[numbers],
            num_graphs=self.num_graphs,
            softening=None if self.softening is None else self.softening[numbers],
        )


def stress_from_neighbors(
    pos: Tensor,
    neighbors: Tensor,
    seed: int,
    *,
    sampled: bool = False,
) -> StressTarget:
    """Distances to neighbours, ring partners and landmarks (stress family of IPA-Lite).

    All given pairs; for every node ten random partners between the 20th and 60th percentile of all
    pairwise distances; every node to its nearest of max(8, n // 16) farthest-point landmarks.

    Args:
        pos: positions (n, 2) float64, already in the unit-RMS gauge.
        neighbors: neighbours (n, k).
        seed: of the ring partners.
        sampled: whether ring partners are drawn by rejection, without an n x n matrix, and
            landmarks are as many as on a miniset of 384.
    """
    landmarks = max(8, (MINISET_LIMIT if sampled else len(pos)) // 16)
    partners = _sampled_ring_pairs if sampled else _ring_pairs
    kinds = (
        lambda: directed_pairs(neighbors),
        lambda: partners(pos, _PARTNERS, seed),
        lambda: _landmark_pairs(pos, landmarks),
    )
    return _stress_of_pairs(pos, (pairs() for pairs in kinds))


def multiscale_pairs(pos: Tensor, seed: int) -> StressTarget:
    """Equally many pairs a node at every scale, from the nearest neighbour to the whole slide.

    Softened, since near-duplicates would dominate a mean of squared log-ratios.
    """
    n = len(pos)
    k = min(_SCALE_PARTNERS, n - 1)
    rng = np.random.default_rng([seed, 2])
    lists, groups = [], 1
    while groups == 1 or n // groups >= _SMALLEST_SUBSET:
        lists.append(sampled_neighbors(pos, k, groups, rng))
        groups *= _SCALE_FACTOR
    stress = _stress_of_pairs(pos, map(directed_pairs, lists))
    if not k:
        return stress
    reach = (pos[lists[0]] - pos.unsqueeze(1)).square().sum(-1).amax(-1).sqrt()
    first, second = stress.edge_index
    return replace(stress, softening=_SOFTENING * (reach[first] * reach[second]).sqrt())


def collate_stress(stresses: Sequence[StressTarget], node: Sequence[int]) -> StressTarget:
    """Targets of several graphs as one, the nodes of each numbered from ``node`` on."""
    graph = offsets(stress.num_graphs for stress in stresses)
    soft = [stress.softening for stress in stresses if stress.softening is not None]
    return StressTarget(
        edge_index=torch.cat([s.edge_index + o for s, o in zip(stresses, node, strict=True)], -1),
        dist=torch.cat([s.dist for s in stresses]),
        edge_batch=torch.cat([s.edge_batch + o for s, o in zip(stresses, graph, strict=True)]),
        num_graphs=sum(s.num_graphs for s in stresses),
        softening=torch.cat(soft) if len(soft) == len(stresses) else None,
    )


def _stress_of_pairs(pos: Tensor, pairs: Iterable[Tensor]) -> StressTarget:
    low, high, _ = unique_pairs(pairs, len(pos))
    dist = torch.empty_like(low, dtype=pos.dtype)
    for own, other, part in zip(
        low.split(_PAIRS), high.split(_PAIRS), dist.split(_PAIRS), strict=True
    ):
        part.copy_((pos[own] - pos[other]).square().sum(-1).sqrt())
    keep = dist > 1e-8
    if not bool(keep.all()):
        low, high, dist = low[keep], high[keep], dist[keep]
    return StressTarget(torch.stack([low, high]), dist, torch.zeros_like(low))


def _ring_pairs(pos: Tensor, partners: int, seed: int) -> Tensor:
    """Ring partners from all distances, of a miniset; computed on the host."""
    n, xy = len(pos), pos.cpu().numpy()
    if n < 3:
        return torch.empty(2, 0, dtype=torch.int64, device=pos.device)
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
    return torch.from_numpy(np.stack([src[keep], dst[keep]])).to(pos.device)


def _sampled_ring_pairs(pos: Tensor, partners: int, seed: int) -> Tensor:
    """Ring partners by rejection: the first so many of random draws that lie in the ring."""
    n, device = len(pos), pos.device
    rng = np.random.default_rng([seed, 3])
    first, second = torch.from_numpy(rng.integers(0, n, (2, 200_000))).to(device)
    sample = (pos[first] - pos[second]).square().sum(-1).sqrt()[first != second]
    low, high = np.percentile(sample.cpu().numpy(), _RING)
    pairs = []
    for start in range(0, n, _ROWS):
        dst = torch.arange(start, min(n, start + _ROWS), device=device)
        src = torch.from_numpy(rng.integers(0, n, (len(dst), 6 * partners))).to(device)
        distance = (pos[src] - pos[dst].unsqueeze(1)).square().sum(-1).sqrt()
        inside = (distance >= low) & (distance <= high)
        row, slot = (inside & (inside.cumsum(1) <= partners)).nonzero().T
        pairs.append(torch.stack([src[row, slot], dst[row]]))
    return torch.cat(pairs, dim=1)


def _landmark_pairs(pos: Tensor, count: int) -> Tensor:
    """Every node with its nearest landmark; the first is the node farthest from the centre."""
    n = len(pos)
    nearest = torch.zeros(n, dtype=torch.int64, device=pos.device)
    best = torch.full_like(pos[:, 0], torch.inf)
    landmark = pos.square().sum(-1).argmax()
    for _ in range(min(count, n)):
        square = (pos - pos[landmark]).square().sum(-1)
        nearest = torch.where(square < best, landmark, nearest)
        best = torch.minimum(best, square)
        landmark = best.argmax()
    node = torch.arange(n, device=pos.device)
    keep = nearest != node
    return torch.stack([nearest[keep], node[keep]])
