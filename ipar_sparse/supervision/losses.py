"""Losses of a predicted layout: random walk, stress, repulsion, entropy, gate.

Positions are in the unit-RMS gauge (:func:`ipar_sparse.gauge_fix`) unless a function says
otherwise. Losses are computed in their dtype, without synchronisation with the device.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from ..geometry.gauge import gauge_fix
from ..graph import NeighborTable
from ..ops import resolve_backend
from .held import HeldStress, HeldWalk
from .stress import StressTarget
from .targets import SlideTarget
from .walk import LOG_FLOOR, WalkTarget, csr

__all__ = [
    "GEOMETRY_TERMS",
    "e_geo",
    "gate_loss",
    "geometry_terms",
    "gram_loss",
    "log_stress_loss",
    "long_range_loss",
    "probe_kl",
    "repulsion_loss",
    "rw_kl_loss",
    "walk_entropy_loss",
]

Source = torch.Generator | Sequence[torch.Generator] | None
"""Of random numbers: one for all graphs of a batch, or each its own; torch's default if None."""
BY_CELL = frozenset({"rw_kl", "long_range", "entropy_reg"})
"""Terms that are means over all cells of a batch; the others are means over its graphs."""
STRESS_WEIGHT = 0.1  # of L_stress beside L_RW, in E_geo and in training
DENSE_LIMIT = 1536  # up to here n x n products beat sparse ones
_METRIC_ROWS = 256  # probe rows of E_geo beyond that
BLOCK_ELEMENTS = 1 << 24  # walk entries held at once when all rows of a large graph are wanted


