"""Score a prediction of a slide whose positions are known, and write the report."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor

from .. import __version__, ops
from ..data.expression import Expression, morans_i, normalized_expression
from ..data.slide import Slide
from ..errors import UserError
from ..estimators.atlas import Atlas
from ..estimators.components import principal_axes, project
from ..graph import NeighborTable, knn, pooled_candidates
from ..inference.predictor import Prediction, Predictor
from ..layout.distance_correction import relative_variance
from ..layout.uncertainty import calibration_metrics, square_errors
from ..metrics.diagnostics import AttentionFocus, RecycleRecord, candidate_recall, diagnose
from ..metrics.layout import evaluate_layout
from ..nn import IPALiteModel
from ..progress import Progress
from ..report.slide import SlideEvaluation, write_metrics, write_report
from ..supervision.losses import e_geo
from ..supervision.targets import build_target, target_graph
from ..train.fit import REFERENCE, slide_digest
from ..train.history import HISTORY, read_history
from .baselines import run_baselines

logger = logging.getLogger(__name__)

ORACLE = "true neighbours"
"""The model on the true spatial neighbours, which no user has: how good its attention could be."""

FORMS = ("no gate", "not expected", "not refined", "first layout", ORACLE)
"""Forms of the model that are scored beside it; no baselines."""

ENERGY_OF = {
    "model": "hgate",
    "no gate": "nogate",
    "not expected": "unexpected",
    "not refined": "unrefined",
    "first layout": "first",
    ORACLE: "tedge",
    "true coordinates": "floor",
}
"""Forms of the model, and how the flat metrics call their E_geo."""

_NEIGHBORS = 15  # of a cell, in the graph of the spectral layout and by which H is scored
_ATTENTION_EDGES = 3_000_000  # diagnostics hold attention (E, heads) of one recycle


def evaluate_slide(
    predictor: Predictor,
    slide: Slide,
    out: Path,
    *,
    seeds: int | None = None,
    baselines: bool | None = None,
    command: str | None = None,
) -> dict[str, float]:
    """Predict a slide, score it against its positions, and write metrics, figures and report.

    Args:
        predictor: the trained run.
        slide: n cells with positions.
        out: folder for ``metrics.json``, ``report.html`` and ``figures/``.
        seeds: noise seeds of the uncertainty; the run's setting if left out.
        baselines: whether to score the baselines; the run's setting if left out.
        command: what to name in the report as its origin.

    Returns:
        Flat metrics of the model: layout metrics by name, ``E_geo_hgate``, ``E_geo_tedge``,
        ``E_geo_floor`` and their parts, candidate recall; of other methods as ``name/metric``.

    Raises:
        UserError: if the slide has no positions, or fewer than three cells.
    """
    bundle = score_slide(predictor, slide, seeds=seeds, baselines=baselines)
    bundle.command = command
    bundle.gene = spatial_gene(slide, predictor.meta["genes"])
    bundle.history = _history(predictor.run)
    flat = {**bundle.methods["model"], **bundle.diagnostics, **bundle.metrics}
    flat |= {
        f"{name}/{key}": value
        for name, values in bundle.methods.items()
        if name != "model"
        for key, value in values.items()
    }
    with Progress() as progress, progress.task("Report"):
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        write_metrics(out / "metrics.json", flat)
        write_report(out, bundle)
    return flat


def score_slide(
    predictor: Predictor,
    slide: Slide,
    *,
    seeds: int | None = None,
    baselines: bool | None = None,
) -> SlideEvaluation:
    """Predict a slide and score the model, its variants and the baselines; nothing is written.

    Args:
        predictor: the trained run.
        slide: n cells with positions.
        seeds: noise seeds of the uncertainty; the run's setting if left out.
        baselines: whether to score the baselines; the run's setting if left out.

    Raises:
        UserError: if the slide has no positions, or fewer than three cells.
    """
    settings = predictor.config.eval
    seeds = settings.seeds if seeds is None else seeds
    baselines = settings.baselines if baselines is None else baselines
    if slide.pos is None:
        raise UserError(f"{slide.name}: no positions to score against; use `ipar-sparse predict`")
    if slide.num_cells < 3:
        raise UserError(f"{slide.name}: {slide.num_cells} cells are too few to score; give 3")
    with Progress() as progress:
        with progress.task("Predicting"):
            prediction = predictor.predict(slide, seeds=seeds)
            h = torch.from_numpy(prediction.embedding).to(predictor.device)
            layouts = {"model": prediction.pos, **_variants(predictor, h, prediction, slide.pos)}
        with progress.task("Attention"):
            measures, focus, operator = _attention(predictor, h, prediction, slide.pos)
        if baselines:
            with progress.task("Baselines") as task:
                layouts |= run_baselines(
                    prediction.embedding,
                    _near(predictor, prediction.candidates).to("cpu"),
                    train=_reference(predictor.run),
                    operator=operator,
                    attended=prediction.graph.to("cpu"),
                    seed=predictor.config.train.seed,
                    progress=lambda name: task.advance(now=name),
                )
                layouts |= _finished(predictor, layouts, h, prediction)
                # with an embedding of the user's own, X may hold anything
                if genes := predictor.meta["genes"]:
                    layouts["PCA of expression"] = expression_plane(slide, genes)
        layouts["true coordinates"] = slide.pos
        with progress.task("Scoring", total=len(layouts)) as task:
            methods = {}
            for name, layout in layouts.items():
                methods[name] = evaluate_layout(
                    layout,
                    slide.pos,
                    ks=tuple(settings.ks),
                    num_pairs=settings.sample_pairs,
                    num_rows=settings.sample_rows,
                )
                task.advance(now=name)
            scored = e_geo_of_layouts(layouts, slide.pos, predictor.config.train.seed)
    for name, values in scored.items():
        methods[name] |= values
    metrics = {
        f"{key}_{suffix}": value
        for name, suffix in ENERGY_OF.items()
        for key, value in scored.get(name, {}).items()
    }
    metrics |= candidate_recall(prediction.candidates, slide.pos, k=15)
    # what no layout of the embedding can better by much: its own nearest cells
    found = candidate_recall(_nearest(prediction.candidates), slide.pos, _NEIGHBORS)
    metrics[f"embedding_hit@{_NEIGHBORS}"] = found[f"candidate_recall@{_NEIGHBORS}"]
    if prediction.uncertainty is not None:
        error = np.sqrt(square_errors(prediction.pos, slide.pos))
        # 0: the spread says nothing of the error; 1: it orders the cells by it
        found = spearmanr(prediction.uncertainty, error).statistic
        metrics["uncertainty_error_spearman"] = float(found)
        metrics |= calibration_metrics(prediction.uncertainty, error)
    if prediction.candidates.recall is not None:
        metrics["graph_recall"] = prediction.candidates.recall
    facts = predictor.meta["facts"]
    role = {entry["digest"]: entry["role"] for entry in facts["slides"]}.get(slide_digest(slide))
    return SlideEvaluation(
        slide=slide.name,
        pred=prediction.pos,
        true=slide.pos,
        methods=methods,
        variants=[name for name in FORMS if name in methods and name != ORACLE],
        oracles=[ORACLE],
        metrics=metrics,
        diagnostics=measures,
        trajectory=prediction.trajectory,
        focus=focus,
        uncertainty=prediction.uncertainty,
        training=[entry["name"] for entry in facts["slides"] if entry["role"] == "train"],
        validation=[entry["name"] for entry in facts["slides"] if entry["role"] == "val"],
        held_out=role is None,
        warnings=prediction.cautions,
        notes=[*slide.notes, *_unchanged(layouts)],
        settings=predictor.config.model_dump(mode="json"),
        versions=_versions(),
        absent={"uncertainty": "one noise seed only; pass --seeds 8"},
    )


def expression_plane(slide: Slide, genes) -> np.ndarray:
    """The first two principal components of a slide's own expression (n, 2), nothing learned.

    Args:
        slide: n cells with expression.
        genes: of the run, two at least.
    """
    expression = Expression.from_slide(slide, genes)
    axes, _ = principal_axes([expression], 2)
    return project(expression, axes)


def e_geo_of_layouts(layouts: dict[str, np.ndarray], pos, seed: int) -> dict[str, dict[str, float]]:
    """E_geo of layouts and its parts ``L_RW`` and ``L_stress``; 0 at the true coordinates.

    Exact up to 384 cells; beyond, on a sketch of the same reach, the walk by probe rows.

    Args:
        layouts: method to layout (n, 2).
        pos: true positions (n, 2).
        seed: of the sketch and the probe rows.
    """
    target = build_target(pos, seed=seed)
    out = {}
    for method, layout in layouts.items():
        generator = torch.Generator().manual_seed(seed)
        layout = torch.as_tensor(layout, dtype=torch.float64)
        values = e_geo(layout, target, generator=generator)
        names = {"E_geo": "e_geo", "L_RW": "l_rw", "L_stress": "l_stress"}
        # Rounding noise must not show as -0.000.
        out[method] = {name: round(float(values[key]), 12) + 0.0 for name, key in names.items()}
    return out


@torch.no_grad()
def recycle_records(
    model: IPALiteModel,
    h: Tensor,
    graph: NeighborTable,
    edge_bias: Tensor | None,
    start: Tensor | None = None,
) -> Iterator[RecycleRecord]:
    """Attention, logits and their terms by name, and learned numbers of every recycle in turn.

    Args:
        model: the model, in evaluation mode.
        h: embeddings (n, d).
        graph: candidates.
        edge_bias: bias (E,) or (E, heads), or None.
        start: layout (n, 2) the model begins from, or None.
    """
    inputs: list[tuple] = []
    handles = [
        block.register_forward_pre_hook(lambda module, given: inputs.append(given))
        for block in model.blocks
    ]
    try:
        model(h, graph, edge_bias=edge_bias, start=start)
    finally:
        for handle in handles:
            handle.remove()
    pair = model.pair_logits(h, graph)
    for recycle, (state, pos, *_) in enumerate(inputs):
        block = model.block(recycle)
        terms = model.edge_terms(recycle, edge_bias, pair) | block.logit_terms(
            state, pos, graph.edge_index, use_terms=model.uses_terms(recycle)
        )
        terms = {
            name: values.view(len(values), -1).expand(-1, block.heads)
            for name, values in terms.items()
        }
        logits = sum(terms.values())
        attention, _ = ops.segment_softmax(logits, graph.edge_index[1], graph.num_nodes)
        yield RecycleRecord(attention, logits, terms, model.measures(recycle, state))


@torch.no_grad()
def _variants(predictor: Predictor, h: Tensor, prediction: Prediction, pos) -> dict:
    """The model without its gate, without either of its last two steps, before its first recycle,
    and on true neighbours in place of candidates (which the last step would not know of)."""
    start = torch.from_numpy(prediction.trajectory[0]).to(h)
    known = target_graph(pos)
    if predictor.samples(len(h)):  # of the reach of candidates then
        settings = predictor.config.graph
        generator = torch.Generator().manual_seed(predictor.config.train.seed)
        known = pooled_candidates(
            torch.from_numpy(pos), settings.k, settings.pool, generator=generator
        )
    layouts = {ORACLE: predictor.model(h, known.to(h.device), start=start)}
    if prediction.gate_logits is not None:
        layout = predictor.model(h, prediction.graph, start=start)
        layout = predictor.expected(layout, h, prediction.doubt)
        layouts["no gate"] = predictor.refined(layout, h, prediction.nearest)
    recycled = torch.from_numpy(prediction.trajectory[-1]).to(h)
    if predictor.config.refine.expected or "expected" in predictor.spared:
        layouts["not expected"] = predictor.refined(recycled, h, prediction.nearest)
    if predictor.config.refine.steps or "steps" in predictor.spared:
        layouts["not refined"] = predictor.expected(recycled, h, prediction.doubt)
    layouts = {name: layout.double().cpu().numpy() for name, layout in layouts.items()}
    layouts["first layout"] = prediction.trajectory[0]
    return layouts


def _unchanged(layouts: Mapping[str, np.ndarray]) -> list[str]:
    """Says why a row of the model without a last step is the model's own."""
    steps = {"not expected": "distances as they are to be expected", "not refined": "the last step"}
    return [
        f'"{name}" is the model itself: {step} left this layout as it was, or was left out'
        for name, step in steps.items()
        if name in layouts and np.allclose(layouts[name], layouts["model"], atol=1e-9)
    ]


