"""PackedIPALiteConv: state and position as one tensor, for what passes single tensors around."""

from typing import Any

import torch
from torch import Tensor

from ..graph import NeighborTable
from .conv import IPALiteConv
from .pyg import Adj, MessagePassing


class PackedIPALiteConv(IPALiteConv):
    r""":class:`IPALiteConv` on features :math:`[s_i, x_i]` that carry state and position as one.

    :class:`torch_geometric.nn.HeteroConv`, :func:`torch_geometric.nn.to_hetero` and
    :class:`torch_geometric.nn.Sequential` pass one tensor a node type. Average over relations
    (``aggr="mean"``): a sum would add up positions, which depend on the choice of the origin.

    Args:
        channels: as for :class:`IPALiteConv`, positions left out.
        *args: as for :class:`IPALiteConv`.
        **kwargs: as for :class:`IPALiteConv`.

    Shapes:
        - **input:** features (n, channels + pos_channels), or a pair for sources and
          destinations; edges; edge bias (E,) or (E, heads), optional
        - **output:** features (n_dst, channels + pos_channels)
    """

    # PyG writes faster forms of these for each class, and explainers go back to what it had.
    # Inherited, that would be the fast form of the parent, which knows no masks.
    propagate = MessagePassing.propagate
    edge_updater = MessagePassing.edge_updater

    def forward(  # type: ignore[override]
        self,
        x: Tensor | tuple[Tensor, Tensor],
        edge_index: Adj | NeighborTable,
        edge_bias: Tensor | None = None,
        size: tuple[int, int] | None = None,
        return_attention_weights: bool | None = None,
        batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """Update features; see the class for shapes, and :class:`IPALiteConv` for arguments.

        Raises:
            ValueError: as :class:`IPALiteConv`, or if one end has no features.
        """
        ends = x if isinstance(x, tuple) else (x,)
        if any(end is None or end.size(-1) <= self.pos_channels for end in ends):
            raise ValueError(
                f"{self} needs features of both ends, a state and {self.pos_channels} coordinates"
            )
        s = tuple(end[:, : -self.pos_channels] for end in ends)
        pos = tuple(end[:, -self.pos_channels :] for end in ends)
        given: Any = (s, pos) if isinstance(x, tuple) else (s[0], pos[0])
        s_out, pos_out, *weights = super().forward(
            given[0], given[1], edge_index, edge_bias, size, return_attention_weights, batch
        )
        out = torch.cat([s_out, pos_out.to(s_out.dtype)], dim=-1)
        return (out, weights[0]) if weights else out
