"""What the evaluation of a slide holds, and the names of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..metrics.diagnostics import AttentionFocus

if TYPE_CHECKING:
    import pandas as pd

MODEL = "model"
NO_GATE = "without gate"
NO_CORRECTION = "without distance correction"
NO_REFINEMENT = "without refinement"
INITIAL = "initial layout"
NO_RECYCLES = "without recycles"
ABLATIONS = (NO_GATE, NO_CORRECTION, NO_REFINEMENT, INITIAL, NO_RECYCLES)
"""Forms of the model that lack one of its parts."""

ORACLE = "true neighbours"
"""The model on the true spatial neighbours, which no user has: how good its attention could be."""

FLOOR = "true coordinates"
"""What the measured positions score against themselves."""

RANDOM = "random"
"""Normally distributed places, which know nothing of the tissue."""

E_GEO_SUFFIX = {MODEL: "hgate", ORACLE: "tedge", FLOOR: "floor"}
"""Methods whose E_geo is also a flat metric, as ``E_geo_hgate``."""


def role_of(method: str) -> str:
    """``"model"``, ``"ablation"``, ``"oracle"``, ``"floor"`` or else ``"baseline"``."""
    fixed = {
        MODEL: "model",
        ORACLE: "oracle",
        FLOOR: "floor",
        **dict.fromkeys(ABLATIONS, "ablation"),
    }
    return fixed.get(method, "baseline")


@dataclass
class Provenance:
    """Where an evaluation comes from, and what its reader must know.

    Args:
        training: names of the slides that the model was trained on.
        validation: names of the slides of early stopping.
        held_out: whether this slide took no part in either; None if that is not known.
        settings: the run's configuration, flat or nested.
        versions: software name to version.
        cautions: lines that must be read before the map is relied on.
        notes: lines on how the input was read and on rows of the table.
    """

    training: Sequence[str] = ()
    validation: Sequence[str] = ()
    held_out: bool | None = None
    settings: Mapping = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    cautions: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass
class SlideEvaluation:
    """A predicted slide and its scores; a report leaves out what is None.

    Args:
        slide: name of the slide.
        pred: predicted positions (n, 2), any gauge.
        true: measured positions (n, 2); without them nothing is scored.
        methods: metrics of each method by flat name, in the order of the table: the model, its
            ablations, the oracle, baselines, true coordinates (:func:`role_of`).
        measures: further flat measures of the model on this slide: ``E_geo_hgate``,
            ``candidate_recall@15``, and those of :func:`ipar_sparse.metrics.diagnostics.diagnose`.
        focus: where some cells attend.
        trajectory: layouts (n, 2) before the first recycle and after each.
        uncertainty: predicted error of each cell (n,), root mean square, in tissue radii.
        typicality: p-value of each cell (n,), small = unlike the training cells.
        verdict: a sentence on how like the training slides this slide is.
        layouts: of each method (n, 2), as scored.
        cells: their names (n,).
        provenance: where all this comes from.
    """

    slide: str
    pred: np.ndarray
    true: np.ndarray | None = None
    methods: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)
    focus: Sequence[AttentionFocus] | None = None
    trajectory: Sequence[np.ndarray] | None = None
    uncertainty: np.ndarray | None = None
    typicality: np.ndarray | None = None
    verdict: str | None = None
    layouts: Mapping[str, np.ndarray] = field(default_factory=dict)
    cells: np.ndarray | None = None
    provenance: Provenance = field(default_factory=Provenance)


def flat_metrics(evaluation: SlideEvaluation) -> dict[str, float]:
    """All numbers of an evaluation: the model's by their names, others as ``method/metric``."""
    methods = evaluation.methods
    others = {
        f"{method}/{name}": value
        for method, values in methods.items()
        if method != MODEL
        for name, value in values.items()
    }
    return {**methods.get(MODEL, {}), **evaluation.measures, **others}


def score_table(evaluation: SlideEvaluation, k: int) -> pd.DataFrame:
    """Main scores of the model, baselines and measured positions, one row each.

    Args:
        evaluation: of a slide.
        k: size of the neighbourhoods whose hits are shown.
    """
    import pandas as pd

    columns = ["distance_spearman", f"neighbor_hit@{k}", "procrustes", "E_geo"]
    shown = {
        method: values
        for method, values in evaluation.methods.items()
        if role_of(method) in ("model", "baseline", "floor")
    }
    table = pd.DataFrame.from_dict(shown, orient="index").rename_axis("method")
    return table[[name for name in columns if name in table]]
