"""Checkpoints: one safetensors file each, whose header carries everything else as JSON.

One file means one rename, so weights, optimiser and position in the run cannot disagree. A digest
over names, shapes and bytes tells a damaged file from a good one before anything is restored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import UserError
from ..files import atomic_write
from .run_folder import FORMAT, LAST, PREVIOUS, VERSION, last_checkpoint, open_header

logger = logging.getLogger(__name__)


def save_checkpoint(
    path: Path,
    modules: Mapping[str, nn.Module],
    meta: Mapping[str, Any],
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Writes a checkpoint in one atomic step; what stood there survives any failure.

    Args:
        path: file to write, e.g. ``run / LAST``.
        modules: name -> module; parameters are stored as ``name.parameter``.
        meta: anything JSON can hold (epoch, step, gene list, scores, ...).
        optimizer: stored bit for bit if given.

    Raises:
        UserError: the disk is full or the folder cannot be written to.
    """
    tensors = {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    document: dict[str, Any] = {"meta": dict(meta), "modules": list(modules)}
    if optimizer is not None:
        document["optimizer"] = _pack_optimizer(optimizer, tensors)
    # Tied parameters share storage, which safetensors refuses: every entry gets its own.
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    text = json.dumps(document)
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "document": text,
        "sha256": digest(text, tensors),
    }
    atomic_write(path, save(tensors, metadata=header))


def load_checkpoint(
    path: Path,
    modules: Mapping[str, nn.Module] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Any]:
    """Checks a checkpoint and restores from it whatever is passed in, in place.

    Nothing is changed unless the whole file is sound and holds all that is asked for.

    Returns:
        The ``meta`` it was saved with.

    Raises:
        UserError: the file is missing, truncated, altered, foreign, of a newer format, or does
            not fit the modules.
    """
    document, tensors = read_checkpoint(Path(path))
    modules = modules or {}
    states = states_of(modules, tensors, path)
    if optimizer is not None:
        if "optimizer" not in document:
            raise UserError(
                f"{path} holds weights only, so training cannot go on from it; "
                f"use {LAST} of the run, or train again with --overwrite"
            )
        rates = [group["lr"] for group in optimizer.param_groups]
        saved = _unpack_optimizer(document["optimizer"], tensors)
        for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=False):
            group["capturable"] = own.get("capturable", False)  # it follows the device, not the run
        try:
            optimizer.load_state_dict(saved)
        except ValueError as error:
            raise UserError(
                f"{path} does not fit the configuration: {error}; "
                "use the config.json it was trained with"
            ) from None
        for rate, group in zip(rates, optimizer.param_groups, strict=True):
            if isinstance(rate, Tensor):  # it stays where recorded steps read it
                group["lr"] = rate.fill_(group["lr"])
    for name, state in states.items():
        modules[name].load_state_dict(state)
    return document["meta"]


def settle_checkpoints(run: Path) -> dict[str, Any] | None:
    """Makes the last checkpoint that is sound the last one of a run.

    Returns:
        Its ``meta``; None where the run has no checkpoint yet.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    last, previous = Path(run) / LAST, Path(run) / PREVIOUS
    try:
        if last_checkpoint(run) in (last, None):
            return load_checkpoint(last) if last.is_file() else None
        meta = load_checkpoint(previous)
    except UserError as error:
        if not previous.is_file():
            raise
        meta = load_checkpoint(previous)
        logger.warning("%s: the checkpoint before it is taken", str(error).partition(";")[0])
    os.replace(previous, last)
    return meta


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a sound checkpoint holds: ``meta`` and other values, and tensors by name.

    Raises:
        UserError: the file is missing, truncated, altered, foreign, or of a newer format.
    """
    document, header, names = open_header(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in names}
    if digest(header["document"], tensors) != header["sha256"]:
        raise UserError(
            f"{path} is damaged: its checksum does not match; restore it from a copy or train again"
        )
    return document, tensors


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over ``text`` and the names, dtypes, shapes and bytes of contiguous CPU tensors."""
    running = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        running.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        running.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return running.hexdigest()


def states_of(
    modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], path: Path
) -> dict[str, dict[str, Tensor]]:
    """The stored state of each module, to be loaded into it.

    Args:
        modules: by name; on the device ``meta`` they take no memory.
        tensors: of :func:`read_checkpoint`.
        path: of the checkpoint, for messages.

    Raises:
        UserError: names or shapes differ from those of a module.
    """
    return {name: _state_of(name, module, tensors, path) for name, module in modules.items()}


def _state_of(
    name: str, module: nn.Module, tensors: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    prefix = f"{name}."
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    expected = {key: value.shape for key, value in module.state_dict().items()}
    problems = [f"{k} is missing" for k in expected if k not in found]
    problems += [f"{k} is not part of the model" for k in found if k not in expected]
    problems += [
        f"{k} has shape {tuple(found[k].shape)} instead of {tuple(shape)}"
        for k, shape in expected.items()
        if k in found and found[k].shape != shape
    ]
    if problems:
        raise UserError(
            f"{path} does not fit the configuration: {name}.{problems[0]}; "
            "use the config.json it was trained with"
        )
    return found


def _pack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict:
    state = optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    groups = [
        {key: float(value) if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return {"scalars": scalars, "param_groups": groups}


def _unpack_optimizer(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict:
    state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in packed["scalars"].items()}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            state.setdefault(int(index), {})[key] = value
    groups = [
        {k: tuple(v) if k == "betas" else v for k, v in group.items()}
        for group in packed["param_groups"]
    ]
    return {"state": state, "param_groups": groups}
