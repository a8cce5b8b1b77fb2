"""One tissue slide in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import sparse


@dataclass
class Slide:
    """Expression of n cells (or spots), with positions where they were measured.

    Args:
        name: what reports and figures call the slide.
        expression: (n, G) float32 CSR of raw counts, or log-normalised values if `normalized`;
            None when the cells come with an embedding alone.
        genes: (G,) unique gene names.
        cell_names: (n,) unique cell names.
        pos: (n, 2) float64 positions in the user's units, or None for dissociated cells.
        embedding: (n, d) float32 embedding the user brought, or None.
        normalized: True if `expression` is used as it is.
        empty: (n,) bool, True where a cell has no counts.
        obs: a few columns of per-cell annotation, each (n,).
        rows: (n,) int64 row of each cell in the file it was read from; 0..n-1 by default.
        notes: what was recognised in the input and should be told to the user, one line each.
        path: file it was read from, None where it was not.
    """

    name: str
    expression: sparse.csr_matrix | None
    genes: np.ndarray
    cell_names: np.ndarray
    pos: np.ndarray | None = None
    embedding: np.ndarray | None = None
    normalized: bool = False
    empty: np.ndarray | None = None
    obs: dict[str, np.ndarray] = field(default_factory=dict)
    rows: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)
    path: str | None = None

    def __post_init__(self):
        n = len(self.cell_names)
        if self.empty is None:
            self.empty = (
                np.zeros(n, dtype=bool)
                if self.expression is None
                else np.asarray(abs(self.expression).sum(axis=1)).ravel() == 0
            )
        if self.rows is None:
            self.rows = np.arange(n)
        expected = {
            "expression": (n, len(self.genes)),
            "pos": (n, 2),
            "empty": (n,),
            "rows": (n,),
        }
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"{name} has shape {value.shape}, expected {shape}")
        if self.embedding is not None and (self.embedding.ndim != 2 or len(self.embedding) != n):
            raise ValueError(f"embedding has shape {self.embedding.shape}, expected ({n}, d)")

    @property
    def num_cells(self) -> int:
        return len(self.cell_names)

    def take(self, cells: np.ndarray) -> Slide:
        """Some of its cells as a slide of their own.

        Args:
            cells: (m,) which, in the order they are to have.
        """

        def of(values):
            return None if values is None else values[cells]

        return replace(
            self,
            expression=of(self.expression),
            cell_names=self.cell_names[cells],
            pos=of(self.pos),
            embedding=of(self.embedding),
            empty=self.empty[cells],
            obs={name: values[cells] for name, values in self.obs.items()},
            rows=self.rows[cells],
        )

    def __repr__(self):
        kind = "log-normalised" if self.normalized else "counts"
        parts = [f"{self.num_cells} cells"]
        if self.expression is not None:
            parts.append(f"{len(self.genes)} genes ({kind})")
        if self.embedding is not None:
            parts.append(f"embedding of {self.embedding.shape[1]}")
        parts.append("with positions" if self.pos is not None else "without positions")
        return f"Slide({self.name!r}, {', '.join(parts)})"


def slide_digest(slide: Slide) -> str:
    """A digest of a slide's cells and positions, by which it is known under any file name."""
    digest = hashlib.sha256("\0".join(map(str, slide.cell_names)).encode())
    digest.update(np.ascontiguousarray(slide.pos, dtype=np.float64).tobytes())
    return digest.hexdigest()[:16]
