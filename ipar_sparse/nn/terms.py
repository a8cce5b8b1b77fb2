"""Extra terms of the attention logits, and the learned scalars around them.

Geometry terms are chosen by name from :data:`LOGIT_TERMS`. Each maps positions and states of an
edge's two ends to logits (E, heads). They are added to the edge bias, so that every attention
backend can compute them. A pair term is made of the embeddings instead: :class:`PairBias`. Both
save only their inputs and logits for the backward pass.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from .. import ops
from ..graph import NeighborTable
from .pyg import inits

_SOFTPLUS_ONE = math.log(math.e - 1)  # softplus of it is 1
_MAX_OUTPUTS = 16  # outputs of the edge MLP that the fused kernels take at once


class SquaredDistance(nn.Module):
    r"""Monotone geometry term, :math:`-\mathrm{softplus}(\gamma_h) \|x_i - x_j\|^2`.

    Args:
        channels: width of the node state (not used).
        heads: number of heads.
        pos_channels: dimension of the coordinates.
        clamp: lower bound of the term, e.g. -10; None for none (default: None).

    Shapes:
        - **input:** positions (n_src, 2) and (n, 2), states (n_src, channels) and (n, channels),
          ``edge_index`` (2, E), graph of each destination (n,) or None
        - **output:** logits (E, heads)
    """

    def __init__(
        self,
        channels: int | tuple[int, int],
        heads: int,
        pos_channels: int = 2,
        clamp: float | None = None,
    ):
        super().__init__()
        self.clamp = clamp
        self.gamma = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at softplus = 1."""
        nn.init.constant_(self.gamma, _SOFTPLUS_ONE)

    def forward(
        self,
        pos_src: Tensor,
        pos_dst: Tensor,
        s_src: Tensor,
        s_dst: Tensor,
        edge_index: Tensor,
        batch: Tensor | None = None,
    ) -> Tensor:
        """Logits of the edges; see the class for shapes."""
        slope = softplus(self.gamma).to(pos_dst.dtype)
        return ops.apply_edges(self._logits, edge_index, [pos_src], [pos_dst], [slope])

    def _logits(self, x_j: Tensor, x_i: Tensor, slope: Tensor) -> Tensor:
        logits = -slope * (x_j - x_i).square().sum(-1, keepdim=True)
        return logits if self.clamp is None else logits.clamp(min=self.clamp, max=0.0)

    def learned_scalars(self, s_src: Tensor, s_dst: Tensor) -> dict[str, Tensor]:
        """Slope of each head (heads,)."""
        return {"gamma": softplus(self.gamma)}


