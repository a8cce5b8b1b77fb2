"""``ipar-sparse predict``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from ..files import check_output_folder
from . import options
from .folders import removed_on_failure
from .inputs import check_inputs, load_predictor, tell_notes
from .messages import say
from .options import OUTPUT, flag, given
from .results import outputs_of, tell_written

ObsmOnly = Annotated[
    bool,
    flag(
        "--out-obsm-only",
        "Write cell names and the results to --out, and no copy of the input's expression.",
        OUTPUT,
    ),
]


def predict(
    run: options.Run,
    cells: Annotated[
        list[Path],
        typer.Argument(metavar="CELLS...", help="Files or folders of the cells, of any format."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE|DIR",
            help="Copy of the input to write, with the results added; .csv for a table of the "
            "results alone. A folder for several inputs.",
        ),
    ],
    noise_samples: options.NoiseSamples = None,
    layer: options.Layer = None,
    normalized: options.Normalized = None,
    slide_key: options.SlideKey = None,
    ignore_case: options.IgnoreCase = None,
    keep_empty: options.KeepEmpty = False,
    embedding: options.Embedding = None,
    strict: options.Strict = False,
    device: options.Device = None,
    report: options.Report = None,
    genes: options.Genes = None,
    obsm_only: ObsmOnly = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Place cells: positions go to obsm['X_ipar'] of a copy of the file."""
    from ..data.headers import check_output
    from ..data.keys import Keys

    asked = options.listed(genes)
    if asked and report is None:
        raise UserError("--genes chooses genes of the page; add --report DIR, or leave it out")
    if report is not None:
        check_output_folder(report, overwrite, "--report")
    obsm, outputs = (Keys.PREDICTION, Keys.EMBEDDING), outputs_of(cells, out)
    taken = () if obsm_only else obsm
    for source, path in outputs.items():
        check_output(source, path, overwrite=overwrite, obsm=taken)
    reading = given(layer=layer, normalized=normalized, slide_key=slide_key, embedding=embedding)
    reading |= given(ignore_case=ignore_case, device=device)
    data, optional = check_inputs(run, cells, require_pos=False, **reading), slide_key is None
    predictor = load_predictor(run, device)  # what is refused above does not wait for torch

    from ..data.writers import write_predictions
    from ..inference.placing import certainty_columns, place_cells, read_cells, refuse_unlike
    from ..progress import stage

    columns = certainty_columns(predictor)
    for source, path in outputs.items():
        obs = () if obsm_only else (*columns, Keys.EMPTY)
        check_output(source, path, overwrite=overwrite, obsm=taken, obs=obs)
    writing: dict[str, Any] = given(slide_key=data.slide_key, results_alone=obsm_only)
    for source in outputs if strict else ():  # nothing is written if one of them is refused
        refuse_unlike(predictor, read_cells(predictor, source, data, slide_key_optional=optional))
    for source, path in outputs.items():
        slides = read_cells(predictor, source, data, slide_key_optional=optional)
        tell_notes(slides)
        pages = []
        folder = report if report is None or len(outputs) == 1 else report / path.stem
        with removed_on_failure(folder) if folder else nullcontext():
            if folder:
                from ..report import check_genes, write_prediction_report

                check_genes(slides, asked)
            added = place_cells(predictor, slides, noise_samples, keep_empty)
            if folder:
                command = f"ipar-sparse predict {run} {source} --out {path} --report {report}"
                pages = write_prediction_report(
                    predictor, slides, added, folder, genes=asked, command=command
                )
            with stage(f"Writing {path.name}"):
                write_predictions(source, path, **vars(added), **writing, overwrite=overwrite)
        tell_written(slides, path, obsm, columns)
        for page in pages:
            say(f"report: {page}")
