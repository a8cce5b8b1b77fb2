"""How sure a gain is on one slide: blocks of the tissue, and seeds, are drawn again.

Cells beside each other are not independent, and seeds share their cells. So the slide is cut into
blocks, and whole blocks are drawn with replacement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from ..files import atomic_path, folder_name
from ..geometry.neighborhoods import unit_gauge
from ..metrics.layout import distance_metrics
from .results import FLOOR, MODEL, SlideEvaluation, role_of
from .study_plan import Study, study_jobs

BLOCKS = 10
"""Blocks a side."""

REPEATS = 200
CELLS = "cells"
"""Key of the names of the cells in the file of layouts."""

_PAIRS = 50_000  # drawn anew in every repeat; more hardly narrow the error


@dataclass(frozen=True)
class Gain:
    r"""By how much distance Spearman of one method exceeds that of another on the same cells.

    Args:
        mean: over seeds, of all cells.
        se: standard deviation of the gain over draws of blocks and seeds.
        seeds: how many there are.
    """

    mean: float
    se: float
    seeds: int


def block_of(pos: np.ndarray, blocks: int = BLOCKS) -> np.ndarray:
    """Number of the block (n,) of each cell; the bounding box is cut into ``blocks`` a side."""
    low, extent = pos.min(axis=0), np.maximum(np.ptp(pos, axis=0), 1e-12)
    cut = np.minimum((blocks * (pos - low) / extent).astype(int), blocks - 1)
    return cut[:, 0] * blocks + cut[:, 1]


def block_bootstrap(
    own: Sequence[np.ndarray],
    others: Mapping[str, Sequence[np.ndarray]],
    true: np.ndarray,
    *,
    blocks: int = BLOCKS,
    repeats: int = REPEATS,
    num_pairs: int = _PAIRS,
    seed: int = 0,
) -> dict[str, Gain]:
    """Gains in distance Spearman over other methods, with errors over blocks and seeds.

    In each repeat as many blocks are drawn with replacement as hold cells, and as many seeds as
    there are. All methods are scored by the same pairs of the cells drawn. Pairs of a cell with
    itself are left out.

    Args:
        own: layout (n, 2) of every seed.
        others: method to its layouts, in the same order of seeds; one layout serves all seeds.
        true: positions (n, 2).
        blocks: a side.
        repeats: number of draws.
        num_pairs: pairs of cells in each, at most.
        seed: of the draws.
    """
    layouts = [*own, *(layout for found in others.values() for layout in found)]
    of_own, seeds = np.arange(len(own)), len(own)
    of_others, start = {}, seeds
    for name, found in others.items():
        rows = start + np.arange(len(found))
        of_others[name] = np.broadcast_to(rows, seeds) if len(found) == 1 else rows
        start += len(found)
    scaled = [unit_gauge(layout) for layout in layouts]
    _, label = np.unique(block_of(true, blocks), return_inverse=True)
    members = [np.flatnonzero(label == one) for one in range(label.max() + 1)]
    num_pairs = min(num_pairs, len(true) * (len(true) - 1))  # on few cells more say nothing
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(repeats):
        cells = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        first, second = cells[rng.integers(0, len(cells), (2, num_pairs))]
        first, second = first[first != second], second[first != second]
        target = _centred_ranks(true, first, second)
        rho = np.array([_centred_ranks(one, first, second) @ target for one in scaled])
        picked = rng.integers(0, seeds, seeds)
        gains = {name: rho[of_own] - rho[rows] for name, rows in of_others.items()}
        drawn.append([gain[picked].mean() for gain in gains.values()])
    errors = np.std(drawn, axis=0, ddof=1)
    whole = np.array([distance_metrics(one, true)["distance_spearman"] for one in layouts])
    return {
        name: Gain(float((whole[of_own] - whole[rows]).mean()), float(error), seeds)
        for (name, rows), error in zip(of_others.items(), errors, strict=True)
    }


def _centred_ranks(pos: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Ranks of the distances of pairs, centred and of unit length: their dot is Spearman's ρ."""
    distance = np.sqrt(np.square(pos[first] - pos[second]).sum(axis=1))
    ranks = rankdata(np.round(distance, 10))
    ranks -= ranks.mean()
    return ranks / max(float(np.linalg.norm(ranks)), 1e-12)


def save_layouts(folder: Path, evaluation: SlideEvaluation) -> None:
    """Writes the layouts of all methods, and names of the cells, to ``layouts.SLIDE.npz``."""
    kept: dict[str, Any] = {CELLS: np.asarray(evaluation.cells).astype(str)}
    kept |= {name: np.asarray(pos, np.float32) for name, pos in evaluation.layouts.items()}
    with atomic_path(folder / layouts_file(evaluation.slide)) as path, path.open("wb") as file:
        np.savez_compressed(file, **kept)


def layouts_file(slide: str) -> str:
    """Name of the file of :func:`save_layouts`."""
    return f"layouts.{folder_name(slide)}.npz"


def study_gains(
    out: Path, study: Study, further: Sequence[Path] = ()
) -> dict[str, dict[str, Gain]]:
    """Gains of the reference variant over every baseline on cells of another assay.

    Args:
        out: folder of the study.
        study: its plan.
        further: files ``SLIDE.METHOD.npz`` by other programs: names ``cells`` and positions
            ``pos``. A file that lacks a cell is left out.

    Returns:
        Slide to method to gain; empty unless a run has left layouts.
    """
    runs = [job.key for job in study_jobs(study) if job.key.kind == "run"]
    gains = {}
    for slide in (name for fold in study.folds for name in fold.test):
        found: dict[str, list[np.ndarray]] = {}
        for task in runs:
            path = Path(out) / task.folder / layouts_file(slide)
            if task.variant == study.reference and path.is_file():
                with np.load(path) as kept:
                    cells = pd.Index(kept[CELLS])
                    for name in set(kept.files) - {CELLS}:
                        found.setdefault(name, []).append(kept[name])
        if MODEL in found:
            true = found[FLOOR][0].astype(np.float64)
            others = {name: of for name, of in found.items() if role_of(name) == "baseline"}
            others = {name: of for name, of in others.items() if len(of) == len(found[MODEL])}
            for path in further:
                if path.name.startswith(f"{slide}."):
                    with np.load(path) as kept:
                        rows = pd.Index(kept[CELLS]).get_indexer(cells)
                        if (rows >= 0).all():
                            others[path.stem.removeprefix(f"{slide}.")] = [kept["pos"][rows]]
            gains[slide] = block_bootstrap(found[MODEL], others, true)
    return gains
