"""Many runs in one table: means, deviations over seeds, paired differences with their errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..metrics.layout import metric_info

ROLES = ("variant", "ablation", "baseline", "floor")
"""What a method is: a trained variant, one without a part, a simple method, the true positions."""

MIN_STANDARD_ERRORS = 2.0
"""A smaller difference does not count."""

MIN_SAMPLES = 3
"""With fewer slides (or seeds) no difference counts: two that happen to agree prove nothing."""


@dataclass(frozen=True)
class Record:
    """One measured value.

    Args:
        method: name in the table.
        role: one of :data:`ROLES`.
        slide: the held-out slide.
        seed: of the run.
        metric: flat name.
        value: what was measured.
    """

    method: str
    role: str
    slide: str
    seed: int
    metric: str
    value: float


@dataclass(frozen=True)
class Difference:
    r"""How a method differs from another on the same slides and seeds.

    .. math::
        \bar d = \frac1S \sum_s d_s, \qquad
        d_s = \frac1R \sum_r (x_{sr} - y_{sr}), \qquad
        \mathrm{se} = \frac{\mathrm{sd}_s(d_s)}{\sqrt S}

    with S slides and R seeds. With one slide the differences of the seeds are taken instead,
    and the error then says nothing about other slides.

    Args:
        other: the method compared with.
        mean: mean difference, in the unit of the metric.
        se: its standard error; None where there is one slide and one seed.
        over: ``"slides"`` or ``"seeds"``: what the error is taken over.
        count: how many of them.
        verdict: ``"better"`` or ``"worse"`` if the difference exceeds two standard errors of at
            least three slides (or seeds). ``"different"`` if it does and neither direction of
            the metric is better; else ``""``.
    """

    other: str
    mean: float
    se: float | None
    over: str
    count: int
    verdict: str


@dataclass(frozen=True)
class Summary:
    """One metric of one method.

    Args:
        mean: over slides, each the mean of its seeds.
        sd: standard deviation over seeds of the mean over slides; None with fewer than two
            seeds that have all slides.
        se: standard error over slides, seeds averaged first; None with one slide.
        slides: number of slides.
        seeds: number of seeds.
        vs_reference: difference to the reference variant.
        vs_baseline: difference to the baseline with the best mean.
    """

    mean: float
    sd: float | None
    se: float | None
    slides: int
    seeds: int
    vs_reference: Difference | None = None
    vs_baseline: Difference | None = None


@dataclass
class Comparison:
    """All methods and metrics of a study.

    Args:
        roles: method to its role, in the order of the table.
        reference: the variant that others are compared with.
        metrics: metric to method to its summary.
        best_baseline: metric to the baseline with the best mean.
    """

    roles: dict[str, str]
    reference: str
    metrics: dict[str, dict[str, Summary]] = field(default_factory=dict)
    best_baseline: dict[str, str] = field(default_factory=dict)

    def of(self, metric: str, method: str) -> Summary | None:
        """The summary of a metric of a method, None where it was not measured."""
        return self.metrics.get(metric, {}).get(method)

    def methods(self, *roles: str) -> list[str]:
        """Names of the methods of these roles, in order."""
        return [method for method, role in self.roles.items() if role in roles]

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds of it."""
        return asdict(self)


def direction(metric: str) -> int:
    """1 if higher values of a metric are better, -1 if lower ones are, 0 if neither is."""
    return {"higher": 1, "lower": -1}.get(metric_info(metric).better, 0)


def compare(records: Iterable[Record], reference: str) -> Comparison:
    """Summarises records and compares every method with the reference and the best baseline.

    Values that are not finite count as not measured. Methods are ordered by role, then as in the
    records.

    Args:
        records: of all runs.
        reference: name of the reference variant; it may be missing from the records.
    """
    roles: dict[str, str] = {}
    values: dict[str, dict[str, dict[tuple[str, int], float]]] = {}
    for record in records:
        roles.setdefault(record.method, record.role)
        if math.isfinite(record.value):
            of_method = values.setdefault(record.metric, {}).setdefault(record.method, {})
            of_method[record.slide, record.seed] = record.value
    ordered = {m: role for name in ROLES for m, role in roles.items() if role == name}
    result = Comparison(ordered, reference)
    for metric, table in values.items():
        best = _best_baseline(metric, table, roles)
        if best is not None:
            result.best_baseline[metric] = best
        result.metrics[metric] = {
            method: _summarise(metric, method, table, reference, best)
            for method in ordered
            if method in table
        }
    return result


def difference(
    metric: str,
    own: Mapping[tuple[str, int], float],
    other: Mapping[tuple[str, int], float],
    name: str,
) -> Difference | None:
    """The paired difference of two methods, over the slides and seeds that both have.

    Args:
        metric: tells which direction is better.
        own: (slide, seed) to value.
        other: the same of the method compared with.
        name: of the method compared with.
    """
    pairs = {key: own[key] - other[key] for key in own if key in other}
    if not pairs:
        return None
    per_slide = _means(pairs, 0)
    over, samples = ("slides", per_slide) if len(per_slide) > 1 else ("seeds", _means(pairs, 1))
    mean, se = float(np.mean(per_slide)), _standard_error(samples)
    verdict = ""
    # differences of rounding alone have a standard error of the same size
    if len(samples) >= MIN_SAMPLES and abs(mean) > max(MIN_STANDARD_ERRORS * se, 1e-9):
        gain = direction(metric) * mean
        verdict = "better" if gain > 0 else "worse" if gain < 0 else "different"
    return Difference(name, mean, se, over, len(samples), verdict)


def _summarise(
    metric: str,
    method: str,
    table: Mapping[str, Mapping[tuple[str, int], float]],
    reference: str,
    best: str | None,
) -> Summary:
    own = table[method]
    slides = {slide for slide, _ in own}
    seeds = {seed for _, seed in own}
    complete = [seed for seed in sorted(seeds) if all((slide, seed) in own for slide in slides)]
    per_seed = [np.mean([own[slide, seed] for slide in slides]) for seed in complete]
    per_slide = _means(own, 0)

    def against(other: str | None) -> Difference | None:
        if other is None or other == method or other not in table:
            return None
        return difference(metric, own, table[other], other)

    return Summary(
        mean=float(np.mean(per_slide)),
        sd=float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else None,
        se=_standard_error(per_slide),
        slides=len(slides),
        seeds=len(seeds),
        vs_reference=against(reference),
        vs_baseline=against(best),
    )


def _best_baseline(
    metric: str,
    table: Mapping[str, Mapping[tuple[str, int], float]],
    roles: Mapping[str, str],
) -> str | None:
    sign = direction(metric)
    means = {
        method: np.mean(_means(values, 0))
        for method, values in table.items()
        if roles[method] == "baseline"
    }
    return max(means, key=lambda method: sign * means[method]) if sign and means else None


def _means(values: Mapping[tuple[str, int], float], part: int) -> list[float]:
    """Means over one part of the key (0: of each slide over its seeds), in sorted order."""
    groups: dict[Any, list[float]] = {}
    for key, value in values.items():
        groups.setdefault(key[part], []).append(value)
    return [float(np.mean(groups[group])) for group in sorted(groups)]


def _standard_error(samples: Sequence[float]) -> float | None:
    if len(samples) < 2:
        return None
    return float(np.std(samples, ddof=1) / math.sqrt(len(samples)))
