"""The settings as a person reads them: name, values, default, help text."""

from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import yaml

from .schema import RunConfig
from .types import Section

MAIN_SETTINGS: dict[str, tuple[str, ...]] = {
    "Data": ("data.layer", "data.embedding", "data.max_genes"),
    "Training length": ("encoder.steps", "train.minisets", "train.epochs"),
    "Model": ("graph.k", "model.init"),
    "Selection": ("selection.mode",),
    "Refinement": ("refine.distance_correction_steps", "refine.steps"),
    "Seed, device and memory": (
        "train.seed",
        "train.device",
        "train.precision",
        "model.checkpoint_recycles",
    ),
}
"""The settings that matter most, under headings."""


class Setting(NamedTuple):
    """One setting: its key, the values it takes, its default, and its help text."""

    key: str
    values: str
    default: str
    text: str


def describe() -> list[Setting]:
    """Every setting, in the order of the sections."""
    rows = []
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.default, Section):
            for key, leaf in type(field.default).model_fields.items():
                rows.append(_setting(f"{name}.{key}", leaf))
        else:
            rows.append(_setting(name, field))
    return rows


def _setting(key: str, field) -> Setting:
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    shown = yaml.safe_dump(default, default_flow_style=True).removesuffix("...\n").strip()
    return Setting(
        key,
        _values_of(field.annotation),
        "none" if default is None else shown,
        " ".join(field.description.split()),
    )


def _values_of(annotation: Any) -> str:
    """The values that a type stands for, in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is Annotated:
        return _values_of(args[0])
    if origin is tuple:
        return f"list of {_values_of(args[0])}"
    if args:  # a union
        return " | ".join(map(_values_of, args))
    names = {bool: "true | false", float: "number", int: "integer", str: "text"}
    return names.get(annotation, "none")
