"""``ipar-sparse predict``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..distributed import barrier, is_rank, leads, shared_out, sharing_rows, size
from ..errors import UserError
from ..files import check_output_folder
from . import options
from .folders import removed_on_failure
from .inputs import check_inputs, load_predictor, tell_notes
from .messages import Lines, lines_kept, say, say_kept
from .options import OUTPUT, RUNNING, flag, given
from .results import outputs_of, tell_written

if TYPE_CHECKING:
    from ..data.slide import Slide
    from ..inference.predictor import Predictor
    from .beside import Beside

_SMALL = 1 << 24  # stored values or cells, which are held twice

CellFiles = Annotated[
    list[Path],
    typer.Argument(metavar="CELLS...", help="Files or folders of the cells, of any format."),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        metavar="FILE|DIR",
        help="Copy of the input to write, with the results added; .csv for a table of the results "
        "alone. A folder for several inputs.",
    ),
]
ObsmOnly = Annotated[
    bool,
    flag(
        "--out-obsm-only",
        "Write cell names and the results to --out, and no copy of the input's expression.",
        OUTPUT,
    ),
]

Reference = Annotated[
    str | None,
    flag(
        "--reference",
        "Training slide, by file or name, in whose own coordinates and units positions are wanted "
        "as well.",
        RUNNING,
        "SLIDE",
    ),
]
Top = Annotated[
    int | None,
    flag(
        "--top",
        "Also give the N most probable places of each cell, 10 at most, and their weights; in the "
        "frame of --reference where there is one.",
        OUTPUT,
        "N",
    ),
]
Mapped = Annotated[
    Path | None,
    flag(
        "--mapping",
        "Also write an AnnData of cells x spots of --reference, sparse, whose rows sum to 1.",
        OUTPUT,
        "FILE",
    ),
]
KeepForeign = Annotated[
    bool,
    flag(
        "--keep-foreign",
        "Give cells that do not belong to the tissue a position in the frame of --reference, too.",
        OUTPUT,
    ),
]
Adapt = Annotated[
    bool | None,
    flag(
        "--adapt/--no-adapt",
        "Whether the adapter for cells of another assay takes part. [dim]Default: where the run "
        "was trained for them, or they hold far more or fewer genes[/dim]",
        RUNNING,
    ),
]


def predict(
    run: options.Run,
    cells: CellFiles,
    out: Out,
    reference: Reference = None,
    top: Top = None,
    mapping: Mapped = None,
    adapt: Adapt = None,
    noise_samples: options.NoiseSamples = None,
    layer: options.Layer = None,
    normalized: options.Normalized = None,
    slide_key: options.SlideKey = None,
    ignore_case: options.IgnoreCase = None,
    keep_empty: options.KeepEmpty = False,
    keep_foreign: KeepForeign = False,
    embedding: options.Embedding = None,
    strict: options.Strict = False,
    device: options.Device = None,
    report: options.Report = None,
    genes: options.Genes = None,
    obsm_only: ObsmOnly = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Place cells: positions go to obsm['X_ipar'] of a copy of the file."""
    from ..inference.reference import frame_options

    asked = options.listed(genes)
    if asked and report is None:
        raise UserError("--genes chooses genes of the page; add --report DIR, or leave it out")
    if report is not None:
        check_output_folder(report, overwrite, "--report")
    obsm, outputs = _keys(reference, top), outputs_of(cells, out)
    taken = () if obsm_only else obsm
    _check(outputs, overwrite, taken)
    if mapping is not None:
        _check_mapping(mapping, reference, outputs, overwrite)
    said = given(layer=layer, normalized=normalized, slide_key=slide_key, embedding=embedding)
    said |= given(ignore_case=ignore_case, device=device)
    data = check_inputs(run, cells, require_pos=False, **said)
    shown = (mapping is not None, report is not None)
    wanted = frame_options(run, reference, top, keep_foreign, *shown)
    writing: dict[str, Any] = given(slide_key=data.slide_key, results_alone=obsm_only)
    writing["overwrite"] = overwrite
    wanted |= {"noise_samples": noise_samples, "keep_empty": keep_empty, "adapt": adapt}
    reading: dict[str, Any] = {"data": data, "slide_key_optional": slide_key is None}
    with nullcontext() if strict or any(shown) else _beside(outputs, reading, writing) as beside:
        predictor = load_predictor(run, device)  # what is refused above does not wait for torch

        from ..inference.placing import certainty_columns, read_cells, refuse_cells

        columns = certainty_columns(predictor, reference is not None)
        _check(outputs, overwrite, taken, () if obsm_only else columns)
        first = strict or (reference is not None and len(outputs) > 1)
        for source in outputs if first else ():  # nothing is written if one of them is refused
            slides = read_cells(predictor, source, **reading)
            refuse_cells(predictor, slides, strict, wanted["reference"])

        def place(output: tuple[Path, Path]) -> Lines:
            source, path = output
            with lines_kept() as lines:
                found = None if beside is None else beside.slides()
                slides = read_cells(predictor, source, **reading, slides=found)
                tell_notes(slides)
                folder = report if report is None or len(outputs) == 1 else report / path.stem
                command = f"ipar-sparse predict {run} {source} --out {path} --report {report}"
                page = None if folder is None else (folder, asked, command)
                pages = _place(predictor, slides, output, wanted, page, mapping, writing, beside)
                tell_written(slides, path, obsm, columns)
                for one in pages:
                    say(f"report: {one}")
            return lines

        _on_ranks(list(outputs.items()), place)


