"""Nearest-neighbour backends side by side: time, peak memory, and recall against the definition.

On CPU each measurement runs in a process of its own, so that peak memory is that of one backend.
A backend stops where it runs out of memory, refuses the input, or can be expected to take longer
than the budget, by its time at the size before and the number of pairs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ipar_sparse.graph.knn import KNN_BACKENDS

from .compare import _sheet, _size, _time, describe_machine, make_embedding

_CHECKED_ROWS = 200  # on which recall is taken
_COLORS = {"exact": "#0072B2", "triton": "#009E73", "faiss": "#E69F00", "torch_cluster": "#D55E00"}


def run(
    sizes: list[int],
    out: Path,
    device: torch.device | str = "cpu",
    *,
    k: int = 100,
    backends: list[str] | None = None,
    repeats: int = 3,
    seed: int = 0,
    budget: float = 60.0,
) -> list[dict]:
    """Measure every backend at every size; write JSON, a table and a figure.

    Args:
        sizes: numbers of points, in 128 dimensions.
        out: folder for ``knn.json`` and ``knn.png``.
        device: cpu or cuda; faiss always searches on CPU.
        k: neighbours a point.
        backends: of ``KNN_BACKENDS``; all that are installed if left out.
        repeats: timed repetitions; the median counts.
        seed: of the points.
        budget: seconds that one search may be expected to take.

    Returns:
        One row a measurement: backend, n, seconds, peak bytes and recall, or why there is none.
    """
    device = torch.device(device)
    backends = list(backends or _installed(device))
    if unknown := [name for name in backends if name not in KNN_BACKENDS]:
        raise ValueError(f"unknown {', '.join(unknown)}; choose from {', '.join(KNN_BACKENDS)}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(device)
    print(f"{machine['device']}, torch {machine['torch']}, {machine['threads']} threads, k = {k}")
    rows: list[dict] = []
    last: dict[str, dict] = {}
    for n in sorted(sizes):
        for backend in backends:
            row = {"backend": backend, "n": n, "k": k, "device": str(device)}
            if reason := _too_long(last.get(backend), n, budget):
                row["skipped"] = reason
            else:
                row |= _measure({**row, "repeats": repeats, "seed": seed})
                last[backend] = row
            rows.append(row)
            print(_line(row), flush=True)
            (out / "knn.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    print()
    print(table(rows))
    figure(rows, machine, out / "knn.png")
    return rows


def points(n: int, seed: int, device) -> Tensor:
    """Embeddings (n, 128) of a tissue-like sheet, the same as in the other benchmark."""
    return make_embedding(_sheet(n, seed), torch.Generator(device).manual_seed(seed))


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


def table(rows: list[dict]) -> str:
    """The rows as text: one line a size, one column a backend."""
    names, width = list(dict.fromkeys(row["backend"] for row in rows)), 34
    cells = {(row["n"], row["backend"]): row for row in rows}
    lines = [f"{'points':>10}" + "".join(f"{name:>{width}}" for name in names)]
    for n in dict.fromkeys(row["n"] for row in rows):
        texts = (_cell(cells[n, name]) for name in names)
        lines.append(f"{n:>10,}" + "".join(f"{text:>{width}}" for text in texts))
    return "\n".join(lines)


def figure(rows: list[dict], machine: dict, path: Path) -> None:
    """Time and peak memory over the number of points, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [row for row in rows if "seconds" in row]
    if not done:
        return
    fig, axes = plt.subplots(1, 2, figsize=(9.2, 3.6))
    ticks = sorted({row["n"] for row in done})
    for axis, key, unit in ((axes[0], "seconds", 1), (axes[1], "peak_bytes", 2**30)):
        for name in dict.fromkeys(row["backend"] for row in done):
            mine = [row for row in done if row["backend"] == name]
            values = [max(row[key] / unit, 1e-6) for row in mine]
            axis.loglog([row["n"] for row in mine], values, "o-", color=_COLORS[name], label=name)
        axis.set_xlabel("points")
        axis.grid(True, which="major", alpha=0.3)
        axis.set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=30)
        axis.tick_params(axis="x", which="minor", labelbottom=False)
    axes[0].set_ylabel("seconds")
    axes[1].set_ylabel("peak memory, GiB")
    axes[0].legend(frameon=False)
    fig.suptitle(f"{machine['device']}, 128 dimensions, k = {rows[0]['k']}", fontsize=11)
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _installed(device: torch.device) -> list[str]:
    needed = {"triton": "triton", "faiss": "faiss", "torch_cluster": "torch_cluster"}
    names = [name for name in _COLORS if name not in needed or find_spec(needed[name])]
    return [name for name in names if name != "triton" or device.type == "cuda"]


def _too_long(last: dict | None, n: int, budget: float) -> str | None:
    """Why a backend is not run at a size, by how its last run went."""
    if last is None:
        return None
    if "seconds" not in last:
        return last["failed"]
    seconds = last["seconds"] * (n / last["n"]) ** 2
    return f"would take about {seconds:.0f} s" if seconds > budget else None


def _measure(job: dict) -> dict:
    if job["device"] != "cpu":
        return _search(job)
    command = [sys.executable, "-m", f"{__package__}.knn", "--measure", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"failed": reason[0][:200]}


def _search(job: dict) -> dict:
    from .worker import measure

    device = torch.device(job["device"])
    found = {}
    try:
        h = points(job["n"], job["seed"], device)
        rows = torch.randperm(job["n"], generator=torch.Generator().manual_seed(0))
        rows = rows[:_CHECKED_ROWS].to(device)

        def search():
            found.clear()
            found["index"] = KNN_BACKENDS[job["backend"]](h, min(job["k"], job["n"] - 1))[0]

        result = measure(search, device, job["repeats"])
        return {**result, "recall": recall(h, found["index"], rows)}
    except (torch.cuda.OutOfMemoryError, MemoryError):
        return {"failed": "out of memory"}
    except (ValueError, ImportError) as error:
        return {"failed": str(error)}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _cell(row: dict) -> str:
    if "seconds" not in row:
        reason = row.get("skipped") or row["failed"]
        known = {"would take": "too slow", "out of memory": "out of memory"}
        return next((text for start, text in known.items() if reason.startswith(start)), "refused")
    return f"{_time(row['seconds'])} {_size(row['peak_bytes']):>9}, recall {row['recall']:.4f}"


def _line(row: dict) -> str:
    head = f"  n = {row['n']:<10,} {row['backend']:<13}"
    if "seconds" in row:
        return f"{head} {_cell(row)}, ± {1000 * row['seconds_spread']:.1f} ms"
    return f"{head} skipped: {row['skipped']}" if "skipped" in row else f"{head} {row['failed']}"


def main(argv: list[str] | None = None) -> None:
    """``python -m benchmarks.knn``: ``ipar-sparse benchmark --works knn``, with more choice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1000,3000,10000")
    parser.add_argument("--out", type=Path, default=Path("benchmark"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--backends")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=60.0)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(_search(json.loads(args.measure))))
        return
    run(
        [int(float(size)) for size in args.sizes.split(",")],
        args.out,
        args.device,
        k=args.k,
        backends=args.backends.split(",") if args.backends else None,
        repeats=args.repeats,
        budget=args.budget,
    )


if __name__ == "__main__":
    main()
