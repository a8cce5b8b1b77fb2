"""Positions by Bayes' rule from a map of the embedding over the tissue.

A regression from embedding to position must learn what each of 128 dimensions says about the
place. The other direction is easier: over the tissue, the embedding is a smooth field plus noise
whose covariance can be measured. Bayes' rule then gives the place of a cell. A smooth field cannot
describe cell types that lie side by side. The nearest training cells in the embedding can, so the
atlas averages both answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed import all_rows, rows_of
from ..geometry.alignment import EmbeddedSlides, Similarity, align, align_slides

_SIDE = 48  # grid points along each side of the common frame
_DENSITY_WIDTH = 0.08  # kernel width of the tissue density, in RMS radii of a slide
_MIN_DENSITY = 0.1  # relative to the mean density; below it is no tissue
_DENSITY_CELLS = 4000  # cells from which density is estimated
_FIT_CELLS = 50_000  # cells used of a slide; more do not change a field of 100 knots
_KNOWN_CELLS = 20_000  # training cells that are remembered
_BLOCK = 4096  # cells placed at once


class TissueField(NamedTuple):
    """Mean embedding and density over a tissue, on a grid of P points.

    Args:
        grid: places (P, 2) in RMS radii of a slide.
        log_density: log of the tissue density (P,), -inf where no tissue is.
        field: mean embedding at each place, whitened (P, d).
        whiten: matrix (d, d) that brings the noise around the field to unit covariance.
    """

    grid: Tensor
    log_density: Tensor
    field: Tensor
    whiten: Tensor


class Atlas(nn.Module):
    r"""Places a cell by its embedding: half posterior mean, half mean of nearest training cells.

    .. math::
        \hat{\mathbf{x}} = \tfrac12\, E[\mathbf{x} \mid \mathbf{h}]
        + \tfrac12\, \frac{1}{k} \sum_{j \in N_k(\mathbf{h})} \mathbf{x}_j

    with the k nearest training cells in the embedding, and

    .. math::
        \mathbf{h} = f(\mathbf{x}) + \varepsilon, \quad \varepsilon \sim N(0, \Sigma), \qquad
        p(\mathbf{x} \mid \mathbf{h}) \propto \rho(\mathbf{x})
        \exp\bigl(-\tfrac{T}{2}\, \|\Sigma^{-1/2} (\mathbf{h} - f(\mathbf{x}))\|^2 \bigr)

    on a grid of the frame that :func:`~ipar_sparse.geometry.alignment.align_slides` finds for the
    training slides. The field f is a ridge regression on Gaussian bumps and a plane. The noise
    covariance :math:`\Sigma` is that of its residuals, shrunk towards its diagonal. The density of
    the training slides is :math:`\rho`. A temperature T below 1 allows for new donors, whose cells
    lie farther from the field.

    Training slides have equal weight in f, :math:`\Sigma` and :math:`\rho`, unless the new cells
    resemble only few of them. A tumour section, for example, resembles sections of the same
    tumour. All cells i that are placed together give slide s, of :math:`n_s` cells, the weight

    .. math::
        w_s \propto \Bigl(\frac{1}{n_s} \sum_i |N_k(\mathbf{h}_i) \cap s|\Bigr)^2.

    The weights are used if :math:`1 / \sum_s w_s^2`, the effective number of slides, is below half
    their number.

    ``frames`` holds a similarity for each training slide, from the common frame to the slide's own
    coordinates. It is empty before :meth:`fit`, and no part of the state.

    Args:
        channels: width d of the embedding.
        temperature: T.
        cells: number of training cells in the buffers, for loading the state of a fitted atlas;
            :meth:`fit` sets it, to 20,000 at most, the same number from every slide.
        neighbors: k.
        knots: centres of bumps along each side of the frame; those outside the tissue are left out.
        knot_width: standard deviation of a bump, in RMS radii of a slide.
        ridge: penalty on the coefficients of bumps, relative to the number of cells.
        shrinkage: of :math:`\Sigma` towards its diagonal, 0 to 1.

    Shapes:
        - **input:** embeddings (n, d) of all cells of a slide; together they set the weights
        - **output:** positions (n, 2) in the common frame, in RMS radii of a slide
    """

    grid: Tensor  # the first four are a TissueField
    log_density: Tensor
    field: Tensor
    whiten: Tensor
    known: Tensor  # embeddings of remembered training cells (m, d)
    places: Tensor  # their positions (m, 2)
    origin: Tensor  # number of their slide (m,)

    def __init__(
        self,
        channels: int,
        temperature: float = 0.5,
        cells: int = 0,
        *,
        neighbors: int = 15,
        knots: int = 10,
        knot_width: float = 0.25,
        ridge: float = 1e-4,
        shrinkage: float = 0.1,
    ):
        super().__init__()
        self.channels, self.temperature, self.neighbors = channels, temperature, neighbors
        self.frames: list[Similarity] = []
        self._field_options: dict[str, Any] = {
            "knots": knots,
            "knot_width": knot_width,
            "ridge": ridge,
            "shrinkage": shrinkage,
        }
        self.register_buffer("grid", torch.zeros(_SIDE**2, 2))
        self.register_buffer("log_density", torch.zeros(_SIDE**2))
        self.register_buffer("field", torch.zeros(_SIDE**2, channels))
        self.register_buffer("whiten", torch.zeros(channels, channels).fill_diagonal_(1.0))
        self.register_buffer("known", torch.zeros(cells, channels))
        self.register_buffer("places", torch.zeros(cells, 2))
        self.register_buffer("origin", torch.zeros(cells, dtype=torch.long))

    @property
    def cells(self) -> int:
        """Number of training cells that are remembered; 0 before :meth:`fit`."""
        return len(self.known)

    @torch.no_grad()
    def fit(self, slides: EmbeddedSlides, places: Sequence[np.ndarray] | None = None) -> Atlas:
        """Learn field, noise and density, and remember training cells.

        Args:
            slides: pairs (embedding (n_s, d), positions (n_s, 2)) of training slides.
            places: their positions in a common frame (n_s, 2), in RMS radii; found by
                :func:`~ipar_sparse.geometry.alignment.align_slides` if left out.

        Raises:
            ValueError: without slides, or with embeddings of another width.
        """
        if not slides or any(h.shape[1] != self.channels for h, _ in slides):
            raise ValueError(f"an atlas is fitted on slides of embeddings (n, {self.channels})")
        pairs = [(_fit_sample(h), _fit_sample(pos)) for h, pos in slides]
        embeddings = [h for h, _ in pairs]
        aligned = align_slides(pairs) if places is None else places
        seats = [_fit_sample(x) for x in aligned]
        self.frames = [align(x, pos)[1] for x, (_, pos) in zip(seats, pairs, strict=True)]
        equal = torch.full((len(seats),), 1 / len(seats), dtype=torch.float64)
        learned = fit_tissue_field(embeddings, seats, equal, **self._field_options)
        for name, value in learned._asdict().items():
            getattr(self, name).copy_(value)
        share = _KNOWN_CELLS // len(seats)
        known = [_sample(h, share) for h in embeddings]
        self.known = torch.cat(known).to(self.field)
        self.places = torch.cat([_sample(x, share) for x in seats]).to(self.field)
        sizes = torch.tensor([len(h) for h in known])
        self.origin = torch.arange(len(sizes)).repeat_interleave(sizes).to(self.field.device)
        return self

    @torch.no_grad()
    def forward(self, h: Tensor, nearest: bool = True) -> Tensor:
        """Positions (n, 2) of cells with embeddings (n, d).

        Args:
            h: embeddings of all cells of a slide.
            nearest: whether nearest training cells take part. Without them the position is the
                posterior mean, slides weighted equally. Use that on training slides, where each
                cell is nearest to itself.
        """
        if nearest:
            return self.mean_and_variance(h)[0]
        self._check(h)
        return self._posterior(h, self._own_field())[0]

    @torch.no_grad()
    def mean_and_variance(self, h: Tensor) -> tuple[Tensor, Tensor]:
        r"""Position of every cell and its predictive variance.

        The variance is that of places drawn half from the posterior and half from the nearest
        training cells. It is large where either is broad, or where the two disagree.

        Args:
            h: embeddings (n, d) of all cells of a slide.

        Returns:
            Positions :math:`\hat{\mathbf{x}}` (n, 2) in RMS radii of a slide; mean square distance
            of those places from them (n,).
        """
        self._check(h)
        nearest, own = self._nearest_cells(h), rows_of(len(h))
        posterior = self._posterior(h[own], self._field_for(nearest))
        halves = posterior, self._around(nearest[own], h.dtype)
        place = torch.stack([mean for mean, _ in halves]).mean(0)
        square = [variance + (mean - place).square().sum(1) for mean, variance in halves]
        return all_rows(place, len(h)), all_rows(torch.stack(square).mean(0), len(h))

    @torch.no_grad()
    def std(self, h: Tensor) -> Tensor:
        """Predictive standard deviation of every cell (n,), in RMS radii of a slide.

        Args:
            h: embeddings (n, d) of all cells of a slide.
        """
        return self.mean_and_variance(h)[1].sqrt()

    @torch.no_grad()
    def slide_weights(self, h: Tensor) -> Tensor:
        """Weight of each of S training slides in placing these cells (S,), float64, sum 1.

        Args:
            h: embeddings (n, d) of all cells of a slide.
        """
        self._check(h)
        weight = self._unequal_weights(self._nearest_cells(h))
        if weight is not None:
            return weight
        count = int(self.origin.max()) + 1
        return torch.full((count,), 1 / count, dtype=torch.float64)

    def _check(self, h: Tensor) -> None:
        if h.dim() != 2 or h.size(1) != self.channels:
            raise ValueError(
                f"Atlas({self.channels}) needs embeddings (n, {self.channels}); "
                f"given {tuple(h.shape)}"
            )
        if not self.cells:
            raise RuntimeError("the atlas is not fitted; call fit or load a fitted state")

    def _unequal_weights(self, nearest: Tensor) -> Tensor | None:
        """Weights (S,) of slides for cells with these nearest (n, k); None if they are equal."""
        if not len(nearest):
            return None
        sizes = self.origin.bincount().cpu()
        found = self.origin[nearest.flatten()].bincount(minlength=len(sizes)).cpu()
        weight = (found.double() / sizes).square()
        weight = weight / weight.sum()
        return weight if 1 / weight.square().sum() < len(weight) / 2 else None

    def _own_field(self) -> TissueField:
        return TissueField(self.grid, self.log_density, self.field, self.whiten)

    def _field_for(self, nearest: Tensor) -> TissueField:
        """The field, fitted again on remembered cells if slides have unequal weights."""
        weight = self._unequal_weights(nearest)
        if weight is None:
            return self._own_field()
        sizes = self.origin.bincount().tolist()
        known, places = (x.cpu().double().split(sizes) for x in (self.known, self.places))
        learned = fit_tissue_field(known, places, weight, **self._field_options)
        return TissueField(*(value.to(self.field) for value in learned))

    def _posterior(self, h: Tensor, learned: TissueField) -> tuple[Tensor, Tensor]:
        """Mean (n, 2) and variance (n,) of the place given the embedding."""
        grid = learned.grid[learned.log_density.isfinite()]
        values = torch.cat([grid, grid.square().sum(1, keepdim=True)], dim=1)
        blocks = [weight @ values for weight in self._on_tissue(h, learned, _BLOCK)]
        return _mean_and_variance(torch.cat(blocks).to(h.dtype))

    def _on_tissue(self, h: Tensor, learned: TissueField, block: int) -> Iterator[Tensor]:
        """Posterior weights of the grid points that are tissue (b, P), block of cells by block."""
        tissue = learned.log_density.isfinite()
        prior, field = learned.log_density[tissue], learned.field[tissue]
        # |h - f|^2 without |h|^2, which is the same at every place
        prior = prior - self.temperature / 2 * field.square().sum(1)
        for part in (h.to(field) @ learned.whiten).split(block):
            yield torch.addmm(prior, part, field.T, alpha=self.temperature).softmax(1)

    @torch.no_grad()
    def distribution(
        self, h: Tensor, block: int = 1024, nearest: bool = True
    ) -> tuple[Tensor, Iterator[Tensor]]:
        """Where each cell may be: half the posterior, half the nearest training cells.

        Args:
            h: embeddings (n, d) of all cells of a slide.
            block: cells at once.
            nearest: whether nearest training cells take part; else it is the posterior alone.

        Returns:
            A lattice of P places (P, 2) in RMS radii of a slide, the second coordinate running
            fastest; and the weights of these places (b, P), rows summing to 1, block by block.
        """
        self._check(h)
        found = self._nearest_cells(h)
        learned = self._field_for(found)
        return learned.grid, self._weights(h, found, learned, block, 0.5 if nearest else 0.0)

    @torch.no_grad()
    def _weights(
        self, h: Tensor, nearest: Tensor, learned: TissueField, block: int, share: float
    ) -> Iterator[Tensor]:
        """Weights (b, P) of the lattice, of which the nearest cells (n, k) have a share."""
        tissue, seat = learned.log_density.isfinite(), nearest_in_lattice(learned.grid, self.places)
        each = torch.full((), share / max(nearest.size(1), 1)).to(learned.grid)
        parts = nearest.split(block)
        for weight, near in zip(self._on_tissue(h, learned, block), parts, strict=True):
            whole = weight.new_zeros(len(weight), len(tissue))
            whole[:, tissue] = (1 - share) * weight
            yield whole.scatter_add_(1, seat[near], each.expand(near.shape))

    def _nearest_cells(self, h: Tensor) -> Tensor:
        """Nearest training cells in the embedding (n, k)."""
        count = min(self.neighbors, self.cells)
        norm = self.known.square().sum(1)
        blocks = []
        for part in h.to(self.known)[rows_of(len(h))].split(_BLOCK // 4):
            # |h - g|^2 without |h|^2, which is the same for every training cell
            distance = torch.addmm(norm, part, self.known.T, alpha=-2)
            blocks.append(distance.topk(count, dim=1, largest=False).indices)
        return all_rows(torch.cat(blocks), len(h))

    def _around(self, nearest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean (n, 2) and variance (n,) of the places of the nearest training cells (n, k)."""
        square = self.places.square().sum(1, keepdim=True)
        values = torch.cat([self.places, square], dim=1)
        means = [values[part].mean(1) for part in nearest.split(_BLOCK)]
        return _mean_and_variance(torch.cat(means).to(dtype))

    def extra_repr(self) -> str:
        return f"{self.channels}, temperature={self.temperature}, cells={self.cells}"


