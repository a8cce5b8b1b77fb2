"""Dense against sparse: time and peak memory of gate and five recycles, side by side.

On CPU each measurement runs in a process of its own, so that peak memory is that of one
implementation; on a GPU, whose allocator counts for itself, one process takes them all and a new
one follows where it fails. What will not fit, or would take too long, is skipped by an estimate
made beforehand: memory and time at the size before, scaled by the number of pairs or edges.

Effective bandwidth counts what the fused form has to move (:func:`traffic`), whatever an
implementation does move.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ipar_sparse.graph import NeighborTable, knn

IMPLEMENTATIONS = {
    "dense": "n x n tensors: every pair has gate features and logits",
    "pyg": "plain message passing: every edge has gate features, keys and values",
    "chunked": "blocks of rows, recomputed in the backward pass",
    "triton": "fused CUDA kernels",
    "triton-graph": "the same, replayed as one CUDA graph",
    "triton-checkpoint": "the same, most of a recycle made again in the backward pass",
}
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
WORKS = {
    "forward": "gate and five recycles, no gradients",
    "backward": "forward and backward",
    "step": "a whole training step on a slide: forward, losses, backward, optimiser",
}
_FIRST_GUESS = {"dense": 1000, "pyg": 2000}  # floats a pair or edge
_GUESS = 60
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
    train_up_to: int = 2_000_000,
    patience: float = 60.0,
) -> list[dict]:
    """Measure every implementation at every size; write JSON, a table and a figure.

    Args:
        sizes: numbers of cells.
        out: folder for ``benchmark.json`` and ``benchmark.png``.
        device: cpu or cuda.
        k: candidates a cell.
        implementations: of ``IMPLEMENTATIONS``; all that this device can run if left out.
        works: of ``WORKS``; forward and backward if left out.
        precision: float32, tf32 (float32 with products in TF32), bfloat16 or float16 (autocast).
        repeats: timed repetitions; the median counts.
        seed: of embeddings and weights.
        train_up_to: largest size at which more than the forward pass is measured.
        patience: seconds that one call may be expected to take.

    Returns:
        One row a measurement: implementation, work, n, seconds, peak bytes, edges a second and
        effective bandwidth, or why it was skipped.
    """
    device = torch.device(device)
    if implementations is None:
        names = {"cpu": ("dense", "pyg", "chunked"), "cuda": ("dense", "pyg", "chunked", "triton")}
        implementations = list(names[device.type])
    works = list(works or ["forward", "backward"])
    for name, known in ((implementations, IMPLEMENTATIONS), (works, WORKS)):
        unknown = [given for given in name if given not in known]
        if unknown:
            raise ValueError(f"unknown {', '.join(unknown)}; choose from {', '.join(known)}")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(device)
    print(f"{machine['device']}, torch {machine['torch']}, {machine['threads']} threads, k = {k}")
    rows: list[dict] = []
    before: dict[tuple[str, str], dict] = {}
    given = {"k": k, "device": str(device), "precision": precision, "repeats": repeats}
    with tempfile.TemporaryDirectory() as folder, _Workers(device) as workers:
        targets = {}
        if "step" in works:
            trained = [n for n in sorted(sizes, reverse=True) if n <= train_up_to]
            targets = {n: workers.build_target(n, seed, Path(folder)) for n in trained}
            if device.type == "cpu":  # which it would take from what is measured
                for target in targets.values():
                    target.result()
        for n in sorted(sizes):
            data = None
            if device.type == "cpu":
                data = str(Path(folder) / "problem.pt")
                torch.save(make_problem(n, k, seed, device), data)
            for implementation in implementations:
                for work in works:
                    if implementation in ("dense", "triton-graph") and work == "step":
                        continue  # losses of a whole slide are sparse, and draw from a generator
                    row = {"implementation": implementation, "work": work, "n": n, **given}
                    last = before.get((implementation, work))
                    reason = _too_much(row, last, device, patience)
                    if work != "forward" and n > train_up_to:
                        reason = f"beyond {train_up_to:,} cells only forward is measured"
                    if reason:
                        row["skipped"] = reason
                    else:
                        job = {**row, "seed": seed, "data": data, "target": None}
                        if work == "step":
                            job["target"] = targets[n].result()
                        row |= _measure(workers, job)
                    if "seconds" in row:
                        before[implementation, work] = row
                        row |= rates(row)
                    rows.append(row)
                    print(_line(row), flush=True)
                    document = {"machine": machine, "rows": rows}
                    (out / "benchmark.json").write_text(json.dumps(document, indent=1) + "\n")
    print()
    print(table(rows))
    figure(rows, machine, out / "benchmark.png")
    return rows


def make_problem(n: int, k: int, seed: int, device) -> dict:
    """Embeddings of a tissue-like sheet, their neighbours, and the sheet, on a device."""
    pos = _sheet(n, seed)
    generator = torch.Generator(device).manual_seed(seed)
    h = make_embedding(pos, generator)
    if n <= _KNN_LIMIT:
        index = knn(h, k).index
    else:
        index = torch.empty(n, k, dtype=torch.int32, device=device)
        for start in range(0, n, 1 << 20):
            part = index[start : start + (1 << 20)]
            shift = torch.randint(1, 1000, part.shape, generator=generator, device=device)
            own = torch.arange(start, start + len(part), device=device).unsqueeze(1)
            part.copy_((own + shift) % n)
    return {"h": h, "index": index, "pos": pos}


def make_embedding(pos: Tensor, generator: torch.Generator) -> Tensor:
    """A smooth random map of 2D positions into 128 dimensions, plus noise.

    So the candidate graph has the locality and the popular nodes of a real one.
    """
    device = generator.device
    wave = torch.randn(2, 128, generator=generator, device=device)
    phase = 6.28 * torch.rand(128, generator=generator, device=device)
    h = torch.empty(len(pos), 128, device=device)
    for rows, part in zip(pos.split(1 << 20), h.split(1 << 20), strict=True):
        part.normal_(generator=generator).mul_(0.3)
        part += torch.cos(rows.to(device) @ wave * 2 + phase)
    return h


def _sheet(n: int, seed: int) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def _save_target(n: int, seed: int, path: str) -> str:
    from ipar_sparse.supervision.targets import build_target

    torch.save(build_target(_sheet(n, seed), multiscale=False), path)
    return path


def traffic(work: str, n: int, k: int, precision: str) -> int:
    """Bytes that gate and five recycles must gather over all edges, each row read every time.

    Forward a recycle reads a key and a value row, a position, an index and a bias an edge; its
    backward pass the rows twice (by destination and by source) and the gradient and bias of each
    edge. The gate reads an embedding row an edge, once more in the backward pass.
    """
    row = 128 * (2 if precision in ("bfloat16", "float16") else 4)
    forward = 5 * (2 * row + 16) + row + 8
    backward = 5 * (2 * row + 20 + 2 * row + 132) + row + 12
    return n * k * (forward if work == "forward" else forward + backward)


def rates(row: dict) -> dict:
    """Edges a second, and effective bandwidth in TB/s."""
    moved = traffic(row["work"], row["n"], row["k"], row["precision"])
    return {
        "edges_per_s": row["n"] * row["k"] / row["seconds"],
        "tb_per_s": moved / row["seconds"] / 1e12,
    }


def describe_machine(device: torch.device) -> dict:
    """What the numbers were measured on."""
    name, extra = platform.processor() or platform.machine(), {}
    if device.type == "cuda":
        from .kernels import copy_bandwidth

        name = torch.cuda.get_device_name(device)
        extra["copy_tb_per_s"] = copy_bandwidth()
        torch.cuda.empty_cache()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "memory_bytes": free_memory(device),
        **extra,
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
    names, width = list(dict.fromkeys(row["implementation"] for row in rows)), 24
    cells = {(r["n"], r["work"], r["implementation"]): r for r in rows}
    heads = [f"{'cells':>10}  {'work':<9}", *(f"{name:>{width}}" for name in names)]
    against = "dense" if "dense" in names else names[0]
    lines = ["".join(heads) + f"   against {against}"]
    for n, work in dict.fromkeys((r["n"], r["work"]) for r in rows):
        base, best = cells.get((n, work, against), {}), None  # the fastest of the others
        line = f"{n:>10,}  {work:<9}"
        for name in names:
            row = cells.get((n, work, name), {})
            if "seconds" in row:
                text = f"{_time(row['seconds'])} {_size(row['peak_bytes']):>10}"
                if name != against and (best is None or row["seconds"] < best["seconds"]):
                    best = row
            else:
                text = _short(row.get("skipped") or row.get("failed", ""))
            line += f"{text:>{width}}"
        if best is not None and "seconds" in base:
            faster = base["seconds"] / best["seconds"]
            smaller = base["peak_bytes"] / max(1, best["peak_bytes"])
            line += f"   {faster:.1f}x faster, {smaller:.0f}x less memory"
        lines.append(line)
    return "\n".join(lines)


def _short(reason: str) -> str:
    """Why there is no number, in a cell of the table."""
    known = {"needs about": "does not fit", "would take": "too slow", "beyond": "not measured"}
    return next((text for start, text in known.items() if reason.startswith(start)), reason[:20])


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
    palette = ("#D55E00", "#E69F00", "#0072B2", "#009E73", "#56B4E9", "#CC79A7")
    colors = dict(zip(IMPLEMENTATIONS, palette, strict=True))
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
            axes[line, column].set_xticks(ticks, [_cells(n) for n in ticks], rotation=60)
            axes[line, column].tick_params(axis="x", which="minor", labelbottom=False)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory, GiB")
    axes[0, 0].legend(frameon=False, fontsize=8)
    fig.suptitle(f"{machine['device']}, k = {rows[0]['k']}", fontsize=11)
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)


class _Workers:
    """Processes that measure: one after the other on CPU, one for all on a GPU."""

    def __init__(self, device: torch.device):
        self.device, self.process = device, None
        self.errors = tempfile.TemporaryFile("w+")
        self.pool = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stop()
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.errors.close()

    def build_target(self, n: int, seed: int, folder: Path):
        """The file of the target of a size, in the background: it can take a minute."""
        return self.pool.submit(_save_target, n, seed, str(folder / f"target-{n}.pt"))

    def ask(self, job: dict) -> dict:
        if self.process is None:
            command = [sys.executable, "-m", f"{__package__}.worker"]
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
            )
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            result = json.loads(self.process.stdout.readline())
        except (BrokenPipeError, ValueError):
            code = self.stop()
            self.errors.seek(0)
            reason = self.errors.read().strip().splitlines()[-1:] or [f"exit code {code}"]
            return {"failed": reason[0][:200]}
        if self.device.type == "cpu":
            self.stop()
        return result

    def stop(self) -> int | None:
        if self.process is None:
            return None
        self.process.stdin.close()
        self.process.stdout.close()
        code, self.process = self.process.wait(), None
        return code


def _cells(n: int) -> str:
    """A number of cells on an axis: 384, 1.3k, 10M."""
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:g}{unit}"
    return str(n)


def _measure(workers: _Workers, job: dict) -> dict:
    return workers.ask(job)


def _too_much(row: dict, before: dict | None, device, patience: float) -> str | None:
    """Why a measurement is left out: memory or time it can be expected to need."""
    estimate = _estimate(row["implementation"], row["n"], row["k"], before)
    free = free_memory(device)
    if estimate > _HEADROOM * free:
        return f"needs about {_size(estimate)}, {_size(free)} are free"
    if before is not None:
        seconds = before["seconds"] * _count(row, row["n"]) / _count(row, before["n"])
        if seconds > patience:
            return f"would take about {seconds:.0f} s"
    return None


def _count(row: dict, n: int) -> int:
    """Pairs or edges at a size."""
    return n * n if row["implementation"] == "dense" else n * row["k"]


def _estimate(implementation: str, n: int, k: int, before: dict | None) -> float:
    row = {"implementation": implementation, "k": k}
    if before is not None:
        return before["peak_bytes"] * _count(row, n) / _count(row, before["n"])
    return 4 * _FIRST_GUESS.get(implementation, _GUESS) * _count(row, n)


def _line(row: dict) -> str:
    head = f"  n = {row['n']:<10,} {row['implementation']:<8} {row['work']:<9}"
    if "seconds" in row:
        spread = f"± {1000 * row['seconds_spread']:.1f} ms"
        text = f"{head} {_time(row['seconds'])} {spread}, {_size(row['peak_bytes'])}"
        return f"{text}, {row['edges_per_s']:.2g} edges/s, {row['tb_per_s']:.2f} TB/s"
    return f"{head} skipped: {row['skipped']}" if "skipped" in row else f"{head} {row['failed']}"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _size(count: float) -> str:
    units = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    unit = next((name for name in units if count < 1024 * units[name]), "TiB")
    return f"{count / units[unit]:.{0 if unit == 'MiB' else 1}f} {unit}"


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
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--train-up-to", type=float, default=2e6, help="cells; beyond, forward")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds a call may take")
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
        train_up_to=int(args.train_up_to),
        patience=args.patience,
    )


def load_graph(saved: dict, device) -> NeighborTable:
    """The candidate graph of a saved problem."""
    return NeighborTable(saved["index"]).to(device)


if __name__ == "__main__":
    main()
