"""What the attention of a model does on a slide whose positions are known."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..graph import NeighborTable
from ..inference import steps
from ..inference.predictor import Prediction, Predictor
from ..metrics.diagnostics import AttentionFocus, RecycleRecord, diagnose
from ..nn import IPALiteModel

logger = logging.getLogger(__name__)

_MAX_EDGES = 3_000_000  # the attention (E, heads) of one recycle is held in memory
_FOCUS_CELLS = 4
_FOCUS_QUANTILE = 0.6  # of distances from the centre: such a cell has neighbours on all sides


@dataclass
class AttentionDiagnostics:
    """Diagnostics of graph, gate, attention and layout on one slide.

    Args:
        measures: of :func:`~ipar_sparse.metrics.diagnostics.diagnose`.
        focus: where single cells attend; None without recycles or on too many edges.
        weights: attention (E, heads) of the last recycle on the graph that the prediction
            attended to; None as ``focus``.
    """

    measures: dict[str, float]
    focus: list[AttentionFocus] | None = None
    weights: Tensor | None = None


@torch.no_grad()
def attention_diagnostics(
    predictor: Predictor, h: Tensor, prediction: Prediction, pos: np.ndarray
) -> AttentionDiagnostics:
    """Diagnostics of every recycle, and the attention of the last one.

    Attention and gate are measured on the nearest candidates. On a large slide the prediction
    attends to a random sample of cells, and few true neighbours of a cell are in it.

    Args:
        predictor: the trained run.
        h: embeddings (n, d) on the predictor's device.
        prediction: of the same cells.
        pos: their measured positions (n, 2).
    """
    candidates, graph = prediction.candidates, prediction.graph
    recycled = len(prediction.trajectory) > 1
    initial = torch.as_tensor(prediction.trajectory[0]).to(h)
    records: Iterable[RecycleRecord] = ()
    logits = weights = None

    def attend(table: NeighborTable, bias: Tensor | None) -> Iterator[RecycleRecord]:
        return recycle_records(predictor.model, h, table, bias, initial)

    if recycled and graph.num_edges <= _MAX_EDGES:
        bias, _ = steps.gate_bias(predictor.gate, h, graph, predictor.config)
        for record in attend(graph, bias):
            weights = record.attention
    if recycled:
        bias, logits = steps.gate_bias(predictor.gate, h, candidates, predictor.config)
        if candidates.num_edges <= _MAX_EDGES:
            records = attend(candidates, bias)
        else:
            logger.info("%d edges: attention diagnostics are left out", candidates.num_edges)
    measures = diagnose(
        candidates,
        records,
        pos=pos,
        trajectory=[torch.as_tensor(layout) for layout in prediction.trajectory],
        gate_logits=logits,
        final=prediction.pos,
        seed=predictor.config.train.seed,
    )
    if weights is None or not graph.k:
        return AttentionDiagnostics(measures)
    return AttentionDiagnostics(measures, _focus(graph, weights, pos), weights.cpu())


@torch.no_grad()
def recycle_records(
    model: IPALiteModel,
    h: Tensor,
    graph: NeighborTable,
    edge_bias: Tensor | None,
    initial: Tensor | None = None,
) -> Iterator[RecycleRecord]:
    """Attention, logits with their terms, and learned scalars of every recycle in turn.

    Args:
        model: the model, in evaluation mode.
        h: embeddings (n, d).
        graph: what it attends to, E edges.
        edge_bias: bias (E,) or (E, heads), or None.
        initial: layout (n, 2) that the recycles begin from; the model's own if None.
    """
    inputs: list[tuple] = []
    handles = [
        block.register_forward_pre_hook(lambda module, given: inputs.append(given))
        for block in model.blocks
    ]
    try:
        model(h, graph, edge_bias=edge_bias, initial=initial)
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
        yield RecycleRecord(attention, logits, terms, model.learned_scalars(recycle, state))


def _focus(graph: NeighborTable, weights: Tensor, pos: np.ndarray) -> list[AttentionFocus]:
    mean = graph.to_table(weights.mean(-1)).cpu().numpy()
    index = graph.index.cpu().numpy()
    return [
        AttentionFocus(cell, index[cell][index[cell] >= 0], mean[cell][index[cell] >= 0])
        for cell in _spread_cells(pos)
    ]


def _spread_cells(pos: np.ndarray) -> list[int]:
    """Cells in different parts of the tissue: the central one, then those farthest apart."""
    square = np.square(pos - pos.mean(0)).sum(1)
    chosen = [int(square.argmin())]
    inner = np.flatnonzero(square <= np.quantile(square, _FOCUS_QUANTILE))
    while len(chosen) < min(_FOCUS_CELLS, len(inner)):
        gap = np.min([np.square(pos[inner] - pos[cell]).sum(1) for cell in chosen], axis=0)
        chosen.append(int(inner[gap.argmax()]))
    return chosen
