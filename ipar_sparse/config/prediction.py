"""Settings of what follows the recycles: refinement, uncertainty and scores."""

from typing import Literal

from .types import Inside, Positive, Rate, Section, Share, Steps, Weight


class RefineConfig(Section):
    """What moves the layout after the recycles: distance correction, then refinement."""

    distance_correction_steps: Steps | None = None
    """Optimiser steps that correct distances for the uncertainty of each cell's position; 0 = off;
    none = 200 or 0, selected by cross-validation."""
    steps: Steps | None = None
    """Optimiser steps that draw nearest candidates together; 0 = off; none = 400 or 0, selected by
    cross-validation. It gains neighbours and may cost distances."""
    neighbors: Positive = 15
    """Number of nearest candidates that attract a cell in refinement."""
    anchor_weight: Weight | None = None
    """Weight that holds cells to the layout of the recycles in refinement; none = selected by
    cross-validation. Raise it to keep distances."""
    rca_power: Weight | None = None
    """Power of the relevant component analysis before nearest candidates are sought: 0 = off, 1 =
    full; none = selected by cross-validation."""
    pc_power: Weight = 0.0
    """In the same search, principal components are weighted by their standard deviation to this
    power; 0 = all alike."""
    skip_if_overlap: Weight = 0.5
    """Refinement is left out where this fraction of nearest candidates are neighbours in the layout
    already."""


class AdapterConfig(Section):
    """Cells of another assay: placed by the training cells whose expression is most like theirs."""

    mode: Literal["auto", "always", "never"] = "auto"
    """When the adapter takes part: where the run was trained for the cells, or they hold far more
    or fewer genes than training cells (auto); always; or never."""
    temperature: Rate = 0.2
    """Temperature of the posterior over training cells. Lower it to trust the most similar ones
    more."""
    anchor_weight: Weight = 15.0
    """Weight that holds the cells that it places in refinement, in place of
    ``refine.anchor_weight``. Lower it for more neighbours and worse distances."""
    detection_ratio: Rate = 1.5
    """The adapter is used where cells hold so many times more or fewer genes than the cells of any
    training slide."""


class UncertaintyConfig(Section):
    """The error model: squared error = intercept + slide slope * mean variance + slope * variance.

    The variance is the predictive variance of a cell's position, its mean is that of the slide.
    """

    error_intercept: Weight | None = None
    """Squared error of a cell without predictive variance, in squared tissue radii; none = fitted
    by cross-validation."""
    error_slide_slope: Weight | None = None
    """Squared error per unit of the slide's mean predictive variance; none = fitted by
    cross-validation."""
    error_slope: Weight | None = None
    """Squared error per unit of predictive variance; none = fitted by cross-validation."""
    calibrated: bool | None = None
    """Whether the error model was fitted on held-out donors of the training slides. The run sets
    it."""
    prior_exponent: Rate = 1.8
    """Exponent k of the mean square error that a slide of mean predictive variance v is known to
    have, 1 - (1 - v)^k; measured on public slides."""
    prior_weight: Share = 0.75
    """How much the mean square error of a slide follows that law. With 0 the error model counts
    alone; 1 is used where it is not fitted."""
    disc_radius: Rate | None = None
    """Radius, in units of a cell's uncertainty, of the disc around its position in which it lies
    with probability 0.8; none = fitted by cross-validation."""
    noise_share: Share = 0.15
    """Share of the squared error that follows how far training noise moves a cell, between 0 and
    1."""


class TypicalityConfig(Section):
    """How cells are compared with the training cells, and when a slide is called unlike them.

    The verdict follows from the number of shared genes, and from correlations with the training
    slides: of gene means, and of gene-gene correlations (coexpression).
    """

    genes: Positive = 1000
    """Number of genes that cells are compared in, the most variable ones. Lower it for smaller
    runs."""
    cells: Positive = 2000
    """Number of training cells that a run remembers to compare new ones with. Lower it for smaller
    runs."""
    components: Positive = 20
    """Number of principal components that cells are compared in."""
    neighbors: Positive = 10
    """Number of nearest cells that a cell is compared with."""
    contrast: Weight = 2.0
    """Weight of how much farther a cell is from training cells than from cells of its own slide.
    Lower it where foreign cells come one by one."""
    tolerance: Weight = 3.0
    """How far the scores of a whole slide may lie above those of left-out slides and count as
    batch effect, in standard deviations."""
    min_genes: Positive = 20
    """Genes that a slide must share with the run; with fewer it is unlike."""
    unlike_means: Share = 0.35
    """Correlation of gene means below which a slide is unlike the training slides."""
    unlike_coexpression: Share = 0.4
    """Correlation of gene-gene correlations, relative to that among training slides, below which a
    slide is unlike them."""
    unlike_offset: Weight = 3.6
    """For runs on a given embedding: offset of a slide, relative to that of training slides, above
    which it is unlike them."""
    part_means: Share = 0.7
    """Correlation of gene means below which a slide is unlike in part."""
    part_coexpression: Share = 0.65
    """The same correlation, below which a slide is unlike in part."""
    part_offset: Weight = 2.0
    """Offset above which a slide is unlike in part: so many times as far as any training slide."""
    part_cells: Share = 0.2
    """Share of cells with a p-value of at most 0.05 above which a slide is unlike in part."""
    unlike_p_value: Share = 0.01
    """Factor by which p-values are multiplied on a slide that is unlike the training slides."""
    foreign_p_value: Share = 0.05
    """P-value up to which a cell does not belong to the tissue, and has no position in the frame of
    a reference slide. It is the share of own cells that are left out by mistake."""
    growth_below: Inside = 0.05
    """P-value below which uncertainty grows as the p-value falls; at 0 it is that of a map without
    information."""


class EvalConfig(Section):
    """How a prediction is scored."""

    ks: tuple[Positive, ...] = (10, 15)
    """Neighbourhood sizes of the neighbour metrics, in cells."""
    sample_pairs: Positive = 200_000
    """Pairs of cells that the distance metrics sample on a large slide. More take longer and vary
    less."""
    sample_rows: Positive = 2_000
    """Cells that the neighbour metrics sample on a large slide."""
    baselines: bool = True
    """Whether baselines are scored beside the model. Switch it off to save time."""
    noise_samples: Positive = 1
    """Number of predictions under training noise. More than one adds how far cells move to their
    uncertainty."""
