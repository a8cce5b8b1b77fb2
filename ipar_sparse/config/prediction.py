"""Settings of what follows the recycles: refinement, uncertainty and scores."""

from .types import Positive, Section, Share, Steps, Weight


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


class UncertaintyConfig(Section):
    """The error model: root-mean-square error in tissue radii, sqrt(intercept + slope * variance).

    The variance is the predictive variance of a cell's position.
    """

    error_intercept: Weight | None = None
    """Squared error of a cell with predictive variance 0, in squared tissue radii; none = fitted by
    cross-validation."""
    error_slope: Weight | None = None
    """Squared error per unit of predictive variance; none = fitted by cross-validation."""
    calibrated: bool | None = None
    """Whether the error model was fitted on held-out donors of the training slides. The run sets
    it."""
    noise_share: Share = 0.15
    """Share of the squared error that follows how far training noise moves a cell, between 0 and
    1."""


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
