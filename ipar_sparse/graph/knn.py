"""k nearest neighbours: several backends whose results meet the same checks."""

import logging
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..distributed import BLOCK_ROWS, added_rows, all_rows, rank, rows_of, shares_rows, size
from ..ticks import counted
from .table import NeighborTable, validate_table

logger = logging.getLogger(__name__)

BLOCK_ELEMENTS = 1 << 24  # distances held at once by the exact search: 64 MiB in float32
FAISS_FLAT_LIMIT = 200_000  # points; below, flat search on CPU beats approximate indices
_POOL_ROWS = 256  # cells that share a sample
_RECALL_ROWS = 1000  # of an approximate search, which are sought exactly
_FAISS_PROBES = 32  # lists searched: recall@100 0.9993 at 300,000 cells, 0.986 with half as many
_FAISS_ROUNDS = 10  # of k-means, whose cost grows as n^1.5: recall@100 0.998 at 10^6 points
_FAISS_SAMPLE = 40  # points a list on which k-means is trained; faiss warns below 39
_TRITON_FROM = 20_000  # points; below, the search in torch takes less than loading the kernels
_PARTITIONED_FROM = 2_000_000  # points; below, exact search takes less than 5 s on a GPU
LEAST_RECALL = 0.99
"""Share of true neighbours that approximate search must find, where it was not asked for."""
_BOXES_FROM = 2_000  # points in the plane; below, exact search on a GPU takes fewer launches
_CUDA_CLUSTER_LIMIT = 100  # torch_cluster's CUDA kernel keeps its neighbours in local memory


def knn(
    points: Tensor,
    k: int,
    *,
    metric: str = "euclidean",
    backend: str = "auto",
) -> NeighborTable:
    """The k nearest neighbours of every point among all others.

    Args:
        points: (n, d), floating point.
        k: neighbours a point; min(k, n - 1) are found.
        metric: ``"euclidean"`` or ``"cosine"``.
        backend: ``"exact"`` (blocked matrix product and top-k, CPU and GPU), ``"triton"``
            (exact, fused, CUDA), ``"partitioned"`` (approximate, fused, CUDA), ``"kdtree"``
            (SciPy, d <= 3), ``"boxes"`` (exact, d <= 3, any device), ``"faiss"``,
            ``"torch_cluster"``, or ``"auto"``: exact on a GPU up to 2,000,000 points, beyond them
            partitioned where this finds 99 % of the neighbours of a sample.

    Returns:
        A validated :class:`NeighborTable`, nearest first (exact and triton break ties by
        number). Self is never a neighbour, also among duplicate points.

    Raises:
        ValueError: on points that are not a finite (n, d) matrix, k < 1, unknown names, or a
            backend that cannot take this input.
        ImportError: if the backend's library is not installed.
    """
    if points.dim() != 2 or not points.is_floating_point():
        raise ValueError(
            f"knn needs floating-point points (n, d); given {points.dtype} "
            f"of shape {tuple(points.shape)}"
        )
    if k < 1:
        raise ValueError(f"knn needs k >= 1; given {k}")
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"unknown metric {metric!r}; choose 'euclidean' or 'cosine'")
    if not bool(torch.isfinite(points).all()):
        row = int((~torch.isfinite(points)).any(-1).nonzero()[0])
        raise ValueError(f"knn needs finite points; point {row} has NaN or infinity")
    points = _of_order_one(points.detach())
    if metric == "cosine":
        points = torch.nn.functional.normalize(points, dim=-1)
    n = points.size(0)
    k = min(k, n - 1)
    chosen = backend == "auto"
    if chosen:
        backend = _choose_backend(points, k)
    if backend not in KNN_BACKENDS:
        raise ValueError(f"unknown knn backend {backend!r}; choose from {sorted(KNN_BACKENDS)}")
    if k < 1:
        index, exact = torch.empty(n, 0, dtype=torch.int32, device=points.device), True
    else:
        index, exact = KNN_BACKENDS[backend](points, k)
    table = NeighborTable(index, metric=metric, method=backend)
    validate_table(table)
    if not exact:
        table.recall = _sampled_recall(points, table)
        logger.info("knn backend %s: sampled recall@%d %.4f", backend, k, table.recall)
        if chosen and backend == "partitioned" and table.recall < LEAST_RECALL:
            return knn(points, k, metric=metric, backend="triton")
    return table