def fit_tissue_field(
    embeddings: Sequence[Tensor],
    places: Sequence[Tensor],
    weight: Tensor,
    *,
    knots: int = 10,
    knot_width: float = 0.25,
    ridge: float = 1e-4,
    shrinkage: float = 0.1,
) -> TissueField:
    """Field, noise covariance and density of slides in one frame; see :class:`Atlas`.

    Args:
        embeddings: (n_s, d) of each of S slides, float64.
        places: positions (n_s, 2) in the common frame, float64, in RMS radii.
        weight: weight of each slide (S,), float64, sum 1.
        knots, knot_width, ridge, shrinkage: as in :class:`Atlas`.
    """
    grid, log_density = _tissue_grid(places, weight)
    centres = _lattice(*grid.aminmax(dim=0), knots)
    seen = torch.cat([_sample(x, _DENSITY_CELLS // len(places)) for x in places])
    centres = centres[torch.cdist(centres, seen).amin(1) < knot_width]
    gram = cross = noise = torch.zeros((), dtype=torch.float64)
    for w, h, x in zip(weight, embeddings, places, strict=True):
        basis = _plane_and_bumps(x, centres, knot_width)
        gram = gram + w * (basis.T @ basis) / len(x)
        cross = cross + w * (basis.T @ h) / len(x)
    penalty = torch.full((len(gram),), ridge, dtype=torch.float64)
    penalty[:3] = 1e-6  # of the plane; it only keeps the system solvable
    coefficients = torch.linalg.solve(gram + penalty.diag(), cross)

    for w, h, x in zip(weight, embeddings, places, strict=True):
        rest = h - _plane_and_bumps(x, centres, knot_width) @ coefficients
        noise = noise + w * (rest.T @ rest) / len(x)
    variance = noise.diagonal()
    eye = torch.eye(len(noise))
    noise = (1 - shrinkage) * noise + shrinkage * variance.diag()
    noise = noise + 1e-6 * variance.mean().clamp(min=1e-12) * eye
    factor = torch.linalg.cholesky(noise)
    whiten = torch.linalg.solve_triangular(factor, eye.double(), upper=False).T
    field = _plane_and_bumps(grid, centres, knot_width) @ coefficients @ whiten
    return TissueField(grid, log_density, field, whiten.contiguous())


def atlas_layout(h: Tensor | np.ndarray, train: EmbeddedSlides) -> np.ndarray:
    """Positions of cells by an :class:`Atlas` of training slides.

    Args:
        h: embedding of the cells to place (n, d).
        train: pairs (embedding (n_s, d), positions (n_s, 2)) of training slides.

    Returns:
        Positions (n, 2), float64, in RMS radii of a slide.
    """
    h = torch.as_tensor(h).float()
    return Atlas(h.size(1)).fit(train)(h).double().numpy()


def _tissue_grid(places: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """A grid over slides in one frame (P, 2), and the log of their density there (P,)."""
    low, high = (torch.stack([x.aminmax(dim=0)[i] for x in places]) for i in (0, 1))
    grid = _lattice(low.amin(0), high.amax(0), _SIDE)
    axes = grid.view(_SIDE, _SIDE, 2)[:, 0, 0], grid.view(_SIDE, _SIDE, 2)[0, :, 1]
    density = torch.zeros(len(grid), dtype=torch.float64)
    for w, x in zip(weight, places, strict=True):
        seen = _sample(x, _DENSITY_CELLS // len(places))
        # a bump is a product of one along each axis of the grid
        along = [
            torch.exp(-(axis[:, None] - place).square() / (2 * _DENSITY_WIDTH**2))
            for axis, place in zip(axes, seen.T, strict=True)
        ]
        density += (along[0] @ along[1].T).flatten() * (w / len(seen))
    log_density = density.clamp(min=1e-12).log()
    log_density[density < _MIN_DENSITY * density.mean()] = -math.inf
    return grid, log_density


def _mean_and_variance(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (n, 2) and variance (n,) of places from the means of x, y and x^2 + y^2 (n, 3)."""
    mean = values[:, :2]
    return mean, (values[:, 2] - mean.square().sum(1)).clamp(min=0)


def _lattice(low: Tensor, high: Tensor, side: int) -> Tensor:
    axes = [torch.linspace(a, b, side, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    return torch.cartesian_prod(*axes)


def nearest_in_lattice(lattice: Tensor, places: Tensor) -> Tensor:
    """Number of the lattice point nearest to each place (m,).

    Args:
        lattice: of :meth:`Atlas.distribution` (P, 2).
        places: (m, 2), in the same frame.
    """
    low, high = lattice.aminmax(dim=0)
    side = math.isqrt(len(lattice))
    step = ((high - low) / (side - 1)).clamp(min=1e-12)
    cell = ((places.to(lattice) - low) / step).round().long().clamp(0, side - 1)
    return cell[:, 0] * side + cell[:, 1]


def _plane_and_bumps(x: Tensor, centres: Tensor, width: float) -> Tensor:
    """Features of places: 1, x, y, and a Gaussian bump around each centre (n, 3 + C)."""
    bumps = torch.exp(-torch.cdist(x, centres).square() / (2 * width**2))
    return torch.cat([x.new_ones(len(x), 1), x, bumps], dim=1)


def _fit_sample(x: Tensor | np.ndarray) -> Tensor:
    return _sample(torch.as_tensor(x), _FIT_CELLS).cpu().double()


def _sample(x: Tensor, count: int) -> Tensor:
    """Random rows, the same rows of all tensors of one length."""
    if len(x) <= count:
        return x
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[rows[: max(1, count)].to(x.device)]
