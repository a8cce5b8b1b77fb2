"""Distances as they are to be expected, where the place of a cell is not certain.

A cell that may lie in either of two places has its mean between them, near to cells that it cannot
be near to. Means are the places of least error, and they lie too close together: how far apart two
cells are to be expected depends on how far either may lie from its mean. No layout can say all of
that, since cells that may lie anywhere are to be expected far from everything, each other included;
but a layout can be made to say as much as it can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry.gauge import gauge_fix
from ..geometry.neighborhoods import rolled

_RATE = 0.02  # first step size, in RMS radii of the tissue
_PARTNERS = 60  # random partners of a cell, in each direction, whose distances are expected
_SHIFTS = 15  # of them in a step
_KNOWN = 0.05  # of the mean square radius that a layout has at least, however uncertain it is


@torch.no_grad()
def correct_distances(
    pos: Tensor,
    variance: Tensor | None = None,
    h: Tensor | None = None,
    *,
    steps: int = 200,
    similarity: float = 0.125,
    seed: int = 0,
) -> Tensor:
    r"""The layout whose distances rank most like those that are to be expected.

    .. math::
        \max_{\mathbf{y}}\ \operatorname{corr}_{i \ne j} \bigl(
            F(\|\mathbf{y}_i - \mathbf{y}_j\|^2),\
            E[F(\|\mathbf{X}_i - \mathbf{X}_j\|^2)] \bigr), \qquad
        F(d^2) = 1 - e^{-d^2 / 2}

    F is the rank of a distance between two cells of a tissue of unit RMS radius, exactly so for a
    Gaussian cloud, and the correlation therefore about Spearman's, of distances in the layout and
    distances that are not known. Places are taken to be independent,
    :math:`\mathbf{X}_i \sim N(s\,\mathbf{x}_i, \tfrac12 v_i I)`, with the scale
    :math:`s^2 = 1 - \bar v` that leaves the tissue its unit radius, so that

    .. math::
        E[F] = 1 - \frac{1}{w} \exp\Bigl(-\frac{q}{2 w}\Bigr), \qquad
        w = 1 + \tfrac12 (v_i + v_j), \quad
        q = s^2 \|\mathbf{x}_i - \mathbf{x}_j\|^2 + \lambda \|\mathbf{h}_i - \mathbf{h}_j\|^2

    where the embedding, in the unit-RMS gauge, has its own say of how far cells lie apart. Adam
    with a step size that falls from 0.02 to 0. Pairs are those of a random order and 60 shifts of
    it, a quarter of them in a step. Time O(n d) once and O(n) a step, memory O(n d); the same on
    every device up to rounding.

    Args:
        pos: where cells are placed (n, 2), any scale.
        variance: mean square distance of a cell from its place (n,), as a share of that of all
            cells from the middle of the tissue; 0 everywhere if left out.
        h: embedding (n, d); left out, places alone tell.
        steps: of the ascent; 0 returns ``pos`` as it is.
        similarity: :math:`\lambda`.
        seed: of the order and the shifts.

    Returns:
        Layout (n, 2) in the unit-RMS gauge. Fewer than 3 cells are left as they are.
    """
    n = pos.size(0)
    if steps < 1 or n < 3 or not pos.isfinite().all():
        return pos
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator).to(pos.device)
    x = gauge_fix(pos.float())[order]
    left = torch.zeros_like(x[:, 0]) if variance is None else variance.to(x)[order]
    known = (1 - left.mean()).clamp(min=_KNOWN)
    place = x * known.sqrt()
    if h is not None and similarity:
        place = torch.cat([place, gauge_fix(h.to(x))[order] * similarity**0.5], dim=1)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    partners = torch.randint(1, n, (_PARTNERS,), generator=generator).tolist()
    expected = _expected_rank(place, left, partners)
    for step in range(steps):
        rows = torch.randperm(_PARTNERS, generator=generator)[:_SHIFTS]
        shift = [partners[row] for row in rows.tolist()]
        wanted, _ = _standard(expected[rows.to(expected.device)])
        gap = x - rolled([x] * _SHIFTS, shift)  # (shifts, n, 2)
        near = torch.exp(-gap.square().sum(-1) / 2)
        found, spread = _standard(1 - near)
        correlation = (found * wanted).mean()
        gap *= ((found * correlation - wanted) / spread * near / _SHIFTS).unsqueeze(-1)
        gradient = gap.sum(0) - rolled(gap, [n - s for s in shift]).sum(0)
        # Adam, written out: an optimiser would want a graph
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        rate = _RATE * (1 - step / steps) / (1 - 0.9 ** (step + 1))
        x -= rate * first / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    return gauge_fix(torch.empty_like(x).index_copy_(0, order, x).to(pos.dtype))


def relative_variance(place: Tensor, variance: Tensor) -> Tensor:
    """How uncertain places are, for :func:`correct_distances`.

    Args:
        place: mean place of every cell (n, 2).
        variance: mean square distance from it (n,), in the same units.

    Returns:
        (n,), relative to the mean square distance of all cells from the middle of the tissue: that
        of their means, and what is left around them.
    """
    known = (place - place.mean(0)).square().sum(1).mean()
    return variance / (known + variance.mean()).clamp(min=1e-12)


def _expected_rank(place: Tensor, left: Tensor, shifts: list[int]) -> Tensor:
    """E[F] (shifts, n) of the distance of every cell to the ones so many before it."""
    # one by one: all at once would be as many copies of the embedding
    q = torch.stack([(place - place.roll(s, 0)).square().sum(1) for s in shifts])
    w = 1 + (left + rolled([left] * len(shifts), shifts)) / 2
    return 1 - torch.exp(-q / (2 * w)) / w


def _standard(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values with mean 0 and standard deviation 1, and what that was."""
    values = values - values.mean()
    spread = values.square().mean().sqrt().clamp(min=1e-12)
    return values / spread, spread
