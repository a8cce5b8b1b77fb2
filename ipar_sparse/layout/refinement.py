"""The last step of a prediction: neighbours in the embedding become neighbours in the layout.

The recycles average over neighbours, and training minisets are too sparse to tell where in its
neighbourhood a cell lies. What the model draws is right at large and blurred at the distance of a
few cells. A short descent on an attraction-repulsion objective sharpens it.
"""

import math

import torch
from scipy.spatial import cKDTree
from torch import Tensor

from ..geometry.gauge import gauge_fix
from ..geometry.neighborhoods import rolled
from ..graph import NeighborTable, knn

_FEWEST = 4  # times as many cells as neighbours, or all cells are each other's neighbours
_UNIT = 0.5  # of the distance at which the kernel falls off, in sqrt(k / n)
_RATE = 0.8  # first step size, in units: cells that lie wrong have to pass between others
_AROUND = 32  # nearest cells in the layout whose repulsion is counted one by one
_AGAIN = 20  # steps after which they are sought anew
_SHIFTS = 5  # random partners of a cell, in each direction, that stand for all others
_ALIKE = 15  # nearest candidates by which it is told whether a layout is blurred
_ROWS = 2000  # cells by which a layout is held against its candidates


@torch.no_grad()
def refine_layout(
    pos: Tensor,
    graph: NeighborTable,
    *,
    steps: int = 400,
    neighbors: int = 15,
    anchor: float = 5.0,
    enough: float = 0.5,
    seed: int = 0,
    begin: Tensor | None = None,
) -> Tensor:
    r"""Draw a layout to its nearest candidates without leaving where it was.

    .. math::
        L = -\frac1n \sum_i \frac1k \sum_{j \in N_k(i)} \log q_{ij}
            + \log \operatorname*{mean}_{i \ne j} q_{ij}
            + \frac{\alpha}{n} \sum_i \|\mathbf{x}_i - \mathbf{x}_i^0\|^2,
        \qquad q_{ij} = \frac{1}{1 + \|\mathbf{x}_i - \mathbf{x}_j\|^2 / u^2}

    The first two terms are, up to a constant, the divergence of the walk over the k nearest
    candidates from a Cauchy kernel on the layout, as in t-SNE without perplexities (Böhm, Berens
    and Kobak 2022, "Attraction-repulsion spectrum in neighbor embeddings"). The unit is
    :math:`u = \tfrac12 \sqrt{k/n}`, the distance to an eighth of the k neighbours of cells spread
    evenly over a disc. What repels a cell are its 32 nearest in the layout, sought anew every 20
    steps, and, for all that are farther, ten others in a random order: of these alone few would
    ever be near, and the force between near cells would be noise. Adam, with a step size that
    falls from 0.8 u to 0. Time and memory O(n k) a step and O(n log n) a search, deterministic on
    every device.

    Args:
        pos: layout (n, 2), any scale.
        graph: candidates, nearest first.
        steps: of the descent; 0 returns ``pos`` as it is.
        neighbors: k, nearest candidates that attract.
        anchor: :math:`\alpha`, what it costs to leave ``pos``.
        enough: a layout in which this share of the 15 nearest candidates (of 2,000 cells at
            most) are among the 15 nearest cells already is not blurred, and left as it is;
            candidates know no better. More than 1 leaves none.
        seed: of the order and the shifts.
        begin: where a layout that is blurred begins (n, 2), and what it is held to; ``pos`` if
            left out.

    Returns:
        Layout (n, 2) in the unit-RMS gauge. Fewer than 4 k cells are left as they are.
    """
    n, k = pos.size(0), min(neighbors, graph.k)
    if graph.num_nodes != n:
        raise ValueError(f"a layout of {n} cells and a graph of {graph.num_nodes}")
    if steps < 1 or k < 1 or n < _FEWEST * k:
        return pos
    if _agreement(pos, graph.index[:, :_ALIKE]) >= enough:
        return pos
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator).to(pos.device)
    near = NeighborTable(graph.index[:, :k].contiguous(), padded=graph.padded).permute(order)
    source, mask = near.index.long().clamp(min=0), near.index >= 0
    rowptr, edge, _ = near.reverse()
    unit, begin = _UNIT * math.sqrt(k / n), pos if begin is None else begin
    start = gauge_fix(begin.float())[order]
    x, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    shifts = torch.randint(1, n, (steps, _SHIFTS), generator=generator).tolist()
    for step, shift in enumerate(shifts):
        if step % _AGAIN == 0:
            around = knn(x, _AROUND).index.long()
            reach = (x - x[around[:, -1]]).square().sum(1)
        gap = x.unsqueeze(1) - x[source]
        pull = gap * (mask / (unit**2 + gap.square().sum(-1))).unsqueeze(-1)
        gradient = pull.sum(1) - _by_source(pull[mask] if near.padded else pull, rowptr, edge)
        gradient = gradient * (2 / k)
        gradient -= _repulsion(x, unit, around, reach, shift) * (4 / unit**2)
        gradient += 2 * anchor * (x - start)
        # Adam, written out: an optimiser would want a graph
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        rate = _RATE * unit * (1 - step / steps) / (1 - 0.9 ** (step + 1))
        x -= rate * first / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    return gauge_fix(torch.empty_like(x).index_copy_(0, order, x).to(pos.dtype))


def _repulsion(x: Tensor, unit: float, around: Tensor, reach: Tensor, shift: list[int]) -> Tensor:
    r""":math:`\sum_j q_{ij}^2 (\mathbf{x}_i - \mathbf{x}_j)` over the mean of
    :math:`\sum_j q_{ij}` (n, 2): exact over the cells ``around`` that are within ``reach``, a
    squared distance, and estimated by shifts of the order over those beyond it."""
    n = len(x)
    gap = x.unsqueeze(1) - x[around]
    square = gap.square().sum(-1)
    q = (square <= reach.unsqueeze(1)) / (1 + square / unit**2)
    push, total = (gap * q.square().unsqueeze(-1)).sum(1), q.sum()
    gap = x - rolled([x] * len(shift), shift)  # (shifts, n, 2)
    square = gap.square().sum(-1)
    q = 1 / (1 + square / unit**2)
    share = (n - 1) / (2 * len(shift))
    here = q * (square > reach)  # a pair is beyond the reach of one and within that of the other
    there = q * (square > rolled([reach] * len(shift), shift))
    back = rolled(gap * there.square().unsqueeze(-1), [n - s for s in shift])
    push += share * ((gap * here.square().unsqueeze(-1)).sum(0) - back.sum(0))
    return push * (n / (total + share * (here.sum() + there.sum())))


def _agreement(pos: Tensor, near: Tensor) -> float:
    """Share of the candidates (n, k) of some cells that are among their k nearest in a layout."""
    if not pos.isfinite().all():
        return math.inf  # nothing to sharpen
    rows = torch.randperm(len(pos), generator=torch.Generator().manual_seed(0))[:_ROWS]
    x, wanted = pos.double().cpu().numpy(), near[rows.to(near.device)].cpu().numpy()
    found = cKDTree(x).query(x[rows.numpy()], near.size(1) + 1)[1]  # and itself
    hit = (wanted[:, :, None] == found[:, None, :]).any(2)
    return float(hit.sum() / max(1, (wanted >= 0).sum()))


def _by_source(values: Tensor, rowptr: Tensor, edge: Tensor) -> Tensor:
    """Values of edges (E, 2), or (n, k, 2), summed over the edges of each source."""
    values = values.view(-1, values.size(-1))[edge]
    return torch.segment_reduce(values, "sum", offsets=rowptr, axis=0, initial=0.0)
