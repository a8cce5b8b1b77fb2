"""What a run folder holds, told from the headers of its checkpoints, without loading torch."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..config import DataConfig, RunConfig
from ..data.records import recorded_inputs
from ..errors import UserError
from ..files import parse_json

BEST = "model.safetensors"
"""Weights of the best validated epoch: what prediction uses."""
LAST = "last.safetensors"
"""Weights and trainer state of a minute ago at most: what ``--resume`` uses."""
PREVIOUS = "previous.safetensors"
"""The checkpoint before the last one, for the case that this is damaged."""
REFERENCE = "reference.safetensors"
"""Embeddings and positions of (at most 5,000 cells of) each training slide, for baselines."""
STAGES = ("encoder", "gate", "model")
"""Stages of a training, in order."""
FORMAT = "ipar_sparse.checkpoint"
VERSION = 1
"""Of the format of checkpoints."""

logger = logging.getLogger(__name__)


def read_meta(path: Path) -> dict[str, Any]:
    """The ``meta`` of a checkpoint, without reading its tensors.

    Raises:
        UserError: the file is missing, truncated or foreign.
    """
    return open_header(Path(path))[0]["meta"]


def count_parameters(path: Path) -> dict[str, int]:
    """Stored values of each module of a checkpoint, by the module's name.

    Raises:
        UserError: the file is missing, truncated or foreign.
    """
    document, _, names = open_header(Path(path))
    counts = dict.fromkeys(document["modules"], 0)
    with safe_open(path, framework="np") as file:
        for name in names:
            module = name.partition(".")[0]
            if module in counts:
                counts[module] += math.prod(file.get_slice(name).get_shape())
    return counts


def last_checkpoint(run: Path) -> Path | None:
    """The last checkpoint of a run, or the one before where it is missing; None before any."""
    paths = (Path(run) / name for name in (LAST, PREVIOUS))
    return next((path for path in paths if path.is_file()), None)


def find_checkpoint(run: Path) -> Path:
    """The checkpoint to predict with: the best one, or the last if none was validated yet.

    Raises:
        UserError: the run was stopped before its model was trained.
    """
    if (best := Path(run) / BEST).is_file():
        return best
    last = last_checkpoint(run)
    meta = None if last is None else read_meta(last)
    if last is None or (meta["stage"], meta["step"] > 0) != (STAGES[-1], True):
        raise UserError(stopped_before_the_model(run))
    logger.warning("%s was stopped before any weights were validated: not fully trained", run)
    return last


def stopped_before_the_model(run: Path) -> str:
    """The line for a run that cannot predict yet."""
    return (
        f"{run} was stopped before its model was trained; go on with it first: "
        f"ipar-sparse train --resume --out {run}"
    )


def unfinished(run: Path) -> str | None:
    """How far a run came that was stopped before the end of its training; None of a finished one.

    A run whose last checkpoint is missing or damaged tells nothing of it, nor does one that was
    removed after it was loaded.
    """
    last = last_checkpoint(run)
    if last is None:
        return None
    config = RunConfig.load(run)
    # a run whose initial layout is the map has a model stage without steps
    if config.model.recycling is False and config.model.init != "mlp":
        return None
    try:
        meta, settings = read_meta(last), config.train
    except UserError:
        return None
    total = settings.epochs * (settings.steps_per_epoch or 0)
    if meta["stage"] == STAGES[-1] and (
        meta["step"] >= total or meta["stale"] >= settings.patience
    ):
        return None
    step = meta["step"] if meta["stage"] == STAGES[-1] else 0
    return (
        f"the training of {run} was stopped at step {step:,} of {total:,}, so its map is a "
        f"preliminary one; go on by ipar-sparse train --resume --out {run}"
    )


def open_header(path: Path) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Document, header and names of the tensors of a checkpoint.

    Raises:
        UserError: the file is missing, truncated, foreign or of a newer format.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; give the --out folder of a training run")
    try:
        with safe_open(path, framework="np") as file:
            header, names = file.metadata() or {}, list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is truncated or not a checkpoint ({error}); "
            "restore it from a copy or train again"
        ) from None
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path} is a safetensors file but not a checkpoint of ipar_sparse; "
            "give the --out folder of `ipar-sparse train`"
        )
    version = header.get("version", "")
    if version.isdecimal() and int(version[:9]) > VERSION:
        raise UserError(
            f"{path} has checkpoint format {version}, this version reads up to {VERSION}; "
            "upgrade ipar_sparse"
        )
    try:
        document = parse_json(header["document"])
        sound = isinstance(document["meta"], dict) and isinstance(document["modules"], list)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound or "sha256" not in header:
        raise UserError(f"{path} is damaged; restore it from a copy or train again")
    return document, header, names


def reading_settings(
    run: Path,
    config: RunConfig,
    layer: str | None = None,
    normalized: bool | None = None,
    slide_key: str | None = None,
    embedding: str | None = None,
    **others: Any,
) -> DataConfig:
    """How new files are read: as those of a run, but for what the user says.

    The kind of values of a run's files says nothing of others: it is recognised in each file,
    unless the values of the run were used as they are.

    Args:
        run: its folder.
        config: what it was computed with.
        layer, normalized, slide_key, embedding, **others: what the user says; an empty slide key
            undoes that of the run.

    Raises:
        UserError: an embedding is given for a run with its own encoder.
    """
    if embedding is not None and config.data.embedding is None:
        raise UserError(
            f"{run} was trained with its own encoder, so --embedding cannot be used; leave it out"
        )
    given = {
        "layer": layer,
        "normalized": normalized,
        "slide_key": slide_key,
        "embedding": embedding,
        **others,
    }
    profile = recorded_inputs(run).get("profile") or {"scaling": "as given"}
    normalized = RunConfig.load_request(run).data.normalized
    asked: dict[str, Any] = {"drop_outliers": False}
    asked["normalized"] = normalized if profile["scaling"] == "as given" else None
    asked |= {name: value for name, value in given.items() if value is not None}
    if slide_key == "":
        asked["slide_key"] = None
    return config.replace(data=asked).data


def check_encoder(run: Path) -> None:
    """Refuses a run that was trained on an embedding of the user.

    Raises:
        UserError: it was.
    """
    if (embedding := RunConfig.load(run).data.embedding) is not None:
        raise UserError(
            f"{run} was trained on the embedding {embedding}, so it has no encoder; use that "
            "embedding as it is"
        )
