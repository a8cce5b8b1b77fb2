"""From the expression of a slide to the embedding of its cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..data.expression import Expression
from ..data.slide import Slide
from ..errors import UserError
from ..estimators.components import project
from ..graph import knn
from ..nn import SharedEncoder

_ROWS = 8192  # cells of dense expression at once


def normalize_expression(slide: Slide, genes: Sequence[str], encoder: SharedEncoder) -> Expression:
    """Expression as the encoder weighs it, before cells are averaged with their neighbours.

    Args:
        slide: n cells with expression.
        genes: G genes of the encoder.
        encoder: carries the total that counts are scaled to, and the weight of each gene.
    """
    if encoder.gene_weight is None:
        return Expression.from_slide(slide, genes)
    weight = encoder.gene_weight.cpu().numpy()
    return Expression.from_slide(slide, genes, float(encoder.target_sum), weight)


def read_expression(slide: Slide, genes: Sequence[str], encoder: SharedEncoder) -> Expression:
    """A slide's expression as the encoder takes it, each cell averaged with its neighbours.

    Args:
        slide: n cells with expression.
        genes: G genes of the encoder.
        encoder: says how genes are weighted, how many nearest cells a cell is averaged with, and
            in which components nearest is meant.

    Raises:
        UserError: if the slide has none of the genes, or no expression.
    """
    expression = normalize_expression(slide, genes, encoder)
    if not encoder.smooth or expression.shape[0] < 2:
        return expression
    place = project(expression, encoder.axes.cpu())
    neighbors = knn(torch.from_numpy(place).to(encoder.axes.device), encoder.smooth).index
    return expression.smoothed(neighbors.cpu().numpy())


@torch.no_grad()
def encode(encoder: nn.Module, expression: Expression, device: torch.device) -> Tensor:
    """Embeddings (n, d) on the CPU, computed in blocks of rows in evaluation mode.

    Args:
        encoder: genes to embedding.
        expression: n cells.
        device: where the encoder lies.
    """
    training = encoder.training
    encoder.eval()
    n = expression.shape[0]
    blocks = [
        encoder(torch.from_numpy(expression.rows(np.arange(a, min(a + _ROWS, n)))).to(device)).cpu()
        for a in range(0, n, _ROWS)
    ]
    encoder.train(training)
    return torch.cat(blocks)


def embed_slide(
    slide: Slide, encoder: SharedEncoder | None, genes: Sequence[str] | None, device: torch.device
) -> Tensor:
    """Embeddings (n, d) of a slide before scaling: the encoder's, or those the user brought.

    Raises:
        UserError: if the run uses the user's embedding and the slide has none.
    """
    if encoder is not None and genes is not None:
        if slide.expression is None:
            raise UserError(f"{slide.name}: no expression to embed; give X or --layer")
        return encode(encoder, read_expression(slide, genes, encoder), device)
    if slide.embedding is None:
        raise UserError(f"{slide.name}: this run uses an embedding; give --embedding obsm:KEY")
    return torch.from_numpy(slide.embedding).float()
