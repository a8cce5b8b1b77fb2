"""What is going on inside: graph, gate, attention and collapse, each as a number to watch.

Everything runs in O(n k) on a :class:`~ipar_sparse.graph.NeighborTable`; per-edge tensors are in
its row-major order. True positions, where needed, only ever score.

Names are flat: a measure, then where it was taken, as in ``attn_recall@30/r2/h0`` (recycle 2,
head 0). :data:`HEALTHY` says which range each measure should stay in and
:func:`health_warnings` says what is outside, in words.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.stats import rankdata
from torch import Tensor

from ..geometry.neighborhoods import TrueNeighborhoods, as_layout, sample_pairs, unit_gauge
from ..graph import NeighborTable

_ROW_BLOCK = 1 << 14  # rows of an (n, k, heads) table worked on at once


@dataclass(frozen=True)
class HealthyRange:
    """Where a measure should lie, and what it means if it does not.

    Args:
        low: smallest healthy value.
        high: largest healthy value.
        below: what a smaller value means.
        above: what a larger value means.
        of_map: whether it is the map, or what the map is made of, that is not healthy then;
            otherwise something inside the model, whose map may be good or bad.
    """

    low: float = -math.inf
    high: float = math.inf
    below: str = ""
    above: str = ""
    of_map: bool = False


HEALTHY: dict[str, HealthyRange] = {
    "attn_recall@30": HealthyRange(low=0.40, below="attention does not find the true neighbours"),
    "logit_std": HealthyRange(
        low=4.0,
        high=8.0,
        below="attention is nearly uniform and cannot choose",
        above="attention is nearly one-hot and gradients vanish",
    ),
    "attention_entropy_relative": HealthyRange(
        low=0.10,
        high=0.95,
        below="attention is nearly one-hot, each cell listens to one other",
        above="attention is nearly uniform and cannot choose",
    ),
    "head_diversity": HealthyRange(low=0.02, below="all heads attend to the same cells"),
    "beta": HealthyRange(low=0.1, below="the gate is all but switched off"),
    "eta": HealthyRange(low=0.01, below="the recycle hardly moves any cell"),
    "offset_norm": HealthyRange(
        high=2.0, above="point offsets reach across the tissue and drown the positions"
    ),
    "lambda_ratio": HealthyRange(low=0.01, below="the map has collapsed to a line", of_map=True),
    "median_distance": HealthyRange(
        low=0.01, below="the map has collapsed to a point", of_map=True
    ),
    "boundary_mass": HealthyRange(
        high=0.50,
        above="the cells have been pushed into a ring at the edge of the map",
        of_map=True,
    ),
    "candidate_recall_lift": HealthyRange(
        low=2.0,
        below="candidate neighbours are hardly better than random cells, so the embedding does "
        "not know where cells are on this slide",
        of_map=True,
    ),
    "gate_lift": HealthyRange(
        low=1.0, below="the gate ranks true neighbours below average candidates"
    ),
}


def health_warnings(measures: Mapping[str, float], of_map: bool | None = None) -> list[str]:
    """Which measures are outside their healthy range, in words, worst place of each first.

    Args:
        measures: flat names to values; a place may follow the name (``logit_std/r0/h3``). Names
            without a range and NaN values are passed over, except that NaN in a measure with a
            range is itself reported.
        of_map: measures of the map alone, or those inside the model alone; both by default.

    Returns:
        One line a measure, with the number of places it was found in. Names count recycles and
        heads from 0, sentences from 1.
    """
    worst: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    seen: dict[str, int] = {}
    for name, value in measures.items():
        measure, _, place = name.partition("/")
        healthy = HEALTHY.get(measure)
        if healthy is None or value is None or of_map not in (None, healthy.of_map):
            continue
        seen[measure] = seen.get(measure, 0) + 1
        if math.isnan(value):
            worst.setdefault((measure, "undefined"), []).append((math.inf, value, place))
        elif value < healthy.low:
            worst.setdefault((measure, healthy.below), []).append(
                (healthy.low - value, value, place)
            )
        elif value > healthy.high:
            worst.setdefault((measure, healthy.above), []).append(
                (value - healthy.high, value, place)
            )
    lines = []
    for (measure, meaning), found in worst.items():
        _, value, place = max(found)
        where = f" at {_place(place)}" if place else ""
        count = f"; {len(found)} of {seen[measure]} places" if seen[measure] > 1 else ""
        healthy = _range(HEALTHY[measure])
        meaning = meaning[:1].upper() + meaning[1:]
        lines.append(f"{meaning}: {measure} is {value:.3g}{where} (healthy: {healthy}{count})")
    return lines


def collapse_diagnostics(
    pos, *, seed: int = 0, num_pairs: int = 200_000, max_exact: int = 1500
) -> dict[str, float]:
    r"""Has the layout collapsed, to a line or to a point? Measured in the unit-RMS gauge.

    ``lambda_ratio`` is :math:`\lambda_2/\lambda_1` of the coordinate covariance (a line below
    0.01; tissues lie at 0.2-0.5 and a disc at 1); ``median_distance`` is the median pairwise
    distance (a point below 0.01; healthy about 1.2). It is exact up to ``max_exact`` cells; else
    from drawn pairs, with the distribution-free standard error read off the order statistics one
    binomial standard deviation around the median.

    Args:
        pos: layout (n, 2), tensor or array, any units, n >= 1.

    Returns:
        ``lambda_ratio``, ``median_distance`` and, where sampled, ``median_distance_se``. Both
        are 0 for a layout of one point.
    """
    x = unit_gauge(as_layout(pos, min_points=1))
    n = len(x)
    small, large = np.linalg.eigvalsh(x.T @ x / n)
    out = {"lambda_ratio": float(max(small, 0.0) / large) if large > 0 else 0.0}
    if n < 2:
        return {**out, "median_distance": 0.0}
    sampled = n > max_exact
    if sampled:
        first, second = sample_pairs(n, num_pairs, np.random.default_rng([seed, 3]))
    else:
        first, second = np.triu_indices(n, 1)
    distance = np.sqrt(np.square(x[first] - x[second]).sum(axis=1))
    half_width = 0.5 / math.sqrt(len(distance))
    low, median, high = np.quantile(
        distance, [max(0.0, 0.5 - half_width), 0.5, min(1.0, 0.5 + half_width)]
    )
    out["median_distance"] = float(median)
    if sampled:
        out["median_distance_se"] = float((high - low) / 2)
    return out


def boundary_mass(pos) -> float:
    """Fraction of cells in the outer tenth of the layout's radius: a ring in the making.

    The radius is the 99th percentile of the distances from the centre, so that single outliers
    do not set it. A filled disc has 0.20, a square 0.06, a ring about 1; a layout of one point 0.

    Args:
        pos: layout (n, 2), any units.
    """
    x = unit_gauge(as_layout(pos, min_points=1))
    radius = np.sqrt(np.square(x).sum(axis=1))
    edge = 0.9 * np.quantile(radius, 0.99)
    return float((radius > edge).mean()) if edge > 0 else 0.0


def density_correlation(pred, true, *, k: int = 15) -> float:
    """Spearman correlation of local density (by distance to the k-th neighbour) on both layouts.

    Args:
        pred: predicted layout (n, 2).
        true: true layout (n, 2).
        k: neighbour that measures density, at most n - 1.

    Returns:
        In [-1, 1]; 0 where one layout has one density everywhere (a regular grid, a point).
    """
    x, y = as_layout(pred, "predicted positions", 3), as_layout(true, "true positions", 3)
    if len(x) != len(y):
        raise ValueError(f"density_correlation: {len(x)} predicted and {len(y)} true positions")
    k = min(k, len(x) - 1)
    reach = []
    for pos in (unit_gauge(x), unit_gauge(y)):
        distance, _ = cKDTree(pos).query(pos, k=[k + 1], workers=-1)
        reach.append(np.round(distance[:, 0], 10))
    return _rank_correlation(reach[0][None], reach[1][None], np.ones((1, len(x)), bool))


def candidate_recall(graph: NeighborTable, pos, k: int = 15) -> dict[str, float]:
    """How many of a cell's true spatial neighbours are among its candidates, and by chance.

    Args:
        graph: candidates of n cells.
        pos: true positions (n, 2).
        k: spatial neighbours asked for; ties at the k-th place count alike.

    Returns:
        ``candidate_recall@k``, ``candidate_recall_chance@k`` (candidates / (n - 1)) and
        ``candidate_recall_lift``, the first over the second; the lift is left out where chance
        exceeds a quarter, since even perfect candidates could not show one.
    """
    truth = _truth(graph, pos, k)
    found = np.zeros(graph.num_nodes)
    for rows, index in _row_blocks(graph):
        found[rows] = truth.contains(rows, index, k).sum(axis=1)
    n = graph.num_nodes
    recall = float((found / np.maximum(truth.size[k], 1)).mean()) if n > 1 else 1.0
    chance = graph.num_edges / (n * (n - 1)) if n > 1 else 1.0
    out = {f"candidate_recall@{k}": recall, f"candidate_recall_chance@{k}": chance}
    if chance <= 0.25:
        out["candidate_recall_lift"] = recall / chance if chance > 0 else 0.0
    return out


def gate_precision_recall(
    logits: Tensor, graph: NeighborTable, pos, k: int = 30, true_k: int | None = None
) -> dict[str, float]:
    """Precision and recall of the k best-gated candidates of each cell.

    Args:
        logits: gate logits (E,), or (E, G) for head-specific gates, which are averaged.
        graph: the candidates that were gated.
        pos: true positions (n, 2).
        k: candidates kept; all of them in rows that have fewer.
        true_k: spatial neighbours that count as true; k if left out.

    Returns:
        ``gate_precision@k``, ``gate_recall@k``, ``candidate_precision`` (of all candidates, what
        a random choice among them reaches), and ``gate_lift``: precision over that.
    """
    true_k = k if true_k is None else true_k
    logits = _per_edge(logits, graph, "gate logits").mean(dim=-1, keepdim=True)
    truth = _truth(graph, pos, true_k)
    precision, recall = _top_hits(logits, graph, truth, k, true_k)
    inside = 0
    for rows, index in _row_blocks(graph):
        inside += int(truth.contains(rows, index, true_k).sum())
    base = inside / graph.num_edges if graph.num_edges else 0.0
    return {
        f"gate_precision@{k}": float(precision[0]),
        f"gate_recall@{k}": float(recall[0]),
        "candidate_precision": base,
        "gate_lift": float(precision[0]) / base if base > 0 else 0.0,
    }


def attn_recall(
    attention: Tensor, graph: NeighborTable, pos, k: int = 30, true_k: int | None = None
) -> np.ndarray:
    """Fraction of the k most attended nodes that are true spatial neighbours, per head.

    Args:
        attention: weights (E, H) or (E,).
        graph: the attention graph.
        pos: true positions (n, 2).
        k: most attended nodes looked at; all of them in rows that have fewer.
        true_k: spatial neighbours that count as true; k if left out. Minisets of the training
            recipe use their target graph's ``max(20, 0.15 n)``.

    Returns:
        (H,), each in [0, 1].
    """
    true_k = k if true_k is None else true_k
    attention = _per_edge(attention, graph, "attention")
    return _top_hits(attention, graph, _truth(graph, pos, true_k), k, true_k)[0]


def attention_entropy(
    attention: Tensor, graph: NeighborTable, *, relative: bool = False
) -> np.ndarray:
    r"""Mean entropy of a node's attention, per head, in nats.

    .. math::
        \frac1n \sum_i -\sum_j a_{ij} \log a_{ij} \quad (\text{relative: each row over } \log d_i)

    Args:
        attention: weights (E, H) or (E,), each row summing to 1 (rows of zeros are left out).
        graph: the attention graph.
        relative: divide by the entropy of uniform attention over the row's :math:`d_i` edges;
            rows of one edge are then left out.

    Returns:
        (H,); 0 if no row is left.
    """
    attention = _per_edge(attention, graph, "attention")
    total, count = torch.zeros(attention.size(1), dtype=torch.float64), 0
    for _, (a,), mask in _table_blocks(graph, attention):
        entropy = -(a * a.clamp(min=1e-38).log()).sum(dim=1)
        degree = mask.sum(dim=1)
        keep = (a.sum(dim=1) > 0).any(dim=-1) & (degree > (1 if relative else 0))
        if relative:
            entropy = entropy / degree.clamp(min=2).double().log().unsqueeze(-1)
        total += entropy[keep].sum(dim=0).cpu()
        count += int(keep.sum())
    return (total / max(count, 1)).numpy()


def logit_std(logits: Tensor, graph: NeighborTable) -> np.ndarray:
    """Standard deviation of logits, or of one term of them, over all edges, per head.

    Args:
        logits: (E, H) or (E,); -inf entries (removed edges) are left out.
        graph: the attention graph.

    Returns:
        (H,)
    """
    values = _per_edge(logits, graph, "logits").double()
    finite = torch.isfinite(values)
    count = finite.sum(dim=0).clamp(min=1)
    values = values.masked_fill(~finite, 0.0)
    mean = values.sum(dim=0) / count
    square = (values - mean).square().masked_fill(~finite, 0.0).sum(dim=0) / count
    return square.sqrt().cpu().numpy()


def attention_term_spearman(
    attention: Tensor,
    term: Tensor,
    graph: NeighborTable,
    *,
    num_rows: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """Spearman correlation of attention with one logit term within a node's edges, per head.

    Ranks are taken within each row, because softmax does not see what a whole row shares; the
    mean over rows is returned.

    Args:
        attention: weights (E, H) or (E,).
        term: one term of the logits, (E, H) or (E,) if the heads share it.
        graph: the attention graph.
        num_rows: rows drawn without replacement where the graph has more.
        seed: of the drawn rows.

    Returns:
        (H,) in [-1, 1]. Rows in which either side is constant say nothing and are left out; 0 if
        none remains.
    """
    attention = _per_edge(attention, graph, "attention")
    term = _per_edge(term, graph, "logit term").expand_as(attention)
    n = graph.num_nodes
    rows = torch.arange(n)
    if n > num_rows:
        drawn = np.random.default_rng([seed, 4]).choice(n, num_rows, replace=False)
        rows = torch.from_numpy(np.sort(drawn))
    rows = rows.to(graph.device)
    mask = (graph.index[rows] >= 0).cpu().numpy()
    a = graph.to_table(attention)[rows].double().cpu().numpy()
    t = graph.to_table(term)[rows].double().cpu().numpy()
    return np.array([_rank_correlation(a[..., h], t[..., h], mask) for h in range(a.shape[-1])])


def head_diversity(attention: Tensor, graph: NeighborTable) -> float:
    r"""How differently the heads attend: mean total-variation distance over pairs of heads.

    .. math::
        \frac1n \sum_i \operatorname{mean}_{h<h'} \tfrac12 \sum_j |a_{ij}^h - a_{ij}^{h'}|

    Args:
        attention: weights (E, H).
        graph: the attention graph.

    Returns:
        In [0, 1]: 0 for identical heads (and for a single one), 1 for disjoint ones.
    """
    attention = _per_edge(attention, graph, "attention")
    heads = attention.size(1)
    if heads < 2 or not graph.num_nodes:
        return 0.0
    total = 0.0
    for _, (a,), _ in _table_blocks(graph, attention):
        for h in range(heads):
            total += float((a[..., h + 1 :] - a[..., h : h + 1]).abs().sum())
    return 0.5 * total / (graph.num_nodes * heads * (heads - 1) / 2)


def step_sizes(trajectory: Sequence[Tensor]) -> list[float]:
    r"""Movement of each recycle, :math:`\|X^{(r+1)} - X^{(r)}\|_F / \sqrt n`, in the unit gauge.

    Args:
        trajectory: layouts (n, 2), the first one before the first recycle.

    Returns:
        One value a recycle. Layouts are scaled to the unit gauge but not rotated: the model's
        frame does not turn between recycles.
    """
    layouts = [unit_gauge(as_layout(pos, min_points=1)) for pos in trajectory]
    return [
        float(np.sqrt(np.square(after - before).sum(axis=1).mean()))
        for before, after in pairwise(layouts)
    ]


@dataclass
class RecycleRecord:
    """What one recycle's attention did.

    Args:
        attention: weights (E, H) in the graph's order.
        logits: the logits behind them (E, H); None leaves out ``logit_std``.
        terms: the terms that add up to the logits, name to (E, H) or (E,).
        measures: learned numbers at work, name to a scalar or one a head (H,): weight of the
            gate (``beta``), step size (``eta``), scale of normalised queries and keys (``tau``),
            slope of squared distance (``gamma``), length of point offsets (``offset_norm``, in
            units of the layout) and their width (``sigma``).
    """

    attention: Tensor
    logits: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    measures: Mapping[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def diagnose(
    graph: NeighborTable,
    recycles: Iterable[RecycleRecord] = (),
    *,
    pos=None,
    trajectory: Sequence[Tensor] | None = None,
    gate_logits: Tensor | None = None,
    final=None,
    k: int = 30,
    true_k: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Every diagnostic that the given material allows, as one flat dictionary.

    Args:
        graph: the graph attended on.
        recycles: one record a recycle; an iterator is read one record at a time, so that only
            one recycle's attention need exist.
        pos: true positions (n, 2), for the measures that need them.
        trajectory: layouts before the first and after each recycle.
        gate_logits: raw gate logits (E,) or (E, G).
        final: the map (n, 2), where more follows the recycles; the last of ``trajectory`` if left
            out.
        k: most attended nodes, and best-gated candidates, looked at.
        true_k: spatial neighbours that count as true; k if left out.
        seed: of drawn rows and pairs.

    Returns:
        Measures such as ``attn_recall@30/r0/h1``, ``logit_std/r0/h1``, ``term_std:qk/r0/h1``,
        ``term_spearman:gate/r0/h1``, ``attention_entropy/r0/h1``, ``head_diversity/r0``,
        ``step_size/r0``, ``gate_precision@30``, ``candidate_recall@15``, ``lambda_ratio``,
        ``boundary_mass``, ``density_correlation``. Ready for :func:`health_warnings`.
    """
    out: dict[str, float] = {}
    true_k = k if true_k is None else true_k
    truth = None if pos is None else _truth(graph, pos, true_k)

    def put(name, r, values):
        out.update({f"{name}/r{r}/h{h}": float(value) for h, value in enumerate(values)})

    for r, record in enumerate(recycles):
        attention = _per_edge(record.attention, graph, "attention")
        if truth is not None:
            put(f"attn_recall@{k}", r, _top_hits(attention, graph, truth, k, true_k)[0])
        if record.logits is not None:
            put("logit_std", r, logit_std(record.logits, graph))
        for name, term in record.terms.items():
            put(f"term_std:{name}", r, logit_std(term, graph))
            put(
                f"term_spearman:{name}",
                r,
                attention_term_spearman(attention, term, graph, seed=seed),
            )
        for name, value in record.measures.items():
            value = torch.as_tensor(value)
            if value.dim():
                put(name, r, value)
            else:
                out[f"{name}/r{r}"] = float(value)
        put("attention_entropy", r, attention_entropy(attention, graph))
        put("attention_entropy_relative", r, attention_entropy(attention, graph, relative=True))
        if attention.size(1) > 1:
            out[f"head_diversity/r{r}"] = head_diversity(attention, graph)
    if gate_logits is not None and pos is not None:
        out.update(gate_precision_recall(gate_logits, graph, pos, k, true_k))
    if pos is not None:
        out.update(candidate_recall(graph, pos))
    if trajectory is not None:
        out.update({f"step_size/r{r}": size for r, size in enumerate(step_sizes(trajectory))})
        final = trajectory[-1] if final is None else final
    if final is not None:
        out.update(collapse_diagnostics(final, seed=seed))
        out["boundary_mass"] = boundary_mass(final)
        if pos is not None and graph.num_nodes >= 3:
            out["density_correlation"] = density_correlation(final, pos)
    return out


