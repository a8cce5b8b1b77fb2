"""One measurement in a process of its own: prints one line of JSON."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time

import torch

from ipar_sparse import EdgeGateSoft, IPALiteModel
from ipar_sparse.losses import gate_loss, geometry_terms
from ipar_sparse.targets import build_target, gate_target

from .compare import load_graph
from .dense import DenseGate, DenseModel, dense_mask

BETA = 2.0
_ENOUGH_SECONDS = 20.0  # of repeats; slow cases are timed fewer times


def main() -> None:
    implementation, work, path, device, precision, repeats = sys.argv[1:]
    device = torch.device(device)
    saved = torch.load(path, weights_only=True)
    torch.manual_seed(saved["seed"])
    try:
        call = prepare(implementation, work, saved, device, precision)
        result = measure(call, device, int(repeats))
    except torch.cuda.OutOfMemoryError:
        result = {"failed": "out of memory"}
    print(json.dumps(result))


def prepare(implementation: str, work: str, saved: dict, device, precision: str):
    """The function to time; all its inputs lie on the device already."""
    graph, h = load_graph(saved, device), saved["h"].to(device)
    width = h.size(1)
    if implementation == "dense":
        gate, model, mask = DenseGate(width), DenseModel(width), dense_mask(graph)
        forward = lambda: model(h, mask, BETA * gate(h))  # noqa: E731
    else:
        backend = {"pyg": "reference"}.get(implementation, implementation)
        gate = EdgeGateSoft(width, backend=backend)
        model = IPALiteModel(width, init_noise=0.0, backend=backend)
        edges = graph.edge_index if implementation == "pyg" else graph
        forward = lambda: model(h, edges, edge_bias=BETA * gate(h, edges))  # noqa: E731
    gate.to(device), model.to(device)
    parameters = [*gate.parameters(), *model.parameters()]
    with torch.no_grad():  # a fresh model does not move: its gradients would be zeros
        for parameter in model.blocks.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    half = precision != "float32"
    kind = getattr(torch, precision)

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

    if work == "forward":
        return run_forward
    if work == "backward":
        return run_backward
    if implementation == "dense":
        raise ValueError("the dense form has no whole-slide step")
    target = build_target(saved["pos"])
    probability = gate_target(graph.to("cpu"), target.walk).float().to(device)
    target = target.to(device)
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
