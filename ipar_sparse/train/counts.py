"""Fitting :class:`~ipar_sparse.nn.CountComponents`: fields over the tissue, and what is beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from ..atlas import CountAtlas, tissue_grid
from ..baselines import align_slides
from ..errors import UserError
from ..expression import Expression, match_genes, median_total, take_genes
from ..nn.counts import FEWEST_GENES, FIELDS, LOG_RATE, CountComponents, depth_and_mean
from ..slide import Slide
from .components import principal_axes, project, signed

_CELLS = 60_000  # fitted on, drawn alike from every slide
_FIELD_CELLS = 20_000  # whose fields' directions are taken
_RESIDUAL_CELLS = 10_000  # whose residuals are looked at
_SCALED = 4000  # of a slide, by which components are scaled
_FRAME = 40  # principal components by which slides are turned into one frame
_SIDE, _WIDTH = 10, 0.35  # knots along a side, and the width of a bump in RMS radii
_STEPS, _BATCH, _RATE = 300, 1024, 0.02
_PENALTY = 3.0  # of a field's squared weights, against the log likelihood of all cells
_SIZES = 0.05, 100.0  # of the negative binomial
_RESIDUAL = 10.0  # standard deviations, at most, of one count
_SHRUNK = 0.7  # of the loadings that residuals suggest: they hold noise as well


def require_counts(
    slides: Sequence[Slide],
    genes: Sequence[str],
    asked: str = "encoder.input=counts",
    instead: str = "encoder.input=log",
) -> None:
    """Raise a UserError unless every slide has counts, of as many genes as components need.

    Args:
        slides, genes: of the run.
        asked: the setting that reads counts.
        instead: what to set in its place.
    """
    for slide in slides:
        if slide.expression is None or slide.normalized:
            what = "expression" if slide.expression is None else "counts, only normalised values"
            raise UserError(
                f"{slide.name}: has no {what}, which {asked} reads; "
                f"name a layer of counts (--layer), or train with --set {instead}"
            )
    if len(genes) < FEWEST_GENES:
        raise UserError(
            f"{len(genes)} genes are too few for {asked}, which needs {FEWEST_GENES}"
        )


def have_counts(slides: Sequence[Slide], genes: Sequence[str]) -> bool:
    """Whether :func:`require_counts` would pass."""
    counts = all(slide.expression is not None and not slide.normalized for slide in slides)
    return counts and len(genes) >= FEWEST_GENES


def slide_counts(slide: Slide, genes: Sequence[str]) -> sparse.csr_matrix:
    """Counts (n, G) of some genes; those that the slide lacks have none.

    Raises:
        UserError: if the slide has no counts, or none of the genes.
    """
    require_counts([slide], genes)
    match_genes([slide], genes)
    return take_genes(slide, genes)


def read_counts(slide: Slide, genes: Sequence[str], components: CountComponents) -> Expression:
    """A slide in components of its counts, as an encoder takes them."""
    values = components(slide_counts(slide, genes)).cpu().numpy()
    names = [f"component {i + 1}" for i in range(components.channels)]
    return Expression(sparse.csr_matrix(values), names, slide.empty)


@dataclass
class GeneFields:
    """Log rates of genes over the tissue, as :func:`fit_fields` finds them.

    Args:
        frames: positions (n_s, 2) of each slide in the common frame.
        chosen: counts (m_s, G) of the cells that were fitted.
        data: those cells together.
        weight: of the basis of the place, for every gene (K, G).
        size: of the negative binomial (G,).
        spread, directions: singular values (R,), RMS over cells, and directions (R, G) of the
            fields.
    """

    frames: list[np.ndarray]
    chosen: list[sparse.csr_matrix]
    data: _Cells
    weight: Tensor
    size: Tensor
    spread: Tensor
    directions: Tensor


def fit_fields(slides: Sequence[Slide], genes: Sequence[str], device) -> GeneFields:
    r"""A field for every gene, of low rank, in the common frame of the training slides.

    .. math::
        \log \mu_{ig} = \log d_i + b_{sg} + (\phi(x_i) U V)_g,

    by Adam on the negative binomial likelihood, with x in the frame that
    :func:`~ipar_sparse.baselines.align_slides` turns the slides into.

    Args:
        slides: with counts and positions.
        genes: G names.
        device: where to.
    """
    rank = min(FIELDS, len(genes) // 3)
    frames = _frames(slides, genes)
    share = max(1, _CELLS // len(slides))
    chosen, places = [], []
    for number, (slide, place) in enumerate(zip(slides, frames, strict=True)):
        counts = slide_counts(slide, genes)
        filled = np.flatnonzero(np.asarray(counts.sum(axis=1)).ravel() > 0)
        rows = np.sort(np.random.default_rng([number, 11]).permutation(filled)[:share])
        chosen.append(counts[rows])
        places.append(torch.from_numpy(place[rows]).float().to(device))
    data = _Cells(chosen, places, device)
    weight = _fit_fields(data, rank)
    size = _sizes(data, weight)

    field = data.basis[_some(len(data.basis), _FIELD_CELLS).to(device)] @ weight
    _, spread, directions = torch.linalg.svd(field, full_matrices=False)
    spread = spread[:rank] / len(field) ** 0.5
    directions = signed(directions[:rank].T.cpu().numpy()).T.to(device)
    return GeneFields(frames, chosen, data, weight, size, spread, directions)


def fit_counts(
    components: CountComponents,
    slides: Sequence[Slide],
    genes: Sequence[str],
    fields: GeneFields | None = None,
) -> None:
    """Learn loadings and dispersions from training slides.

    First the singular directions of the genes' fields, then the leading directions of the Pearson
    residuals, by which cells differ wherever they lie.

    Args:
        components: to be filled.
        slides: with counts and positions.
        genes: of the components.
        fields: of the same slides and genes; found here if left out.
    """
    found = fields or fit_fields(slides, genes, components.loading.device)
    data, size, chosen = found.data, found.size, found.chosen
    own = found.spread[:, None] * found.directions
    other = _residual_axes(data, found.weight, size, components.others)
    components.loading.zero_()
    components.loading[: len(own)] = own
    components.loading[components.fields : components.fields + len(other)] = other
    components.size.copy_(size)

    mean = data.mean_counts()
    weighted = components.loading * (mean * size / (mean + size)).sqrt()
    gram = (weighted @ weighted.T).double()
    gram = gram + 1e-6 * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram)).to(gram)
    components.turn.copy_(torch.linalg.cholesky(gram))
    samples = [counts[_some(counts.shape[0], _SCALED).numpy()] for counts in chosen]
    variance = torch.stack([components(s).var(0, correction=0).mean() for s in samples]).mean()
    components.turn.div_(variance.sqrt().clamp(min=1e-8))


def count_atlas(
    slides: Sequence[Slide], genes: Sequence[str], device, fields: GeneFields | None = None
) -> CountAtlas:
    """An atlas of training slides that reads counts.

    Args:
        slides: with counts and positions.
        genes: of the atlas.
        device: where to.
        fields: of the same slides and genes; found here if left out.
    """
    found = fields or fit_fields(slides, genes, device)
    atlas = CountAtlas(len(genes)).to(device)
    grid, log_density = tissue_grid([torch.from_numpy(x).double() for x in found.frames])
    basis = found.data.at(grid.float().to(device))
    atlas.grid.copy_(grid)
    atlas.log_density.copy_(log_density)
    atlas.height.copy_(basis @ found.weight @ found.directions.T)
    atlas.loading.copy_(found.directions)
    atlas.size.copy_(found.size)
    return atlas


class _Cells:
    """Cells of all slides: counts, depths, log means of their slide, and a basis of the place."""

    def __init__(self, counts: list, places: list[Tensor], device):
        self.counts = sparse.vstack(counts).tocsr()
        like = places[0]
        found = [depth_and_mean(c, like) for c in counts]
        self.depth = torch.cat([depth for depth, _ in found])
        self.log_mean = torch.stack([mean for _, mean in found])
        sizes = torch.tensor([c.shape[0] for c in counts])
        self.slide = torch.repeat_interleave(torch.arange(len(counts)), sizes).to(device)
        self.member = torch.nn.functional.one_hot(self.slide, len(counts)).to(like)
        self.device = device
        x = torch.cat(places)
        radius = x.square().sum(1).mean().div(2).sqrt()
        ends = zip(*x.aminmax(dim=0), strict=True)
        axes = [torch.linspace(float(low), float(high), _SIDE) for low, high in ends]
        knots = torch.cartesian_prod(*axes).to(device)
        sample = x[_some(len(x), 4000).to(device)]
        self.width = _WIDTH * radius
        self.knots = knots[torch.cdist(knots, sample).amin(1) < self.width]
        basis = self._bumps(x)
        self.centre = basis.mean(0)
        basis = basis - self.centre
        variance, turn = torch.linalg.eigh((basis.T @ basis / len(basis)).double())
        self.turn = turn[:, variance > 1e-5 * variance.max()].float()
        self.basis = basis @ self.turn

    def _bumps(self, x: Tensor) -> Tensor:
        bumps = torch.exp(-torch.cdist(x, self.knots).square() / (2 * self.width**2))
        return torch.cat([x, bumps], 1)

    def at(self, x: Tensor) -> Tensor:
        """The basis at places (m, 2) of the common frame."""
        return (self._bumps(x) - self.centre) @ self.turn

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Counts of some cells, and their log rates where a field says nothing."""
        counts = torch.from_numpy(self.counts[rows.numpy()].toarray()).to(self.depth)
        rows = rows.to(self.device)
        return counts, self.log_mean[self.slide[rows]] + self.depth[rows].log()[:, None]

    def mean_counts(self) -> Tensor:
        return torch.from_numpy(np.asarray(self.counts.mean(axis=0))).to(self.depth).flatten()


