"""The fused kernels against the definition in float64, forward and every gradient.

On a GPU they run compiled. Without one, TRITON_INTERPRET=1 runs the same tests at small sizes in
Triton's interpreter on the CPU (which cannot multiply bfloat16 matrices: the gate's are left out).
"""

import math
import os

import pytest
import torch

pytest.importorskip("triton")

from ipar_sparse import ops
from ipar_sparse.graph import NeighborTable
from ipar_sparse.graph.order import reorder
from ipar_sparse.ops import triton_attention, triton_gate, triton_gate_half

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# Rounding moves a few hidden units across ReLU's kink, which changes their gradient by all of it:
# a share r of moved units shows as an error of about sqrt(r) in the gate's gradients.
KINK_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}
SIZES = [(1, 1), (7, 3)] if INTERPRETED else [(1, 1), (33, 3), (200, 16), (1000, 100)]
LARGE = (12, 20) if INTERPRETED else (5000, 128)
SKEWED = (140, 3) if INTERPRETED else (5000, 128)
HALF = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]


def make_table(n, k, kind="random", seed=0, n_src=None):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, n_src or n, (n, k), generator=generator)
    if kind == "popular":
        index = torch.where(torch.rand(n, k, generator=generator) < 0.7, 0, index)
    if kind == "padded":
        index = index.masked_fill(torch.rand(n, k, generator=generator) < 0.4, -1)
        index[: max(1, n // 5)] = -1
    index = index.int().to(DEVICE)
    return NeighborTable(index, num_src_nodes=n_src, padded=kind == "padded")


def make_bias(kind, table, heads):
    shape = (table.num_edges,) if kind == "shared" else (table.num_edges, heads)
    if kind == "none":
        return None
    if kind == "extreme":
        values = torch.tensor([1e4, -1e4, 0.0, -math.inf])
        bias = values[torch.randint(0, 4, shape)]
        bias[: table.k] = -math.inf
        return bias.to(DEVICE)
    return torch.randn(shape).to(DEVICE)


def attention(tensors, bias, table, grads, backend):
    leaves = [t.detach().requires_grad_() for t in (*tensors, *([] if bias is None else [bias]))]
    out = ops.edge_attention(
        *leaves[:3],
        tuple(leaves[3:5]),
        leaves[5] if len(leaves) > 5 else None,
        table,
        backend=backend,
    )
    finite = [o.masked_fill(~torch.isfinite(o), 0) for o in out]
    total = sum((o * g.to(o.dtype)).double().sum() for o, g in zip(finite, grads, strict=True))
    return [*out, *torch.autograd.grad(total, leaves)]


def attention_inputs(table, heads, channels, dtype):
    n, n_src = table.num_nodes, table.num_src_nodes
    shapes = [(n, heads, channels), (n_src, heads, channels), (n_src, heads, channels)]
    tensors = [torch.randn(shape).to(DEVICE, dtype) for shape in shapes]
    return tensors + [torch.randn(m, 2).to(DEVICE) for m in (n_src, n)]


def error(got, want):
    finite = torch.isfinite(want)
    assert torch.equal(torch.isfinite(got), finite)
    got, want = got.detach()[finite].double(), want.detach()[finite].double()
    # A gradient that vanishes in exact arithmetic (k = 1) is measured against rounding of one.
    return float((got - want).norm() / want.norm().clamp(min=1e-2 * max(want.numel(), 1) ** 0.5))


def compare_attention(table, heads, channels, bias_kind, dtype):
    tensors = attention_inputs(table, heads, channels, dtype)
    bias = make_bias(bias_kind, table, heads)
    n = table.num_nodes
    grads = [
        torch.randn(shape).to(DEVICE, dtype)
        for shape in ((n, heads, channels), (n, heads, 2), (n, heads))
    ]
    got = attention(tensors, bias, table, grads, "triton")
    wide = [t.double() for t in tensors], None if bias is None else bias.double()
    want = attention(*wide, table, [g.double() for g in grads], "reference")
    names = ("out", "displacement", "lse", "q", "k", "v", "x_src", "x_dst", "bias")
    errors = {name: error(a, b) for name, a, b in zip(names, got, want, strict=False)}
    assert max(errors.values()) < TOLERANCE[dtype], errors
    return got, lambda: attention(tensors, bias, table, grads, "triton")


@pytest.mark.parametrize("bias", ["none", "shared", "heads", "extreme"])
@pytest.mark.parametrize("kind", ["random", "padded", "popular"])
@pytest.mark.parametrize("n,k", SIZES)
def test_attention_is_the_definition(n, k, kind, bias):
    compare_attention(make_table(n, k, kind), 4, 32, bias, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads,channels", [(1, 16), (3, 16), (2, 64), (4, 32)])
def test_attention_head_layouts_and_dtypes(heads, channels, dtype):
    compare_attention(make_table(*LARGE), heads, channels, "heads", dtype)


def test_attention_bipartite():
    compare_attention(make_table(9, 5, n_src=23), 2, 16, "shared", torch.float32)


def test_attention_repeats_bit_for_bit():
    got, again = compare_attention(make_table(*SKEWED, "popular"), 4, 32, "heads", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, again(), strict=True))


def test_long_reverse_lists_are_cut_and_added_in_order():
    table = make_table(140, 3, "popular")
    plan = triton_attention.SourcePlan.of(table)
    length = plan.task[:, 2] - plan.task[:, 1]
    degree = torch.bincount(table.index.flatten(), minlength=table.num_nodes)
    assert plan.num_heavy == 1 and int(plan.heavy[0, 0]) == 0
    assert int(length.max()) <= 256 and int(length.sum()) == table.num_edges
    covered = torch.zeros_like(degree).index_add_(0, plan.task[:, 0], length.long())
    assert torch.equal(covered, degree)
    compare_attention(table, 2, 16, "shared", torch.float32)


def test_attention_reads_packed_and_strided_rows_in_place():
    table = make_table(20, 4)
    packed = torch.randn(20, 3, 2, 16, device=DEVICE)
    views = packed.unbind(1)
    assert all(triton_attention.contiguous_rows(view) is view for view in views)
    x = torch.randn(2, 20, device=DEVICE).T
    got = ops.edge_attention(*views, x, None, table, backend="triton")
    want = ops.edge_attention(
        *(view.contiguous() for view in views), x.contiguous(), None, table, backend="triton"
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("n,k", [(0, 0), (5, 0)])
def test_attention_without_edges(n, k):
    table = (
        make_table(n, k)
        if k
        else NeighborTable(torch.empty(n, 0, dtype=torch.int32, device=DEVICE))
    )
    q = torch.randn(n, 2, 16, device=DEVICE, requires_grad=True)
    x = torch.randn(n, 2, device=DEVICE)
    out, displacement, lse = ops.edge_attention(q, q, q, x, None, table, backend="triton")
    assert not out.any() and not displacement.any()
    assert bool((lse == -math.inf).all())
    (grad,) = torch.autograd.grad(out.sum() + displacement.sum(), q)
    assert not grad.any()


@pytest.mark.parametrize(
    "channels,dtype,width,match",
    [
        (24, torch.float32, 2, "channels"),
        (16, torch.float64, 2, "float32"),
        (16, torch.float32, 3, "two dimensions"),
    ],
)
def test_attention_refuses_what_it_cannot_run(channels, dtype, width, match):
    q = torch.randn(4, 2, channels, device=DEVICE, dtype=dtype)
    with pytest.raises(ValueError, match=match):
        ops.edge_attention(
            q, q, q, torch.randn(4, width, device=DEVICE), None, make_table(4, 2), backend="triton"
        )


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 16, 100, 128, 999, 65537])
def test_division_by_multiplication(divisor):
    multiplier, shift = triton_attention.division(divisor)
    assert multiplier < 1 << 32
    edges = {0, 1, divisor - 1, divisor, 2**31 - 1, 2**31 - 1 - (2**31 - 1) % divisor}
    edges |= {(2**31 - 1) // divisor * divisor - 1}
    for x in edges:
        assert (((2 * x * multiplier) >> 32) >> shift) == x // divisor, (x, divisor)


def test_attention_over_a_reordered_graph_is_the_same():
    table, local = make_table(*LARGE, "padded"), make_table(*LARGE, "padded")
    reorder(local, torch.randn(table.num_nodes, 4, device=DEVICE))
    tensors = attention_inputs(table, 2, 16, torch.float32)
    bias = make_bias("heads", table, 2)
    n = table.num_nodes
    grads = [torch.randn(n, 2, *tail, device=DEVICE) for tail in ((16,), (2,), ())]
    want = attention(tensors, bias, table, grads, "triton")
    got = attention(tensors, bias, local, grads, "triton")
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 1e-6


def gate_inputs(n, width, outputs, dtype, hidden=64, margin=False):
    """Embeddings and weights; with a margin, no hidden unit comes near ReLU's kink."""
    h = torch.randn(n, width).to(DEVICE, dtype)
    shapes = [(hidden, 4 * width), (hidden,), (hidden, hidden), (hidden,), (outputs, hidden)]
    weights = [torch.randn(shape) * shape[-1] ** -0.5 for shape in shapes]
    if margin:
        weights[1], weights[3] = 12 * weights[1].sign(), 80 * weights[3].sign()
    return h, [w.to(DEVICE) for w in (*weights, torch.randn(outputs))]


def gate(h, weights, table, grad, backend):
    leaves = [t.detach().requires_grad_() for t in (h, *weights)]
    logits = ops.edge_gate(leaves[0], table, tuple(leaves[1:]), backend=backend)
    return [logits, *torch.autograd.grad(logits, leaves, grad.view(logits.shape).to(logits.dtype))]


def compare_gate(table, width, outputs, dtype, hidden=64, margin=True):
    h, weights = gate_inputs(table.num_src_nodes, width, outputs, dtype, hidden, margin)
    # Of one sign: sums that cancel would measure float32's rounding, not the kernel.
    grad = 0.5 + torch.rand(table.num_edges, outputs, device=DEVICE)
    got = gate(h, weights, table, grad, "triton")
    wide = h.double(), [w.double() for w in weights]
    want = gate(*wide, table, grad.double(), "reference")
    names = ("logits", "h", "w0", "b0", "w1", "b1", "w2", "b2")
    errors = {name: error(a, b) for name, a, b in zip(names, got, want, strict=True)}
    assert errors.pop("logits") < TOLERANCE[dtype], errors
    assert max(errors.values()) < (TOLERANCE if margin else KINK_TOLERANCE)[dtype], errors
    return got, lambda: gate(h, weights, table, grad, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_gate_near_the_kinks(dtype):
    compare_gate(make_table(*LARGE), 128, 1, dtype, margin=False)


@pytest.mark.parametrize("kind", ["random", "padded", "popular"])
@pytest.mark.parametrize("n,k", SIZES)
def test_gate_is_the_definition(n, k, kind):
    compare_gate(make_table(n, k, kind), 128, 1, torch.float32)


@pytest.mark.parametrize("kind", ["random", "padded"])
def test_gate_of_some_rows_is_the_definition(kind):
    n, k = SIZES[-1]
    compare_gate(make_table(n, k, kind, n_src=2 * n + 3), 32, 1, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("width,outputs,hidden", [(30, 4, 64), (16, 2, 16), (128, 1, 32)])
def test_gate_layouts_and_dtypes(width, outputs, hidden, dtype):
    compare_gate(make_table(*LARGE), width, outputs, dtype, hidden)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("steps", [False, True], ids=["at once", "in steps"])
@pytest.mark.parametrize("kind", ["random", "padded", "popular"])
def test_half_precision_gate_is_the_definition(kind, steps, dtype, monkeypatch):
    """Rows of several pieces; gradients of the first layer kept for the sources, and made again."""
    if steps:
        monkeypatch.setattr(triton_gate_half, "_BUFFER", 2 * 150 * 16)
    table = make_table(5, 150, kind, n_src=9) if INTERPRETED else make_table(500, 150, kind)
    got, again = compare_gate(table, 32, 1, dtype, hidden=16)
    assert all(torch.equal(a, b) for a, b in zip(got, again(), strict=True))


def test_gate_repeats_bit_for_bit():
    table = make_table(*SKEWED, "popular")
    got, again = compare_gate(table, 16, 1, torch.float32, hidden=16)
    assert all(torch.equal(a, b) for a, b in zip(got, again(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gate_weights_do_not_depend_on_whether_the_embedding_learns(dtype):
    table = make_table(*LARGE)
    h, weights = gate_inputs(table.num_nodes, 32, 1, dtype)
    leaves = [w.requires_grad_() for w in weights]
    grads = []
    for learns in (False, True):
        logits = ops.edge_gate(h.requires_grad_(learns), table, tuple(leaves), backend="triton")
        grads.append(torch.autograd.grad(logits.square().sum(), leaves))
    assert max(error(a, b) for a, b in zip(*grads, strict=True)) < TOLERANCE[dtype]


def test_half_precision_gradients_of_a_mean_over_many_edges_survive():
    table = make_table(*LARGE)
    h, weights = gate_inputs(table.num_nodes, 32, 1, torch.float16)
    grad = 1e-9 * torch.randn(table.num_edges, 1, device=DEVICE)
    got = gate(h, weights, table, grad, "triton")
    want = gate(h.double(), [w.double() for w in weights], table, grad.double(), "reference")
    for a, b in zip(got[2:], want[2:], strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 4e-2


def test_gate_refuses_what_it_cannot_run():
    h, weights = gate_inputs(4, 16, 1, torch.float32, hidden=24)
    with pytest.raises(ValueError, match="hidden layers"):
        ops.edge_gate(h, make_table(4, 2), tuple(weights), backend="triton")
    assert triton_gate.unsupported(h.double(), weights)
