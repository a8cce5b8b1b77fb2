"""Functions of an edge's two ends, on all edges in bounded memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_EDGES = 1 << 16  # edges of a block: a few MiB, near the size of a CPU's cache
_CUDA_FACTOR = 16  # a GPU needs larger blocks to be busy


def apply_edges(
    function: Callable[..., Tensor],
    edge_index: Tensor,
    sources: Sequence[Tensor],
    destinations: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    r"""Per-edge values :math:`f(a_j, \ldots, b_i, \ldots; \theta)`, computed in blocks of edges.

    Only the inputs are saved. Intermediate results of ``function``, however wide, are recomputed
    block by block in the backward pass.

    Args:
        function: takes rows of the sources (e, ...), rows of the destinations (e, ...) and the
            parameters whole, in this order, and returns (e, H).
        edge_index: (2, E), sources first.
        sources: tensors of the source nodes (n_src, ...).
        destinations: tensors of the destination nodes (n, ...).
        parameters: tensors that all edges share.

    Returns:
        Values (E, H), differentiable once.
    """
    if torch.compiler.is_compiling():  # a compiler fuses the function with its gathers by itself
        rows = [tensor.index_select(0, edge_index[0]) for tensor in sources]
        rows += [tensor.index_select(0, edge_index[1]) for tensor in destinations]
        return function(*rows, *parameters)
    tensors = (*sources, *destinations, *parameters)
    with torch.autocast(tensors[0].device.type, enabled=False):
        return _ApplyEdges.apply(function, edge_index, len(sources), len(destinations), *tensors)


class _ApplyEdges(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, edge_index, num_sources, num_destinations, *tensors):
        ctx.function, ctx.counts = function, (num_sources, num_destinations)
        ctx.save_for_backward(edge_index, *tensors)
        blocks = [
            function(*rows, *tensors[num_sources + num_destinations :])
            for rows in (_rows(tensors, ctx.counts, block) for block in _blocks(edge_index))
        ]
        return torch.cat(blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):
            return None, None, None, None, *_ApplyEdges._backward(ctx, grad)

    @staticmethod
    def _backward(ctx, grad):
        edge_index, *tensors = ctx.saved_tensors
        first_parameter = sum(ctx.counts)
        wanted = ctx.needs_input_grad[4:]
        totals = [
            torch.zeros_like(tensor) if want else None
            for tensor, want in zip(tensors, wanted, strict=True)
        ]
        start = 0
        for block in _blocks(edge_index):
            rows = _rows(tensors, ctx.counts, block)
            given = [*rows, *tensors[first_parameter:]]
            given = [t.detach().requires_grad_(want) for t, want in zip(given, wanted, strict=True)]
            with torch.enable_grad():
                values = ctx.function(*given)
            part, start = grad[start : start + block.size(1)], start + block.size(1)
            asked = [t for t in given if t.requires_grad]
            found = iter(torch.autograd.grad(values, asked, part))
            for position, (total, want) in enumerate(zip(totals, wanted, strict=True)):
                if not want:
                    continue
                if position < first_parameter:
                    end = 0 if position < ctx.counts[0] else 1
                    _add_rows(total, block[end], next(found))
                else:
                    total += next(found)
        return totals


def _blocks(edge_index: Tensor) -> tuple[Tensor, ...]:
    return edge_index.split(BLOCK_EDGES * (_CUDA_FACTOR if edge_index.is_cuda else 1), dim=1)


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    if total.is_cuda:  # sorts first and is deterministic, which atomic sums are not
        total.index_put_((index,), rows, accumulate=True)
    else:
        total.index_add_(0, index, rows)


def _rows(tensors: Sequence[Tensor], counts: tuple[int, int], block: Tensor) -> list[Tensor]:
    """Rows of the source and destination tensors at the two ends of a block's edges."""
    sources, destinations = tensors[: counts[0]], tensors[counts[0] : sum(counts)]
    rows = [tensor.index_select(0, block[0]) for tensor in sources]
    return rows + [tensor.index_select(0, block[1]) for tensor in destinations]