def _finished(predictor: Predictor, layouts: dict, h: Tensor, prediction: Prediction) -> dict:
    """What the last two steps alone are worth: baselines that are given them as the model is."""
    settings = predictor.config.refine
    if not (settings.expected or settings.steps or predictor.spared):
        return {}
    found, nearest = {}, prediction.nearest.to("cpu")
    h = h.cpu()
    for name in ("PCA", "MLP", "atlas"):
        if name not in layouts:
            continue
        doubt = None
        if name == "atlas":
            atlas = Atlas(h.size(1)).fit(_reference(predictor.run))
            doubt = relative_variance(*atlas.moments(h))
        pos = predictor.expected(torch.from_numpy(layouts[name]), h, doubt, always=True)
        found[f"{name}, refined"] = predictor.refined(pos, h, nearest, always=True).numpy()
    return found


def _near(predictor: Predictor, candidates: NeighborTable) -> NeighborTable:
    """The graph of a spectral layout: where the model looks far, the nearest candidates alone, of
    which such layouts are usually made."""
    return _nearest(candidates) if predictor.samples(candidates.num_nodes) else candidates


def _nearest(candidates: NeighborTable) -> NeighborTable:
    index = candidates.index[:, :_NEIGHBORS].contiguous()
    return NeighborTable(
        index, padded=candidates.padded, metric=candidates.metric, method=candidates.method
    )


