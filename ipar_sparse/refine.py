"""The last step of a prediction: neighbours in the embedding become neighbours in the layout.

The recycles average over neighbours, and training minisets are too sparse to tell where in its
neighbourhood a cell lies. What the model draws is right at large and blurred at the distance of a
few cells. A short descent on an attraction-repulsion objective sharpens it.
"""

import math

import torch
from scipy.spatial import cKDTree
from torch import Tensor

from .gauge import gauge_fix
from .graph import NeighborTable
from .points import rolled

_FEWEST = 4  # times as many cells as neighbours, or all cells are each other's neighbours
_RATE = 0.4  # first step size, in units: cells that lie wrong have to pass between others
_SHIFTS = 15  # random partners of a cell, in each direction, that repel it in a step
_NEAR = 15  # nearest candidates by which it is told whether a layout is blurred
_ROWS = 2000  # cells by which a layout is held against its candidates


@torch.no_grad()
def refine_layout(
    pos: Tensor,
    graph: NeighborTable,
    *,
    steps: int = 400,
    neighbors: int = 10,
    anchor: float = 4.0,
    enough: float = 0.5,
    seed: int = 0,
) -> Tensor:
    r"""Draw a layout to its nearest candidates without leaving where it was.

    .. math::
        L = -\frac1n \sum_i \frac1k \sum_{j \in N_k(i)} \log q_{ij}
            + \log \operatorname*{mean}_{i \ne j} q_{ij}
            + \frac{\alpha}{n} \sum_i \|\mathbf{x}_i - \mathbf{x}_i^0\|^2,
        \qquad q_{ij} = \frac{1}{1 + \|\mathbf{x}_i - \mathbf{x}_j\|^2 / u^2}

    The first two terms are, up to a constant, the divergence of the walk over the k nearest
    candidates from a Cauchy kernel on the layout, as in t-SNE without perplexities (Böhm, Berens
    and Kobak 2022, "Attraction-repulsion spectrum in neighbor embeddings"). The unit is the
    distance to half of the k neighbours of cells spread evenly over a disc,
    :math:`u = \sqrt{k/n}`. The mean is estimated in every step on pairs of a random order
    shifted against itself. Adam, with a step size that falls from 0.4 u to 0. Time and memory
    O(n k) a step, deterministic on every device.

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

    Returns:
        Layout (n, 2) in the unit-RMS gauge. Fewer than 4 k cells are left as they are.
    """
    n, k = pos.size(0), min(neighbors, graph.k)
    if graph.num_nodes != n:
        raise ValueError(f"a layout of {n} cells and a graph of {graph.num_nodes}")
    if steps < 1 or k < 1 or n < _FEWEST * k:
        return pos
    if _agreement(pos, graph.index[:, :_NEAR]) >= enough:
        return pos
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator).to(pos.device)
    near = NeighborTable(graph.index[:, :k].contiguous(), padded=graph.padded).permute(order)
    source, mask = near.index.long().clamp(min=0), near.index >= 0
    rowptr, edge, _ = near.reverse()
    unit, start = math.sqrt(k / n), gauge_fix(pos.float())[order]
    x, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    shifts = torch.randint(1, n, (steps, _SHIFTS), generator=generator).tolist()
    for step, shift in enumerate(shifts):
        gap = x.unsqueeze(1) - x[source]
        pull = gap * (mask / (unit**2 + gap.square().sum(-1))).unsqueeze(-1)
        gradient = pull.sum(1) - _by_source(pull[mask] if near.padded else pull, rowptr, edge)
        gradient = gradient * (2 / k)
        gap = x - rolled([x] * _SHIFTS, shift)  # (shifts, n, 2)
        q = 1 / (1 + gap.square().sum(-1, keepdim=True) / unit**2)
        gap *= q.square()
        push = gap.sum(0) - rolled(gap, [n - s for s in shift]).sum(0)
        kernel = _SHIFTS * q.mean()
        gradient -= push * (2 / unit**2) / kernel
        gradient += 2 * anchor * (x - start)
        # Adam, written out: an optimiser would want a graph
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        rate = _RATE * unit * (1 - step / steps) / (1 - 0.9 ** (step + 1))
        x -= rate * first / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    return gauge_fix(torch.empty_like(x).index_copy_(0, order, x).to(pos.dtype))


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
