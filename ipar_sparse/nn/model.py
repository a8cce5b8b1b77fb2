"""IPALiteModel: embeddings to positions, by recycled attention."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..distributed import all_rows, rows_of, shares_rows
from ..geometry.gauge import gauge_fix
from ..graph import NeighborTable
from ..graph.order import reorder
from ..ops.linear import Linear
from .conv import IPALiteConv, as_edge_index
from .pyg import Adj, inits
from .terms import LearnedScalars, PairBias

if TYPE_CHECKING:
    from ..graph.rows import HeldRows

BETA_BOUNDS = (0.0, 2.5)
REORDER_FROM = 40_000  # cells; attention then reads each source once for several neighbours


class IPALiteModel(nn.Module):
    r"""Positions of cells from their embeddings alone (IPA-Lite V1, and its variants).

    The initial state is an MLP of the embedding, and so is the initial layout unless one is given.
    A block of attention, by default shared by all recycles, then updates both. The gauge is fixed
    after each recycle. In recycle r

    .. math::
        \ell_{ij}^h &= \langle q_i^h, k_j^h \rangle / \sqrt{C} + \beta_r b_{ij}
            + \text{pair}_{ij}^h + \text{terms}_{ij}^h

        X &\leftarrow \mathrm{gauge}(X + \eta_r \, \Delta X)

    with :math:`\beta_r = \eta_r = 1` and no pair or other term by default. V2 has unshared
    blocks. IPA-R has three of them, normalised queries and keys, a pair term, learned
    :math:`\beta_r` and :math:`\eta_r`, and point attention in the last recycle.

    Args:
        in_channels: width d of the embedding.
        channels: width of the node state (default: 96).
        heads: attention heads (default: 4).
        head_channels: width of a head (default: 32).
        num_recycles: passes through the block; with 0 there is no block, and the model returns
            the initial layout (default: 5).
        shared: whether all recycles use one block (default: True).
        terms: extra logit terms, see :class:`IPALiteConv` (default: none).
        init_std: standard deviation of the noise on the initial layout in training, in the
            unit-RMS gauge (default: 0.05).
        checkpoint_recycles: save only each recycle's input and the outputs of its attention for
            the backward pass, and recompute the rest there (default: False).
        backend: of attention and pair term (default: ``"auto"``).
        geo_schedule: recycles, counted from 1, in which the extra terms are added; None is all
            of them (default: None). Unshared blocks of other recycles have no terms.
        qk, qk_norm, qk_scale, qk_range, pos_weight: of the layers, see :class:`IPALiteConv`.
        pair_hidden: hidden widths of a pair term, see :class:`PairBias`; None is no pair term
            (default: None).
        learned_betas: initial values of the learned factor :math:`\beta_r` of the edge bias, one
            a recycle, in (0, 2.5); None is the fixed factor 1 (default: None).
        init_step_size: initial value of the learned step size :math:`\eta_r` of every recycle, in
            (0, 1); None is the fixed step size 1 (default: None).
        reorder: renumber cells internally so that neighbours are close in memory. Results stay in
            the order given; initial noise is drawn in the new one. None does so where it is
            faster: on a GPU from 40,000 cells (default: None).

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
        terms: Iterable[str] | Mapping[str, Mapping[str, Any]] = (),
        init_std: float = 0.05,
        checkpoint_recycles: bool = False,
        backend: str = "auto",
        geo_schedule: Sequence[int] | None = None,
        qk: bool = True,
        qk_norm: bool = False,
        qk_scale: float = 1.0,
        qk_range: tuple[float, float] | None = None,
        pair_hidden: Sequence[int] | None = None,
        learned_betas: Sequence[float] | None = None,
        init_step_size: float | None = None,
        reorder: bool | None = None,
        pos_weight: str = "matrix",
    ):
        super().__init__()
        self.in_channels = in_channels
        self.channels = channels
        self.num_recycles = num_recycles
        self.shared = shared
        self.init_std = init_std
        self.checkpoint_recycles = checkpoint_recycles
        self.reorder = reorder
        self.mlp_state = nn.Sequential(
            Linear(in_channels, 2 * channels), nn.GELU(), Linear(2 * channels, channels)
        )
        self.mlp_pos = nn.Sequential(Linear(in_channels, channels), nn.GELU(), Linear(channels, 2))
        recycles = range(1, num_recycles + 1)
        scheduled = set(recycles if geo_schedule is None else geo_schedule)
        if num_recycles < 0:
            raise ValueError(f"num_recycles must be at least 0; given {num_recycles}")
        if not scheduled <= set(recycles) or (terms and recycles and not scheduled):
            raise ValueError(f"geo_schedule must name recycles 1..{num_recycles}: {geo_schedule}")
        if learned_betas is not None and len(learned_betas) != num_recycles:
            raise ValueError(
                f"learned_betas needs one value for each of {num_recycles} recycles: "
                f"{learned_betas}"
            )
        self.geo_schedule = tuple(sorted(scheduled)) if terms else ()
        self.blocks = nn.ModuleList(
            IPALiteConv(
                channels,
                heads,
                head_channels,
                terms if shared or r in scheduled else (),
                qk=qk,
                qk_norm=qk_norm,
                qk_scale=qk_scale,
                qk_range=qk_range,
                backend=backend,
                pos_weight=pos_weight,
            )
            for r in (recycles[:1] if shared else recycles)
        )
        self.pair = self.beta = self.step = None
        if recycles and pair_hidden is not None:
            self.pair = PairBias(in_channels, heads, len(self.blocks), pair_hidden, backend=backend)
        if recycles and learned_betas is not None:
            self.beta = LearnedScalars(learned_betas, BETA_BOUNDS)
        if recycles and init_step_size is not None:
            self.step = LearnedScalars([init_step_size] * num_recycles, (0.0, 1.0))

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for module in self.children():
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
        initial: Tensor | None = None,
        noise: Tensor | None = None,
        rows: "HeldRows | None" = None,
    ) -> Tensor | tuple[Any, ...]:
        """Predict positions; see the class for shapes.

        Args:
            h: embeddings of the cells.
            graph: edges to attend over.
            edge_bias: additive logits of the edges, usually those of the gate.
            batch: graph of each cell.
            num_graphs: graphs in ``batch``; counted if left out.
            generator: source of the initial noise; torch's default if left out.
            return_trajectory: also return the positions before the first recycle and after each.
            return_attention_weights: also return ``(edge_index, attention)`` of each recycle.
            initial: initial layout (n, 2) in any gauge, for instance
                :func:`~ipar_sparse.geometry.principal_plane` of ``h``; the model's own MLP of
                ``h`` if left out.
            noise: standard normal numbers (n, 2) of the initial noise, in place of ``generator``.
            rows: where the cells are some rows of a graph over several ranks, and ``graph`` is
                :attr:`HeldRows.graph`.

        Raises:
            ValueError: if ``h`` is not (n, in_channels), or ``initial`` not (n, 2).
        """
        if h.dim() != 2 or h.size(-1) != self.in_channels:
            raise ValueError(
                f"IPALiteModel({self.in_channels}) needs embeddings (n, {self.in_channels}); "
                f"given {tuple(h.shape)}"
            )
        if initial is not None and initial.shape != (h.size(0), 2):
            raise ValueError(f"initial needs shape {(h.size(0), 2)}; given {tuple(initial.shape)}")
        if batch is not None and num_graphs is None:
            num_graphs = int(batch.max()) + 1 if batch.numel() else 0
        inverse = None
        if rows is None and not return_attention_weights and self._reorders(graph):
            ordered, perm, inverse = reorder(graph, h.detach())
            if edge_bias is not None:
                edge_bias = graph.to_table(edge_bias).index_select(0, perm).flatten(0, 1)
            graph, h = ordered, h.index_select(0, perm)
            batch, initial, noise = (
                x if x is None else x.index_select(0, perm) for x in (batch, initial, noise)
            )
        fix = partial(gauge_fix, batch=batch, num_graphs=num_graphs)
        given = (h, graph, edge_bias, batch, initial, fix if rows is None else rows.gauge_fix, rows)
        drawn = generator if noise is None else noise
        trajectory, attention = self._recycles(*given, drawn, return_attention_weights)
        if inverse is not None:
            trajectory = [pos.index_select(0, inverse) for pos in trajectory]
        result: list[Any] = [trajectory[-1]]
        if return_trajectory:
            result.append(trajectory)
        if return_attention_weights:
            result.append(attention)
        return tuple(result) if len(result) > 1 else result[0]

    def _recycles(
        self, h, graph, bias, batch, initial, fix, rows, drawn, return_attention_weights
    ) -> tuple[list[Tensor], list]:
        """Positions before the first recycle and after each, and attention if asked for."""
        state, pos = self._maybe_checkpoint(self._initial, h, initial)
        if initial is not None:
            pos = fix(pos)  # the noise below is in that gauge
        if self.training and self.init_std > 0:
            if not isinstance(drawn, Tensor):  # a source of noise
                drawn = torch.empty_like(pos).normal_(generator=drawn)
            pos = pos + self.init_std * drawn
        pos = fix(pos)
        trajectory, attention = [pos], []
        pair = self.pair_logits(h if rows is None else rows.sources(h), graph)
        for recycle in range(self.num_recycles):
            given = (recycle, state, pos, graph, bias, pair, batch, rows)
            if return_attention_weights:
                state, moved, weights = self._recycle(*given, return_attention_weights=True)
                attention.append(weights)
            else:
                state, moved = self._maybe_checkpoint(self._recycle, *given)
            pos = moved if self.step is None else pos + self.step()[recycle] * (moved - pos)
            pos = fix(pos)
            trajectory.append(pos)
        return trajectory, attention

    def _initial(self, h: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """States and positions before the first recycle."""
        if h.dtype == torch.float32 and torch.is_autocast_enabled(h.device.type):
            h = h.to(torch.get_autocast_dtype(h.device.type))  # once for both MLPs
        pos = self.mlp_pos(h) if initial is None else initial
        # Half precision cannot hold neighbour distances on a large slide: positions stay float32.
        pos = pos.float() if pos.dtype in (torch.float16, torch.bfloat16) else pos
        return self.mlp_state(h), pos

    def _maybe_checkpoint(self, function, *given):
        if not (self.checkpoint_recycles and torch.is_grad_enabled()):
            return function(*given)
        compiling = torch.compiler.is_compiling()
        return checkpoint(
            function,
            *given,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=ops.keep_operator if compiling else ops.keep_attention,
        )

    def _reorders(self, graph: NeighborTable | Adj) -> bool:
        """Whether cells are renumbered for this graph."""
        if not isinstance(graph, NeighborTable) or graph.padded or not self.num_recycles:
            return False
        if self.reorder is None:
            return graph.index.is_cuda and graph.num_nodes >= REORDER_FROM
        return self.reorder

    def block(self, recycle: int) -> IPALiteConv:
        """The block of a recycle, counted from 0."""
        return self.blocks[0 if self.shared else recycle]

    def uses_terms(self, recycle: int) -> bool:
        """Whether the extra logit terms are added in a recycle, counted from 0."""
        return recycle + 1 in self.geo_schedule

    def pair_logits(self, h: Tensor, graph: NeighborTable | Adj) -> list[Tensor] | None:
        """The pair term (E, heads) of each block; None where the model has no pair term."""
        if self.pair is None:
            return None
        return self.pair(h, graph if isinstance(graph, NeighborTable) else as_edge_index(graph))

    def edge_terms(
        self, recycle: int, edge_bias: Tensor | None, pair: list[Tensor] | None
    ) -> dict[str, Tensor]:
        """Logits of a recycle that come with the edges: ``gate`` and ``pair``.

        Args:
            recycle: counted from 0.
            edge_bias: the bias given to the model (E,) or (E, heads), or None.
            pair: from :meth:`pair_logits`.

        Returns:
            Logits by name, of the shape of the bias and (E, heads).
        """
        terms = {}
        if edge_bias is not None:
            terms["gate"] = edge_bias
            if self.beta is not None:
                removed = torch.isinf(edge_bias)  # beta times -inf has no finite gradient
                finite = edge_bias.masked_fill(removed, 0.0)
                terms["gate"] = (self.beta()[recycle] * finite).masked_fill(removed, -math.inf)
        if pair is not None:
            terms["pair"] = pair[0 if self.shared else recycle]
        return terms

    def learned_scalars(self, recycle: int, state: Tensor) -> dict[str, Tensor]:
        """Learned scalars of a recycle, single or one a head, by name.

        Args:
            recycle: counted from 0.
            state: its input states (n, channels).
        """
        found = {}
        if self.beta is not None:
            found["beta"] = self.beta()[recycle]
        if self.step is not None:
            found["eta"] = self.step()[recycle]
        block = self.block(recycle)
        return found | block.learned_scalars(state, use_terms=self.uses_terms(recycle))

    def _recycle(self, recycle, state, pos, graph, edge_bias, pair, batch, rows, **kwargs):
        terms = self.edge_terms(recycle, edge_bias, pair)
        bias = terms.get("gate")
        if "pair" in terms:
            shared = bias is not None and bias.dim() == 1
            bias = bias.unsqueeze(-1) if shared else bias
            bias = terms["pair"] if bias is None else bias + terms["pair"]
        block, use_terms = self.block(recycle), self.uses_terms(recycle)
        if rows is not None:
            state, pos = (rows.sources(state), state), (rows.sources(pos), pos)
        elif shares_rows() and not (kwargs or graph.padded or (use_terms and block.terms)):
            # terms may be scaled by all edges; these are the same bits as those of one rank
            n, own = len(pos), rows_of(len(pos))
            if bias is not None:
                bias = bias[own.start * graph.k : own.stop * graph.k]
            moved = block((state, state[own]), (pos, pos[own]), graph.rows(own), bias)
            return tuple(all_rows(one, n) for one in moved)
        return block(state, pos, graph, bias, batch=batch, use_terms=use_terms, **kwargs)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, channels={self.channels}, "
            f"num_recycles={self.num_recycles}, shared={self.shared})"
        )
