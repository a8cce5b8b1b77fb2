"""The settings of a run, each with its type, its default and its help text.

A *request* may leave settings open (:data:`DECIDED_FROM_DATA`). A run decides them from its
training slides, saves what it decided, and uses what it saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from ..errors import UserError
from ..files import atomic_write, parse_json, parse_yaml
from .inputs import DataConfig, EncoderConfig, GraphConfig
from .model import ModelConfig
from .prediction import AdapterConfig, EvalConfig, RefineConfig, TypicalityConfig, UncertaintyConfig
from .training import SelectionConfig, TrainConfig
from .types import Section
from .validation import explain, merge

FORMAT = 2
"""Format of a run folder; a folder of another format is refused."""
CONFIG = "config.json"
"""File of a run folder with the settings that the run was computed with."""
REQUESTED = "requested.yaml"
"""File of a run folder with the settings that were asked for."""
INPUTS = "inputs.json"
"""File of a run folder that names its slides, their files and their donors."""
SELECTION = "selection.json"
"""File of a run folder with the cross-validation table."""

DECIDED_FROM_DATA = (
    "data.normalized",
    "data.target_sum",
    "encoder.steps",
    "encoder.component_kind",
    "model.init",
    "model.recycling",
    "train.batch_kind",
    "train.steps_per_epoch",
    "refine.distance_correction_steps",
    "refine.steps",
    "refine.anchor_weight",
    "refine.rca_power",
    "uncertainty.error_intercept",
    "uncertainty.error_slide_slope",
    "uncertainty.error_slope",
    "uncertainty.disc_radius",
    "uncertainty.calibrated",
)
"""Settings that a request may leave open, and that a run decides before it is trained."""


class RunConfig(Section):
    """Everything that decides what a run computes."""

    preset: str = "v1"
    """Named variant; other settings start from its values. See docs/studies/variants.md."""
    data: DataConfig = DataConfig()
    encoder: EncoderConfig = EncoderConfig()
    graph: GraphConfig = GraphConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    adapter: AdapterConfig = AdapterConfig()
    refine: RefineConfig = RefineConfig()
    uncertainty: UncertaintyConfig = UncertaintyConfig()
    typicality: TypicalityConfig = TypicalityConfig()
    selection: SelectionConfig = SelectionConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _model_takes_the_embedding(self):
        if self.data.embedding is None and self.model.dim != self.encoder.out:
            raise ValueError(
                f"model.dim ({self.model.dim}) must equal encoder.out ({self.encoder.out}); "
                "set both"
            )
        return self

    @model_validator(mode="after")
    def _supervision_fits(self):
        train = self.train
        if train.attention_graph == "target":
            if self.model.beta > 0:
                raise ValueError(
                    "train.attention_graph=target attends on true neighbours, and the gate scores "
                    "candidates only; set model.beta=0"
                )
            if train.k_fraction_range is not None or train.mutual_prob > 0:
                raise ValueError(
                    "train.k_fraction_range and train.mutual_prob choose among candidates; "
                    "train.attention_graph=target uses none"
                )
        if self.model.beta == 0 and train.gate_target_weights != (1.0,):
            raise ValueError(
                "train.gate_target_weights supervises the gate, but model.beta=0 removes it"
            )
        return self

    def unresolved(self) -> list[str]:
        """Keys whose values are still to be decided from data, e.g. ``model.init``."""
        return [key for key in DECIDED_FROM_DATA if self.get(key) in (None, "auto")]

    def get(self, key: str) -> Any:
        """The value of a key such as ``"train.epochs"``."""
        value: Any = self
        for part in key.split("."):
            value = getattr(value, part)
        return value

    def replace(self, **sections: Mapping[str, Any]) -> RunConfig:
        """A copy with some values changed, checked: ``config.replace(train={"epochs": 3})``."""
        return self.checked(merge(self.model_dump(), sections), source="replace()")

    def with_values(self, values: Mapping[str, Any]) -> RunConfig:
        """A copy with some values changed, by key: ``{"train.epochs": 3}``."""
        sections: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
        return self.replace(**sections)

    @classmethod
    def checked(cls, values: Mapping[str, Any], source=None) -> RunConfig:
        """A configuration from nested values.

        Raises:
            UserError: an unknown key (the nearest is suggested) or a bad value.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(explain(error, source, list(setting_names()))) from None

    def save(self, folder: Path) -> None:
        """Writes ``config.json`` into ``folder``: settings that are all decided.

        Raises:
            ValueError: if a value is still to be decided from data.
        """
        if self.unresolved():
            raise ValueError(f"settings to be decided first: {', '.join(self.unresolved())}")
        document = {"format": FORMAT, **self.model_dump(mode="json")}
        atomic_write(folder / CONFIG, json.dumps(document, indent=2) + "\n")

    def save_request(self, folder: Path) -> None:
        """Writes ``requested.yaml`` into ``folder``: what was asked for, open values included."""
        values = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        atomic_write(folder / REQUESTED, values)

    @classmethod
    def load(cls, folder: Path) -> RunConfig:
        """Reads the configuration that a run was computed with.

        Raises:
            UserError: the folder holds no readable configuration, or one of another format.
        """
        path = Path(folder) / CONFIG
        try:
            values = parse_json(path.read_text())
        except FileNotFoundError:
            if (Path(folder) / REQUESTED).is_file():
                raise UserError(
                    f"{folder} was stopped before its model was trained; go on with it first: "
                    f"ipar-sparse train --resume --out {folder}"
                ) from None
            raise UserError(
                f"{folder} is not a run directory: it has no {CONFIG}; "
                "give the --out folder of `ipar-sparse train`"
            ) from None
        except NotADirectoryError:
            raise UserError(
                f"{folder} is a file and no run; give the --out folder of `ipar-sparse train` "
                "first, then the cells"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); train the run again") from None
        found = values.pop("format", None) if isinstance(values, dict) else None
        if found != FORMAT:
            raise UserError(
                f"{path} has run format {found}, this version reads format {FORMAT}; "
                "train the run again"
            )
        return cls.checked(values, source=str(path))

    @classmethod
    def load_request(cls, folder: Path) -> RunConfig:
        """Reads what was asked of a run.

        Raises:
            UserError: the folder holds no readable request.
        """
        path = Path(folder) / REQUESTED
        try:
            values = parse_yaml(path.read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} cannot be read ({reason}); train the run again") from None
        if not isinstance(values, dict):
            raise UserError(f"{path} holds no settings; train the run again")
        return cls.checked(values, source=str(path))


def setting_names() -> Iterator[str]:
    """Every setting, as ``section.key``."""
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.default, Section):
            yield from (f"{name}.{key}" for key in type(field.default).model_fields)
        else:
            yield name