@contextmanager
def _beside(
    outputs: Mapping[Path, Path], reading: dict[str, Any], writing: dict[str, Any]
) -> Iterator[Beside | None]:
    """A process that reads one file of no great size and writes its results; None without need."""
    from ..data.headers import check_headers
    from .beside import Beside

    (source, out), *others = outputs.items()
    sizes = check_headers([source], reading["data"], require_pos=False, slide_key_optional=True)
    small = sizes and max(sizes[0].stored, sizes[0].cells) <= _SMALL
    if others or not small or not source.is_file() or is_rank() or not Beside.helps():
        yield None
        return

    def read() -> list[Slide]:
        from ..data.readers import read_files

        return read_files([source], require_pos=False, **reading)

    def write(**results: Any) -> None:
        from ..data.writers import write_predictions

        write_predictions(source, out, **results, **writing)

    beside = Beside(read, write)
    try:
        yield beside
    finally:
        beside.end()


def _on_ranks(outputs: Sequence[tuple[Path, Path]], place: Callable) -> None:
    """Files on different ranks, or where these are more than files, one by one on all of them."""
    barrier()  # all have checked what none has written yet
    if size() > len(outputs):
        for output in outputs:
            place(output)
    else:
        for lines in shared_out(outputs, place):
            say_kept(lines)


def what_is_left(out: Path) -> str:
    """What a prediction that was stopped leaves behind."""
    return f"{out} holds nothing half-written; run it again"


def _keys(reference: str | None, top: int | None) -> tuple[str, ...]:
    """The obsm keys that are written."""
    from ..data.keys import Keys

    framed = () if reference is None else (Keys.REFERENCE,)
    placed = () if top is None else (Keys.TOP, Keys.TOP_WEIGHT)
    return (Keys.PREDICTION, *framed, *placed, Keys.EMBEDDING)


def _check(
    outputs: Mapping[Path, Path],
    overwrite: bool,
    obsm: Sequence[str],
    obs: Sequence[str] = (),
) -> None:
    """Refuses outputs that cannot be written."""
    from ..data.headers import check_output
    from ..data.keys import Keys

    for source, path in outputs.items():
        columns = (*obs, Keys.EMPTY) if obs else ()
        check_output(source, path, overwrite=overwrite, obsm=obsm, obs=columns)


def _check_mapping(
    mapping: Path, reference: str | None, outputs: Mapping[Path, Path], overwrite: bool
) -> None:
    """Refuses a mapping that cannot be written."""
    from ..inference.reference import check_mapping

    if len(outputs) > 1:
        raise UserError(f"--mapping goes with one input, given {len(outputs)}; run them one by one")
    check_mapping(mapping, reference, (*outputs, *outputs.values()), overwrite)


def _place(
    predictor: Predictor,
    slides: Sequence[Slide],
    output: tuple[Path, Path],
    wanted: dict[str, Any],
    page: tuple[Path, list[str], str] | None,
    mapping: Path | None,
    writing: dict[str, Any],
    beside: Beside | None,
) -> list[Path]:
    """Places the cells of one file and writes what was found.

    Args:
        predictor: the trained run.
        slides: of the file.
        output: the file, and what is written.
        wanted: of the prediction.
        page: its folder, its genes and the command that made it; None for no page.
        mapping: file of the assignment to spots; None for none.
        writing: how results are written.
        beside: the process that writes them; None for this one.

    Returns:
        The pages that were written.
    """
    from ..inference.placing import place_cells
    from ..progress import stage

    pages: list[Path] = []
    source, out = output
    if page:
        from ..report import check_genes, write_prediction_report

        check_genes(slides, page[1])
    with removed_on_failure(page[0]) if page and leads() else nullcontext():
        with sharing_rows(min(slide.num_cells for slide in slides)):
            added = place_cells(predictor, slides, **wanted)
        if not leads():
            return pages
        if page:
            folder, genes, command = page
            shown: dict[str, Any] = {"genes": genes, "command": command}
            shown["reference"] = wanted["reference"]
            pages = write_prediction_report(predictor, slides, added, folder, **shown)
        with stage(f"Writing {out.name}"):
            if beside is None or not beside.write(**vars(added)):
                from ..data.writers import write_predictions

                write_predictions(source, out, **vars(added), **writing)
        if mapping is not None:
            from ..data.writers import write_anndata
            from ..inference.mapping import map_to_spots

            found = map_to_spots(predictor, slides, added, wanted["reference"])
            write_anndata(found, mapping, overwrite=writing["overwrite"])
            say(f"{found.n_obs} cells x {found.n_vars} spots in {mapping}")
    return pages
