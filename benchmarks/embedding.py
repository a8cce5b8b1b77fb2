"""What an embedding holds of the place on slides its encoder has not seen, stage A alone.

    python -m benchmarks.embedding benchmarks/encoder.yaml --slides *.h5ad --hold-out donor \\
        --donor-pattern '^.' --seeds 0 1 2 --out DIR

Takes minutes where whole runs take hours, and everything that comes after ends near what it finds:
kNN in the embedding against chance, and the plane, ridge regression and atlas of it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ipar_sparse.evaluation.study import find_donors, load_variants, plan_folds, read_all

from ipar_sparse.config import RunConfig, resolve_device
from ipar_sparse.data.expression import match_genes
from ipar_sparse.data.slide import Slide
from ipar_sparse.estimators.atlas import atlas_layout
from ipar_sparse.estimators.regression import ridge_layout
from ipar_sparse.files import atomic_write
from ipar_sparse.geometry.gauge import principal_plane
from ipar_sparse.graph import knn
from ipar_sparse.inference.checkpoint import LAST, load_checkpoint, read_meta
from ipar_sparse.metrics.diagnostics import candidate_recall
from ipar_sparse.metrics.layout import evaluate_layout
from ipar_sparse.train.fit import build_encoder, embed_raw, fit_encoder, settle

COLUMNS = {
    "knn_hit@15": "kNN(H) hit @15",
    "knn_recall@15": "among 100 candidates",
    "plane": "plane of H",
    "ridge": "ridge",
    "atlas": "atlas",
    "atlas_hit@15": "atlas hit @15",
}


def score(
    config: RunConfig, train: Sequence[Slide], test: Sequence[Slide], donors, seed: int
) -> list[dict]:
    """Scores of one encoder on slides it has not seen.

    Args:
        config: decides genes and stage A.
        train: slides with positions.
        test: slides with positions.
        donors: slide name to donor.
        seed: of the encoder.

    Returns:
        One row a slide: neighbour hit and recall of kNN(H), their value by chance, and distance
        Spearman of the plane, ridge regression and atlas of H.
    """
    config = config.replace(train={"seed": seed})
    device = resolve_device(config.train.device)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        fit_encoder(list(train), config, out, donors)
        meta = read_meta(out / LAST)
        genes = meta["genes"]
        encoder = build_encoder(settle(config, meta["facts"]), len(genes)).to(device)
        load_checkpoint(out / LAST, {"encoder": encoder})
    encoder.eval()
    for slide in test:
        match_genes([slide], genes)
    h = {slide.name: embed_raw(slide, encoder, genes, device) for slide in (*train, *test)}
    known = [(h[slide.name].numpy(), slide.pos) for slide in train]
    rows = []
    for slide in test:
        own = h[slide.name]
        near, far = (candidate_recall(knn(own, k), slide.pos) for k in (15, config.graph.k))
        layouts = {
            "plane": principal_plane(own).numpy(),
            "ridge": ridge_layout(own.numpy(), known),
            "atlas": atlas_layout(own, known),
        }
        found = {name: evaluate_layout(layout, slide.pos) for name, layout in layouts.items()}
        row = {
            "slide": slide.name,
            "knn_hit@15": near["candidate_recall@15"],
            "knn_recall@15": far["candidate_recall@15"],
            "chance_hit@15": near["candidate_recall_chance@15"],
        }
        row |= {name: float(values["distance_spearman"]) for name, values in found.items()}
        rows.append(row | {"atlas_hit@15": float(found["atlas"]["neighbor_hit@15"])})
    return rows


def table(rows: list[dict]) -> str:
    """Means over slides and seeds, one line a variant, and paired differences from the first.

    Standard errors are over slides, seeds averaged first.
    """
    names = list(dict.fromkeys(row["variant"] for row in rows))
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in names:
        cells = []
        for column in COLUMNS:
            own, first = _by_slide(rows, name, column), _by_slide(rows, names[0], column)
            if name == names[0]:
                cells.append(f"{np.mean(list(own.values())):.3f}")
                continue
            gap = np.array([own[slide] - first[slide] for slide in own if slide in first])
            spread = f" ± {gap.std(ddof=1) / len(gap) ** 0.5:.3f}" if len(gap) > 1 else ""
            cells.append(f"{gap.mean():+.3f}{spread}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _by_slide(rows: list[dict], variant: str, column: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["variant"] == variant:
            values.setdefault(row["slide"], []).append(row[column])
    return {slide: float(np.mean(found)) for slide, found in values.items()}


def main(argv: list[str] | None = None) -> None:
    """``python -m benchmarks.embedding``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="YAML file of variants, as for experiment")
    parser.add_argument("--slides", type=Path, nargs="+", required=True)
    parser.add_argument("--hold-out", default="slide")
    parser.add_argument("--donor-pattern")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    variants, _ = load_variants([], [args.study], args.set)
    slides = read_all([str(path) for path in args.slides], next(iter(variants.values())))
    slides = {slide.name: slide for slide in slides}
    donors = find_donors(list(slides.values()), pattern=args.donor_pattern)
    folds, _ = plan_folds(donors, args.hold_out)
    rows: list[dict] = []
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for fold in folds:
            train = [slides[name] for name in slides if name not in fold.test]
            test = [slides[name] for name in fold.test]
            for name, config in variants.items():
                found = score(config, train, test, donors, seed)
                rows += [{"variant": name, "seed": seed, **row} for row in found]
                atomic_write(args.out / "embedding.json", json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
