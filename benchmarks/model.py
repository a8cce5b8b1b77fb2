"""Time and peak memory of gate and five recycles, dense against sparse.

Before an implementation is timed, its positions of 60 cells are compared with the dense form's.
Effective bandwidth counts what the fused form has to move (:func:`traffic`), whatever an
implementation does move.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ipar_sparse.graph import NeighborTable, knn
from ipar_sparse.graph.order import reorder
from ipar_sparse.nn import EdgeGateSoft, IPALiteModel
from ipar_sparse.supervision import build_target, gate_loss, gate_target, geometry_terms

from . import harness
from .dense import DenseGate, DenseModel, dense_mask

TASKS = {
    "forward": "gate and five recycles, no gradients",
    "backward": "forward and backward",
    "step": "a training step on a slide: forward, losses, backward, optimiser",
}
IMPLEMENTATIONS = {
    "dense": "n x n tensors: every pair has gate features and logits",
    "pyg": "plain message passing: every edge has gate features, keys and values",
    "chunked": "blocks of rows, recomputed in the backward pass",
    "triton": "fused CUDA kernels",
    "triton-graph": "the same, replayed as one CUDA graph",
    "triton-checkpoint": "the same, most of a recycle made again in the backward pass",
    "triton-ordered": "the same, cells visited in an order in which neighbours are close",
    "triton-local": "the same, cells stored in that order",
}
CHANNELS, BETA = 128, 2.0
_LOSSES = {"rw_kl": 0.3, "stress_log": 0.1, "repulsion": 0.01, "entropy_reg": 0.01}
_BYTES = {"dense": 4000, "pyg": 8000}  # a pair or edge, before anything is measured
_KNN_LIMIT = 2_000_000  # beyond, neighbours are drawn near by instead of searched for


def run(
    sizes: list[int],
    out: Path,
    device: torch.device | str = "cpu",
    *,
    k: int = 100,
    implementations: list[str] | None = None,
    tasks: list[str] | None = None,
    precision: str = "float32",
    repeats: int = 5,
    seed: int = 0,
    train_up_to: int = 2_000_000,
    patience: float = 60.0,
) -> list[dict]:
    """Measures every implementation at every size; writes ``benchmark.json`` and ``.png``.

    Args:
        sizes: numbers of cells.
        out: folder of the files.
        device: cpu or cuda.
        k: candidates of a cell.
        implementations: of ``IMPLEMENTATIONS``; by default the plain ones that the device can run.
        tasks: of ``TASKS``; by default forward and backward.
        precision: float32, tf32 (float32 with products in TF32), bfloat16 or float16 (autocast).
        repeats: timed calls; the median counts.
        seed: of embeddings and weights.
        train_up_to: largest size at which more than the forward pass is measured.
        patience: seconds that one call may be expected to take.

    Raises:
        ValueError: an unknown implementation, task or precision.
    """
    device = torch.device(device)
    fused = ["triton"] if device.type == "cuda" else []
    implementations = list(implementations or ["dense", "pyg", "chunked", *fused])
    tasks = list(tasks or ["forward", "backward"])
    harness.check_names("implementation", implementations, IMPLEMENTATIONS)
    harness.check_names("task", tasks, TASKS)
    harness.check_names("precision", [precision], harness.PRECISIONS)
    given = {"k": k, "device": str(device), "precision": precision, "repeats": repeats}
    jobs = [
        {"implementation": implementation, "task": task, "n": n, **given, "seed": seed}
        for n in sorted(sizes)
        for implementation in implementations
        for task in tasks
        # losses of a whole slide are sparse, and draw from a generator
        if not (task == "step" and implementation in ("dense", "triton-graph"))
    ]
    for job in jobs:
        if job["task"] != "forward" and job["n"] > train_up_to:
            job["skipped"] = f"beyond {train_up_to:,} cells only forward is measured"
    benchmark = harness.Benchmark(
        name="benchmark",
        title=f"Gate and five recycles, k = {k}, {precision}",
        measure=measure,
        work=count_edges,
        memory=lambda job: count_edges(job) * _BYTES.get(job["implementation"], 240),
        rates=rates,
    )
    return harness.run(benchmark, jobs, Path(out), device, patience)


def count_edges(job: dict) -> int:
    """Pairs or edges that an implementation goes through."""
    return job["n"] ** 2 if job["implementation"] == "dense" else job["n"] * job["k"]


def traffic(task: str, n: int, k: int, precision: str) -> int:
    """Bytes that gate and five recycles must gather over all edges, each row read every time.

    Forward a recycle reads a key and a value row, a position, an index and a bias an edge; its
    backward pass the rows twice (by destination and by source) and the gradient and bias of each
    edge. The gate reads an embedding row an edge, once more in the backward pass.
    """
    row = CHANNELS * (2 if precision in ("bfloat16", "float16") else 4)
    forward = 5 * (2 * row + 16) + row + 8
    backward = 5 * (2 * row + 20 + 2 * row + 132) + row + 12
    return n * k * (forward if task == "forward" else forward + backward)


def rates(row: dict) -> dict:
    """Edges a second, and effective bandwidth in TB/s."""
    moved = traffic(row["task"], row["n"], row["k"], row["precision"])
    edges = row["n"] * row["k"] / row["seconds"]
    return {"edges_per_s": edges, "tb_per_s": moved / row["seconds"] / 1e12}


def make_problem(n: int, k: int, seed: int, device) -> dict:
    """Positions ``pos`` of cells in no order, their embeddings ``h`` and neighbours ``index``."""
    pos = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    h = make_embedding(pos, seed, device)
    if n <= _KNN_LIMIT:
        return {"h": h, "index": knn(h, k).index, "pos": pos}
    generator = torch.Generator(device).manual_seed(seed)
    index = torch.empty(n, k, dtype=torch.int32, device=device)
    for own, part in zip(torch.arange(n).split(1 << 20), index.split(1 << 20), strict=True):
        shift = torch.randint(1, 1000, part.shape, generator=generator, device=device)
        part.copy_((own.to(device).unsqueeze(1) + shift) % n)
    return {"h": h, "index": index, "pos": pos}


def make_embedding(pos: Tensor, seed: int, device) -> Tensor:
    """A smooth random map of 2D positions into 128 dimensions, plus noise.

    So the candidate graph has the locality and the popular nodes of a real one.
    """
    generator = torch.Generator(device).manual_seed(seed)
    wave = torch.randn(2, CHANNELS, generator=generator, device=device)
    phase = 6.28 * torch.rand(CHANNELS, generator=generator, device=device)
    h = torch.empty(len(pos), CHANNELS, device=device)
    for rows, part in zip(pos.split(1 << 20), h.split(1 << 20), strict=True):
        part.normal_(generator=generator).mul_(0.3)
        part += torch.cos(rows.to(device) @ wave * 2 + phase)
    return h


_kept: dict = {}  # the last problem that this process made


def load_problem(job: dict) -> dict:
    """The problem of a job, kept for the next job of its size."""
    name = job["n"], job["k"], job["seed"], job["device"]
    if _kept.get("name") != name:
        _kept.clear()  # before the next one takes its place
        _kept.update(name=name, problem=make_problem(*name))
    return _kept["problem"]


def measure(job: dict) -> dict:
    """Time and memory of a job, once its implementation has proved to be right."""
    device, implementation = torch.device(job["device"]), job["implementation"]
    torch.set_float32_matmul_precision("highest")
    problem = load_problem(job)
    torch.manual_seed(job["seed"])
    if job["precision"] == "tf32":
        torch.set_float32_matmul_precision("high")
    error = deviation(implementation, job["precision"], device)
    if not error <= (1e-3 if job["precision"] == "float32" else 0.1):
        return {"failed": f"positions differ from the dense form's by {error:.2g} tissue radii"}
    graph, h = NeighborTable(problem["index"]).to(device), problem["h"].to(device)
    if implementation in ("triton-ordered", "triton-local"):
        local, perm, _ = reorder(graph, h)  # kept with the graph, which is then visited so
        graph, h = (local, h[perm]) if implementation == "triton-local" else (graph, h)
    layout = Layout(implementation, job["precision"], graph, h)
    call = layout.backward if job["task"] == "backward" else layout.forward
    if job["task"] == "step":
        call = layout.training_step(*supervision(problem, graph))
    if implementation == "triton-graph":
        call = recorded(call)
    return harness.measure(call, device, job["repeats"]) | {"deviation": error}


def deviation(implementation: str, precision: str, device: torch.device) -> float:
    """Largest difference from the dense form's positions of 60 cells, in tissue radii."""
    problem = make_problem(60, 16, 0, device)
    graph, h = NeighborTable(problem["index"]), problem["h"]
    reference = Layout("dense", "float32", graph, h)
    layout = Layout(implementation, precision, graph, h)
    layout.gate.load_state_dict(reference.gate.state_dict())
    layout.model.load_state_dict(reference.model.state_dict())
    return float((layout.forward() - reference.forward()).abs().max())


