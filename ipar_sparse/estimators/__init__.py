"""Estimators: fitted on training slides, applied to new ones."""

from .adapter import Adapter
from .atlas import Atlas
from .relevant_components import RelevantComponents
from .scaler import EmbeddingScaler
from .typicality import Typicality

__all__ = ["Adapter", "Atlas", "EmbeddingScaler", "RelevantComponents", "Typicality"]
