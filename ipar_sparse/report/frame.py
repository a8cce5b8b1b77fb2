"""The cells in the frame of a reference, over its outline and beside what was measured there."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import pl
from ..data.input_profile import informative
from ..data.keys import Keys
from ..data.slide import Slide
from ..inference.placing import Additions
from ..inference.predictor import Predictor
from ..inference.reference import Reference
from .carried import carried
from .cells import CellTable, cell_table
from .html import draw_figure
from .sections import section

_GENES = 4  # shown beside each other, and those that were asked for
_OUTLINE: dict[str, Any] = {"color": "#D9D9D9", "s": 6, "linewidths": 0, "zorder": 0}


def frame_section(
    predictor: Predictor, slide: Slide, added: Additions, reference: Reference, table: CellTable
) -> dict[str, Any]:
    """Cells in the frame of a reference, in the form of a section of a page.

    Args:
        predictor: the trained run.
        slide: n cells, all with a place on the map.
        added: what :func:`~ipar_sparse.inference.placing.place_cells` found, with the reference.
        reference: its spots are shown where its slide is known.
        table: of the same cells; its first genes are shown, where the reference has them.

    Returns:
        Title, text and figures.
    """
    pos = added.obsm[Keys.REFERENCE][slide.rows]
    shown = np.isfinite(pos).all(axis=1)
    said, figures = added.uns["reference"], []
    text = (
        f"{int(shown.sum()):,} of {len(pos):,} cells in the coordinates and units of "
        f"{reference.name}. Half of the cells of {reference.name}, {said['left_out']}, lie within "
        f"{said['median_error']:.4g} of their places ({said['relative_error']:.2f} of its radius). "
    )
    if added.uns.get("adapted"):
        text += "Cells of another assay lie farther off; the map of uncertainty says how far. "
    if len(pos) > shown.sum():
        text += "The others do not belong to the tissue. "
    spots, genes = None, []
    if reference.slide is not None:
        spots = informative(predictor.conform(reference.slide))
        held = {str(gene) for gene in spots.genes} if spots.expression is not None else set()
        wanted = max(_GENES, table.asked)
        genes = [str(gene) for gene in table.genes if str(gene) in held][:wanted]
        text += (
            "Grey is the outline of the reference. Each gene is shown as measured there, left, and "
            "on the cells, right: patterns that you know should come out alike. "
        )
        if found := carried(predictor, slide, pos, shown, spots):
            text += found.sentence()
    else:
        text += "Give the file of the reference to see it beside the cells."
    if not shown.any():
        return section(f"On {reference.name}", text, [])
    size = (10.0, _height(pos[shown] if spots is None else spots.pos))
    trust = _trust(added, slide, shown)

    def draw_trust(figure: Figure) -> None:
        axes = figure.subplots(1, 2)
        for ax, (label, values) in zip(axes, trust.items(), strict=False):
            _draw(ax, pos[shown], values, spots, label.capitalize(), label)
        for ax in axes[len(trust) :]:
            ax.set_axis_off()

    name = ", ".join(trust)
    figures.append(
        draw_figure("frame", size, draw_trust, f"Cells in the frame, coloured by {name}")
    )
    if genes:
        measured = cell_table(spots, spots.pos, genes, genes)
    for gene in genes:

        def draw(figure: Figure, gene: str = gene) -> None:
            left, right = figure.subplots(1, 2)
            _draw(left, spots.pos, measured.gene(gene), None, f"{gene}, {reference.name}", gene)
            _draw(right, pos[shown], table.gene(gene)[shown], spots, f"{gene}, cells", gene)

        alt = f"Expression of {gene} on the reference and on the cells in its frame"
        figures.append(draw_figure(f"frame_{len(figures)}", size, draw, alt))
    return section(f"On {reference.name}", text, figures)


def _trust(added: Additions, slide: Slide, shown: np.ndarray) -> dict[str, np.ndarray]:
    """What says how much to believe a place, by label."""
    labels = {Keys.UNCERTAINTY_REFERENCE: "uncertainty", Keys.TYPICALITY: "typicality"}
    return {
        label: np.asarray(added.obs[key])[slide.rows][shown]
        for key, label in labels.items()
        if key in added.obs
    }


def _draw(
    ax: Axes, pos: np.ndarray, values: np.ndarray, outline: Slide | None, title: str, label: str
) -> None:
    pl.layout(pos, values, ax=ax, title=title, label=label)
    if outline is not None:
        ax.scatter(*outline.pos.T, **_OUTLINE)
        ax.autoscale()


def _height(pos: np.ndarray) -> float:
    """Of two panels side by side that fit the tissue."""
    extent = np.ptp(pos, axis=0)
    return 4.6 * float(np.clip(extent[1] / max(extent[0], 1e-12), 0.5, 1.5)) + 0.35