def nearest_of(points: Tensor, rows: Tensor, k: int, *, metric: str = "euclidean") -> Tensor:
    """The exact k nearest neighbours of some points among all others (m, k), int32.

    Args:
        points: (n, d), finite.
        rows: numbers of the points asked about (m,), on the same device.
        k: neighbours a point; min(k, n - 1) are found, nearest first.
        metric: ``"euclidean"`` or ``"cosine"``.
    """
    points, k = _of_order_one(points.detach()), min(k, len(points) - 1)
    if metric == "cosine":
        points = torch.nn.functional.normalize(points, dim=-1)
    in_tree = k > 0 and points.size(1) <= 3 and not points.is_cuda
    return (_kdtree if in_tree else _exact)(points, k, rows)[0]


def knn_candidates(
    h: Tensor,
    k: int = 100,
    *,
    metric: str = "euclidean",
    backend: str = "auto",
    batch: Tensor | None = None,
) -> NeighborTable:
    """The candidate graph: kNN in embedding space, which is available at inference.

    Args:
        h: embeddings (n, d).
        k: candidates a cell, default 100 (min(k, n - 1) on small sets).
        metric: ``"euclidean"`` or ``"cosine"``.
        backend: see :func:`knn`.
        batch: graph of each cell (n,), integer, in any order. Candidates are then of the same
            graph, as if each graph were searched alone. One graph if left out (default: None).

    Returns:
        :class:`NeighborTable` of n rows, padded where a graph has fewer candidates than another.

    Raises:
        ValueError: as :func:`knn`, or if ``batch`` is not (n,).
    """
    if batch is None:
        return knn(h, k, metric=metric, backend=backend)
    if batch.shape != h.shape[:1]:
        raise ValueError(
            f"batch needs one graph a cell, shape {tuple(h.shape[:1])}; given {tuple(batch.shape)}"
        )
    # A stable sort keeps cells of a graph in their order, and so the ties of the search.
    order = batch.to(h.device).argsort(stable=True)
    counts = batch.unique(return_counts=True)[1].tolist()
    parts = order.split(counts)
    tables = [knn(h[rows], k, metric=metric, backend=backend) for rows in parts]
    if not tables:
        return knn(h, k, metric=metric, backend=backend)
    width = max(table.k for table in tables)
    index = torch.full((h.size(0), width), -1, dtype=torch.int32, device=h.device)
    for rows, table in zip(parts, tables, strict=True):
        index[rows, : table.k] = rows[table.index.long()].int()
    recalls = [table.recall for table in tables if table.recall is not None]
    return NeighborTable(
        index,
        padded=any(table.k < width for table in tables),
        recall=min(recalls, default=None),
        metric=metric,
        method=tables[0].method,
    )


