"""IPALiteModel: embeddings to positions, by recycled attention."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.nn import inits
from torch_geometric.typing import Adj

from ..gauge import gauge_fix
from ..graph import NeighborTable
from .conv import IPALiteConv


class IPALiteModel(nn.Module):
    r"""Positions of cells from their embeddings alone (IPA-Lite V1).

    State and position start as MLPs of the embedding; a block of attention, shared by all
    recycles by default, then moves both, with the gauge fixed after each recycle.

    Args:
        in_channels: width d of the embedding.
        channels: width of the node state (default: 96).
        heads: attention heads (default: 4).
        head_channels: width of a head (default: 32).
        num_recycles: passes through the block (default: 5).
        shared: whether all recycles use one block (default: True).
        terms: names of extra logit terms (default: none).
        init_noise: std of the Gaussian noise on the first positions in training (default: 0.05).
        checkpoint_recycles: keep only each recycle's input for the backward pass, so that
            activation memory does not grow with the work inside a recycle (default: False).
        backend: of the attention (default: ``"auto"``).

    Shapes:
        - **input:** embeddings (n, d); edges as :class:`~ipar_sparse.graph.NeighborTable` or any
          adjacency of PyG; edge bias (E,) or (E, heads), optional; batch (n,), optional
        - **output:** positions (n, 2) in the unit-RMS gauge, each graph of the batch by itself
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 96,
        heads: int = 4,
        head_channels: int = 32,
        num_recycles: int = 5,
        shared: bool = True,
        terms: tuple[str, ...] = (),
        init_noise: float = 0.05,
        checkpoint_recycles: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        self.in_channels = in_channels
        self.channels = channels
        self.num_recycles = num_recycles
        self.shared = shared
        self.init_noise = init_noise
        self.checkpoint_recycles = checkpoint_recycles
        self.mlp_state = nn.Sequential(
            nn.Linear(in_channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )
        self.mlp_pos = nn.Sequential(
            nn.Linear(in_channels, channels), nn.GELU(), nn.Linear(channels, 2)
        )
        self.blocks = nn.ModuleList(
            IPALiteConv(channels, heads, head_channels, terms=tuple(terms), backend=backend)
            for _ in range(1 if shared else num_recycles)
        )

    def reset_parameters(self):
        """Draw all weights anew."""
        for module in (self.mlp_state, self.mlp_pos, *self.blocks):
            inits.reset(module)

    def forward(
        self,
        h: Tensor,
        graph: NeighborTable | Adj,
        edge_bias: Tensor | None = None,
        batch: Tensor | None = None,
        num_graphs: int | None = None,
        generator: torch.Generator | None = None,
        return_trajectory: bool = False,
        return_attention_weights: bool = False,
    ):
        """Predict positions; see the class for shapes.

        Args:
            num_graphs: graphs in ``batch``; counted if left out.
            generator: source of the start noise; torch's default if left out.
            return_trajectory: also return the positions before the first recycle and after each.
            return_attention_weights: also return ``(edge_index, attention)`` of each recycle.

        Raises:
            ValueError: if ``h`` does not have ``in_channels`` columns.
        """
        if h.dim() != 2 or h.size(-1) != self.in_channels:
            raise ValueError(
                f"IPALiteModel({self.in_channels}) needs embeddings (n, {self.in_channels}); "
                f"given {tuple(h.shape)}"
            )
        if batch is not None and num_graphs is None:
            num_graphs = int(batch.max()) + 1 if batch.numel() else 0
        state = self.mlp_state(h)
        # Half precision cannot hold neighbour distances on a large slide: positions stay float32.
        pos = self.mlp_pos(h)
        pos = pos.float() if pos.dtype in (torch.float16, torch.bfloat16) else pos
        if self.training and self.init_noise > 0:
            noise = torch.empty_like(pos).normal_(generator=generator)
            pos = pos + self.init_noise * noise
        pos = gauge_fix(pos, batch, num_graphs)
        trajectory, attention = [pos], []
        for recycle in range(self.num_recycles):
            block = self.blocks[0 if self.shared else recycle]
            if return_attention_weights:
                state, pos, weights = block(
                    state, pos, graph, edge_bias, return_attention_weights=True
                )
                attention.append(weights)
            elif self.checkpoint_recycles and torch.is_grad_enabled():
                state, pos = checkpoint(block, state, pos, graph, edge_bias, use_reentrant=False)
            else:
                state, pos = block(state, pos, graph, edge_bias)
            pos = gauge_fix(pos, batch, num_graphs)
            trajectory.append(pos)
        result = (pos,)
        if return_trajectory:
            result += (trajectory,)
        if return_attention_weights:
            result += (attention,)
        return result if len(result) > 1 else pos

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, channels={self.channels}, "
            f"num_recycles={self.num_recycles}, shared={self.shared})"
        )
