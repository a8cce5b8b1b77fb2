"""Dense against sparse: time and peak memory of gate and five recycles, side by side.

Each measurement runs in a process of its own, so that peak memory is that of one implementation
and a failure takes nothing else down. What will not fit is skipped by an estimate made
beforehand: the peak at the size before, scaled by the number of pairs or edges.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ipar_sparse.graph import NeighborTable, knn

IMPLEMENTATIONS = {
    "dense": "n x n tensors: every pair has gate features and logits",
    "pyg": "plain message passing: every edge has gate features, keys and values",
    "chunked": "blocks of rows, recomputed in the backward pass",
    "triton": "fused CUDA kernels",
}
WORKS = {
    "forward": "gate and five recycles, no gradients",
    "backward": "forward and backward",
    "step": "a whole training step on a slide: forward, losses, backward, optimiser",
}
_FIRST_GUESS = {"dense": 1000, "pyg": 2000, "chunked": 60, "triton": 60}  # floats a pair or edge
_HEADROOM = 0.8  # share of the free memory an estimate may take
_KNN_LIMIT = 2_000_000  # beyond, neighbours are drawn near by instead of searched for


def run(
    sizes: list[int],
    out: Path,
    device: torch.device | str = "cpu",
    *,
    k: int = 100,
    implementations: list[str] | None = None,
    works: list[str] | None = None,
    precision: str = "float32",
    repeats: int = 5,
    seed: int = 0,
) -> list[dict]:
    """Measure every implementation at every size; write JSON, a table and a figure.

    Args:
        sizes: numbers of cells.
        out: folder for ``benchmark.json`` and ``benchmark.png``.
        device: cpu or cuda.
        k: candidates a cell.
        implementations: of ``IMPLEMENTATIONS``; all that this device can run if left out.
        works: of ``WORKS``; forward and backward if left out.
        precision: float32, bfloat16 or float16 (autocast).
        repeats: timed repetitions; the median counts.
        seed: of embeddings and weights.

    Returns:
        One row a measurement: implementation, work, n, seconds, peak bytes, or why it was
        skipped.
    """
    device = torch.device(device)
    if implementations is None:
        implementations = [
            name for name in IMPLEMENTATIONS if name != "triton" or device.type == "cuda"
        ]
    works = list(works or ["forward", "backward"])
    for name, known in ((implementations, IMPLEMENTATIONS), (works, WORKS)):
        unknown = [given for given in name if given not in known]
        if unknown:
            raise ValueError(f"unknown {', '.join(unknown)}; choose from {', '.join(known)}")
    if precision not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"unknown precision {precision!r}; choose float32, bfloat16 or float16")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(device)
    print(f"{machine['device']}, torch {machine['torch']}, {machine['threads']} threads, k = {k}")
    rows: list[dict] = []
    peaks: dict[tuple[str, str], tuple[int, int]] = {}
    given = {"k": k, "device": str(device), "precision": precision, "repeats": repeats}
    with tempfile.TemporaryDirectory() as folder:
        for n in sorted(sizes):
            data = Path(folder) / "problem.pt"
            make_problem(n, k, seed, data, device, with_target="step" in works)
            for implementation in implementations:
                for work in works:
                    if implementation == "dense" and work == "step":
                        continue  # the losses of a whole slide are sparse
                    row = {"implementation": implementation, "work": work, "n": n, **given}
                    estimate = _estimate(implementation, n, k, peaks.get((implementation, work)))
                    free = free_memory(device)
                    if estimate > _HEADROOM * free:
                        row["skipped"] = f"needs about {_size(estimate)}, {_size(free)} are free"
                    else:
                        row |= _measure(implementation, work, data, device, precision, repeats)
                    if "peak_bytes" in row:
                        peaks[implementation, work] = (n, row["peak_bytes"])
                    rows.append(row)
                    print(_line(row), flush=True)
                    document = {"machine": machine, "rows": rows}
                    (out / "benchmark.json").write_text(json.dumps(document, indent=1) + "\n")
    print()
    print(table(rows))
    figure(rows, machine, out / "benchmark.png")
    return rows


def make_problem(n: int, k: int, seed: int, path: Path, device, with_target: bool = False) -> None:
    """Embeddings of a tissue-like sheet, their neighbours, and the sheet: saved for the workers.

    The embedding is a smooth random map of 2D positions into 128 dimensions, plus noise, so that
    the candidate graph has the locality and the popular nodes of a real one.
    """
    generator = torch.Generator().manual_seed(seed)
    pos = torch.randn(n, 2, generator=generator)
    wave = torch.randn(2, 128, generator=generator)
    phase = 6.28 * torch.rand(128, generator=generator)
    h = torch.cos(pos @ wave * 2 + phase) + 0.3 * torch.randn(n, 128, generator=generator)
    if n <= _KNN_LIMIT:
        index = knn(h.to(device), k).index.cpu()
    else:
        shift = torch.randint(1, 1000, (n, k), generator=generator, dtype=torch.int32)
        index = (torch.arange(n, dtype=torch.int32).unsqueeze(1) + shift) % n
    torch.save({"h": h, "index": index, "pos": pos, "seed": seed, "target": with_target}, path)


def describe_machine(device: torch.device) -> dict:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "memory_bytes": free_memory(device),
    }


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def table(rows: list[dict]) -> str:
    """The rows as text: one line a size and work, one column an implementation."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    cells = {(r["n"], r["work"], r["implementation"]): r for r in rows}
    heads = [f"{'cells':>10}  {'work':<9}", *(f"{name:>22}" for name in names)]
    against = "dense" if "dense" in names else names[0]
    lines = ["".join(heads) + f"   against {against}"]
    for n, work in dict.fromkeys((r["n"], r["work"]) for r in rows):
        base, best = cells.get((n, work, against), {}), None
        line = f"{n:>10,}  {work:<9}"
        for name in names:
            row = cells.get((n, work, name), {})
            if "seconds" in row:
                text = f"{_time(row['seconds'])} {_size(row['peak_bytes']):>10}"
                best = row if name != against else best
            else:
                text = "does not fit" if "skipped" in row else row.get("failed", "")[:20]
            line += f"{text:>22}"
        if best is not None and "seconds" in base:
            faster = base["seconds"] / best["seconds"]
            smaller = base["peak_bytes"] / max(1, best["peak_bytes"])
            line += f"   {faster:.1f}x faster, {smaller:.0f}x less memory"
        lines.append(line)
    return "\n".join(lines)


