"""The command line: what a person types, and every message they get back."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from .. import __version__
from ..errors import UserError

try:
    import typer
except ModuleNotFoundError:
    print("the command line needs: pip install 'ipar_sparse[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

if TYPE_CHECKING:
    from ..config import RefineConfig, RunConfig
    from ..data.slide import Slide
    from ..inference.predictor import Predictor

EXTRAS = {
    "anndata": "cli",
    "jinja2": "cli",
    "matplotlib": "cli",
    "pydantic": "cli",
    "rich": "cli",
    "safetensors": "cli",
    "sklearn": "cli",
    "tensorboard": "cli",
    "yaml": "cli",
    "faiss": "faiss",
    "umap": "umap",
}
"""Module that may be missing -> the extra that brings it."""

INPUTS = "inputs.json"
"""Which files a run was trained on, so that ``--resume`` finds them again."""


class Stopped(Exception):
    """Ctrl-C, with what the user should know about it."""


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Predict where cells lie in a tissue from their gene expression alone.\n\n"
        "Train on slides whose positions are known, then place cells of a slide that has none. "
        "Slides are AnnData files (.h5ad or .zarr) with positions in obsm\\['spatial'].\n\n"
        "[bold]A first try, with simulated slides:[/bold]\n\n"
        "  ipar-sparse simulate slides --slides 4\n\n"
        "  ipar-sparse train slides/cortex1.h5ad slides/cortex2.h5ad --val slides/cortex3.h5ad "
        "--out run\n\n"
        "  ipar-sparse evaluate run slides/cortex4.h5ad --out report"
    ),
)


class Protocol(str, Enum):
    """Who is held out in turn."""

    slide = "leave-one-slide-out"
    donor = "leave-one-donor-out"

    @property
    def hold_out(self) -> str:
        return self.name


class Tissue(str, Enum):
    """Kinds of simulated tissue."""

    cortex = "cortex"
    lobules = "lobules"


def _flag(names: str, text: str, panel: str, metavar: str | None = None, **rest: Any):
    """An option that is not required, under a heading of the help."""
    return typer.Option(
        *names.split(),
        help=text,
        rich_help_panel=panel,
        metavar=metavar,
        show_default=False,
        **rest,
    )


READING, RUNNING, OUTPUT = "Reading the slides", "Running", "Output"
PROTOCOL = "Leave-one-out"

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run.")]
Cells = Annotated[
    Path, typer.Argument(metavar="CELLS", help="AnnData file (.h5ad or .zarr) with the cells.")
]
OutFile = Annotated[
    Path,
    typer.Option(
        "--out", "-o", metavar="FILE", help="Copy of the input to write, with the results in it."
    ),
]
OutFolder = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write into.")
]
Overwrite = Annotated[bool, _flag("--overwrite", "Replace earlier output.", OUTPUT)]
Layer = Annotated[
    str | None,
    _flag("--layer", "Layer that holds the expression. [dim]Default: X[/dim]", READING, "NAME"),
]
Normalized = Annotated[
    bool | None,
    _flag(
        "--normalized/--counts",
        "Is the expression log-normalised, or raw counts? "
        "[dim]Default: counts if all values are whole numbers[/dim]",
        READING,
    ),
]
SlideKey = Annotated[
    str | None,
    _flag("--slide-key", "obs column that tells the slides of one file apart.", READING, "NAME"),
]
Embedding = Annotated[
    str | None,
    _flag(
        "--embedding",
        "Use this embedding instead of training an encoder, e.g. obsm:X_pca.",
        READING,
        "obsm:KEY",
    ),
]
Device = Annotated[
    str | None,
    _flag(
        "--device",
        "cpu, cuda, cuda:1, ... [dim]Default: auto, a GPU where there is one[/dim]",
        RUNNING,
        "NAME",
    ),
]
Seeds = Annotated[
    int | None,
    _flag(
        "--seeds",
        "Predict N times from different noise and tell how much each cell moves. "
        "[dim]Default: 1[/dim]",
        RUNNING,
        "N",
        min=1,
    ),
]


Overrides = Annotated[
    list[str] | None,
    _flag("--set", "One setting, e.g. train.epochs=30; can be repeated.", RUNNING, "KEY=VALUE"),
]
HoldOut = Annotated[
    str | None,
    _flag(
        "--hold-out",
        "slide: each slide in turn; donor: all slides of each donor in turn; or names of slides "
        "or donors. [dim]Default: slide[/dim]",
        RUNNING,
        "slide|donor|NAME,...",
    ),
]
DonorKey = Annotated[
    str | None, _flag("--donor-key", "obs column that names the donor.", READING, "NAME")
]
DonorPattern = Annotated[
    str | None,
    _flag(
        "--donor-pattern",
        "Regular expression that finds the donor in a slide's name, e.g. '^.' for the first "
        "letter. [dim]Default: every slide is a donor[/dim]",
        READING,
        "REGEX",
    ),
]
DonorMap = Annotated[
    Path | None,
    _flag("--donor-map", "YAML file with a line `slide: donor` for each.", READING, "FILE"),
]
StudySeeds = Annotated[
    str | None,
    _flag("--seeds", "Seeds, e.g. 0-4 or 0,3,7. [dim]Default: 0-2[/dim]", RUNNING, "N-M"),
]
Jobs = Annotated[
    int | None,
    _flag(
        "--jobs",
        "Runs side by side, on the GPU too. [dim]Default: half of the cores[/dim]",
        RUNNING,
        "N",
        min=1,
    ),
]


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the whole traceback of an error.")
    ] = False,
) -> None:
    pass


_STARTS_TRIED = {
    "map": "a learned map",
    "plane": "the embedding's plane",
    "atlas": "an atlas",
    "fields": "fields of genes",
}
_EMBEDDINGS_TRIED = {
    "spatial genes": "spatial genes forward",
    "all genes": "genes alike",
    "counts": "components of counts",
    "principal": "principal components kept",
    "spatial": "spatial ones",
}
_LAST_STEPS_TRIED = {
    "plain": "by the embedding",
    "middle": "half whitened",
    "whitened": "whitened",
    "leading": "by leading components",
    "narrow": "along the first axis alone",
    "loose": "loose",
    "firm": "firm",
    "close": "close",  # of runs before
    "wide": "wide",
}


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder to write the slides to.")],
    tissue: Annotated[
        Tissue,
        typer.Option(
            help="cortex: layers and a gradient, so that expression tells the position. "
            "lobules: liver-like zones that repeat, so that it tells only part of it."
        ),
    ] = Tissue.cortex,
    slides: Annotated[int, typer.Option(min=1, metavar="N", help="How many slides.")] = 3,
    spots: Annotated[int, typer.Option(min=1, metavar="N", help="Spots on each slide.")] = 1500,
    genes: Annotated[int, typer.Option(min=50, metavar="N", help="Genes measured.")] = 1200,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Another seed, other slides.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Make slides of a simulated tissue, to try things out."""
    from ..data.anndata_io import write_slide
    from ..data.simulation import simulate as make_slides
    from ..progress import Progress

    _folder(out, f"--out {out}")
    paths = [out / f"{tissue.value}{i + 1}.h5ad" for i in range(slides)]
    standing = [path.name for path in paths if path.exists()]
    if standing and not overwrite:
        raise UserError(f"{out} holds {standing[0]} already; pass --overwrite or another folder")
    with _removed_on_failure(out, paths), Progress() as progress:
        with progress.task("Simulating"):
            made = make_slides(tissue.value, slides=slides, spots=spots, genes=genes, seed=seed)
        for slide, path in zip(progress.track(made, "Writing"), paths, strict=True):
            write_slide(slide, path, overwrite=overwrite)
    _say(f"{slides} {tissue.value} slides of {spots} spots and {genes} genes in {out}")


