"""Training on several devices: what they exchange, that they agree, and how much faster they are.

    python -m benchmarks.devices --devices 1,2 --sizes 1000000 --out DIR

In one command: bandwidth of a copy and of an all-reduce, the losses of N ranks beside those of
one, optimiser steps of 16 slides of 40,000 cells shared by slide, and of one slide of each size
shared by rows. Every part runs in processes of its own, with a time limit; ``devices.json`` is
written after each, and a part that fails leaves its reason there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from torch import distributed as dist

from ipar_sparse import distributed as ranks
from ipar_sparse import usage
from ipar_sparse.config import RunConfig, load_config
from ipar_sparse.data.readers import read_files
from ipar_sparse.files import write_json
from ipar_sparse.graph import NeighborTable, knn_candidates
from ipar_sparse.graph.order import bisection_order
from ipar_sparse.graph.rows import dealt_rows
from ipar_sparse.inference.modules import build_gate_and_model
from ipar_sparse.nn import EdgeGateSoft
from ipar_sparse.train.batches import Batches, EmbeddedSlide
from ipar_sparse.train.fit import fit
from ipar_sparse.train.loop import Loop
from ipar_sparse.train.model import Trained, train_gate, train_model

from . import harness
from .model import make_embedding
from .reading import write_random

EXCHANGED = 64 << 20  # numbers of float32 in an all-reduce: 256 MiB
SLIDES, CELLS = 16, 40_000
BRIEF = ["encoder.steps=8", "train.gate_steps=2", "train.epochs=1", "train.minisets=4"]
BRIEF += ["train.batch_size=2", "train.steps_per_epoch=2", "selection.mode=none"]
"""Settings of a training that ends soon after it has read all that it needs."""
WARM = 3  # steps that compile, and find the order of a graph


def bandwidth(job: dict) -> dict:
    """GB/s of a copy on one device, and of an all-reduce over all (bus bandwidth)."""
    device = torch.device(job["device"])
    values = torch.ones(EXCHANGED if device.type == "cuda" else EXCHANGED >> 4, device=device)
    target, size = torch.empty_like(values), values.numel() * 4
    copied = harness.measure(lambda: target.copy_(values), device, 10)["seconds"]
    found = {"copy_gb_per_s": 2 * size / copied / 1e9}
    if ranks.size() > 1:
        for name, count in (("all_reduce", len(values)), ("all_reduce_1_mib", 1 << 18)):
            part = values[:count]
            took = harness.measure(lambda part=part: dist.all_reduce(part), device, 10)["seconds"]
            moved = 2 * (ranks.size() - 1) / ranks.size() * 4 * count
            found |= {f"{name}_gb_per_s": moved / took / 1e9, f"{name}_seconds": took}
    return found


class _Timed(Loop):
    """A loop that keeps the losses of its steps, and the time of each where asked to."""

    def __init__(self, device: torch.device, waits: bool = False):
        super().__init__(0, device)
        self.losses: list[torch.Tensor] = []
        self.times: list[float] = []
        self.waits = waits

    def count(self, stage, losses):
        if self.waits and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        self.losses.append(torch.as_tensor(losses["loss"]).detach().double().cpu())
        super().count(stage, losses)


def _slides(count: int, cells: int, width: int, device, dtype=torch.float32):
    """Embedded slides whose embedding tells the place of a cell, but for noise."""
    slides = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        pos = torch.randn(cells, 2, generator=generator, dtype=torch.float64)
        h = make_embedding(pos.float(), 0, device)[:, :width].to(dtype)
        slides.append(EmbeddedSlide(f"slide{number}", h.contiguous(), pos.to(device)))
    return slides


def _parts(config: RunConfig, width: int, device: torch.device, dtype=torch.float32) -> Trained:
    torch.manual_seed(0)
    gate, model = build_gate_and_model(config, width)
    return Trained(gate.to(device, dtype), model.to(device, dtype), config, device)


def equality(job: dict) -> dict:
    """Losses of gate and model: minisets and whole slides in turn, and one slide shared by rows.

    One rank in float32 does it thrice more, and adds cells and edges in another order each time:
    ``losses_spread`` is how far they lie apart.
    """
    common = ["train.gate_steps=10", "train.epochs=2", "train.steps_per_epoch=20"]
    common += ["train.patience=99", "train.lambda_long=0.1", "model.init=pca"]
    mixed = ["train.batch_kind=mixed", "train.batch_size=4", "train.slides_per_step=4"]
    one = ["train.batch_kind=slide", "train.slides_per_step=1", "train.minisets=1"]
    found = {}
    for name, settings, slides in (("losses", mixed, 4), ("losses_by_rows", one, 1)):
        config = load_config(overrides=[*common, *settings])
        found[name] = _losses(job, config, slides)
        if ranks.size() == 1 and job["precision"] == "float32":
            others = [_losses(job, config, slides, order) for order in (1, 2, 3)]
            found[f"{name}_spread"] = max(
                _farthest(a, b) for a, b in combinations([found[name], *others], 2)
            )
    return found


def _farthest(losses: list[float], others: list[float]) -> float:
    """The largest relative difference of a step's loss."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))


