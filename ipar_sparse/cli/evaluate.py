"""``ipar-sparse evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .folders import check_output_folder, removed_on_failure
from .inputs import load_predictor, read_files, reading_settings, tell_notes
from .messages import note, say
from .options import RUNNING, flag

if TYPE_CHECKING:
    from ..data.slide import Slide
    from ..inference.predictor import Predictor


def evaluate(
    run: options.Run,
    slide: Annotated[
        Path,
        typer.Argument(
            metavar="SLIDE",
            help="AnnData file (.h5ad or .zarr) with measured positions, not trained on.",
        ),
    ],
    out: options.OutFolder,
    noise_samples: options.NoiseSamples = None,
    baselines: Annotated[
        bool,
        flag("--baselines/--no-baselines", "Score simple methods beside the model.", RUNNING),
    ] = True,
    layer: options.Layer = None,
    normalized: options.Normalized = None,
    slide_key: options.SlideKey = None,
    embedding: options.Embedding = None,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Score a prediction against measured positions: metrics.json, report.html, figures.

    `ipar-sparse experiment` trains and scores on each slide or donor in turn.
    """
    check_output_folder(out, overwrite)
    predictor = load_predictor(run, device)
    data = reading_settings(predictor, layer, normalized, slide_key, embedding)
    slides = read_files([slide], data, require_pos=True)
    tell_notes(slides)

    from ..report import evaluate_slide

    for one in slides:
        _warn_if_seen(predictor, one)
        folder = out if len(slides) == 1 else out / one.name
        with removed_on_failure(folder):
            metrics = evaluate_slide(
                predictor,
                one,
                folder,
                noise_samples=noise_samples,
                baselines=baselines,
                command=f"ipar-sparse evaluate {run} {slide} --out {out}",
            )
        k = max(predictor.config.eval.ks)
        shown = {
            "distance Spearman": "distance_spearman",
            f"neighbour hit @{k}": f"neighbor_hit@{k}",
            "E_geo": "E_geo_hgate",
        }
        scores = ", ".join(f"{name} {metrics[key]:.3f}" for name, key in shown.items())
        say(f"{one.name}: {scores}\nreport: {folder / 'report.html'}")


def _warn_if_seen(predictor: Predictor, slide: Slide) -> None:
    """Says so where the slide took part in the training of the run."""
    from ..data.slide import slide_digest

    roles = {one["digest"]: one["role"] for one in predictor.meta["metadata"]["slides"]}
    if role := roles.get(slide_digest(slide)):
        did = {"train": "was trained on", "val": "decided when training stopped"}[role]
        note(f"{slide.name} {did}: these scores say nothing about unseen slides")
