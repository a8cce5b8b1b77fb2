"""How much of a cell's place its counts hold, where the program behind them is known.

Every cell of a simulated cortex is placed by maximum a posteriori under the program that drew it:
zero-inflated negative binomial counts, with the cell's kinds and depth fitted beside its place. The
slide's batch effects and dropout are learned from the true places, which is kinder than any method
could hope for. What remains is the noise of single cells: a limit, up to the maximum standing in
for the posterior mean.
"""

import argparse

import numpy as np
import torch

from ipar_sparse import simulate as tissue
from ipar_sparse.metrics import evaluate_layout

_PART = 1000  # cells at once


class CortexProgram:
    """The simulator's program of a cortex, differentiable in the place."""

    def __init__(self, genes: int):
        program = tissue.TISSUES["cortex"](genes, np.random.default_rng([0, genes]))
        self.weight = torch.tensor(program.weight, dtype=torch.float32)
        self.baseline = torch.tensor(program.baseline, dtype=torch.float32)
        self.shape = 1 / torch.tensor(program.dispersion, dtype=torch.float32)
        self.edges = torch.tensor([-0.72, -0.42, -0.1, 0.22, 0.55])
        self.centres = torch.linspace(-1.4, 1.4, 8)

    def log_rate(self, place, kinds=None):
        """Log rates (n, genes) at places (n, 2), with shares of cell kinds (n, 3)."""
        x, y = place[:, 0], place[:, 1] + 0.12 * torch.sin(1.8 * place[:, 0])
        steps = torch.sigmoid((y[:, None] - self.edges) / 0.06)
        ones, zeros = torch.ones(len(x), 1), torch.zeros(len(x), 1)
        layers = torch.cat([ones, steps], 1) - torch.cat([steps, zeros], 1)
        areas = torch.exp(-0.5 * ((x[:, None] - self.centres) / 0.35) ** 2)
        kinds = torch.zeros(len(x), 3) if kinds is None else kinds - 1 / 3
        features = torch.cat([layers, y[:, None], areas, x[:, None], kinds], 1)
        return features @ self.weight + self.baseline

    def log_likelihood(self, log_rate, counts, dropout):
        """Of counts (n, genes), each; what does not depend on the rate is left out."""
        rate, r = log_rate.exp(), self.shape
        zero = -r * torch.log1p(rate / r)
        some = torch.log1p(-dropout) + zero + counts * (log_rate - torch.log(rate + r))
        none = torch.log(dropout + (1 - dropout) * zero.exp())
        return torch.where(counts > 0, some, none)


def fit_batch(program, counts, place):
    """Batch effects and dropout of a slide, from the true places of its cells."""
    rows = torch.randperm(len(place), generator=torch.Generator().manual_seed(0))[:2000]
    known = program.log_rate(place[rows])
    batch = torch.zeros(counts.size(1), requires_grad=True)
    logit = torch.full((counts.size(1),), -1.7, requires_grad=True)
    optimizer = torch.optim.Adam([batch, logit], lr=0.05)
    for _ in range(150):
        value = program.log_likelihood(known + batch, counts[rows], torch.sigmoid(logit))
        optimizer.zero_grad()
        (-value.mean()).backward()
        optimizer.step()
    return batch.detach(), torch.sigmoid(logit.detach())


def decode(program, counts, batch, dropout, low, high):
    """Places (n, 2) of cells: the likeliest of a coarse grid, then Adam on place, kinds, depth."""
    across, down = (torch.linspace(low[i], high[i], (16, 12)[i]) for i in (0, 1))
    grid = torch.cartesian_prod(across, down)
    expected = (1 - dropout) * (program.log_rate(grid) + batch).exp()
    depth = torch.log(counts.sum(1) / expected.sum(1).mean())
    seen, wanted = torch.log1p(counts / depth.exp()[:, None]), torch.log1p(expected)
    nearest = torch.cdist(seen - seen.mean(0), wanted - wanted.mean(0)).argmin(1)
    place = grid[nearest].clone().requires_grad_()
    kinds = torch.zeros(len(counts), 3, requires_grad=True)
    depth = depth.clone().requires_grad_()
    groups = [{"params": [p], "lr": lr} for p, lr in ((place, 0.03), (kinds, 0.05), (depth, 0.03))]
    optimizer = torch.optim.Adam(groups)
    for step in range(80):
        if step == 50:
            for group in optimizer.param_groups:
                group["lr"] *= 0.3
        rate = program.log_rate(place, kinds.softmax(1)) + batch + depth[:, None]
        log_prior = 2 * kinds.log_softmax(1).sum() - (depth**2).sum() / (2 * 0.3**2)
        value = program.log_likelihood(rate, counts, dropout).sum() + log_prior
        optimizer.zero_grad()
        (-value).backward()
        optimizer.step()
    return place.detach()


def main() -> None:
    """``python -m benchmarks.information_limit``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spots", type=int, default=10_000)
    parser.add_argument("--genes", type=int, default=1200)
    parser.add_argument("--slides", type=int, default=4, help="the last of them is placed")
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    slide = tissue.simulate(
        "cortex", slides=args.slides, spots=args.spots, genes=args.genes, seed=args.seed
    )[-1]
    program = CortexProgram(args.genes)
    place = np.column_stack([slide.obs["tissue_x"], slide.obs["tissue_y"]])
    counts = torch.tensor(slide.expression.toarray(), dtype=torch.float32)
    batch, dropout = fit_batch(program, counts, torch.tensor(place, dtype=torch.float32))
    bounds = (place.min(0).tolist(), place.max(0).tolist())
    found = torch.cat(
        [decode(program, part, batch, dropout, *bounds) for part in counts.split(_PART)]
    ).numpy()
    scores = evaluate_layout(found.astype(np.float64), slide.pos)
    error = np.linalg.norm(found - place, axis=1)
    print(f"median error {np.median(error):.4f} in units of the tissue")
    for name in ("distance_spearman", "neighbor_hit@15", "procrustes"):
        print(f"{name} {scores[name]:.4f}")


if __name__ == "__main__":
    main()