def _reorder(module: torch.nn.Module, seed: int) -> None:
    """Gate or model see cells, and the edges of each, in another order, and so add them in it."""
    forward, seen = module.forward, {}

    def orders(graph: NeighborTable) -> tuple:
        draw = torch.Generator().manual_seed(seed)
        sizes = graph.num_nodes, graph.k
        cells, slots = (torch.randperm(m, generator=draw).to(graph.device) for m in sizes)
        permuted = graph.permute(cells)
        other = replace(permuted, index=permuted.index[:, slots], _cache={})
        table = graph.to_table(torch.arange(graph.num_edges, device=graph.device))
        edges = other.from_table(table[cells][:, slots])
        return graph, other, cells, cells.argsort(), edges, edges.argsort()

    def reordered(h, graph: NeighborTable, generator=None, **given):
        if id(graph) not in seen:
            seen[id(graph)] = orders(graph)
        _, other, cells, cells_back, edges, edges_back = seen[id(graph)]
        if isinstance(module, EdgeGateSoft):
            return forward(h[cells], other)[edges_back]
        if module.training and given.get("noise") is None:
            given["noise"] = torch.empty_like(h[:, :2]).normal_(generator=generator)
        orders_of = {"noise": cells, "batch": cells, "initial": cells, "edge_bias": edges}
        for name, order in orders_of.items():
            if given.get(name) is not None:
                given[name] = given[name][order]
        return forward(h[cells], other, **given)[cells_back]

    module.forward = reordered


def _losses(job: dict, config: RunConfig, count: int, order: int = 0) -> list[float]:
    device, dtype = torch.device(job["device"]), getattr(torch, job["precision"])
    slides = _slides(count, job["n"], 64, device, dtype)
    parts = _parts(config, 64, device, dtype)
    for module in (parts.gate, parts.model) if order else ():
        _reorder(module, order)
    loop, batches = _Timed(device), Batches(slides, slides[:1], config, device)
    train_gate(parts, batches, loop)
    train_model(parts, batches, loop)
    return [float(loss) for loss in loop.losses]


def step_time(job: dict) -> dict:
    """Seconds of an optimiser step on whole slides, shared by slide; one is shared by rows."""
    device, steps = torch.device(job["device"]), job["steps"]
    settings = [
        "train.batch_kind=slide",
        f"train.slides_per_step={job['slides']}",
        f"train.steps_per_epoch={WARM + steps}",
        "train.epochs=1",
        "train.gate_steps=0",
        "train.warmup_epochs=0",
        "train.ramp_epochs=0",
        "train.minisets=1",
        "model.init=pca",
    ]
    return _timed_steps(job, load_config(overrides=[*settings, *job["settings"]]), device)


