"""The fused CUDA kernels one by one, against the bandwidth of a copy on the same machine.

The table ``TASKS`` at the end of this file says what is measured. Kernel times are the profiler's
device times, medians over the repeats; bandwidth is the bytes that an edge must read and write,
without reuse, over that time. The check at small sizes also serves NVIDIA's compute-sanitizer:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck \
        python -m benchmarks --tasks check --sizes 150
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from ipar_sparse import ops
from ipar_sparse.graph import NeighborTable, knn
from ipar_sparse.graph.order import bisection_order, reorder, source_reuse
from ipar_sparse.supervision import build_target
from ipar_sparse.supervision.losses import rw_kl_loss

from . import harness

HEADS, CHANNELS, WIDTH, HIDDEN = 4, 32, 128, 64


@dataclass
class Inputs:
    """``n`` cells of ``k`` neighbours, made when they are first needed, and how they are timed."""

    n: int
    k: int
    dtype: torch.dtype
    device: torch.device
    repeats: int = 5
    tune: bool = False

    @cached_property
    def h(self) -> Tensor:
        """Embeddings (n, 128) of cells in no order: tissue position, type and state, mixed."""
        position = 4 * torch.rand(self.n, 2, device=self.device)
        kind = torch.randint(0, 20, (self.n,), device=self.device)
        state = 0.4 * self.normal(self.n, 6)
        latent = torch.cat([position, self.normal(20, 8)[kind], state], dim=1)
        mixed = torch.nn.functional.gelu(latent @ self.normal(16, 64) / 4)
        return mixed @ self.normal(64, WIDTH) / 8 + 0.015 * self.normal(self.n, WIDTH)

    @cached_property
    def graph(self) -> NeighborTable:
        """Their nearest neighbours."""
        return knn(self.h, self.k)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def describe(self, **more) -> dict:
        """Columns of a row."""
        return {"n": self.n, "k": self.k, "dtype": str(self.dtype).removeprefix("torch."), **more}

    def tiles(self, task: str) -> list[dict]:
        """The chosen tile of a kernel, and the others where they are asked for."""
        if task == "gate" and self.dtype != torch.float32:
            task = "half gate"
        return [{}, *(TUNINGS[task] if self.tune else ())]


@dataclass
class Case:
    """A fused operation: ``call(backend, *given)`` gives outputs, ``grads`` are theirs.

    The first ``frozen`` of what is given need no gradient.
    """

    call: Callable[..., tuple[Tensor, ...]]
    given: list[Tensor]
    grads: list[Tensor]
    frozen: int = 0

    def run(self, backend: str = "triton", dtype: torch.dtype | None = None) -> list[Tensor]:
        """Outputs and gradients, in the dtypes that were given or in another one."""
        given = [t.detach().to(dtype or t.dtype) for t in self.given]
        leaves = [t.requires_grad_() for t in given[self.frozen :]]
        out = self.call(backend, *given)
        grads = [grad.to(o.dtype) for grad, o in zip(self.grads, out, strict=True)]
        return [*out, *torch.autograd.grad(out, leaves, grads)]

    def error(self) -> float:
        """Largest relative error against the definition in float64; infinite if not repeatable."""
        got, again, want = self.run(), self.run(), self.run("reference", torch.float64)
        if not all(torch.equal(a, b) for a, b in zip(got, again, strict=True)):
            return math.inf
        # A gradient that vanishes in exact arithmetic (k = 1) is measured against 1e-3.
        return max(
            float((a - b).detach().norm() / b.detach().norm().clamp(min=1e-3 * b.numel() ** 0.5))
            for a, b in zip(got, want, strict=True)
        )


def attention_case(inputs: Inputs, graph: NeighborTable) -> Case:
    """Edge attention with a bias an edge."""
    n, dtype = graph.num_nodes, inputs.dtype
    qkv = inputs.normal(n, 3, HEADS, CHANNELS, dtype=dtype).unbind(1)
    given = [*qkv, inputs.normal(n, 2), inputs.normal(graph.num_edges)]
    grads = [inputs.normal(n, HEADS, CHANNELS, dtype=dtype), inputs.normal(n, HEADS, 2)]
    return Case(lambda to, *x: ops.edge_attention(*x, graph, backend=to)[:2], given, grads)


def gate_case(inputs: Inputs, graph: NeighborTable, frozen: bool) -> Case:
    """Edge gate, on embeddings that are frozen or trained."""
    sizes = [(HIDDEN, 4 * WIDTH), (HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN,), (1, HIDDEN), (1,)]
    scales = [(4 * WIDTH) ** -0.5, 0.1, HIDDEN**-0.5, 0.1, HIDDEN**-0.5, 1.0]
    weights = [scale * inputs.normal(*size) for scale, size in zip(scales, sizes, strict=True)]
    given = [inputs.normal(graph.num_nodes, WIDTH, dtype=inputs.dtype), *weights]
    grads = [inputs.normal(graph.num_edges)]
    return Case(lambda to, h, *w: (ops.edge_gate(h, graph, w, backend=to),), given, grads, frozen)


def check(inputs: Inputs) -> Iterator[dict]:
    """Largest relative error of outputs and gradients against the definition in float64.

    On at most 1,000 cells; also on padded tables, and where one cell is a neighbour of all.
    """
    sizes = ((33, 1), (33, 16), (min(inputs.n, 1000), min(inputs.k, 128)))
    tables = ("plain", "popular", "padded")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        small, errors = replace(inputs, dtype=dtype), []
        for (n, k), table in product(sizes, tables):
            index = torch.randint(0, n, (n, k), dtype=torch.int32)
            if table == "popular":
                index[:, ::2] = 0
            if table == "padded":
                index[torch.rand(n, k) < 0.3] = -1
            graph = NeighborTable(index, padded=table == "padded").to(inputs.device)
            cases = [gate_case(small, graph, frozen) for frozen in (True, False)]
            errors.append([case.error() for case in (attention_case(small, graph), *cases)])
        names = ("attention", "gate, frozen embeddings", "gate")
        for name, error in zip(names, map(max, zip(*errors, strict=True)), strict=True):
            yield {"kernel": name, "dtype": str(dtype), "error": error}


def attention(inputs: Inputs) -> Iterator[dict]:
    """Edge attention, forward and backward, on graphs of more and less locality."""
    n, k, row = inputs.n, inputs.k, HEADS * CHANNELS * inputs.dtype.itemsize
    # Per edge: two rows, a position, an index, a bias (and in the backward pass its gradient;
    # by source the destination's own values, a bias sector and a reverse-list entry).
    moved = {
        "forward_kernel": 2 * row + 16,
        "backward_dst_kernel": 2 * row + 20,
        "backward_src_kernel": 2 * row + 96 + 32 + 4,
    }
    index = inputs.graph.index
    local = reorder(NeighborTable(index), inputs.h)[0]
    graphs = {
        "random sources": NeighborTable(torch.randint_like(index, n)),
        "none": NeighborTable(index),
        "bisection, gathered": NeighborTable(local.index),
        "bisection": local,
    }
    for name, graph in graphs.items():
        case, reuse = attention_case(inputs, graph), source_reuse(graph)
        for tile in inputs.tiles("attention"):
            with tuned("attention", tile):
                times = harness.device_times(case.run, inputs.repeats)
            # Kernels of shared sources have the same names with a prefix.
            passes = {
                name: sum(ms for kernel, ms in times.items() if name in kernel) for name in moved
            }
            forward = passes["forward_kernel"]
            line = inputs.describe(order=name, reuse=reuse, **tile, forward_ms=forward)
            line["backward_ms"] = sum(times.values()) - forward
            for kernel, ms in passes.items():
                line[f"{kernel}_ms"] = ms
                line[f"{kernel}_tb_s"] = moved[kernel] * n * k / ms / 1e9
            yield line


def gate(inputs: Inputs) -> Iterator[dict]:
    """Edge gate, forward and backward, on embeddings that are frozen and that are trained."""
    graph = reorder(inputs.graph, inputs.h)[0]
    flops = graph.num_edges * 2 * HIDDEN * (2 * WIDTH + HIDDEN)
    for tile, frozen in product(inputs.tiles("gate"), (True, False)):
        line = inputs.describe(frozen=frozen, **tile)
        try:
            with tuned("gate", tile):
                case = gate_case(inputs, graph, frozen)
                times = harness.device_times(case.run, max(2, inputs.repeats // 2))
        except Exception as error:  # a tile too large for the chip is a result
            yield line | {"failed": str(error)[:80]}
            continue
        forward = times.pop("_forward_kernel")
        line |= {"forward_ms": forward, "forward_tflops": flops / forward / 1e9}
        for kernel in ("_backward_kernel", "_layers_kernel", "_sums_kernel"):
            if kernel in times:
                line[kernel.strip("_") + "_ms"] = times[kernel]
        yield line | {"backward_ms": sum(times.values())}


def walk(inputs: Inputs) -> Iterator[dict]:
    """The random-walk loss of 256 probe rows, forward and backward, on a sketched target."""
    target = build_target(torch.randn(inputs.n, 2), multiscale=False)
    pos = target.pos + 0.05 * torch.randn_like(target.pos)
    pos = pos.float().to(inputs.device).requires_grad_()
    walk = target.walk.to(inputs.device)
    generator = torch.Generator(inputs.device).manual_seed(0)

    def step():
        rw_kl_loss(pos, walk, 256, generator).backward()

    for tile in inputs.tiles("walk"):
        with tuned("walk", tile):
            times = harness.device_times(step, inputs.repeats)
            whole = harness.measure(step, inputs.device, inputs.repeats)
        kernels = {"forward": "_step_kernel", "backward": "_step_backward_kernel"}
        kernels = {f"{name}_ms": times[kernel] for name, kernel in kernels.items()}
        yield {"n": inputs.n, **tile, **kernels, **whole}


def order(inputs: Inputs) -> Iterator[dict]:
    """Time to find an order, and how often a row is used again within a tile, before and after."""
    time = harness.measure(lambda: bisection_order(inputs.h), inputs.device, inputs.repeats)
    moved, reuse = inputs.graph.permute(bisection_order(inputs.h)), {}
    for tile in (1024, 64):
        reuse[f"before_{tile}"] = source_reuse(inputs.graph, tile)
        reuse[f"reuse_{tile}"] = source_reuse(moved, tile)
    yield inputs.describe(**time, **reuse)


TUNINGS = {
    "attention": [{"R": 4}, *({"R": r, "maxnreg": m} for r, m in ((4, 64), (8, 128), (8, 96)))],
    "gate": [
        {"BLOCK": block, "num_warps": warps, "num_stages": stages}
        for (block, warps), stages in product(((64, 4), (32, 8), (16, 8), (128, 8)), (1, 2, 3))
    ],
    "half gate": [
        {"STAGES": 3},
        {"num_warps": 8, "share": 1},
        {"maxnreg": 168, "share": 3},
    ],
    "walk": [{"walks": walks} for walks in (16, 32, 64)],
}
"""Tiles beside the chosen ones: edges in flight a warp, edges a program, walks carried at once."""


def tuned(task: str, tile: dict):
    """A context in which a kernel is launched with another tile."""
    from ipar_sparse.ops import triton_attention, triton_gate, triton_gate_half, triton_walk

    shape_of, gate_tile = triton_attention._Shape.of, triton_gate._tile
    half = {kernel: given | tile for kernel, given in triton_gate_half._TILES.items()}

    def changed(*given):
        shape = shape_of(*given)
        shape.tile.update(tile)
        return shape

    changes = {
        "attention": (triton_attention._Shape, "of", changed),
        "gate": (triton_gate, "_tile", lambda *x, **named: gate_tile(*x, **named) | tile),
        "walk": (triton_walk, "_width", lambda *_: tile["walks"]),
    }
    if task == "gate" and "num_stages" not in tile:
        changes[task] = (triton_gate_half, "_TILES", half)
    return patch.object(*changes[task]) if tile else nullcontext()


TASKS = {"check": check, "order": order, "attention": attention, "gate": gate, "walk": walk}


def run(
    tasks: list[str],
    sizes: list[int],
    out: Path,
    device: torch.device,
    precision: str = "bfloat16",
    tune: bool = False,
    k: int = 100,
    repeats: int = 5,
) -> None:
    """Times kernels one by one at every size; writes ``kernels.json``.

    ``precision`` is that of embeddings, queries, keys and values; ``tune`` adds other tile sizes.

    Raises:
        ValueError: an unknown task or precision, or no CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(f"kernels run on a CUDA device, not on {device}")
    harness.check_names("task", tasks, TASKS)
    harness.check_names("precision", [precision], harness.PRECISIONS)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.manual_seed(0)
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    record = harness.Record(out / "kernels.json", device)
    for n in sizes:
        inputs = Inputs(n, k, dtype, device, repeats, tune)
        for task in tasks:
            for row in TASKS[task](inputs):
                record.add({"task": task, **row})
