"""Tangram: a mapping of cells to the cells of one slide that gives the slide's expression back."""

import sys
from pathlib import Path

import anndata
import numpy as np
import scanpy as sc
import tangram

job = Path(sys.argv[1])
slide, cells = (anndata.read_h5ad(job / name) for name in ("slide.h5ad", "cells.h5ad"))
sc.pp.normalize_total(cells, target_sum=1e4)
tangram.pp_adatas(cells, slide)
mapping = tangram.map_cells_to_space(cells, slide, random_state=0)
places = np.asarray(slide.obsm["spatial"], dtype=np.float64)
np.save(job / "positions.npy", mapping.X / mapping.X.sum(axis=1, keepdims=True) @ places)