@app.command()
def train(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="RUN", help="Folder of the run.")],
    slides: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="SLIDE...",
            help="AnnData files (.h5ad or .zarr) with measured positions, to train on.",
            show_default=False,
        ),
    ] = None,
    val: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="SLIDE",
            help="Slide that decides when to stop; can be given more than once. "
            "[dim]Default: of more than three slides one is kept for this, of a donor that has "
            "most[/dim]",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        _flag(
            "--config",
            "YAML file with settings; `ipar-sparse config` lists them.",
            RUNNING,
            "FILE",
        ),
    ] = None,
    overrides: Overrides = None,
    preset: Annotated[
        str | None, _flag("--preset", "Named variant to start from.", RUNNING, "NAME")
    ] = None,
    embedding: Embedding = None,
    layer: Layer = None,
    normalized: Normalized = None,
    slide_key: SlideKey = None,
    donor_key: DonorKey = None,
    donor_pattern: DonorPattern = None,
    donor_map: DonorMap = None,
    seed: Annotated[
        int | None,
        _flag("--seed", "Seed of everything random. [dim]Default: 0[/dim]", RUNNING, "N", min=0),
    ] = None,
    device: Device = None,
    resume: Annotated[
        bool, _flag("--resume", "Go on with the run in --out where it stopped.", OUTPUT)
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train on slides whose positions are known."""
    given = {
        "--config": config,
        "--set": overrides,
        "--preset": preset,
        "--seed": seed,
        "--embedding": embedding,
        "--layer": layer,
        "--normalized/--counts": normalized,
        "--slide-key": slide_key,
        "--donor-key": donor_key,
        "--donor-pattern": donor_pattern,
        "--donor-map": donor_map,
    }
    if resume:
        _check_resume(out, overwrite, [name for name, value in given.items() if value is not None])
        if not slides:
            slides, val = _recorded_inputs(out)
    if not slides:
        raise UserError(
            "give at least one slide to train on, e.g. ipar-sparse train A.h5ad "
            "--val B.h5ad --out RUN"
        )
    _check_no_leak(slides, val or [])
    if not resume:
        _check_run_folder(out, overwrite)

    from ..config import RunConfig, load_config, resolve_device
    from ..evaluation.study import FEW_SLIDES, find_donors, spared
    from ..train.fit import fit

    if resume:
        settings = RunConfig.load(out)
        if device is not None:
            settings = settings.replace(train={"device": device})
    else:
        data = {
            "embedding": embedding,
            "layer": layer,
            "normalized": normalized,
            "slide_key": slide_key,
        }
        sections = {"data": data, "train": {"seed": seed, "device": device}}
        sections = {
            name: {k: v for k, v in values.items() if v is not None}
            for name, values in sections.items()
        }
        settings = load_config(config, overrides or [], preset=preset, **sections)
    resolve_device(settings.train.device)

    train_slides = _read(slides, settings, require_pos=True, min_cells=settings.train.miniset_min)
    if resume:
        donors = _inputs(out).get("donors")
    else:
        donors = find_donors(train_slides, donor_key, donor_pattern, donor_map)
    if val:
        val_slides = _read(val, settings, require_pos=True, min_cells=settings.train.miniset_min)
    elif len(train_slides) > FEW_SLIDES:
        names = [slide.name for slide in train_slides]
        # of a run from before donors of all slides were recorded, it was the last
        known = donors is not None and donors.keys() >= set(names)
        name = spared(donors)[-1] if known else names[-1]
        val_slides = [train_slides.pop(names.index(name))]
        _note(f"no --val given: {name} is kept out of training and decides when to stop")
    else:
        val_slides = []
        _note(f"no --val given: all {settings.train.epochs} epochs are run")

    with _run_folder(out, resume):
        if not resume:
            settings.save(out)
            record = {
                "train": [str(p.absolute()) for p in slides],
                "val": [str(p.absolute()) for p in val or []],
                "donors": donors,
            }
            (out / INPUTS).write_text(json.dumps(record, indent=2) + "\n")
        try:
            fit(train_slides, val_slides, settings, out, resume=resume, donors=donors)
        except KeyboardInterrupt:
            raise Stopped(_what_is_left(out)) from None
    _say(f"trained: {out}\nnext: ipar-sparse evaluate {out} SLIDE.h5ad --out DIR")


@app.command()
def predict(
    run: Run,
    cells: Cells,
    out: OutFile,
    seeds: Seeds = None,
    layer: Layer = None,
    normalized: Normalized = None,
    slide_key: SlideKey = None,
    embedding: Embedding = None,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Place cells: positions go to obsm['X_ipar'] of a copy of the file."""
    from ..data.keys import Keys

    _infer(
        run,
        cells,
        out,
        keys=(Keys.PREDICTION, Keys.EMBEDDING),
        seeds=seeds,
        device=device,
        overwrite=overwrite,
        layer=layer,
        normalized=normalized,
        slide_key=slide_key,
        embedding=embedding,
    )


@app.command()
def embed(
    run: Run,
    cells: Cells,
    out: OutFile,
    layer: Layer = None,
    normalized: Normalized = None,
    slide_key: SlideKey = None,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Embed cells with the trained encoder alone, to obsm['X_ipar_embedding'] of a copy."""
    from ..data.keys import Keys

    _infer(
        run,
        cells,
        out,
        keys=(Keys.EMBEDDING,),
        device=device,
        overwrite=overwrite,
        layer=layer,
        normalized=normalized,
        slide_key=slide_key,
    )


@app.command()
def evaluate(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN SLIDE",
            help="Folder of a training run, and an AnnData file with measured positions, of a "
            "slide that was not trained on. With --protocol: the files of all slides.",
            show_default=False,
        ),
    ],
    out: OutFolder,
    protocol: Annotated[
        Protocol | None,
        _flag(
            "--protocol",
            "Train anew for every slide (or donor) that is held out of every stage, and score it.",
            PROTOCOL,
        ),
    ] = None,
    preset: Annotated[
        str | None, _flag("--preset", "Named variant to train.", PROTOCOL, "NAME")
    ] = None,
    overrides: Overrides = None,
    donor_key: DonorKey = None,
    donor_pattern: DonorPattern = None,
    donor_map: DonorMap = None,
    jobs: Jobs = None,
    seeds: Annotated[
        int | None,
        _flag(
            "--seeds",
            "Predict N times from different noise and tell how much each cell moves; with "
            "--protocol, train N times. [dim]Default: 1; with --protocol 3[/dim]",
            RUNNING,
            "N",
            min=1,
        ),
    ] = None,
    baselines: Annotated[
        bool,
        _flag("--baselines/--no-baselines", "Score simple methods beside the model.", RUNNING),
    ] = True,
    layer: Layer = None,
    normalized: Normalized = None,
    slide_key: SlideKey = None,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Score a prediction against measured positions: metrics.json, report.html, figures.

    With --protocol, `ipar-sparse experiment` of one variant: the same command goes on with a
    study that was stopped.
    """
    if protocol is not None:
        _study(
            [preset or "v1"],
            [],
            inputs,
            out,
            hold_out=protocol.hold_out,
            donors=(donor_key, donor_pattern, donor_map),
            seeds=f"0-{(seeds or 3) - 1}",
            overrides=[*(overrides or []), *([] if baselines else ["eval.baselines=false"])],
            data={"layer": layer, "normalized": normalized, "slide_key": slide_key},
            device=device,
            jobs=jobs,
        )
        return
    given = {
        "--preset": preset,
        "--set": overrides,
        "--donor-key": donor_key,
        "--donor-pattern": donor_pattern,
        "--donor-map": donor_map,
        "--jobs": jobs,
    }
    if stray := [name for name, value in given.items() if value is not None]:
        raise UserError(f"{stray[0]} belongs to --protocol; give both or leave it out")
    if len(inputs) != 2:
        raise UserError(
            "evaluate takes a run and a slide, e.g. ipar-sparse evaluate RUN SLIDE.h5ad --out DIR, "
            f"or --protocol with all slides; given {len(inputs)} paths"
        )
    run, slide = inputs
    predictor, settings = _predictor(run, device, layer, normalized, slide_key)
    _check_output_folder(out, overwrite)
    slides = _read([slide], settings, require_pos=True)
    _tell_notes(slides)

    from ..evaluation.scoring import evaluate_slide

    command = f"ipar-sparse evaluate {run} {slide} --out {out}"
    for one in slides:
        _warn_if_seen(predictor, one)
        folder = out if len(slides) == 1 else out / one.name
        with _removed_on_failure(folder, []):
            metrics = evaluate_slide(
                predictor, one, folder, seeds=seeds, baselines=baselines, command=command
            )
        shown = ("distance_spearman", f"neighbor_hit@{max(settings.eval.ks)}", "E_geo_hgate")
        scores = ", ".join(f"{name} {metrics[name]:.3f}" for name in shown)
        _say(f"{one.name}: {scores}\nreport: {folder / 'report.html'}")


@app.command()
def experiment(
    out: OutFolder,
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PRESET|FILE.yaml...",
            help="Named variants, or files that hold a study's variants. [dim]Default: v1[/dim]",
            show_default=False,
        ),
    ] = None,
    slides: Annotated[
        list[Path] | None,
        _flag("--slides", "AnnData files with measured positions.", READING, "SLIDE..."),
    ] = None,
    hold_out: HoldOut = None,
    donor_key: DonorKey = None,
    donor_pattern: DonorPattern = None,
    donor_map: DonorMap = None,
    seeds: StudySeeds = None,
    overrides: Overrides = None,
    reference: Annotated[
        str | None,
        _flag(
            "--reference",
            "Variant that the others are compared with. [dim]Default: the first[/dim]",
            OUTPUT,
            "NAME",
        ),
    ] = None,
    embedding: Embedding = None,
    layer: Layer = None,
    normalized: Normalized = None,
    slide_key: SlideKey = None,
    device: Device = None,
    jobs: Jobs = None,
) -> None:
    """Train and score variants on held-out slides over seeds, side by side, in one table.

    The same command goes on with a study that was stopped.
    """
    names, studies, files = [], [], list(slides or [])
    for text in what or []:
        # `--slides A B C` gives the option A alone; the others arrive here
        suffix = Path(text.rstrip("/")).suffix.lower()
        if suffix in (".yaml", ".yml"):
            studies.append(Path(text))
        elif suffix in (".h5ad", ".zarr") or os.sep in text:
            files.append(Path(text))
        else:
            names.append(text)
    _study(
        names if names or studies else ["v1"],
        studies,
        files,
        out,
        hold_out=hold_out,
        donors=(donor_key, donor_pattern, donor_map),
        seeds=seeds,
        overrides=overrides or [],
        reference=reference,
        data={
            "embedding": embedding,
            "layer": layer,
            "normalized": normalized,
            "slide_key": slide_key,
        },
        device=device,
        jobs=jobs,
    )


