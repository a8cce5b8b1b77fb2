"""The report of one slide: one HTML page that opens with the answer, and its figures as files."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import pl
from ..files import atomic_write
from ..geometry.alignment import align
from ..geometry.neighborhoods import as_layout, unit_gauge
from ..metrics.diagnostics import health_warnings
from ..metrics.layout import METRICS, metric_info
from .html import draw_figure, environment, number_text

_BARS = ("distance_spearman", "procrustes", "neighbor_hit@15", "trustworthiness@15")
# left to the list of further measures: not scores, or another column in other words (RSSD is the
# root of the Procrustes error)
_NOT_IN_TABLE = {
    "lambda_ratio",
    "median_distance",
    "neighbor_hit_chance",
    "neighbor_hit@10",
    "candidate_recall",
    "rssd",
}
_RECYCLE_PANELS = {
    "attn_recall@30": "Attention on true neighbours",
    "logit_std": "Spread of logits",
    "attention_entropy_relative": "Entropy of attention (1: uniform)",
    "step_size": "Movement of the map |ΔX|/√n",
}


@dataclass
class SlideEvaluation:
    """Everything a report can show; what is None is left out, with the reason if one is given.

    Args:
        slide: name of the slide.
        pred: predicted positions (n, 2), any gauge.
        true: measured positions (n, 2); None where there are none, then nothing is scored.
        methods: metrics of each method by flat name, in the order of the table: the model, its
            variants, the baselines, true coordinates. One of them may be enough.
        model: key in ``methods`` of the model itself.
        variants: keys that are forms of the model (no gate), not baselines.
        oracles: keys that were given what a user does not have (true neighbours); shown, but
            no competitors.
        floor: key of what the true coordinates score; not a competitor either.
        metrics: further flat measures of this slide (``E_geo_hgate``, ``candidate_recall@15``,
            ``candidate_recall_chance@15`` ...), shown in a table of their own.
        diagnostics: flat measures as :func:`ipar_sparse.metrics.layout.diagnostics.diagnose` gives them.
        trajectory: layouts (n, 2) before the first and after every recycle.
        history: rows of the training history.
        gene: name and expression (n,) of a gene.
        focus: where some cells attend.
        uncertainty: how far each cell may lie from its place (n,), in tissue radii.
        training: names of the slides the model was fitted on.
        validation: names of the slides that chose when to stop.
        held_out: whether this slide was out of every stage; None if that is not known.
        warnings: lines that a reader must see; those of ``diagnostics`` that are about the map
            are added, the others stand in the section on attention.
        notes: lines on how the input was read and on rows of ``methods``.
        settings: the run's configuration, flat or nested.
        versions: software name to version.
        command: the command that made this report.
        absent: field name to the reason why it is None, shown in its place.
    """

    slide: str
    pred: np.ndarray
    true: np.ndarray | None = None
    methods: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    model: str = "model"
    variants: Sequence[str] = ()
    oracles: Sequence[str] = ()
    floor: str | None = "true coordinates"
    metrics: Mapping[str, float] = field(default_factory=dict)
    diagnostics: Mapping[str, float] | None = None
    trajectory: Sequence | None = None
    history: Sequence[Mapping] | None = None
    gene: tuple[str, np.ndarray] | None = None
    focus: Sequence[pl.AttentionFocus] | None = None
    uncertainty: np.ndarray | None = None
    training: Sequence[str] = ()
    validation: Sequence[str] = ()
    held_out: bool | None = None
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    settings: Mapping = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def baselines(self) -> list[str]:
        """Methods the model has to beat."""
        own = {self.model, self.floor, *self.variants, *self.oracles}
        return [name for name in self.methods if name not in own]


@dataclass(frozen=True)
class Answer:
    """What the report opens with.

    Args:
        headline: one sentence.
        facts: sentences with the numbers behind it.
        warnings: what must be known before believing them.
    """

    headline: str
    facts: list[str]
    warnings: list[str]


def write_metrics(path: str | Path, metrics: Mapping) -> Path:
    """Write metrics as JSON, in one step; what is not a finite number becomes null.

    Args:
        path: the file.
        metrics: flat names to numbers, strings or booleans; one level of nesting is kept.
    """
    path = Path(path)
    text = json.dumps(_plain(metrics), indent=2, allow_nan=False, ensure_ascii=False)
    atomic_write(path, text + "\n")
    return path


def write_report(out_dir: str | Path, bundle: SlideEvaluation) -> Path:
    """Write ``report.html``, self-contained, and its figures under ``figures/``.

    Args:
        out_dir: folder, made if missing; files of an earlier report are replaced.
        bundle: what to show.

    Returns:
        The path of the page.

    Raises:
        ValueError: if arrays in the bundle are not of the same cells.
    """
    _check(bundle)
    out = Path(out_dir)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    sections = [section for build in _SECTIONS if (section := build(bundle)) is not None]
    for section in sections:
        for figure in section["figures"]:
            atomic_write(out / "figures" / f"{figure['name']}.png", figure.pop("png"))
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            bundle=bundle,
            answer=summarize(bundle),
            num_cells=len(bundle.pred),
            sections=sections,
            table=metric_table(bundle),
            more=_measures(bundle),
            settings=_flatten(bundle.settings),
        )
    )
    path = out / "report.html"
    atomic_write(path, page)
    return path


def summarize(bundle: SlideEvaluation) -> Answer:
    """The answer in words: how good the map is, against the best baseline and the ideal.

    A difference counts only beyond two standard errors of the sampling, and beyond 0.005.
    """
    # what is wrong inside the model stands beside its attention: the map may be good all the same
    warnings = [*bundle.warnings, *health_warnings(bundle.diagnostics or {}, of_map=True)]
    if bundle.held_out is False:
        warnings.insert(
            0, "This slide took part in training: its scores say nothing about new slides."
        )
    own = bundle.methods.get(bundle.model, {})
    if bundle.true is None or not own:
        return Answer(
            f"A map of {len(bundle.pred):,} cells was predicted. Without measured positions "
            "its quality cannot be scored.",
            [],
            warnings,
        )
    facts = []
    rho = _known(own, "distance_spearman")
    if rho is None:
        headline = f"The map of {len(bundle.pred):,} cells was scored against measured positions"
    else:
        headline = f"The overall layout of the tissue was {_grade(rho)}"
        facts.append(
            f"Distances between cells on the map agree with those in the tissue to "
            f"{_number(own, 'distance_spearman')} (rank correlation; 1 is perfect, 0 is chance)"
            f"{_versus(bundle, 'distance_spearman')}."
        )
    hit = _known(own, "neighbor_hit@15")
    if hit is not None:
        chance = _known(own, "neighbor_hit_chance@15")
        by_chance = "" if chance is None else f" ({15 * chance:.2g} would be by chance)"
        facts.append(
            f"Of the 15 cells nearest to a cell on the map, {15 * hit:.1f} are truly among its "
            f"nearest in the tissue{by_chance}"
            f"{_versus(bundle, 'neighbor_hit@15', lambda v: f'{15 * v:.1f}')}."
        )
    rssd = _known(own, "rssd")
    if rssd is not None:
        facts.append(
            f"Laid onto the tissue, a cell lies typically {rssd:.2f} tissue radii from its place "
            f"(1 would be a map without information){_versus(bundle, 'rssd')}."
        )
    floor = bundle.methods.get(bundle.floor, {})
    if "E_geo" in own and "E_geo" in floor:
        facts.append(
            f"The training criterion E_geo is {own['E_geo']:.3f}; the true coordinates "
            f"themselves score {floor['E_geo']:.3f}."
        )
    wins, scored = _wins(bundle)
    if scored:
        verdict = (
            "better than every baseline on every measure"
            if wins == scored
            else f"better than every baseline on {wins} of {scored} measures"
            if wins
            else "on no measure better than the best baseline"
        )
        headline += f", {verdict}"
    return Answer(headline + ".", facts, warnings)


def metric_table(bundle: SlideEvaluation) -> dict:
    """The table of methods against metrics, as text, with the best of each column marked.

    Returns:
        ``columns``: label, arrow, explanation; ``rows``: name, role (``model``, ``variant``,
        ``baseline`` or ``floor``) and cells of text, error and whether it is the best.
    """
    names = _columns(bundle)
    competitors = [m for m in bundle.methods if m not in (bundle.floor, *bundle.oracles)]
    best = {}
    for name in names:
        sign = {"higher": 1, "lower": -1}.get(metric_info(name).better)
        known = {m: v for m in competitors if (v := _known(bundle.methods[m], name)) is not None}
        if sign and len(known) > 1:
            top = max(sign * value for value in known.values())
            # equal as printed is equal
            best[name] = {m for m, v in known.items() if number_text(v) == number_text(sign * top)}
    rows = []
    for method, values in bundle.methods.items():
        cells = []
        for name in names:
            value, error = _known(values, name), _known(values, f"{name}_se")
            cells.append(
                {
                    "text": "–" if value is None else number_text(value),
                    "error": _plus_minus(error) if value is not None else "",
                    "best": method in best.get(name, ()),
                }
            )
        rows.append({"name": method, "role": _role(bundle, method), "cells": cells})
    columns = []
    for name in names:
        info = metric_info(name)
        arrow = {"higher": "↑", "lower": "↓"}.get(info.better, "")
        columns.append(
            {
                "label": info.label,
                "arrow": arrow,
                "explanation": info.explanation,
                "better": info.better,
            }
        )
    return {"columns": columns, "rows": rows}


def _map_section(bundle):
    if bundle.true is None:

        def draw(figure):
            pl.layout(bundle.pred, ax=figure.subplots(), title="Predicted")

        return _section(
            "The map",
            "Each dot is a cell, coloured by its place on the predicted map.",
            [draw_figure("map", (5.2, _tall(bundle, 5.2)), draw, "Predicted map of cells")],
        )

    def draw(figure):
        pl.layout_pair(bundle.true, bundle.pred, axes=figure.subplots(1, 2))

    return _section(
        "The map",
        "Left, where the cells were measured; right, where they were predicted, turned to match. "
        "A cell has the same colour on both: a good map shows the same gradients.",
        [
            draw_figure(
                "map", (10.0, _tall(bundle, 4.9)), draw, "Measured and predicted map of cells"
            )
        ],
    )


def _gene_section(bundle):
    if bundle.gene is None:
        return _absent(bundle, "gene", "A gene on the map")
    name, values = bundle.gene

    def draw(figure):
        if bundle.true is None:
            pl.layout(bundle.pred, values, ax=figure.subplots(), label=name)
        else:
            axes = figure.subplots(1, 2)
            pl.layout_pair(bundle.true, bundle.pred, values, axes=axes, label=name)

    size = (5.6, _tall(bundle, 4.8)) if bundle.true is None else (10.0, _tall(bundle, 4.2))
    return _section(
        "A gene on the map",
        f"Expression of {name}. Its domain should have the same shape on the predicted map.",
        [draw_figure("gene", size, draw, f"Expression of {name} on the maps")],
    )


def _score_section(bundle):
    names = [name for name in _BARS if sum(name in m for m in bundle.methods.values()) > 1]
    if bundle.true is None or not names:
        return _absent(bundle, "methods", "Against other methods")
    count = len([m for m in bundle.methods if m != bundle.floor])

    def draw(figure):
        columns = 2 if len(names) > 1 else 1
        axes = np.ravel(figure.subplots(math.ceil(len(names) / columns), columns, squeeze=False))
        for ax, name in zip(axes, names, strict=False):
            pl.metric_bars(
                bundle.methods,
                name,
                model=bundle.model,
                variants=(*bundle.variants, *bundle.oracles),
                floor=bundle.floor,
                ax=ax,
            )
        for ax in axes[len(names) :]:
            ax.set_visible(False)

    height = math.ceil(len(names) / 2) * (1.1 + 0.27 * count)
    return _section(
        "Against other methods",
        "The model in blue, its variants in light blue, baselines in grey. Dashed: what the true "
        "coordinates score; dotted: chance. Whiskers are two standard errors where sampled.",
        [
            draw_figure(
                "methods", (10.0, height), draw, "Bars of main metrics for every method", dense=True
            )
        ],
    )


def _distance_section(bundle):
    if bundle.true is None:
        return None

    def draw(figure):
        pl.distance_density(bundle.pred, bundle.true, ax=figure.subplots())

    return _section(
        "Distances",
        "Every pair of cells: true distance to the right, predicted distance up. A perfect map "
        "lies on the dashed line; a flat top means that far parts of the tissue were folded "
        "together.",
        [draw_figure("distances", (5.4, 4.6), draw, "Predicted against true distances")],
    )


def _recycle_section(bundle):
    if bundle.trajectory is None:
        return _absent(bundle, "trajectory", "Recycle by recycle")

    def draw(figure):
        count = len(bundle.trajectory)
        columns = min(count, 4)
        axes = np.ravel(figure.subplots(math.ceil(count / columns), columns, squeeze=False))
        pl.trajectory(bundle.trajectory, true=bundle.true, axes=axes)
        for ax in axes[count:]:
            ax.set_visible(False)

    height = math.ceil(len(bundle.trajectory) / 4) * _tall(bundle, 2.4)
    return _section(
        "Recycle by recycle",
        "The map at the start and after each pass through the model, in the colours of the first "
        "figure. The last step, where a run has one, comes after them.",
        [draw_figure("recycles", (10.0, height), draw, "The map after every recycle")],
    )


def _attention_section(bundle):
    figures = []
    if bundle.focus:
        pos = bundle.pred if bundle.true is None else bundle.true

        def draw_focus(figure):
            pl.attention_focus(pos, bundle.focus, axes=np.ravel(figure.subplots(1, count)))

        count = len(bundle.focus)
        figures.append(
            draw_figure(
                "attention",
                (2.5 * count, _tall(bundle, 2.5)),
                draw_focus,
                "Attention of single cells",
            )
        )
    panels = [
        (name, title)
        for name, title in _RECYCLE_PANELS.items()
        if any(key.startswith(f"{name}/r") for key in bundle.diagnostics or {})
    ]
    if panels:

        def draw_recycles(figure):
            for ax, (name, title) in zip(
                np.ravel(figure.subplots(1, len(panels))), panels, strict=True
            ):
                pl.recycle_curves(bundle.diagnostics, name, ax=ax, title=title)
            heads = ax.figure.axes[0].get_legend_handles_labels()
            if heads[0]:
                figure.legend(
                    *heads, loc="outside lower center", ncols=8, fontsize=8, frameon=False
                )

        figures.append(
            draw_figure(
                "diagnostics",
                (2.5 * len(panels), 2.7),
                draw_recycles,
                "Measures of attention over recycles",
                dense=True,
            )
        )
    outside = health_warnings(bundle.diagnostics or {}, of_map=False)
    if not figures and not outside:
        return _absent(bundle, "focus", "Attention")
    where = "predicted" if bundle.true is None else "measured"
    text = []
    if bundle.focus:
        text.append(
            f"Four cells (stars) on the {where} map and the cells they attend to: the "
            "darker and larger a dot, the more attention. True neighbours lie around the "
            "star.".replace("Four", _count_word(len(bundle.focus)))
        )
    if panels:
        text.append(
            "Below, measures of attention by recycle and head; green is the healthy range."
            if bundle.focus
            else "Measures of attention by recycle and head; green is the healthy range."
        )
    if outside and "first layout" in bundle.methods:
        ends = "not refined" if "not refined" in bundle.methods else bundle.model
        text.append(
            f'What attention is worth on this slide is the difference between "{ends}" and '
            '"first layout" among the scores.'
        )
    return _section("Attention", " ".join(text), figures, outside)


def _uncertainty_section(bundle):
    if bundle.uncertainty is None:
        return _absent(bundle, "uncertainty", "Uncertainty")

    def draw(figure):
        if bundle.true is None:
            pl.uncertainty_map(bundle.pred, bundle.uncertainty, ax=figure.subplots())
            return
        axes = figure.subplots(1, 2)
        true = unit_gauge(as_layout(bundle.true))
        aligned, _ = align(unit_gauge(as_layout(bundle.pred)), true)
        pl.uncertainty_map(aligned, bundle.uncertainty, ax=axes[0])
        error = np.linalg.norm(aligned - true, axis=1)
        pl.uncertainty_calibration(bundle.uncertainty, error, ax=axes[1])

    width = 5.6 if bundle.true is None else 10.0
    text = "How far a cell is to be expected from its place, root mean square: by the atlas of the "
    text += "run, where it has one, and by how far different noise moves the cell, where several "
    text += "seeds were asked for; in the size of the errors on donors left out of training."
    if bundle.true is not None:
        text += " On the right, cells in groups of equal size, least uncertain first: where the "
        text += "line rises, cells that are called uncertain do lie farther off; on the dashed "
        text += "line, as far as they are said to."
    figure = draw_figure("uncertainty", (width, 4.2), draw, "Uncertainty map and calibration")
    return _section("Uncertainty", text, [figure])


def _training_section(bundle):
    if not bundle.history:
        return _absent(bundle, "history", "Training")

    def draw(figure):
        pl.loss_curves(bundle.history, axes=figure.subplots(1, 2))

    return _section(
        "Training",
        "Left, the parts of the loss; right, the validation score, on the graph a user gets and "
        "on the true neighbours. The star is the epoch that was kept.",
        [draw_figure("training", (10.0, 3.8), draw, "Loss curves", dense=True)],
    )


_SECTIONS: tuple[Callable[[SlideEvaluation], dict | None], ...] = (
    _map_section,
    _gene_section,
    _score_section,
    _distance_section,
    _uncertainty_section,
    _recycle_section,
    _attention_section,
    _training_section,
)


def _section(title: str, text: str, figures: list[dict], warnings: Sequence[str] = ()) -> dict:
    return {"title": title, "text": text, "figures": figures, "warnings": warnings}


def _tall(bundle: SlideEvaluation, width: float) -> float:
    """Height of a panel of ``width`` inches that fits the tissue, with room for a title."""
    pos = as_layout(bundle.pred if bundle.true is None else bundle.true)
    extent = np.ptp(pos, axis=0)
    ratio = extent[1] / extent[0] if extent[0] > 0 else 1.0
    return width * float(np.clip(ratio, 0.5, 1.5)) + 0.35


def _absent(bundle: SlideEvaluation, name: str, title: str) -> dict | None:
    reason = bundle.absent.get(name)
    return None if reason is None else _section(title, f"Not shown: {reason}", [])


def _check(bundle: SlideEvaluation) -> None:
    n = len(as_layout(bundle.pred, "pred"))
    sizes = {"true": bundle.true, "uncertainty": bundle.uncertainty}
    sizes["gene"] = None if bundle.gene is None else bundle.gene[1]
    for r, pos in enumerate(bundle.trajectory or ()):
        sizes[f"trajectory[{r}]"] = pos
    for name, values in sizes.items():
        if values is not None and len(values) != n:
            raise ValueError(
                f"report: pred has {n} cells, {name} has {len(values)}; give the same cells"
            )


def _columns(bundle: SlideEvaluation) -> list[str]:
    found = dict.fromkeys(name for values in bundle.methods.values() for name in values)
    shown = []
    for name in found:
        stem = name.partition("@")[0]
        hidden = stem in _NOT_IN_TABLE or name in _NOT_IN_TABLE or name.endswith("_se")
        if stem in METRICS and not hidden:
            shown.append(name)
    order = list(METRICS)
    return sorted(shown, key=lambda name: order.index(name.partition("@")[0]))


def _measures(bundle: SlideEvaluation) -> list[dict]:
    """Measures of the slide that are not columns of the table, without their standard errors."""
    own = bundle.methods.get(bundle.model, {})
    columns = set(_columns(bundle))
    merged = {**own, **bundle.metrics, **(bundle.diagnostics or {})}
    rows = []
    for name, value in merged.items():
        if name in columns or name.endswith("_se") or "/" in name or _known(merged, name) is None:
            continue
        info = metric_info(name)
        error = _known(merged, f"{name}_se")
        rows.append(
            {
                "label": info.label if info.explanation else name,
                "text": f"{number_text(value)} {_plus_minus(error)}".rstrip(),
                "explanation": info.explanation,
            }
        )
    return rows


def _role(bundle: SlideEvaluation, method: str) -> str:
    if method == bundle.model:
        return "model"
    if method == bundle.floor:
        return "floor"
    forms = (*bundle.variants, *bundle.oracles)
    return "variant" if method in forms else "baseline"


def _known(values: Mapping, name: str) -> float | None:
    value = values.get(name)
    known = isinstance(value, int | float | np.number) and math.isfinite(value)
    return float(value) if known else None


def _plus_minus(error: float | None) -> str:
    return f"± {error:.1g}" if error is not None and error > 1e-6 else ""


def _number(values: Mapping, name: str) -> str:
    error = _known(values, f"{name}_se")
    return f"{values[name]:.2f}" + (f" ± {error:.1g}" if error and error > 0.005 else "")


def _grade(rho: float) -> str:
    for bound, words in (
        (0.9, "recovered well"),
        (0.7, "mostly recovered"),
        (0.4, "partly recovered"),
        (0.15, "hardly recovered"),
    ):
        if rho >= bound:
            return words
    return "not recovered"


def _lead(bundle: SlideEvaluation, name: str) -> tuple[float, str] | None:
    """How far the model is ahead of the best baseline, in the better direction, and its name."""
    own = bundle.methods[bundle.model]
    sign = {"higher": 1, "lower": -1}.get(metric_info(name).better)
    known = [m for m in bundle.baselines if _known(bundle.methods[m], name) is not None]
    if not sign or not known or _known(own, name) is None:
        return None
    rival = max(known, key=lambda m: sign * bundle.methods[m][name])
    return sign * (own[name] - bundle.methods[rival][name]), rival


def _margin(bundle: SlideEvaluation, name: str, rival: str) -> float:
    errors = [_known(bundle.methods[m], f"{name}_se") or 0.0 for m in (bundle.model, rival)]
    return max(0.005, 2 * math.hypot(*errors))


def _versus(bundle: SlideEvaluation, name: str, form: Callable = lambda v: f"{v:.2f}") -> str:
    lead = _lead(bundle, name)
    if lead is None:
        return ""
    ahead, rival = lead
    value = form(bundle.methods[rival][name])
    margin = _margin(bundle, name, rival)
    if ahead > margin:
        return f"; the best baseline ({rival}) reaches {value}"
    if ahead < -margin:
        return f"; the baseline {rival} does better: {value}"
    return f"; no different from the best baseline ({rival}): {value}"


def _wins(bundle: SlideEvaluation) -> tuple[int, int]:
    leads = [(name, lead) for name in _columns(bundle) if (lead := _lead(bundle, name))]
    wins = sum(ahead > _margin(bundle, name, rival) for name, (ahead, rival) in leads)
    return wins, len(leads)


def _count_word(count: int) -> str:
    words = ("No", "One", "Two", "Three", "Four", "Five", "Six")
    return words[count] if count < len(words) else str(count)


def _flatten(settings: Mapping, prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _plain(value):
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic) or (hasattr(value, "item") and getattr(value, "ndim", 1) == 0):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
