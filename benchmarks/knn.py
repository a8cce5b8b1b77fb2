"""Nearest-neighbour searches side by side: time, peak memory, and recall against the definition.

An implementation that refuses its input or runs out of memory is not tried at larger sizes.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ipar_sparse.graph.knn import KNN_BACKENDS

from . import harness
from .model import make_embedding

_CHECKED_ROWS = 200  # on which recall is taken


def run(
    sizes: list[int],
    out: Path,
    device: torch.device | str = "cpu",
    *,
    k: int = 100,
    implementations: list[str] | None = None,
    repeats: int = 3,
    seed: int = 0,
    patience: float = 60.0,
) -> list[dict]:
    """Measures every implementation at every size; writes ``knn.json`` and ``knn.png``.

    Args:
        sizes: numbers of points, in 128 dimensions.
        out: folder of the files.
        device: cpu or cuda; faiss always searches on the CPU.
        k: neighbours of a point.
        implementations: of ``KNN_BACKENDS``; by default all for any dimension that are installed.
        repeats: timed calls; the median counts.
        seed: of the points.
        patience: seconds that one search may be expected to take.

    Raises:
        ValueError: an unknown implementation.
    """
    device = torch.device(device)
    implementations = list(implementations or _installed(device))
    harness.check_names("implementation", implementations, KNN_BACKENDS)
    given = {"k": k, "device": str(device), "repeats": repeats, "seed": seed}
    jobs = [
        {"implementation": name, "task": "knn", "n": n, **given}
        for n in sorted(sizes)
        for name in implementations
    ]
    benchmark = harness.Benchmark(
        name="knn",
        title=f"Nearest neighbours in 128 dimensions, k = {k}",
        measure=measure,
        work=lambda job: job["n"] ** 2,
        memory=lambda job: 4096 * job["n"],
    )
    return harness.run(benchmark, jobs, Path(out), device, patience)


def measure(job: dict) -> dict:
    """Time, memory and recall of one search."""
    device, found = torch.device(job["device"]), {}
    pos = torch.randn(job["n"], 2, generator=torch.Generator().manual_seed(job["seed"]))
    points = make_embedding(pos, job["seed"], device)
    rows = torch.randperm(job["n"], generator=torch.Generator().manual_seed(0))

    def search():
        found.clear()
        found["index"] = KNN_BACKENDS[job["implementation"]](points, min(job["k"], job["n"] - 1))[0]

    result = harness.measure(search, device, job["repeats"])
    return result | {"recall": recall(points, found["index"], rows[:_CHECKED_ROWS].to(device))}


def recall(points: Tensor, index: Tensor, rows: Tensor) -> float:
    """Share of the rows' neighbours that are no farther than the true k-th neighbour.

    Distances are float64; neighbours that float32 cannot tell apart count as equal.
    """
    k, hits = index.size(1), 0
    for row in rows.split(10):
        distance = torch.empty(len(row), len(points), dtype=torch.float64, device=points.device)
        for part, into in zip(points.split(1 << 15), distance.split(1 << 15, dim=1), strict=True):
            difference = (points[row].double().unsqueeze(1) - part.double()).square_()
            into.copy_(difference.sum(-1))
        distance.scatter_(1, row.unsqueeze(1), torch.inf)
        farthest = distance.kthvalue(k, dim=1, keepdim=True).values
        found = distance.gather(1, index[row].long())
        hits += int((found <= farthest * (1 + 1e-5)).sum())
    return hits / (len(rows) * k)


def _installed(device: torch.device) -> list[str]:
    names = ["exact", *(name for name in ("faiss", "torch_cluster") if find_spec(name))]
    fused = device.type == "cuda" and find_spec("triton")
    return [*names, "triton"] if fused else names
