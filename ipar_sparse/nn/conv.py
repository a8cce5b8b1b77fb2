"""IPALiteConv: attention over in-edges that updates states and coordinates."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..graph import NeighborTable
from ..ops.linear import Linear
from ..ops.reference import attention_logits
from .lazy import defer, materialize
from .pyg import (
    Adj,
    MessagePassing,
    SparseTensor,
    SumAggregation,
    inits,
    is_sparse,
    to_edge_index,
)
from .terms import LOGIT_TERMS, LearnedScalars

POS_WEIGHTS = ("matrix", "scalar", "complex")


class IPALiteConv(MessagePassing):
    r"""IPA-Lite block: a frame-free 2D variant of AlphaFold's invariant point attention.

    .. math::
        \ell_{ij}^h &= \langle W_Q^h s_i, W_K^h s_j \rangle / \sqrt{C} + b_{ij}^h

        a_{ij}^h &= \operatorname{softmax}_{j \in \mathcal{N}(i)} \ell_{ij}^h

        x_i' &= x_i + \sum_h W_x^h \sum_j a_{ij}^h (x_j - x_i)

        s_i' &= s_i + \mathrm{MLP}\bigl(\bigl[\mathrm{LayerNorm}(s_i),
        \textstyle\bigoplus_h \sum_j a_{ij}^h W_V^h s_j\bigr]\bigr)

    Attention runs over the in-edges of a node; a node without any receives zeros. The layer starts
    as the identity: :math:`W_x^h` and the MLP's last layer are zero.

    The coordinate update is equivariant to translation. What else it is equivariant to depends on
    ``pos_weight``, which gives the form of :math:`W_x^h`:

    - ``"matrix"``: any matrix; equivariant to translation alone.
    - ``"complex"``: :math:`a_h I + b_h R(90°)`; equivariant to rotation as well. Positions are 2D.
    - ``"scalar"``: :math:`a_h I`; equivariant to rotation and reflection as well.

    States are then invariant. The term ``"point_ipa"`` breaks both, since states do not rotate.

    With ``qk_norm``, queries and keys pass through a LayerNorm without affine part. A learned
    scale takes the place of :math:`1 / \sqrt{C}`. Products of independent directions then have a
    standard deviation of :math:`\sqrt{C}` times the scale. At C = 32 a scale of 1 gives logits of
    5.7, and one of :math:`\sqrt{32}` one-hot attention.

    On a :class:`~ipar_sparse.graph.NeighborTable` the layer runs fused, in bounded memory. It
    passes messages on PyG's ``edge_index``, ``SparseTensor``, ``EdgeIndex`` or a sparse tensor,
    and wherever attention weights, an explainer or hooks need the messages. Both paths give the
    same results.

    Args:
        channels: width of the node state; -1 reads it from the first input. A pair gives the
            widths of sources and destinations, and destinations keep theirs.
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
        pos_weight: ``"matrix"``, ``"scalar"`` or ``"complex"``, see above. The parameter
            ``weight_pos`` is (heads, 2, 2), (heads,) or (heads, 2) (default: ``"matrix"``).
        **kwargs: further arguments of :class:`torch_geometric.nn.MessagePassing`. With
            ``flow="target_to_source"``, nodes of ``edge_index[0]`` attend to ``edge_index[1]``.

    Raises:
        ValueError: on unknown terms or options, or an ``aggr`` other than the sum.

    Shapes:
        - **input:** states (n, channels) or ((n_src, c_src), (n_dst, c_dst)); positions
          (n, 2) or ((n_src, 2), (n_dst, 2)); edges, int32 or int64; edge bias (E,), (E, 1) or
          (E, heads), optional, in the order of the edges (row-major for tables and sparse
          matrices). Destinations without states, ``(s_src, None)``, count as states of zeros.
        - **output:** states (n_dst, c_dst), positions (n_dst, 2), and if asked for,
          ``(edge_index, attention (E, heads))``
    """

    def __init__(
        self,
        channels: int | tuple[int, int],
        heads: int = 4,
        head_channels: int = 32,
        terms: Iterable[str] | Mapping[str, Mapping[str, Any]] = (),
        qk: bool = True,
        qk_norm: bool = False,
        qk_scale: float = 1.0,
        qk_range: tuple[float, float] | None = None,
        pos_channels: int = 2,
        backend: str = "auto",
        pos_weight: str = "matrix",
        **kwargs,
    ):
        kwargs.setdefault("aggr", "add")
        super().__init__(node_dim=0, **kwargs)
        unknown = sorted(set(terms) - set(LOGIT_TERMS))
        if unknown:
            raise ValueError(f"unknown logit terms {unknown}; choose from {sorted(LOGIT_TERMS)}")
        if qk_norm and not qk:
            raise ValueError("qk_norm normalises queries and keys, but qk=False leaves them out")
        if pos_weight not in POS_WEIGHTS:
            raise ValueError(f"unknown pos_weight {pos_weight!r}; choose from {list(POS_WEIGHTS)}")
        if pos_weight == "complex" and pos_channels != 2:
            raise ValueError(f'pos_weight="complex" needs pos_channels=2; given {pos_channels}')
        if not isinstance(self.aggr_module, SumAggregation) or self.decomposed_layers > 1:
            raise ValueError(
                "attention weights sum to 1, so that IPALiteConv takes aggr='add' and "
                f"decomposed_layers=1; given {kwargs['aggr']!r} and {self.decomposed_layers}"
            )
        self.channels = channels
        self.heads = heads
        self.head_channels = head_channels
        self.pos_channels = pos_channels
        self.backend = backend
        self.pos_weight = pos_weight
        self._qk = qk
        self._terms = terms if isinstance(terms, Mapping) else {name: {} for name in terms}
        self._set_parts()
        shape = {"matrix": (pos_channels, pos_channels), "scalar": (), "complex": (2,)}
        self.weight_pos = nn.Parameter(torch.empty(heads, *shape[pos_weight]))
        bounds = None
        if qk_range is not None:
            low, high = qk_range
            bounds = low / math.sqrt(head_channels), high / math.sqrt(head_channels)
        self.qk_scale = LearnedScalars([qk_scale], bounds) if qk_norm else None
        self.reset_parameters()

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of the states of sources and of destinations; -1 where not known yet."""
        return self.channels if isinstance(self.channels, tuple) else (self.channels,) * 2

    @property
    def _deferred(self) -> bool:
        """Whether parameters wait for the widths of states."""
        return min(self.widths) < 0

    def _set_parts(self) -> None:
        for name, part in self._parts(*(max(width, 1) for width in self.widths)).items():
            if self._deferred and part is not None:
                defer(part)
            setattr(self, name, part)

    def _parts(self, c_src: int, c_dst: int) -> dict[str, nn.Module | None]:
        """The modules whose shapes depend on the widths of states."""
        inner, keys = self.heads * self.head_channels, self._qk
        return {
            "lin_query": Linear(c_dst, inner, bias=False) if keys else None,
            "lin_key": Linear(c_src, inner, bias=False) if keys else None,
            "lin_value": Linear(c_src, inner, bias=False),
            "norm": nn.LayerNorm(c_dst),
            "mlp": nn.Sequential(
                Linear(c_dst + inner, 2 * c_dst), nn.GELU(), Linear(2 * c_dst, c_dst)
            ),
            "terms": nn.ModuleDict(
                {
                    name: LOGIT_TERMS[name]((c_src, c_dst), self.heads, self.pos_channels, **given)
                    for name, given in self._terms.items()
                }
            ),
        }

    def _initialize(self, c_src: int, c_dst: int) -> None:
        """Give deferred parameters the widths of states, and draw them."""
        known = self.widths
        c_src, c_dst = known[0] if known[0] >= 0 else c_src, known[1] if known[1] >= 0 else c_dst
        self.channels = (c_src, c_dst) if isinstance(self.channels, tuple) else c_dst
        for name, part in self._parts(*self.widths).items():
            if part is not None:
                materialize(getattr(self, name), part)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew; the layer starts as the identity on states and positions."""
        super().reset_parameters()
        if not self._deferred:
            linear = (self.lin_query, self.lin_key, self.lin_value)
            for module in (*linear, self.norm, self.mlp, *self.terms.values()):
                inits.reset(module)
            for parameter in self.mlp[-1].parameters():
                nn.init.zeros_(parameter)
        inits.reset(self.qk_scale)
        nn.init.zeros_(self.weight_pos)

    def state_dict(self, *args, keep_vars: bool = False, **kwargs) -> dict[str, Any]:
        """As torch's; parameters whose shapes are not known yet are kept as they are."""
        return super().state_dict(*args, keep_vars=keep_vars or self._deferred, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        value, norm = (state_dict.get(f"{prefix}{name}.weight") for name in ("lin_value", "norm"))
        if self._deferred and not (value is None or norm is None):
            if not nn.parameter.is_lazy(value):
                self._initialize(value.size(1), norm.size(0))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        s: Tensor | tuple[Tensor, Tensor | None],
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
            size: numbers of sources and destinations; read from the positions if left out.
            return_attention_weights: also return the edges and their attention.
            batch: graph of each destination (n_dst,), for terms that are scaled by graph.
            use_terms: whether the extra logit terms are added.

        Raises:
            ValueError: if states or positions have another width or number than they should,
                or if ``flow="target_to_source"`` meets a table or a sparse matrix.
        """
        s_src, s_dst, pos_src, pos_dst = self._ends(s, pos, size)
        query, key = self._query_key(s_src, s_dst)
        value = self.lin_value(s_src).view(-1, self.heads, self.head_channels)
        # Under autocast, normalised queries and keys are float32.
        query, key = query.to(value.dtype), key.to(value.dtype)
        if edge_bias is not None and edge_bias.dim() == 2 and edge_bias.size(1) == 1:
            edge_bias = edge_bias.squeeze(-1)

        edges = self._edges(edge_index, as_messages=bool(return_attention_weights))
        if use_terms and self.terms:
            ends = edges.edge_index if isinstance(edges, NeighborTable) else self._oriented(edges)
            edge_bias = self._with_terms(edge_bias, pos_src, pos_dst, s_src, s_dst, ends, batch)
        pos_pair = (pos_src, pos_dst)
        weights: tuple[Tensor, Tensor] | None = None
        if isinstance(edges, NeighborTable):
            out, displacement, _ = ops.edge_attention(
                query, key, value, pos_pair, edge_bias, edges, backend=self.backend
            )
        else:
            out, displacement, alpha = self._pass_messages(
                query, key, value, pos_pair, edge_bias, edges
            )
            weights = (edges, alpha)

        dtype = query.dtype
        del query, key, value  # without gradients nothing else holds them: a fifth of the peak
        # No matrix product, which autocast would compute in half precision.
        moved = self._pos_matrix().to(displacement.dtype) * displacement.unsqueeze(-2)
        pos_out = pos_dst + moved.sum(dim=(1, 3))
        aggregated = out.reshape(-1, self.heads * self.head_channels).to(dtype)
        normed = self._normed(s_dst).to(dtype)
        s_out = s_dst + self.mlp(torch.cat([normed, aggregated], dim=-1))
        if return_attention_weights and weights is not None:
            return s_out, pos_out, weights
        return s_out, pos_out

    def _ends(
        self,
        s: Tensor | tuple[Tensor, Tensor | None],
        pos: Tensor | tuple[Tensor, Tensor],
        size: tuple[int, int] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States of sources and destinations, and their positions, checked."""
        s_src, s_dst = self._oriented(s if isinstance(s, tuple) else (s, s))
        pos_src, pos_dst = self._oriented(pos if isinstance(pos, tuple) else (pos, pos))
        if s_src is None or pos_src is None or pos_dst is None:
            raise ValueError(f"{self} needs states of sources, and positions of both ends")
        for place in (pos_src, pos_dst):
            if place.dim() != 2 or place.size(1) != self.pos_channels:
                raise ValueError(
                    f"{self} needs positions (n, {self.pos_channels}); given {tuple(place.shape)}"
                )
        if self._deferred:
            if s_dst is None and self.widths[1] < 0:
                raise ValueError(f"{self} cannot read the width of destinations without states")
            self._initialize(s_src.size(-1), -1 if s_dst is None else s_dst.size(-1))
        c_src, c_dst = self.widths
        if s_dst is None:
            s_dst = s_src.new_zeros(pos_dst.size(0), c_dst)
        if s_src.size(-1) != c_src or s_dst.size(-1) != c_dst:
            wanted = f"{c_src}" if c_src == c_dst else f"{c_src} and {c_dst}"
            raise ValueError(
                f"{self} needs states of width {wanted}; "
                f"given {tuple(s_src.shape)} and {tuple(s_dst.shape)}"
            )
        counts = (s_src.size(0), s_dst.size(0))
        asked = counts if size is None else self._oriented(tuple(size))
        if (pos_src.size(0), pos_dst.size(0)) != counts or tuple(asked) != counts:
            raise ValueError(
                f"{self}: {counts[0]} and {counts[1]} states of sources and destinations, but "
                f"positions {tuple(pos_src.shape)} and {tuple(pos_dst.shape)}, size {size}"
            )
        return s_src, s_dst, pos_src, pos_dst

    def _oriented(self, pair):
        """A pair that belongs to the rows of ``edge_index``, sources first; or the reverse."""
        if self.flow == "source_to_target":
            return pair
        return pair.flip(0) if isinstance(pair, Tensor) else pair[::-1]

    def _edges(self, edges: Adj | NeighborTable, as_messages: bool) -> Tensor | NeighborTable:
        """The table itself where the fused path may run, else edges (2, E)."""
        plain = isinstance(edges, Tensor) and not is_sparse(edges)
        if self.flow != "source_to_target" and not plain:
            raise ValueError(
                f"flow={self.flow!r} takes an edge_index (2, E); "
                "rows of a table or sparse matrix list in-edges"
            )
        if isinstance(edges, NeighborTable) and not (as_messages or self._needs_messages()):
            return edges
        return as_edge_index(edges)

    def _pos_matrix(self) -> Tensor:
        """The matrix of the coordinate update of each head (heads, pos_channels, pos_channels)."""
        weight = self.weight_pos
        if self.pos_weight == "matrix":
            return weight
        eye = torch.eye(self.pos_channels, dtype=weight.dtype, device=weight.device)
        if self.pos_weight == "scalar":
            return weight.view(-1, 1, 1) * eye
        quarter = eye.flip(1) * weight.new_tensor([[-1.0], [1.0]])
        return weight[:, 0].view(-1, 1, 1) * eye + weight[:, 1].view(-1, 1, 1) * quarter

    def _pass_messages(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pos: tuple[Tensor, Tensor],
        edge_bias: Tensor | None,
        edge_index: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted values, displacements and attention (E, heads) by message passing."""
        if edge_bias is None:
            edge_bias = pos[0].new_zeros(edge_index.size(1))
        size = self._oriented((key.size(0), query.size(0)))
        # Tensors of one end each: PyG reads pairs in either order where the flow is turned round.
        logits = self.edge_updater(edge_index, query=query, key=key, edge_bias=edge_bias, size=size)
        destination = self._oriented(edge_index)[1]
        alpha, _ = ops.segment_softmax(logits, destination, query.size(0))
        total = self.propagate(
            edge_index, value=value, pos_src=pos[0], pos_dst=pos[1], alpha=alpha, size=size
        )
        out, displacement = total.split([self.head_channels, self.pos_channels], dim=-1)
        return out, displacement.to(pos[1].dtype), alpha

    def edge_update(self, query_i: Tensor, key_j: Tensor, edge_bias: Tensor) -> Tensor:
        """Logits (E, heads) of the edges, for :meth:`edge_updater`."""
        return attention_logits(query_i, key_j, edge_bias)

    def message(
        self, value_j: Tensor, pos_src_j: Tensor, pos_dst_i: Tensor, alpha: Tensor
    ) -> Tensor:
        """Weighted values and displacements (E, heads, head_channels + pos_channels).

        ``alpha`` is the attention (E, heads), under the name that PyG's explainers look for.
        """
        moves = (pos_src_j - pos_dst_i).unsqueeze(1).expand(-1, self.heads, -1)
        dtype = torch.promote_types(alpha.dtype, moves.dtype)
        carried = torch.cat([value_j.to(dtype), moves.to(dtype)], dim=-1)
        return alpha.unsqueeze(-1).to(dtype) * carried

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
        edge_index = self._oriented(edge_index)
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
        extra += "" if self.pos_weight == "matrix" else f", pos_weight={self.pos_weight!r}"
        return (
            f"{type(self).__name__}({self.channels}, heads={self.heads}, "
            f"head_channels={self.head_channels}{extra})"
        )


def as_edge_index(edges: Adj | NeighborTable) -> Tensor:
    """Edges of any PyG format as int64 (2, E), sources first.

    A sparse matrix is ``adj_t``: rows are destinations, columns sources.
    """
    if isinstance(edges, NeighborTable):
        return edges.edge_index
    if isinstance(edges, SparseTensor) or is_sparse(edges):
        row, col = to_edge_index(edges)[0]
        return torch.stack([col, row])
    return (edges.as_tensor() if hasattr(edges, "as_tensor") else edges).long()
