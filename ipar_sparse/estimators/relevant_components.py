"""Which cells are near: distances in which what neighbours of the tissue differ in counts less."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..geometry.gauge import leading_components
from ..graph import knn

_AROUND = 15  # nearest cells in the tissue
_CELLS = 20_000  # of a slide that are compared with theirs; more do not move a covariance
_SHRINKAGE = 0.1  # of the covariance's mean, added to every direction


class RelevantComponents(nn.Module):
    r"""A linear map of embeddings that takes out what true neighbours differ in.

    .. math::
        \mathbf{h} \mapsto \mathbf{h}\, \Sigma^{-w/2}, \qquad
        \Sigma = C + \tfrac{1}{10} \tfrac{\operatorname{tr} C}{d} I, \qquad
        C = \tfrac12 \operatorname*{mean}_{i,\ j \in N_{15}(\mathbf{x}_i)}
        (\mathbf{h}_i - \mathbf{h}_j)(\mathbf{h}_i - \mathbf{h}_j)^\top

    over the cells of training slides and their neighbours in the tissue, slides counted alike. With
    w = 1 these are the distances of relevant component analysis (Bar-Hillel, Hertz, Shental and
    Weinshall 2005); with less it is done by half, since what neighbours differ in on slides that
    the embedding was trained on is less than on others, and not quite the same.

    Args:
        channels: width d of the embedding.

    Shapes:
        - **input:** embeddings (n, d)
        - **output:** embeddings (n, d), in which nearest cells are to be sought
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.register_buffer("covariance", torch.eye(channels))

    @torch.no_grad()
    def fit(self, slides: Sequence[tuple]) -> RelevantComponents:
        """Learn what neighbours differ in.

        Args:
            slides: pairs (embedding (n_s, d), positions (n_s, 2)) of training slides.

        Raises:
            ValueError: without slides, or with embeddings of another width.
        """
        if not slides or any(h.shape[1] != self.channels for h, _ in slides):
            raise ValueError(f"what is near is told by slides of embeddings (n, {self.channels})")
        total = torch.zeros(self.channels, self.channels, dtype=torch.float64)
        for h, pos in slides:
            h, pos = torch.as_tensor(h).cpu(), torch.as_tensor(pos).cpu().double()
            if len(h) < 2:
                continue
            neighbors = knn(pos, min(_AROUND, len(h) - 1)).index.long()
            rows = torch.randperm(len(h), generator=torch.Generator().manual_seed(0))[:_CELLS]
            for part in rows.split(1024):
                gap = (h[part, None] - h[neighbors[part]]).flatten(0, 1).double()
                total += gap.T @ gap / (2 * len(rows) * neighbors.size(1) * len(slides))
        self.covariance.copy_(total)
        return self

    @torch.no_grad()
    def forward(self, h: Tensor, power: float = 1.0) -> Tensor:
        """Embeddings (n, d) by this power w; 0 leaves them as they are."""
        if not power:
            return h
        spread, axes = torch.linalg.eigh(self.covariance.double().cpu())
        spread = spread.clamp(min=0) + _SHRINKAGE * spread.mean().clamp(min=1e-12)
        spread = spread / spread.mean()  # of the size that they had
        return h @ ((axes * spread ** (-power / 2)) @ axes.T).to(h)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.channels})"


def compared(h: Tensor, nearness: RelevantComponents | None, whiten: float, power: float) -> Tensor:
    """Embeddings in which the last step seeks a cell's nearest (n, d).

    Args:
        h: embeddings (n, d).
        nearness: of the training slides; None leaves the embedding as it is.
        whiten: power w by which that is applied.
        power: of their standard deviation by which principal components count after that.
    """
    if nearness is not None:
        h = nearness(h, whiten)
    return leading_components(h, power) if power else h
