"""Edge attention and gate: every backend against the definition, forward and gradients."""

import math

import pytest
import torch

from ipar_sparse import ops
from ipar_sparse.graph import NeighborTable, knn
from ipar_sparse.ops import chunked, segment
from ipar_sparse.ops.linear import Linear


def random_table(n, k, generator, kind="random"):
    """A table (n, k); sources may repeat, some nodes are never and one is often a source."""
    index = torch.randint(0, n, (n, k), generator=generator)
    if kind == "popular":
        index = torch.where(torch.rand(n, k, generator=generator) < 0.7, 0, index)
    if kind == "padded":
        index = index.masked_fill(torch.rand(n, k, generator=generator) < 0.4, -1)
        index[: n // 5] = -1
        # Padding stands behind the edges, as from_edge_index lays it out.
        index = index.sort(dim=-1, descending=True).values
    return NeighborTable(index.int(), padded=kind == "padded")


def inputs(table, heads, channels, bias, generator, dtype=torch.float64):
    n, edges = table.num_nodes, table.num_edges

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    given = {"q": draw(n, heads, channels), "k": draw(n, heads, channels)}
    given["v"] = draw(n, heads, channels)
    given["x_src"], given["x_dst"] = draw(n, 2), draw(n, 2)
    if bias is not None:
        values = torch.randn(
            (edges, heads) if bias == "heads" else (edges,), generator=generator, dtype=dtype
        )
        if bias in ("extreme", "removed"):
            pick = torch.randint(0, 4, (edges,), generator=generator)
            if bias == "extreme":
                values = torch.where(pick == 0, 1e4, torch.where(pick == 1, -1e4, values))
            values = torch.where(pick == 2, -math.inf, values)
            values[: min(table.k, edges)] = -math.inf
        given["bias"] = values.requires_grad_()
    return given


def run(table, given, backend):
    out = ops.edge_attention(
        given["q"],
        given["k"],
        given["v"],
        (given["x_src"], given["x_dst"]),
        given.get("bias"),
        table,
        backend=backend,
    )
    weights = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape) for o in out]
    terms = [
        (o.masked_fill(~torch.isfinite(o), 0) * w).sum() for o, w in zip(out, weights, strict=True)
    ]
    grads = torch.autograd.grad(sum(terms), list(given.values()), allow_unused=True)
    grads = [
        torch.zeros_like(t) if g is None else g for g, t in zip(grads, given.values(), strict=True)
    ]
    return [*out, *grads]


def dense_attention(given, table, i, h):
    """One row of one head by the formula."""
    js = [int(j) for j in table.index[i] if j >= 0]
    start = int(table.rowptr[i])
    logits = []
    for slot, j in enumerate(js):
        dot = float(given["q"][i, h] @ given["k"][j, h]) / math.sqrt(given["q"].size(-1))
        b = given.get("bias")
        extra = 0.0 if b is None else float(b[start + slot] if b.dim() == 1 else b[start + slot, h])
        logits.append(dot + extra)
    finite = [x for x in logits if x > -math.inf]
    zero_out, zero_move = torch.zeros_like(given["v"][0, 0]), torch.zeros(2, dtype=torch.float64)
    if not finite:
        return zero_out, zero_move, -math.inf
    top = max(finite)
    weight = [math.exp(x - top) for x in logits]
    total = sum(weight)
    out = sum((w / total * given["v"][j, h] for w, j in zip(weight, js, strict=True)), zero_out)
    move = sum(
        (
            w / total * (given["x_src"][j] - given["x_dst"][i])
            for w, j in zip(weight, js, strict=True)
        ),
        zero_move,
    )
    return out, move, top + math.log(total)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("kind", ["random", "padded", "popular"])
@pytest.mark.parametrize("bias", [None, "shared", "heads", "extreme"])
def test_attention_is_the_formula(backend, kind, bias):
    generator = torch.Generator().manual_seed(3)
    table = random_table(17, 6, generator, kind)
    given = inputs(table, 2, 5, bias, generator)
    out, move, lse = run(table, given, backend)[:3]
    for i in range(17):
        for h in range(2):
            expected = dense_attention(given, table, i, h)
            torch.testing.assert_close(out[i, h], expected[0], rtol=0, atol=1e-10)
            torch.testing.assert_close(move[i, h], expected[1], rtol=0, atol=1e-10)
            assert float(lse[i, h]) == pytest.approx(expected[2], abs=1e-10)


