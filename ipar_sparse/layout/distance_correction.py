"""Distance correction: a layout whose distances follow the expected ones.

A cell that may lie in either of two places gets the mean of both, near cells that it cannot be
near to. Such means have the least square error, but they lie too close together. The expected
distance of two cells also depends on the predictive variance of each. No layout can show all
expected distances, since a cell of unknown place is expected far from everything. The correction
finds the layout that follows them best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry.gauge import gauge_fix
from ..geometry.neighborhoods import Shifts, opposite, rolled, square_length
from ..ops.recording import Recorder
from ..ticks import counted
from .descent import Descent

_LR = 0.02  # first step size of Adam, in RMS radii of the tissue
_PARTNERS = 60  # random partners of a cell, in each direction, with an expected rank
_STEP_PARTNERS = 15  # how many of them one step uses
_MIN_CERTAIN = 0.05  # floor of s^2, so that a layout of no certainty keeps some shape


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
    r"""The layout whose distances rank most like the expected distances.

    .. math::
        \max_{\mathbf{y}}\ \operatorname{corr}_{i \ne j} \bigl(
            F(\|\mathbf{y}_i - \mathbf{y}_j\|^2),\
            E[F(\|\mathbf{X}_i - \mathbf{X}_j\|^2)] \bigr), \qquad
        F(d^2) = 1 - e^{-d^2 / 2}

    F is the rank of a distance, as a fraction, between cells of a Gaussian cloud of unit RMS
    radius. The correlation is therefore close to Spearman's. Places are independent,
    :math:`\mathbf{X}_i \sim N(s\,\mathbf{x}_i, \tfrac12 v_i I)`, and :math:`s^2 = 1 - \bar v`
    keeps the tissue at unit radius, so that

    .. math::
        E[F] = 1 - \frac{1}{w} \exp\Bigl(-\frac{q}{2 w}\Bigr), \qquad
        w = 1 + \tfrac12 (v_i + v_j), \quad
        q = s^2 \|\mathbf{x}_i - \mathbf{x}_j\|^2 + \lambda \|\mathbf{h}_i - \mathbf{h}_j\|^2

    with the embedding h in the unit-RMS gauge, so that distances in it count too. Adam with a step
    size that falls linearly from 0.02 to 0. Pairs are the cells of a random order and of 60 shifts
    of it; each step uses a quarter of them. Time O(n d) once and O(n) per step, memory O(n d).
    Devices agree up to rounding.

    Args:
        pos: layout (n, 2), any scale.
        variance: predictive variance v of each cell (n,), relative to the mean square radius of
            the tissue, see :func:`relative_variance`; 0 everywhere if left out.
        h: embedding (n, d); left out, only places count.
        steps: number of optimiser steps; 0 returns ``pos`` as it is.
        similarity: :math:`\lambda`.
        seed: of the order and the shifts.

    Returns:
        Layout (n, 2) in the unit-RMS gauge. Fewer than 3 cells, and layouts with values that are
        not finite, are returned as they are.
    """
    n = pos.size(0)
    if steps < 1 or n < 3 or not pos.isfinite().all():
        return pos
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator).to(pos.device)
    x = gauge_fix(pos.float())[order]
    v = torch.zeros_like(x[:, 0]) if variance is None else variance.to(x)[order]
    place = x * (1 - v.mean()).clamp(min=_MIN_CERTAIN).sqrt()
    if h is not None and similarity:
        place = torch.cat([place, gauge_fix(h.to(x))[order] * similarity**0.5], dim=1)
    partners = torch.randint(1, n, (_PARTNERS,), generator=generator).tolist()
    wanted = expected_rank(place, v, partners)
    descent, recorder = Descent(x), Recorder(x.device)
    orders = [torch.randperm(_PARTNERS, generator=generator) for _ in range(steps)]
    rows = torch.stack(orders)[:, :_STEP_PARTNERS]
    draws = Shifts(torch.tensor(partners)[rows], x.device)
    picked = Shifts(rows, x.device, as_list=False)

    def move() -> None:
        descent.step(_gradient(x, draws.now, wanted[picked.now]))

    for step in counted(range(steps)):
        draws.take(step)
        picked.take(step)
        descent.set_lr(_LR * (1 - step / steps))
        recorder("move", move)
    return gauge_fix(torch.empty_like(x).index_copy_(0, order, x).to(pos.dtype))


def relative_variance(place: Tensor, variance: Tensor) -> Tensor:
    r"""Predictive variance relative to the mean square radius of the tissue.

    .. math::
        v_i / \bigl(\operatorname*{mean}_j \|\mathbf{x}_j - \bar{\mathbf{x}}\|^2 + \bar v\bigr)

    The radius is that of the true places: the one of their means, and the variance around them.

    Args:
        place: mean place of every cell (n, 2).
        variance: mean square distance of a cell from it (n,), in the same units squared.

    Returns:
        (n,), as :func:`correct_distances` takes it.
    """
    radius = (place - place.mean(0)).square().sum(1).mean()
    return variance / (radius + variance.mean()).clamp(min=1e-12)


def expected_rank(place: Tensor, variance: Tensor, shifts: list[int]) -> Tensor:
    """E[F] of :func:`correct_distances`, for cells and their partners.

    Args:
        place: scaled places, with the scaled embedding beside them (n, 2 + d).
        variance: v (n,).
        shifts: the partner of cell i under shift s is cell i - s, counted round.

    Returns:
        (shifts, n).
    """
    # one by one: all at once would copy the embedding for every shift
    q = torch.stack([(place - place.roll(s, 0)).square().sum(1) for s in shifts])
    w = 1 + (variance + rolled([variance] * len(shifts), shifts)) / 2
    return 1 - torch.exp(-q / (2 * w)) / w


def _gradient(x: Tensor, shifts: list[int] | Tensor, wanted: Tensor) -> Tensor:
    """Gradient (n, 2) of the negative correlation, up to the factor n, which Adam ignores."""
    n = x.size(0)
    wanted, _ = _standardized(wanted)
    gap = x - rolled([x] * len(shifts), shifts)  # (shifts, n, 2)
    near = torch.exp(-square_length(gap) / 2)
    found, std = _standardized(1 - near)
    correlation = (found * wanted).mean()
    gap *= ((found * correlation - wanted) / std * near / len(shifts)).unsqueeze(-1)
    return gap.sum(0) - rolled(gap, opposite(shifts, n)).sum(0)


def _standardized(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values at mean 0 and standard deviation 1, and what their standard deviation was."""
    values = values - values.mean()
    std = values.square().mean().sqrt().clamp(min=1e-12)
    return values / std, std