@app.command()
def benchmark(
    out: OutFolder,
    sizes: Annotated[
        str, typer.Option(help="Numbers of cells, with commas.")
    ] = "384,1300,2600,5000",
    forms: Annotated[
        str | None,
        _flag(
            "--forms",
            "Which to time: dense, pyg (plain message passing), chunked, triton; "
            "of knn: exact, triton, faiss, torch_cluster. "
            "[dim]Default: all that this machine can run[/dim]",
            RUNNING,
            "NAME,...",
        ),
    ] = None,
    works: Annotated[
        str,
        typer.Option(
            help="What to time: forward, backward, step (a whole training step); or knn alone: "
            "the search for nearest neighbours, with recall."
        ),
    ] = "forward,backward",
    precision: Annotated[str, typer.Option(help="float32, tf32, bfloat16 or float16.")] = "float32",
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Time the dense against the sparse form on this machine, or neighbour searches."""
    from ..config import resolve_device

    numbers = _sizes(sizes)
    _check_output_folder(out, overwrite)
    target = resolve_device(device or "auto")

    from ..benchmarks import run as run_benchmark
    from ..benchmarks import run_knn

    chosen = forms.split(",") if forms else None
    name = "knn" if works == "knn" else "benchmark"
    try:
        if name == "knn":
            run_knn(numbers, out, target, backends=chosen)
        else:
            run_benchmark(
                sizes=numbers,
                out=out,
                device=target,
                implementations=chosen,
                works=works.split(","),
                precision=precision,
            )
    except ValueError as error:
        raise UserError(f"benchmark: {error}") from None
    _say(f"{out / f'{name}.json'}\n{out / f'{name}.png'}")


@app.command()
def info(run: Run) -> None:
    """Show what a run was trained on, how, and how far it got."""
    from rich.console import Console
    from rich.table import Table

    from ..config import RunConfig
    from ..inference.checkpoint import LAST, count_parameters, find_checkpoint, read_meta
    from ..train.fit import settle

    settings = RunConfig.load(run)
    best = find_checkpoint(run)
    meta = read_meta(run / LAST if (run / LAST).is_file() else best)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    recorded = _inputs(run)
    for role, label in (("train", "trained on"), ("val", "validated on")):
        if role in recorded:
            table.add_row(label, "\n".join(recorded[role]))
    facts = {key: value for key, value in meta["facts"].items() if isinstance(value, int)}
    table.add_row("data", ", ".join(f"{key.replace('_', ' ')} {v}" for key, v in facts.items()))
    if trial := meta["facts"].get("transfer"):
        chosen = settle(settings, meta["facts"])
        if tried := trial["scores"]:
            table.add_row(
                "tried",
                f"on {trial['donors']} donors left out, distance Spearman (and with expected "
                f"distances): {_listed(tried, _STARTS_TRIED)}",
            )
            for what, names in (
                ("root of that times neighbour hit", _EMBEDDINGS_TRIED),
                ("the same of layouts after a last step", _LAST_STEPS_TRIED),
            ):
                if listed := _listed(tried, names):
                    table.add_row("", f"{what}: {listed}")
        table.add_row(
            "chosen",
            f"model.start {chosen.model.start}, {_last_step(chosen.refine)}, "
            f"encoder.input {chosen.encoder.input}, "
            f"encoder.standardize {chosen.encoder.standardize:g}, "
            f"encoder.spatial_genes {chosen.encoder.spatial_genes:g}, "
            f"encoder.kept {chosen.encoder.kept}",
        )
    table.add_row("got to", f"{meta['stage']} stage, step {meta['step']}")
    if meta["best"] is not None:
        table.add_row(
            "best", f"epoch {meta['best_epoch'] + 1}, validation E_geo {meta['best']:.4g}"
        )
    table.add_row("weights", best.name)
    counts = count_parameters(best).items()
    table.add_row("parameters", ", ".join(f"{name} {n:,}" for name, n in counts))
    table.add_row("version", meta["ipar_sparse"])
    changed = _differences(settings.model_dump(mode="json"), RunConfig().model_dump(mode="json"))
    table.add_row("settings", "\n".join(changed) or "all defaults")
    Console().print(table)


@app.command(name="config")
def config_(
    search: Annotated[
        str, typer.Argument(help="Show only settings with this in their name.", show_default=False)
    ] = "",
) -> None:
    """List every setting for --set and --config, with its default."""
    from rich.console import Console
    from rich.table import Table

    from ..config import describe

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("setting", "default", "values", "what it is"):
        table.add_column(name, overflow="fold")
    rows = [row for row in describe() if search in row[0]]
    if not rows:
        raise UserError(f"no setting has {search!r} in its name; `ipar-sparse config` lists all")
    for key, kind, default, text in rows:
        table.add_row(key, default, kind, text)
    Console().print(table)


def main() -> NoReturn:
    """Entry point of the ``ipar-sparse`` command."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(argv: list[str]) -> int:
    """Runs one command line and returns its exit code: 0, 2 for a mistake, 130 for ctrl-C."""
    debug = "--debug" in argv
    if "--version" in argv:
        print(__version__)
        return 0
    arguments = [a for a in argv if a != "--debug"] or ["--help"]
    try:
        if not {"-h", "--help"} & set(arguments):
            _quiet_libraries()
        code = typer.main.get_command(app).main(
            arguments, prog_name="ipar-sparse", standalone_mode=False
        )
    except Exception as error:
        if debug:
            raise
        return _report(error)
    if code == 130:
        _say("stopped; nothing half-written was left", stream=sys.stderr)
    return code or 0


def _report(error: Exception) -> int:
    code, text = 2, None
    if isinstance(error, UserError):
        text = str(error)
    elif isinstance(error, Stopped):
        code, text = 130, str(error)
    elif hasattr(error, "format_message"):  # a mistake found by the parser
        context = getattr(error, "ctx", None)
        where = f" (see `{context.command_path} --help`)" if context else ""
        text = f"{error.format_message().rstrip('.')}{where}"
    elif isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in EXTRAS:
        extra = EXTRAS[error.name.split(".")[0]]
        text = f"{error.name} is not installed: pip install 'ipar_sparse[{extra}]'"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f" while writing {error.filename}" if error.filename else ""
        text = f"no space left on the disk{where}; free some space and try again (train: --resume)"
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        code, text = (
            1,
            (
                "out of memory; try --device cpu, --set train.unit=miniset, "
                "--set model.checkpoint_recycles=true or fewer cells"
            ),
        )
    else:
        code, text = (
            1,
            (
                f"unexpected {type(error).__name__}: {error}; this is a fault of the program: "
                "run again with --debug and report what it prints"
            ),
        )
    _say(f"error: {' '.join(text.split())}" if code != 130 else text, stream=sys.stderr)
    return code


def _quiet_libraries() -> None:
    import warnings

    from ..progress import setup_logging

    setup_logging()
    for category in (FutureWarning, DeprecationWarning, ImportWarning):
        warnings.simplefilter("ignore", category)


def _say(text: str, stream=None) -> None:
    print(text, file=stream or sys.stdout, flush=True)


def _note(text: str) -> None:
    _say(f"note: {text}", stream=sys.stderr)


def _folder(path: Path, option: str) -> None:
    """A path that is to be a folder must not be a file, nor lie below one."""
    for part in (path, *path.parents):
        if part.exists():
            if not part.is_dir():
                raise UserError(f"{option}: {part} is a file, not a folder; choose another")
            if not os.access(part, os.W_OK):
                raise UserError(f"{option}: {part} cannot be written to; choose another")
            return


def _check_output_folder(out: Path, overwrite: bool) -> None:
    _folder(out, "--out")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} exists and is not empty; pass --overwrite or another --out")


