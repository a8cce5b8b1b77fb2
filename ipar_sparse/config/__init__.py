"""Settings of a run: what there is, named variants, and how settings are read and saved."""

from .inputs import DataConfig, EncoderConfig, GraphConfig
from .listing import MAIN_SETTINGS, describe
from .loading import load_config, resolve_device
from .model import ModelConfig
from .prediction import EvalConfig, RefineConfig, TypicalityConfig, UncertaintyConfig
from .presets import DEFAULT_SELECTION, PRESETS
from .schema import DECIDED_FROM_DATA, RunConfig
from .training import SelectionConfig, TrainConfig
from .types import Term

__all__ = [
    "DECIDED_FROM_DATA",
    "DEFAULT_SELECTION",
    "MAIN_SETTINGS",
    "PRESETS",
    "DataConfig",
    "EncoderConfig",
    "EvalConfig",
    "GraphConfig",
    "ModelConfig",
    "RefineConfig",
    "RunConfig",
    "SelectionConfig",
    "Term",
    "TrainConfig",
    "TypicalityConfig",
    "UncertaintyConfig",
    "describe",
    "load_config",
    "resolve_device",
]
