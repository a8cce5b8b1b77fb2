"""novoSpaRc: transport of cells onto the cells of one slide, which are its reference atlas."""

import sys
from pathlib import Path

import anndata
import novosparc
import numpy as np
import scanpy as sc

job = Path(sys.argv[1])
slide, cells = (anndata.read_h5ad(job / name) for name in ("slide.h5ad", "cells.h5ad"))
for one in (slide, cells):
    sc.pp.normalize_total(one, target_sum=1e4)
    sc.pp.log1p(one)
    one.X = np.asarray(one.X.toarray())
places = np.asarray(slide.obsm["spatial"], dtype=np.float64)
tissue = novosparc.cm.Tissue(dataset=cells, locations=places)
tissue.setup_reconstruction(
    markers_to_use=np.arange(cells.n_vars), atlas_matrix=slide.X, num_neighbors_s=5
)
tissue.reconstruct(alpha_linear=0.5, epsilon=5e-3)
weights = tissue.gw / tissue.gw.sum(axis=1, keepdims=True)
np.save(job / "positions.npy", weights @ places)