def _attention(predictor, h, prediction, pos):
    """Diagnostics of every recycle, where four cells attend, and the last attention (E, heads).

    What attention and gate find is asked of a pass over the nearest candidates: among those of a
    random sample there are few neighbours to find.
    """
    graph, wide = prediction.graph, prediction.candidates
    _, logits = predictor.edge_bias(h, wide)
    last: list[Tensor] = []
    records: Iterator[RecycleRecord] = iter(())
    start = torch.from_numpy(prediction.trajectory[0]).to(h)

    def attend(table: NeighborTable) -> Iterator[RecycleRecord]:
        bias, _ = predictor.edge_bias(h, table)
        return recycle_records(predictor.model, h, table, bias, start)

    if graph.num_edges <= _ATTENTION_EDGES:
        for record in attend(graph):
            last[:] = [record.attention]
    if wide.num_edges <= _ATTENTION_EDGES:
        records = attend(wide)
    else:
        logger.info("%d edges: attention diagnostics are left out", wide.num_edges)
    trajectory = [torch.from_numpy(step) for step in prediction.trajectory]
    measures = diagnose(
        wide,
        records,
        pos=pos,
        trajectory=trajectory,
        gate_logits=logits,
        final=prediction.pos,
        seed=predictor.config.train.seed,
    )
    if not last or not graph.k:
        return measures, None, None
    mean = graph.to_table(last[0].mean(-1)).cpu().numpy()
    index = graph.index.cpu().numpy()
    focus = [
        AttentionFocus(cell, index[cell][index[cell] >= 0], mean[cell][index[cell] >= 0])
        for cell in _spread_cells(pos)
    ]
    return measures, focus, last[0].cpu()


