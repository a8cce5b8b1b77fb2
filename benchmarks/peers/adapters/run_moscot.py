"""moscot: fused Gromov-Wasserstein transport of cells onto the cells of one slide."""

import sys
from pathlib import Path

import anndata
import numpy as np
import scanpy as sc
from moscot.problems.space import MappingProblem

job = Path(sys.argv[1])
slide, cells = (anndata.read_h5ad(job / name) for name in ("slide.h5ad", "cells.h5ad"))
for one in (slide, cells):
    sc.pp.normalize_total(one, target_sum=1e4)
    sc.pp.log1p(one)
sc.pp.pca(cells)
problem = MappingProblem(adata_sc=cells, adata_sp=slide)
problem = problem.prepare(sc_attr={"attr": "obsm", "key": "X_pca"}, xy_callback="local-pca")
problem = problem.solve()
(solution,) = problem.solutions.values()
places = np.asarray(slide.obsm["spatial"], dtype=np.float64)
# the plan is spots x cells: applied to places and to ones, it need not be held
total = np.asarray(solution.push(np.ones(len(places)))).ravel()
mean = [np.asarray(solution.push(axis)).ravel() / total for axis in places.T]
np.save(job / "positions.npy", np.stack(mean, axis=1))
