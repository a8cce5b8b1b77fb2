"""Time the fused CUDA kernels one by one, against the machine's own copy bandwidth.

    python -m benchmarks.kernels --n 1000000 --out kernels.json

Sections: ``check`` (against float64), ``attention``, ``gate``, ``order``, ``model``,
``inference``, ``walk``.
Kernel times are the profiler's device times, medians over the repeats; bandwidth is the bytes an
edge must read and write, without reuse, over that time.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections import defaultdict

import torch
from torch import Tensor

from ipar_sparse import ops
from ipar_sparse.graph import NeighborTable, knn
from ipar_sparse.graph.order import bisection_order, kmeans_order, reorder, source_reuse
from ipar_sparse.ops import reference

HEADS, CHANNELS, WIDTH, HIDDEN = 4, 32, 128, 64


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sections", default="check,attention,gate,order,model")
    parser.add_argument("--sizes", default="40000,1000000", help="of the model section")
    parser.add_argument("--tune", action="store_true", help="also time other tile sizes")
    parser.add_argument("--matmul", default="highest", help="torch's float32 matmul precision")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("kernels: no CUDA device")
    torch.set_float32_matmul_precision(args.matmul)
    bench = Bench(args)
    for section in args.sections.split(","):
        start = time.time()
        getattr(bench, section)()
        print(f"-- {section}: {time.time() - start:.0f} s", flush=True)
        if args.out:
            bench.save(args.out)


class Bench:
    def __init__(self, args):
        self.args = args
        self.dtype = getattr(torch, args.dtype)
        self.rows: list[dict] = []
        self.graphs: dict[str, NeighborTable] = {}
        self.machine = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "copy_tb_per_s": copy_bandwidth(),
        }
        print(self.machine, flush=True)

    def save(self, path):
        with open(path, "w") as file:
            json.dump({"machine": self.machine, "rows": self.rows}, file, indent=1)

    def row(self, **values):
        self.rows.append(values)
        parts = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
        print(" ".join(parts), flush=True)

    def graph(self, name: str) -> NeighborTable:
        """``random`` sources, ``shuffled``: the kNN of cells in no order, or an order of that."""
        if name not in self.graphs:
            n, k = self.args.n, self.args.k
            if name == "random":
                generator = torch.Generator("cuda").manual_seed(0)
                index = torch.randint(
                    0, n, (n, k), dtype=torch.int32, device="cuda", generator=generator
                )
                self.graphs[name] = NeighborTable(index)
            elif name == "shuffled":
                self.h = cells(n)
                torch.cuda.synchronize()
                start = time.time()
                self.graphs[name] = knn(self.h, k)
                torch.cuda.synchronize()
                self.row(section="knn", n=n, k=k, seconds=time.time() - start)
            elif name == "bisection":
                self.graphs[name] = reorder(self.graph("shuffled"), self.h)[0]
            elif name == "kmeans":
                graph = self.graph("shuffled")
                self.graphs[name] = graph.permute(kmeans_order(self.h))
        return self.graphs[name]

    def check(self):
        """Largest relative error of outputs and gradients against float64, by dtype."""
        worst = defaultdict(float)
        cases = [
            (n, k, heads, channels, bias)
            for n in (1, 33, 1000)
            for k in (1, 16, 100, 128)
            for heads, channels, bias in (
                *((4, 32, kind) for kind in ("none", "shared", "heads", "extreme")),
                (3, 16, "heads"),
                (2, 64, "shared"),
            )
        ]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for number, case in enumerate(cases):
                error = attention_error(*case, dtype, seed=number)
                worst[f"attention {dtype}"] = max(worst[f"attention {dtype}"], error)
            for n, k, width, outputs in ((1, 1, 16, 1), (500, 100, 128, 1), (300, 17, 30, 4)):
                error = gate_error(n, k, width, outputs, dtype)
                worst[f"gate {dtype}"] = max(worst[f"gate {dtype}"], error)
        for what, error in worst.items():
            self.row(section="check", what=what, error=error)

    def attention(self):
        n, k, size = self.args.n, self.args.k, self.dtype.itemsize
        row = HEADS * CHANNELS * size
        # Per edge: two rows, a position, an index, a bias (and in the backward pass its gradient;
        # by source the destination's own values, a bias sector and a reverse-list entry).
        moved = {
            "_forward_kernel": 2 * row + 16,
            "_backward_dst_kernel": 2 * row + 20,
            "_backward_src_kernel": 2 * row + 96 + 32 + 4,
        }
        for name in ("random", "shuffled", "bisection", "kmeans"):
            graph = self.graph(name)
            q, key, v = self.packed(n)
            x = torch.randn(n, 2, device="cuda")
            bias = torch.randn(graph.num_edges, device="cuda")
            leaves = [t.requires_grad_() for t in (q, key, v, x, bias)]
            weights = torch.randn(n, HEADS, CHANNELS, device="cuda", dtype=self.dtype)
            weights = weights, torch.randn(n, HEADS, 2, device="cuda")

            def step(leaves=leaves, graph=graph, weights=weights):
                out, displacement, _ = ops.edge_attention(*leaves, graph, backend="triton")
                torch.autograd.grad((out, displacement), leaves, weights)

            reuse = source_reuse(graph)
            for variant in self.variants():
                times = kernel_times(step, self.args.repeats)
                line = {"section": "attention", "order": name, "dtype": self.args.dtype, "n": n}
                line |= {"k": k, "reuse": reuse, **variant}
                for kernel, per_edge in moved.items():
                    line[kernel.strip("_") + "_ms"] = times[kernel]
                    line[kernel.strip("_") + "_tb_s"] = per_edge * n * k / times[kernel] / 1e9
                line["forward_ms"] = times["_forward_kernel"]
                line["backward_ms"] = sum(times.values()) - times["_forward_kernel"]
                self.row(**line)

    def variants(self):
        from ipar_sparse.ops import triton_attention

        yield {}
        if self.args.tune:
            tile = triton_attention._Shape.of
            for depth, registers in ((4, None), (4, 64), (8, 128), (8, 96), (2, None)):

                def changed(q, bias, depth=depth, registers=registers):
                    triton_attention._DEPTH = depth
                    shape = tile(q, bias)
                    if registers:
                        shape.tile["maxnreg"] = registers
                    return shape

                triton_attention._Shape.of = changed
                yield {"depth": depth, "maxnreg": registers or 0}
            triton_attention._Shape.of, triton_attention._DEPTH = tile, 8

    def inference(self):
        """Gate and recycles without gradients at ten million cells, on a local table."""
        from ipar_sparse.nn import EdgeGateSoft, IPALiteModel

        n, k = 10_000_000, self.args.k
        table = torch.empty(n, k, dtype=torch.int32, device="cuda")
        for start in range(0, n, 1 << 20):
            rows = torch.arange(start, min(n, start + (1 << 20)), device="cuda").unsqueeze(-1)
            away = torch.randint(1, 2000, (rows.numel(), k), device="cuda")
            table[start : start + rows.numel()] = ((rows + away) % n).int()
        graph = NeighborTable(table)
        gate, model = EdgeGateSoft(WIDTH).cuda().eval(), IPALiteModel(WIDTH).cuda().eval()
        h = torch.randn(n, WIDTH, device="cuda", dtype=torch.bfloat16)

        def step():
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                model(h, graph, 2.0 * gate(h, graph))

        self.row(
            section="inference",
            n=n,
            k=k,
            milliseconds=wall_time(step, 2),
            peak_gib=torch.cuda.max_memory_allocated() / 2**30,
        )

    def packed(self, n):
        qkv = torch.randn(n, 3, HEADS, CHANNELS, device="cuda", dtype=self.dtype)
        return (t.detach() for t in qkv.unbind(1))

    def gate(self):
        from ipar_sparse.ops import triton_gate

        n, k = self.args.n, self.args.k
        graph = self.graph("bisection" if "shuffled" in self.graphs else "random")
        h = torch.randn(n, WIDTH, device="cuda", dtype=self.dtype)
        weights = [w.requires_grad_() for w in gate_weights(WIDTH, 1, "cuda", torch.float32)]
        grad = torch.randn(graph.num_edges, device="cuda")
        default = triton_gate._tile
        tiles = [None]
        if self.args.tune:
            tiles += [(64, 4, 1), (64, 4, 2), (64, 4, 4), (32, 8, 1), (32, 8, 2), (32, 8, 3)]
            tiles += [(16, 8, 1), (16, 8, 3), (128, 8, 1)]
        for tile in tiles:

            def chosen(dtype, tile=tile, **options):
                if tile is None:
                    return default(dtype, **options)
                names = ("BLOCK", "num_warps", "num_stages")
                return {**default(dtype, **options), **dict(zip(names, tile, strict=True))}

            triton_gate._tile = chosen
            for frozen in (True, False):
                leaves = [*weights] if frozen else [h.requires_grad_(), *weights]
                embedding = h.detach() if frozen else h

                def step(embedding=embedding, leaves=leaves):
                    logits = ops.edge_gate(embedding, graph, tuple(weights), backend="triton")
                    torch.autograd.grad(logits, leaves, grad)

                try:
                    times = kernel_times(step, max(2, self.args.repeats // 2))
                except Exception as error:  # a tile too large for the chip is a result
                    self.row(section="gate", tile=tile, frozen=frozen, error=str(error)[:80])
                    continue
                forward = times.pop("_forward_kernel")
                self.row(
                    section="gate",
                    dtype=self.args.dtype,
                    n=n,
                    k=k,
                    frozen=frozen,
                    tile=tile or "default",
                    forward_ms=forward,
                    forward_tflops=n * k * 2 * HIDDEN * (2 * WIDTH + HIDDEN) / forward / 1e9,
                    kernel_ms=times["_backward_kernel"],
                    backward_ms=sum(times.values()),
                )
        triton_gate._tile = default

    def walk(self):
        """The random-walk loss of 256 probe rows, forward and backward, on a sketched target."""
        from ipar_sparse.ops import triton_walk
        from ipar_sparse.supervision.losses import rw_kl_loss
        from ipar_sparse.supervision.targets import build_target

        n = self.args.n
        target = build_target(torch.randn(n, 2), multiscale=False)
        pos = (target.pos + 0.05 * torch.randn_like(target.pos)).float().cuda().requires_grad_()
        walk = target.walk.to("cuda")
        generator = torch.Generator("cuda").manual_seed(0)

        def step():
            rw_kl_loss(pos, walk, 256, generator).backward()

        width, order = triton_walk._width, triton_walk._order
        orders = {"spatial": order}
        if self.args.tune:
            orders["given"] = lambda walk: torch.arange(n, device="cuda", dtype=torch.int32)
        for walks in (None, 16, 32, 64) if self.args.tune else (None,):
            triton_walk._width = width if walks is None else (lambda *_, walks=walks: walks)
            for name, triton_walk._order in orders.items():
                times = kernel_times(step, self.args.repeats, total=True)
                self.row(
                    section="walk",
                    n=n,
                    walks=walks or "default",
                    rows=name,
                    forward_ms=times["_step_kernel"],
                    backward_ms=times["_step_backward_kernel"],
                    milliseconds=wall_time(step, self.args.repeats),
                    peak_gib=torch.cuda.max_memory_allocated() / 2**30,
                )
        triton_walk._width, triton_walk._order = width, order

    def order(self):
        graph = self.graph("shuffled")
        for name, find in (("bisection", bisection_order), ("kmeans", kmeans_order)):
            find(self.h)
            torch.cuda.synchronize()
            start = time.time()
            perm = find(self.h)
            torch.cuda.synchronize()
            seconds = time.time() - start
            moved = graph.permute(perm)
            self.row(
                section="order",
                method=name,
                n=self.args.n,
                seconds=seconds,
                reuse_1024=source_reuse(moved),
                reuse_64=source_reuse(moved, 64),
                before_1024=source_reuse(graph),
                before_64=source_reuse(graph, 64),
            )

    def model(self):
        """Gate and recycles, forward and backward, as a user calls them."""
        from ipar_sparse.nn import EdgeGateSoft, IPALiteModel

        for n in map(int, self.args.sizes.split(",")):
            self.args.n = n
            self.graphs.pop("shuffled", None)
            graph, h = self.graph("shuffled"), self.h
            tables = {"user": NeighborTable(graph.index), "reordered": graph}
            order, perm, _ = reorder(graph, h)
            tables["local"] = order
            gate, model = EdgeGateSoft(WIDTH).cuda(), IPALiteModel(WIDTH).cuda()
            for module in (*model.blocks,):
                for parameter in module.parameters():
                    if not parameter.any():  # else the first gradients are zeros
                        torch.nn.init.normal_(parameter, std=0.02)
            parameters = [*gate.parameters(), *model.parameters()]
            for name, table in tables.items():
                embedding = h[perm] if name == "local" else h
                for amp in (True, False):

                    def step(embedding=embedding, table=table, amp=amp, gate=gate, model=model):
                        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
                            bias = 2.0 * gate(embedding, table)
                            pos = model(embedding, table, bias)
                        pos.square().mul(torch.arange(2, device="cuda")).sum().backward()

                    self.row(
                        section="model",
                        n=n,
                        order=name,
                        amp=amp,
                        milliseconds=wall_time(step, self.args.repeats),
                        peak_gib=torch.cuda.max_memory_allocated() / 2**30,
                    )
                    if self.args.tune and amp:
                        times = kernel_times(step, 2, total=True)
                        top = sorted(times.items(), key=lambda item: -item[1])[:14]
                        print({name[:40]: round(value, 2) for name, value in top}, flush=True)
                    for parameter in parameters:
                        parameter.grad = None


def cells(n: int, seed: int = 0) -> Tensor:
    """Embeddings (n, 128) of cells in no order: tissue position, type and state, mixed."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    position = 4 * torch.rand(n, 2, device="cuda", generator=generator)
    kind = torch.randint(0, 20, (n,), device="cuda", generator=generator)
    latent = torch.cat([position, normal(20, 8)[kind], 0.4 * normal(n, 6)], dim=1)
    mixed = torch.nn.functional.gelu(latent @ normal(16, 64) / 4) @ normal(64, WIDTH) / 8
    return mixed + 0.015 * normal(n, WIDTH)


