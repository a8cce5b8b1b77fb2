"""How every metric is to be read: its label, which direction is better, and one sentence."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class MetricInfo:
    """How a metric is to be read.

    Args:
        label: for tables and axes.
        explanation: one sentence for a reader who knows tissues, not metrics.
        better: ``"higher"``, ``"lower"`` or ``""`` where neither is better in itself.
        perfect: the value of a perfect map; None where it depends on the slide.
    """

    label: str
    explanation: str
    better: str = ""
    perfect: float | None = None


METRICS: dict[str, MetricInfo] = {
    "distance_spearman": MetricInfo(
        "Distance correlation (Spearman)",
        "Do pairs of cells that are far apart in the tissue lie far apart on the map?",
        "higher",
        1.0,
    ),
    "distance_pearson": MetricInfo(
        "Distance correlation (Pearson)",
        "The same, in proportion and not only in order.",
        "higher",
        1.0,
    ),
    "stress_1": MetricInfo(
        "Stress-1",
        "Relative error of the distances between cells after the best common scale.",
        "lower",
        0.0,
    ),
    "procrustes": MetricInfo(
        "Procrustes error",
        "Share of the tissue's extent left unexplained after laying the map onto it.",
        "lower",
        0.0,
    ),
    "misplacement": MetricInfo(
        "Misplacement",
        "Typical misplacement of a cell, in tissue radii, after laying the map onto the tissue.",
        "lower",
        0.0,
    ),
    "neighbor_hit": MetricInfo(
        "Neighbour hit",
        "Share of a cell's nearest cells on the map that are its nearest cells in the tissue.",
        "higher",
        1.0,
    ),
    "neighbor_hit_chance": MetricInfo("Neighbour hit by chance", "What a random map would reach."),
    "trustworthiness": MetricInfo(
        "Trustworthiness",
        "Are neighbours on the map at least not far apart in the tissue? Chance is about 0.5.",
        "higher",
        1.0,
    ),
    "continuity": MetricInfo(
        "Continuity",
        "Are neighbours in the tissue at least not far apart on the map? Chance is about 0.5.",
        "higher",
        1.0,
    ),
    "cell_spearman": MetricInfo(
        "Distance correlation of a cell",
        "Of one cell's distances to all others; the median over cells.",
        "higher",
        1.0,
    ),
    "cell_spearman_mean": MetricInfo(
        "Distance correlation of a cell, mean", "The same, the mean over cells.", "higher", 1.0
    ),
    "contact_f1": MetricInfo(
        "Contact F1",
        "Agreement of which pairs of cells are among the nearest share of all pairs.",
        "higher",
        1.0,
    ),
    "rssd": MetricInfo(
        "RSSD",
        "Root of the summed squared distances of the rotated, not mirrored map; both of unit size.",
        "lower",
        0.0,
    ),
    "rssd_by_class": MetricInfo(
        "RSSD by class",
        "The same of each class alone, summed over classes.",
        "lower",
        0.0,
    ),
    "frame_error": MetricInfo(
        "Median error in the frame",
        "Half of the cells lie nearer to their place, in the units of the reference.",
        "lower",
        0.0,
    ),
    "frame_error_radii": MetricInfo(
        "Median error in the frame, in radii",
        "The same over the root-mean-square radius of the cells.",
        "lower",
        0.0,
    ),
    "lambda_ratio": MetricInfo(
        "Shape ratio λ₂/λ₁",
        "Short against long axis of the map; below 0.01 it has collapsed to a line.",
    ),
    "median_distance": MetricInfo(
        "Median distance",
        "Median distance between cells in tissue radii; below 0.01 the map is a point.",
    ),
    "E_geo": MetricInfo(
        "E_geo",
        "The training criterion without its regularisers; compare only within this table.",
        "lower",
    ),
    "L_RW": MetricInfo("L_RW", "Random-walk part of E_geo: neighbourhoods.", "lower"),
    "L_stress": MetricInfo("L_stress", "Stress part of E_geo: distances.", "lower"),
    "candidate_recall": MetricInfo(
        "Candidate recall",
        "Share of a cell's true neighbours that are among its candidates in expression space.",
        "higher",
        1.0,
    ),
}
"""Metrics of any layout, in the order of a table's columns."""

