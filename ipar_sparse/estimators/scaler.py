"""EmbeddingScaler: embeddings of zero mean and unit mean variance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class EmbeddingScaler(nn.Module):
    r"""Brings embeddings to zero mean and unit mean variance.

    .. math::
        \mathbf{h}_i \mapsto (\mathbf{h}_i - \boldsymbol{\mu}) / \sigma, \qquad
        \sigma^2 = \tfrac{1}{n d} \sum_{i,r} (h_{ir} - \mu_r)^2

    A noise level then means the same for every encoder. One number scales all dimensions, so
    nearest neighbours stay the same.

    Args:
        channels: width d of the embedding.

    Shapes:
        - **input:** embeddings (n, d)
        - **output:** embeddings (n, d)
    """

    mean: Tensor  # (d,)
    std: Tensor  # ()

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(()))

    def fit(self, embeddings: Sequence[Tensor]) -> EmbeddingScaler:
        """Take mean and scale from training slides, which have equal weight.

        Args:
            embeddings: (n_s, d) of each slide.
        """
        self.mean.copy_(torch.stack([h.mean(0) for h in embeddings]).mean(0))
        variance = torch.stack([(h - self.mean).square().mean() for h in embeddings]).mean()
        self.std.copy_(variance.sqrt().clamp(min=1e-8))
        return self

    def forward(self, h: Tensor) -> Tensor:
        return (h - self.mean) / self.std
