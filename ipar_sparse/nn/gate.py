"""EdgeGateSoft: a logit for every candidate edge."""

import torch
from torch import Tensor, nn

from .. import ops
from ..graph import NeighborTable
from .pyg import inits


class EdgeGateSoft(nn.Module):
    r"""Soft gate over candidate edges,

    .. math::
        g_{ij} = \mathrm{MLP}([h_i, h_j, |h_i - h_j|, h_i \odot h_j])

    with widths 4d -> 64 -> 64 -> 1 and ReLU between. It scores candidate edges only. The part of
    the first layer that takes one node alone is computed once a node. Self-loops are not gated:
    their logit is 0.

    Args:
        in_channels: width d of the embedding.
        hidden_channels: width of the two hidden layers (default: 64).
        heads: logits an edge; 1 is shared by the attention heads (default: 1).
        backend: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"triton"`` (default: ``"auto"``).

    Shapes:
        - **input:** embeddings (n, d); edges as :class:`~ipar_sparse.graph.NeighborTable` or
          ``edge_index`` (2, E)
        - **output:** logits (E,), or (E, heads) if heads > 1, in the order of the edges given
    """

    def __init__(
        self, in_channels: int, hidden_channels: int = 64, heads: int = 1, backend: str = "auto"
    ):
        super().__init__()
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.heads = heads
        self.backend = backend
        self.mlp = nn.Sequential(
            nn.Linear(4 * in_channels, hidden_channels),
            nn.ReLU(),
            nn.Linear(hidden_channels, hidden_channels),
            nn.ReLU(),
            nn.Linear(hidden_channels, heads),
        )

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        inits.reset(self.mlp)

    def forward(self, h: Tensor, edges: NeighborTable | Tensor) -> Tensor:
        """Score edges; see the class for shapes.

        Raises:
            ValueError: if ``h`` does not have ``in_channels`` columns.
        """
        if h.dim() != 2 or h.size(-1) != self.in_channels:
            raise ValueError(
                f"EdgeGateSoft({self.in_channels}) needs embeddings (n, {self.in_channels}); "
                f"given {tuple(h.shape)}"
            )
        layers = (layer for layer in self.mlp if isinstance(layer, nn.Linear))
        weights = [p for layer in layers for p in (layer.weight, layer.bias)]
        logits = ops.edge_gate(h, edges, weights, backend=self.backend)
        # A compiler cannot look for loops first, and masks them in any case.
        if isinstance(edges, NeighborTable):
            if not (torch.compiler.is_compiling() or edges.has_loops):
                return logits
        src, dst = edges.edge_index if isinstance(edges, NeighborTable) else edges
        return logits.masked_fill((src == dst).view(-1, *[1] * (logits.dim() - 1)), 0.0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, heads={self.heads})"
