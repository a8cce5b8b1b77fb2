"""Attention by shared sources against the definition in float64; see test_triton.py."""

import pytest
import torch

pytest.importorskip("triton")

from test_triton import (
    DEVICE,
    INTERPRETED,
    attention,
    attention_inputs,
    compare_attention,
    error,
    make_bias,
    make_table,
    pytestmark,  # noqa: F401
)

from ipar_sparse.graph.order import reorder
from ipar_sparse.ops import triton_shared

HALF = torch.bfloat16
SIZES = [(1, 1), (37, 12)] if INTERPRETED else [(1, 1), (200, 16), (1000, 100)]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(triton_shared, "_FROM", 0)
    monkeypatch.setattr(triton_shared, "_DENSITY", 0.0)
    if INTERPRETED:
        _multiply_bfloat16(monkeypatch)


def _multiply_bfloat16(monkeypatch):
    """The interpreter keeps bfloat16 numbers as integers of 16 bits, and multiplies those."""
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(self, *given):
        wide = []
        for x in given[:2]:
            if x.dtype.scalar == tl.bfloat16:
                data = torch.from_numpy(x.data.view("int16")).view(torch.bfloat16)
                x = interpreter.TensorHandle(data.float().numpy(), tl.float32)
            wide.append(x)
        return multiply(self, *wide, *given[2:])

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widened)


def local_table(*given, **named):
    table = make_table(*given, **named)
    table._cache["local"] = True
    return table


@pytest.mark.parametrize("bias", ["none", "shared", "heads", "extreme"])
@pytest.mark.parametrize("kind", ["random", "padded", "popular"])
@pytest.mark.parametrize("n,k", SIZES)
def test_shared_sources_are_the_definition(n, k, kind, bias):
    table = local_table(n, k, kind)
    got, again = compare_attention(table, 4, 32, bias, HALF)
    assert table._cache["tiles"] is not None or kind == "padded"
    assert all(torch.equal(a, b) for a, b in zip(got, again(), strict=True))


@pytest.mark.parametrize("heads,channels", [(1, 16), (2, 64), (4, 16)])
def test_head_layouts_and_bipartite_tables(heads, channels):
    compare_attention(local_table(40, 5, n_src=70), heads, channels, "heads", HALF)


def test_large_logits_are_summed_again_with_a_running_maximum():
    table = local_table(*SIZES[-1])
    tensors = attention_inputs(table, 4, 32, HALF)
    tensors[0] *= 100.0
    bias, n = make_bias("shared", table, 4), table.num_nodes
    grads = [torch.randn(n, 4, *tail, device=DEVICE) for tail in ((32,), (2,), ())]
    got = attention(tensors, bias, table, grads, "triton")
    wide = [t.double() for t in tensors], bias.double()
    want = attention(*wide, table, [g.double() for g in grads], "reference")
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 3e-2


def test_displacements_far_from_the_origin():
    table = local_table(*SIZES[-1])
    tensors = attention_inputs(table, 4, 32, HALF)
    q, k, v, *x = tensors
    near = attention([q, k, v, *x], None, table, _grads(table), "triton")
    far = attention([q, k, v, *(y + 1e4 for y in x)], None, table, _grads(table), "triton")
    assert max(error(a, b) for a, b in zip(far, near, strict=True)) < 5e-3


def _grads(table):
    generator = torch.Generator().manual_seed(0)
    shapes = ((table.num_nodes, 4, *tail) for tail in ((32,), (2,), ()))
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


def test_only_graphs_in_local_order_are_cut_into_tiles(monkeypatch):
    table = make_table(*SIZES[-1])
    compare_attention(table, 4, 32, "shared", HALF)
    assert "tiles" not in table._cache
    local = reorder(table, torch.randn(table.num_nodes, 4, device=DEVICE))[0]
    monkeypatch.setattr(triton_shared, "_DENSITY", 1.1)
    compare_attention(local, 4, 32, "shared", HALF)
    assert local._cache["tiles"] is None
