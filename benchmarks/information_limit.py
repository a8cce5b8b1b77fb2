"""How much of a cell's place its counts hold, where the program behind them is known.

Every cell of a simulated slide is placed under the program that drew it: zero-inflated negative
binomial counts, with the cell's kinds and depth fitted beside what the place decides. The slide's
batch effects and dropout are learned from the true places, which is kinder than any method could
hope for. What remains is the noise of single cells.

On a cortex genes tell the place, and it is found by maximum a posteriori: a limit, up to the
maximum standing in for the posterior mean. On lobules they tell a trend along one axis, and how far
a cell lies on the way from a vein to a border; which vein, nothing tells. There the posterior of
both is found on a grid. The layout that is right at large is the mean of the trend alone; the zone,
drawn narrowly across it, tells neighbours and hardly moves a cell. Which pairs are most likely
neighbours bounds what any method can find, in a layout or not: two cells of one trend and one zone
are, with one chance in so many as there are cells of that trend and zone.
"""

import argparse

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from ipar_sparse import simulate as tissue
from ipar_sparse.metrics import evaluate_layout

_PART = 1000  # cells at once
_GRID = 16, 12  # coarse, over the first and the second of what is fitted
_FINE = 30, 24  # of their posterior
_NARROW = 0.05, 0.1, 0.2  # widths of the second across the first, in standard deviations of it
_NEIGHBORS = 15


class Program:
    """A simulator's program, differentiable in two numbers ``at`` that the place decides."""

    tissue: str
    repeats = False  # whether one pair of numbers is found in many places

    def __init__(self, genes: int):
        code = list(tissue.TISSUES).index(self.tissue)
        program = tissue.TISSUES[self.tissue](genes, np.random.default_rng([code, genes]))
        self.weight = torch.tensor(program.weight, dtype=torch.float32)
        self.baseline = torch.tensor(program.baseline, dtype=torch.float32)
        self.shape = 1 / torch.tensor(program.dispersion, dtype=torch.float32)

    def features(self, at):
        """What genes respond to (n, F - 3), cell kinds apart."""
        raise NotImplementedError

    def truth(self, slide):
        """The two numbers of the cells of a slide (n, 2)."""
        raise NotImplementedError

    def layouts(self, at):
        """Name to the best layout (n, 2) of its kind, of numbers (n, 2)."""
        raise NotImplementedError

    def log_prior(self, at):
        """Of the two numbers, summed over cells."""
        return at.new_zeros(())

    def log_rate(self, at, kinds=None):
        """Log rates (n, genes), with shares of cell kinds (n, 3)."""
        kinds = torch.zeros(len(at), 3) if kinds is None else kinds - 1 / 3
        return torch.cat([self.features(at), kinds], 1) @ self.weight + self.baseline

    def log_likelihood(self, log_rate, counts, dropout):
        """Of counts (n, genes), each; what does not depend on the rate is left out."""
        rate, r = log_rate.exp(), self.shape
        zero = -r * torch.log1p(rate / r)
        some = torch.log1p(-dropout) + zero + counts * (log_rate - torch.log(rate + r))
        none = torch.log(dropout + (1 - dropout) * zero.exp())
        return torch.where(counts > 0, some, none)


class CortexProgram(Program):
    """Layers, areas and two gradients: ``at`` is the place itself."""

    tissue = "cortex"
    edges = torch.tensor([-0.72, -0.42, -0.1, 0.22, 0.55])
    centres = torch.linspace(-1.4, 1.4, 8)

    def features(self, at):
        x, y = at[:, 0], at[:, 1] + 0.12 * torch.sin(1.8 * at[:, 0])
        steps = torch.sigmoid((y[:, None] - self.edges) / 0.06)
        ones, zeros = torch.ones(len(x), 1), torch.zeros(len(x), 1)
        layers = torch.cat([ones, steps], 1) - torch.cat([steps, zeros], 1)
        areas = torch.exp(-0.5 * ((x[:, None] - self.centres) / 0.35) ** 2)
        return torch.cat([layers, y[:, None], areas, x[:, None]], 1)

    def truth(self, slide):
        return np.column_stack([slide.obs["tissue_x"], slide.obs["tissue_y"]])

    def layouts(self, at):
        return {"the place": at}


class LobulesProgram(Program):
    """``at`` is the trend along the tissue, and the zone between a central vein and a border."""

    tissue = "lobules"
    repeats = True

    def features(self, at):
        trend, zone = at[:, 0], at[:, 1].clamp(0, 1)
        band = torch.exp(-0.5 * ((zone - 0.55) / 0.15) ** 2)
        return torch.stack([zone, zone**3, band, trend], 1)

    def truth(self, slide):
        return np.column_stack([slide.obs["tissue_x"], slide.obs["tissue_zone"]])

    def log_prior(self, at):
        return -((at[:, 0] / 0.7) ** 2).sum() / 2  # as the tissue spreads

    def layouts(self, at):
        at = (at - at.mean(0)) / at.std(0)
        return {
            f"the trend, and across it {width:g} of the zone": at * (1, width)
            for width in (0, *_NARROW, 1)
        }


PROGRAMS = {program.tissue: program for program in (CortexProgram, LobulesProgram)}