def rw_kl_loss(
    pos: Tensor,
    walk: WalkTarget | HeldWalk,
    probe_rows: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Divergence of the predicted random walk from the reference one.

    .. math::
        \sum_s 0.5^{s-1} \, \frac1n \sum_i
        \mathrm{KL}\!\left(T_\mathrm{ref}^s[i,:] \,\|\, T_\mathrm{pred}^s[i,:]\right)

    with logarithms clamped at 1e-8. In a batch the mean runs over the rows of all graphs, each
    with its own number of steps.

    Args:
        pos: positions (n, 2).
        walk: the reference walk.
        probe_rows: rows drawn without replacement, an unbiased estimate of the mean over rows;
            all rows if left out.
        generator: source of the probe rows.

    Returns:
        A scalar; 0 at the true positions.

    Raises:
        ValueError: if fewer than one row is asked for, or the shapes do not match.
    """
    if probe_rows is not None and probe_rows < 1:
        raise ValueError(f"probe_rows must be at least 1; given {probe_rows}")
    n = walk.num_nodes
    # products of probabilities lose the small ones in half precision
    with torch.autocast(pos.device.type, enabled=False):
        rows = None
        if probe_rows is not None and probe_rows < n:
            rows = _random_rows(n, probe_rows, generator, pos.device)
        if isinstance(walk, HeldWalk):
            return walk.divergence(
                pos, torch.arange(n, device=pos.device) if rows is None else rows
            )
        values = walk.transition(pos)
        if rows is not None:
            return probe_kl(values, walk, rows) / len(rows)
        if max(walk.sizes) <= DENSE_LIMIT:
            return _dense_kl(values, walk)
        blocks = torch.arange(n, device=pos.device).split(max(1, BLOCK_ELEMENTS // n))
        total = values.new_zeros(())
        for rows in blocks:
            total = total + probe_kl(values, walk, rows)
        return total / n


def log_stress_loss(
    pos: Tensor,
    stress: StressTarget | HeldStress,
    num_pairs: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Variance of log-distance ratios: distances are compared up to one common scale.

    .. math::
        r_e = \log d_\mathrm{pred}(e) - \log d_\mathrm{target}(e), \quad
        \frac1M \sum_e (r_e - \bar r)^2

    The mean :math:`\bar r` is the optimal log-scale. In a batch every graph has its own, and the
    graphs' losses are averaged. Distances are clamped at 1e-8. Where the target has a softening
    s, :math:`\sqrt{d^2 + s^2}` takes the place of d.

    Args:
        pos: positions (n, 2), any scale.
        stress: the target distances.
        num_pairs: pairs drawn at random from all of them, to bound the cost of a step; all pairs
            if left out.
        generator: source of the draw.
    """
    total = stress.total if isinstance(stress, HeldStress) else stress.dist.numel()
    if num_pairs is not None and num_pairs < total:
        drawn = torch.randint(
            total, (num_pairs,), generator=generator, device=_source(generator, pos.device)
        )
        stress = stress.drawn(drawn.to(pos.device, non_blocking=True))
    assert isinstance(stress, StressTarget), "ranks hold parts of pairs that are drawn"
    edge_index, batch = stress.edge_index, stress.edge_batch
    true = stress.dist.to(pos.dtype).square()
    soft = None if stress.softening is None else stress.softening.to(pos.dtype).square()
    square = _square_distance(pos, *edge_index)
    if soft is not None:
        square, true = square + soft, true + soft
    ratio = 0.5 * (square.log() - true.log())
    if stress.num_graphs == 1:
        return (ratio - ratio.mean()).square().mean() if ratio.numel() else ratio.sum()
    scale = _graph_mean(ratio, batch, stress.num_graphs)
    residual = (ratio - scale.index_select(0, batch)).square()
    return _graph_mean(residual, batch, stress.num_graphs).mean()


def gram_loss(pos: Tensor, target: SlideTarget) -> Tensor:
    r"""Squared difference of inner products over all n^2 pairs of nodes, at O(n) cost.

    .. math::
        \frac{1}{n^2} \|X X^\top - Y Y^\top\|_F^2
        = \tfrac{1}{n^2} \left(\|X^\top X\|_F^2 - 2 \|X^\top Y\|_F^2 + \|Y^\top Y\|_F^2\right)

    This is the strain of classical scaling: 0 where X is a rotation or reflection of Y. It has no
    folded local minima, since a factorisation of rank 2 has only global ones. In a batch the
    graphs' losses are averaged.

    Args:
        pos: positions (n, 2).
        target: the true positions Y.
    """
    true = target.pos.to(pos.dtype)
    count = target.ptr.diff().clamp(min=1).to(pos.dtype).view(-1, 1, 1)

    def product(left, right):
        terms = left.unsqueeze(-1) * right.unsqueeze(-2)
        if target.num_graphs == 1:
            return terms.sum(0, keepdim=True) / count
        total = terms.new_zeros(target.num_graphs, 2, 2).index_add(0, target.batch, terms)
        return total / count

    square = product(pos, pos).square() - 2 * product(pos, true).square()
    return (square + product(true, true).square()).sum((1, 2)).mean()


def long_range_loss(
    pos: Tensor,
    target: SlideTarget,
    generator: Source = None,
    pairs_per_node: int = 8,
) -> Tensor:
    r"""Mean of :math:`(d_\mathrm{pred} - d_\mathrm{true})^2` over fresh uniform random pairs.

    Raw stress in the unit-RMS gauge, an unbiased estimate over all pairs. Two pairs in five lie
    beyond the 60th percentile of distances, where the ring partners of the stress target end. It
    is dominated by long distances, unlike log-stress, and new pairs at every step keep it from
    stalling in folded minima.

    Args:
        pos: positions (n, 2).
        target: the true positions.
        generator: source of the pairs; several are one for each graph.
        pairs_per_node: partners drawn for every node, within its graph.
    """
    shape = (pos.size(0), pairs_per_node)
    sources = _sources(generator, target.sizes, pos.device)
    each = [torch.rand(n, pairs_per_node, dtype=torch.float64, **source) for n, source in sources]
    uniform = torch.cat(each)
    start = target.ptr[target.batch].unsqueeze(-1)
    size = target.ptr.diff()[target.batch].unsqueeze(-1)
    node = torch.arange(pos.size(0), device=pos.device).unsqueeze(-1)
    shift = 1 + (uniform.to(pos.device, non_blocking=True) * (size - 1)).long()
    first = node.expand(shape).reshape(-1)
    second = (start + (node - start + shift).remainder(size)).reshape(-1)
    true = _square_distance(target.pos.to(pos.dtype), first, second)
    return (_square_distance(pos, first, second).sqrt() - true.sqrt()).square().mean()


def repulsion_loss(
    pos: Tensor,
    generator: Source = None,
    num_pairs: int = 256,
    sizes: tuple[int, ...] | Tensor | None = None,
) -> Tensor:
    r"""Mean of :math:`\exp(-\|x_i - x_j\|^2 / 0.01)` over random pairs of distinct nodes.

    Args:
        pos: positions (n, 2).
        generator: source of the pairs; several are one for each graph.
        num_pairs: pairs drawn in each graph.
        sizes: number of nodes of each graph; one graph if left out. A tensor on the device
            saves a copy.
    """
    sizes = (pos.size(0),) if sizes is None else sizes
    sources = _sources(generator, [1] * len(sizes), pos.device)
    each = [torch.rand(2, count, num_pairs, **source) for count, source in sources]
    uniform = torch.cat(each, dim=1).double().to(pos.device, non_blocking=True)
    size = torch.as_tensor(sizes, dtype=torch.float64).unsqueeze(-1)
    size = size.to(pos.device, non_blocking=True)
    start = size.cumsum(0) - size
    first = (uniform[0] * size).floor()
    second = (first + 1 + (uniform[1] * (size - 1)).floor()).remainder(size)
    pairs = torch.stack([first + start, second + start]).long().view(2, -1)
    square = (pos.index_select(0, pairs[0]) - pos.index_select(0, pairs[1])).square().sum(-1)
    alone = (size == 1).expand(-1, num_pairs).reshape(-1)
    return (-square / 0.01).exp().masked_fill(alone, 0.0).mean()


def walk_entropy_loss(pos: Tensor, walk: WalkTarget | HeldWalk) -> Tensor:
    """Minus the mean row entropy of the predicted one-step walk, logarithms clamped at 1e-8.

    Args:
        pos: positions (n, 2).
        walk: the walk whose edges and widths sigma are used.
    """
    if isinstance(walk, HeldWalk):
        return walk.entropy(pos)
    values = walk.transition(pos)
    return (values * values.clamp(min=LOG_FLOOR).log()).sum() / walk.num_nodes


def gate_loss(gate_logits: Tensor, graph: NeighborTable, probability: Tensor) -> Tensor:
    r"""KL(p || q) between the reference walk and the gate over each node's candidates.

    p is the reference walk restricted to the candidates and renormalised, q the softmax of the
    raw gate logits. Averaged over the nodes that have a true neighbour among their candidates.

    Args:
        gate_logits: raw logits (E,), or (E, heads), in the graph's edge order.
        graph: the candidates.
        probability: p (E,), from :func:`~ipar_sparse.supervision.gate_target` or a mixture of
            several.

    Raises:
        ValueError: where shapes do not match the graph.
    """
    if gate_logits.size(0) != graph.num_edges or probability.size(0) != graph.num_edges:
        raise ValueError(
            f"gate_loss needs one logit and one probability an edge ({graph.num_edges}); given "
            f"{gate_logits.size(0)} and {probability.size(0)}"
        )
    logits = gate_logits.unsqueeze(-1) if gate_logits.dim() == 1 else gate_logits
    log_q = graph.to_table(logits, fill=-torch.inf).log_softmax(dim=1)
    p = graph.to_table(probability.to(logits.dtype)).unsqueeze(-1)
    term = p * (p.clamp(min=torch.finfo(p.dtype).tiny).log() - log_q)
    divergence = torch.where(p > 0, term, 0.0).sum(1)
    overlap = (p > 0).any(1).to(p.dtype)
    return (divergence.mean(-1) * overlap.squeeze(-1)).sum() / overlap.sum().clamp(min=1)


def e_geo(
    pos: Tensor,
    target: SlideTarget,
    probe_rows: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The evaluation metric E_geo = L_RW + 0.1 L_stress and its two parts.

    On a sketched target it is that of the sketch. Its reach, pairs a node and steps are those of
    a random miniset of 384 of the nodes, so that the two can be compared.

    Args:
        pos: positions (n, 2), any units; brought into the unit-RMS gauge here.
        target: what the layout should be.
        probe_rows: rows of the walk that are compared; if left out, all of them up to graphs of
            1536 nodes, and 256 beyond.
        generator: source of the probe rows.

    Returns:
        Scalars ``e_geo``, ``l_rw``, ``l_stress``.
    """
    if probe_rows is None and max(target.sizes) > DENSE_LIMIT:
        probe_rows = _METRIC_ROWS
    pos = gauge_fix(pos, target.batch, target.num_graphs)
    l_rw = rw_kl_loss(pos, target.walk, probe_rows, generator)
    l_stress = log_stress_loss(pos, target.stress)
    return {"e_geo": l_rw + STRESS_WEIGHT * l_stress, "l_rw": l_rw, "l_stress": l_stress}


def geometry_terms(
    pos: Tensor,
    target: SlideTarget,
    names: Iterable[str],
    *,
    probe_rows: int | None = None,
    stress_pairs: int | None = None,
    generator: Source = None,
) -> dict[str, Tensor]:
    """The named terms of a layout's supervision, unweighted.

    Args:
        pos: positions (n, 2) in the unit-RMS gauge.
        target: what the layout should be.
        names: of ``GEOMETRY_TERMS``.
        probe_rows: see :func:`rw_kl_loss`.
        stress_pairs: see :func:`log_stress_loss`, for each of the two terms made of pairs.
        generator: source of every random choice; several are one for each graph, whose terms are
            not sampled by ``probe_rows`` and ``stress_pairs``.

    Returns:
        Scalars by name.

    Raises:
        ValueError: on an unknown name, or ``"multiscale"`` where the target has no such pairs.
    """
    names = list(names)
    unknown = set(names) - set(GEOMETRY_TERMS)
    if unknown:
        raise ValueError(f"unknown terms {sorted(unknown)}; choose from {sorted(GEOMETRY_TERMS)}")
    draw = {"probe_rows": probe_rows, "stress_pairs": stress_pairs, "generator": generator}
    return {name: GEOMETRY_TERMS[name](pos, target, draw) for name in names}


GEOMETRY_TERMS: dict[str, Callable[[Tensor, SlideTarget, dict[str, Any]], Tensor]] = {
    "rw_kl": lambda x, t, d: rw_kl_loss(x, t.walk, d["probe_rows"], d["generator"]),
    "stress_log": lambda x, t, d: log_stress_loss(x, t.stress, d["stress_pairs"], d["generator"]),
    "multiscale": lambda x, t, d: _multiscale_loss(x, t, d["stress_pairs"], d["generator"]),
    "gram": lambda x, t, d: gram_loss(x, t),
    "long_range": lambda x, t, d: long_range_loss(x, t, d["generator"]),
    "repulsion": lambda x, t, d: repulsion_loss(x, d["generator"], sizes=t.ptr.diff()),
    "entropy_reg": lambda x, t, d: walk_entropy_loss(x, t.walk),
}
"""Terms of a layout's supervision by name: of positions, target and the arguments of sampling."""


def _multiscale_loss(
    pos: Tensor, target: SlideTarget, num_pairs: int | None, generator: torch.Generator | None
) -> Tensor:
    if target.multiscale is None:
        raise ValueError("this target has no multiscale pairs; build_target(multiscale=True)")
    return log_stress_loss(pos, target.multiscale, num_pairs, generator)


def _random_rows(
    n: int, count: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    rows = torch.randperm(n, generator=generator, device=_source(generator, device))[:count]
    return rows.to(device, non_blocking=True)


def _sources(
    generator: Source, counts: Sequence[int], device: torch.device
) -> list[tuple[int, dict[str, Any]]]:
    """How many numbers to draw from which source: one for all graphs, or each its own."""
    if not isinstance(generator, Sequence):
        of: dict[str, Any] = {"generator": generator, "device": _source(generator, device)}
        return [(sum(counts), of)]
    given = zip(counts, generator, strict=True)
    return [(count, {"generator": one, "device": one.device}) for count, one in given]


def _source(generator: torch.Generator | None, device: torch.device) -> torch.device:
    return device if generator is None else generator.device


def _square_distance(pos: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Squared distances clamped at 1e-16, below which root and logarithm have no gradient."""
    difference = pos.index_select(0, first) - pos.index_select(0, second)
    return difference.square().sum(-1).clamp(min=1e-16)


def _graph_mean(values: Tensor, batch: Tensor, num_graphs: int) -> Tensor:
    total = values.new_zeros(num_graphs).index_add(0, batch, values)
    count = values.new_zeros(num_graphs).index_add(0, batch, torch.ones_like(values))
    return total / count.clamp(min=1)


def _dense_kl(values: Tensor, walk: WalkTarget) -> Tensor:
    reference = walk.reference_powers(values.dtype)
    steps = torch.arange(1, walk.steps + 1, device=values.device).unsqueeze(-1)
    weight = (walk.row_steps >= steps).to(values.dtype) * 0.5 ** (steps - 1) / walk.num_nodes
    weights = [walk.dense_row_weight(row).unsqueeze(-1) for row in weight]
    return _DenseWalkKL.apply(walk.dense(values), reference, weights)


class _DenseWalkKL(torch.autograd.Function):
    """Weighted divergence of the powers of T; backward is one product a power and one for T.

    The gradient with respect to every power is computed in place beside its logarithm, in fewer
    passes over n x n than autograd would need.
    """

    @staticmethod
    def forward(ctx, step, reference, weights):
        powers, grads, total = [step], [], step.new_zeros(())
        for s, (p, weight) in enumerate(zip(reference, weights, strict=True)):
            if s:
                powers.append(torch.bmm(powers[-1], step))
            q = powers[-1].clamp(min=LOG_FLOOR)
            if ctx.needs_input_grad[0]:
                grads.append((p / q).mul_(-weight).masked_fill_(powers[-1] < LOG_FLOOR, 0.0))
            ratio = p.clamp(min=LOG_FLOOR).log_().sub_(q.log_())
            total += ratio.mul_(p).sum(-1, keepdim=True).mul_(weight).sum()
        ctx.powers, ctx.grads = powers, grads
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        powers, grads = ctx.powers, ctx.grads
        step = powers[0]
        carried = grads[-1]
        out = torch.zeros_like(step)
        for s in range(len(powers) - 1, 0, -1):
            out.baddbmm_(powers[s - 1].mT, carried)
            carried = torch.baddbmm(grads[s - 1], carried, step.mT)
        return out.add_(carried).mul_(grad), None, None


def probe_kl(values: Tensor, walk: WalkTarget, rows: Tensor) -> Tensor:
    """The divergence of :func:`rw_kl_loss` summed over some rows.

    Args:
        values: entries of the predicted walk (2P,), from :meth:`WalkTarget.transition`.
        walk: the reference walk.
        rows: distinct rows (m,).
    """
    steps = torch.arange(1, walk.steps + 1, device=values.device).unsqueeze(-1)
    weight = (walk.row_steps.index_select(0, rows) >= steps) * 0.5 ** (steps - 1)
    if values.dtype == torch.float32 and resolve_backend("auto", values) == "triton":
        from ..ops import triton_walk

        return triton_walk.probe_divergence(values, walk, rows, weight)
    reference = walk.reference(values.dtype)
    p = values.new_zeros(walk.num_nodes, rows.numel())
    p.scatter_(0, rows.unsqueeze(0), 1.0)
    q = p
    total = values.new_zeros(rows.numel())
    for s in range(walk.steps):
        q = _WalkStep.apply(values, q, walk)
        with torch.no_grad():
            p = _WalkStep.apply(reference, p, walk)
        total = total + _kl(p, q, dim=0) * weight[s].to(values.dtype)
    return total.sum()


def _kl(p: Tensor, q: Tensor, dim: int) -> Tensor:
    return (p * (p.clamp(min=LOG_FLOOR).log() - q.clamp(min=LOG_FLOOR).log())).sum(dim)


class _WalkStep(torch.autograd.Function):
    """One step of m walks, T^T Y for Y (n, m); T and its transpose share one CSR pattern."""

    @staticmethod
    def forward(ctx, values, state, walk):
        ctx.walk = walk
        ctx.save_for_backward(values, state)
        return _product(walk, values.index_select(0, walk.transposed), state)

    @staticmethod
    def backward(ctx, grad):
        walk = ctx.walk
        values, state = ctx.saved_tensors
        grad_values = grad_state = None
        if ctx.needs_input_grad[0]:
            grad_values = torch.zeros_like(values)
            place = _csr(walk, grad_values)
            torch.sparse.sampled_addmm(place, state, grad.t(), out=place)
        if ctx.needs_input_grad[1]:
            grad_state = _product(walk, values, grad)
        return grad_values, grad_state, None


def _product(walk: WalkTarget, values: Tensor, state: Tensor) -> Tensor:
    """The matrix of these values times states (n, m)."""
    if state.is_cuda:
        return _csr(walk, values) @ state
    given = walk.col, state.contiguous(), walk.rowptr[:-1]
    return embedding_bag(*given, mode="sum", per_sample_weights=values)


def _csr(walk: WalkTarget, values: Tensor) -> Tensor:
    return csr(walk.rowptr, walk.col, values, (walk.num_nodes, walk.num_nodes))
