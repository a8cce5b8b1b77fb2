"""Healthy ranges of the diagnostics, and warnings in words where one is outside."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class HealthyRange:
    """Where a diagnostic should lie, and what it means if it does not.

    Args:
        low: smallest healthy value.
        high: largest healthy value.
        below: what a smaller value means.
        above: what a larger value means.
        of_map: whether the diagnostic judges the map or its input; otherwise it judges a part of
            the model, whose map may still be good.
    """

    low: float = -math.inf
    high: float = math.inf
    below: str = ""
    above: str = ""
    of_map: bool = False

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"at least {self.low:g}"
        if math.isinf(self.low):
            return f"at most {self.high:g}"
        return f"{self.low:g} to {self.high:g}"


HEALTHY: dict[str, HealthyRange] = {
    "attn_recall@30": HealthyRange(low=0.40, below="attention does not find the true neighbours"),
    "logit_std": HealthyRange(
        low=4.0,
        high=8.0,
        below="attention is nearly uniform and cannot choose",
        above="attention is nearly one-hot and gradients vanish",
    ),
    "attention_entropy_relative": HealthyRange(
        low=0.10,
        high=0.95,
        below="attention is nearly one-hot: each cell attends to one other",
        above="attention is nearly uniform and cannot choose",
    ),
    "head_diversity": HealthyRange(low=0.02, below="all heads attend to the same cells"),
    "beta": HealthyRange(low=0.1, below="the gate has almost no weight"),
    "eta": HealthyRange(low=0.01, below="the recycle hardly moves any cell"),
    "offset_norm": HealthyRange(
        high=2.0, above="point offsets reach across the tissue and outweigh the positions"
    ),
    "lambda_ratio": HealthyRange(low=0.01, below="the map has collapsed to a line", of_map=True),
    "median_distance": HealthyRange(
        low=0.01, below="the map has collapsed to a point", of_map=True
    ),
    "boundary_mass": HealthyRange(
        high=0.50,
        above="the cells have been pushed into a ring at the edge of the map",
        of_map=True,
    ),
    "candidate_recall_lift": HealthyRange(
        low=2.0,
        below="candidate neighbours are hardly better than random cells, so the embedding does "
        "not know where cells are on this slide",
        of_map=True,
    ),
    "gate_lift": HealthyRange(
        low=1.0, below="the gate ranks true neighbours below average candidates"
    ),
}
"""Ranges by the name of a diagnostic."""


def health_warnings(diagnostics: Mapping[str, float], of_map: bool | None = None) -> list[str]:
    """Diagnostics outside their healthy range, in words, each at its worst place.

    Args:
        diagnostics: flat names to values; a place may follow the name (``logit_std/r0/h3``).
            Names without a range are passed over. NaN in a diagnostic with a range is reported.
        of_map: True for diagnostics of the map alone, False for those of the model alone; both
            if left out.

    Returns:
        One line a diagnostic, with the number of places where it is outside. Names count
        recycles and heads from 0, sentences from 1.
    """
    worst: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    seen: dict[str, int] = {}
    for name, value in diagnostics.items():
        measure, _, place = name.partition("/")
        healthy = HEALTHY.get(measure)
        if healthy is None or value is None or of_map not in (None, healthy.of_map):
            continue
        seen[measure] = seen.get(measure, 0) + 1
        if math.isnan(value):
            meaning, excess = "undefined", math.inf
        elif value < healthy.low:
            meaning, excess = healthy.below, healthy.low - value
        elif value > healthy.high:
            meaning, excess = healthy.above, value - healthy.high
        else:
            continue
        worst.setdefault((measure, meaning), []).append((excess, value, place))
    lines = []
    for (measure, meaning), found in worst.items():
        _, value, place = max(found)
        where = f" at {_place_in_words(place)}" if place else ""
        count = f"; {len(found)} of {seen[measure]} places" if seen[measure] > 1 else ""
        meaning = meaning[:1].upper() + meaning[1:]
        lines.append(
            f"{meaning}: {measure} is {value:.3g}{where} (healthy: {HEALTHY[measure]}{count})"
        )
    return lines


def _place_in_words(place: str) -> str:
    """``"r0/h3"`` as "recycle 1, head 4"."""
    words = {"r": "recycle", "h": "head"}
    parts = []
    for part in place.split("/"):
        word, number = words.get(part[:1]), part[1:]
        parts.append(f"{word} {int(number) + 1}" if word and number.isdigit() else part)
    return ", ".join(parts)
