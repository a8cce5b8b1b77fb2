"""One tissue slide in memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .notes import Warned

if TYPE_CHECKING:
    from scipy import sparse

    from .values import Values


@dataclass
class Slide:
    """Expression of n cells (or spots) and, where measured, their positions.

    Args:
        name: what reports and figures call the slide.
        expression: raw counts, or log-normalised values if `normalized`, float32 CSR (n, G);
            None for cells that come with an embedding alone.
        genes: unique gene names (G,).
        cell_names: unique cell names (n,).
        pos: positions (n, 2), float64, in the user's units; None for dissociated cells.
        embedding: embedding from the user's file (n, d), float32, or None.
        normalized: whether `expression` is log-normalised already.
        values: kind of values that the file held.
        totals: counts of each cell that it is scaled by (n,); row sums if left out.
        gene_columns: other names of the genes, each (G,).
        empty: True for cells without information (n,); those without counts if left out.
        obs: a few columns of annotation, each (n,).
        rows: row of each cell in its source (n,), int64; 0 to n - 1 if left out.
        notes: lines for the user about what was recognised in the input; `Warned` if it may make
            a result wrong.
        path: file that the slide was read from, and what was picked of it; None for a slide made
            in memory.
        digest, signatures, places: of the slide, its cells and where they lie, as they were
            read; see :mod:`ipar_sparse.data.copies`.
        fits: folder of the run whose terms the slide is in.
        holder: the rank that holds the expression, where ranks divide slides; see
            :mod:`ipar_sparse.data.held`.

    Raises:
        ValueError: if a shape does not fit the number of cells and genes.
    """

    name: str
    expression: sparse.csr_matrix | None
    genes: np.ndarray
    cell_names: np.ndarray
    pos: np.ndarray | None = None
    embedding: np.ndarray | None = None
    normalized: bool = False
    values: Values | None = None
    totals: np.ndarray | None = None
    gene_columns: dict[str, np.ndarray] = field(default_factory=dict)
    empty: np.ndarray = None  # never None once made
    obs: dict[str, np.ndarray] = field(default_factory=dict)
    rows: np.ndarray = None
    notes: list[str] = field(default_factory=list)
    path: str | None = None
    digest: str | None = None
    signatures: np.ndarray | None = None
    places: np.ndarray | None = None
    fits: str | None = None
    holder: int | None = None

    def __post_init__(self) -> None:
        n = len(self.cell_names)
        if self.empty is None:
            self.empty = (
                np.zeros(n, dtype=bool)
                if self.expression is None
                else np.asarray(abs(self.expression).sum(axis=1)).ravel() == 0
            )
        if self.rows is None:
            self.rows = np.arange(n)
        expected: dict[str, tuple[int, ...]] = {"expression": (n, len(self.genes)), "pos": (n, 2)}
        expected |= dict.fromkeys(("empty", "rows", "totals"), (n,))
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"{name} has shape {value.shape}, expected {shape}")
        if self.embedding is not None and (self.embedding.ndim != 2 or len(self.embedding) != n):
            raise ValueError(f"embedding has shape {self.embedding.shape}, expected ({n}, d)")

    @property
    def num_cells(self) -> int:
        """Number of cells n."""
        return len(self.cell_names)

    def take(self, cells: np.ndarray) -> Slide:
        """A slide of some of the cells.

        Args:
            cells: row numbers (m,), in the order of the new slide.
        """

        from .on_disk import take_rows

        def of(values: Any) -> Any:
            return None if values is None else values[cells]

        return replace(
            self,
            expression=None if self.expression is None else take_rows(self.expression, cells),
            cell_names=self.cell_names[cells],
            pos=of(self.pos),
            embedding=of(self.embedding),
            totals=of(self.totals),
            empty=self.empty[cells],
            obs={name: values[cells] for name, values in self.obs.items()},
            rows=self.rows[cells],
        )

    def with_genes(self, expression: sparse.csr_matrix, genes: np.ndarray) -> Slide:
        """The slide with other expression (n, H) of other genes (H,), and the same cells."""
        return replace(self, expression=expression, genes=genes, gene_columns={})

    def __repr__(self) -> str:
        kind = "log-normalised" if self.normalized else "counts"
        parts = [f"{self.num_cells} cells"]
        if self.expression is not None:
            parts.append(f"{len(self.genes)} genes ({kind})")
        if self.embedding is not None:
            parts.append(f"embedding of {self.embedding.shape[1]}")
        parts.append("with positions" if self.pos is not None else "without positions")
        return f"Slide({self.name!r}, {', '.join(parts)})"


def in_file_order(
    slides: Sequence[Slide], values: Sequence[np.ndarray], fill: Any = np.nan
) -> np.ndarray:
    """Per-slide arrays as one array, in the row order of the file the slides were read from.

    Args:
        slides: all slides of one file, as `read_slides` returned them.
        values: one array (n_s, ...) per slide.
        fill: value of rows that belong to no slide.

    Returns:
        (n_file, ...) array.
    """
    total = 1 + max(int(slide.rows.max()) for slide in slides if slide.num_cells)
    first = np.asarray(values[0])
    covered = sum(slide.num_cells for slide in slides) == total
    if len(slides) == 1 and covered and np.array_equal(slides[0].rows, np.arange(total)):
        return first
    dtype = first.dtype if covered else np.result_type(first.dtype, type(fill))
    out = np.full((total, *first.shape[1:]), fill if not covered else 0, dtype=dtype)
    for slide, value in zip(slides, values, strict=True):
        out[slide.rows] = value
    return out


def log_notes(slide: Slide, logger: logging.Logger, first: int = 0) -> None:
    """Logs the notes of a slide from the first that is wanted; those that warn as warnings."""
    for note in slide.notes[first:]:
        level = logging.WARNING if isinstance(note, Warned) else logging.INFO
        logger.log(level, "%s: %s", slide.name, note)
