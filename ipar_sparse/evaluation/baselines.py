"""Layouts that any method has to beat: from H alone, and by regression on training slides.

No function here takes a position of the slide it lays out; there is nothing to leak.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPRegressor
from sklearn.utils.extmath import randomized_range_finder

from ..estimators.atlas import atlas_layout
from ..estimators.regression import aligned_training_set, ridge_layout
from ..geometry import principal_plane
from ..geometry.alignment import align, as_embedding
from ..geometry.neighborhoods import unit_gauge
from ..graph import NeighborTable
from .results import RANDOM

logger = logging.getLogger(__name__)

_MLP_CELLS = 20_000  # training cells at most; more do not change a two-layer regressor
_UMAP_CELLS = 50_000  # beyond, UMAP takes longer than everything else together


def random_layout(n: int, *, seed: int = 0) -> np.ndarray:
    """Independent Gaussian positions (n, 2)."""
    return np.random.default_rng([seed, 11]).normal(size=(n, 2))


def pca_layout(h) -> np.ndarray:
    """The first two principal components of the embedding, each at its own variance.

    Args:
        h: embedding (n, d), d >= 1; missing second components are zero.

    Returns:
        (n, 2), signs fixed so that the largest loading is positive.
    """
    return principal_plane(torch.from_numpy(as_embedding(h))).numpy()


def spectral_layout(h, graph: NeighborTable) -> np.ndarray:
    r"""Laplacian eigenmap of the kNN(H) graph.

    The two eigenvectors after the trivial one of :math:`D^{-1/2} W D^{-1/2}`, divided by
    :math:`\sqrt{d_i}` (Belkin and Niyogi, 2003). W is the graph made symmetric by union of its
    edges. A Laplacian says nothing of where connected components lie relative to each other.
    Each is therefore laid out by itself and aligned with its own cells in :func:`pca_layout`;
    components of fewer than 4 cells keep their PCA positions.

    Args:
        h: embedding (n, d).
        graph: kNN(H) of the same cells.

    Returns:
        (n, 2), the same in every run.
    """
    matrix = _matrix(graph, np.ones(graph.num_edges))
    return _spectral(matrix.maximum(matrix.T), pca_layout(h))


def diffusion_map(graph: NeighborTable, weights, h, *, time: int = 1) -> np.ndarray:
    r"""Diffusion map of a weighted operator on the graph, for instance the learned attention.

    .. math::
        W = \tfrac12 (P + P^\top), \quad \psi_r = D^{-1/2} \phi_r, \quad
        x_i = (\lambda_1^t \psi_1(i),\, \lambda_2^t \psi_2(i))

    with :math:`\phi_r, \lambda_r` the eigenpairs of :math:`D^{-1/2} W D^{-1/2}` after the trivial
    one (Coifman and Lafon, 2006). Components are placed as in :func:`spectral_layout`.

    Args:
        graph: the operator's edges.
        weights: non-negative P_ij of each edge (E,), in the graph's order; attention of several
            heads (E, H) is averaged.
        h: embedding (n, d), which places connected components.
        time: number of steps t.

    Returns:
        (n, 2)
    """
    weights = np.asarray(torch.as_tensor(weights).detach().cpu().double())
    weights = weights.mean(axis=1) if weights.ndim == 2 else weights
    if weights.shape != (graph.num_edges,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(
            f"diffusion_map needs {graph.num_edges} finite, non-negative weights, one an edge; "
            f"given shape {weights.shape}"
        )
    matrix = _matrix(graph, weights)
    return _spectral((matrix + matrix.T) / 2, pca_layout(h), time=time)


def umap_layout(h, *, seed: int = 0, n_neighbors: int = 15) -> np.ndarray:
    """UMAP of the embedding; needs umap-learn.

    Raises:
        ImportError: if umap-learn is not installed.
    """
    try:
        from umap import UMAP
    except ImportError as error:
        raise ImportError(
            "the UMAP baseline needs umap-learn; pip install 'ipar_sparse[umap]'"
        ) from error
    x = as_embedding(h)
    n_neighbors = min(n_neighbors, len(x) - 1)
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fixed seed makes it run on one thread, and say so
            # spectral initialisation fails on fewer than a handful of cells
            init = "spectral" if len(x) > 10 else "random"
            umap = UMAP(n_neighbors=n_neighbors, random_state=seed, n_jobs=1, init=init)
            return umap.fit_transform(x).astype(np.float64)
    finally:
        # numba leaves OpenMP, which torch shares, with a thread for every core, and runs side by
        # side would wait for each other from here on
        torch.set_num_threads(threads)


def mlp_layout(h, train: Sequence[tuple], *, seed: int = 0) -> np.ndarray:
    """A two-layer perceptron from H to the aligned training coordinates, stopped early.

    Args:
        h: embedding of the cells to lay out (n, d).
        train: pairs (embedding (n_s, d), positions (n_s, 2)) of training slides; at most 20,000
            of their cells are used.
        seed: of the initial weights, the batches and the cells used.

    Returns:
        (n, 2)
    """
    features, targets, mean, scale = aligned_training_set(train)
    x, y = np.concatenate(features)[:, 1:], np.concatenate(targets)
    if len(x) > _MLP_CELLS:
        kept = np.random.default_rng([seed, 12]).choice(len(x), _MLP_CELLS, replace=False)
        x, y = x[kept], y[kept]
    model = MLPRegressor(
        hidden_layer_sizes=(128, 64),
        alpha=1e-3,
        batch_size=max(1, min(256, len(x) // 2)),
        early_stopping=len(x) >= 50,
        n_iter_no_change=8,
        max_iter=100,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 100 epochs are the time limit
        model.fit(x, y)
    return model.predict((as_embedding(h) - mean) / scale).reshape(-1, 2)


def run_baselines(
    h,
    graph: NeighborTable,
    *,
    train: Sequence[tuple] | None = None,
    operator=None,
    attended: NeighborTable | None = None,
    seed: int = 0,
    only: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, np.ndarray]:
    """Lay one slide out by every baseline that the given material allows.

    A baseline whose linear algebra or memory fails is left out, with a warning in the log: it must
    not take a report down with it.

    Args:
        h: embedding of the slide's cells (n, d), tensor or array.
        graph: kNN(H) of these cells.
        train: pairs (embedding (n_s, d), positions (n_s, 2)) of training slides, for the
            regressions; they are left out without it.
        operator: weights (E,) or (E, H), for instance attention of the last recycle; adds
            ``attention diffusion map``.
        attended: graph on whose edges those are; ``graph`` if left out.
        seed: of everything random.
        only: names to run; all if left out.
        progress: called with each name before it runs.

    Returns:
        Name to layout (n, 2), float64, in the order of :data:`BASELINES`.

    Raises:
        ValueError: if an embedding is not a finite matrix, widths differ, or a name is unknown.
    """
    h = as_embedding(h)
    if len(h) != graph.num_nodes:
        raise ValueError(f"run_baselines: {len(h)} embeddings, but a graph of {graph.num_nodes}")
    for number, (other, _) in enumerate(train or ()):
        if as_embedding(other).shape[1] != h.shape[1]:
            raise ValueError(
                f"run_baselines: training slide {number} has an embedding of width "
                f"{other.shape[1]}, the slide to lay out one of {h.shape[1]}"
            )
    unknown = set(only or ()) - set(BASELINES)
    if unknown:
        raise ValueError(f"unknown baselines {sorted(unknown)}; choose from {list(BASELINES)}")
    material = {"h": h, "graph": graph, "train": train, "operator": operator, "seed": seed}
    material["attended"] = graph if attended is None else attended
    layouts = {}
    for name, baseline in BASELINES.items():
        if only is not None and name not in only:
            continue
        if progress is not None:
            progress(name)
        try:
            layout = baseline(**material)
        except (ValueError, RuntimeError, MemoryError) as error:
            logger.warning("baseline %s left out: %s", name, error)
            continue
        if layout is None:
            continue
        if not np.isfinite(layout).all():
            logger.warning("baseline %s left out: it gave positions that are not finite", name)
            continue
        layouts[name] = layout
    return layouts


def _umap(h, seed, **_):
    if find_spec("umap") is None or len(h) < 3:
        return None
    if len(h) > _UMAP_CELLS:
        logger.info("baseline UMAP left out: %d cells, run on %d at most", len(h), _UMAP_CELLS)
        return None
    return umap_layout(h, seed=seed)


BASELINES: Mapping[str, Callable[..., np.ndarray | None]] = {
    RANDOM: lambda h, seed, **_: random_layout(len(h), seed=seed),
    "PCA": lambda h, **_: pca_layout(h),
    "spectral": lambda h, graph, **_: spectral_layout(h, graph),
    "UMAP": _umap,
    "attention diffusion map": lambda h, attended, operator, **_: (
        None if operator is None else diffusion_map(attended, operator, h)
    ),
    "ridge": lambda h, train, **_: ridge_layout(h, train) if train else None,
    "MLP": lambda h, train, seed, **_: mlp_layout(h, train, seed=seed) if train else None,
    "atlas": lambda h, train, **_: atlas_layout(h, train) if train else None,
}
"""Each takes all material by name and returns a layout, or None where it does not apply."""


def _matrix(graph: NeighborTable, weights: np.ndarray) -> sp.csr_matrix:
    src, dst = graph.edge_index.cpu().numpy()
    n = graph.num_nodes
    return sp.csr_matrix((weights.astype(np.float64), (dst, src)), shape=(n, n))


def _spectral(matrix: sp.csr_matrix, frame: np.ndarray, time: int = 0) -> np.ndarray:
    """Two diffusion coordinates of a symmetric weight matrix, component by component.

    Args:
        matrix: weights (n, n).
        frame: layout (n, 2) that components are aligned with.
        time: number of diffusion steps.
    """
    matrix.eliminate_zeros()
    count, label = connected_components(matrix, directed=False)
    layout = unit_gauge(frame)
    order = np.argsort(label, kind="stable")
    bounds = np.searchsorted(label[order], np.arange(count + 1))
    for first, last in pairwise(bounds):
        cells = order[first:last]
        if len(cells) < 4:
            continue
        coordinates = _eigenmap(matrix[cells][:, cells], time)
        layout[cells] = coordinates if count == 1 else align(coordinates, layout[cells])[0]
    return layout


def _eigenmap(matrix: sp.csr_matrix, time: int) -> np.ndarray:
    degree = np.asarray(matrix.sum(axis=1)).ravel()
    root = sp.diags(1 / np.sqrt(degree))
    normal = (root @ matrix @ root).tocsr()
    n = len(degree)
    if n <= 200:
        values, vectors = np.linalg.eigh(normal.toarray())
        values, vectors = values[-3:], vectors[:, -3:]
    else:
        values, vectors = _leading_pairs(normal)
    order = np.argsort(values)[::-1][1:3]
    values, vectors = values[order], vectors[:, order]
    coordinates = vectors / np.sqrt(degree)[:, None] * np.abs(values) ** time
    largest = np.abs(coordinates).argmax(axis=0)
    return coordinates * np.sign(coordinates[largest, [0, 1]])


def _leading_pairs(normal: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    n = normal.shape[0]
    v0 = np.random.default_rng(13).normal(size=n)
    try:
        return eigsh(normal, k=3, which="LA", v0=v0, ncv=40, tol=1e-6, maxiter=300)
    except ArpackNoConvergence:
        # (1 + A) / 2 separates the crowded top of the spectrum; a layout needs no more digits
        basis = randomized_range_finder(
            (sp.eye(n) + normal) / 2, size=20, n_iter=200, random_state=13
        )
        values, rotation = np.linalg.eigh(basis.T @ (normal @ basis))
        return values[-3:], basis @ rotation[:, -3:]