def attention_error(n, k, heads, channels, kind, dtype, seed=0) -> float:
    """Largest relative error over outputs and gradients against the float64 definition."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, n, (n, k), dtype=torch.int32, generator=generator)
    if seed % 3 == 1:
        index[:, ::2] = 0
    if seed % 3 == 2:
        index[torch.rand(n, k, generator=generator) < 0.3] = -1
        index[0] = -1
    graph = NeighborTable(index, padded=seed % 3 == 2)
    tensors = [torch.randn(n, heads, channels, generator=generator).to(dtype) for _ in range(3)]
    tensors += [torch.randn(n, 2, generator=generator) for _ in range(2)]
    size = (graph.num_edges,) if kind == "shared" else (graph.num_edges, heads)
    bias = torch.randn(size, generator=generator)
    if kind == "extreme":
        values = torch.tensor([1e4, -1e4, 0.0, -math.inf])
        bias = values[torch.randint(0, 4, size, generator=generator)]
    bias = None if kind == "none" else bias
    weights = [torch.randn(n, heads, c, generator=generator) for c in (channels, 2, 1)]
    weights[0] = weights[0].to(dtype)

    def run(tensors, bias, graph, weights, backend):
        leaves = [t.detach().requires_grad_() for t in tensors]
        leaves += [] if bias is None else [bias.detach().requires_grad_()]
        given = leaves[5] if bias is not None else None
        out = ops.edge_attention(*leaves[:3], tuple(leaves[3:5]), given, graph, backend=backend)
        finite = torch.where(torch.isfinite(out[2]), out[2], 0)
        total = (out[0] * weights[0]).sum(dtype=torch.float64) + (out[1] * weights[1]).sum()
        total = total + (finite * weights[2].squeeze(-1)).sum()
        return [*out, *torch.autograd.grad(total, leaves)]

    def move(device, double=False):
        change = (lambda t: t.to(device).double()) if double else (lambda t: t.to(device))
        arguments = [change(t) for t in tensors], None if bias is None else change(bias)
        return *arguments, graph.to(device), [change(t) for t in weights]

    got = run(*move("cuda"), "triton")
    again = run(*move("cuda"), "triton")
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "not repeatable"
    want = run(*move("cuda", double=True), "reference")
    return max(relative_error(a, b) for a, b in zip(got, want, strict=True))


def gate_error(n, k, width, outputs, dtype) -> float:
    """Largest relative error over logits and gradients against the float64 definition."""
    torch.manual_seed(0)
    graph = NeighborTable(torch.randint(0, n, (n, k), dtype=torch.int32, device="cuda"))
    h = torch.randn(n, width, device="cuda").to(dtype)
    weights = gate_weights(width, outputs, "cuda", torch.float32)
    grad = torch.randn(n * k, outputs, device="cuda")

    def run(run_gate, dtype):
        leaves = [t.to(dtype or t.dtype).requires_grad_() for t in (h, *weights)]
        leaves = [t.detach().requires_grad_() for t in leaves]
        logits = run_gate(leaves[0], graph, tuple(leaves[1:])).view(n * k, outputs)
        return [logits, *torch.autograd.grad(logits, leaves, grad.to(logits.dtype))]

    from ipar_sparse.ops import triton_gate

    got, again = run(triton_gate.edge_gate, None), run(triton_gate.edge_gate, None)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "not repeatable"
    want = run(reference.edge_gate, torch.float64)
    return max(relative_error(a, b) for a, b in zip(got, want, strict=True))


def gate_weights(width, outputs, device, dtype):
    generator = torch.Generator().manual_seed(1)
    sizes = [(HIDDEN, 4 * width), (HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN,), (outputs, HIDDEN)]
    scales = [(4 * width) ** -0.5, 0.1, HIDDEN**-0.5, 0.1, HIDDEN**-0.5]
    weights = [s * torch.randn(w, generator=generator) for s, w in zip(scales, sizes, strict=True)]
    weights.append(torch.randn(outputs, generator=generator))
    return [w.to(device, dtype) for w in weights]


def relative_error(got: Tensor, want: Tensor) -> float:
    finite = torch.isfinite(want)
    if not torch.equal(torch.isfinite(got), finite):
        return math.inf
    got, want = got[finite].double(), want[finite]
    # A gradient that vanishes in exact arithmetic (k = 1) is measured against one.
    return float((got - want).norm() / want.norm().clamp(min=1e-3 * max(1, want.numel()) ** 0.5))


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large device-to-device copy, TB/s."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / wall_time(lambda: target.copy_(source), 10) / 1e9


def wall_time(step, repeats: int) -> float:
    """Median milliseconds between device events; peak memory is counted from here."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def kernel_times(step, repeats: int, total: bool = False) -> dict[str, float]:
    """Median device milliseconds of every kernel; ``total`` sums the launches of a step."""
    step()
    torch.cuda.synchronize()
    times = defaultdict(list)
    for _ in range(repeats):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        once = defaultdict(float)
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                once[event.name] += event.device_time / 1e3
        for name, value in once.items():
            times[name].append(value)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
