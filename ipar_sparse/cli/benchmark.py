"""``ipar-sparse benchmark``."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer

from ..errors import UserError
from ..files import check_output_folder
from . import options
from .messages import say
from .options import RUNNING, flag
from .watched import loading

_SIZES, _COMMAND_SIZES = "384,1300,2600,5000", "1000,10000,100000,1000000"


def _simulated(name: str, text: str, metavar: str, least: int):
    return flag(name, f"With --end-to-end: {text}", RUNNING, metavar, min=least)


Genes = Annotated[int, _simulated("--genes", "genes of a slide.", "N", 50)]
Slides = Annotated[int, _simulated("--slides", "slides to train on.", "N", 1)]
PredictCells = Annotated[
    int | None,
    _simulated("--predict-cells", "cells to place. [dim]Default: as --sizes[/dim]", "N", 15),
]
Embedding = Annotated[
    int | None,
    _simulated("--embedding", "columns of an embedding that slides bring, no counts.", "D", 2),
]


def benchmark(
    out: options.OutFolder,
    sizes: Annotated[
        str | None,
        typer.Option(
            help="Numbers of cells, with commas. [dim]Default: 384,1300,2600,5000; of whole "
            "commands 1000,10000,100000,1000000[/dim]",
            show_default=False,
        ),
    ] = None,
    end_to_end: Annotated[
        bool,
        typer.Option(
            "--end-to-end",
            help="Time the commands train and predict on simulated slides, stage by stage.",
        ),
    ] = False,
    tasks: Annotated[
        str,
        typer.Option(
            help="What to time: forward, backward, step (a whole training step). Or knn alone: the "
            "search for nearest neighbours, with its recall."
        ),
    ] = "forward,backward",
    implementations: Annotated[
        str | None,
        flag(
            "--implementations",
            "dense, pyg (plain message passing), chunked, triton; of knn: exact, triton, faiss, "
            "torch_cluster. [dim]Default: all that this machine can run[/dim]",
            RUNNING,
            "NAME,...",
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="float32, tf32, bfloat16 or float16.")] = "float32",
    overrides: Annotated[
        list[str] | None,
        flag("--set", "With --end-to-end: a setting of train; can be repeated.", RUNNING, "K=V"),
    ] = None,
    genes: Genes = 300,
    slides: Slides = 2,
    predict_cells: PredictCells = None,
    embedding: Embedding = None,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Time the sparse model against the dense one, neighbour searches, or whole commands."""
    from ..config import load_config, resolve_device

    numbers = parse_sizes(sizes or (_COMMAND_SIZES if end_to_end else _SIZES))
    check_output_folder(out, overwrite)
    if overrides and not end_to_end:
        raise UserError("--set belongs to --end-to-end, which trains; leave it out")
    load_config(None, overrides or [])
    with loading():
        target, measuring = resolve_device(device or "auto"), _benchmarks()

    if end_to_end:
        measuring.run_commands(
            numbers,
            out,
            target,
            genes=genes,
            slides=slides,
            predict_cells=predict_cells,
            embedding=embedding,
            settings=overrides or [],
        )
        say(f"{out / 'end_to_end.json'}\n{out / 'end_to_end.png'}")
        return

    wanted = tasks.split(",")
    chosen = implementations.split(",") if implementations else None
    more = {"implementations": chosen, "precision": precision}
    try:
        measuring.run(wanted, numbers, out, target, **more)
    except ValueError as error:
        raise UserError(f"benchmark: {error}") from None
    name = "knn" if "knn" in wanted else "benchmark"
    say(f"{out / f'{name}.json'}\n{out / f'{name}.png'}")


def _benchmarks() -> Any:
    """The package that measures; it stands beside this one in a checkout that is not installed."""
    try:
        return import_module("ipar_sparse.benchmarks")
    except ModuleNotFoundError:
        return import_module("benchmarks")


def parse_sizes(text: str) -> list[int]:
    """The numbers of cells in a text such as ``"384,1300"``."""
    try:
        numbers = [int(float(part)) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 2:
        raise UserError(f"--sizes takes numbers of cells with commas, e.g. 384,1300; got {text!r}")
    return numbers