def _check_run_folder(out: Path, overwrite: bool) -> None:
    _folder(out, "--out")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"{out} exists; pass --resume to go on with it, --overwrite to start anew, "
            "or another --out"
        )
    if not (out / "config.json").is_file():
        raise UserError(
            f"{out} is not a run directory, so it is not overwritten; choose another --out"
        )


def _check_resume(out: Path, overwrite: bool, given: list[str]) -> None:
    from ..inference.checkpoint import LAST

    if overwrite:
        raise UserError("--resume and --overwrite exclude each other; leave one out")
    if given:
        raise UserError(
            f"--resume goes on with the saved settings; leave out {', '.join(given)}, "
            "or start anew with --overwrite"
        )
    if not (out / LAST).is_file():
        raise UserError(
            f"{out} holds no run to resume ({LAST} is missing); leave out --resume to start one"
        )


def _check_no_leak(slides: list[Path], val: list[Path]) -> None:
    seen = {path.resolve() for path in slides}
    if len(seen) < len(slides):
        raise UserError("a slide is given twice to train on; give each once")
    for path in val:
        if path.resolve() in seen:
            raise UserError(
                f"{path} is given both to train on and as --val, so its score would mean nothing; "
                "leave it out of one"
            )


def _inputs(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / INPUTS).read_text())
    except (OSError, ValueError):
        return {}


