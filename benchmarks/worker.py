"""Measurements in a process of their own: a line of JSON in, a line of JSON out."""

from __future__ import annotations

import gc
import json
import resource
import statistics
import sys
import time

import torch

from ipar_sparse import EdgeGateSoft, IPALiteModel
from ipar_sparse.supervision.losses import gate_loss, geometry_terms
from ipar_sparse.supervision.targets import build_target, gate_target

from .compare import load_graph, make_problem
from .dense import DenseGate, DenseModel, dense_mask

BETA = 2.0
_ENOUGH_SECONDS = 20.0  # of repeats; slow cases are timed fewer times


def main() -> None:
    """Take measurements from standard input, one JSON object a line, and answer in kind."""
    problem, name = None, None
    for line in sys.stdin:
        job = json.loads(line)
        device = torch.device(job["device"])
        if name != (job["n"], job["k"], job["seed"]):
            problem = None  # before the next one takes its place
            name = (job["n"], job["k"], job["seed"])
            problem = load_problem(job)
        torch.manual_seed(job["seed"])
        tf32 = "high" if job["precision"] == "tf32" else "highest"
        torch.set_float32_matmul_precision(tf32)
        try:
            call = prepare(job, problem, device)
            result = measure(call, device, job["repeats"])
        except torch.cuda.OutOfMemoryError:
            result = {"failed": "out of memory"}
        call = None
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        print(json.dumps(result), flush=True)


def load_problem(job: dict) -> dict:
    """The problem of a file, or, made on the device, the same kind of problem."""
    if job["data"] is not None:
        return torch.load(job["data"], weights_only=True)
    return make_problem(job["n"], job["k"], job["seed"], job["device"])


def prepare(job: dict, saved: dict, device):
    """The function to time; all its inputs lie on the device already."""
    implementation, work, precision = (job[key] for key in ("implementation", "work", "precision"))
    implementation, _, mode = implementation.partition("-")
    graph, h = load_graph(saved, device), saved["h"].to(device)
    width = h.size(1)
    if implementation == "dense":
        gate, model, mask = DenseGate(width), DenseModel(width), dense_mask(graph)
        forward = lambda: model(h, mask, BETA * gate(h))  # noqa: E731
    else:
        backend = {"pyg": "reference"}.get(implementation, implementation)
        gate = EdgeGateSoft(width, backend=backend)
        model = IPALiteModel(
            width, init_noise=0.0, backend=backend, checkpoint_recycles=mode == "checkpoint"
        )
        edges = graph.edge_index if implementation == "pyg" else graph
        forward = lambda: model(h, edges, edge_bias=BETA * gate(h, edges))  # noqa: E731
    gate.to(device), model.to(device)
    parameters = [*gate.parameters(), *model.parameters()]
    with torch.no_grad():  # a fresh model does not move: its gradients would be zeros
        for parameter in model.blocks.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    half = precision in ("bfloat16", "float16")
    kind = getattr(torch, precision) if half else None

    def run_forward():
        with torch.no_grad(), torch.autocast(device.type, dtype=kind, enabled=half):
            forward()

    weigh = torch.linspace(-1, 1, 2 * len(h), device=device).view(-1, 2)

    def run_backward():
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast(device.type, dtype=kind, enabled=half):
            pos = forward()
        (pos * weigh).sum().backward()

    if work in ("forward", "backward"):
        run = run_forward if work == "forward" else run_backward
        return recorded(run) if mode == "graph" else run
    if implementation == "dense":
        raise ValueError("the dense form has no whole-slide step")
    if "step" not in saved:  # kept for the other implementations
        target = torch.load(job["target"], weights_only=False) if job["target"] else None
        target = (target or build_target(saved["pos"], multiscale=False)).to(device)
        saved["step"] = target, gate_target(graph, target.walk).float()
    target, probability = saved["step"]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4)
    generator = torch.Generator(device).manual_seed(0)
    weights = {"rw_kl": 0.3, "stress_log": 0.1, "repulsion": 0.01, "entropy_reg": 0.01}

    def run_step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=kind, enabled=half):
            logits = gate(h, edges)
            pos = model(h, edges, edge_bias=BETA * logits)
        terms = geometry_terms(
            pos, target, weights, probe_rows=256, stress_pairs=200_000, generator=generator
        )
        loss = sum(weight * terms[name] for name, weight in weights.items())
        loss = loss + 0.05 * gate_loss(logits.float(), graph, probability=probability)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return run_step


def recorded(call):
    """The call's kernels as one CUDA graph, recorded at the first call and replayed at others."""
    graph = torch.cuda.CUDAGraph()

    def record():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and fills the caches
                call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    replay = None

    def run():
        nonlocal replay
        replay = replay or record()
        replay()

    return run


def measure(call, device: torch.device, repeats: int) -> dict:
    """Median and spread of the time of a call, and the memory it took beyond its inputs."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    times: list[float] = []
    while len(times) <= repeats and (len(times) < 2 or sum(times) < _ENOUGH_SECONDS):
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    timed = times[1:]  # the first call warms up
    if cuda:
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {
        "seconds": statistics.median(timed),
        "seconds_spread": (max(timed) - min(timed)) / 2,
        "repeats_done": len(timed),
        "peak_bytes": peak,
    }


if __name__ == "__main__":
    main()
