"""Options that several commands share, with their help texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

READING, RUNNING, OUTPUT = "Reading the slides", "Running", "Output"


def flag(names: str, text: str, panel: str, metavar: str | None = None, **rest: Any):
    """An option that may be left out, under a heading of the help.

    Args:
        names: with spaces between them, e.g. ``"--out -o"``.
        text: help.
        panel: the heading.
        metavar: placeholder of the value.
        **rest: further arguments of ``typer.Option``.
    """
    return typer.Option(
        *names.split(),
        help=text,
        rich_help_panel=panel,
        metavar=metavar,
        show_default=False,
        **rest,
    )


Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run.")]
Cells = Annotated[
    Path, typer.Argument(metavar="CELLS", help="File or folder of the cells, of any format.")
]
OutFile = Annotated[
    Path,
    typer.Option(
        "--out", "-o", metavar="FILE", help="Copy of the input to write, with the results added."
    ),
]
OutFolder = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write into.")
]
Report = Annotated[
    Path | None,
    flag("--report", "Folder for a page on which to explore the map.", OUTPUT, "DIR"),
]
Genes = Annotated[
    str | None,
    flag(
        "--genes",
        "Genes by which the page can colour cells, beside the 50 most informative.",
        OUTPUT,
        "A,B,...",
    ),
]
Overwrite = Annotated[bool, flag("--overwrite", "Replace earlier output.", OUTPUT)]

Layer = Annotated[
    str | None,
    flag("--layer", "Layer that holds the expression. [dim]Default: X[/dim]", READING, "NAME"),
]
Normalized = Annotated[
    bool | None,
    flag(
        "--normalized/--counts",
        "Whether the expression is log-normalised or raw counts. "
        "[dim]Default: recognised by the values[/dim]",
        READING,
    ),
]
SlideKey = Annotated[
    str | None,
    flag(
        "--slide-key",
        "obs column that names the slide of each cell, where a file holds several; `FILE::C` takes "
        "slide C alone, '' undoes the column of a run.",
        READING,
        "NAME",
    ),
]
Embedding = Annotated[
    str | None,
    flag(
        "--embedding",
        "obsm key of an embedding to use instead of a trained encoder, e.g. obsm:X_pca.",
        READING,
        "obsm:KEY",
    ),
]
SpatialKey = Annotated[
    str | None,
    flag(
        "--spatial-key",
        "obsm key of the measured positions. [dim]Default: spatial[/dim]",
        READING,
        "NAME",
    ),
]
IgnoreCase = Annotated[
    bool | None,
    flag(
        "--ignore-case/--match-case",
        "Whether gene names that differ in letter case alone are one gene, as between species.",
        READING,
    ),
]
DropOutliers = Annotated[
    bool | None,
    flag(
        "--drop-outliers/--keep-outliers",
        "Leave out cells whose measured positions lie far outside the tissue, or at one point.",
        READING,
    ),
]
KeepEmpty = Annotated[
    bool,
    flag(
        "--keep-empty",
        "Give cells without counts in the genes of the run the average place, in place of NaN.",
        OUTPUT,
    ),
]
DonorKey = Annotated[
    str | None, flag("--donor-key", "obs column that names the donor.", READING, "NAME")
]
DonorPattern = Annotated[
    str | None,
    flag(
        "--donor-pattern",
        "Regular expression that finds the donor in a slide's name, e.g. '^.' for its first "
        "letter. [dim]Default: each slide is a donor[/dim]",
        READING,
        "REGEX",
    ),
]
DonorMap = Annotated[
    Path | None,
    flag("--donor-map", "YAML file with a line `slide: donor` for each slide.", READING, "FILE"),
]

ConfigFile = Annotated[
    Path | None,
    flag("--config", "YAML file with settings; `ipar-sparse config` lists them.", RUNNING, "FILE"),
]
Overrides = Annotated[
    list[str] | None,
    flag("--set", "One setting, e.g. train.epochs=30; can be repeated.", RUNNING, "KEY=VALUE"),
]
Preset = Annotated[
    str | None, flag("--preset", "Named variant to start from, e.g. v1-rbf.", RUNNING, "NAME")
]
NoiseSamples = Annotated[
    int | None,
    flag(
        "--noise-samples",
        "Also predict N times under training noise; how far cells move adds to their uncertainty. "
        "[dim]Default: 1 = without noise[/dim]",
        RUNNING,
        "N",
        min=1,
    ),
]
Jobs = Annotated[
    int | None,
    flag(
        "--jobs",
        "Number of runs at the same time. [dim]Default: as many as cores, memory and GPUs "
        "allow[/dim]",
        RUNNING,
        "N",
        min=1,
    ),
]
Strict = Annotated[
    bool, flag("--strict", "Refuse a slide that is unlike the training slides.", RUNNING)
]
Device = Annotated[
    str | None,
    flag(
        "--device",
        "Where to compute: cpu, cuda, cuda:1, ... [dim]Default: a GPU where there is one[/dim]",
        RUNNING,
        "NAME",
    ),
]


def listed(text: str | None) -> list[str]:
    """The names of a comma-separated list."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def given(**values: Any) -> dict[str, Any]:
    """Those of ``values`` that are not None: what the user asked for."""
    return {name: value for name, value in values.items() if value is not None}
