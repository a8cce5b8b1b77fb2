"""One trained model on slides of more and more cells of the same tissue.

    python -m benchmarks.size_transfer RUN --sizes 300,1000,3000,10000,20000 --out DIR

One simulated slide of as many cells as are asked for at most, and random parts of it: nothing but
their density differs. A model trained on minisets meets graphs there that reach less and less far.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ipar_sparse.data.simulation import TISSUES, simulate
from ipar_sparse.evaluation.baselines import run_baselines
from ipar_sparse.evaluation.layouts import load_reference
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.metrics.layout import evaluate_layout

from . import harness

METRICS = {
    "distance_spearman": "distance Spearman",
    "procrustes": "Procrustes error",
    "neighbor_hit@15": "neighbour hit @15",
}


def score(
    predictor: Predictor, tissue: str, sizes: list[int], seed: int, genes: int = 1200
) -> Iterator[dict]:
    """Scores of the model and of two baselines at every size.

    Args:
        predictor: a trained run.
        tissue: simulated tissue.
        sizes: numbers of cells.
        seed: of the slide, one that no training slide had.
        genes: of the slide.

    Yields:
        One row a size and ``implementation`` (model, PCA or ridge): ``n``, the metrics, and of
        the model its ``seconds``.
    """
    reference = load_reference(predictor.run)
    (whole,) = simulate(tissue, slides=1, spots=max(sizes), genes=genes, seed=seed)
    for n in sorted(sizes):
        slide = whole.take(np.arange(n))  # they stand in random order
        start = time.perf_counter()
        prediction = predictor.predict(slide)
        seconds = time.perf_counter() - start
        graph = prediction.candidates.to("cpu")
        baselines = run_baselines(
            prediction.embedding, graph, train=reference, only=("PCA", "ridge")
        )
        for name, layout in {"model": prediction.pos, **baselines}.items():
            found = evaluate_layout(layout, slide.pos)
            row = {"implementation": name, "task": tissue, "n": n}
            row |= {"seconds": seconds} if name == "model" else {}
            yield row | {key: float(found[key]) for key in METRICS}


def main(argv: list[str] | None = None) -> None:
    """``python -m benchmarks.size_transfer``; writes ``size_transfer.json`` and ``.png``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--tissue", default="cortex", choices=sorted(TISSUES))
    parser.add_argument("--sizes", default="300,1000,3000,10000,20000", help="cells")
    parser.add_argument("--genes", type=int, default=1200, help="of the simulated slide")
    parser.add_argument("--seed", type=int, default=1000, help="of the simulated slide")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    torch.manual_seed(0)
    device = torch.device(given.device)
    record = harness.Record(given.out / "size_transfer.json", device)
    predictor = Predictor.load(given.run, device)
    sizes = [int(float(size)) for size in given.sizes.split(",")]
    for row in score(predictor, given.tissue, sizes, given.seed, given.genes):
        record.add(row)
    chance = [{"n": n, "neighbor_hit@15": 15 / (n - 1)} for n in sorted(sizes)]
    drawn = [
        *record.rows,
        *({"implementation": "chance", "task": given.tissue, **r} for r in chance),
    ]
    title = f"One model on more and more cells; {record.machine['device']}"
    harness.plot(given.out / "size_transfer.png", title, drawn, METRICS, "linear")
    rows = ([f"{r['n']:,}", r["implementation"], *(r[key] for key in METRICS)] for r in record.rows)
    print(harness.markdown(["cells", "method", *METRICS.values()], rows))


if __name__ == "__main__":
    main()
