"""How like the training cells new cells are, as p-values calibrated on cells that were left out.

A cell of a type that training slides lack has few neighbours among their cells, but as many as
others on its own slide. The ratio of both distances tells it from cells that are only deep, shallow
or rare. A slide of another tissue differs from the training slides in the mean of its genes, and
noise in how genes vary together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from ..data.held import Holders, of_each
from ..distributed import all_rows, rows_of
from ..ticks import counted

Matrix: TypeAlias = sparse.csr_matrix | np.ndarray

_ROWS = 16384  # cells of dense features at once
_BLOCK = 2048  # cells whose distances are held at once
_COEXPRESSION = 100  # features whose correlations are compared
_SAMPLE = 500  # cells of a slide from which correlations are taken
_DRAWS = 4  # of as many cells from a fold
_ITERATIONS = 6  # of subspace iteration
_STRETCH = 2.0  # at most, by which the spread of a slide's scores is matched
_LEAST_OFFSET = 0.2  # of a training slide, in radii of its cells: few slides show too little
_LEAST_COEXPRESSION = 0.08  # noise reaches half of it
_LEAST = 4  # cells that can be compared
_FLOOR = 1e-12


@dataclass(frozen=True)
class Assessment:
    """How like the training slides one slide is.

    Args:
        p_value: of each cell (n,), float64; small = unlike. NaN for cells left out.
        shared: number of features that the slide has of those of the run.
        mean_agreement: correlation of the features' means with those of the training slides.
        coexpression: correlation of the features' correlations with those on training slides,
            relative to that of left-out folds with the others.
        offset: distance of the slide's mean from that of the training slides, in units of the
            largest such distance of a training slide, and relative to how widely cells spread.
        shift: median score of the cells above that of left-out cells, in their standard deviation.
    """

    p_value: np.ndarray
    shared: int
    mean_agreement: float
    coexpression: float
    offset: float
    shift: float

    @property
    def share_unlike(self) -> float:
        """Share of cells with a p-value of at most 0.05."""
        known = self.p_value[np.isfinite(self.p_value)]
        return float((known <= 0.05).mean()) if len(known) else 0.0


class Typicality(nn.Module):
    r"""Compares cells with training cells and gives each a p-value.

    Features are centred per slide, scaled by a power of their standard deviation, and projected on
    principal components of the slide and the training cells together. With the mean distances
    :math:`d` of a cell to its k nearest training cells and :math:`d'` to as dense a sample of its
    own slide, its score is

    .. math::
        s = \log d + \lambda\, (\log d - \log d')

    and half the mean score of its neighbours on the slide is averaged with half its own. Training
    cells are divided into folds: donors, or quarters of a slide if there is one donor. The cells of
    a fold are scored as a slide of their own against the cells of the other folds. The p-value of a
    new cell is the share of left-out cells whose score is as high, averaged over folds (CV+, Barber
    et al. 2021). Slides differ in quality, so the median of a slide's scores
    and their spread below it are first brought to those of the left-out cells. Of a median that
    lies more than ``tolerance`` above theirs, the excess stays.

    Args:
        width: number of features that cells are compared in.
        features: number of all features.
        cells, slides: number of training cells and slides that are remembered.
        components: number of principal components.
        neighbors: k.
        contrast: :math:`\lambda`.
        scale_power: power of the standard deviation by which features are divided.
        tolerance: in standard deviations of the scores of left-out cells, taken from below.
    """

    panel: Tensor  # columns of the compared features (p,)
    known: Tensor  # centred features of training cells (m, p)
    fold: Tensor  # of each (m,)
    means: Tensor  # mean of every feature on every slide (S, G)

    def __init__(
        self,
        width: int,
        features: int,
        cells: int = 0,
        slides: int = 0,
        *,
        components: int = 20,
        neighbors: int = 10,
        contrast: float = 2.0,
        scale_power: float = 0.5,
        tolerance: float = 3.0,
    ):
        super().__init__()
        self.components, self.neighbors, self.contrast = components, neighbors, contrast
        self.scale_power, self.tolerance = scale_power, tolerance
        self.register_buffer("panel", torch.zeros(width, dtype=torch.long))
        self.register_buffer("known", torch.zeros(cells, width))
        self.register_buffer("fold", torch.zeros(cells, dtype=torch.long))
        self.register_buffer("means", torch.zeros(slides, features))

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments that describe the shapes of a fitted state."""
        slides, features = self.means.shape
        cells, width = self.known.shape
        return {"width": width, "features": features, "cells": cells, "slides": slides}

    @torch.no_grad()
    def fit(
        self,
        slides: Sequence[Matrix | None],
        folds: Sequence[np.ndarray],
        cells: int = 2000,
        holders: Holders = None,
    ) -> Typicality:
        """Remember means of all slides, and cells of each fold.

        Args:
            slides: features of training slides (n_s, G), the same G features each.
            folds: fold of each cell of each slide (n_s,), counted from 0; two folds at least.
            cells: number of cells that are remembered; folds have equal shares.
            holders: of the slides, where ranks divide them; None stands for those of others.
        """
        rng = np.random.default_rng(0)
        moments = of_each(slides, _moments, holders)
        means, variance = [mean for mean, _ in moments], sum(v for _, v in moments)
        width = len(self.panel)
        # the first of equal features, whatever the platform sorts by
        panel = np.sort(np.argsort(-np.asarray(variance), kind="stable")[:width])
        count = 1 + max(int(fold.max()) for fold in folds)
        members = [sum(bool((fold == f).any()) for fold in folds) for f in range(count)]
        drawn, labels = [], []
        for fold in folds:
            parts = []
            for f in np.unique(fold):
                own = np.flatnonzero(fold == f)
                parts.append(np.sort(rng.permutation(own)[: cells // (count * members[int(f)])]))
                labels.append(np.full(len(parts[-1]), f))
            drawn.append(np.concatenate(parts))
        known = of_each(
            list(zip(slides, drawn, means, strict=True)),
            lambda one: _dense(one[0], one[1], panel) - one[2][panel],
            holders,
        )
        self.panel = torch.from_numpy(panel).to(self.panel)
        self.known = torch.from_numpy(np.concatenate(known)).to(self.known)
        self.fold = torch.from_numpy(np.concatenate(labels)).to(self.fold)
        self.means = torch.from_numpy(np.stack(means)).to(self.means)
        return self

    @torch.no_grad()
    def assess(
        self,
        features: Matrix,
        present: np.ndarray | None = None,
        left_out: np.ndarray | None = None,
    ) -> Assessment:
        """Compare the cells of a slide with the training cells.

        Time and memory are linear in cells.

        Args:
            features: (n, G), those of :meth:`fit`.
            present: which features the slide has (G,); all if left out.
            left_out: cells to pass over (n,), for example those without counts.

        Returns:
            P-values and how the slide agrees with the training slides. Without features or
            cells to compare, agreements are 0 and p-values the smallest that there can be.
        """
        n, total = features.shape
        present = np.ones(total, dtype=bool) if present is None else np.asarray(present, bool)
        taken = np.ones(n, bool) if left_out is None else ~np.asarray(left_out, bool)
        cells = np.flatnonzero(taken)
        columns = np.flatnonzero(present[self.panel.cpu().numpy()])
        p_value, shared = np.full(n, np.nan), int(present.sum())
        if not len(columns) or len(cells) < _LEAST:
            p_value[cells] = 1 / (1 + len(self.known))
            return Assessment(p_value, shared, 0.0, 0.0, 0.0, 0.0)
        own_mean = _moments(features, cells)[0]
        slide = _Cells(features, cells, self.panel.cpu().numpy()[columns], own_mean)
        sample = np.sort(np.random.default_rng(0).permutation(len(cells))[: len(self.known)])
        known = self.known[:, torch.from_numpy(columns).to(self.known.device)]
        folds = [
            _LeftOut(slide, sample, known, self.fold == fold, self)
            for fold in self.fold.unique()
            if (self.fold == fold).sum() >= _LEAST and (self.fold != fold).sum() >= _LEAST
        ]
        own = rows_of(len(cells))
        scores: list[list[Tensor]] = [[] for _ in folds]
        for start in counted(range(own.start, own.stop if folds else own.start, _ROWS)):
            part = slice(start, min(start + _ROWS, own.stop))
            block = slide.rows(part).to(known)
            for one, scored in zip(folds, scores, strict=True):
                scored.append(one.scores(block, part))
        found = [
            one.p_values(all_rows(torch.cat(scored) if scored else known.new_empty(0), len(cells)))
            for one, scored in zip(folds, scores, strict=True)
        ]
        shifts = [one.shift for one in folds]
        if found:
            p_value[cells] = torch.stack(found).mean(0).cpu().numpy()
        mean = self.means.mean(0).cpu().numpy()
        some = slide.rows(_evenly(sample, _SAMPLE)).to(known)
        return Assessment(
            p_value,
            shared,
            _correlation(own_mean[present], mean[present]),
            self._coexpression(some, known),
            self._offset(own_mean, some, known, columns, len(cells)),
            float(np.mean(shifts)) if shifts else 0.0,
        )

    def _coexpression(self, cells: Tensor, known: Tensor) -> float:
        """Agreement of a slide, relative to as many cells of left-out folds with the others.

        Few cells of few counts tell correlations badly, on training slides as well.
        """
        rng, usual = np.random.default_rng(0), []
        for fold in self.fold.unique():
            own, others = known[self.fold == fold], known[self.fold != fold]
            size = min(len(cells), len(own), _SAMPLE)
            for _ in range(1 if size == len(own) else _DRAWS):
                rows = torch.from_numpy(rng.permutation(len(own))[:size]).to(own.device)
                usual.append(coexpression_agreement(own[rows], others))
        expected = float(np.mean(usual))
        if expected < _LEAST_COEXPRESSION:
            return 1.0  # the training slides do not agree either: nothing is known
        return coexpression_agreement(cells, known) / expected

    def _offset(
        self, own_mean: np.ndarray, cells: Tensor, known: Tensor, columns: np.ndarray, count: int
    ) -> float:
        """Of a slide's mean, in units of training slides' offsets, relative to its own spread."""
        taken = self.panel.cpu().numpy()[columns]
        means = self.means.double().cpu().numpy()[:, taken]
        radius = float(known.square().sum(1).mean().clamp(min=_FLOOR).sqrt())
        own = float(cells.square().sum(1).mean().clamp(min=_FLOOR).sqrt())
        far = np.linalg.norm(means - means.mean(0), axis=1).max()
        # the mean of few cells lies off by chance
        gap = np.sqrt(max(np.square(own_mean[taken] - means.mean(0)).sum() - own**2 / count, 0))
        return float(gap / max(far, _LEAST_OFFSET * radius) * min(radius / own, 1e6))


class _LeftOut:
    """Scores cells against all but one fold of training cells, matched to those of that fold.

    Args:
        slide: the cells.
        sample: row numbers of those that stand for the slide.
        known: centred features of training cells (m, p).
        held_out: which of these are the fold (m,).
        settings: of the estimator.

    Attributes:
        shift: how far the median of the slide is above that of the fold.
    """

    def __init__(
        self,
        slide: _Cells,
        sample: np.ndarray,
        known: Tensor,
        held_out: Tensor,
        settings: Typicality,
    ):
        others, fold = known[~held_out], known[held_out]
        # a slide and a fold are treated alike only if as many cells stand for them
        rows = np.random.default_rng(1).permutation(sample)[: len(fold)]
        calibration = _Contrast(others, fold, settings).sample_score
        self.own = _Contrast(others, slide.rows(rows).to(known), settings)
        place = torch.full((len(slide),), -1, dtype=torch.long)
        place[torch.from_numpy(rows)] = torch.arange(len(rows))
        self.place = place.to(known.device)
        low, self.middle = _lower_half(calibration)
        own_low, self.own_middle = _lower_half(self.own.sample_score)
        spread, shift = self.middle - low, self.own_middle - self.middle
        self.ratio = (spread / (self.own_middle - own_low)).clamp(1 / _STRETCH, _STRETCH)
        self.excess = (shift - settings.tolerance * spread).clamp(min=0)
        self.shift, self.calibration = float(shift / spread), calibration.sort().values

    def scores(self, block: Tensor, part: slice) -> Tensor:
        """Scores (b,) of some rows of the slide, whose centred features are given (b, p)."""
        scores = self.own(block, self.place[part])
        return self.middle + self.excess + self.ratio * (scores - self.own_middle)

    def p_values(self, scores: Tensor) -> Tensor:
        """The share of the fold that scores as high (n,), float64."""
        below = torch.searchsorted(self.calibration, scores)  # left: equal scores count as high
        count = len(self.calibration)
        return (1.0 + count - below.double()) / (1.0 + count)


class _Cells:
    """Some cells of a slide and some of its features, read as dense centred rows.

    Args:
        features: (n, G).
        cells: row numbers (m,).
        columns: column numbers (p,).
        mean: of every feature (G,).
    """

    def __init__(self, features: Matrix, cells: np.ndarray, columns: np.ndarray, mean: np.ndarray):
        self.features, self.columns, self.mean = features, columns, mean[columns]
        self.cells = None if len(cells) == features.shape[0] else cells
        self.count = len(cells)

    def __len__(self) -> int:
        return self.count

    def rows(self, index: np.ndarray | slice) -> Tensor:
        """Centred features (k, p) of some of the cells."""
        rows = index if self.cells is None else self.cells[index]
        values = _dense(self.features, rows, self.columns)
        return torch.from_numpy(values - self.mean)


class _Contrast:
    """Scores cells by their distance to training cells and to cells of their own slide.

    Args:
        others: centred features of training cells (m, p).
        sample: centred features of cells of the slide (k, p).
        settings: of the estimator.

    Attributes:
        sample_score: scores of the sample (k,).
    """

    def __init__(self, others: Tensor, sample: Tensor, settings: Typicality):
        spread = others.std(0, correction=0)
        least = 0.1 * spread.square().mean().sqrt().clamp(min=_FLOOR)
        self.weight = spread.maximum(least) ** -settings.scale_power
        both = torch.cat([others, sample]) * self.weight
        self.centre = both.mean(0)
        self.axes = _leading_axes(both - self.centre, settings.components)
        self.contrast = settings.contrast
        self.others, self.sample = self._project(others), self._project(sample)
        self.neighbors = min(settings.neighbors, len(others))
        dense = round(self.neighbors * len(sample) / len(others))
        self.own_neighbors = max(1, min(max(dense, 2), len(sample) - 1))
        self.smoothed = max(1, min(settings.neighbors, len(sample) - 1))
        place = torch.arange(len(sample), device=sample.device)
        self._raw = torch.zeros(len(sample)).to(sample)  # filled by the first pass
        raw, near = self._raw_scores(self.sample, place)
        self._raw = raw
        self.sample_score = self._smooth(raw, near)

    def __call__(self, cells: Tensor, place: Tensor) -> Tensor:
        """Scores (n,) of cells (n, p); ``place`` (n,) is their number in the sample, or -1."""
        return self._smooth(*self._raw_scores(self._project(cells), place))

    def _project(self, cells: Tensor) -> Tensor:
        return (cells * self.weight - self.centre) @ self.axes

    def _smooth(self, raw: Tensor, near: Tensor) -> Tensor:
        return 0.5 * raw + 0.5 * self._raw[near].mean(1)

    def _raw_scores(self, cells: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        scores, neighbors = [], []
        own = max(self.own_neighbors, self.smoothed)
        size = _BLOCK if cells.device.type == "cpu" else 8 * _BLOCK
        for part, at in zip(cells.split(size), place.split(size), strict=True):
            known = torch.cdist(part, self.others).topk(self.neighbors, largest=False).values
            distance = torch.cdist(part, self.sample)
            # no cell is its own neighbour; a mask would make the host wait for the device
            itself = at.clamp(min=0).unsqueeze(1)
            apart = distance.gather(1, itself).masked_fill(at.unsqueeze(1) >= 0, torch.inf)
            distance.scatter_(1, itself, apart)
            near = distance.topk(own, largest=False)
            log_known = known.mean(1).clamp(min=_FLOOR).log()
            log_own = near.values[:, : self.own_neighbors].mean(1).clamp(min=_FLOOR).log()
            scores.append(log_known + self.contrast * (log_known - log_own))
            neighbors.append(near.indices[:, : self.smoothed])
        return torch.cat(scores), torch.cat(neighbors)


def coexpression_agreement(cells: Tensor, known: Tensor) -> float:
    """Correlation of the features' correlations on a slide with those of the training cells.

    The features are those that vary together most on training cells. Of each, the mean correlation
    with the others is taken off, which total counts make.

    Args:
        cells: features of a slide (n, p).
        known: features of training cells (m, p).

    Returns:
        -1 to 1; 0 where nothing varies.
    """
    expected = _correlations(known)
    top = expected.square().sum(0).argsort(descending=True, stable=True)[:_COEXPRESSION]
    upper = torch.triu_indices(len(top), len(top), 1, device=known.device)
    pairs = [
        own[upper[0], upper[1]].double().cpu().numpy()
        for own in (_correlations(cells[:, top], False), _correlations(known[:, top], False))
    ]
    return _correlation(*pairs)


def _correlations(x: Tensor, balanced: bool = True) -> Tensor:
    """Correlations (p, p) of the columns; balanced, without row and column means."""
    x = x - x.mean(0)
    x = x / x.square().sum(0).sqrt().clamp(min=_FLOOR)
    found = x.T @ x
    if balanced:
        found = found - found.mean(0) - found.mean(1, keepdim=True) + found.mean()
    return found


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if not len(a):
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt(np.square(a).sum() * np.square(b).sum())
    return float(a @ b / norm) if norm > _FLOOR else 0.0


def _leading_axes(x: Tensor, count: int) -> Tensor:
    """Leading principal axes (p, count) of centred rows (n, p), by subspace iteration."""
    generator = torch.Generator().manual_seed(0)
    width = min(count + 8, *x.shape)
    basis = torch.randn(x.size(1), width, generator=generator, dtype=torch.float64).to(x)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(x.T @ (x @ basis)).Q
    small = x @ basis
    axes = torch.linalg.eigh(small.T @ small).eigenvectors.flip(1)
    return basis @ axes[:, : min(count, width)]


def _evenly(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of some rows, from the first to the last: files may be sorted."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


def _lower_half(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Quantile 0.16 and median: cells unlike the rest, which score high, hardly move them."""
    low, middle = scores.quantile(scores.new_tensor([0.16, 0.5]))
    return low.minimum(middle - _FLOOR), middle


def _moments(x: Matrix, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (G,) of columns over some rows, float64, in blocks of rows."""
    rows = np.arange(x.shape[0]) if rows is None else rows
    total, square = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for start in range(0, len(rows), _ROWS):
        block = x[rows[start : start + _ROWS]]
        if isinstance(block, np.ndarray):
            total += block.sum(0, dtype=np.float64)
            square += np.square(block, dtype=np.float64).sum(0)
            continue
        values = block.data.astype(np.float64)
        total += np.bincount(block.indices, values, len(total))
        square += np.bincount(block.indices, values**2, len(total))
    count = max(len(rows), 1)
    return total / count, square / count - np.square(total / count)


def _dense(x: Matrix, rows: np.ndarray | slice, columns: np.ndarray) -> np.ndarray:
    if isinstance(x, np.ndarray):
        return np.asarray(x[rows][:, columns], dtype=np.float32)
    return np.asarray(x[rows][:, columns].toarray(), dtype=np.float32)