def figure(rows: list[dict], machine: dict, path: Path) -> None:
    """Time and peak memory over the number of cells, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [row for row in rows if "seconds" in row]
    works = list(dict.fromkeys(row["work"] for row in done))
    if not works:
        return
    fig, axes = plt.subplots(2, len(works), figsize=(4.6 * len(works), 7), squeeze=False)
    colors = dict(zip(IMPLEMENTATIONS, ("#D55E00", "#E69F00", "#0072B2", "#009E73"), strict=True))
    for column, work in enumerate(works):
        for name in dict.fromkeys(row["implementation"] for row in done):
            mine = [r for r in done if r["implementation"] == name and r["work"] == work]
            n = [r["n"] for r in mine]
            for line, key, unit in ((0, "seconds", 1), (1, "peak_bytes", 2**30)):
                values = [max(r[key], 1) / unit if unit > 1 else r[key] for r in mine]
                axes[line, column].loglog(n, values, "o-", color=colors[name], label=name)
        axes[0, column].set_title(WORKS[work].split(":")[0], fontsize=10)
        axes[1, column].set_xlabel("cells")
        ticks = sorted({row["n"] for row in done})
        for line in (0, 1):
            axes[line, column].grid(True, which="major", alpha=0.3)
            axes[line, column].set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=30)
            axes[line, column].tick_params(axis="x", which="minor", labelbottom=False)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory, GiB")
    axes[0, 0].legend(frameon=False)
    fig.suptitle(f"{machine['device']}, k = {rows[0]['k']}", fontsize=11)
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _measure(implementation, work, data, device, precision, repeats) -> dict:
    command = [
        sys.executable, "-m", f"{__package__}.worker", implementation, work, str(data),
        str(device), precision, str(repeats),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"failed": reason[0][:200]}


def _estimate(implementation, n, k, before) -> float:
    count = (lambda m: m * m) if implementation == "dense" else (lambda m: m * k)
    if before is not None:
        size, peak = before
        return peak * count(n) / count(size)
    return 4 * _FIRST_GUESS[implementation] * count(n)


def _line(row: dict) -> str:
    head = f"  n = {row['n']:<10,} {row['implementation']:<8} {row['work']:<9}"
    if "seconds" in row:
        spread = f"± {1000 * row['seconds_spread']:.1f} ms"
        return f"{head} {_time(row['seconds'])} {spread}, {_size(row['peak_bytes'])}"
    return f"{head} skipped: {row['skipped']}" if "skipped" in row else f"{head} {row['failed']}"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _size(count: float) -> str:
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def main(argv: list[str] | None = None) -> None:
    """``python -m benchmarks.compare``: the same as ``ipar-sparse benchmark``, with more choice."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="384,1300,2600,5000")
    parser.add_argument("--out", type=Path, default=Path("benchmark"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--implementations")
    parser.add_argument("--works", default="forward,backward")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    run(
        [int(float(size)) for size in args.sizes.split(",")],
        args.out,
        args.device,
        k=args.k,
        implementations=args.implementations.split(",") if args.implementations else None,
        works=args.works.split(","),
        precision=args.precision,
        repeats=args.repeats,
    )


def load_graph(saved: dict, device) -> NeighborTable:
    """The candidate graph of a saved problem."""
    return NeighborTable(saved["index"]).to(device)


if __name__ == "__main__":
    main()
