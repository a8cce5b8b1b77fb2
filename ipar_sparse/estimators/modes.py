"""The most probable places of a cell, where one does not suffice."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from .atlas import Atlas

SEPARATION = 0.5
"""Least distance of two places of a cell, in RMS radii; the weight of a place lies within it."""
AMBIGUOUS = 0.5
"""One place does not suffice for a cell whose first place weighs less."""
_SMOOTHING = 0.2  # standard deviation, in RMS radii
_FAR = 1e3  # RMS radii: where no place is
_LEAST = 0.01  # weight of a place; what is less is no place


@torch.no_grad()
def top_places(atlas: Atlas, h: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most probable places of each cell, and how probable they are.

    Places are the highest maxima of the smoothed distribution of the cell that lie
    :data:`SEPARATION` apart. The weight of a place is the mass that is nearest to it and within
    :data:`SEPARATION`; the place is then the mean of this mass.

    Args:
        atlas: of the training slides.
        h: embeddings (n, d) of all cells of a slide.
        count: places of a cell.

    Returns:
        Places (n, count, 2) in the common frame, in RMS radii; and weights (n, count), of sum 1 at
        most, the largest first. A cell of fewer places has NaN and weight 0 for the others.
    """
    return places_of(*atlas.distribution(h), count)


@torch.no_grad()
def places_of(grid: Tensor, blocks: Iterator[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """:func:`top_places` of any distribution over a lattice.

    Args:
        grid, blocks: as :meth:`Atlas.distribution` gives them.
        count: places of a cell.
    """
    found = [_of_block(weight, grid, count) for weight in blocks if len(weight)]
    if not found:
        return grid.new_zeros(0, count, 2), grid.new_zeros(0, count)
    return torch.cat([place for place, _ in found]), torch.cat([weight for _, weight in found])


def _of_block(weight: Tensor, grid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    peaks = torch.stack(list(_peaks(weight, grid, count)), dim=1)
    distance = torch.stack([torch.cdist(peak, grid) for peak in peaks.nan_to_num(_FAR).unbind(1)])
    nearest = distance.argmin(0)
    within = distance.amin(0) <= SEPARATION
    masses = [weight * (within & (nearest == number)) for number in range(count)]
    mass = torch.stack([one.sum(1) for one in masses], dim=1)
    place = torch.stack([one @ grid for one in masses], dim=1) / mass.unsqueeze(2)
    none = (mass < _LEAST) | peaks.isnan().any(2)
    mass = mass.masked_fill(none, 0.0)
    place = place.masked_fill(none.unsqueeze(2), math.nan)
    order = mass.argsort(dim=1, descending=True, stable=True)
    return place.gather(1, order.unsqueeze(2).expand_as(place)), mass.gather(1, order)


def _peaks(weight: Tensor, grid: Tensor, count: int) -> Iterator[Tensor]:
    """Highest maxima (b, 2) of the smoothed weights, one after another; NaN where none is left."""
    side = math.isqrt(len(grid))
    lattice = weight.view(-1, side, side)
    first, second = (_kernel(axis) for axis in (grid[::side, 0], grid[:side, 1]))
    smooth = first @ lattice @ second
    highest = functional.max_pool2d(smooth.unsqueeze(1), 3, stride=1, padding=1).squeeze(1)
    left = smooth.masked_fill(smooth < highest, 0.0).view(len(weight), -1)
    for _ in range(count):
        value, number = left.max(dim=1)
        peak = grid[number]
        yield peak.masked_fill((value <= 0).unsqueeze(1), math.nan)
        left = left.masked_fill(torch.cdist(peak, grid) < SEPARATION, 0.0)


def _kernel(axis: Tensor) -> Tensor:
    """Gaussian smoothing along an axis of the lattice."""
    return torch.exp(-(axis[:, None] - axis[None, :]).square() / (2 * _SMOOTHING**2))
