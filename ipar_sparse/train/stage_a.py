"""Stage A: the encoder from expression to embedding, trained without labels, then frozen.

A spatial InfoNCE loss pulls a cell towards its neighbours in the tissue and pushes it from cells
far away; VICReg keeps two noisy views of a cell together and the dimensions alive.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import EncoderConfig
from ..expression import Expression
from ..graph import knn


class EmbeddingScale(nn.Module):
    """Brings embeddings to zero mean and unit mean variance, so that noise levels mean the same
    for every encoder; one number scales all dimensions, so that neighbours stay neighbours.

    Args:
        channels: width of the embedding.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(()))

    def fit(self, embeddings: list[Tensor]) -> "EmbeddingScale":
        """Take mean and scale from the training slides, each counted alike."""
        self.mean.copy_(torch.stack([h.mean(0) for h in embeddings]).mean(0))
        variance = torch.stack([(h - self.mean).square().mean() for h in embeddings]).mean()
        self.std.copy_(variance.sqrt().clamp(min=1e-8))
        return self

    def forward(self, h: Tensor) -> Tensor:
        return (h - self.mean) / self.std


class ContrastSlide:
    """A training slide as stage A sees it: expression, spatial neighbours, what counts as far.

    Args:
        expression: n cells.
        pos: positions (n, 2).
        neighbors: spatial neighbours that are positives.
        far_quantile: quantile of the pairwise distances beyond which cells are negatives.
    """

    def __init__(self, expression: Expression, pos, neighbors: int, far_quantile: float):
        self.expression = expression
        self.pos = torch.from_numpy(np.asarray(pos, dtype=np.float64))
        self.neighbors = knn(self.pos, neighbors).index.long()
        generator = torch.Generator().manual_seed(0)
        sample = torch.randint(0, len(self.pos), (2, 20_000), generator=generator)
        distance = (self.pos[sample[0]] - self.pos[sample[1]]).norm(dim=-1)
        self.far = float(distance.quantile(far_quantile))


def encoder_loss(
    encoder: nn.Module,
    slide: ContrastSlide,
    settings: EncoderConfig,
    generator: torch.Generator,
    device: torch.device,
) -> dict[str, Tensor]:
    r"""Losses of one step on a batch of cells of one slide.

    .. math::
        L = -\log \frac{e^{\langle z_i, z_i^+ \rangle / \tau}}
        {e^{\langle z_i, z_i^+ \rangle / \tau} + \sum_{j \in \mathrm{far}(i)}
        e^{\langle z_i, z_j^+ \rangle / \tau} + \sum_{j \in \mathrm{hard}(i)} \dots}
        + 25\, L_\mathrm{inv} + 50\, L_\mathrm{var} + L_\mathrm{cov}

    where hard(i) are the most similar of the far cells, counted once more.

    Args:
        encoder: genes to embedding.
        slide: where the batch is drawn.
        settings: weights, temperature, noise.
        generator: CPU generator of the batch and its views.
        device: where the encoder lies.

    Returns:
        Scalars ``loss``, ``infonce``, ``invariance``, ``variance``, ``covariance``.
    """
    n = slide.expression.shape[0]
    anchor = torch.randperm(n, generator=generator)[: settings.batch_size]
    pick = torch.randint(0, slide.neighbors.size(1), (anchor.numel(),), generator=generator)
    positive = slide.neighbors[anchor, pick]
    cells = [
        torch.from_numpy(slide.expression.rows(rows.numpy())).to(device)
        for rows in (anchor, positive)
    ]
    first, second, near = (
        encoder(_view(x, settings, generator)) for x in (cells[0], cells[0], cells[1])
    )
    far = torch.cdist(slide.pos[anchor], slide.pos[positive]) > slide.far
    losses = {
        "infonce": _infonce(first, near, far.to(device), settings),
        "invariance": F.mse_loss(first, second),
        "variance": (_variance(first) + _variance(second)) / 2,
        "covariance": _covariance(first) + _covariance(second),
    }
    weights = {
        "infonce": settings.infonce_weight,
        "invariance": settings.invariance_weight,
        "variance": settings.variance_weight,
        "covariance": settings.covariance_weight,
    }
    return {"loss": sum(weights[name] * loss for name, loss in losses.items()), **losses}


@torch.no_grad()
def encode(encoder: nn.Module, expression: Expression, device, rows: int = 8192) -> Tensor:
    """Embeddings (n, d) on the CPU, in blocks of rows.

    Args:
        encoder: genes to embedding; used in evaluation mode and left as it was.
        expression: n cells.
        device: where the encoder lies.
        rows: cells a block.
    """
    training = encoder.training
    encoder.eval()
    blocks = [
        encoder(torch.from_numpy(expression.rows(np.arange(start, stop))).to(device)).cpu()
        for start in range(0, expression.shape[0], rows)
        for stop in [min(start + rows, expression.shape[0])]
    ]
    encoder.train(training)
    return torch.cat(blocks)


def _view(x: Tensor, settings: EncoderConfig, generator: torch.Generator) -> Tensor:
    """A noisy view of cells: some genes at their mean, the others shaken."""
    keep = torch.rand(x.shape, generator=generator) >= settings.gene_dropout
    noise = torch.randn(x.shape, generator=generator)
    return x * keep.to(x.device) + settings.noise * noise.to(x.device)


def _infonce(anchor: Tensor, positive: Tensor, far: Tensor, settings: EncoderConfig) -> Tensor:
    similarity = F.normalize(anchor, dim=-1) @ F.normalize(positive, dim=-1).T
    similarity = similarity / settings.temperature
    own = similarity.diagonal()
    negative = similarity.masked_fill(~far, -math.inf)
    hard = min(settings.hard_negatives, negative.size(1))
    hardest = negative.topk(hard, dim=-1).values if hard else negative[:, :0]
    everything = torch.cat([own.unsqueeze(-1), negative, hardest], dim=-1)
    return (everything.logsumexp(dim=-1) - own).mean()


def _variance(z: Tensor) -> Tensor:
    return F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean()


def _covariance(z: Tensor) -> Tensor:
    centred = z - z.mean(dim=0)
    covariance = centred.T @ centred / max(1, len(z) - 1)
    off = covariance - covariance.diagonal().diag()
    return off.square().sum() / z.size(1)
