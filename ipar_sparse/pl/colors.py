"""What cells are coloured by: places, numbers or labels, from arrays or from AnnData."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.colors import is_color_like, to_rgb
from scipy.sparse import issparse

from ..data.anndata_store import suggest
from ..data.keys import Keys
from ..errors import UserError
from ..geometry.neighborhoods import as_layout
from .oklab import color_distances, to_oklab
from .style import CYCLE, FAINT

if TYPE_CHECKING:
    from anndata import AnnData

Palette = Mapping[str, Any] | Sequence[Any] | None
"""Colours of labels: by label, or in the order of the labels."""


@dataclass
class Coloring:
    """How n cells are coloured.

    Args:
        values: RGB (n, 3), or numbers (n,) for a colour bar.
        labels: names and RGB of the groups that RGB stands for, for a legend.
        name: of what is shown, for a title or the colour bar.
    """

    values: np.ndarray
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    name: str | None = None


def color_of(values: Any, palette: Palette = None, name: str | None = None) -> Coloring:
    """The colouring by an array.

    Args:
        values: RGB (n, 3) in [0, 1], numbers (n,), or labels (n,). Booleans are labels.
        palette: colours of labels; a palette that colour-blind readers can tell apart if left out.
        name: of what is shown.

    Raises:
        ValueError: if the array has another shape.
    """
    if isinstance(values, pd.Series | pd.Index) and values.dtype.kind in "fiu":
        values = values.to_numpy(dtype=float, na_value=np.nan)
    if not isinstance(values, pd.Series | pd.Categorical):
        values = np.asarray(values)
        if values.ndim == 2 and values.shape[1] in (3, 4):
            return Coloring(values[:, :3].astype(float), name=name)
        if values.ndim != 1:
            raise ValueError(f"colours have shape {values.shape}, expected (n,) or (n, 3)")
        if values.dtype.kind in "fiu":
            return Coloring(values.astype(float), name=name)
    values = as_labels(values)
    names = [str(label) for label in values.categories]
    rgb = _label_colors(names, palette)
    shown = np.vstack([rgb, to_rgb(FAINT)])[values.codes]  # code -1 is no label
    present = np.unique(values.codes[values.codes >= 0])
    return Coloring(shown, {names[code]: rgb[code] for code in present}, name)


def as_labels(values: Any) -> pd.Categorical:
    """Labels (n,), some of which may be missing: as text, but for those of a categorical."""
    if not isinstance(values.dtype, pd.CategoricalDtype):
        known = pd.Series(values)
        values = known.where(known.isna(), known.astype(str))
    return pd.Categorical(values)


def value_range(values: np.ndarray) -> tuple[float, float]:
    """The values between which colours change: their 1st and 99th percentile.

    Least and most where these are the same, as of a gene that fewer than one cell in a hundred
    expresses; 0 and 0 without a finite value.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return 0.0, 0.0
    low, high = np.quantile(known, [0.01, 0.99])
    if high <= low:
        low, high = known.min(), known.max()
    return float(low), float(high)


def color_by_key(
    adata: AnnData, key: str, *, layer: str | None = None, palette: Palette = None
) -> Coloring:
    """The colouring by an obs column or a gene.

    Labels take their colours from uns["<key>_colors"], where scanpy keeps them.

    Args:
        adata: n cells.
        key: obs column, else gene.
        layer: of the gene's expression; X if left out.
        palette: in place of the colours in uns.

    Raises:
        UserError: there is no such column, gene or layer.
    """
    if key in adata.obs:
        stored = adata.uns.get(f"{key}_colors")
        column = adata.obs[key]
        if palette is None and stored is not None and _fits(stored, column):
            palette = list(stored)
        return color_of(column, palette, key)
    if key not in adata.var_names:
        known = suggest(key, [*adata.obs.columns, *adata.var_names])
        raise UserError(f"no obs column and no gene is called {key!r}; {known}")
    if layer is not None and layer not in adata.layers:
        raise UserError(f"no layer is called {layer!r}; {suggest(layer, adata.layers)}")
    gene = adata[:, [key]]
    values = gene.X if layer is None else gene.layers[layer]
    return color_of(values.toarray().ravel() if issparse(values) else np.ravel(values), name=key)


def positions_of(adata: AnnData, basis: str) -> np.ndarray:
    """Positions (n, 2) in obsm, under ``basis`` or ``X_basis``.

    Raises:
        UserError: there are none.
    """
    return as_layout(_stored(adata, basis))


def with_position(adata: AnnData, basis: str) -> np.ndarray:
    """Which cells have a position (n,); those without information have NaN, and foreign ones."""
    return np.isfinite(_stored(adata, basis)).all(axis=1)


def _stored(adata: AnnData, basis: str) -> np.ndarray:
    for key in (f"X_{basis}", basis):
        if key in adata.obsm:
            return np.asarray(adata.obsm[key])[:, :2]
    there = ", ".join(adata.obsm) or "nothing"
    hint = "call predict() first" if f"X_{basis}" == Keys.PREDICTION else f"there is {there}"
    raise UserError(f'no obsm["X_{basis}"] to draw; {hint}')


@lru_cache(maxsize=64)
def label_palette(count: int) -> np.ndarray:
    """RGB (count, 3) that stay apart for colour-blind readers, as far as so many can.

    Okabe and Ito's colours come first. Each further one is that colour of a grid which is farthest
    from all before it, see :func:`~ipar_sparse.pl.oklab.color_distances`.
    """
    chosen = np.array([to_rgb(color) for color in CYCLE])
    if count > len(chosen):
        steps = np.linspace(0, 1, 9)
        grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
        lightness = to_oklab(grid)[:, 0]
        grid = grid[(lightness > 0.3) & (lightness < 0.9)]  # neither lost on white nor black
        nearest = color_distances(grid, chosen).min(1)
        while len(chosen) < count:
            new = grid[[nearest.argmax()]]
            chosen = np.vstack([chosen, new])
            nearest = np.minimum(nearest, color_distances(grid, new)[:, 0])
    return chosen[:count]


def _label_colors(names: Sequence[str], palette: Palette) -> np.ndarray:
    if palette is None:
        return label_palette(len(names))
    if isinstance(palette, Mapping):
        if missing := [name for name in names if name not in palette]:
            raise UserError(f"the palette has no colour for {missing[0]!r}")
        palette = [palette[name] for name in names]
    if len(palette) < len(names):
        raise UserError(f"{len(names)} labels, but {len(palette)} colours in the palette")
    return np.array([to_rgb(color) for color in palette[: len(names)]]).reshape(-1, 3)


def _fits(colors: Any, column: pd.Series) -> bool:
    """Whether stored colours are those of a column's labels; of numbers they are not used."""
    count = len(pd.Categorical(column).categories)
    return len(colors) >= count and all(is_color_like(color) for color in colors)
