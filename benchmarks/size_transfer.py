"""One trained model on slides of more and more cells of the same tissue.

    python -m benchmarks.size_transfer RUN --sizes 300,1000,3000,10000,20000 --out DIR

One simulated slide of as many cells as are asked for at most, and random parts of it: nothing but
their density differs. A model trained on minisets meets graphs there that reach less and less far.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from ipar_sparse.data.simulation import TISSUES, simulate
from ipar_sparse.estimators.regression import ridge_layout
from ipar_sparse.evaluation.baselines import pca_layout
from ipar_sparse.evaluation.scoring import _reference
from ipar_sparse.files import atomic_write
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.metrics.layout import evaluate_layout

METRICS = {
    "distance_spearman": "distance Spearman",
    "procrustes": "Procrustes error",
    "neighbor_hit@15": "neighbour hit @15",
}
_COLORS = {"model": "#0072B2", "PCA": "#E69F00", "ridge": "#009E73"}


def measure(predictor: Predictor, tissue: str, sizes: list[int], seed: int) -> list[dict]:
    """Scores of the model and of two baselines at every size.

    Args:
        predictor: a trained run.
        tissue: simulated tissue.
        sizes: numbers of cells.
        seed: of the slide, one that no training slide had.

    Returns:
        One row a size and method: ``n``, ``method``, ``seconds`` (of the model) and the metrics.
    """
    reference = _reference(predictor.run)
    (whole,) = simulate(tissue, slides=1, spots=max(sizes), seed=seed)
    rows = []
    for n in sizes:
        slide = whole.take(np.arange(n))  # they stand in random order
        start = time.perf_counter()
        prediction = predictor.predict(slide)
        seconds = time.perf_counter() - start
        layouts = {"model": prediction.pos, "PCA": pca_layout(prediction.embedding)}
        if reference is not None:
            layouts["ridge"] = ridge_layout(prediction.embedding, reference)
        for method, layout in layouts.items():
            found = evaluate_layout(layout, slide.pos)
            row = {"n": n, "method": method, "seconds": seconds if method == "model" else None}
            rows.append(row | {name: float(found[name]) for name in METRICS})
    return rows


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| cells | method | " + " | ".join(METRICS.values()) + " |", "|---" * 5 + "|"]
    for row in rows:
        values = " | ".join(f"{row[name]:.3f}" for name in METRICS)
        lines.append(f"| {row['n']:,} | {row['method']} | {values} |")
    return "\n".join(lines)


def figure(rows: list[dict], path: Path) -> None:
    """Every metric against the number of cells."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(9.0, 3.0), layout="constrained")
    for axes, (name, label) in zip(sheet.subplots(1, 3), METRICS.items(), strict=True):
        for method, color in _COLORS.items():
            mine = [row for row in rows if row["method"] == method]
            if mine:
                axes.plot(
                    [row["n"] for row in mine],
                    [row[name] for row in mine],
                    "o-",
                    color=color,
                    label=method,
                    markersize=4,
                )
        if name.startswith("neighbor"):
            sizes = np.array(sorted({row["n"] for row in rows}))
            axes.plot(sizes, 15 / (sizes - 1), ":", color="#999999", label="chance")
            axes.legend(frameon=False, fontsize=8)
        axes.set(xscale="log", xlabel="cells", ylabel=label, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    sheet.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    """Command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--tissue", default="cortex", choices=sorted(TISSUES))
    parser.add_argument("--sizes", default="300,1000,3000,10000,20000")
    parser.add_argument("--seed", type=int, default=1000, help="of the slides measured on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    torch.manual_seed(0)
    predictor = Predictor.load(given.run, given.device)
    sizes = [int(size) for size in given.sizes.split(",")]
    rows = measure(predictor, given.tissue, sizes, given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    atomic_write(given.out / "size_transfer.json", json.dumps(rows, indent=1) + "\n")
    figure(rows, given.out / "size_transfer.png")
    print(table(rows))


if __name__ == "__main__":
    main()