def fit_batch(program, counts, at):
    """Batch effects and dropout of a slide, from what is true of its cells."""
    rows = torch.randperm(len(at), generator=torch.Generator().manual_seed(0))[:2000]
    known = program.log_rate(at[rows])
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
    """What decides the counts of cells (n, 2), their kinds (n, 3) and log depths (n,).

    The likeliest of a coarse grid, then Adam on all of it.
    """
    across, down = (torch.linspace(low[i], high[i], _GRID[i]) for i in (0, 1))
    grid = torch.cartesian_prod(across, down)
    expected = (1 - dropout) * (program.log_rate(grid) + batch).exp()
    depth = torch.log(counts.sum(1) / expected.sum(1).mean())
    seen, wanted = torch.log1p(counts / depth.exp()[:, None]), torch.log1p(expected)
    nearest = torch.cdist(seen - seen.mean(0), wanted - wanted.mean(0)).argmin(1)
    at = grid[nearest].clone().requires_grad_()
    kinds = torch.zeros(len(counts), 3, requires_grad=True)
    depth = depth.clone().requires_grad_()
    groups = [{"params": [p], "lr": lr} for p, lr in ((at, 0.03), (kinds, 0.05), (depth, 0.03))]
    optimizer = torch.optim.Adam(groups)
    for step in range(80):
        if step == 50:
            for group in optimizer.param_groups:
                group["lr"] *= 0.3
        rate = program.log_rate(at, kinds.softmax(1)) + batch + depth[:, None]
        log_prior = 2 * kinds.log_softmax(1).sum() - (depth**2).sum() / (2 * 0.3**2)
        value = program.log_likelihood(rate, counts, dropout).sum()
        value = value + log_prior + program.log_prior(at)
        optimizer.zero_grad()
        (-value).backward()
        optimizer.step()
    return at.detach(), kinds.detach().softmax(1), depth.detach()


@torch.no_grad()
def posterior(program, counts, batch, dropout, kinds, depth, truth):
    """Of what decides the counts of cells: a grid (m, 2), how cells are spread over it in truth
    (m,), and the posterior of each (n, m), given its kinds and depth."""
    edges = [
        np.linspace(low, high, count + 1)
        for low, high, count in zip(truth.min(0), truth.max(0), _FINE, strict=True)
    ]
    middles = [torch.from_numpy((e[1:] + e[:-1]) / 2).float() for e in edges]
    grid = torch.cartesian_prod(*middles)
    spread = gaussian_filter(np.histogram2d(*truth.T, bins=edges)[0], 1)
    spread = torch.from_numpy(spread.ravel() / spread.sum())
    beside = (kinds - 1 / 3) @ program.weight[-3:] + batch + depth[:, None]
    log_likelihood = torch.stack(
        [program.log_likelihood(beside + rate, counts, dropout).sum(1)
         for rate in program.log_rate(grid)], dim=1,
    )  # fmt: skip
    return grid.double(), spread, (log_likelihood.double() + spread.log()).softmax(1)


def likeliest_pairs(spread, share):
    """The 15 cells (n, 15) most likely to be neighbours of each, of posteriors (n, m)."""
    score = share / spread @ share.T
    return score.fill_diagonal_(-torch.inf).topk(_NEIGHBORS, dim=1).indices.numpy()


def main() -> None:
    """``python -m benchmarks.information_limit``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tissue", choices=sorted(PROGRAMS), default="cortex")
    parser.add_argument("--spots", type=int, default=10_000)
    parser.add_argument("--genes", type=int, default=1200)
    parser.add_argument("--slides", type=int, default=4, help="the last of them is placed")
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    slide = tissue.simulate(
        args.tissue, slides=args.slides, spots=args.spots, genes=args.genes, seed=args.seed
    )[-1]
    program = PROGRAMS[args.tissue](args.genes)
    truth = program.truth(slide)
    counts = torch.tensor(slide.expression.toarray(), dtype=torch.float32)
    batch, dropout = fit_batch(program, counts, torch.tensor(truth, dtype=torch.float32))
    bounds = (truth.min(0).tolist(), truth.max(0).tolist())
    decoded = [decode(program, part, batch, dropout, *bounds) for part in counts.split(_PART)]
    at, kinds, depth = (torch.cat(parts) for parts in zip(*decoded, strict=True))
    found = at.double().numpy()
    if program.repeats:
        grid, spread, share = posterior(program, counts, batch, dropout, kinds, depth, truth)
        found = (share @ grid).numpy()
        true = cKDTree(slide.pos).query(slide.pos, _NEIGHBORS + 1)[1][:, 1:]
        likely = likeliest_pairs(spread, share)
        hit = (likely[:, :, None] == true[:, None, :]).any(2).mean()
        print(f"the likeliest neighbours: neighbor_hit@{_NEIGHBORS} {hit:.4f}")
    error = found - truth
    print("root mean square errors", *np.sqrt(np.square(error).mean(0)).round(4))
    print("median error", np.median(np.linalg.norm(error, axis=1)).round(4))
    for at, known in ((found, "found"), (truth, "known")):
        for name, layout in program.layouts(at).items():
            scores = evaluate_layout(layout, slide.pos)
            metrics = "distance_spearman", "neighbor_hit@15", "procrustes"
            print(f"{name}, {known}:", *(f"{metric} {scores[metric]:.4f}" for metric in metrics))


if __name__ == "__main__":
    main()
