"""The fused forces of a refinement against those in torch.

On a GPU they run compiled. Without one, TRITON_INTERPRET=1 runs the same test in Triton's
interpreter on the CPU.
"""

import os

import pytest
import torch

pytest.importorskip("triton")

from ipar_sparse.graph import NeighborTable, knn
from ipar_sparse.layout.refinement import _attraction, repulsion
from ipar_sparse.ops.triton_forces import forces

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


def test_one_kernel_computes_the_same_forces():
    n, k, unit = 150, 7, 0.3
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    index = knn(torch.randn(n, 5, generator=torch.Generator().manual_seed(1)), k).index
    index[::3, 4:] = -1
    graph = NeighborTable(index.to(DEVICE), padded=True)
    near = knn(x, 20).index
    reach = (x - x[near[:, -1].long()]).square().sum(1)
    shifts = torch.tensor([1, 17, 149], device=DEVICE)
    push = repulsion(x, unit, near.long(), reach, shifts)
    rowptr, edge, target = graph.reverse()
    pull = _attraction(x, unit, graph, slice(0, n), edge, target, rowptr)()
    for rows in (slice(0, n), slice(64, 133)):
        first, last = int(rowptr[rows.start]), int(rowptr[rows.stop])
        given = rowptr[rows.start : rows.stop + 1] - first, target[first:last]
        found = forces(x, rows, unit, near, reach, shifts, graph.index[rows].contiguous(), given)
        if rows.stop == n:
            whole = n / found[1].sum()
        torch.testing.assert_close(found[0] * whole, push[rows], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[2], pull[rows], rtol=1e-4, atol=1e-5)
