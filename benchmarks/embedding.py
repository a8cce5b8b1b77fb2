"""What an embedding tells of the place on slides that its encoder has not seen.

    python -m benchmarks.embedding experiments/encoder.yaml --slides *.h5ad --hold-out donor \\
        --donor-pattern '^.' --seeds 0 1 2 --out DIR

Only the encoder is trained, which takes minutes where whole runs take hours, and what is found
here bounds what a whole run reaches: nearest neighbours in the embedding H, and layouts of H.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch

from ipar_sparse.config import RunConfig, resolve_device
from ipar_sparse.data.slide import Slide
from ipar_sparse.evaluation.baselines import run_baselines
from ipar_sparse.evaluation.study_plan import load_variants, plan_study, read_all
from ipar_sparse.graph import knn
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.metrics.candidates import candidate_recall
from ipar_sparse.metrics.layout import evaluate_layout
from ipar_sparse.train.fit import fit

from . import harness

COLUMNS = {
    "knn_hit@15": "kNN(H) hit @15",
    "knn_recall@15": "among graph.k candidates",
    "PCA": "plane of H",
    "ridge": "ridge",
    "atlas": "atlas",
    "atlas_hit@15": "atlas hit @15",
}
ENCODER_ALONE = {
    "selection.mode": "none",
    "model.init": "pca",
    "model.recycling": False,
    "train.gate_steps": 0,
    "train.minisets": 1,
    "train.epochs": 1,
}
"""Settings with which a run is its encoder and next to nothing else."""


def score(
    config: RunConfig, train: Sequence[Slide], test: Sequence[Slide], donors: Mapping[str, str]
) -> list[dict]:
    """Scores of one encoder on slides it has not seen.

    Args:
        config: of genes and encoder.
        train: slides with positions.
        test: slides with positions.
        donors: donor of each slide.

    Returns:
        One row a slide: neighbour hit and recall of kNN(H), the hit by chance, and the distance
        Spearman of the plane, ridge regression and atlas of H.
    """
    config = config.with_values(ENCODER_ALONE)
    with tempfile.TemporaryDirectory() as folder:
        known = {slide.name: donors[slide.name] for slide in train}
        fit(list(train), [], config, Path(folder), donors=known)
        predictor = Predictor.load(Path(folder), resolve_device(config.train.device))
    seen = [(predictor.embed(slide), slide.pos) for slide in train]
    rows = []
    for slide in test:
        h = torch.from_numpy(predictor.embed(slide))
        graph = knn(h, config.graph.k)
        near = candidate_recall(knn(h, 15), slide.pos)
        row = {"slide": slide.name, "knn_hit@15": near["candidate_recall@15"]}
        row["knn_recall@15"] = candidate_recall(graph, slide.pos)["candidate_recall@15"]
        row["chance_hit@15"] = near["candidate_recall_chance@15"]
        layouts = run_baselines(h, graph, train=seen, only=("PCA", "ridge", "atlas"))
        found = {name: evaluate_layout(layout, slide.pos) for name, layout in layouts.items()}
        row |= {name: float(values["distance_spearman"]) for name, values in found.items()}
        rows.append(row | {"atlas_hit@15": float(found["atlas"]["neighbor_hit@15"])})
    return rows


def table(rows: Sequence[dict]) -> str:
    """Means of the first variant over slides and seeds, and paired differences of the others.

    Standard errors are over slides, seeds averaged first.
    """
    columns = list(COLUMNS)
    frame = pd.DataFrame(rows).groupby(["variant", "slide"], sort=False)[columns].mean()
    first, *others = frame.index.unique("variant")
    lines = [[first, *frame.loc[first].mean()]]
    for name in others:
        gap = (frame.loc[name] - frame.loc[first]).agg(["mean", "sem"])
        lines.append([name, *(f"{gap[c]['mean']:+.3f} ± {gap[c]['sem']:.3f}" for c in columns)])
    return harness.markdown(["", *COLUMNS.values()], lines)


def main(argv: list[str] | None = None) -> None:
    """``python -m benchmarks.embedding``; writes ``embedding.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="YAML file of variants, as for experiment")
    parser.add_argument("--slides", type=Path, nargs="+", required=True)
    parser.add_argument("--hold-out", default="slide", help="slide, donor, or names with commas")
    parser.add_argument("--donor-pattern", help="regular expression on the slide's name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    study = plan_study(
        given.slides,
        load_variants([], [given.study], given.set)[0],
        hold_out=given.hold_out,
        seeds=given.seeds,
        donor_pattern=given.donor_pattern,
    )
    record = harness.Record(given.out / "embedding.json", torch.device("cpu"))
    for seed in study.seeds:
        for fold in study.folds:
            for name in study.variants:
                config = study.config(name, seed)
                slides = read_all(study.files, config)
                train = [slide for slide in slides if slide.name not in fold.test]
                test = [slide for slide in slides if slide.name in fold.test]
                for row in score(config, train, test, study.donors):
                    record.add({"variant": name, "seed": seed, **row})
    print(table(record.rows))


if __name__ == "__main__":
    main()
