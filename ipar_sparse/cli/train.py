"""``ipar-sparse train``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..distributed import from_first, is_restart, leads
from ..errors import UserError
from . import options
from .folders import check_resume, what_is_left
from .inputs import check_backends, check_device, check_no_leak, computes_on_gpu
from .messages import Stopped, is_out_of_memory, out_of_memory, say
from .options import OUTPUT, RUNNING, flag, given
from .watched import loading

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..data.slide import Slide


class Select(str, Enum):
    """How thoroughly settings are selected before training."""

    quick = "quick"
    full = "full"
    none = "none"


class Members(NamedTuple):
    """The slides of a run; ``val`` is None where training is to choose."""

    train: list[Slide]
    val: list[Slide] | None
    donors: dict[str, str] | None
    cells: list[Slide] = []


RunFolder = Annotated[Path, typer.Option("--out", "-o", metavar="RUN", help="Folder of the run.")]
TrainFiles = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="SLIDE...",
        help="Files or folders with measured positions, of any format, to train on.",
        show_default=False,
    ),
]
ValFiles = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="SLIDE",
        help="Slide that decides when training stops; can be repeated. [dim]Default: one of the "
        "slides, where there are more than three[/dim]",
        show_default=False,
    ),
]
CellFiles = Annotated[
    list[Path] | None,
    flag(
        "--cells",
        "Cells of another assay that the run is to place: genes are chosen among those that they "
        "have. Their positions are not read. Can be repeated.",
        options.READING,
        "CELLS",
    ),
]
SelectMode = Annotated[
    Select | None,
    flag(
        "--select",
        "Settings selected by cross-validation over donors: few candidates (quick), all of them "
        "(full), or named defaults at once (none). [dim]Default: quick[/dim]",
        RUNNING,
    ),
]
Seed = Annotated[
    int | None,
    flag("--seed", "Seed of everything random. [dim]Default: 0[/dim]", RUNNING, "N", min=0),
]
Resume = Annotated[
    bool,
    flag(
        "--resume",
        "Go on with the run in --out from where it stopped. With --set train.epochs=N or "
        "train.patience=N also from its end.",
        OUTPUT,
    ),
]


MaxMinutes = Annotated[
    float | None,
    flag(
        "--max-minutes",
        "Stop after about so many minutes, with the best model so far; --resume goes on.",
        RUNNING,
        "M",
        min=0.0,
    ),
]


def train(
    out: RunFolder,
    slides: TrainFiles = None,
    val: ValFiles = None,
    cells: CellFiles = None,
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    preset: options.Preset = None,
    select: SelectMode = None,
    embedding: options.Embedding = None,
    layer: options.Layer = None,
    normalized: options.Normalized = None,
    slide_key: options.SlideKey = None,
    spatial_key: options.SpatialKey = None,
    ignore_case: options.IgnoreCase = None,
    drop_outliers: options.DropOutliers = None,
    donor_key: options.DonorKey = None,
    donor_pattern: options.DonorPattern = None,
    donor_map: options.DonorMap = None,
    seed: Seed = None,
    device: options.Device = None,
    max_minutes: MaxMinutes = None,
    resume: Resume = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Train on slides whose positions are known."""
    from ..config.loading import parse_overrides
    from ..train.run_folder import EXTENDABLE, is_resumable

    slides, val, cells, more = slides or [], val or [], cells or [], {}
    again = is_restart() and from_first(is_resumable(out))
    resume, overwrite = resume or again, overwrite and not again
    data = given(embedding=embedding, layer=layer, normalized=normalized, slide_key=slide_key)
    data |= given(spatial_key=spatial_key, ignore_case=ignore_case, drop_outliers=drop_outliers)
    donor_options = given(key=donor_key, pattern=donor_pattern, table=donor_map)
    if again:
        pass  # the ranks that died have checked it all
    elif resume:
        more = parse_overrides(overrides or [])
        other = set(more) - set(EXTENDABLE) or None
        asked = given(
            cells=cells or None, config=config, set=other, preset=preset, select=select, seed=seed
        )
        asked |= data | {f"donor_{name}": value for name, value in donor_options.items()}
        check_resume(out, overwrite, [f"--{name.replace('_', '-')}" for name in asked])
    elif leads():
        _check_new_run(out, slides, overwrite)
    check_no_leak(slides, val, cells)

    from ..config import RunConfig, load_config
    from ..data.headers import check_headers, reading_cells
    from ..data.records import recorded_slides
    from ..inference.costs import check_training

    if resume:
        settings = RunConfig.load_request(out)
    else:
        sections = {
            "data": data,
            "train": given(seed=seed),
            "selection": given(mode=select and select.value),
        }
        settings = load_config(config, overrides or [], preset=preset, **sections)
        reading: dict[str, Any] = {"require_pos": True, "min_cells": settings.train.miniset_min}
        sizes, held = (check_headers(x, settings.data, **reading) for x in (slides, val))
        check_headers(
            cells, reading_cells(settings.data), require_pos=False, slide_key_optional=True
        )
        check_training(sizes, held, settings, computes_on_gpu(device or settings.train.device))
    check_backends(settings, device or settings.train.device)
    check_device(device or settings.train.device)
    if resume:
        recorded = recorded_slides(out, [*slides, *val], settings)
        members = Members(*recorded, donors=None)  # the run has them on record
    else:
        members = _new_members(slides, val, cells, settings, donor_options)

    _fit(members, settings, out, more, resume=resume, device=device, minutes=max_minutes)


