"""Extra logit terms of the attention: each a module, chosen by name.

A term maps node states and positions to per-edge logits (E,) or (E, heads), which join the edge
bias. It sees edges as ``(src, dst)``, so that it runs under every attention backend.
"""

import math

import torch
from torch import Tensor, nn


class SquaredDistance(nn.Module):
    r"""Monotone geometry, :math:`-\mathrm{softplus}(\gamma_h) \|x_i - x_j\|^2`.

    Args:
        heads: number of heads.
        clamp: lower bound of the term, e.g. -10; none by default.
    """

    def __init__(self, heads: int, clamp: float | None = None):
        super().__init__()
        self.clamp = clamp
        self.gamma = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self):
        """Start at softplus = 1."""
        nn.init.constant_(self.gamma, math.log(math.e - 1))

    def forward(self, s: Tensor, pos_src: Tensor, pos_dst: Tensor, src: Tensor, dst: Tensor):
        """Logits (E, heads) of the edges src -> dst."""
        square = (pos_src[src] - pos_dst[dst]).square().sum(-1, keepdim=True)
        logits = -nn.functional.softplus(self.gamma) * square
        return logits if self.clamp is None else logits.clamp(min=self.clamp, max=0.0)


LOGIT_TERMS = {"mono": SquaredDistance}
