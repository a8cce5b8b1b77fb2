"""``ipar-sparse evaluate``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from ..files import check_output_folder, folder_name
from . import options
from .folders import removed_on_failure
from .inputs import check_inputs, load_predictor, tell_notes
from .messages import note, say
from .options import RUNNING, flag, given
from .watched import loading

Baselines = Annotated[
    bool | None,
    flag(
        "--baselines/--no-baselines",
        "Score simple methods beside the model. [dim]Default: as in the run[/dim]",
        RUNNING,
    ),
]

ClassKey = Annotated[
    str | None,
    flag(
        "--class-key",
        "obs column of cell classes; adds the published score that sums over classes.",
        RUNNING,
        "COLUMN",
    ),
]
MeasuredIn = Annotated[
    str | None,
    flag(
        "--reference",
        "Training slide, by file or name, in whose frame the positions were measured; adds the "
        "error in that frame.",
        RUNNING,
        "SLIDE",
    ),
]


def evaluate(
    run: options.Run,
    slide: Annotated[
        Path,
        typer.Argument(
            metavar="SLIDE",
            help="File or folder with measured positions, of any format, not trained on.",
        ),
    ],
    out: options.OutFolder,
    noise_samples: options.NoiseSamples = None,
    baselines: Baselines = None,
    class_key: ClassKey = None,
    reference: MeasuredIn = None,
    layer: options.Layer = None,
    normalized: options.Normalized = None,
    slide_key: options.SlideKey = None,
    spatial_key: options.SpatialKey = None,
    ignore_case: options.IgnoreCase = None,
    drop_outliers: options.DropOutliers = None,
    embedding: options.Embedding = None,
    device: options.Device = None,
    genes: options.Genes = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Score a prediction against measured positions: metrics.json, and a page to explore.

    `ipar-sparse experiment` trains and scores on each slide or donor in turn.
    """
    check_output_folder(out, overwrite)
    reading = given(layer=layer, normalized=normalized, slide_key=slide_key, embedding=embedding)
    reading |= given(spatial_key=spatial_key, ignore_case=ignore_case, drop_outliers=drop_outliers)
    data = check_inputs(run, [slide], require_pos=True, device=device, **reading)
    within = None
    if reference is not None:
        from ..inference.reference import find_reference

        within = find_reference(run, reference)
    predictor = load_predictor(run, device)  # what is refused above does not wait for torch

    from ..inference.placing import read_cells, role_in_training

    slides = read_cells(
        predictor, slide, data, require_pos=True, slide_key_optional=slide_key is None
    )
    tell_notes(slides)

    with loading():
        from ..evaluation.scoring import score_slide
        from ..report import check_genes, summarize, write_evaluation

    asked = options.listed(genes)
    check_genes(slides, asked)
    for one in slides:
        if role := role_in_training(predictor, one):
            note(f"{one.name} {role}: these scores say nothing about unseen slides")
        folder = out if len(slides) == 1 else out / folder_name(one.name)
        with removed_on_failure(folder):
            found = score_slide(
                predictor,
                one,
                noise_samples=noise_samples,
                baselines=baselines,
                class_key=class_key,
                reference=within,
            )
            metrics = write_evaluation(
                predictor,
                one,
                found,
                folder,
                genes=asked,
                command=f"ipar-sparse evaluate {run} {slide} --out {out}",
            )
        scores = _scores(metrics, max(predictor.config.eval.ks))
        say(f"{one.name}: {summarize(found).text}\n{scores}\nreport: {folder / 'report.html'}")


def _scores(metrics: Mapping[str, float], k: int) -> str:
    shown = {
        "distance Spearman": "distance_spearman",
        f"neighbour hit @{k}": f"neighbor_hit@{k}",
        "E_geo": "E_geo_hgate",
    }
    return ", ".join(f"{name} {metrics[key]:.3f}" for name, key in shown.items())
