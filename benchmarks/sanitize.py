"""A small run of every fused kernel, for NVIDIA's compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck \
        python -m benchmarks.sanitize
"""

import torch

from ipar_sparse import ops
from ipar_sparse.graph import NeighborTable
from ipar_sparse.supervision.losses import rw_kl_loss
from ipar_sparse.supervision.targets import build_walk_target

from .kernels import gate_weights

_CELLS, _NEIGHBORS = 150, 20


def main() -> None:
    index = torch.randint(0, _CELLS, (_CELLS, _NEIGHBORS), dtype=torch.int32)
    index[:, ::2] = 0  # one node is the neighbour of all: its list is cut
    for dtype in (torch.float32, torch.bfloat16):
        for padded in (False, True):
            table = index.masked_fill(torch.rand(index.shape) < 0.3, -1) if padded else index
            graph = NeighborTable(table, padded=padded).to("cuda")
            attend(graph, dtype)
            score(graph, dtype)
    walk = build_walk_target(torch.randn(400, 2), 12, steps=4).to("cuda")
    pos = torch.randn(400, 2, device="cuda", requires_grad=True)
    rw_kl_loss(pos, walk, 70).backward()
    torch.cuda.synchronize()
    print("done")


def attend(graph: NeighborTable, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(_CELLS, 4, 32, device="cuda", dtype=dtype) for _ in range(3))
    x = torch.randn(_CELLS, 2, device="cuda")
    leaves = [t.requires_grad_() for t in (q, k, v, x)]
    bias = torch.randn(graph.num_edges, device="cuda", requires_grad=True)
    out, displacement, _ = ops.edge_attention(*leaves, bias, graph, backend="triton")
    (out.float().sum() + displacement.square().sum()).backward()


def score(graph: NeighborTable, dtype: torch.dtype) -> None:
    h = torch.randn(_CELLS, 128, device="cuda", dtype=dtype)
    weights = [w.requires_grad_() for w in gate_weights(128, 1, "cuda", torch.float32)]
    for precision in ("highest", "high") if dtype == torch.float32 else ("highest",):
        torch.set_float32_matmul_precision(precision)
        for leaf in (h, h.detach().requires_grad_()):
            ops.edge_gate(leaf, graph, tuple(weights), backend="triton").square().sum().backward()
    torch.set_float32_matmul_precision("highest")


if __name__ == "__main__":
    main()
