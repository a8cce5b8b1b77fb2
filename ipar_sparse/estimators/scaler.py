"""EmbeddingScaler: embeddings of zero mean and unit mean variance."""

import torch
from torch import Tensor, nn


class EmbeddingScaler(nn.Module):
    """Brings embeddings to zero mean and unit mean variance, so that noise levels mean the same
    for every encoder; one number scales all dimensions, so that neighbours stay neighbours.

    Args:
        channels: width of the embedding.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(()))

    def fit(self, embeddings: list[Tensor]) -> "EmbeddingScaler":
        """Take mean and scale from the training slides, each counted alike."""
        self.mean.copy_(torch.stack([h.mean(0) for h in embeddings]).mean(0))
        variance = torch.stack([(h - self.mean).square().mean() for h in embeddings]).mean()
        self.std.copy_(variance.sqrt().clamp(min=1e-8))
        return self

    def forward(self, h: Tensor) -> Tensor:
        return (h - self.mean) / self.std
