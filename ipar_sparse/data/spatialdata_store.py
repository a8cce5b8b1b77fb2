"""SpatialData stores: one of their tables as AnnData, positioned by the regions it annotates."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd

from ..errors import UserError, import_extra
from .anndata_store import Store, first_line, open_store, read_frame, some_names
from .keys import Keys
from .paths import ALL, Source


class Regions(NamedTuple):
    """What the regions of a table say of its rows.

    Args:
        pos: their centroids (n, 2); None where the table annotates no region of the store.
        slide_key: obs column that names the region, if each of several regions is a slide.
        question: what to ask the user, where it is unclear whether each is one.
        notes: lines for the user.
    """

    pos: np.ndarray | None = None
    slide_key: str | None = None
    question: str | None = None
    notes: tuple[str, ...] = ()


@contextmanager
def open_table(source: Source) -> Iterator[tuple[Store, Regions]]:
    """A table as an open store, with the centroids of its regions in obsm["spatial"].

    Args:
        source: a SpatialData store, and its table where there are several.

    Raises:
        UserError: the store is damaged, or it is unclear which table is meant.
    """
    with open_store(source.path, inside=source.group) as group:
        regions = _read_regions(source.path, group)
        store: dict[str, Any] = {key: group[key] for key in group}
        if regions.pos is not None:
            kept = group["obsm"] if "obsm" in group else {}
            store["obsm"] = {key: kept[key] for key in kept}
            store["obsm"][Keys.SPATIAL] = regions.pos
        yield store, regions


def load_table(source: Source) -> tuple[anndata.AnnData, Regions]:
    """As :func:`open_table`, but all of it in memory."""
    with open_store(source.path, inside=source.group) as group:
        regions = _read_regions(source.path, group)
        adata = anndata.io.read_elem(group)
    if regions.pos is not None:
        adata.obsm[Keys.SPATIAL] = regions.pos
    adata.uns.pop("spatialdata_attrs", None)  # its regions are not in the file that is written
    adata.uns[Keys.SOURCE] = {"format": "SpatialData", "positions": "; ".join(regions.notes)}
    return adata, regions


def _read_regions(path: Path, group: Store) -> Regions:
    attributes = dict(group.attrs)
    if "uns" in group and "spatialdata_attrs" in group["uns"]:
        attributes |= anndata.io.read_elem(group["uns"]["spatialdata_attrs"])
    region_key, instance_key = (attributes.get(f"{kind}_key") for kind in ("region", "instance"))
    if not region_key or not instance_key:
        return Regions()
    obs = read_frame(group, "obs", path)
    regions, instances = obs[region_key].astype(str).to_numpy(), obs[instance_key].to_numpy()
    names = list(dict.fromkeys(regions))
    spatialdata = import_extra("spatialdata", "spatialdata")
    pos, systems = np.full((len(obs), 2), np.nan), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a table may annotate what was left out of a store
        try:
            elements = spatialdata.read_zarr(path, selection=("shapes", "labels", "points"))
        except Exception as error:  # of any of the libraries that it reads with
            raise UserError(
                f"{path}: spatialdata cannot read its regions ({first_line(error)}); write the "
                "store again"
            ) from error
        if missing := [name for name in names if name not in elements]:
            return Regions(notes=(f"no positions: its region {missing[0]} is not in the store",))
        for name in names:
            rows = np.flatnonzero(regions == name)
            systems[name], table = _centroids(spatialdata, elements[name])
            pos[rows] = table.reindex(instances[rows])[["x", "y"]]
    listed = some_names(f"{name} in {system}" for name, system in systems.items())
    notes = (f"positions are centroids of {listed}",)
    if len(names) == 1:
        return Regions(pos, notes=notes)
    question = None
    if len(set(systems.values())) == 1 and _lie_apart([pos[regions == name] for name in names]):
        question = (
            f"{path}: regions {some_names(names)} lie side by side; {path}::{ALL} takes them as "
            f"one slide, {path}::{names[0]} takes one, --slide-key {region_key} each as a slide"
        )
    return Regions(pos, str(region_key), question, notes)


def _centroids(spatialdata: Any, element: Any) -> tuple[str, pd.DataFrame]:
    """Name of a coordinate system, and the centroids of an element in it, by instance."""
    systems = sorted(spatialdata.transformations.get_transformation(element, get_all=True))
    system = "global" if "global" in systems else systems[0]
    return system, spatialdata.get_centroids(element, coordinate_system=system).compute()


def _lie_apart(groups: list[np.ndarray]) -> bool:
    """Whether no two bounding boxes of some positions (n, 2) overlap."""
    low = np.stack([np.nanmin(group, axis=0) for group in groups])
    high = np.stack([np.nanmax(group, axis=0) for group in groups])
    overlap = np.all((low[:, None] < high) & (low < high[:, None]), axis=-1)
    np.fill_diagonal(overlap, False)
    return not overlap.any()
