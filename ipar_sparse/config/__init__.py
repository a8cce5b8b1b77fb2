"""Settings of a run: schema, presets, and how they are read."""

from .loading import describe, load_config, resolve_device
from .presets import PRESETS
from .schema import EncoderConfig, RunConfig

__all__ = ["PRESETS", "EncoderConfig", "RunConfig", "describe", "load_config", "resolve_device"]
