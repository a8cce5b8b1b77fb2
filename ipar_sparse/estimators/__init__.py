"""Estimators: fitted on training slides, applied to new ones."""

from .atlas import Atlas
from .relevant_components import RelevantComponents
from .scaler import EmbeddingScaler

__all__ = ["Atlas", "EmbeddingScaler", "RelevantComponents"]