@pytest.mark.parametrize("n", [1, 2, 40, 700])
@pytest.mark.parametrize("k", [0, 1, 3, 100])
@pytest.mark.parametrize("kind", ["random", "padded", "popular"])
@pytest.mark.parametrize("bias", [None, "shared", "heads", "extreme"])
def test_chunked_attention_is_the_reference(n, k, kind, bias):
    generator = torch.Generator().manual_seed(n + k)
    table = random_table(n, k, generator, kind)
    given = inputs(table, 3, 16, bias, generator)
    for name, ours, theirs in zip(
        ["out", "displacement", "lse", *given],
        run(table, given, "chunked"),
        run(table, given, "reference"),
        strict=True,
    ):
        finite = theirs[torch.isfinite(theirs)]
        scale = finite.abs().amax() if finite.numel() else 1.0
        torch.testing.assert_close(
            ours,
            theirs,
            rtol=0,
            atol=1e-10 * max(1.0, float(scale)),
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_blocks_do_not_change_the_result(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    table = random_table(300, 20, generator, "popular")
    given = inputs(table, 2, 8, "heads", generator)
    whole = run(table, given, "chunked")
    monkeypatch.setattr(chunked, "BLOCK_VALUES", 500)
    for ours, theirs in zip(run(table, given, "chunked"), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_attention_twice_gives_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    table = random_table(500, 30, generator, "popular")
    given = inputs(table, 4, 32, "shared", generator, dtype=torch.float32)
    for first, second in zip(
        run(table, given, "chunked"), run(table, given, "chunked"), strict=True
    ):
        assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["random", "padded", "popular"])
@pytest.mark.parametrize("bias", [None, "shared", "heads", "removed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_stays_near_float64(dtype, bias, kind):
    generator = torch.Generator().manual_seed(5)
    table = random_table(201, 50, generator, kind)
    given = inputs(table, 4, 32, bias, generator)
    exact = run(table, given, "reference")
    low = {
        name: t.detach().to(dtype if name in "qkv" else torch.float32).requires_grad_()
        for name, t in given.items()
    }
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    for ours, theirs in zip(run(table, low, "chunked"), exact, strict=True):
        assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs))
        finite = torch.isfinite(theirs)
        error = (ours.double() - theirs)[finite].norm() / theirs[finite].norm()
        assert float(error) < tolerance


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_attention_gradcheck(backend):
    generator = torch.Generator().manual_seed(2)
    table = random_table(7, 3, generator, "padded")
    given = inputs(table, 2, 3, "heads", generator)

    def f(q, k, v, x_src, x_dst, bias):
        out, move, lse = ops.edge_attention(q, k, v, (x_src, x_dst), bias, table, backend=backend)
        return out, move, lse.masked_fill(~torch.isfinite(lse), 0)

    assert torch.autograd.gradcheck(f, tuple(given.values()))


def test_bipartite_attention():
    generator = torch.Generator().manual_seed(4)
    index = torch.randint(0, 5, (9, 4), generator=generator).int()
    table = NeighborTable(index, num_src_nodes=5)
    q = torch.randn(9, 2, 3, generator=generator)
    k, v = torch.randn(2, 5, 2, 3, generator=generator)
    x = (torch.randn(5, 2, generator=generator), torch.randn(9, 2, generator=generator))
    for ours, theirs in zip(
        ops.edge_attention(q, k, v, x, None, table, backend="chunked"),
        ops.edge_attention(q, k, v, x, None, table, backend="reference"),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("as_table", [True, False, "of some rows"])
def test_chunked_gate_is_the_reference(heads, as_table, monkeypatch):
    monkeypatch.setattr(chunked, "GATE_EDGES", 64)
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(60, 12, generator=generator, dtype=torch.float64).requires_grad_()
    h.data[3] = h.data[4]  # |h_i - h_j| has a corner there
    table = knn(h, 9)
    if as_table == "of some rows":
        table = NeighborTable(table.index[:40], num_src_nodes=60)
    edges = table if as_table else table.edge_index
    shapes = [(8, 48), (8,), (6, 8), (6,), (heads, 6), (heads,)]
    weights = [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]
    results = []
    for backend in ("reference", "chunked"):
        logits = ops.edge_gate(h, edges, tuple(weights), backend=backend)
        assert logits.shape == ((table.num_edges,) if heads == 1 else (table.num_edges, heads))
        weigh = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view(logits.shape)
        results.append([logits, *torch.autograd.grad((logits * weigh).sum(), [h, *weights])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kept", [0, 1 << 17])
@pytest.mark.parametrize("kind", ["random", "padded", "popular"])
def test_gate_in_float32_stays_near_float64(kept, kind, monkeypatch):
    monkeypatch.setattr(chunked, "_KEPT_EDGES", kept)
    monkeypatch.setattr(chunked, "GATE_EDGES", 256)
    generator = torch.Generator().manual_seed(9)
    table = random_table(101, 13, generator, kind)
    shapes = [(101, 40), (64, 160), (64,), (64, 64), (64,), (1, 64), (1,)]
    exact = [torch.randn(s, generator=generator, dtype=torch.float64) / 3 for s in shapes]
    results = []
    for dtype, backend in [(torch.float64, "reference"), (torch.float32, "chunked")] * 2:
        h, *weights = [t.to(dtype).requires_grad_() for t in exact]
        logits = ops.edge_gate(h, table, weights, backend=backend)
        weigh = torch.linspace(-1, 2, logits.numel(), dtype=dtype)
        results.append([logits, *torch.autograd.grad((logits * weigh).sum(), [h, *weights])])
    for theirs, ours, _, again in zip(*results, strict=True):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 1e-5
        assert torch.equal(ours, again)


def test_gate_of_a_graph_without_edges():
    h = torch.randn(1, 4).requires_grad_()
    weights = tuple(torch.randn(s) for s in [(3, 16), (3,), (3, 3), (3,), (1, 3), (1,)])
    logits = ops.edge_gate(h, knn(h, 5), weights, backend="chunked")
    assert logits.shape == (0,)
    logits.sum().backward()
    assert float(h.grad.abs().max()) == 0


def test_gate_gradcheck():
    generator = torch.Generator().manual_seed(8)
    h = torch.randn(6, 3, generator=generator, dtype=torch.float64).requires_grad_()
    table = knn(h, 2)
    weights = [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_()
        for s in [(4, 12), (4,), (4, 4), (4,), (1, 4), (1,)]
    ]
    assert torch.autograd.gradcheck(
        lambda h, *w: ops.edge_gate(h, table, w, backend="chunked"), (h, *weights)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 2, 3)}, "6 destinations"),
        ({"k": torch.zeros(6, 2, 4)}, r"q \(n, H, C\)"),
        ({"x": torch.zeros(5, 2)}, "positions"),
        ({"bias": torch.zeros(11)}, r"shape \(12,\)"),
        ({"v": torch.zeros(6, 2, 3, dtype=torch.float64)}, "one floating dtype"),
        ({"backend": "magic"}, "magic"),
    ],
)
def test_border_names_what_does_not_fit(change, message):
    table = knn(torch.randn(6, 2), 2)
    given = {name: torch.zeros(6, 2, 3) for name in "qkv"}
    given |= {"x": torch.zeros(6, 2), "bias": None, "graph": table, **change}
    with pytest.raises(ValueError, match=message):
        ops.edge_attention(**given)


@pytest.mark.ext
def test_torch_scatter_sums_are_torchs_own(monkeypatch):
    pytest.importorskip("torch_scatter")
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 40, (500,), generator=generator)
    src = torch.randn(500, 3, generator=generator, dtype=torch.float64).requires_grad_()
    results = []
    for use in (True, False):
        monkeypatch.setattr(segment, "use_torch_scatter", use)
        out = segment.scatter_sum(src, index, 45)
        soft = segment.segment_softmax(src, index, 45)[0]
        grads = torch.autograd.grad((out**2).sum() + (soft * src).sum(), src)
        results.append([out, soft, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layer_is_torchs(bias):
    generator = torch.Generator().manual_seed(0)
    layer = Linear(37, 19, bias=bias)
    plain = torch.nn.Linear(37, 19, bias=bias, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    wide = torch.randn(53, 74, generator=generator)
    for view in (wide[:, :37], wide[:, ::2], wide[:37, :53].T, wide[:0, :37], wide[0, :37]):
        results = []
        for given, x in ((layer, view), (plain, view.double())):
            x = x.requires_grad_()
            leaves = [x, *given.parameters()]
            first = torch.autograd.grad(given(x).square().sum(), leaves, create_graph=True)
            second = torch.autograd.grad(first[0].square().sum(), leaves[:2])
            results.append([given(x), *first, *second])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)
