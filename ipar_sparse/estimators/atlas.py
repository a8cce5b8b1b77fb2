"""A map of the embedding over the tissue, read backwards: where would a cell like this lie?

A regression from embedding to position must find, for every one of 128 dimensions, what it says
of the place. It is easier to go the other way: over the tissue, the embedding is a smooth field,
and what is left around it is noise whose covariance can be measured. Bayes' rule then gives the
place. A field knows nothing of kinds of cells that lie side by side; the training cells that are
most like a cell do, and where they lie is the other half of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..geometry.alignment import align_slides

_SIDE = 48  # grid points along each side of the tissue's frame
_KNOTS = 10  # centres of the field along each side
_KNOT_WIDTH = 0.25  # of a centre, in RMS radii of a slide
_DENSITY_WIDTH = 0.08  # at which the density of the tissue is looked at
_SPARSE = 0.1  # of the mean density: below, no tissue
_SMOOTHNESS = 1e-4  # ridge penalty of a field, relative to the number of cells
_SHRINKAGE = 0.1  # of the noise's covariance towards its diagonal
_CELLS = 4000  # that density is looked at by
_BLOCK = 4096  # cells placed at once
_FITTED = 50_000  # cells of a slide that it is fitted on; more do not move a field of 100 knots
_NEAREST = 15  # training cells whose places are averaged
_KNOWN = 20_000  # training cells that are remembered


class Atlas(nn.Module):
    r"""A cell's place given its embedding: half its posterior mean, half where cells like it lie.

    .. math::
        \hat{\mathbf{x}} = \tfrac12\, E[\mathbf{x} \mid \mathbf{h}]
        + \tfrac12\, \frac{1}{k} \sum_{j \in N_k(\mathbf{h})} \mathbf{x}_j

    with the k = 15 training cells that are nearest in the embedding, and

    .. math::
        \mathbf{h} = f(\mathbf{x}) + \varepsilon, \quad \varepsilon \sim N(0, \Sigma), \qquad
        p(\mathbf{x} \mid \mathbf{h}) \propto \rho(\mathbf{x})
        \exp\bigl(-\tfrac{T}{2}\, \|\Sigma^{-1/2} (\mathbf{h} - f(\mathbf{x}))\|^2 \bigr)

    on a grid of the common frame that
    :func:`~ipar_sparse.evaluation.baselines.align_slides` turns the training slides into. f is a ridge
    regression on Gaussian bumps and a plane, :math:`\Sigma` the covariance of what it leaves,
    shrunk by a tenth towards its diagonal, :math:`\rho` the density of the training slides. T below
    1 says that cells of another animal differ from the field by more than those it was fitted on.

    Slides count in f, :math:`\Sigma` and :math:`\rho` alike, unless what is placed is like few of
    them, as a section of a tumour is like its sisters and not like those of other tumours. By

    .. math::
        w_s \propto \Bigl(\frac{1}{n_s} \sum_i |N_k(\mathbf{h}_i) \cap s|\Bigr)^2

    over all cells i that are placed together, slides count if :math:`1 / \sum_s w_s^2`, the number
    of slides that it is like, is less than half of them.

    Args:
        channels: width d of the embedding.
        temperature: T.
        cells: training cells that are remembered, at most 20,000, drawn alike from every slide;
            fitting sets it. With 0, as in runs saved before there were any, the place is the
            posterior mean.
        origins: whether it is known of which slide they are; fitting sets it. Without, as in runs
            saved before it was, slides count alike.

    Shapes:
        - **input:** embeddings (n, d), of all cells of a slide: they say which slides are like it
        - **output:** positions (n, 2) in the common frame
    """

    def __init__(
        self, channels: int, temperature: float = 0.5, cells: int = 0, origins: bool = False
    ):
        super().__init__()
        self.channels, self.temperature = channels, temperature
        self.register_buffer("grid", torch.zeros(_SIDE**2, 2))
        self.register_buffer("log_density", torch.zeros(_SIDE**2))  # -inf where no tissue is
        self.register_buffer("field", torch.zeros(_SIDE**2, channels))  # whitened
        self.register_buffer("whiten", torch.eye(channels))
        self.register_buffer("known", torch.zeros(cells, channels) if cells else None)
        self.register_buffer("places", torch.zeros(cells, 2) if cells else None)
        origin = torch.zeros(cells, dtype=torch.long) if cells and origins else None
        self.register_buffer("origin", origin)  # of which slide they are

    @property
    def cells(self) -> int:
        """Training cells that are remembered."""
        return 0 if self.known is None else len(self.known)

    @torch.no_grad()
    def fit(self, slides: Sequence[tuple]) -> Atlas:
        """Learn field, noise and density.

        Args:
            slides: pairs (embedding (n_s, d), positions (n_s, 2)) of training slides.

        Raises:
            ValueError: without slides, or with embeddings of another width.
        """
        if not slides or any(h.shape[1] != self.channels for h, _ in slides):
            raise ValueError(f"an atlas is fitted on slides of embeddings (n, {self.channels})")
        values = [_some(torch.as_tensor(h).cpu(), _FITTED).double() for h, _ in slides]
        seen = [_some(torch.as_tensor(pos), _FITTED).double() for _, pos in slides]
        pairs = [(h.numpy(), x.numpy()) for h, x in zip(values, seen, strict=True)]
        places = [torch.from_numpy(np.asarray(x)).double() for x in align_slides(pairs)]
        alike = torch.full((len(places),), 1 / len(places), dtype=torch.float64)
        self._learn(values, places, alike)
        share = _KNOWN // len(places)
        known = [_some(h, share) for h in values]
        self.known = torch.cat(known).to(self.field)
        self.places = torch.cat([_some(x, share) for x in places]).to(self.field)
        sizes = torch.tensor([len(h) for h in known])
        self.origin = torch.arange(len(sizes)).repeat_interleave(sizes).to(self.field.device)
        return self

    def _learn(self, values: list[Tensor], places: list[Tensor], weight: Tensor) -> None:
        """Field, noise and density of slides in one frame, which count by a weight (S,)."""
        grid, log_density = tissue_grid(places, _SIDE, weight)
        knots = _lattice(*grid.aminmax(dim=0), _KNOTS)
        seen = torch.cat([_some(x, _CELLS // len(places)) for x in places])
        knots = knots[torch.cdist(knots, seen).amin(1) < _KNOT_WIDTH]
        gram, cross = 0.0, 0.0
        for w, h, x in zip(weight, values, places, strict=True):
            basis = _bumps(x, knots)
            gram = gram + w * (basis.T @ basis) / len(x)
            cross = cross + w * (basis.T @ h) / len(x)
        penalty = torch.full((len(gram),), _SMOOTHNESS, dtype=torch.float64)
        penalty[:3] = 1e-6  # the plane is free
        field = torch.linalg.solve(gram + penalty.diag(), cross)

        noise = 0.0
        for w, h, x in zip(weight, values, places, strict=True):
            rest = h - _bumps(x, knots) @ field
            noise = noise + w * (rest.T @ rest) / len(x)
        variance = noise.diagonal()
        noise = (1 - _SHRINKAGE) * noise + _SHRINKAGE * variance.diag()
        noise = noise + 1e-6 * variance.mean().clamp(min=1e-12) * torch.eye(self.channels)
        factor = torch.linalg.cholesky(noise)
        whiten = torch.linalg.solve_triangular(
            factor, torch.eye(self.channels).double(), upper=False
        )
        self.grid.copy_(grid)
        self.log_density.copy_(log_density)
        self.whiten.copy_(whiten.T)
        self.field.copy_(_bumps(grid, knots) @ field @ whiten.T)

    @torch.no_grad()
    def forward(self, h: Tensor, nearest: bool = True) -> Tensor:
        """Places (n, 2) of cells with embeddings (n, d).

        Args:
            h: embeddings.
            nearest: whether training cells like them have their say. Without, it is the posterior
                mean alone: cells of a training slide are most like themselves.
        """
        if h.dim() != 2 or h.size(1) != self.channels:
            raise ValueError(
                f"Atlas({self.channels}) needs embeddings (n, {self.channels}); "
                f"given {tuple(h.shape)}"
            )
        return self.moments(h)[0] if nearest else self._posterior(h)[0]

    @torch.no_grad()
    def spread(self, h: Tensor) -> Tensor:
        r"""How far a cell may lie from where it is placed (n,), in RMS radii of a slide.

        The standard deviation around :math:`\hat{\mathbf{x}}` of places drawn half of the time
        from the posterior, and else from those of the nearest training cells: large where either
        is broad, or where they disagree.

        Args:
            h: embeddings (n, d).
        """
        return self.moments(h)[1].sqrt()

    @torch.no_grad()
    def moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Place (n, 2) of every cell, and the square of :meth:`spread` (n,), found together.

        Args:
            h: embeddings (n, d).
        """
        if not self.cells:
            return self._posterior(h)
        nearest = self._neighbors(h)
        halves = self._like(nearest)._posterior(h), self._around(nearest, h.dtype)
        place = torch.stack([mean for mean, _ in halves]).mean(0)
        square = [variance + (mean - place).square().sum(1) for mean, variance in halves]
        return place, torch.stack(square).mean(0)

    def _likeness(self, nearest: Tensor) -> Tensor | None:
        """Weight (S,) of every slide for cells with these nearest (n, k), sum 1; None if alike."""
        if self.origin is None or not len(nearest):
            return None
        sizes = self.origin.bincount().cpu()
        found = self.origin[nearest.flatten()].bincount(minlength=len(sizes)).cpu()
        weight = (found.double() / sizes).square()
        weight = weight / weight.sum()
        return weight if 1 / weight.square().sum() < len(weight) / 2 else None

    def _like(self, nearest: Tensor) -> Atlas:
        """This atlas, learned again from the cells it remembers if slides do not count alike."""
        weight = self._likeness(nearest)
        if weight is None:
            return self
        sizes = self.origin.bincount().tolist()
        values, places = (x.cpu().double().split(sizes) for x in (self.known, self.places))
        like = Atlas(self.channels, self.temperature).to(self.field)
        like._learn(values, places, weight)
        return like

    def _posterior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (n, 2) and variance (n,) of the place given the embedding."""
        tissue = self.log_density.isfinite()
        field, grid, prior = self.field[tissue], self.grid[tissue], self.log_density[tissue]
        # |h - f|^2 without |h|^2, which is the same at every place
        prior = prior - self.temperature / 2 * field.square().sum(1)
        moments = torch.cat([grid, grid.square().sum(1, keepdim=True)], dim=1)
        blocks = []
        for part in (h.to(field) @ self.whiten).split(_BLOCK):
            log_posterior = torch.addmm(prior, part, field.T, alpha=self.temperature)
            blocks.append(log_posterior.softmax(1) @ moments)
        return _mean_and_variance(torch.cat(blocks).to(h.dtype))

    def _neighbors(self, h: Tensor) -> Tensor:
        """Nearest training cells (n, k)."""
        count = min(_NEAREST, self.cells)
        norm = self.known.square().sum(1)
        blocks = []
        for part in h.to(self.known).split(_BLOCK // 4):
            # |h - g|^2 without |h|^2, which is the same for every training cell
            distance = torch.addmm(norm, part, self.known.T, alpha=-2)
            blocks.append(distance.topk(count, dim=1, largest=False).indices)
        return torch.cat(blocks)

    def _around(self, nearest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean (n, 2) and variance (n,) of the places of the nearest training cells (n, k)."""
        square = self.places.square().sum(1, keepdim=True)
        moments = torch.cat([self.places, square], dim=1)
        means = [moments[part].mean(1) for part in nearest.split(_BLOCK)]
        return _mean_and_variance(torch.cat(means).to(dtype))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.channels}, temperature={self.temperature})"