class RadialBasis(nn.Module):
    r"""Radial-basis geometry term: a learned function of distance for each head.

    .. math::
        \operatorname{clip}\Bigl(\sum_m w_m^h
            \exp\bigl(-\tfrac{(d_{ij} / \tilde d - \mu_m)^2}{2 \delta^2}\bigr),
            -b_{\max}, b_{\max}\Bigr)

    with :math:`\tilde d` the median distance over the edges of a graph, :math:`\mu_m` evenly
    spaced on [0, 2] and :math:`\delta` their spacing. No gradient passes through
    :math:`\tilde d`. Weights start at zero.

    Args:
        channels: width of the node state (not used).
        heads: number of heads.
        pos_channels: dimension of the coordinates.
        centers: number of Gaussians (default: 16).
        b_max: largest absolute value of the term (default: 5.0).

    Shapes:
        as :class:`SquaredDistance`
    """

    def __init__(
        self,
        channels: int | tuple[int, int],
        heads: int,
        pos_channels: int = 2,
        centers: int = 16,
        b_max: float = 5.0,
    ):
        super().__init__()
        self.centers, self.b_max = centers, b_max
        self.weight = nn.Parameter(torch.empty(heads, centers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all weights to zero, so that the term starts without effect."""
        nn.init.zeros_(self.weight)

    def forward(
        self,
        pos_src: Tensor,
        pos_dst: Tensor,
        s_src: Tensor,
        s_dst: Tensor,
        edge_index: Tensor,
        batch: Tensor | None = None,
    ) -> Tensor:
        """Logits of the edges; see :class:`SquaredDistance` for shapes."""
        with torch.no_grad():
            distance = ops.apply_edges(_distance, edge_index, [pos_src], [pos_dst]).squeeze(-1)
            scale = _median(distance, edge_index[1], pos_dst.size(0), batch).clamp(min=1e-6)
        weight = self.weight.to(pos_dst.dtype)
        return ops.apply_edges(self._logits, edge_index, [pos_src], [pos_dst, scale], [weight])

    def _logits(self, x_j: Tensor, x_i: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        center = torch.linspace(0, 2, self.centers, dtype=x_i.dtype, device=x_i.device)
        spacing = 2 / (self.centers - 1)
        gap = (_distance(x_j, x_i) / scale.unsqueeze(-1) - center) / spacing
        return ((-0.5 * gap.square()).exp() @ weight.T).clamp(-self.b_max, self.b_max)

    def learned_scalars(self, s_src: Tensor, s_dst: Tensor) -> dict[str, Tensor]:
        """Root-mean-square weight of each head (heads,)."""
        return {"rbf_weight": self.weight.square().mean(-1).sqrt()}


class PointAttention(nn.Module):
    r"""Attention by distances of points at learned offsets from the cells.

    The 2D counterpart of AlphaFold's invariant point attention.

    .. math::
        \operatorname{clip}\bigl(-\|(x_i + W_Q^h s_i) - (x_j + W_K^h s_j)\|^2 / \sigma_h^2,
            -10, 0\bigr)

    Offsets are vectors in the frame of the layout. The term is invariant to translation, and not
    to rotation, since states do not rotate. Offsets start at zero and :math:`\sigma_h` at 1.

    Args:
        channels: width of the node state, or widths of sources and destinations.
        heads: number of heads.
        pos_channels: dimension of the coordinates.
        clamp: lower bound of the term (default: -10.0).

    Shapes:
        as :class:`SquaredDistance`
    """

    def __init__(
        self,
        channels: int | tuple[int, int],
        heads: int,
        pos_channels: int = 2,
        clamp: float = -10.0,
    ):
        super().__init__()
        c_src, c_dst = channels if isinstance(channels, tuple) else (channels, channels)
        self.heads, self.pos_channels, self.clamp = heads, pos_channels, clamp
        self.lin_query = nn.Linear(c_dst, heads * pos_channels, bias=False)
        self.lin_key = nn.Linear(c_src, heads * pos_channels, bias=False)
        self.log_sigma = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all offsets to zero, so that the points are the cells."""
        nn.init.zeros_(self.lin_query.weight)
        nn.init.zeros_(self.lin_key.weight)
        nn.init.zeros_(self.log_sigma)

    def forward(
        self,
        pos_src: Tensor,
        pos_dst: Tensor,
        s_src: Tensor,
        s_dst: Tensor,
        edge_index: Tensor,
        batch: Tensor | None = None,
    ) -> Tensor:
        """Logits of the edges; see :class:`SquaredDistance` for shapes."""
        point_src = pos_src.unsqueeze(1) + self._offsets(self.lin_key, s_src).to(pos_src.dtype)
        point_dst = pos_dst.unsqueeze(1) + self._offsets(self.lin_query, s_dst).to(pos_dst.dtype)
        sharpness = (-2 * self.log_sigma).exp().to(pos_dst.dtype)
        return ops.apply_edges(self._logits, edge_index, [point_src], [point_dst], [sharpness])

    def _logits(self, p_j: Tensor, p_i: Tensor, sharpness: Tensor) -> Tensor:
        return (-(p_i - p_j).square().sum(-1) * sharpness).clamp(min=self.clamp, max=0.0)

    def _offsets(self, linear: nn.Linear, s: Tensor) -> Tensor:
        return linear(s).view(-1, self.heads, self.pos_channels)

    def learned_scalars(self, s_src: Tensor, s_dst: Tensor) -> dict[str, Tensor]:
        """Mean length of the offsets and width of each head (heads,)."""
        query, key = self._offsets(self.lin_query, s_dst), self._offsets(self.lin_key, s_src)
        norm = (query.norm(dim=-1).mean(0) + key.norm(dim=-1).mean(0)) / 2
        return {"offset_norm": norm, "sigma": self.log_sigma.exp()}


LOGIT_TERMS: dict[str, Callable[..., nn.Module]] = {
    "mono": SquaredDistance,
    "mono_clamped": partial(SquaredDistance, clamp=-10.0),
    "rbf": RadialBasis,
    "point_ipa": PointAttention,
}
"""Geometry terms by name."""


class PairBias(nn.Module):
    r"""Pair term: a feature vector of each edge, read out by every head of every block.

    .. math::
        z_{ij} = \mathrm{MLP}([h_i, h_j, |h_i - h_j|, h_i \odot h_j]), \quad
        b_{ij}^{rh} = \langle w^{rh}, z_{ij} \rangle

    with widths 4d -> 64 -> 64 -> 32 and ReLU between. Read-outs start at zero. They are folded
    into the MLP's last layer, so that the kernels of the gate serve and :math:`z_{ij}` is never
    formed.

    Args:
        in_channels: width d of the embedding.
        heads: read-outs of a block.
        num_blocks: blocks that have read-outs (default: 1).
        hidden_channels: widths of the hidden layers, one or two (default: (64, 64)).
        channels: width of z (default: 32).
        backend: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"triton"`` (default: ``"auto"``).

    Shapes:
        - **input:** embeddings (n, d); edges as :class:`~ipar_sparse.graph.NeighborTable` or
          ``edge_index`` (2, E)
        - **output:** logits (E, heads) for each block
    """

    def __init__(
        self,
        in_channels: int,
        heads: int,
        num_blocks: int = 1,
        hidden_channels: Sequence[int] = (64, 64),
        channels: int = 32,
        backend: str = "auto",
    ):
        super().__init__()
        if len(hidden_channels) not in (1, 2):
            raise ValueError(
                f"PairBias takes one or two hidden layers; given {tuple(hidden_channels)}"
            )
        self.in_channels, self.backend = in_channels, backend
        widths = [4 * in_channels, *hidden_channels, channels]
        layers: list[nn.Module] = []
        for width, following in pairwise(widths):
            layers += [nn.Linear(width, following), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.read_out = nn.Parameter(torch.empty(num_blocks, heads, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the MLP anew; read-outs are zero, so that the term starts without effect."""
        inits.reset(self.mlp)
        nn.init.zeros_(self.read_out)

    def forward(self, h: Tensor, edges: NeighborTable | Tensor) -> list[Tensor]:
        """Logits of the edges, one tensor a block; see the class for shapes."""
        first, *middle, last = (layer for layer in self.mlp if isinstance(layer, nn.Linear))
        with torch.autocast(h.device.type, enabled=False):
            read_out = self.read_out.flatten(0, 1)
            weight, bias = read_out @ last.weight, read_out @ last.bias
            second: tuple[Tensor, Tensor]
            if middle:
                second = middle[0].weight, middle[0].bias
            else:  # the identity: a second ReLU does not change the output of the first
                eye = torch.eye(first.out_features, dtype=weight.dtype, device=weight.device)
                second = eye, torch.zeros_like(first.bias)
        logits = []
        for part in zip(weight.split(_MAX_OUTPUTS), bias.split(_MAX_OUTPUTS), strict=True):
            weights = (first.weight, first.bias, *second, *part)
            values = ops.edge_gate(h, edges, weights, backend=self.backend)
            logits.append(values.view(-1, part[0].size(0)))
        heads = self.read_out.size(1)
        return [part.contiguous() for part in torch.cat(logits, dim=-1).split(heads, dim=-1)]

    def __repr__(self) -> str:
        blocks, heads, channels = self.read_out.shape
        return (
            f"{type(self).__name__}({self.in_channels}, heads={heads}, num_blocks={blocks}, "
            f"channels={channels})"
        )


class LearnedScalars(nn.Module):
    r"""Learned numbers, free or kept in a range, :math:`a + (b - a)\,\mathrm{sigmoid}(\theta)`.

    Args:
        initial: their initial values.
        bounds: the range (a, b); every initial value lies inside. None leaves them free.
    """

    def __init__(self, initial: Sequence[float], bounds: tuple[float, float] | None = None):
        super().__init__()
        if bounds is not None and not all(bounds[0] < value < bounds[1] for value in initial):
            raise ValueError(
                f"initial values {tuple(initial)} must lie strictly inside {tuple(bounds)}"
            )
        self.initial, self.bounds = tuple(initial), bounds
        self.theta = nn.Parameter(torch.empty(len(self.initial)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the numbers to their initial values."""
        values = torch.tensor(self.initial, dtype=torch.float64)
        if self.bounds is not None:
            low, high = self.bounds
            values = torch.logit((values - low) / (high - low))
        with torch.no_grad():
            self.theta.copy_(values)

    def forward(self) -> Tensor:
        """The numbers (m,)."""
        if self.bounds is None:
            return self.theta
        low, high = self.bounds
        return low + (high - low) * self.theta.sigmoid()

    def extra_repr(self) -> str:
        return f"initial={self.initial}, bounds={self.bounds}"


def _distance(x_j: Tensor, x_i: Tensor) -> Tensor:
    """Distances (e, 1); the gradient is 0, and not NaN, where points coincide."""
    return (x_j - x_i).square().sum(-1, keepdim=True).clamp(min=1e-24).sqrt()


def _median(values: Tensor, dst: Tensor, num_nodes: int, batch: Tensor | None) -> Tensor:
    """At each node the (lower) median of the edge values (E,) of its graph; 1 without edges."""
    # A compiler does not see whether a padded table has edges; without any, no value is read.
    if not torch.compiler.is_compiling() and not values.numel():
        return values.new_ones(num_nodes)
    if batch is None:
        return values.median().expand(num_nodes)
    graph = batch[dst]
    order = values.argsort()
    order = order[graph[order].argsort(stable=True)]
    count = torch.bincount(graph, minlength=int(batch.max()) + 1)
    middle = (count.cumsum(0) - count + (count - 1).clamp(min=0) // 2).clamp(max=values.numel() - 1)
    return torch.where(count > 0, values[order[middle]], 1.0)[batch]