def _frames(slides: Sequence[Slide], genes: Sequence[str]) -> list[np.ndarray]:
    total = median_total(slides)
    read = [Expression.from_slide(slide, genes, total) for slide in slides]
    axes, _ = principal_axes(read, min(_FRAME, len(genes)))
    pairs = [(project(e, axes), slide.pos) for e, slide in zip(read, slides, strict=True)]
    return align_slides(pairs)


@torch.enable_grad()
def _fit_fields(data: _Cells, rank: int) -> Tensor:
    """Weights of the basis for every gene (K, G), of low rank; log means of slides take what is
    left for them."""
    generator = torch.Generator().manual_seed(0)
    n, genes, width = len(data.basis), data.counts.shape[1], data.basis.size(1)
    inner, outer, shift = (
        torch.nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(data.device))
        for shape in ((width, rank), (rank, genes), (len(data.log_mean), genes))
    )
    shift.data.zero_()
    size = _sizes(data)
    optimizer = torch.optim.Adam([inner, outer, shift], lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_STEPS)
    for step in range(_STEPS):
        if step == _STEPS // 2:
            size = _sizes(data, (inner @ outer).detach(), shift.detach())
        rows = torch.randperm(n, generator=generator)[:_BATCH]
        counts, known = data.batch(rows)
        rows = rows.to(data.device)
        # not indexed: that gradient would be summed in another order every time
        log_rate = data.basis[rows] @ inner @ outer + data.member[rows] @ shift + known
        log_rate = log_rate.clamp(*LOG_RATE)
        # without what does not depend on the rate
        likelihood = counts * log_rate - (counts + size) * torch.log(log_rate.exp() + size)
        penalty = _PENALTY / n * (inner @ outer).square().sum()
        loss = penalty - likelihood.sum() / len(rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    data.log_mean = data.log_mean + shift.detach()
    return (inner @ outer).detach()


@torch.no_grad()
def _sizes(data: _Cells, weight: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """Sizes of the negative binomial by moments: variance = mean + mean^2 / size."""
    rows = _some(len(data.basis), _RESIDUAL_CELLS)
    square, excess = 0.0, 0.0
    for part in rows.split(_BATCH):
        counts, log_rate = data.batch(part)
        part = part.to(data.device)
        if weight is not None:
            log_rate = log_rate + data.basis[part] @ weight
        if shift is not None:
            log_rate = log_rate + shift[data.slide[part]]
        rate = log_rate.clamp(*LOG_RATE).exp()
        square = square + rate.square().sum(0)
        excess = excess + ((counts - rate).square() - rate).sum(0)
    return (square / excess.clamp(min=1e-8)).clamp(*_SIZES)


@torch.no_grad()
def _residual_axes(data: _Cells, weight: Tensor, size: Tensor, count: int) -> Tensor:
    """Loadings (count, G) of what the fields leave."""
    rows, blocks = _some(len(data.basis), _RESIDUAL_CELLS), []
    for part in rows.split(_BATCH):
        counts, log_rate = data.batch(part)
        field = data.basis[part.to(data.device)] @ weight
        rate = (log_rate + field).clamp(*LOG_RATE).exp()
        rest = (counts - rate) / (rate + rate.square() / size).sqrt()
        blocks.append(rest.clamp(-_RESIDUAL, _RESIDUAL).cpu())
    rest = torch.cat(blocks).double().numpy()
    genes = rest.shape[1]
    operator = LinearOperator(
        (genes, genes), matvec=lambda v: rest.T @ (rest @ v.ravel()) / len(rest), dtype=np.float64
    )
    variance, axes = eigsh(operator, k=min(count, genes - 1), v0=np.ones(genes))
    variance, axes = variance[::-1].copy(), axes[:, ::-1].copy()
    strength = _SHRUNK * np.sqrt(np.maximum(variance - 1, 0.05))
    return signed(axes * strength).T.to(weight)


def _some(n: int, count: int) -> Tensor:
    """At most so many rows, drawn at random, the same every time."""
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:count]
    return rows.sort().values