DIAGNOSTICS: dict[str, MetricInfo] = {
    "candidate_recall_chance": MetricInfo(
        "Candidate recall by chance", "What as many random candidates would reach."
    ),
    "candidate_recall_lift": MetricInfo(
        "Candidate recall over chance", "1 if expression told nothing of neighbours."
    ),
    "candidate_precision": MetricInfo(
        "Candidate precision", "Share of a cell's candidates that are true neighbours."
    ),
    "gate_precision": MetricInfo(
        "Gate precision", "Share of true neighbours among the candidates with the largest gate."
    ),
    "gate_recall": MetricInfo(
        "Gate recall", "Share of the true neighbours among the candidates with the largest gate."
    ),
    "gate_lift": MetricInfo(
        "Gate lift", "Gate precision over candidate precision; 1 if the gate chose at random."
    ),
    "embedding_hit": MetricInfo(
        "Neighbour hit of the embedding",
        "Share of a cell's nearest cells in the embedding that are its nearest in the tissue.",
    ),
    "boundary_mass": MetricInfo(
        "Cells at the boundary",
        "Share of cells in the outer tenth of the map's radius: 0.2 of a full disc, 1 of a ring.",
    ),
    "density_correlation": MetricInfo(
        "Density correlation",
        "Do cells that lie close together on the map do so in the tissue?",
    ),
    "uncertainty_error_spearman": MetricInfo(
        "Uncertainty against error",
        "Rank correlation over cells; 0 if the uncertainty told nothing.",
    ),
    "uncertainty_error_ratio": MetricInfo(
        "Uncertainty over error", "Root mean squares; 1 if it is as large as the error."
    ),
    "uncertainty_error_ratio_low": MetricInfo(
        "Uncertainty over error, least uncertain", "Of that fifth of the cells."
    ),
    "uncertainty_error_ratio_high": MetricInfo(
        "Uncertainty over error, most uncertain", "Of that fifth of the cells."
    ),
    "uncertainty_coverage": MetricInfo(
        "Uncertainty coverage",
        "Share of cells whose error is within their uncertainty; 0.63 if errors are Gaussian.",
    ),
    "disc_coverage": MetricInfo(
        "Cells in their disc", "Share of cells in the disc that should hold 0.8 of them."
    ),
    "typicality_cells_unlike": MetricInfo(
        "Cells unlike the training cells",
        "Share with a p-value of at most 0.05; 0.05 on a slide like those trained on.",
    ),
    "typicality_shift": MetricInfo(
        "Shift of the slide",
        "How much less typical all its cells are than left-out cells, in standard deviations.",
    ),
    "typicality_offset": MetricInfo(
        "Offset of the slide",
        "Of its mean from that of the training slides; up to about 2 for slides like these.",
    ),
    "typicality_shared_genes": MetricInfo("Shared genes", "Of the genes of the run."),
    "typicality_mean_agreement": MetricInfo(
        "Agreement of gene means", "Correlation with those of the training slides."
    ),
    "typicality_coexpression_agreement": MetricInfo(
        "Agreement of coexpression",
        "Correlation of gene-gene correlations with those of the training cells; 1 is usual.",
    ),
}
"""Measures of a trained model or of its graph."""

_BY_LOWER_NAME = {name.lower(): info for name, info in (METRICS | DIAGNOSTICS).items()}
_SUFFIX = {"hgate": "gated candidates", "tedge": "true neighbours", "floor": "true coordinates"}


def metric_info(name: str) -> MetricInfo:
    """The reading of a metric or diagnostic by its flat name.

    Args:
        name: for example ``"neighbor_hit@15"`` or ``"E_geo_hgate"``: a name of :data:`METRICS` or
            :data:`DIAGNOSTICS`, then the edges attended to, then ``@k``.

    Returns:
        Label and explanation; of an unknown name the name itself and no explanation.
    """
    stem, _, k = name.partition("@")
    match = re.fullmatch(rf"(.+)_({'|'.join(_SUFFIX)})", stem)
    base = _BY_LOWER_NAME.get((match[1] if match else stem).lower())
    if base is None:
        return MetricInfo(name, "")
    label = f"{base.label}, {_SUFFIX[match[2]]}" if match else base.label
    label = f"{label} @{k}" if k else label
    return MetricInfo(label, base.explanation, base.better, base.perfect)
