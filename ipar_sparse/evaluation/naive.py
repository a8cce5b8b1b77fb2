"""Matches of expression onto one training slide, which any program has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import normalize

from ..data.expression import normalized_expression
from ..data.slide import Slide

NEIGHBORS = 20


def most_alike(slide: np.ndarray, places: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Mean place (n, 2) of the 20 cells of a slide that are most alike by cosine.

    Args:
        slide: log-normalised expression of the slide (m, G).
        places: positions of its cells (m, 2).
        cells: log-normalised expression of the cells to place (n, G).
    """
    return _neighbors(normalize(slide), places, normalize(cells))


def pca_neighbors(slide: np.ndarray, places: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Mean place (n, 2) of the 20 nearest cells in 20 principal components of the slide.

    Args:
        slide, places, cells: as in :func:`most_alike`.
    """
    pca = PCA(min(20, *slide.shape), random_state=0).fit(slide)
    return _neighbors(pca.transform(slide), places, pca.transform(cells))


def ridge(slide: np.ndarray, places: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Ridge regression (n, 2) from standardised expression, penalty of one a gene.

    Args:
        slide, places, cells: as in :func:`most_alike`.
    """
    mean, scale = slide.mean(0), slide.std(0) + 1e-6
    model = Ridge(alpha=float(slide.shape[1])).fit((slide - mean) / scale, places)
    return model.predict((cells - mean) / scale)


NAIVE = {
    "20 most alike": most_alike,
    "20-NN in PCA-20": pca_neighbors,
    "ridge of expression": ridge,
}


def naive_layouts(
    cells: Slide, slides: Sequence[Slide], genes: Sequence[str], target_sum: float
) -> dict[str, np.ndarray]:
    """Every naive match, onto the slide whose mean expression correlates most with the cells'.

    Args:
        cells: n cells to place.
        slides: training slides.
        genes: by which cells are compared.
        target_sum: total that counts are scaled to.

    Returns:
        Name to positions (n, 2), in the coordinates of that slide.
    """
    one, *others = (
        np.asarray(normalized_expression(slide, genes, target_sum).toarray())
        for slide in (cells, *slides)
    )
    chosen = closest([x.mean(axis=0) for x in others], one.mean(axis=0))
    places = np.asarray(slides[chosen].pos)
    return {name: match(others[chosen], places, one) for name, match in NAIVE.items()}


def closest(means: Sequence[np.ndarray], mean: np.ndarray) -> int:
    """Which of the slides with these mean expressions (G,) correlates most with another."""
    found = [np.corrcoef(own, mean)[0, 1] for own in means]
    return int(np.nanargmax(found)) if np.isfinite(found).any() else 0


def log_normalized(counts: sparse.csr_matrix) -> np.ndarray:
    """log1p of expression scaled to the median total of these cells (n, G), dense float32.

    With a larger total, which genes a cell holds counts for more than how much: of cells of few
    counts a naive match then finds less.
    """
    total = np.asarray(counts.sum(axis=1)).ravel()
    usual = float(np.median(total[total > 0])) if (total > 0).any() else 1.0
    scale = sparse.diags_array(usual / np.maximum(total, 1e-12))
    return np.asarray((scale @ counts).log1p().toarray(), dtype=np.float32)


def _neighbors(slide: np.ndarray, places: np.ndarray, cells: np.ndarray) -> np.ndarray:
    model = KNeighborsRegressor(min(NEIGHBORS, len(slide)))
    return model.fit(slide, places).predict(cells)
