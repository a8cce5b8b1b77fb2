"""This package, by its command line: all training slides, genes that the cells have."""

import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np

job = Path(sys.argv[1])
command = [sys.executable, "-m", "ipar_sparse"]
slides, cells, run = sorted(job.glob("slides/*.h5ad")), job / "cells.h5ad", job / "run"
placed, reference = job / "placed.h5ad", ["--reference", str(job / "slide.h5ad")]
subprocess.run([*command, "train", *slides, "--cells", cells, "--out", run], check=True)
subprocess.run([*command, "predict", run, cells, *reference, "--out", placed], check=True)
found = anndata.read_h5ad(placed)
np.save(job / "positions.npy", found.obsm["X_ipar"])
np.save(job / "positions_in_frame.npy", found.obsm["X_ipar_reference"])