def tissue_grid(
    places: Sequence[Tensor], side: int = _SIDE, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A grid over slides in one frame, and the log of their density there.

    Args:
        places: positions (n_s, 2) of each slide, float64, in RMS radii.
        side: grid points along each side.
        weight: of each slide (S,), sum 1; alike if left out.

    Returns:
        Points (side^2, 2), and log density (side^2,), -inf where no tissue is.
    """
    low, high = (torch.stack([x.aminmax(dim=0)[i] for x in places]) for i in (0, 1))
    grid = _lattice(low.amin(0), high.amax(0), side)
    density = torch.zeros(len(grid), dtype=torch.float64)
    for number, x in enumerate(places):
        seen = _some(x, _CELLS // len(places))
        bumps = torch.exp(-torch.cdist(grid, seen).square() / (2 * _DENSITY_WIDTH**2))
        density += bumps.mean(1) * (1 / len(places) if weight is None else weight[number])
    log_density = density.clamp(min=1e-12).log()
    log_density[density < _SPARSE * density.mean()] = -math.inf
    return grid, log_density


def atlas_layout(h, train: Sequence[tuple]) -> np.ndarray:
    """Cells placed by an :class:`Atlas` of training slides.

    Args:
        h: embedding of the cells to lay out (n, d).
        train: pairs (embedding (n_s, d), positions (n_s, 2)) of training slides.

    Returns:
        (n, 2), float64.
    """
    h = torch.as_tensor(h).float()
    return Atlas(h.size(1)).fit(train)(h).double().numpy()


def _mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Of places, from the means of x, y and x^2 + y^2 (n, 3)."""
    mean = moments[:, :2]
    return mean, (moments[:, 2] - mean.square().sum(1)).clamp(min=0)


def _lattice(low: Tensor, high: Tensor, side: int) -> Tensor:
    axes = [torch.linspace(a, b, side, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    return torch.cartesian_prod(*axes)


def _bumps(x: Tensor, knots: Tensor) -> Tensor:
    """A plane, and Gaussian bumps around the knots (n, 3 + knots)."""
    bumps = torch.exp(-torch.cdist(x, knots).square() / (2 * _KNOT_WIDTH**2))
    return torch.cat([x.new_ones(len(x), 1), x, bumps], dim=1)


def _some(x: Tensor, count: int) -> Tensor:
    """Rows drawn at random, the same of tensors of the same length."""
    if len(x) <= count:
        return x
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[rows[: max(1, count)]]
