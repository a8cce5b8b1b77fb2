"""CeLEry: a network from the expression of one slide to coordinates."""

import sys
from pathlib import Path

import anndata
import CeLEry
import numpy as np
import pandas as pd
import scanpy as sc

job = Path(sys.argv[1])
slide, cells = (anndata.read_h5ad(job / name) for name in ("slide.h5ad", "cells.h5ad"))
for one in (slide, cells):
    sc.pp.normalize_total(one)
    sc.pp.log1p(one)
    one.X = np.asarray(one.X.toarray())
CeLEry.get_zscore(slide)
CeLEry.get_zscore(cells)
places = np.asarray(slide.obsm["spatial"], dtype=np.float64)
low, unit = places.min(axis=0), np.ptp(places, axis=0).max() / 100
locations = pd.DataFrame((places - low) / unit, columns=["x", "y"], index=slide.obs_names)
CeLEry.Fit_cord(data_train=slide, location_data=locations, path=str(job), filename="network")
found = np.asarray(CeLEry.Predict_cord(data_test=cells, path=str(job), filename="network"))
# the program scales each coordinate to 0 to 1, with a margin of one unit at both ends
span = np.ptp(locations.to_numpy(), axis=0) + 2
np.save(job / "positions.npy", (found * span - 1) * unit + low)
