"""IPALiteModel: embeddings to positions, by recycled attention."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.nn import inits
from torch_geometric.typing import Adj

from .. import ops
from ..geometry.gauge import gauge_fix
from ..graph import NeighborTable
from ..graph.order import reorder
from .conv import IPALiteConv, as_edge_index
from .terms import LearnedScalars, PairBias

BETA_BOUNDS = (0.0, 2.5)
_ORDER_FROM = 100_000  # cells whose keys and values no longer fit a GPU's cache


class IPALiteModel(nn.Module):
    r"""Positions of cells from their embeddings alone (IPA-Lite V1, and its variants).

    State and position start as MLPs of the embedding, positions also where they are told to; a
    block of attention, shared by all recycles by default, then moves both, with the gauge fixed
    after each recycle. In recycle r

    .. math::
        \ell_{ij}^h &= \text{query and key} + \beta_r b_{ij} + \text{pair}_{ij}^h
            + \text{terms}_{ij}^h

        X &\leftarrow \mathrm{gauge}(X + \eta_r \, \Delta X)

    with :math:`\beta_r = \eta_r = 1` and no pair or other term by default. V2 has unshared
    blocks. IPA-R has three of them, normalised queries and keys, a pair term, learned
    :math:`\beta_r` and :math:`\eta_r`, and point attention in the last recycle.

    Args:
        in_channels: width d of the embedding.
        channels: width of the node state (default: 96).
        heads: attention heads (default: 4).
        head_channels: width of a head (default: 32).
        num_recycles: passes through the block (default: 5).
        shared: whether all recycles use one block (default: True).
        terms: extra logit terms, see :class:`IPALiteConv` (default: none).
        geo_schedule: recycles, counted from 1, in which the extra terms take part; None is all
            of them (default: None). Unshared blocks of other recycles have no terms.
        qk, qk_norm, qk_scale, qk_range: of the attention, see :class:`IPALiteConv`.
        pair_hidden: hidden widths of a pair term, see :class:`PairBias`; None is no pair term
            (default: None).
        betas: start of the learned factor :math:`\beta_r` in [0, 2.5] of the edge bias, one a
            recycle; None takes the bias as it is (default: None).
        step_gate: start of the learned step size :math:`\eta_r` in (0, 1) of every recycle; None
            takes whole steps (default: None).
        init_noise: std of the Gaussian noise on the first positions in training (default: 0.05).
        checkpoint_recycles: keep only each recycle's input and the outputs of its attention for
            the backward pass, and make the rest again there (default: False).
        backend: of the attention (default: ``"auto"``).
        reorder: renumber cells inside so that neighbours lie side by side in memory; results
            stay in the order given, start noise is drawn in the new one. None does so where it
            pays: on a GPU from 100,000 cells (default: None).

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
        init_noise: float = 0.05,
        checkpoint_recycles: bool = False,
        backend: str = "auto",
        geo_schedule: Sequence[int] | None = None,
        qk: bool = True,
        qk_norm: bool = False,
        qk_scale: float = 1.0,
        qk_range: tuple[float, float] | None = None,
        pair_hidden: Sequence[int] | None = None,
        betas: Sequence[float] | None = None,
        step_gate: float | None = None,
        reorder: bool | None = None,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.channels = channels
        self.num_recycles = num_recycles
        self.shared = shared
        self.init_noise = init_noise
        self.checkpoint_recycles = checkpoint_recycles
        self.reorder = reorder
        self.mlp_state = nn.Sequential(
            nn.Linear(in_channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )
        self.mlp_pos = nn.Sequential(
            nn.Linear(in_channels, channels), nn.GELU(), nn.Linear(channels, 2)
        )
        recycles = set(range(1, num_recycles + 1))
        scheduled = recycles if geo_schedule is None else set(geo_schedule)
        if not scheduled <= recycles or (terms and not scheduled):
            raise ValueError(f"geo_schedule must name recycles 1..{num_recycles}: {geo_schedule}")
        if betas is not None and len(betas) != num_recycles:
            raise ValueError(f"betas needs one value for each of {num_recycles} recycles: {betas}")
        self.geo_schedule = tuple(sorted(scheduled)) if terms else ()
        block = {
            "channels": channels,
            "heads": heads,
            "head_channels": head_channels,
            "qk": qk,
            "qk_norm": qk_norm,
            "qk_scale": qk_scale,
            "qk_range": qk_range,
            "backend": backend,
        }
        self.blocks = nn.ModuleList(
            IPALiteConv(**block, terms=terms if shared or r + 1 in scheduled else ())
            for r in range(1 if shared else num_recycles)
        )
        self.pair = None
        if pair_hidden is not None:
            self.pair = PairBias(in_channels, heads, len(self.blocks), pair_hidden, backend=backend)
        self.beta = LearnedScalars(betas, BETA_BOUNDS) if betas is not None else None
        self.step = None
        if step_gate is not None:
            self.step = LearnedScalars([step_gate] * num_recycles, (0.0, 1.0))

    def reset_parameters(self):
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
        start: Tensor | None = None,
    ):
        """Predict positions; see the class for shapes.

        Args:
            num_graphs: graphs in ``batch``; counted if left out.
            generator: source of the start noise; torch's default if left out.
            return_trajectory: also return the positions before the first recycle and after each.
            return_attention_weights: also return ``(edge_index, attention)`` of each recycle.
            start: positions (n, 2) to begin from, in any gauge, for instance
                :func:`~ipar_sparse.geometry.gauge.principal_plane` of ``h``; the model's own MLP of ``h``
                if left out.

        Raises:
            ValueError: if ``h`` does not have ``in_channels`` columns, or ``start`` another shape.
        """
        if h.dim() != 2 or h.size(-1) != self.in_channels:
            raise ValueError(
                f"IPALiteModel({self.in_channels}) needs embeddings (n, {self.in_channels}); "
                f"given {tuple(h.shape)}"
            )
        if start is not None and start.shape != (h.size(0), 2):
            raise ValueError(f"start needs shape {(h.size(0), 2)}; given {tuple(start.shape)}")
        if batch is not None and num_graphs is None:
            num_graphs = int(batch.max()) + 1 if batch.numel() else 0
        rest = (batch, num_graphs, generator, start)
        if not return_attention_weights and self._orders(graph):
            ordered, perm, inverse = reorder(graph, h.detach())
            if edge_bias is not None:
                edge_bias = graph.to_table(edge_bias).index_select(0, perm).flatten(0, 1)
            batch, start = (x if x is None else x.index_select(0, perm) for x in (batch, start))
            rest = (batch, num_graphs, generator, start)
            trajectory, attention = self._recycles(
                h.index_select(0, perm), ordered, edge_bias, *rest
            )
            trajectory = [pos.index_select(0, inverse) for pos in trajectory]
        else:
            trajectory, attention = self._recycles(
                h, graph, edge_bias, *rest, return_attention_weights=return_attention_weights
            )
        result = (trajectory[-1],)
        if return_trajectory:
            result += (trajectory,)
        if return_attention_weights:
            result += (attention,)
        return result if len(result) > 1 else result[0]

    def _recycles(
        self, h, graph, bias, batch, num_graphs, generator, start, return_attention_weights=False
    ) -> tuple[list[Tensor], list]:
        """Positions before the first recycle and after each, and attention if asked for."""
        state, pos = self._maybe_checkpoint(self._start, h, start)
        if start is not None:
            pos = gauge_fix(pos, batch, num_graphs)  # the noise below is in that gauge
        if self.training and self.init_noise > 0:
            noise = torch.empty_like(pos).normal_(generator=generator)
            pos = pos + self.init_noise * noise
        pos = gauge_fix(pos, batch, num_graphs)
        trajectory, attention = [pos], []
        pair = self.pair_logits(h, graph)
        for recycle in range(self.num_recycles):
            given = (recycle, state, pos, graph, bias, pair, batch)
            if return_attention_weights:
                state, moved, weights = self._recycle(*given, return_attention_weights=True)
                attention.append(weights)
            else:
                state, moved = self._maybe_checkpoint(self._recycle, *given)
            pos = moved if self.step is None else pos + self.step()[recycle] * (moved - pos)
            pos = gauge_fix(pos, batch, num_graphs)
            trajectory.append(pos)
        return trajectory, attention

    def _start(self, h: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """States and positions before the first recycle."""
        if h.dtype == torch.float32 and torch.is_autocast_enabled(h.device.type):
            h = h.to(torch.get_autocast_dtype(h.device.type))  # once for both
        pos = self.mlp_pos(h) if start is None else start
        # Half precision cannot hold neighbour distances on a large slide: positions stay float32.
        pos = pos.float() if pos.dtype in (torch.float16, torch.bfloat16) else pos
        return self.mlp_state(h), pos

    def _maybe_checkpoint(self, function, *given):
        if not (self.checkpoint_recycles and torch.is_grad_enabled()):
            return function(*given)
        return checkpoint(
            function,
            *given,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=ops.keep_attention,
        )

    def _orders(self, graph: NeighborTable | Adj) -> bool:
        """Whether cells are renumbered on the way: where neighbours do not fit the GPU's cache."""
        if not isinstance(graph, NeighborTable) or graph.padded:
            return False
        if self.reorder is None:
            return graph.index.is_cuda and graph.num_nodes >= _ORDER_FROM
        return self.reorder

    def block(self, recycle: int) -> IPALiteConv:
        """The block of a recycle, counted from 0."""
        return self.blocks[0 if self.shared else recycle]

    def uses_terms(self, recycle: int) -> bool:
        """Whether the extra logit terms take part in a recycle, counted from 0."""
        return recycle + 1 in self.geo_schedule

    def pair_logits(self, h: Tensor, graph: NeighborTable | Adj) -> list[Tensor] | None:
        """The pair term (E, heads) of each block, None without one."""
        if self.pair is None:
            return None
        return self.pair(h, graph if isinstance(graph, NeighborTable) else as_edge_index(graph))

    def edge_terms(
        self, recycle: int, edge_bias: Tensor | None, pair: list[Tensor] | None
    ) -> dict[str, Tensor]:
        """What the edges bring to the logits of a recycle: ``gate`` and ``pair``.

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
                removed = torch.isinf(edge_bias)  # beta times them has no gradient
                finite = edge_bias.masked_fill(removed, 0.0)
                terms["gate"] = (self.beta()[recycle] * finite).masked_fill(removed, -math.inf)
        if pair is not None:
            terms["pair"] = pair[0 if self.shared else recycle]
        return terms

    def measures(self, recycle: int, state: Tensor) -> dict[str, Tensor]:
        """Learned numbers at work in a recycle, scalars or one a head, by name.

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
        return found | block.measures(state, use_terms=self.uses_terms(recycle))

    def _recycle(self, recycle, state, pos, graph, edge_bias, pair, batch, **kwargs):
        terms = self.edge_terms(recycle, edge_bias, pair)
        bias = terms.get("gate")
        if "pair" in terms:
            shared = bias is not None and bias.dim() == 1
            bias = bias.unsqueeze(-1) if shared else bias
            bias = terms["pair"] if bias is None else bias + terms["pair"]
        return self.block(recycle)(
            state, pos, graph, bias, batch=batch, use_terms=self.uses_terms(recycle), **kwargs
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, channels={self.channels}, "
            f"num_recycles={self.num_recycles}, shared={self.shared})"
        )