def _per_edge(values: Tensor, graph: NeighborTable, what: str) -> Tensor:
    values = torch.as_tensor(values).detach()
    if values.dim() == 1:
        values = values.unsqueeze(-1)
    if values.dim() != 2 or values.size(0) != graph.num_edges:
        raise ValueError(
            f"{what} must be (E,) or (E, H) with E = {graph.num_edges} edges of the graph; "
            f"given {tuple(values.shape)}"
        )
    return values


def _truth(graph: NeighborTable, pos, k: int) -> TrueNeighborhoods:
    layout = as_layout(pos, "true positions")
    if len(layout) != graph.num_nodes or graph.num_src_nodes != graph.num_nodes:
        raise ValueError(
            f"true positions must be of the graph's {graph.num_nodes} cells; given {len(layout)}"
        )
    return TrueNeighborhoods(layout, (k,))


def _row_blocks(graph: NeighborTable):
    for start in range(0, graph.num_nodes, _ROW_BLOCK):
        rows = np.arange(start, min(graph.num_nodes, start + _ROW_BLOCK))
        yield rows, graph.index[start : start + len(rows)].cpu().numpy()


def _table_blocks(graph: NeighborTable, *values: Tensor, fill: float = 0.0):
    """Rows, values (rows, k, H) in float64 and the edge mask (rows, k), block by block."""
    rowptr = graph.rowptr
    for start in range(0, graph.num_nodes, _ROW_BLOCK):
        stop = min(graph.num_nodes, start + _ROW_BLOCK)
        mask = graph.index[start:stop] >= 0
        low, high = int(rowptr[start]), int(rowptr[stop])
        blocks = []
        for value in values:
            block = value.new_full((*mask.shape, value.size(1)), fill, dtype=torch.float64)
            block[mask] = value[low:high].double()
            blocks.append(block)
        yield np.arange(start, stop), blocks, mask


