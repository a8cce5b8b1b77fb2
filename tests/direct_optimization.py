"""No model: minimise the supervision over the positions themselves.

Shows what a target can determine at best, and whether a loss has minima that are not the truth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import eigsh
from torch import Tensor

from ipar_sparse.geometry.gauge import gauge_fix
from ipar_sparse.supervision.losses import STRESS_WEIGHT, geometry_terms
from ipar_sparse.supervision.targets import SlideTarget, WalkTarget

E_GEO = {"rw_kl": 1.0, "stress_log": STRESS_WEIGHT}
WHOLE_SLIDE = {"gram": 1.0, "long_range": 1.0, "stress_log": 0.1, "multiscale": 0.1}
_GLOBAL_TERMS = {"gram", "long_range"}  # they have no folded minima and act alone at first
_DECAY, _DETAILS = 0.35, 0.6  # shares of the steps after which the step size falls, all terms act


@dataclass
class OptimizedLayout:
    """Positions (n, 2) in the unit-RMS gauge, and one dict of term values per recorded step."""

    pos: Tensor
    history: list[dict[str, float]]


def walk_eigenmap(walk: WalkTarget) -> Tensor:
    r"""The two slowest modes of the reference walk, scaled to its commute times.

    .. math::
        \mathbf{x}_i = \left(\sqrt{\tfrac{\lambda_a}{1 - \lambda_a}} \, \phi_a(i)\right)_{a=1,2}

    Args:
        walk: a walk on one graph that is connected.

    Returns:
        Positions (n, 2), unit-RMS gauge, float64.
    """
    n = walk.num_nodes
    if len(walk.sizes) != 1 or n < 4:
        raise ValueError(f"a walk eigenmap needs one graph of 4 nodes; given {walk.sizes}")
    first, second = walk.pair
    square = (walk.pos[first] - walk.pos[second]).square().sum(-1)
    weight = (
        (walk.log_multiplicity - square * walk.precision).exp().index_select(0, walk.entry_pair)
    )
    parts = (weight.cpu().numpy(), walk.col.cpu().numpy(), walk.rowptr.cpu().numpy())
    matrix = csr_array(parts, (n, n))
    scale = diags_array(1 / np.sqrt(matrix.sum(1)))
    start = np.random.default_rng(0).random(n)
    value, vector = eigsh(scale @ matrix @ scale, k=3, which="LA", v0=start, tol=1e-5)
    order = np.argsort(-value)[1:]
    length = np.sqrt(value[order].clip(0) / (1 - value[order]).clip(1e-12))
    return gauge_fix(torch.from_numpy(scale @ vector[:, order] * length))


def minimize_layout(
    target: SlideTarget,
    *,
    weights: dict[str, float] | None = None,
    init: str | Tensor = "random",
    steps: int = 400,
    lr: float = 0.1,
    seed: int = 0,
    probe_rows: int | None = None,
    stress_pairs: int | None = None,
    dtype: torch.dtype = torch.float32,
    record_every: int = 20,
) -> OptimizedLayout:
    """Minimise weighted terms over the positions with Adam, coarse to fine.

    The step size falls from ``lr`` to the spacing of the nodes, and on to a fiftieth of it.
    Global terms (``gram``, ``long_range``) among the weights act alone until it has reached the
    spacing. From a folded layout, log-stress and walks would keep the fold.

    Args:
        target: what the layout should be; one graph.
        weights: by name of :data:`~ipar_sparse.supervision.losses.GEOMETRY_TERMS`; E_geo if left
            out.
        init: ``"random"`` (normal), ``"spectral"`` (:func:`walk_eigenmap`) or positions (n, 2).
        steps: Adam steps.
        lr: first step size, in units of the layout's RMS radius.
        seed: of the initial layout and of every draw.
        probe_rows: rows of the walk compared in a step.
        stress_pairs: pairs of each stress term used in a step.
        dtype: of the arithmetic.
        record_every: steps between records of the history.

    Raises:
        ValueError: on a batch of graphs, or an unknown initial layout or term.
    """
    if target.num_graphs != 1:
        raise ValueError(f"minimize_layout takes one graph; given {target.num_graphs}")
    weights = E_GEO if weights is None else weights
    device = target.pos.device
    generator = torch.Generator(device).manual_seed(seed)
    n = len(target.pos)
    if not isinstance(init, Tensor):
        init = _initial_layout(init, target, generator, dtype)
    pos = init.to(device, dtype).clone().requires_grad_()
    optimizer = torch.optim.Adam([pos], lr=lr, betas=(0.9, 0.99))
    spacing = min(lr, math.sqrt(6 / n) / 2)
    staged = not _GLOBAL_TERMS.isdisjoint(weights)
    if probe_rows is None and max(target.sizes) <= 384:
        target.walk.cache_reference(dtype)
    history = []
    for step in range(steps):
        progress = step / steps
        optimizer.param_groups[0]["lr"] = _step_size(progress, lr, spacing)
        active = {
            name: weight
            for name, weight in weights.items()
            if not staged or progress >= _DETAILS or name in _GLOBAL_TERMS
        }
        terms = geometry_terms(
            gauge_fix(pos),
            target,
            active,
            probe_rows=probe_rows,
            stress_pairs=stress_pairs,
            generator=generator,
        )
        weighted = (active[name] * value for name, value in terms.items())
        loss = sum(weighted, start=torch.zeros((), device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % record_every == 0 or step == steps - 1:
            values = {name: value.item() for name, value in terms.items()}
            history.append({"step": step, "loss": loss.item(), **values})
    return OptimizedLayout(gauge_fix(pos.detach()), history)


def _initial_layout(
    name: str, target: SlideTarget, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    if name == "spectral":
        return walk_eigenmap(target.walk)
    if name != "random":
        raise ValueError(f"unknown init {name!r}; choose 'random', 'spectral' or positions")
    device = target.pos.device
    return torch.randn(len(target.pos), 2, generator=generator, device=device, dtype=dtype)


def _step_size(progress: float, lr: float, spacing: float) -> float:
    if progress < _DECAY:
        return lr
    if progress < _DETAILS:
        return lr * (spacing / lr) ** ((progress - _DECAY) / (_DETAILS - _DECAY))
    return spacing * 0.02 ** ((progress - _DETAILS) / (1 - _DETAILS))