def _timed_steps(job: dict, config: RunConfig, device: torch.device) -> dict:
    began = time.perf_counter()
    slides = _slides(job["slides"], job["n"], job["width"], device)
    parts = _parts(config, job["width"], device)
    batches, loop = Batches(slides, [], config, device), _Timed(device, waits=True)
    prepared = time.perf_counter() - began
    if device.type == "cuda":
        prepared_gib = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    train_model(parts, batches, loop)
    times = torch.tensor(loop.times).diff()[WARM - 1 :]
    rows = next((b.rows for b in batches.whole.values() if b.rows is not None), None)
    found: dict = {} if rows is None else {"share_fetched": sum(rows.fetched) / rows.total}
    found |= {
        "seconds": float(times.median()),
        "seconds_spread": float(times.max() - times.min()) / 2,
        "seconds_to_prepare": prepared,
        "last_loss": float(loop.losses[-1]),
        "parameters": sum(p.numel() for p in parts.parameters()),
    }
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        found["peak_gib_to_prepare"] = prepared_gib
    return found


def memory(job: dict) -> dict:
    """Peak of host memory of the rank that holds most, in a short training on files of slides."""
    settings = [*BRIEF, f"train.device={torch.device(job['device']).type}"]
    config = load_config(overrides=settings)
    start = max(ranks.gathered(usage.host_memory()))
    slides = read_files(job["files"], config.data, require_pos=True, divided=True)
    fit(
        slides,
        [],
        config,
        Path(job["files"][0]).parent / f"run{ranks.size()}",
        device=job["device"],
    )
    peak = max(ranks.gathered(usage.host_peak()))
    return {"start_gib": start / 2**30, "host_peak_gib": peak / 2**30}


