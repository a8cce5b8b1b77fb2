"""Places of cells of another assay, by training cells or spots that express the same genes alike.

An encoder learns from whole spots, and single cells lie outside what it has seen. Which of two
spots a cell is more like is a question that its expression can answer without an encoder: a cell
is compared with all training cells, and each of these is a place where it may come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from ..data.expression import morans_i
from ..data.held import Holders, of_each
from ..graph import knn

_TOTAL = 1000.0  # counts that a cell is scaled to before the logarithm
_NEAR = 6  # spatial neighbours that a training cell is averaged with
_LEAST_STD = 0.05  # of a gene; those that vary less do not weigh more
_LEAST_MORANS = 0.01
_BLOCK = 1 << 22  # similarities held at once
_CELLS = 2000  # training cells that are remembered


class Reference(NamedTuple):
    """A training slide.

    Args:
        shares: of each gene in a cell, up to a factor for each cell (n, G), CSR.
        pos: positions (n, 2), in any units.
        places: the same in the common frame of the training slides (n, 2).
        near: row numbers of the spatial neighbours of the first s cells (s, 6), which alone are
            learned from; all cells are, with neighbours searched for, if left out.
    """

    shares: sparse.csr_matrix
    pos: np.ndarray
    places: np.ndarray
    near: np.ndarray | None = None


class Adapter(nn.Module):
    r"""Posterior of the place of a cell over remembered training cells.

    .. math::
        p(j \mid i) \propto \frac{1}{n_{s(j)}} \exp\Bigl(\frac{z_{ij}}{T}\Bigr), \qquad
        z_{ij} = \operatorname*{zscore}_j \sum_v \operatorname*{zscore}_j \cos
        (\mathbf{w} \circ \mathbf{a}^v_i,\ \mathbf{w} \circ \mathbf{b}^v_j), \qquad
        w_g = \sqrt{\frac{\max(I_g, 0.01)}{\sigma_g + 0.05}}

    with :math:`\mathbf{a}_i = \log(1 + 1000\,\mathbf{p}_i)` of the shares of the genes in cell i,
    and :math:`\mathbf{b}_j` likewise. There are four views v. Genes are as they are, or centred on
    their means over the slide, which removes the factor by which an assay changes them. The
    training cell is as measured, or averaged with its 6 spatial neighbours, which removes noise.
    Weights are means over training slides. By Moran's I, genes count that tell the place.

    Args:
        genes: G.
        temperature: T.
        cells: remembered training cells m, for loading the state of a fitted adapter; :meth:`fit`
            sets it, to 2,000 at most, the same number from every slide.
        slides: training slides S, for the same.
    """

    shares: Tensor  # of training cells, log(1 + 1000 p), (2, m, G), half precision
    weight: Tensor  # of genes (G,)
    places: Tensor  # in the common frame (m, 2)
    origin: Tensor  # number of their slide (m,)
    detected: Tensor  # share of the cells of each of S training slides that hold a gene (S, G)

    def __init__(self, genes: int, temperature: float = 0.2, cells: int = 0, slides: int = 0):
        super().__init__()
        self.genes, self.temperature = genes, temperature
        self.register_buffer("shares", torch.zeros(2, cells, genes, dtype=torch.float16))
        self.register_buffer("weight", torch.ones(genes))
        self.register_buffer("places", torch.zeros(cells, 2))
        self.register_buffer("origin", torch.zeros(cells, dtype=torch.long))
        self.register_buffer("detected", torch.zeros(slides, genes))

    @property
    def cells(self) -> int:
        """Number of training cells that are remembered; 0 before :meth:`fit`."""
        return len(self.places)

    @torch.no_grad()
    def fit(self, slides: Sequence[Reference | None], holders: Holders = None) -> Adapter:
        """Remember training cells, and weigh genes by what they tell of the place.

        Args:
            slides: training slides of the same G genes.
            holders: of the slides, where ranks divide them; None stands for those of others.
        """
        share = max(1, _CELLS // len(slides))
        found = of_each(slides, lambda slide: _remembered(slide, share), holders)
        weights, shares, places, detected = zip(*found, strict=True)
        self.weight = torch.from_numpy(np.mean(weights, axis=0)).float()
        self.shares = torch.from_numpy(np.concatenate(shares, axis=1)).half()
        self.places = torch.from_numpy(np.concatenate(places)).float()
        sizes = torch.tensor([len(x) for x in places])
        self.origin = torch.arange(len(sizes)).repeat_interleave(sizes)
        self.detected = torch.from_numpy(np.stack(detected)).float()
        return self

    def other_detection(self, shares: sparse.csr_matrix, measured: np.ndarray) -> float:
        """How many times as many genes, or as few, a cell holds as cells of any training slide.

        Args:
            shares: as in :meth:`posterior`.
            measured: which of the genes the cells have (G,).

        Returns:
            Above 1 for more and below 1 for fewer genes; 1 within the range of training slides.
        """
        inside = np.asarray(measured, dtype=bool)
        known = self.detected.cpu().double().numpy()[:, inside].mean(1)
        own = max(float(_detected(shares)[inside].mean()), 1e-12)
        return own / float(np.clip(own, known.min(), known.max()))

    @torch.no_grad()
    def posterior(
        self, shares: sparse.csr_matrix, measured: np.ndarray, block: int | None = None
    ) -> Iterator[Tensor]:
        """Rows of p (n, m), in blocks.

        Args:
            shares: of each gene in a cell, up to a factor for each cell (n, G), CSR.
            measured: which of the genes the cells have (G,).
            block: cells at once; as many as take little memory if left out.
        """
        present = torch.from_numpy(np.asarray(measured, dtype=bool)).to(self.weight.device)
        weight = self.weight[present]
        known = torch.expm1(self.shares[:, :, present].float())
        known = torch.log1p(_TOTAL * known / known.sum(2, keepdim=True).clamp(min=1e-12)) * weight
        centred = known.clone()
        sizes = self.origin.bincount()
        for number in range(len(sizes)):
            inside = self.origin == number
            centred[:, inside] -= known[:, inside].mean(1, keepdim=True)
        views = [torch.nn.functional.normalize(x, dim=2) for x in (known, centred)]
        logs = _logs(_fractions(shares[:, np.flatnonzero(measured)]))
        mean = torch.from_numpy(np.asarray(logs.mean(0))).float().to(weight)
        prior = -sizes.double().log()[self.origin].to(weight)
        step = block or max(1, _BLOCK // max(self.cells, len(weight)))
        for start in range(0, logs.shape[0], step):
            rows = torch.from_numpy(logs[start : start + step].toarray()).float().to(weight)
            alike = torch.zeros(len(rows), self.cells, device=weight.device)
            for own, others in zip((rows * weight, (rows - mean) * weight), views, strict=True):
                own = torch.nn.functional.normalize(own, dim=1)
                for view in others:
                    alike += _standardized(own @ view.T)
            yield (_standardized(alike) / self.temperature + prior).softmax(1)

    def extra_repr(self) -> str:
        return f"{self.genes}, temperature={self.temperature}, cells={self.cells}"


def _remembered(slide: Reference, share: int) -> tuple[np.ndarray, ...]:
    """Of one slide: weights (G,), some cells in both views (2, m, G), their places, detection."""
    near = slide.near if slide.near is not None else spatial_neighbors(slide.pos)
    own = _fractions(slide.shares)
    every = _logs(own)
    logs = every[: len(near)]
    std = np.sqrt(np.maximum(logs.multiply(logs).mean(0) - np.square(logs.mean(0)), 0))
    morans = np.maximum(morans_i(every, near), _LEAST_MORANS)
    weight = np.sqrt(morans / (np.asarray(std).ravel() + _LEAST_STD))
    rows = np.random.default_rng(0).permutation(len(near))[:share]
    views = [logs[rows], _logs(_around(own, rows, near))]
    shares = np.stack([x.toarray() for x in views])
    detected = _detected(slide.shares[: _learned(slide)])
    return weight, shares, np.asarray(slide.places)[rows], detected


def spatial_neighbors(pos: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """Row numbers of the 6 nearest cells of each cell (n, 6).

    Args:
        pos: positions (n, 2).
        device: where they are searched for.
    """
    place = torch.from_numpy(np.asarray(pos, dtype=np.float64)).to(device)
    return knn(place, _NEAR).index.cpu().numpy()


def mean_and_variance(posterior: Iterator[Tensor], places: Tensor) -> tuple[Tensor, Tensor]:
    """Mean place (n, 2) under a posterior, and mean square distance from it (n,).

    Args:
        posterior: blocks of rows (b, m).
        places: (m, 2).
    """
    values = torch.cat([places, places.square().sum(1, keepdim=True)], dim=1)
    found = torch.cat([block @ values for block in posterior])
    mean = found[:, :2]
    return mean, (found[:, 2] - mean.square().sum(1)).clamp(min=0)


def mixture(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean (n, 2) and variance (n,) of places that are drawn from either of some posteriors.

    Args:
        parts: mean and variance of each.
    """
    mean = torch.stack([own for own, _ in parts]).mean(0)
    square = [variance + (own - mean).square().sum(1) for own, variance in parts]
    return mean, torch.stack(square).mean(0)


