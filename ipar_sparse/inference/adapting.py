"""Which cells the adapter of a run places, and in what terms it takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import sparse

from ..config.prediction import AdapterConfig
from ..data.copies import MOST, identified, overlap
from ..data.expression import normalized_expression
from ..data.input_profile import InputProfile
from ..data.slide import Slide
from ..data.values import Values, inverted
from ..estimators.adapter import Adapter


def shares_of(
    slide: Slide, genes: Sequence[str], profile: InputProfile
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """What each cell holds of each gene, up to a factor for each cell; no logarithms.

    Args:
        slide: n cells in the terms of a run.
        genes: G genes of the run.
        profile: of its input, whose values are not "as given".

    Returns:
        (n, G), and which of the genes the slide has (G,).
    """
    # a slide that is called normalised is taken as it is
    matrix = normalized_expression(replace(slide, normalized=True), genes)
    if slide.normalized:
        matrix = inverted(matrix, Values(profile.transform))
    return matrix, np.isin(np.asarray(genes, dtype=str), slide.genes.astype(str))


def why_adapted(
    adapter: Adapter,
    slide: Slide,
    shares: tuple[sparse.csr_matrix, np.ndarray],
    cells: Iterable[Mapping[str, Any]],
    settings: AdapterConfig,
) -> str | None:
    """Why the adapter is to place these cells, in words; None if it is not to.

    Args:
        adapter: of the run.
        slide: the cells.
        shares: of :func:`shares_of`.
        cells: what the run recorded of cells that it was trained for.
        settings: when it is used.
    """
    if settings.mode == "never":
        return None
    known = identified(slide).signatures
    if any(overlap(one.get("sketch", ()), known) >= MOST for one in cells):
        return "the run was trained for these cells"
    ratio, limit = adapter.other_detection(*shares), settings.detection_ratio
    if ratio > limit or ratio < 1 / limit:
        return f"a cell holds {ratio:.2g} times as many genes as a training cell"
    return "adapter.mode=always" if settings.mode == "always" else None
