"""Cells assigned to the spots of a training slide, and what is expected at each spot."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor

from ..data.keys import Keys
from ..data.slide import Slide, in_file_order
from ..errors import UserError
from ..estimators.atlas import nearest_in_lattice
from ..progress import track
from .adapting import shares_of
from .placing import Additions
from .predictor import Predictor
from .reference import Reference

MOST_SPOTS = 100
"""Spots that a cell is assigned to, at most."""
_REACH = 0.2  # RMS radii: what lies farther from all spots is not on the reference
_VALUES = 1 << 23  # of cells times spots at once
_BLOCK = 1024  # cells at once, at most


def map_to_spots(
    predictor: Predictor, slides: Sequence[Slide], added: Additions, reference: Reference
) -> AnnData:
    r"""Assigns cells to the spots of a reference, each cell to several.

    .. math::
        M_{ij} = \tfrac12\, p(\mathbf{x}_j \mid \mathbf{h}_i)
        + \tfrac{1}{2k} [\, j \in N_k(\mathbf{h}_i)]

    with the posterior of the atlas over the places of the spots, and the k = 15 spots nearest in
    the embedding. Where the adapter took part in placing the cells, it is averaged with the
    adapter's posterior. The largest 100 entries of a cell are kept, and scaled to sum 1.

    Args:
        predictor: the trained run.
        slides: all slides of the file or object that holds n cells.
        added: what :func:`~ipar_sparse.inference.placing.place_cells` gave for them, with the same
            reference. Cells without a position in its frame are assigned to no spot.
        reference: with its slide, of m spots.

    Returns:
        AnnData (n, m) with X sparse, rows summing to 1, or to 0 for cells without a position. obs
        has the cells with their columns, var the spots with theirs, varm["spatial"] (m, 2) their
        measured positions.
    """
    spots = predictor.conform(reference.slide)
    used = np.flatnonzero(~np.asarray(spots.empty))
    known = torch.from_numpy(predictor.embed(spots)).to(predictor.device)
    back = reference.similarity
    places = (spots.pos[used] - back.translation) @ back.rotation.T / back.scale
    rows, columns, values = [], [], []
    for slide in track(slides, "Mapping onto spots"):
        order = np.argsort(slide.rows)
        order = order[np.isfinite(added.embedding[slide.rows[order]]).all(1)]
        filled = slide.rows[order]
        shown = np.isfinite(added.obsm[Keys.REFERENCE][filled]).all(1)
        h = torch.from_numpy(added.embedding[filled]).float().to(predictor.device)
        taken = slide.take(order) if slide.name in added.uns["adapted"] else None
        blocks = _assigned(predictor, h, known, torch.from_numpy(places), taken)
        start = 0
        for weight, number in blocks:
            part = shown[start : start + len(weight)]
            row = np.repeat(filled[start : start + len(weight)][part], weight.shape[1])
            kept = weight[part].ravel() > 0
            rows.append(row[kept])
            columns.append(used[number[part].ravel()[kept]])
            values.append(weight[part].ravel()[kept])
            start += len(weight)
    shape = len(added.embedding), spots.num_cells
    data, row, column = (np.concatenate(one) for one in (values, rows, columns))
    return AnnData(
        X=sparse.csr_matrix((data.astype(np.float32), (row, column)), shape=shape),
        obs=_frame(slides, len(added.embedding)),
        var=_frame([spots], spots.num_cells),
        varm={Keys.SPATIAL: spots.pos},
        uns={Keys.UNS: {"reference": added.uns["reference"], "run": str(predictor.run)}},
    )


@torch.no_grad()
def _assigned(
    predictor: Predictor, h: Tensor, known: Tensor, places: Tensor, adapted: Slide | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Weights (b, s) and numbers (b, s) of spots, block of cells by block."""
    atlas = predictor.atlas
    assert atlas is not None
    count, most = min(atlas.neighbors, len(known)), min(MOST_SPOTS, len(known))
    block = max(1, min(_BLOCK, _VALUES // len(known)))
    grid, blocks = atlas.distribution(h, block, nearest=False)
    spread = _lattice_to_spots(grid.cpu(), places).to(grid)
    norm = known.square().sum(1)
    others: Iterator[Tensor] | list[None] = [None] * -(-len(h) // block)
    if adapted is not None and predictor.profile is not None:
        shares = shares_of(adapted, predictor.meta["genes"], predictor.profile)
        others = predictor.adapter_distribution(shares, grid, block)
    for mass, part, other in zip(blocks, h.split(block), others, strict=True):
        weight = _on_spots(mass, spread) / 2
        near = torch.addmm(norm, part, known.T, alpha=-2).topk(count, largest=False).indices
        share = torch.full((1, 1), 0.5 / count).to(weight)
        weight = weight.contiguous().scatter_add_(1, near, share.expand(near.shape))
        if other is not None:
            weight = (weight + _on_spots(other, spread)) / 2
        value, number = weight.topk(most, dim=1)
        value = value / value.sum(1, keepdim=True)
        yield value.cpu().numpy(), number.cpu().numpy()


def _on_spots(mass: Tensor, spread: Tensor) -> Tensor:
    weight = torch.sparse.mm(spread, mass.T).T
    return weight / weight.sum(1, keepdim=True).clamp(min=1e-12)


def _lattice_to_spots(grid: Tensor, places: Tensor) -> Tensor:
    """Sparse matrix (m, P) that hands the mass of each lattice point to the spots around it.

    The spots to which a lattice point is the nearest share its mass. If there are none, its mass
    goes to the nearest spot within reach.
    """
    from scipy.spatial import cKDTree

    seat = nearest_in_lattice(grid, places.to(grid)).numpy()
    count = np.bincount(seat, minlength=len(grid))
    alone = np.flatnonzero(count == 0)
    distance, nearest = cKDTree(places.numpy()).query(grid[alone].double().numpy())
    close = distance <= _REACH
    row = np.concatenate([np.arange(len(seat)), nearest[close]])
    column = np.concatenate([seat, alone[close]])
    value = np.concatenate([1 / count[seat], np.ones(int(close.sum()))])
    indices = torch.from_numpy(np.stack([row, column]))
    shape = (len(places), len(grid))
    values = torch.from_numpy(value).float()
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=False).coalesce()


def _frame(slides: Sequence[Slide], total: int) -> pd.DataFrame:
    """Names and columns of cells, in the order of their file."""
    names = in_file_order(slides, [slide.cell_names.astype(object) for slide in slides], fill="")
    common = [key for key in slides[0].obs if all(key in slide.obs for slide in slides)]
    columns = {
        key: in_file_order(slides, [np.asarray(slide.obs[key]) for slide in slides])
        for key in common
    }
    assert len(names) == total
    return pd.DataFrame(columns, index=pd.Index(names.astype(str)))


def composition(mapping: AnnData | str | os.PathLike, key: str) -> pd.DataFrame:
    """Expected shares of the labels of cells at every spot.

    Args:
        mapping: of n cells to m spots, from ``predict --mapping``; or its file.
        key: obs column of the cells with L labels.

    Returns:
        (m, L), rows summing to 1; NaN at spots that no cell is assigned to. Cells without a label
        are left out.

    Raises:
        UserError: there is no such column.
    """
    mapping = _read(mapping)
    if key not in mapping.obs:
        known = ", ".join(map(str, mapping.obs.columns)) or "none"
        raise UserError(f"the mapping has no obs column {key!r}; its columns are {known}")
    labels = mapping.obs[key].astype("category")
    codes = labels.cat.codes.to_numpy()
    labelled = codes >= 0
    one_hot = sparse.csr_matrix(
        (np.ones(labelled.sum()), (np.flatnonzero(labelled), codes[labelled])),
        shape=(mapping.n_obs, len(labels.cat.categories)),
    )
    mass = (mapping.X.T @ one_hot).toarray()
    with np.errstate(invalid="ignore", divide="ignore"):
        share = mass / mass.sum(axis=1, keepdims=True)
    return pd.DataFrame(share, index=mapping.var_names, columns=labels.cat.categories.astype(str))


def expected_expression(
    mapping: AnnData | str | os.PathLike, cells: AnnData | str | os.PathLike
) -> AnnData:
    """Expected expression of a cell at every spot, from the cells that are assigned to it.

    Args:
        mapping: of n cells to m spots, from ``predict --mapping``; or its file.
        cells: these cells with expression (n, G), in the same order; or their file.

    Returns:
        AnnData (m, G) as squidpy takes it: X the mean of the cells by their weights, and
        obsm["spatial"] the measured positions of the spots. obs["ipar_cells"] is the expected
        number of cells at a spot; X is 0 where there is none. Values are means of X of the cells.

    Raises:
        UserError: the cells are others than those of the mapping.
    """
    mapping, cells = _read(mapping), _read(cells)
    unlike = cells.obs_names.is_unique and not mapping.obs_names.equals(cells.obs_names)
    if mapping.n_obs != cells.n_obs or unlike:
        raise UserError(
            f"the mapping is of {mapping.n_obs} other cells, or in another order, than these "
            f"{cells.n_obs}; give the cells that it was made of"
        )
    weight = sparse.csr_matrix(mapping.X.T)
    number = np.asarray(weight.sum(axis=1)).ravel()
    scale = sparse.diags_array(1 / np.where(number > 0, number, 1))
    spots = AnnData(
        X=sparse.csr_matrix(scale @ (weight @ cells.X)),
        obs=mapping.var.assign(**{Keys.CELLS: number}),
        var=cells.var.copy(),
        obsm={Keys.SPATIAL: np.asarray(mapping.varm[Keys.SPATIAL])},
    )
    return spots


def _read(source: AnnData | str | os.PathLike) -> AnnData:
    if isinstance(source, AnnData):
        return source
    path = Path(source)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    return anndata.read_zarr(path) if path.is_dir() else anndata.read_h5ad(path)