def pooled_candidates(
    h: Tensor,
    k: int,
    pool: int,
    *,
    metric: str = "euclidean",
    generator: torch.Generator | None = None,
) -> NeighborTable:
    """The k nearest neighbours of every cell among a random sample of all cells.

    They reach as far as the candidates of a slide of ``pool`` cells, whatever the number of cells.
    Cells in random blocks of 256 share a sample.

    Args:
        h: embeddings (n, d).
        k: candidates a cell; min(k, pool - 1) are found.
        pool: cells in a sample, at least 2 and less than n.
        metric: ``"euclidean"`` or ``"cosine"``.
        generator: source of the samples, on the CPU.

    Returns:
        :class:`NeighborTable` of n rows, nearest first; self is never a neighbour.

    Raises:
        ValueError: if the sample has fewer than 2 cells, or all of them.
    """
    n = h.size(0)
    if not 2 <= pool < n:
        raise ValueError(f"pool must be between 2 and {n - 1}, one less than the cells; got {pool}")
    points = _of_order_one(h.detach())
    if metric == "cosine":
        points = torch.nn.functional.normalize(points, dim=-1)
    k = min(k, pool - 1)
    index = torch.zeros(n, k, dtype=torch.int32, device=h.device)  # in rows of other ranks, too
    order = torch.randperm(n, generator=generator).split(_POOL_ROWS)
    samples = [_sample(n, pool, generator) for _ in order]
    # On a GPU, blocks of equal size are searched together.
    together = max(1, BLOCK_ELEMENTS // (_POOL_ROWS * pool)) if h.is_cuda else 1
    steps = range(0, len(order), together)
    for start in counted(steps[rank() :: size()] if shares_rows() else steps):
        full = [block for block in order[start : start + together] if len(block) == _POOL_ROWS]
        for blocks in (full, order[start + len(full) : start + together]):
            if not blocks:
                continue
            first = start if blocks is full else start + len(full)
            rows = torch.stack(list(blocks)).to(h.device)
            sample = torch.stack(samples[first : first + len(blocks)]).to(h.device)
            distance = torch.cdist(points[rows], points[sample])
            distance.masked_fill_(rows.unsqueeze(2) == sample.unsqueeze(1), math.inf)
            near = distance.topk(k, dim=2, largest=False).indices
            found = sample.unsqueeze(1).expand(-1, rows.size(1), -1).gather(2, near)
            index[rows] = found.int()
    return NeighborTable(added_rows(index), metric=metric, method=f"pool of {pool}")


def _of_order_one(points: Tensor) -> Tensor:
    """Points times the power of two that brings their largest number to between 1/2 and 1.

    Squares then neither overflow nor vanish, and no digit is lost: the neighbours are the same.
    """
    largest = float(points.abs().max()) if points.numel() else 0.0
    exponent = -math.frexp(largest)[1] if largest > 0 else 0
    half = exponent // 2  # 2^exponent itself may not be a float32
    return points if exponent == 0 else points * 2.0**half * 2.0 ** (exponent - half)


def _sample(n: int, count: int, generator: torch.Generator | None) -> Tensor:
    """Distinct numbers below n (count,), without a permutation of all n where n is large."""
    if n < 8 * count:
        return torch.randperm(n, generator=generator)[:count]
    drawn = torch.randint(n, (2 * count,), generator=generator).unique()
    if drawn.numel() < count:  # hardly ever: fewer than half of the draws are distinct
        return _sample(n, count, generator)
    return drawn[torch.randperm(drawn.numel(), generator=generator)[:count]]


def _choose_backend(points: Tensor, k: int) -> str:
    if points.is_cuda:
        if points.size(1) <= 3 and points.size(0) >= _BOXES_FROM:
            return "boxes"
        if points.size(0) < _TRITON_FROM or not _fused(points, k):
            return "exact"
        return "triton" if points.size(0) < _PARTITIONED_FROM else "partitioned"
    if points.size(1) <= 3:
        return "kdtree"
    # On 400 to 20,000 points of 128 dimensions, flat search in faiss took a sixth to a third of
    # the time of exact search in torch.
    return "faiss" if find_spec("faiss") else "exact"


def _fused(points: Tensor, k: int) -> bool:
    if not find_spec("triton"):
        return False
    from . import triton_knn

    return triton_knn.unsupported(points, k) is None


def _exact(points: Tensor, k: int, rows: Tensor | None = None) -> tuple[Tensor, bool]:
    """Blocked matrix product with a running top-k; never n x n. All rows, or those named.

    The expanded square loses digits to cancellation. A few more than k are therefore kept and
    ranked again by the distance itself.
    """
    n, d = points.shape
    work = points if points.dtype == torch.float64 else points.float()
    work = work - work.mean(dim=0, keepdim=True)
    square = work.square().sum(-1)
    keep = min(n, k + 1 + max(4, k // 16))  # self is among them
    columns = min(n, max(keep, 1 << 17))
    share = rows is None
    rows = torch.arange(n, device=points.device)[rows_of(n)] if rows is None else rows
    block_rows = max(1, min(BLOCK_ELEMENTS // columns, BLOCK_ELEMENTS // (keep * d)))
    out = torch.empty(rows.numel(), k, dtype=torch.int32, device=points.device)
    for start in counted(range(0, rows.numel(), block_rows)):
        own = rows[start : start + block_rows]
        query = work[own]
        best: Tensor | None = None
        best_id = own.new_empty(0)
        for left in range(0, n, columns):
            block = work[left : left + columns]
            distance = torch.addmm(square[left : left + columns], query, block.T, alpha=-2.0)
            value, column = distance.topk(min(keep, block.size(0)), dim=-1, largest=False)
            column = column + left
            if best is not None:
                value, column = torch.cat([best, value], -1), torch.cat([best_id, column], -1)
                value, order = value.topk(min(keep, value.size(-1)), dim=-1, largest=False)
                column = column.gather(-1, order)
            best, best_id = value, column
        out[start : start + block_rows] = _rank(work, own, best_id, k)
    return all_rows(out, n) if share else out, True


def _rank(points: Tensor, own: Tensor, candidates: Tensor, k: int) -> Tensor:
    """The k nearest of each row's candidates, itself excepted, by distance; ties by number."""
    candidates = candidates.sort(dim=-1).values
    distance = (points[candidates] - points[own].unsqueeze(1)).square().sum(-1)
    distance = distance.masked_fill_(candidates == own.unsqueeze(-1), math.inf)
    order = distance.argsort(dim=-1, stable=True)[:, :k]
    return candidates.gather(-1, order).int()


def _triton(points: Tensor, k: int) -> tuple[Tensor, bool]:
    fused = _import_fused("triton", points, k)
    index, lost = fused.search(points, k)
    if lost.numel():
        logger.info("knn backend triton: %d rows of many ties by plain search", lost.numel())
        index[lost] = _exact(points, k, lost)[0]
    return index, True


def _partitioned(points: Tensor, k: int) -> tuple[Tensor, bool]:
    fused = _import_fused("partitioned", points, k)
    if len(points) < fused.LEAST_PARTITIONED:
        return _triton(points, k)
    return fused.search_partitioned(points, k), False


def _import_fused(backend: str, points: Tensor, k: int):
    """The module of the fused searches; refuses what they cannot take."""
    try:
        from . import triton_knn
    except ImportError as error:
        raise ImportError(
            f"knn backend '{backend}' needs Triton, which comes with torch for CUDA; "
            "use backend='exact'"
        ) from error
    if reason := triton_knn.unsupported(points, k):
        raise ValueError(f"knn backend '{backend}' takes {reason}; use backend='exact'")
    return triton_knn


def _kdtree(points: Tensor, k: int, rows: Tensor | None = None) -> tuple[Tensor, bool]:
    if points.size(1) > 3:
        raise ValueError(f"knn backend 'kdtree' is for d <= 3; given d = {points.size(1)}")
    import numpy as np
    from scipy.spatial import cKDTree

    array, share = points.double().cpu().numpy(), rows is None
    rows = torch.arange(len(points))[rows_of(len(points))] if rows is None else rows.cpu()
    _, index = cKDTree(array).query(array[rows.numpy()], k=k + 1, workers=-1)
    found = _drop_self(torch.from_numpy(np.ascontiguousarray(index)), k, rows).to(points.device)
    return all_rows(found, len(points)) if share else found, True


def _boxes(points: Tensor, k: int) -> tuple[Tensor, bool]:
    if not 1 <= points.size(1) <= 3:
        raise ValueError(f"knn backend 'boxes' is for d <= 3; given d = {points.size(1)}")
    from . import plane

    return plane.search(points, k), True


def _faiss(points: Tensor, k: int) -> tuple[Tensor, bool]:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "knn backend 'faiss' needs faiss; pip install 'ipar_sparse[faiss]'"
        ) from error
    # Centred, since faiss expands the square and would lose digits far from the origin.
    array = (points - points.mean(dim=0, keepdim=True)).float().cpu().contiguous().numpy()
    n, d = array.shape
    index: Any
    if n <= FAISS_FLAT_LIMIT:
        index, exact = faiss.IndexFlatL2(d), True
    else:
        lists = int(4 * math.sqrt(n))
        index, exact = faiss.IndexIVFFlat(faiss.IndexFlatL2(d), d, lists), False
        index.cp.seed, index.cp.niter = 0, _FAISS_ROUNDS
        index.nprobe = min(lists, _FAISS_PROBES)
        stride = max(1, n // (_FAISS_SAMPLE * lists))
        index.train(array[::stride])
    index.add(array)
    rows = torch.arange(n)[rows_of(n)]
    # block by block: near ties fall as numbers are rounded, which depends on the rows of a call
    found = torch.cat(
        [torch.from_numpy(index.search(array[part], k + 1)[1]) for part in rows.split(BLOCK_ROWS)]
    )
    if not exact and bool((found < 0).any()):
        raise ValueError(
            f"knn backend 'faiss' found fewer than {k} neighbours for some points; "
            "use backend='exact'"
        )
    return all_rows(_drop_self(found, k, rows).to(points.device), n), exact


def _torch_cluster(points: Tensor, k: int) -> tuple[Tensor, bool]:
    try:
        import torch_cluster
    except ImportError as error:
        raise ImportError(
            "knn backend 'torch_cluster' needs torch-cluster, built from source; "
            "see the README, or use backend='exact'"
        ) from error
    if points.is_cuda and k + 1 > _CUDA_CLUSTER_LIMIT:
        raise ValueError(
            f"knn backend 'torch_cluster' finds at most {_CUDA_CLUSTER_LIMIT - 1} neighbours on "
            f"CUDA; given k = {k}; use backend='exact'"
        )
    row, col = torch_cluster.knn(points, points, k + 1)
    return _drop_self(col.view(points.size(0), k + 1), k), True


def _drop_self(found: Tensor, k: int, rows: Tensor | None = None) -> Tensor:
    """Remove self from rows of k + 1; the last neighbour where duplicates have displaced self."""
    n = found.size(0)  # of rows asked about
    rows = torch.arange(n, device=found.device) if rows is None else rows.to(found.device)
    own = found == rows.unsqueeze(-1)
    own[:, -1] |= ~own.any(dim=-1)
    return found[~own].view(n, k).int()


def _sampled_recall(points: Tensor, table: NeighborTable) -> float:
    """Recall of an approximate search against the exact one, on a sample of the points."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(points.size(0), generator=generator)[:_RECALL_ROWS].to(points.device)
    true = _exact(points, table.k, rows)[0]
    hits = int((table.index[rows].unsqueeze(-1) == true.unsqueeze(1)).any(-1).sum())
    return hits / (rows.numel() * table.k)


KNN_BACKENDS: dict[str, Callable[[Tensor, int], tuple[Tensor, bool]]] = {
    "exact": _exact,
    "triton": _triton,
    "partitioned": _partitioned,
    "kdtree": _kdtree,
    "boxes": _boxes,
    "faiss": _faiss,
    "torch_cluster": _torch_cluster,
}
"""Searches by name: points and k to neighbours (n, k) int32, and whether they are exact."""
