"""Whether a slide is like the training slides, in a word that all who show a map share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from ..config import TypicalityConfig
from ..data.expression import normalized_expression
from ..data.slide import Slide
from ..errors import UserError
from ..estimators.typicality import Assessment, Typicality

logger = logging.getLogger(__name__)

LIKE = "like the training slides"
PART = "unlike in part"
UNLIKE = "unlike"
"""The verdicts."""

LEAST_CELLS = 15
"""Cells that a layout needs: with fewer, no cell has the neighbours that place it."""


@dataclass(frozen=True)
class SlideTypicality:
    """How like the training slides one slide is.

    Args:
        verdict: :data:`LIKE`, :data:`PART` or :data:`UNLIKE`.
        reasons: what speaks against the slide, in words; empty if nothing does.
        p_value: of each cell (n,), small = unlike; NaN for cells without counts.
        measures: number by name, for ``uns`` and tables.
    """

    verdict: str
    reasons: tuple[str, ...]
    p_value: np.ndarray
    measures: dict[str, float]

    def sentence(self, name: str = "This slide") -> str:
        """The verdict in words.

        Args:
            name: of the slide.
        """
        if self.verdict == LIKE:
            return f"{name} is like the training slides"
        why = "; ".join(self.reasons)
        if self.verdict == PART:
            return f"{name} is unlike the training slides in part: {why}"
        return (
            f"{name} is unlike the training slides: {why}; do not rely on its map, whose stated "
            "error is that of a map without information"
        )

    def tell(self, name: str) -> None:
        """Logs what speaks against a slide: a warning where it is unlike the training slides."""
        if self.verdict != LIKE:
            level = logging.WARNING if self.verdict == UNLIKE else logging.INFO
            logger.log(level, "%s", self.sentence(name))


def check_size(slide: Slide) -> None:
    """Refuses a slide that is too small for a layout.

    Raises:
        UserError: it has fewer than 15 cells with counts.
    """
    count = int((~np.asarray(slide.empty)).sum())
    if count < LEAST_CELLS:
        raise UserError(
            f"{slide.name}: {count} cells with counts have no layout of their own, since a cell is "
            f"placed by its neighbours; give {LEAST_CELLS} or more of one slide together"
        )


def features_of(
    slide: Slide, genes: Sequence[str] | None, target_sum: float
) -> sparse.csr_matrix | np.ndarray:
    """What cells are compared in: log-normalised genes, or the embedding that the user brought.

    Args:
        slide: n cells.
        genes: G genes of the run; None where embeddings are brought along.
        target_sum: total that counts are scaled to.

    Returns:
        (n, G), or (n, d).
    """
    if genes is None:
        if slide.embedding is None:
            raise UserError(f"{slide.name}: this run uses an embedding; give --embedding obsm:KEY")
        return slide.embedding
    return normalized_expression(slide, genes, target_sum)


def compare(
    typicality: Typicality,
    slide: Slide,
    genes: Sequence[str] | None,
    target_sum: float,
    settings: TypicalityConfig,
) -> SlideTypicality:
    """Compare a slide with the training slides of a run.

    Args:
        typicality: fitted on them.
        slide: n cells.
        genes: of the run; None where embeddings are brought along.
        target_sum: total that counts are scaled to.
        settings: what the verdict follows from.
    """
    present = None if genes is None else np.isin(genes, np.asarray(slide.genes, dtype=str))
    features = features_of(slide, genes, target_sum)
    found = typicality.assess(features, present, slide.empty)
    measures = {
        "cells_unlike": found.share_unlike,
        "shift": found.shift,
        "offset": found.offset,
    }
    if genes is not None:
        measures["shared_genes"] = float(found.shared)
        measures["mean_agreement"] = found.mean_agreement
        measures["coexpression_agreement"] = found.coexpression
    unlike = tuple(_reasons(found, settings, genes is not None, unlike=True))
    if unlike:
        p_value = found.p_value * settings.unlike_p_value
        return SlideTypicality(UNLIKE, unlike, p_value, measures)
    part = tuple(_reasons(found, settings, genes is not None, unlike=False))
    return SlideTypicality(PART if part else LIKE, part, found.p_value, measures)


def _reasons(found: Assessment, settings: TypicalityConfig, of_genes: bool, unlike: bool):
    """What speaks for a verdict, in words."""
    if of_genes:
        means = settings.unlike_means if unlike else settings.part_means
        together = settings.unlike_coexpression if unlike else settings.part_coexpression
        if unlike and found.shared < settings.min_genes:
            yield f"it shares {found.shared} genes with the run"
        elif found.mean_agreement < means:
            yield f"the means of its genes correlate by {found.mean_agreement:.2f} with theirs"
        elif found.coexpression < together:
            yield (
                "its genes vary together otherwise than theirs (agreement "
                f"{found.coexpression:.2f}, 1 is usual)"
            )
    elif found.offset > settings.unlike_offset and unlike:
        yield f"its embedding lies {found.offset:.1f} times as far off as training slides do"
    if not unlike and found.offset > settings.part_offset:
        yield f"its mean lies {found.offset:.1f} times as far off as that of any training slide"
    if not unlike and found.share_unlike > settings.part_cells:
        yield f"{100 * found.share_unlike:.0f} % of its cells are unlike the training cells"
