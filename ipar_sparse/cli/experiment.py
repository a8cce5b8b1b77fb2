"""``ipar-sparse experiment``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from ..files import check_folder
from . import options
from .messages import Stopped, say
from .options import OUTPUT, READING, RUNNING, flag, given
from .watched import loading

if TYPE_CHECKING:
    from ..evaluation.study_plan import Study

Variants = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PRESET|FILE.yaml...",
        help="Named variants, or study files with variants. [dim]Default: v1[/dim]",
        show_default=False,
    ),
]
Slides = Annotated[
    list[Path] | None,
    flag(
        "--slides", "Files or folders with measured positions, of any format.", READING, "SLIDE..."
    ),
]
HoldOut = Annotated[
    str | None,
    flag(
        "--hold-out",
        "slide: each slide in turn; donor: all slides of each donor in turn; or names of slides "
        "or donors. [dim]Default: slide[/dim]",
        RUNNING,
        "slide|donor|NAME,...",
    ),
]
Seeds = Annotated[
    str | None,
    flag("--seeds", "Training seeds, e.g. 0-4 or 0,3,7. [dim]Default: 0-2[/dim]", RUNNING, "N-M"),
]
CellFiles = Annotated[
    list[Path] | None,
    flag(
        "--cells",
        "Cells of another assay, with positions to score by: runs on all slides place them, by "
        "genes that they have. Can be repeated.",
        READING,
        "CELLS",
    ),
]
Frame = Annotated[
    str | None,
    flag(
        "--frame",
        "Name of the slide in whose frame positions of --cells were measured; adds the error in "
        "that frame.",
        READING,
        "NAME",
    ),
]
Reference = Annotated[
    str | None,
    flag(
        "--reference",
        "Variant that the others are compared with. [dim]Default: the first[/dim]",
        OUTPUT,
        "NAME",
    ),
]

RunsPerGpu = Annotated[
    int | None,
    flag(
        "--runs-per-gpu",
        "Runs that share a GPU, while its memory allows. [dim]Default: 4[/dim]",
        RUNNING,
        "N",
        min=1,
    ),
]
Scheduler = Annotated[
    str | None,
    flag(
        "--scheduler",
        "Address of a dask scheduler, or the file that it wrote: its workers do the runs, and see "
        "slides and --out under the same paths.",
        RUNNING,
        "ADDRESS",
    ),
]


def experiment(
    out: options.OutFolder,
    what: Variants = None,
    slides: Slides = None,
    cells: CellFiles = None,
    frame: Frame = None,
    hold_out: HoldOut = None,
    donor_key: options.DonorKey = None,
    donor_pattern: options.DonorPattern = None,
    donor_map: options.DonorMap = None,
    seeds: Seeds = None,
    overrides: options.Overrides = None,
    reference: Reference = None,
    embedding: options.Embedding = None,
    layer: options.Layer = None,
    normalized: options.Normalized = None,
    slide_key: options.SlideKey = None,
    spatial_key: options.SpatialKey = None,
    ignore_case: options.IgnoreCase = None,
    drop_outliers: options.DropOutliers = None,
    device: options.Device = None,
    jobs: options.Jobs = None,
    runs_per_gpu: RunsPerGpu = None,
    scheduler: Scheduler = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Train and score variants on held-out slides over seeds, side by side, in one table.

    The same command goes on with a study that was stopped; --overwrite starts anew.
    """
    from ..data.headers import check_headers
    from ..evaluation.study_plan import load_variants, plan_study

    names, studies, files = _sort(what or [])
    files = [*(slides or []), *files]
    if not files:
        raise UserError(
            "give the slides, e.g. ipar-sparse experiment v1 --slides A.h5ad B.h5ad C.h5ad "
            "--out DIR"
        )
    if cells and hold_out:
        raise UserError("--hold-out means nothing beside --cells, which no run sees; leave it out")
    if frame and not cells:
        raise UserError("--frame is that of --cells; add these, or leave it out")
    if scheduler and (jobs or runs_per_gpu):
        raise UserError(
            "--jobs and --runs-per-gpu are of this machine; with --scheduler each worker does one "
            "run: start as many workers as runs are wanted"
        )
    check_folder(out)
    data = given(embedding=embedding, layer=layer, normalized=normalized, slide_key=slide_key)
    data |= given(spatial_key=spatial_key, ignore_case=ignore_case, drop_outliers=drop_outliers)
    variants, stated = load_variants(
        names if names or studies else ["v1"], studies, overrides or [], data=data
    )
    for one in variants.values():
        check_headers(files, one.data, require_pos=True)
    study = plan_study(
        files,
        variants,
        hold_out=str(hold_out or stated.get("hold_out") or "slide"),
        seeds=parse_seeds(str(stated.get("seeds", "0-2") if seeds is None else seeds)),
        reference=reference or stated.get("reference"),
        donor_key=donor_key,
        donor_pattern=donor_pattern,
        donor_map=donor_map,
        cells=cells or (),
        frame=frame,
    )

    how = {"jobs": jobs, "runs_per_gpu": runs_per_gpu, "scheduler": scheduler}
    _run(study, out, **how, device=device, overwrite=overwrite)


def _run(study: Study, out: Path, **how: Any) -> None:
    """Works off a study, and says what came of it."""
    with loading():  # what is refused above does not wait for torch
        from ..report import run_study_with_report

    try:
        results = run_study_with_report(study, out, **how)
    except KeyboardInterrupt:
        raise Stopped(
            f"stopped; {out} holds all that was done so far: the same command goes on with it"
        ) from None
    if results.done:
        say(f"study: {out / 'report.html'}")
    if results.failed:
        folder, error = next(iter(results.failed.items()))
        more = f" (and {len(results.failed) - 1} more)" if len(results.failed) > 1 else ""
        say(f"failed: {folder}: {error}{more}; see its log.txt", stream=sys.stderr)
        raise typer.Exit(1)


def parse_seeds(text: str) -> list[int]:
    """The seeds that a text such as ``"0-4"`` or ``"0,3,7"`` names."""
    seeds: list[int] = []
    for part in text.strip("[] ").split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"--seeds takes numbers and ranges, e.g. 0-4 or 0,3,7; got {text!r}")
        seeds += range(int(first), int(last if dash else first) + 1)
    if not seeds:
        raise UserError(f"--seeds {text} names no seed; write the smaller first, e.g. 0-4")
    return seeds


def _sort(words: list[str]) -> tuple[list[str], list[Path], list[Path]]:
    """Presets, study files and slides; of ``--slides A B C`` the option takes A alone."""
    from ..config.presets import PRESETS
    from ..data.paths import Source

    names, studies, files = [], [], []
    for word in words:
        path = Source.parse(word).path
        if path.suffix.lower() in (".yaml", ".yml"):
            studies.append(Path(word))
        elif path.suffix or os.sep in word or (word not in PRESETS and path.is_dir()):
            files.append(Path(word))
        else:
            names.append(word)
    return names, studies, files