def _recorded_inputs(run: Path) -> tuple[list[Path], list[Path]]:
    recorded = _inputs(run)
    if not recorded.get("train"):
        raise UserError(f"{run / INPUTS} is missing; give the slides and --val as before")
    return [Path(p) for p in recorded["train"]], [Path(p) for p in recorded["val"]]


def _read(
    paths: list[Path], settings: RunConfig, *, require_pos: bool, min_cells: int = 1
) -> list[Slide]:
    from ..progress import Progress
    from ..train.batches import read_file

    slides: list[Slide] = []
    with Progress() as progress:
        for path in progress.track(paths, "Reading"):
            slides += read_file(path, settings.data, require_pos=require_pos, min_cells=min_cells)
    names = [slide.name for slide in slides]
    for number, slide in enumerate(slides, start=1):
        if names.count(slide.name) > 1:
            slide.name = f"{slide.name}-{number}"
    return slides


def _tell_notes(slides: list[Slide]) -> None:
    for slide in slides:
        for text in slide.notes:
            _note(text if slide.name in text else f"{slide.name}: {text}")


@contextmanager
def _removed_on_failure(folder: Path, paths: list[Path]) -> Iterator[None]:
    """Takes back what a failed command made: new files among ``paths``, and a new folder."""
    new_folder = not folder.exists()
    new = [path for path in paths if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        if new_folder:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _run_folder(out: Path, resume: bool) -> Iterator[None]:
    """The folder of a run; a run that dies before its first checkpoint leaves what was there."""
    from ..inference.checkpoint import BEST, LAST

    if resume:
        yield
        return
    aside = out.with_name(f".{out.name}.{os.getpid()}.old")
    new_folder = not out.exists()
    if not new_folder:
        os.replace(out, aside)
    out.mkdir(parents=True)
    try:
        yield
    except BaseException:
        if not any((out / name).is_file() for name in (BEST, LAST)):
            shutil.rmtree(out, ignore_errors=True)
            if not new_folder:
                os.replace(aside, out)
        raise
    finally:
        if aside.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _what_is_left(out: Path) -> str:
    from ..inference.checkpoint import BEST, LAST

    if not (out / LAST).is_file():
        return "stopped before the first checkpoint; nothing was left behind"
    use = ", or predict with it as it is" if (out / BEST).is_file() else ""
    return (
        f"stopped; {out} holds all that was done so far: "
        f"go on with `ipar-sparse train --out {out} --resume`{use}"
    )


def _predictor(
    run: Path, device, layer, normalized, slide_key, embedding=None
) -> tuple[Predictor, RunConfig]:
    """The trained model, and its settings with what the user says about the new file."""
    from ..config import RunConfig, resolve_device
    from ..inference.checkpoint import find_checkpoint

    settings = RunConfig.load(run)
    find_checkpoint(run)
    if embedding is not None and settings.data.embedding is None:
        raise UserError(
            f"{run} was trained with its own encoder, so --embedding cannot be used; leave it out"
        )
    given = {
        "layer": layer,
        "normalized": normalized,
        "slide_key": slide_key,
        "embedding": embedding,
    }
    settings = settings.replace(data={k: v for k, v in given.items() if v is not None})
    target = resolve_device(device or "auto")

    from ..inference.predictor import Predictor

    return Predictor.load(run, target), settings


def _infer(
    run: Path,
    cells: Path,
    out: Path,
    *,
    keys: tuple[str, ...],
    device: str | None,
    overwrite: bool,
    layer: str | None,
    normalized: bool | None,
    slide_key: str | None,
    embedding: str | None = None,
    seeds: int | None = None,
) -> None:
    from ..data.anndata_io import check_output, in_file_order, write_predictions
    from ..data.keys import Keys
    from ..progress import Progress

    wants_pos = Keys.PREDICTION in keys
    _folder(out.parent, "--out")
    predictor, settings = _predictor(run, device, layer, normalized, slide_key, embedding)
    seeds = seeds or settings.eval.seeds
    uncertain = seeds > 1 or predictor.atlas is not None
    columns = (Keys.UNCERTAINTY,) if wants_pos and uncertain else ()
    if not wants_pos and settings.data.embedding is not None:
        raise UserError(
            f"{run} was trained on the embedding {settings.data.embedding}, so it has no encoder; "
            "use that embedding as it is"
        )
    check_output(cells, out, overwrite=overwrite, obsm=keys, obs=(*columns, Keys.EMPTY))
    slides = _read([cells], settings, require_pos=False)
    _tell_notes(slides)
    results: list[Any] = []
    with Progress() as progress:
        for slide in progress.track(slides, "Predicting" if wants_pos else "Embedding"):
            results.append(
                predictor.predict(slide, seeds=seeds) if wants_pos else predictor.embed(slide)
            )
    empty = [slide.empty for slide in slides]
    obs: dict[str, Any] = {}
    if any(flags.any() for flags in empty):
        obs[Keys.EMPTY] = in_file_order(slides, empty, fill=False)
    if wants_pos:
        embeddings = [result.embedding for result in results]
        pos = in_file_order(slides, [result.pos for result in results])
        if columns:
            spread = [result.uncertainty for result in results]
            obs[Keys.UNCERTAINTY] = in_file_order(slides, spread)
    else:
        embeddings, pos = results, None
    write_predictions(
        cells,
        out,
        pos=pos,
        embedding=in_file_order(slides, embeddings),
        obs=obs,
        uns=_provenance(run, settings, slides, results if wants_pos else []),
        overwrite=overwrite,
    )
    wrote = [f"obsm[{key!r}]" for key in keys] + [f"obs[{key!r}]" for key in columns]
    where = ", ".join(wrote[:-1]) + " and " * (len(wrote) > 1) + wrote[-1]
    _say(f"{sum(slide.num_cells for slide in slides)} cells in {out}, {where}")


def _provenance(
    run: Path, settings: RunConfig, slides: list[Slide], predictions: list
) -> dict[str, Any]:
    graphs = {
        slide.name: {
            "k": prediction.candidates.k,
            "metric": prediction.candidates.metric,
            "method": prediction.candidates.method,
            "recall": 1.0 if prediction.candidates.recall is None else prediction.candidates.recall,
        }
        for slide, prediction in zip(slides, predictions, strict=False)
    }
    return {
        "version": __version__,
        "run": str(run),
        "config": json.dumps(settings.model_dump(mode="json")),
        "graphs": graphs,
    }


def _warn_if_seen(predictor: Predictor, slide: Slide) -> None:
    from ..train.fit import slide_digest

    roles = {one["digest"]: one["role"] for one in predictor.meta["facts"]["slides"]}
    if role := roles.get(slide_digest(slide)):
        did = {"train": "was trained on", "val": "decided when to stop"}[role]
        _note(f"{slide.name} {did}: these scores say nothing about unseen slides")


def _study(
    names: list[str],
    studies: list[Path],
    files: list[Path],
    out: Path,
    *,
    hold_out: str | None,
    donors: tuple[str | None, str | None, Path | None],
    seeds: str | None,
    overrides: list[str],
    data: dict[str, Any],
    device: str | None,
    jobs: int | None,
    reference: str | None = None,
) -> None:
    from ..evaluation.study import load_variants, plan_study, run_study

    if not files:
        raise UserError(
            "give the slides, e.g. ipar-sparse experiment v1 --slides A.h5ad B.h5ad C.h5ad "
            "--out DIR"
        )
    _folder(out, "--out")
    data = {key: value for key, value in data.items() if value is not None}
    variants, said = load_variants(names, studies, overrides, data=data)
    key, pattern, table = donors
    study = plan_study(
        files,
        variants,
        hold_out=str(hold_out or said.get("hold_out") or "slide"),
        seeds=_seeds(str(said.get("seeds", "0-2") if seeds is None else seeds)),
        reference=reference or said.get("reference"),
        donor_key=key,
        donor_pattern=pattern,
        donor_map=table,
    )
    try:
        outcome = run_study(study, out, jobs=jobs, device=device)
    except KeyboardInterrupt:
        raise Stopped(
            f"stopped; {out} holds all that was done so far: the same command goes on with it"
        ) from None
    if outcome.page is not None:
        _say(f"study: {outcome.page}")
    if outcome.failed:
        folder, error = next(iter(outcome.failed.items()))
        more = f" (and {len(outcome.failed) - 1} more)" if len(outcome.failed) > 1 else ""
        _say(f"failed: {folder}: {error}{more}; see its log.txt", stream=sys.stderr)
        raise typer.Exit(1)


def _seeds(text: str) -> list[int]:
    seeds: list[int] = []
    for part in text.strip("[] ").split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"--seeds takes numbers and ranges, e.g. 0-4 or 0,3,7; got {text!r}")
        seeds += range(int(first), int(last if dash else first) + 1)
    if not seeds:
        raise UserError(f"--seeds {text} names no seed; write the smaller first, e.g. 0-4")
    return seeds


def _sizes(text: str) -> list[int]:
    try:
        numbers = [int(float(part)) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 2:
        raise UserError(f"--sizes takes numbers of cells with commas, e.g. 384,1300; got {text!r}")
    return numbers


def _listed(tried: dict[str, float], names: dict[str, str]) -> str:
    """Scores of what was tried, by titles; and of starts with expected distances, if tried."""
    scores = []
    for name, title in names.items():
        if name in tried:
            score, after = f"{title} {tried[name]:.3f}", tried.get(f"{name} expected")
            scores.append(score if after is None else f"{score} ({after:.3f})")
    return ", ".join(scores)


def _last_step(settings: RefineConfig) -> str:
    """How a run takes the last two steps, if it does."""
    text = f"refine.expected {settings.expected}, refine.steps {settings.steps}"
    if settings.steps:
        for name in ("neighbors", "anchor", "whiten", "power", "narrow"):
            if (value := getattr(settings, name)) is not None:
                text += f", refine.{name} {value:g}"
    return text


def _differences(values: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> list[str]:
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _differences(value, defaults[key], f"{prefix}{key}.")
        elif value != defaults[key]:
            rows.append(f"{prefix}{key} = {value}")
    return rows
