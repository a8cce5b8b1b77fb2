"""Whether runs know what they do not know: verdicts, p-values and stated errors on held-out slides.

    python -m benchmarks.reliability RUN=SLIDE.h5ad,... --foreign RUN=SLIDE.h5ad,... --out DIR

Each slide is placed as it is, with its gene names shuffled, and as noise that has its totals.
Slides under ``--foreign`` are of another tissue; letter case of gene names is disregarded. Writes
``reliability.json``, one row a slide, and ``reliability.png``, stated against true errors.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from scipy.stats import kstest, spearmanr

from ipar_sparse.data.input_profile import informative
from ipar_sparse.data.readers import read_files
from ipar_sparse.data.records import recorded_inputs
from ipar_sparse.data.slide import Slide
from ipar_sparse.inference.placing import read_cells
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.inference.run_folder import reading_settings
from ipar_sparse.layout.uncertainty import square_errors
from ipar_sparse.train.typicality import fit_typicality

MEAN_OF_RMS = math.sqrt(math.pi) / 2
"""Mean distance over the root mean square distance, of errors that are Gaussian in the plane."""


def spoiled(slide: Slide, seed: int = 0) -> Iterator[tuple[str, Slide]]:
    """A slide with shuffled gene names, and noise with its totals."""
    rng = np.random.default_rng(seed)
    yield (
        "shuffled gene names",
        replace(slide, genes=slide.genes[rng.permutation(len(slide.genes))]),
    )
    noise = []
    for row in slide.expression:
        values = row.toarray().ravel()
        if slide.normalized:
            noise.append(rng.permutation(values))
        else:
            even = np.full(len(values), 1 / len(values))
            noise.append(rng.multinomial(int(values.sum()), even))
    yield "noise", replace(slide, expression=sparse.csr_matrix(np.array(noise, dtype=np.float32)))


def score(predictor: Predictor, slide: Slide, kind: str) -> tuple[dict, np.ndarray]:
    """One row, and stated and true errors (n, 2)."""
    slide = informative(predictor.conform(slide, True))
    found = predictor.predict(slide)
    error, stated = np.sqrt(square_errors(found.pos, slide.pos)), found.uncertainty
    p_value = found.typicality.p_value
    before = predictor.uncertainty_of(len(error), found.predictive_variance)
    radius = predictor.config.uncertainty.disc_radius or 1.25

    def order(stated: np.ndarray) -> float:
        return float(spearmanr(stated, error).statistic) if np.ptp(stated) > 1e-9 else 0.0

    row = {
        "run": predictor.run.name,
        "slide": slide.name,
        "kind": kind,
        "verdict": found.typicality.verdict,
        **found.typicality.measures,
        "ks": float(kstest(p_value[np.isfinite(p_value)], "uniform").statistic),
        "stated": float(np.sqrt(np.square(stated).mean())),
        "true": float(np.sqrt(np.square(error).mean())),
        "mean_stated": MEAN_OF_RMS * float(stated.mean()),
        "mean_true": float(error.mean()),
        "disc_coverage": float((error <= radius * stated).mean()),
        "spearman": order(stated),
        "spearman_without_typicality": order(before),
    }
    return row, np.stack([stated, error, p_value], axis=1)


def load(run: Path, folder: Path) -> Predictor:
    """A run; one of an earlier version gets the typicality that its slides in a folder give."""
    predictor = Predictor.load(run)
    if predictor.typicality is None:
        recorded = recorded_inputs(run)
        paths = [folder / Path(one["path"]).name for one in recorded["train"]]
        data = reading_settings(run, predictor.config)
        slides = [
            informative(predictor.conform(slide))
            for slide in read_files(paths, data, require_pos=True)
        ]
        predictor.typicality = fit_typicality(
            slides, recorded.get("donors"), predictor.meta["genes"], predictor.config
        )
    return predictor


def curves(points: dict[str, list[np.ndarray]], path: Path) -> None:
    """Root mean square of true errors against that of stated ones, in tenths of the cells."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4.6))
    for name, parts in points.items():
        values = np.concatenate(parts)
        tenths = np.array_split(np.square(values[np.argsort(values[:, 0], kind="stable")]), 10)
        stated, true = np.sqrt([tenth[:, :2].mean(0) for tenth in tenths]).T
        axes.plot(stated, true, marker="o", ms=3, label=name)
    axes.axline((0, 0), slope=1, color="0.6", ls="--", lw=1)
    axes.set(xlabel="stated error (tissue radii)", ylabel="true error (tissue radii)")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("held_out", nargs="*", help="RUN=SLIDE,SLIDE")
    parser.add_argument("--foreign", nargs="*", default=[], help="RUN=SLIDE,SLIDE")
    parser.add_argument("--as-they-are", action="store_true", help="no shuffled names, no noise")
    parser.add_argument("--training", type=Path, help="folder of training slides, for old runs")
    parser.add_argument("--out", type=Path, default=Path("reliability"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    rows, points = [], defaultdict(list)
    for kind, pairs in (("held out", given.held_out), ("another tissue", given.foreign)):
        for pair in pairs:
            run, _, names = pair.partition("=")
            files = [Path(name) for name in names.split(",")]
            predictor = load(Path(run), given.training or files[0].parent)
            for path in files:
                data = reading_settings(predictor.run, predictor.config, ignore_case=True)
                for slide in read_cells(predictor, path, data, require_pos=True):
                    cases = [(kind, slide)]
                    if kind == "held out" and not given.as_they_are:
                        cases += spoiled(slide)
                    for name, case in cases:
                        row, values = score(predictor, case, name)
                        rows.append({"set": path.parent.name, **row})
                        if name == "held out":
                            points[path.parent.name].append(values)
                        print(json.dumps(rows[-1]), flush=True)
    for name, parts in points.items():
        stated, error, p_value = np.concatenate(parts).T
        ratio = float(np.sqrt(np.square(stated).mean() / np.square(error).mean()))
        found = {"set": name, "ks": float(kstest(p_value, "uniform").statistic), "ratio": ratio}
        print(json.dumps(found | {"mean_ratio": MEAN_OF_RMS * float(stated.mean() / error.mean())}))
    (given.out / "reliability.json").write_text(json.dumps(rows, indent=1) + "\n")
    if points:
        curves(points, given.out / "reliability.png")


if __name__ == "__main__":
    main()
