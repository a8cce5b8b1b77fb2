"""Relevant component analysis: distances without the differences between spatial neighbours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..geometry.alignment import EmbeddedSlides
from ..geometry.gauge import leading_components
from ..graph import knn

_CELLS = 20_000  # cells used of a slide; more do not change a covariance
_PAIR_ROWS = 1024  # cells whose differences from their neighbours are in memory at once


class RelevantComponents(nn.Module):
    r"""A linear map of embeddings that shrinks directions in which true neighbours differ.

    .. math::
        \mathbf{h} \mapsto \mathbf{h}\, \Sigma^{-w/2}, \qquad
        \Sigma = C + \gamma \tfrac{\operatorname{tr} C}{d} I, \qquad
        C = \tfrac12 \operatorname*{mean}_{i,\ j \in N_k(\mathbf{x}_i)}
        (\mathbf{h}_i - \mathbf{h}_j)(\mathbf{h}_i - \mathbf{h}_j)^\top

    over cells of training slides and their spatial neighbours; slides have equal weight. With
    power w = 1 distances are those of relevant component analysis (Bar-Hillel, Hertz, Shental and
    Weinshall 2005). A smaller power is a compromise for new slides. The encoder has seen the
    training slides, so neighbours on new slides differ more, and in other directions too.

    Args:
        channels: width d of the embedding.
        neighbors: k, spatial neighbours that a cell is compared with.
        shrinkage: :math:`\gamma`.

    Shapes:
        - **input:** embeddings (n, d)
        - **output:** embeddings (n, d), in which nearest candidates are searched
    """

    covariance: Tensor  # C, (d, d)

    def __init__(self, channels: int, *, neighbors: int = 15, shrinkage: float = 0.1):
        super().__init__()
        self.channels, self.neighbors, self.shrinkage = channels, neighbors, shrinkage
        # torch.eye on the meta device, where runs are checked, loads the compiler of torch
        self.register_buffer("covariance", torch.zeros(channels, channels).fill_diagonal_(1.0))

    @torch.no_grad()
    def fit(self, slides: EmbeddedSlides) -> RelevantComponents:
        """Learn C.

        Args:
            slides: pairs (embedding (n_s, d), positions (n_s, 2)) of training slides.

        Raises:
            ValueError: without slides, or with embeddings of another width.
        """
        pairs = [(torch.as_tensor(h), torch.as_tensor(pos)) for h, pos in slides]
        if not pairs or any(h.size(1) != self.channels for h, _ in pairs):
            raise ValueError(
                f"relevant components are fitted on slides of embeddings (n, {self.channels})"
            )
        total = torch.zeros(self.channels, self.channels, dtype=torch.float64)
        for h, pos in pairs:
            if len(h) < 2:
                continue
            near = knn(pos.to(h.device).double(), min(self.neighbors, len(h) - 1)).index
            cells = torch.randperm(len(h), generator=torch.Generator().manual_seed(0))[:_CELLS]
            for part in cells.to(h.device).split(_PAIR_ROWS):
                gap = (h[part, None] - h[near[part].long()]).flatten(0, 1).double()
                product = gap.T @ gap / (2 * len(cells) * near.size(1) * len(pairs))
                total += product.cpu()
        self.covariance.copy_(total)
        return self

    @torch.no_grad()
    def forward(self, h: Tensor, power: float = 1.0) -> Tensor:
        """Embeddings (n, d) mapped with power w; 0 returns them as they are."""
        if not power:
            return h
        variance, axes = torch.linalg.eigh(self.covariance.double().cpu())
        variance = variance.clamp(min=0) + self.shrinkage * variance.mean().clamp(min=1e-12)
        variance = variance / variance.mean()  # distances keep their size on average
        return h @ ((axes * variance ** (-power / 2)) @ axes.T).to(h)

    def extra_repr(self) -> str:
        return f"{self.channels}, neighbors={self.neighbors}, shrinkage={self.shrinkage}"


def search_space(
    h: Tensor,
    relevant_components: RelevantComponents | None,
    rca_power: float,
    pc_power: float = 0.0,
) -> Tensor:
    """The embedding in which refinement searches nearest candidates (n, d).

    Args:
        h: embedding (n, d).
        relevant_components: fitted on the training slides; None leaves the embedding as it is.
        rca_power: power w of the relevant component analysis; 0 = off.
        pc_power: power of their standard deviation by which principal components are weighted
            after it; 0 = off.
    """
    if relevant_components is not None:
        h = relevant_components(h, rca_power)
    return leading_components(h, pc_power) if pc_power else h
