"""Small AnnData files, which tests of readers and writers share."""

import warnings

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

N, G = 40, 12  # cells, genes


def make(seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(1.0, (N, G)).astype(np.float32)
    counts[:, 0] += 1
    return anndata.AnnData(
        X=sparse.csr_matrix(counts),
        obs=pd.DataFrame(
            {
                "section": pd.Categorical(np.where(np.arange(N) % 3 == 0, "s2", "s1")),
                "area": rng.random(N),
                "barcode": [f"b{i}" for i in range(N)],
            },
            index=[f"cell{i}" for i in range(N)],
        ),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(G)]),
        obsm={"spatial": rng.random((N, 2)), "X_pca": rng.normal(size=(N, 5))},
        layers={"counts": counts.copy(), "log": sparse.csc_matrix(np.log1p(counts))},
        uns={"title": "mine"},
    )


def save(adata, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.write_zarr(path) if path.suffix == ".zarr" else adata.write_h5ad(path)
    return path
