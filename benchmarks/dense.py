"""The dense n x n form of gate, block and model: the definition the sparse form must equal.

Written to be read against the formulas, not to be fast. Parameters carry the names of the sparse
modules, so a checkpoint loads into either.
"""

import math

import torch
from torch import Tensor, nn

from ipar_sparse.geometry.gauge import gauge_fix
from ipar_sparse.graph import NeighborTable


def dense_mask(graph: NeighborTable) -> Tensor:
    """The graph as a boolean matrix (n, n): row i attends to the true columns."""
    mask = torch.zeros(graph.num_nodes, graph.num_src_nodes, dtype=torch.bool, device=graph.device)
    src, dst = graph.edge_index
    mask[dst, src] = True
    return mask


def dense_edges(values: Tensor, graph: NeighborTable) -> Tensor:
    """Per-edge values (E, ...) as a matrix (n, n, ...), zero elsewhere."""
    shape = (graph.num_nodes, graph.num_src_nodes, *values.shape[1:])
    src, dst = graph.edge_index
    return values.new_zeros(shape).index_put((dst, src), values)


class DenseGate(nn.Module):
    """Gate logits of all n x n pairs, each from its own 4d features."""

    def __init__(self, in_channels: int, hidden_channels: int = 64, heads: int = 1):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(4 * in_channels, hidden_channels),
            nn.ReLU(),
            nn.Linear(hidden_channels, hidden_channels),
            nn.ReLU(),
            nn.Linear(hidden_channels, heads),
        )

    def forward(self, h: Tensor) -> Tensor:
        """Logits (n, n) or (n, n, heads); the diagonal is 0."""
        n = h.size(0)
        h_i, h_j = h.unsqueeze(1).expand(n, n, -1), h.unsqueeze(0).expand(n, n, -1)
        logits = self.mlp(torch.cat([h_i, h_j, (h_i - h_j).abs(), h_i * h_j], dim=-1)).squeeze(-1)
        own = torch.eye(n, dtype=torch.bool, device=h.device)
        return logits.masked_fill(own.view(n, n, *[1] * (logits.dim() - 2)), 0.0)


class DenseBlock(nn.Module):
    """One round of masked attention with n x n logits a head."""

    def __init__(self, channels: int, heads: int = 4, head_channels: int = 32):
        super().__init__()
        self.heads, self.head_channels = heads, head_channels
        inner = heads * head_channels
        self.lin_query = nn.Linear(channels, inner, bias=False)
        self.lin_key = nn.Linear(channels, inner, bias=False)
        self.lin_value = nn.Linear(channels, inner, bias=False)
        self.weight_pos = nn.Parameter(torch.zeros(heads, 2, 2))
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels + inner, 2 * channels),
            nn.GELU(),
            nn.Linear(2 * channels, channels),
        )
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, s: Tensor, pos: Tensor, mask: Tensor, bias: Tensor | None = None):
        """States (n, c) and positions (n, 2); mask (n, n); bias (n, n) or (n, n, heads)."""
        n = s.size(0)
        query, key, value = (
            lin(s).view(n, self.heads, self.head_channels)
            for lin in (self.lin_query, self.lin_key, self.lin_value)
        )
        logits = torch.einsum("ihc,jhc->ijh", query, key) / math.sqrt(self.head_channels)
        if bias is not None:
            logits = logits + (bias.unsqueeze(-1) if bias.dim() == 2 else bias)
        logits = logits.masked_fill(~mask.unsqueeze(-1), -torch.inf)
        attention = torch.nan_to_num(logits.softmax(dim=1))
        moves = pos.unsqueeze(0) - pos.unsqueeze(1)
        displacement = torch.einsum("ijh,ijb->ihb", attention, moves)
        pos_out = pos + torch.einsum("hab,ihb->ia", self.weight_pos, displacement)
        out = torch.einsum("ijh,jhc->ihc", attention, value).reshape(n, -1)
        return s + self.mlp(torch.cat([self.norm(s), out], dim=-1)), pos_out


class DenseModel(nn.Module):
    """The model on n x n masks, without start noise."""

    def __init__(
        self,
        in_channels: int,
        channels: int = 96,
        heads: int = 4,
        head_channels: int = 32,
        num_recycles: int = 5,
        shared: bool = True,
    ):
        super().__init__()
        self.num_recycles, self.shared = num_recycles, shared
        self.mlp_state = nn.Sequential(
            nn.Linear(in_channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )
        self.mlp_pos = nn.Sequential(
            nn.Linear(in_channels, channels), nn.GELU(), nn.Linear(channels, 2)
        )
        self.blocks = nn.ModuleList(
            DenseBlock(channels, heads, head_channels) for _ in range(1 if shared else num_recycles)
        )

    def forward(self, h: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
        """Positions (n, 2) from embeddings (n, d), mask (n, n) and bias (n, n)."""
        state, pos = self.mlp_state(h), gauge_fix(self.mlp_pos(h))
        for recycle in range(self.num_recycles):
            state, pos = self.blocks[0 if self.shared else recycle](state, pos, mask, bias)
            pos = gauge_fix(pos)
        return pos