def _fit(
    members: Members, settings: RunConfig, out: Path, more: dict, *, minutes, **running: Any
) -> None:
    """Trains, and says what came of it."""
    with loading():  # what is refused before does not wait for torch
        from ..train.fit import fit
        from ..train.run_folder import extend_run, run_folder

    try:
        with run_folder(out, running["resume"]):
            extend_run(out, more)
            result = fit(
                members.train,
                members.val,
                settings,
                out,
                donors=members.donors,
                cells=members.cells,
                max_minutes=minutes_left(minutes),
                **running,
            )
    except KeyboardInterrupt as stop:
        raise Stopped(str(stop) or what_is_left(out)) from None
    except Exception as error:
        if is_out_of_memory(error):
            raise UserError(out_of_memory(_with_less(out))) from error
        raise
    if "model" in result.metadata.get("cut_short", []):
        say(f"time is up: `ipar-sparse train --out {out} --resume` goes on")
    say(f"trained: {out}\nnext: ipar-sparse evaluate {out} SLIDE.h5ad --out DIR")


def _with_less(out: Path) -> str:
    return (
        f"{what_is_left(out)}. Fewer cells, --device cpu, or a new run with --set "
        "train.batch_kind=miniset or --set model.checkpoint_recycles=true take less"
    )


def minutes_left(limit: float | None) -> float | None:
    """What is left of a limit since the command began."""
    if limit is None:
        return None
    from ..usage import seconds_since_start

    return max(0.0, limit - seconds_since_start() / 60)


def _check_new_run(out: Path, slides: list[Path], overwrite: bool) -> None:
    from ..train.run_folder import check_run_folder

    if not slides:
        raise UserError(
            "give at least one slide to train on, e.g. ipar-sparse train A.h5ad --val B.h5ad "
            "--out RUN"
        )
    check_run_folder(out, overwrite)


def _new_members(
    slides: list[Path],
    val: list[Path],
    cells: list[Path],
    settings: RunConfig,
    donor_options: dict[str, Any],
) -> Members:
    """Slides of a new run, read from their files, and their donors."""
    with loading():
        from ..data.dissociated import read_dissociated
        from ..data.readers import read_files, tell_apart
    from ..data.splits import find_donors

    reading: dict[str, Any] = {"require_pos": True, "min_cells": settings.train.miniset_min}
    reading["divided"] = True
    members = read_files(slides, settings.data, **reading)
    held = read_files(val, settings.data, **reading)
    tell_apart([*members, *held])
    donors = find_donors(members, **donor_options)
    return Members(members, held or None, donors, read_dissociated(cells, settings.data))
