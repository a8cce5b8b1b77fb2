"""From the expression of a slide to the embedding of its cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..data.expression import Expression
from ..data.resident import BLOCK_ROWS, ResidentExpression, resident
from ..data.slide import Slide
from ..distributed import all_rows, rows_of
from ..errors import UserError
from ..estimators.components import project
from ..graph import knn
from ..nn import SharedEncoder


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


def read_expression(
    slide: Slide,
    genes: Sequence[str],
    encoder: SharedEncoder,
    expression: Expression | None = None,
) -> Expression:
    """A slide's expression as the encoder takes it, each cell averaged with its neighbours.

    Args:
        slide: n cells with expression.
        genes: G genes of the encoder.
        encoder: says how genes are weighted, how many nearest cells a cell is averaged with, and
            in which components nearest is meant.
        expression: the result of :func:`normalize_expression`, if there is one already.

    Raises:
        UserError: if the slide has none of the genes, or no expression.
    """
    if expression is None:
        expression = normalize_expression(slide, genes, encoder)
    if not encoder.smooth or expression.shape[0] < 2:
        return expression
    axes = encoder.axes
    if axes.is_cuda:
        there = resident(expression, axes.device)
        place = by_rows(there, lambda rows: rows @ axes)
    else:
        place = torch.from_numpy(project(expression, axes))
    if not bool(torch.as_tensor(place).isfinite().all()):
        raise UserError(
            f"{slide.name}: its values are too large to be embedded; check them, or say what they "
            "are by --counts or --normalized"
        )
    return expression.smoothed(knn(place, encoder.smooth).index.cpu().numpy())


@torch.no_grad()
def encode(encoder: nn.Module, expression: Expression, device: torch.device) -> Tensor:
    """Embeddings (n, d) on the device, computed in blocks of rows in evaluation mode.

    Args:
        encoder: genes to embedding.
        expression: n cells.
        device: where the encoder lies.
    """
    training = encoder.training
    encoder.eval()
    found = by_rows(resident(expression, device), encoder)
    encoder.train(training)
    return found


def by_rows(expression: ResidentExpression, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of the rows of an expression (n, ...), computed in blocks."""
    n = expression.shape[0]
    own = torch.arange(n, device=expression.device)[rows_of(n)]
    parts = [function(expression.rows(part)) for part in own.split(BLOCK_ROWS)]
    return all_rows(torch.cat(parts), n)


def embed_slide(
    slide: Slide,
    encoder: SharedEncoder | None,
    genes: Sequence[str] | None,
    device: torch.device,
    read: Expression | None = None,
) -> Tensor:
    """Embeddings (n, d) of a slide before scaling, on the device: the encoder's or the user's.

    Args:
        slide: n cells.
        encoder: on the device; None where users bring their embedding.
        genes: of the encoder.
        device: where embeddings are wanted.
        read: the slide's expression as :func:`read_expression` gives it, if it is known.

    Raises:
        UserError: if the run uses the user's embedding and the slide has none.
    """
    if encoder is not None and genes is not None:
        if slide.expression is None:
            raise UserError(f"{slide.name}: no expression to embed; give X or --layer")
        read = read_expression(slide, genes, encoder) if read is None else read
        return encode(encoder, read, device)
    if slide.embedding is None:
        raise UserError(f"{slide.name}: this run uses an embedding; give --embedding obsm:KEY")
    return torch.from_numpy(slide.embedding).float().to(device)