def _spread_cells(pos: np.ndarray) -> list[int]:
    """Four cells in different parts of the tissue: the middle one, and three far apart."""
    centred = pos - pos.mean(0)
    chosen = [int(np.square(centred).sum(1).argmin())]
    # Half-way out, so that a cell has neighbours on all sides.
    radius = np.sqrt(np.square(centred).sum(1))
    inner = np.flatnonzero(radius <= np.quantile(radius, 0.6))
    while len(chosen) < min(4, len(inner)):
        gap = np.min([np.square(pos[inner] - pos[c]).sum(1) for c in chosen], axis=0)
        chosen.append(int(inner[gap.argmax()]))
    return chosen


def spatial_gene(slide: Slide, genes, most: int = 300) -> tuple[str, np.ndarray] | None:
    """The gene whose expression is most alike among spatial neighbours (Moran's I).

    Args:
        slide: n cells with positions.
        genes: genes of the run, most variable first; the slide's own if None.
        most: genes looked at.

    Returns:
        Its name and log-normalised expression (n,), or None without expression.
    """
    if slide.expression is None:
        return None
    own = {str(g) for g in slide.genes}
    names = [g for g in (genes or slide.genes) if str(g) in own][:most]
    if not names:
        return None
    matrix = normalized_expression(slide, names)
    neighbors = knn(torch.from_numpy(slide.pos), 8).index.numpy()
    best = int(morans_i(matrix, neighbors).argmax())
    return str(names[best]), matrix[:, [best]].toarray().ravel()


def _reference(run: Path) -> list[tuple[Tensor, Tensor]] | None:
    """Embeddings and positions of the training slides, as the trainer left them."""
    path = run / REFERENCE
    if not path.is_file():
        return None
    tensors = load_file(path)
    count = len({name.split(".")[0] for name in tensors})
    return [(tensors[f"{i}.h"], tensors[f"{i}.pos"]) for i in range(count)]


def _history(run: Path) -> list[dict] | None:
    path = run / HISTORY
    return read_history(path) if path.is_file() else None


def _versions() -> dict[str, str]:
    found = {"ipar_sparse": __version__, "python": platform.python_version()}
    for name in ("torch", "torch-geometric", "numpy", "scipy", "scikit-learn", "anndata"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
