"""IPALiteConv: attention over in-edges that updates states and coordinates."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing, inits
from torch_geometric.typing import Adj, SparseTensor
from torch_geometric.utils import is_sparse, to_edge_index

from .. import ops
from ..graph import NeighborTable
from ..ops.reference import attention_logits
from .terms import LOGIT_TERMS, LearnedScalars


class IPALiteConv(MessagePassing):
    r"""IPA-Lite block: a frame-free 2D variant of AlphaFold's invariant point attention.

    .. math::
        \ell_{ij}^h &= \langle W_Q^h s_i, W_K^h s_j \rangle / \sqrt{C} + b_{ij}^h

        a_{ij}^h &= \operatorname{softmax}_{j \in \mathcal{N}(i)} \ell_{ij}^h

        x_i' &= x_i + \sum_h W_x^h \sum_j a_{ij}^h (x_j - x_i)

        s_i' &= s_i + \mathrm{MLP}\bigl(\bigl[\mathrm{LayerNorm}(s_i),
        \textstyle\bigoplus_h \sum_j a_{ij}^h W_V^h s_j\bigr]\bigr)

    Attention runs over the in-edges of a node; a node without any receives zeros. The coordinate
    update is equivariant to translation, and to rotation where :math:`W_x^h` commutes with it.
    It starts as the identity: :math:`W_x^h` and the MLP's last layer are zero.

    With ``qk_norm``, queries and keys pass through a LayerNorm without affine part. A learned
    scale takes the place of :math:`1 / \sqrt{C}`. Products of independent directions then have a
    standard deviation of :math:`\sqrt{C}` times the scale. At C = 32 a scale of 1 gives logits of
    5.7, and one of :math:`\sqrt{32}` one-hot attention.

    On a :class:`~ipar_sparse.graph.NeighborTable` the layer runs fused, in bounded memory. It
    passes messages on PyG's ``edge_index``, ``SparseTensor``, ``EdgeIndex`` or a sparse tensor,
    and wherever attention weights, an explainer or hooks need the messages. Both paths give the
    same results.

    Args:
        channels: width of the node state.
        heads: attention heads (default: 4).
        head_channels: width of a head (default: 32).
        terms: names of extra logit terms from :data:`ipar_sparse.nn.LOGIT_TERMS`, or a mapping
            from names to their arguments (default: none).
        qk: whether logits contain query-key products; if not, they are the bias and the terms
            alone (default: True).
        qk_norm: normalise queries and keys (default: False).
        qk_scale: initial value of the learned scale of ``qk_norm`` (default: 1.0).
        qk_range: range of :math:`\tau = \sqrt{C}` times the learned scale; None leaves it free
            (default: None).
        pos_channels: dimension of the coordinates (default: 2).
        backend: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"triton"`` for the fused path
            (default: ``"auto"``).
        **kwargs: further arguments of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **input:** states (n, channels) or ((n_src, channels), (n_dst, channels)); positions
          (n, 2) or ((n_src, 2), (n_dst, 2)); edges; edge bias (E,), (E, 1) or (E, heads),
          optional, in the order of the edges (row-major for tables and sparse matrices)
        - **output:** states (n_dst, channels), positions (n_dst, 2), and if asked for,
          ``(edge_index, attention (E, heads))``
    """

    def __init__(
        self,
        channels: int,
        heads: int = 4,
        head_channels: int = 32,
        terms: Iterable[str] | Mapping[str, Mapping[str, Any]] = (),
        qk: bool = True,
        qk_norm: bool = False,
        qk_scale: float = 1.0,
        qk_range: tuple[float, float] | None = None,
        pos_channels: int = 2,
        backend: str = "auto",
        **kwargs,
    ):
        kwargs.setdefault("aggr", "add")
        super().__init__(node_dim=0, **kwargs)
        unknown = sorted(set(terms) - set(LOGIT_TERMS))
        if unknown:
            raise ValueError(f"unknown logit terms {unknown}; choose from {sorted(LOGIT_TERMS)}")
        if qk_norm and not qk:
            raise ValueError("qk_norm normalises queries and keys, but qk=False leaves them out")
        self.channels = channels
        self.heads = heads
        self.head_channels = head_channels
        self.pos_channels = pos_channels
        self.backend = backend
        inner = heads * head_channels
        self.lin_query = nn.Linear(channels, inner, bias=False) if qk else None
        self.lin_key = nn.Linear(channels, inner, bias=False) if qk else None
        self.lin_value = nn.Linear(channels, inner, bias=False)
        self.weight_pos = nn.Parameter(torch.empty(heads, pos_channels, pos_channels))
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels + inner, 2 * channels),
            nn.GELU(),
            nn.Linear(2 * channels, channels),
        )
        options = terms if isinstance(terms, Mapping) else {name: {} for name in terms}
        self.terms = nn.ModuleDict(
            {
                name: LOGIT_TERMS[name](channels, heads, pos_channels, **given)
                for name, given in options.items()
            }
        )
        bounds = None
        if qk_range is not None:
            low, high = qk_range
            bounds = low / math.sqrt(head_channels), high / math.sqrt(head_channels)
        self.qk_scale = LearnedScalars([qk_scale], bounds) if qk_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew; the layer starts as the identity on states and positions."""
        super().reset_parameters()
        linear = (self.lin_query, self.lin_key, self.lin_value)
        for module in (*linear, self.norm, self.mlp, *self.terms.values(), self.qk_scale):
            inits.reset(module)
        for parameter in (self.weight_pos, *self.mlp[-1].parameters()):
            nn.init.zeros_(parameter)

    def forward(
        self,
        s: Tensor | tuple[Tensor, Tensor],
        pos: Tensor | tuple[Tensor, Tensor],
        edge_index: Adj | NeighborTable,
        edge_bias: Tensor | None = None,
        size: tuple[int, int] | None = None,
        return_attention_weights: bool | None = None,
        batch: Tensor | None = None,
        use_terms: bool = True,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Update states and positions; see the class for shapes.

        Args:
            s: states of the nodes, or of sources and destinations.
            pos: their positions.
            edge_index: edges, in any format named above.
            edge_bias: additive logits of the edges.
            size: numbers of sources and destinations; read from the states if left out.
            return_attention_weights: also return the edges and their attention.
            batch: graph of each destination (n_dst,), for terms that are scaled by graph.
            use_terms: whether the extra logit terms are added.

        Raises:
            ValueError: if states are not ``channels`` wide.
        """
        s_src, s_dst = s if isinstance(s, tuple) else (s, s)
        pos_src, pos_dst = pos if isinstance(pos, tuple) else (pos, pos)
        if s_dst.size(-1) != self.channels or s_src.size(-1) != self.channels:
            raise ValueError(
                f"{self} needs states of width {self.channels}; "
                f"given {tuple(s_src.shape)} and {tuple(s_dst.shape)}"
            )
        query, key = self._query_key(s_src, s_dst)
        value = self.lin_value(s_src).view(-1, self.heads, self.head_channels)
        # Under autocast, normalised queries and keys are float32.
        query, key = query.to(value.dtype), key.to(value.dtype)
        if edge_bias is not None and edge_bias.dim() == 2 and edge_bias.size(1) == 1:
            edge_bias = edge_bias.squeeze(-1)

        needs_messages = return_attention_weights or self._needs_messages()
        if needs_messages or not isinstance(edge_index, NeighborTable):
            edge_index = as_edge_index(edge_index)
        if use_terms and self.terms:
            edges = edge_index.edge_index if isinstance(edge_index, NeighborTable) else edge_index
            edge_bias = self._with_terms(edge_bias, pos_src, pos_dst, s_src, s_dst, edges, batch)
        pos_pair = (pos_src, pos_dst)
        weights: tuple[Tensor, Tensor] | None = None
        if isinstance(edge_index, NeighborTable):
            out, displacement, _ = ops.edge_attention(
                query, key, value, pos_pair, edge_bias, edge_index, backend=self.backend
            )
        else:
            size = size or (s_src.size(0), s_dst.size(0))
            out, displacement, attention = self._pass_messages(
                query, key, value, pos_pair, edge_bias, edge_index, size
            )
            weights = (edge_index, attention)

        # No matrix product, which autocast would compute in half precision.
        moved = self.weight_pos.to(displacement.dtype) * displacement.unsqueeze(-2)
        pos_out = pos_dst + moved.sum(dim=(1, 3))
        aggregated = out.reshape(-1, self.heads * self.head_channels).to(query.dtype)
        normed = self._normed(s_dst).to(query.dtype)
        s_out = s_dst + self.mlp(torch.cat([normed, aggregated], dim=-1))
        if return_attention_weights and weights is not None:
            return s_out, pos_out, weights
        return s_out, pos_out

    def _pass_messages(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pos: tuple[Tensor, Tensor],
        edge_bias: Tensor | None,
        edge_index: Tensor,
        size: tuple[int, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted values, displacements and attention (E, heads) by message passing."""
        if edge_bias is None:
            edge_bias = pos[0].new_zeros(edge_index.size(1))
        logits = self.edge_updater(
            edge_index, query=(None, query), key=(key, None), edge_bias=edge_bias, size=size
        )
        attention, _ = ops.segment_softmax(logits, edge_index[1], size[1])
        total = self.propagate(
            edge_index, value=(value, None), pos=pos, attention=attention, size=size
        )
        out, displacement = total.split([self.head_channels, self.pos_channels], dim=-1)
        return out, displacement.to(pos[1].dtype), attention

    def edge_update(self, query_i: Tensor, key_j: Tensor, edge_bias: Tensor) -> Tensor:
        """Logits (E, heads) of the edges, for :meth:`edge_updater`."""
        return attention_logits(query_i, key_j, edge_bias)

    def message(self, value_j: Tensor, pos_i: Tensor, pos_j: Tensor, attention: Tensor) -> Tensor:
        """Weighted values and displacements (E, heads, head_channels + pos_channels)."""
        moves = (pos_j - pos_i).unsqueeze(1).expand(-1, self.heads, -1)
        dtype = torch.promote_types(attention.dtype, moves.dtype)
        carried = torch.cat([value_j.to(dtype), moves.to(dtype)], dim=-1)
        return attention.unsqueeze(-1).to(dtype) * carried

    def logit_terms(
        self,
        s: Tensor,
        pos: Tensor,
        edge_index: Tensor,
        batch: Tensor | None = None,
        use_terms: bool = True,
    ) -> dict[str, Tensor]:
        """Terms that this layer adds to the edge bias to form its logits, by name.

        Args:
            s: states (n, channels).
            pos: positions (n, 2).
            edge_index: edges (2, E).
            batch: graph of each node (n,), or None.
            use_terms: whether to include the extra terms.

        Returns:
            Logits (E, heads) each; ``"qk"``, where there is one, comes first.
        """
        src, dst = edge_index
        found = {}
        if self.lin_query is not None:
            query, key = self._query_key(s, s)
            found["qk"] = attention_logits(query[dst], key[src], None)
        if use_terms:
            for name, term in self.terms.items():
                found[name] = term(pos, pos, s, s, edge_index, batch)
        return found

    def learned_scalars(self, s: Tensor, use_terms: bool = True) -> dict[str, Tensor]:
        """Learned scalars of the logits, single or one a head, by name.

        Args:
            s: states (n, channels), whose point offsets are measured.
            use_terms: whether to include those of the extra terms.
        """
        found = {}
        if self.qk_scale is not None:
            found["tau"] = self.qk_scale()[0] * math.sqrt(self.head_channels)
        if use_terms:
            for term in self.terms.values():
                found |= term.learned_scalars(s, s)
        return found

    def _query_key(self, s_src: Tensor, s_dst: Tensor) -> tuple[Tensor, Tensor]:
        shape = (self.heads, self.head_channels)
        if self.lin_query is None or self.lin_key is None:
            query, key = (s.new_zeros(s.size(0), *shape) for s in (s_dst, s_src))
        else:
            query = self.lin_query(s_dst).view(-1, *shape)
            key = self.lin_key(s_src).view(-1, *shape)
        if self.qk_scale is not None:
            query, key = (nn.functional.layer_norm(x, shape[1:]) for x in (query, key))
            query = query * (self.qk_scale() * math.sqrt(self.head_channels))
        return query, key

    def _normed(self, s: Tensor) -> Tensor:
        # Autocast would save a float32 copy of half-precision states. The kernel accumulates in
        # float32 in any case.
        with torch.autocast(s.device.type, enabled=False):
            weight, bias = self.norm.weight.to(s.dtype), self.norm.bias.to(s.dtype)
            return nn.functional.layer_norm(
                s, self.norm.normalized_shape, weight, bias, self.norm.eps
            )

    def _with_terms(self, bias: Tensor | None, *ends: Tensor | None) -> Tensor | None:
        """The edge bias plus all extra terms, (E, heads)."""
        if bias is not None and bias.dim() == 1:
            bias = bias.unsqueeze(-1)
        for term in self.terms.values():
            logits = term(*ends)
            bias = logits if bias is None else bias + logits
        return bias

    def _needs_messages(self) -> bool:
        """Whether an explainer or a hook needs the messages, which the fused path never forms."""
        hooks = (
            self._propagate_forward_pre_hooks,
            self._propagate_forward_hooks,
            self._message_forward_pre_hooks,
            self._message_forward_hooks,
            self._aggregate_forward_pre_hooks,
            self._aggregate_forward_hooks,
            self._edge_update_forward_pre_hooks,
            self._edge_update_forward_hooks,
        )
        return bool(self.explain) or any(hooks)

    def __repr__(self) -> str:
        extra = f", terms={list(self.terms)}" if self.terms else ""
        extra += ", qk=False" if self.lin_query is None else ""
        extra += ", qk_norm=True" if self.qk_scale is not None else ""
        return (
            f"{type(self).__name__}({self.channels}, heads={self.heads}, "
            f"head_channels={self.head_channels}{extra})"
        )


def as_edge_index(edges: Adj | NeighborTable) -> Tensor:
    """Edges of any PyG format as (2, E), sources first; a sparse matrix is adj_t: (dst, src)."""
    if isinstance(edges, NeighborTable):
        return edges.edge_index
    if isinstance(edges, SparseTensor) or is_sparse(edges):
        row, col = to_edge_index(edges)[0]
        return torch.stack([col, row])
    return edges.as_tensor() if hasattr(edges, "as_tensor") else edges