def _top_hits(
    scores: Tensor, graph: NeighborTable, truth: TrueNeighborhoods, k: int, true_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall (H,) of each row's k best-scored edges; empty rows are left out."""
    heads = scores.size(1)
    precision, recall, filled = np.zeros(heads), np.zeros(heads), 0
    width = min(k, graph.k)
    if not graph.num_edges:
        return precision, recall
    for rows, (block,), mask in _table_blocks(graph, scores, fill=-math.inf):
        degree = mask.sum(dim=1).cpu().numpy()
        index = graph.index[rows[0] : rows[-1] + 1]
        best = block.topk(width, dim=1).indices
        chosen = np.maximum(np.minimum(degree, k), 1)
        true = np.maximum(truth.size[true_k][rows], 1)
        for h in range(heads):
            others = index.gather(1, best[..., h])
            held = mask.gather(1, best[..., h])
            others = torch.where(held, others, torch.full_like(others, -1)).cpu().numpy()
            hits = truth.contains(rows, others, true_k).sum(axis=1)
            precision[h] += (hits / chosen).sum()
            recall[h] += (hits / true)[degree > 0].sum()
        filled += int((degree > 0).sum())
    return precision / max(filled, 1), recall / max(filled, 1)


def _rank_correlation(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    """Mean over rows (m, k) of Spearman's correlation within the mask; constant rows left out."""
    ranks = []
    for values in (a, b):
        rank = rankdata(np.where(mask, values, np.inf), axis=1)
        mean = (rank * mask).sum(axis=1, keepdims=True) / np.maximum(
            mask.sum(axis=1, keepdims=True), 1
        )
        ranks.append((rank - mean) * mask)
    norm = np.sqrt(np.square(ranks[0]).sum(axis=1) * np.square(ranks[1]).sum(axis=1))
    told = norm > 0
    if not told.any():
        return 0.0
    return float(((ranks[0] * ranks[1]).sum(axis=1)[told] / norm[told]).mean())


def _place(place: str) -> str:
    words = {"r": "recycle", "h": "head"}
    said = []
    for part in place.split("/"):
        word, number = words.get(part[:1]), part[1:]
        said.append(f"{word} {int(number) + 1}" if word and number.isdigit() else part)
    return ", ".join(said)


def _range(healthy: HealthyRange) -> str:
    if math.isinf(healthy.high):
        return f"at least {healthy.low:g}"
    if math.isinf(healthy.low):
        return f"at most {healthy.high:g}"
    return f"{healthy.low:g} to {healthy.high:g}"


@dataclass(frozen=True)
class AttentionFocus:
    """Where one cell attends.

    Args:
        cell: its row.
        neighbors: rows it attends to (m,).
        weights: its attention on them (m,), heads averaged.
        label: what the panel says; the cell's row if left out.
    """

    cell: int
    neighbors: np.ndarray
    weights: np.ndarray
    label: str | None = None
