"""The one harness of all benchmarks.

A benchmark is a table of jobs and a function that measures one of them. Jobs that would not fit
or would take too long are left out by an estimate. What is compared is measured in one run, after
a warm-up call each; rows are written as they come, and the table prints the ratios.

Jobs run in a process of their own; a new one follows where it dies. Peak memory is counted anew
for each job: by torch's allocator on a GPU, by the kernel on Linux.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

from ipar_sparse import usage
from ipar_sparse.files import atomic_path, atomic_write
from ipar_sparse.progress import size_text

PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
_HEADROOM = 0.8  # share of the free memory that an estimate may take
_ENOUGH_SECONDS = 20.0  # of repeats; slow jobs are timed fewer times
_OUT_OF_MEMORY = "out of memory"
_COLORS = ("#D55E00", "#E69F00", "#0072B2", "#009E73", "#56B4E9", "#CC79A7", "#000000", "#999999")


@dataclass(frozen=True)
class Benchmark:
    """What the harness has to know of a benchmark. Jobs are dicts, see :func:`run`.

    Args:
        name: stem of the files that are written.
        title: what was measured, over the figure.
        measure: job to results; a function of a module, since another process calls it.
        work: job to a number that its time is proportional to, e.g. of edges.
        memory: job to the bytes it may take, which are proportional to what it does take.
        rates: row to further columns.
    """

    name: str
    title: str
    measure: Callable[[dict], dict]
    work: Callable[[dict], float]
    memory: Callable[[dict], float]
    rates: Callable[[dict], dict] = lambda row: {}


class Record:
    """Rows of a benchmark, printed and written to a JSON file as they come."""

    def __init__(self, path: Path, device: torch.device):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.machine, self.rows = path, describe_machine(device), []
        self.more: dict = {}
        print("{device}, torch {torch}, {threads} threads".format(**self.machine))

    def add(self, row: dict, text: str | None = None) -> None:
        """Keeps a row, prints it or ``text``, and writes all rows so far in one step."""
        self.rows.append(row)
        parts = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        print(f"  {text or ' '.join(parts)}", flush=True)
        self.save()

    def save(self) -> None:
        """Writes all that is known so far: machine, rows, and what stands in ``more``."""
        document = {"machine": self.machine, **self.more, "rows": self.rows}
        atomic_write(self.path, json.dumps(document, indent=1) + "\n")


class Worker:
    """A process that calls functions; a new one takes the place of one that failed."""

    _pool: ProcessPoolExecutor | None = None

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def call(self, function: Callable[[dict], dict], job: dict) -> dict:
        """What the function returns, or ``failed`` and the reason in one line."""
        if self._pool is None:
            threads = torch.get_num_threads()
            self._pool = ProcessPoolExecutor(
                1, get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
            )
        try:
            result = self._pool.submit(_guarded, function, job).result()
        except BrokenProcessPool:
            result = {"failed": "its process died, which lack of memory can cause"}
        if result.get("failed", _OUT_OF_MEMORY) != _OUT_OF_MEMORY:
            self.close()
        return result


def _guarded(function: Callable[[dict], dict], job: dict) -> dict:
    try:
        return function(job)
    except (torch.OutOfMemoryError, MemoryError):
        return {"failed": _OUT_OF_MEMORY}
    except Exception as error:  # an implementation that fails is a result of the benchmark
        kind = "" if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: "
        return {"failed": f"{kind}{error}".splitlines()[0][:200]}
    finally:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def run(
    benchmark: Benchmark, jobs: Iterable[dict], out: Path, device: torch.device, patience: float
) -> list[dict]:
    """Measures all jobs; writes JSON and a figure, and prints a table.

    Args:
        benchmark: what is measured, and how it grows.
        jobs: each with ``implementation``, ``task`` and ``n``, sizes rising. A job with
            ``skipped`` is only reported.
        out: folder of the files.
        device: cpu or cuda.
        patience: seconds that one call may be expected to take.

    Returns:
        One row a job: the job, its results, or ``skipped`` or ``failed`` with the reason.
    """
    record = Record(out / f"{benchmark.name}.json", device)
    last: dict[tuple, dict] = {}
    with closing(Worker()) as worker:
        for job in jobs:
            row, kind = dict(job), (job["implementation"], job["task"])
            reason = row.get("skipped") or too_much(
                benchmark, job, last.get(kind), free_memory(device), patience
            )
            if reason:
                row |= {"skipped": reason}
            else:
                row |= worker.call(benchmark.measure, job)
                row |= benchmark.rates(row) if "seconds" in row else {}
                last[kind] = row
            record.add(row, _line(row))
    print(f"\n{table(record.rows)}")
    title = f"{benchmark.title}; {record.machine['device']}"
    drawn = [row | {"gib": row["peak_bytes"] / 2**30} for row in record.rows if "seconds" in row]
    keys = {"seconds": "seconds", "gib": "peak memory, GiB"}
    plot(out / f"{benchmark.name}.png", title, drawn, keys, "log")
    return record.rows


def too_much(
    benchmark: Benchmark, job: dict, before: dict | None, free: float, patience: float
) -> str | None:
    """Why a job is left out, None if it is not.

    Args:
        benchmark: how time and memory grow.
        job: the job in question.
        before: row of the same implementation and task at a smaller size, if there is one.
        free: bytes that can be taken.
        patience: seconds that one call may take.
    """
    if before is not None and "failed" in before:
        return before["failed"]
    size, seconds = benchmark.memory(job), 0.0
    if before is not None:
        size *= before["peak_bytes"] / benchmark.memory(before)
        seconds = before["seconds"] * benchmark.work(job) / benchmark.work(before)
    if size > _HEADROOM * free:
        return f"needs about {size_text(size)}, {size_text(free)} are free"
    return f"would take about {seconds:.0f} s" if seconds > patience else None


def measure(call: Callable[[], object], device: torch.device, repeats: int) -> dict:
    """Median time of a call after one that warms up, and its peak memory beyond its inputs.

    Repeats end early once 20 s have passed. ``seconds_spread`` is half the range.
    """
    before, times = _reset_peak(device), []
    while len(times) <= repeats and (len(times) < 2 or sum(times) < _ENOUGH_SECONDS):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    timed = times[1:]
    return {
        "seconds": statistics.median(timed),
        "seconds_spread": (max(timed) - min(timed)) / 2,
        "repeats_done": len(timed),
        "peak_bytes": max(0, _peak(device) - before),
    }


def _reset_peak(device: torch.device) -> int:
    """Bytes in use, from where the peak is counted from now on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    usage.reset_host_peak(trim=True)
    return usage.host_peak()


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return usage.host_peak()


