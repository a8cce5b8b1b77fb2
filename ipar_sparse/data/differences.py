"""How a slide differs from the training slides in what cannot be undone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .anndata_store import some_names
from .expression import average_ranks, cell_totals, mean_and_variance
from .gene_names import FEW_GENES
from .held import of_slides
from .notes import Warned
from .on_disk import smallest_value
from .slide import Slide

_CELLS = 5000  # cells by which genes are compared
_LEVEL = 2.0  # expression so many times higher or lower is on another scale
_AGREEMENT = 0.3  # rank correlation of mean expression; shuffled names give 0
_HELD = 20.0  # cells of a slide that should hold a gene; by chance, none of them does so never
_SILENT = 0.05  # of the genes; a few are silent in some donors
_KNOWN = 0.1  # relative error of a mean that is known well enough
_SPREAD = 0.2  # of the logarithm of mean expression between slides; less tells nothing
_SCATTER = -0.7  # correlation of changes of mean and of scatter; real slides have -0.75 or less
_TOTALS = 10.0  # counts a cell, on one training slide over those of another
GIVE_COUNTS = "give counts, or cells may be placed wrongly"
"""What most warnings end with."""


def compare_training(
    slides: Sequence[Slide], genes: Sequence[str], total: float
) -> list[list[str]]:
    """Warnings for each training slide that is not as the others.

    Of two slides, the second is told of.

    Args:
        slides: with all the genes that they share.
        genes: these.
        total: that counts are scaled to.
    """
    moments = of_slides(slides, lambda slide: _moments(slide, genes, total))
    depth = of_slides(slides, lambda s: None if s.normalized else float(np.median(cell_totals(s))))
    told: list[list[str]] = []
    for i, slide in enumerate(slides):
        said: list[str] = []
        others = [moments[j] for j in range(len(slides)) if j != i]
        if i or len(slides) > 2:
            known = np.mean([mean for mean, _ in others], axis=0)
            was = np.mean([variance for _, variance in others], axis=0)
            said = _unlike_genes(moments[i][0], known, "other ")
            said += _unlike_scatter(slide, *moments[i], known, was, "other ")
        least = min((d for d in depth if d), default=None)
        if least and depth[i] and depth[i] > _TOTALS * least:
            said.append(
                Warned(
                    f"cells hold {depth[i]:,.5g} counts, {depth[i] / least:,.3g} times those of "
                    "another training slide: if they were multiplied or scaled, give counts"
                )
            )
        told.append(said)
    return told


def differences(
    slide: Slide,
    genes: Sequence[str],
    known: np.ndarray,
    was: np.ndarray,
    total: float,
    missing: bool,
) -> list[str]:
    """Warnings of a slide that is to be placed.

    Args:
        slide: in the terms of the run.
        genes: of the run that it has (G,).
        known, was: mean and variance of these on the training slides (G,).
        total: that counts are scaled to.
        missing: whether it lacks genes of the run.
    """
    if smallest_value(slide.expression) < 0:
        return []
    own, variance = _moments(slide, genes, total)
    said = _silent_genes(slide, genes, own, known, was)
    said += _unlike_scatter(slide, own, variance, known, was)
    level = own.mean() / max(known.mean(), 1e-12)
    if not 1 / _LEVEL < level < _LEVEL:
        plain = slide.values is None or str(slide.values) == "counts"
        if plain and level < 1:
            why = "since its cells hold fewer counts of these genes: they are placed less well"
        elif plain and missing:
            why = "since cells are scaled over fewer genes: they may be placed wrongly"
        else:
            why = "so it may have been scaled otherwise and cells be placed wrongly: give counts"
        said.append(Warned(f"expression is {level:.2g} times that of the training slides, {why}"))
    return said + _unlike_genes(own, known)


def _silent_genes(
    slide: Slide, genes: Sequence[str], own: np.ndarray, known: np.ndarray, was: np.ndarray
) -> list[str]:
    """A warning of genes (G,) that hold nothing, though training slides express them."""
    # at least this share of training cells holds the gene (Paley and Zygmund)
    held = np.square(known) / np.maximum(np.square(known) + was, 1e-12)
    silent = np.flatnonzero((own == 0) & (held * _count(slide) > _HELD))
    if len(silent) <= _SILENT * len(genes):
        return []
    named = some_names([genes[i] for i in silent.tolist()])
    return [
        Warned(
            f"{len(silent)} genes that training slides express hold nothing here ({named}): leave "
            "them out if they were not measured; fewer genes place cells less well"
        )
    ]


def _unlike_scatter(
    slide: Slide,
    own: np.ndarray,
    variance: np.ndarray,
    known: np.ndarray,
    was: np.ndarray,
    whose: str = "",
) -> list[str]:
    """A warning where genes vary for their mean (G,) as they do on no other slide.

    A gene that is expressed more is counted with less relative scatter, whatever the tissue, but
    not one that was multiplied.
    """
    seen = (own > 1e-3) & (known > 1e-3) & (variance > 0) & (was > 0)  # no division by 0
    seen &= np.sqrt(variance / max(_count(slide), 1)) < _KNOWN * own
    if seen.sum() < FEW_GENES:
        return []
    more = np.log(own[seen] / known[seen])
    relative = np.log(variance[seen] / was[seen]) - 2 * more
    if np.std(more) < _SPREAD or np.ptp(relative) == 0:
        return []
    if np.corrcoef(more, relative)[0, 1] <= _SCATTER:
        return []
    return [
        Warned(
            f"genes vary otherwise than on the {whose}training slides, as if each had been scaled "
            "(to its length, maximum or variance), or values were ranks, yes and no, or logarithms "
            f"of logarithms: {GIVE_COUNTS}"
        )
    ]


def _count(slide: Slide) -> int:
    """Number of cells that are looked at."""
    return min(_CELLS, int((~slide.empty).sum()))


def _moments(slide: Slide, genes: Sequence[str], total: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (G,) of evenly spaced cells that are not empty."""
    cells = np.flatnonzero(~slide.empty)
    if len(cells) > _CELLS:
        cells = cells[np.linspace(0, len(cells) - 1, _CELLS).astype(np.int64)]
    return mean_and_variance(slide.take(cells), genes, total)


def _unlike_genes(own: np.ndarray, known: np.ndarray, whose: str = "") -> list[str]:
    """A warning where mean expression (G,) is not ranked as on the training slides."""
    if len(own) < FEW_GENES or np.ptp(own) == 0 or np.ptp(known) == 0:
        return []
    agreement = float(np.corrcoef(average_ranks(own), average_ranks(known))[0, 1])
    if agreement >= _AGREEMENT:
        return []
    advice = "leave it out, or mend them" if whose else "do not trust the places"
    return [
        Warned(
            f"genes are not expressed as on the {whose}training slides (rank correlation of their "
            f"means {agreement:.2f}): another tissue, or gene names in another order; {advice}"
        )
    ]
