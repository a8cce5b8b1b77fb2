"""Reductions over edges that share a destination.

Sums use torch_scatter where it is installed, else torch; the results are equal.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

use_torch_scatter = find_spec("torch_scatter") is not None


def scatter_sum(src: Tensor, index: Tensor, dim_size: int) -> Tensor:
    """Sum rows of ``src`` (E, ...) that share an ``index`` (E,): (dim_size, ...)."""
    if use_torch_scatter:
        import torch_scatter

        return torch_scatter.scatter_sum(src, index, dim=0, dim_size=dim_size)
    where = index.view(-1, *[1] * (src.dim() - 1)).expand_as(src)
    return src.new_zeros(dim_size, *src.shape[1:]).scatter_add(0, where, src)


def scatter_max(src: Tensor, index: Tensor, dim_size: int) -> Tensor:
    """Largest of the rows that share an index; -inf where there is none. Not differentiated."""
    src = src.detach()
    where = index.view(-1, *[1] * (src.dim() - 1)).expand_as(src)
    out = src.new_full((dim_size, *src.shape[1:]), -torch.inf)
    return out.scatter_reduce(0, where, src, reduce="amax", include_self=True)


def segment_softmax(logits: Tensor, index: Tensor, dim_size: int) -> tuple[Tensor, Tensor]:
    """Softmax of logits (E, ...) over the edges of each destination.

    Returns:
        Weights (E, ...) and log-sum-exp (dim_size, ...). Edges at -inf get weight 0, also where
        all edges of a destination are; the log-sum-exp of such a destination is -inf.
    """
    top = scatter_max(logits, index, dim_size)
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    weight = (logits - top[index]).exp()
    total = scatter_sum(weight, index, dim_size)
    empty = total == 0
    safe = torch.where(empty, torch.ones_like(total), total)
    lse = torch.where(empty, torch.full_like(total, -torch.inf), safe.log() + top)
    return weight / safe[index], lse
