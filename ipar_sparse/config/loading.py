"""How files, presets and options become a configuration, and a name becomes a device."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..files import parse_yaml
from ..usage import has_gpu_driver
from .presets import PRESETS
from .schema import RunConfig
from .validation import merge, suggest


def load_config(
    source: str | Path | Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
    *,
    preset: str | None = None,
    **sections: Mapping[str, Any],
) -> RunConfig:
    """The configuration that a run is asked for; later wins: preset, file, sections, overrides.

    Args:
        source: YAML file with any part of the tree, or such values. Keys of values may be nested
            or joined, e.g. ``{"train.epochs": 10}``.
        overrides: ``"train.epochs=30"`` strings; the value is read as YAML, ``none`` as null.
        preset: name in ``PRESETS``; default: the file's ``preset``, else ``v1``.
        **sections: values by section, e.g. ``train={"seed": 1}``.

    Raises:
        UserError: unknown key (the nearest is suggested), bad value, unreadable file.
    """
    path = None
    given: dict[str, Any] = {}
    if isinstance(source, Mapping):
        for key, value in source.items():
            given = merge(given, _nested(str(key), value))
    elif source is not None:
        path = Path(source)
        given = _read_yaml(path)
    given = merge(given, sections)
    for key, value in parse_overrides(overrides).items():
        given = merge(given, _nested(key, value))
    name = preset or given.get("preset") or "v1"
    if name not in PRESETS:
        raise UserError(
            f"unknown preset {name!r}{suggest(str(name), PRESETS)}; known: {', '.join(PRESETS)}"
        )
    return RunConfig.checked(merge(merge(PRESETS[name], given), {"preset": name}), source=path)


def resolve_device(name: str):
    """The torch device of a name; ``auto`` is the GPU where there is one, else the CPU.

    Raises:
        UserError: no such device on this machine.
    """
    _check_device_name(name)
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"device {name!r} is not available here; use cpu"
            + (", cuda" if torch.cuda.is_available() else "")
            + " or auto"
        ) from None
    return device


def _check_device_name(name: str) -> None:
    """Refuses what torch would, without the seconds that loading it takes.

    Raises:
        UserError: the name has no such form, or is a GPU where there is no driver of one.
    """
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", name):
        raise UserError(f"device {name!r} is not available here; use cpu, cuda, cuda:1 or auto")
    if name.startswith("cuda") and sys.platform == "linux" and not has_gpu_driver():
        raise UserError(f"device {name!r} is not available here; use cpu or auto")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(Path(path).read_text())
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise UserError(f"config file {path} is not valid YAML{line}; correct it") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(
            f"config file {path} must hold sections such as `train:` with keys under them, "
            f"not a {type(values).__name__}"
        )
    return {key: value for key, value in values.items() if value is not None}


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Values by key of ``"train.epochs=30"`` strings; later wins.

    Raises:
        UserError: a string of another form.
    """
    values: dict[str, Any] = {}
    for text in overrides:
        key, equals, raw = text.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise UserError(f"--set takes section.key=value, e.g. train.epochs=30; got {text!r}")
        try:
            value = parse_yaml(raw)
        except yaml.YAMLError:
            raise UserError(f"--set {key}: the value {raw!r} is not valid YAML") from None
        values.pop(key, None)  # the later one also comes later
        values[key] = None if isinstance(value, str) and value.lower() == "none" else value
    return values


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value