def halo(job: dict) -> dict:
    """Rows that a rank would fetch of one slide, for each row of its own, by number of ranks."""
    device, n = torch.device(job["device"]), job["n"]
    (slide,) = _slides(1, n, 128, device)
    graph, perm = knn_candidates(slide.h, 100), bisection_order(slide.h)
    found = {}
    for count in (2, 8, 16, 64):
        ends = [n * number // count for number in range(count + 1)]
        dealt = [dealt_rows(graph, perm, *ends[i : i + 2])[2] for i in range(count)]
        shares = [len(rows) * count / n for rows in dealt]
        found |= {f"{count}_ranks_mean": sum(shares) / count, f"{count}_ranks_most": max(shares)}
    return found


MEASURES: dict[str, Callable[[dict], dict]] = {
    "bandwidth": bandwidth,
    "equality": equality,
    "slides": step_time,
    "rows": step_time,
    "memory": memory,
    "halo": halo,
}


def _files(folder: Path, slides: int, cells: int) -> list[str]:
    """Files of random counts, 400 genes of 2,000 in a cell."""
    paths = [folder / f"slide{number}.h5ad" for number in range(slides)]
    for number, path in enumerate(paths):
        write_random(path, cells, 2_000, 0.2, number)
    return [*map(str, paths)]


def plan(
    sizes: list[int], counts: list[int], cells: int, device: str, settings: list[str]
) -> list[dict]:
    """All parts, each with a time limit in seconds."""
    jobs: list[dict] = [{"task": "bandwidth", "limit": 60}]
    small = {"task": "equality", "n": 1500 if device == "cuda" else 200, "limit": 100}
    jobs += [small | {"precision": "float64"}]
    steps = {"width": 128, "steps": 8, "settings": settings}
    limits = [max(150, n // 20_000) for n in sizes]  # seconds
    one = {"task": "rows", "slides": 1} | steps
    jobs += [one | {"n": n, "limit": limit} for n, limit in zip(sizes, limits, strict=True)]
    jobs += [{"task": "slides", "n": cells, "slides": SLIDES, "limit": 120} | steps]
    jobs += [small | {"precision": "float32", "limit": 150}]
    jobs += [{"task": "memory", "slides": 8, "n": 5_000, "limit": 150}]
    jobs += [{"task": "halo", "n": n, "limit": 600} for n in sizes]
    return [
        job | {"devices": n, "device": device}
        for job in jobs
        for n in (counts[:1] if job["task"] == "halo" else counts)
    ]


def run_job(job: dict, folder: Path) -> dict:
    """What every rank found: a part runs under torch's launcher, and is ended when it is late."""
    path = folder / "found.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m"]
    if job["devices"] > 1:
        command += ["torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={job['devices']}", "-m"]
    command += ["benchmarks.devices", "--job", json.dumps(job), "--out", str(path)]
    environment = os.environ | {ranks.TIME_LIMIT: str(job["limit"])}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // job["devices"])))
    run = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = run.communicate(timeout=job["limit"])
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, 9)
        said, _ = run.communicate()
        return {"failed": f"took more than {job['limit']} s", "said": said[-2000:]}
    if run.returncode or not path.is_file():
        return {"failed": f"exit code {run.returncode}", "said": said[:2000] + said[-1000:]}
    return json.loads(path.read_text())


def compare(rows: list[dict]) -> list[dict]:
    """Rows with how much faster they are than one device, or how far their losses are from its."""
    for row in rows:
        same = ("task", "n", "precision", "slides")
        first = next(one for one in rows if all(one.get(name) == row.get(name) for name in same))
        if "failed" in row or "failed" in first or first["devices"] != 1:
            continue
        if "losses" in row:
            for name in ("losses", "losses_by_rows"):
                own, one = ([*r[name]] for r in (row, first))
                row[f"{name}_differ"] = _farthest(own, one)
                early = [*range(5), *range(10, 15)]  # of the gate, and of both
                row[f"{name}_differ_in_first_5"] = _farthest(
                    *([r[i] for i in early] for r in (own, one))
                )
                if f"{name}_spread" in first:
                    row[f"{name}_spread_of_one_rank"] = first[f"{name}_spread"]
        elif "seconds" in row:
            row["times_faster"] = first["seconds"] / row["seconds"]
            row["loss_difference"] = abs(row["last_loss"] / first["last_loss"] - 1)
    return rows


def text(row: dict) -> str:
    """A row as a person reads it."""
    head = f"{row['task']:<10} {row['devices']} x"
    head += f" {row['slides']} x" if "slides" in row else ""
    head += f" {row['n']:,} cells" if "n" in row else ""
    head += f" {row['precision']}" if "precision" in row else ""
    if "failed" in row:
        return f"{head}: failed: {row['failed']}; {row.get('said', '')[-600:]}"
    known = {k: v for k, v in row.items() if isinstance(v, float)}
    return f"{head}: " + ", ".join(f"{name} {value:.4g}" for name, value in known.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", default="1,2", help="numbers of ranks, 1 first")
    parser.add_argument("--sizes", default="1000000", help="cells of one slide shared by rows")
    parser.add_argument("--cells", type=int, default=CELLS, help="of each of the 16 slides")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.5, help="of all parts together")
    parser.add_argument("--set", action="append", default=[], help="a setting of timed steps")
    parser.add_argument("--tasks", help="some of them, with commas between")
    parser.add_argument("--out", type=Path, default=Path("devices"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        job = json.loads(given.job)
        with ranks.joined(job["device"]) as device:
            found = MEASURES[job["task"]](job | {"device": device})
        if torch.device(device).type == "cuda":
            found["card"] = torch.cuda.get_device_name()
        if ranks.leads():
            write_json(given.out, found)
        ranks.leave()
        return
    began, rows = time.monotonic(), []
    given.out.mkdir(parents=True, exist_ok=True)
    counts, sizes = ([int(x) for x in text.split(",")] for text in (given.devices, given.sizes))
    jobs = plan(sizes, counts, given.cells, given.device, given.set)
    for job in (j for j in jobs if not given.tasks or j["task"] in given.tasks.split(",")):
        left = 60 * given.minutes - (time.monotonic() - began)
        job["limit"] = min(job["limit"], math.floor(left))
        with tempfile.TemporaryDirectory() as folder:
            if job["task"] == "memory":
                job["files"] = _files(Path(folder), job["slides"], job["n"])
            row = job | (run_job(job, Path(folder)) if left > 15 else {"failed": "no time left"})
        rows = compare([*rows, row])
        print(text(rows[-1]), flush=True)
        machine = harness.describe_machine(torch.device("cpu"))
        write_json(given.out / "devices.json", {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