def device_times(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Milliseconds that each CUDA kernel of a call takes on the device, medians over repeats."""
    call()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        once: dict[str, float] = defaultdict(float)
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                once[event.name] += event.device_time / 1e3
        for name, value in once.items():
            times[name].append(value)
    return {name: statistics.median(values) for name, values in times.items()}


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return usage.free_host_memory()


def describe_machine(device: torch.device) -> dict:
    """What numbers are measured on; of a GPU also the bandwidth of a large copy in TB/s."""
    name, extra = platform.processor() or platform.machine(), {}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        count = min(1 << 32, free_memory(device) // 4)
        source, target = torch.empty(2, count, dtype=torch.uint8, device=device)
        seconds = measure(lambda: target.copy_(source), device, 10)["seconds"]
        extra["copy_tb_per_s"] = 2 * count / seconds / 1e12
        del source, target
        torch.cuda.empty_cache()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    measured = {"threads": torch.get_num_threads(), "memory_bytes": free_memory(device)}
    return {"device": name, **versions, **measured, **extra}


def table(rows: Sequence[dict]) -> str:
    """One line a size and task, one column an implementation, and the ratio of the fastest.

    Ratios are against the dense form if it was measured, else against the first implementation.
    """
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    cells = {(row["n"], row["task"], row["implementation"]): row for row in rows}
    against = "dense" if "dense" in names else names[0]
    width = 3 + max(len(_cell(row)) for row in rows)
    heads = "".join(f"{name:>{width}}" for name in names)
    lines = [f"{'n':>10}  {'task':<9}{heads}   fastest against {against}"]
    for n, task in dict.fromkeys((row["n"], row["task"]) for row in rows):
        found = {name: cells.get((n, task, name), {}) for name in names}
        line = f"{n:>10,}  {task:<9}" + "".join(f"{_cell(row):>{width}}" for row in found.values())
        base = found.pop(against)
        others = [row for row in found.values() if "seconds" in row]
        if "seconds" in base and others:
            best = min(others, key=lambda row: row["seconds"])
            faster = base["seconds"] / best["seconds"]
            smaller = base["peak_bytes"] / max(1, best["peak_bytes"])
            line += f"   {faster:.1f}x faster, {smaller:.1f}x less memory"
        lines.append(line)
    return "\n".join(lines)


def _cell(row: dict) -> str:
    if "seconds" not in row:
        reason = row.get("skipped") or row.get("failed", "")
        known = {"needs about": "does not fit", "would take": "too slow", "beyond": "not measured"}
        return next((known[start] for start in known if reason.startswith(start)), reason[:20])
    seconds = row["seconds"]
    text = f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
    text += f" {size_text(row['peak_bytes']):>9}"
    return text + (f", recall {row['recall']:.4f}" if "recall" in row else "")


def _line(row: dict) -> str:
    text = f"n = {row['n']:<10,} {row['implementation']:<13} {row['task']:<9}"
    if "seconds" not in row:
        return f"{text} " + (f"skipped: {row['skipped']}" if "skipped" in row else row["failed"])
    text += f" {_cell(row)}, ± {1000 * row['seconds_spread']:.1f} ms"
    if "tb_per_s" in row:
        text += f", {row['edges_per_s']:.2g} edges/s, {bandwidth_text(row['tb_per_s'])}"
    return text


def bandwidth_text(tb_per_s: float) -> str:
    """A bandwidth as a person reads it, in a unit that leaves digits to read."""
    if tb_per_s >= 0.1:
        return f"{tb_per_s:.2f} TB/s"
    return f"{1e3 * tb_per_s:.2g} GB/s"


def plot(path: Path, title: str, rows: Sequence[dict], keys: dict[str, str], scale: str) -> None:
    """A PNG: one row of axes a key of the rows, one column a task, over the number of cells.

    Args:
        path: of the file; nothing is written if no row has any of the keys.
        title: of the figure.
        rows: with ``implementation``, ``task`` and ``n``; those without a key are left out there.
        keys: key to the label of its axis.
        scale: of the vertical axes, linear or log.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if any(key in row for key in keys)]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if not tasks:
        return
    ticks = sorted({row["n"] for row in rows})
    size = 4.4 * len(tasks), 3.4 * len(keys)
    sheet = Figure(figsize=size, layout="constrained")
    axes = sheet.subplots(len(keys), len(tasks), squeeze=False)
    colors = dict(zip(dict.fromkeys(row["implementation"] for row in rows), _COLORS, strict=False))
    for (key, task), ax in zip(product(keys, tasks), axes.flat, strict=True):
        for name, color in colors.items():
            mine = [
                r for r in rows if (r["implementation"], r["task"]) == (name, task) and key in r
            ]
            x, y = [row["n"] for row in mine], [row[key] for row in mine]
            ax.plot(x, y, "o-", color=color, label=name, markersize=4)
        ax.set(xscale="log", yscale=scale, xlabel="cells", ylabel=keys[key], title=task)
        ax.set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=45)
        ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        ax.grid(True, which="major", alpha=0.3)
        ax.set_ylim(bottom=0 if scale == "linear" else None)
    axes[-1, 0].legend(frameon=False, fontsize=8)
    sheet.suptitle(title, fontsize=10)
    with atomic_path(path) as temporary:
        sheet.savefig(temporary, dpi=120)


def markdown(headings: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table of Markdown; numbers with a fraction get three digits."""
    rows = [headings, ["---"] * len(headings)]
    rows += [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in line] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def check_names(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuses unknown names: ValueError, one line with the known ones."""
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"unknown {kind} {', '.join(unknown)}; choose from {', '.join(known)}")