def supervision(problem: dict, graph: NeighborTable) -> tuple:
    """Target of a slide and of its gate; kept with the problem for the next implementation."""
    if "step" not in problem:
        target = build_target(problem["pos"], multiscale=False).to(graph.device)
        problem["step"] = target, gate_target(graph, target.walk).float()
    return problem["step"]


class Layout:
    """Gate and model in one implementation, on a graph and embeddings ``h`` (n, 128)."""

    def __init__(self, implementation: str, precision: str, graph: NeighborTable, h: Tensor):
        implementation, _, mode = implementation.partition("-")
        self.h, self.graph = h, graph
        if implementation == "dense":
            self.gate, self.model = DenseGate(CHANNELS), DenseModel(CHANNELS)
            self.edges, self.scored = dense_mask(graph), ()  # the gate scores all pairs
        else:
            backend = "reference" if implementation == "pyg" else implementation
            self.gate = EdgeGateSoft(CHANNELS, backend=backend)
            again = mode == "checkpoint"
            self.model = IPALiteModel(CHANNELS, backend=backend, checkpoint_recycles=again)
            self.edges = graph.edge_index if implementation == "pyg" else graph
            self.scored = (self.edges,)
        modules = nn.ModuleList([self.gate, self.model]).to(h.device).eval()  # eval: no noise
        self.parameters = list(modules.parameters())
        with torch.no_grad():  # a fresh model does not move: its gradients would be zeros
            for parameter in self.model.blocks.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        half = precision in ("bfloat16", "float16")
        kind = getattr(torch, precision) if half else None
        self.autocast = partial(torch.autocast, h.device.type, dtype=kind, enabled=half)
        self.weight = torch.linspace(-1, 1, 2 * len(h), device=h.device).view(-1, 2)

    def place(self) -> tuple[Tensor, Tensor]:
        """Positions (n, 2) and gate logits."""
        with self.autocast():
            logits = self.gate(self.h, *self.scored)
            return self.model(self.h, self.edges, BETA * logits), logits

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Positions (n, 2), no gradients."""
        return self.place()[0]

    def backward(self) -> None:
        """Gradients of a weighted sum of positions."""
        for parameter in self.parameters:
            parameter.grad = None
        (self.place()[0] * self.weight).sum().backward()

    def training_step(self, target, probability: Tensor):
        """A call that takes one optimiser step on the losses of a slide."""
        optimizer = torch.optim.AdamW(self.parameters, lr=5e-4)
        generator = torch.Generator(self.h.device).manual_seed(0)
        drawn = {"probe_rows": 256, "stress_pairs": 200_000, "generator": generator}

        def step():
            optimizer.zero_grad(set_to_none=True)
            pos, logits = self.place()
            terms = geometry_terms(pos, target, _LOSSES, **drawn)
            loss = sum(weight * terms[name] for name, weight in _LOSSES.items())
            loss = loss + 0.05 * gate_loss(logits.float(), self.graph, probability=probability)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()

        return step


def recorded(call):
    """The kernels of a call as one CUDA graph, recorded at the first call and then replayed.

    So the graph's own memory counts.
    """

    @cache
    def graph() -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and fills the caches
                call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            call()
        return graph

    return lambda: graph().replay()
