"""CountComponents: what a cell's counts say of it, apart from its depth and its slide."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FIELDS = 16
"""Components that follow the place in the tissue, at most."""
OTHERS = 24
"""Components of what cells differ in beside it, at most."""

FEWEST_GENES = 3

LOG_RATE = -12.0, 10.0
"""Log means of counts are kept between these."""

_ITERATIONS = 8  # of Fisher scoring
_FACTOR_RATE = -12.0, 8.0  # log rates while factors are sought
_STEP = 3.0  # longest of them, in prior standard deviations
_CLOSE = 1e-3  # a shorter one ends it
_VALUES = 1 << 25  # of rates, and of information matrices, held at once


class CountComponents(nn.Module):
    r"""Maximum a posteriori factors of negative binomial counts.

    .. math::
        c_{ig} \sim \operatorname{NB}\bigl(\text{mean } d_i\, e^{b_g + (z_i A)_g},\
        \text{size } r_g\bigr), \qquad z_i \sim N(0, I)

    with the depth d of a cell and the mean b of a gene taken from its slide, which leaves batch
    effects out. This is GLM-PCA (Townes et al. 2019, "Feature selection and dimension reduction
    for single-cell RNA-seq based on a multinomial model") with a part of the factors tied to the
    place: :func:`~ipar_sparse.train.counts.fit_counts` finds A and r. A logarithm weighs a gene
    that is seen once or twice in a cell as if its noise were that of any other; here each count
    tells as much as it knows. Every z is found by Fisher scoring, and

    .. math::
        y_i = (z_i - \bar z) L, \qquad L L^\top \propto A \operatorname{diag}(w) A^\top

    turned so that distances between cells are those of their log rates, each gene weighted by the
    mean information w of a count.

    Args:
        genes: number of genes G.

    Shapes:
        - **input:** counts (n, G) of one slide
        - **output:** (n, R), R = min(16, G // 3) + min(24, G // 3); zero where a cell has no
          counts
    """

    def __init__(self, genes: int):
        super().__init__()
        if genes < FEWEST_GENES:
            raise ValueError(f"components of counts need {FEWEST_GENES} genes, given {genes}")
        self.genes = genes
        self.fields, self.others = min(FIELDS, genes // 3), min(OTHERS, genes // 3)
        self.channels = self.fields + self.others
        self.register_buffer("loading", torch.zeros(self.channels, genes))
        self.register_buffer("size", torch.ones(genes))
        self.register_buffer("turn", torch.eye(self.channels))

    def forward(self, counts) -> Tensor:
        """Components (n, R) of a slide.

        Args:
            counts: (n, G) SciPy sparse, of all cells of the slide: they say what is average.
        """
        z, filled = self.factors(counts)
        mean = z[filled].mean(0) if filled.any() else z.new_zeros(self.channels)
        return torch.where(filled[:, None], (z - mean) @ self.turn, 0.0)

    @torch.no_grad()
    def factors(self, counts) -> tuple[Tensor, Tensor]:
        """Factors z (n, R), and which cells have counts (n,)."""
        depth, log_mean = depth_and_mean(counts, self.loading)
        filled, upper = depth > 0, torch.triu_indices(self.channels, self.channels)
        pairs = (self.loading[upper[0]] * self.loading[upper[1]]).T.contiguous()
        rows = max(1, _VALUES // max(self.genes, self.channels**2))
        blocks = [self.loading.new_zeros(0, self.channels)]
        for start in range(0, counts.shape[0], rows):
            part = slice(start, start + rows)
            dense = torch.from_numpy(counts[part].toarray()).to(self.loading)
            offset = log_mean + depth[part].clamp(min=1e-6).log()[:, None]
            blocks.append(self._scored(dense, offset, pairs, upper))
        return torch.cat(blocks), filled

    def _scored(self, counts: Tensor, offset: Tensor, pairs: Tensor, upper: Tensor) -> Tensor:
        z = counts.new_zeros(len(counts), self.channels)
        identity = torch.eye(self.channels, device=z.device)
        for _ in range(_ITERATIONS):
            rate = torch.addmm(offset, z, self.loading).clamp(*_FACTOR_RATE).exp()
            share = self.size / (rate + self.size)
            slope = ((counts - rate) * share) @ self.loading.T - z
            information = z.new_empty(len(z), self.channels, self.channels)
            values = (rate * share) @ pairs
            information[:, upper[0], upper[1]] = values
            information[:, upper[1], upper[0]] = values
            step = torch.linalg.solve(information + identity, slope)
            length = step.norm(dim=1, keepdim=True)
            z = z + step * (_STEP / length.clamp(min=_STEP))
            if float(length.max()) < _CLOSE:
                break
        return z

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.genes}, channels={self.channels})"


def depth_and_mean(counts, like: Tensor) -> tuple[Tensor, Tensor]:
    """Depth of the cells of a slide (n,), 1 on average, and log means of its genes (G,) at depth 1.

    Args:
        counts: (n, G) SciPy sparse; half a count is added to every gene.
        like: tensor whose type and device to take.
    """
    total = torch.from_numpy(counts.sum(axis=1)).to(like).flatten()
    gene = torch.from_numpy(counts.sum(axis=0)).to(like).flatten()
    filled = (total > 0).sum().clamp(min=1)
    depth = total / (total.sum() / filled).clamp(min=1e-12)
    return depth, ((gene + 0.5) / depth.sum().clamp(min=1.0)).log()