def _standardized(rows: Tensor) -> Tensor:
    rows = rows - rows.mean(1, keepdim=True)
    return rows / rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-9)


def _learned(slide: Reference) -> int:
    return slide.shares.shape[0] if slide.near is None else len(slide.near)


def _fractions(values: sparse.csr_matrix) -> sparse.csr_matrix:
    """Each cell divided by its total."""
    total = np.asarray(values.sum(1)).ravel()
    scale = np.divide(1.0, total, out=np.zeros(len(total)), where=total > 0)
    return (sparse.diags(scale) @ values).tocsr()


def _around(fractions: sparse.csr_matrix, rows: np.ndarray, near: np.ndarray) -> sparse.csr_matrix:
    """Means of some cells and their neighbours (b, G)."""
    around = np.concatenate([rows[:, None], near[rows]], axis=1)
    weight, starts = np.full(around.size, 1 / around.shape[1]), np.arange(len(rows) + 1)
    shape = (len(rows), fractions.shape[0])
    mean = sparse.csr_matrix((weight, around.ravel(), starts * around.shape[1]), shape=shape)
    return (mean @ fractions).tocsr()


def _detected(values: sparse.csr_matrix) -> np.ndarray:
    """Share of cells that hold each gene (G,)."""
    return values.getnnz(axis=0) / max(values.shape[0], 1)


def _logs(fractions: sparse.csr_matrix) -> sparse.csr_matrix:
    found = fractions.copy()
    found.data = np.log1p(_TOTAL * found.data)
    return found
