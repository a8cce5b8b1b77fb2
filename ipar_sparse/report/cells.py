"""What a page shows of each cell beside its place: columns, and the genes that tell most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import sparse

from ..data.anndata_store import suggest
from ..data.expression import morans_i, normalized_expression
from ..data.slide import Slide
from ..errors import UserError
from ..graph import knn

INFORMATIVE = 50  # genes that a page shows unasked
_LOOKED_AT = 300  # genes of the run, most variable first, that these are chosen from
_SAMPLED = 20_000  # cells that Moran's I is taken over
_GROUPS = 60  # labels of a column that a table by label can still show


@dataclass
class CellTable:
    """Values of n cells by which a page can colour them.

    Args:
        names: of the cells (n,).
        columns: labels or numbers (n,) by name.
        expression: log-normalised expression (n, G) of the genes shown.
        genes: their names; those that were asked for come first, then the most informative.
        asked: how many of them were asked for.
    """

    names: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    expression: sparse.csr_matrix | None = None
    genes: Sequence[str] = ()
    asked: int = 0

    def gene(self, name: str) -> np.ndarray:
        """Log-normalised expression (n,) of one of the genes."""
        return self.expression[:, [list(self.genes).index(name)]].toarray().ravel()

    def grouping(self) -> str | None:
        """The column of labels that a table by label is made of: the first that has a few."""
        for name, values in self.columns.items():
            values = np.asarray(values)
            if values.dtype.kind not in "fiub" and 2 <= len(set(values)) <= _GROUPS:
                return name
        return None


def cell_table(
    slide: Slide,
    pos: np.ndarray,
    genes: Sequence[str] | None = None,
    asked: Sequence[str] = (),
    more: Mapping[str, np.ndarray] | None = None,
) -> CellTable:
    """What a page shows of the cells of a slide.

    Args:
        slide: n cells.
        pos: positions (n, 2), measured or predicted, on which genes are to tell places apart.
        genes: genes of the run, most variable first; the slide's own if None.
        asked: genes that are shown in any case.
        more: further columns, each (n,).

    Raises:
        UserError: the slide lacks a gene that was asked for.
    """
    check_genes([slide], asked)
    columns = {**slide.obs, **(more or {})}
    if slide.expression is None:
        return CellTable(slide.cell_names, columns)
    own = {str(gene) for gene in slide.genes}
    asked = list(dict.fromkeys(asked))
    known = [str(gene) for gene in (slide.genes if genes is None else genes) if str(gene) in own]
    others = [gene for gene in known if gene not in asked][:_LOOKED_AT]
    matrix = normalized_expression(slide, [*asked, *others])
    ranks = np.argsort(-pattern(matrix[:, len(asked) :], pos), kind="stable")[:INFORMATIVE]
    chosen = [*range(len(asked)), *(len(asked) + ranks)]
    names = [*asked, *(others[rank] for rank in ranks)]
    return CellTable(slide.cell_names, columns, matrix[:, chosen], names, len(asked))


def check_genes(slides: Sequence[Slide], asked: Sequence[str]) -> None:
    """Refuses genes that a slide lacks.

    Raises:
        UserError: it lacks one.
    """
    for slide in slides:
        own = dict.fromkeys(map(str, slide.genes))
        for gene in asked:
            if gene not in own or slide.expression is None:
                raise UserError(
                    f"{slide.name} has no gene {gene!r} to colour by; {suggest(gene, own)}"
                )


def pattern(matrix: sparse.csr_matrix, pos: np.ndarray) -> np.ndarray:
    """How alike the expression of each gene is among neighbours on a map (G,): Moran's I.

    Args:
        matrix: log-normalised expression (n, G).
        pos: positions (n, 2).
    """
    if not matrix.shape[1] or len(pos) < 3:
        return np.zeros(matrix.shape[1])
    neighbors = knn(torch.from_numpy(np.ascontiguousarray(pos, dtype=float)), 8).index.numpy()
    rows = None
    if len(pos) > _SAMPLED:
        rows = np.sort(np.random.default_rng(0).choice(len(pos), _SAMPLED, replace=False))
    return morans_i(matrix, neighbors, rows)
