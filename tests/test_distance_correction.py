"""Distance correction: the closed form of expected ranks, and what the correction gains."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from ipar_sparse.geometry.alignment import align
from ipar_sparse.geometry.gauge import gauge_fix
from ipar_sparse.layout.distance_correction import (
    correct_distances,
    expected_rank,
    relative_variance,
)
from ipar_sparse.metrics.layout import distance_metrics


def test_the_expected_rank_is_the_mean_over_drawn_places():
    generator = torch.Generator().manual_seed(0)
    place = torch.randn(5, 2, generator=generator).double()
    variance = torch.rand(5, generator=generator).double()
    drawn = place + torch.randn(400_000, 5, 2, generator=generator) * (variance / 2).sqrt()[:, None]
    for found, shift in zip(expected_rank(place, variance, [1, 3]), (1, 3), strict=True):
        gap = (drawn - drawn.roll(shift, 1)).square().sum(-1)
        mean = (1 - torch.exp(-gap / 2)).mean(0)
        torch.testing.assert_close(found, mean, rtol=0, atol=3e-3)


def test_ranks_of_distances_in_a_gaussian_cloud_follow_the_formula():
    cloud = gauge_fix(torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)))
    distance = torch.pdist(cloud)
    rank = distance.argsort().argsort().double() / len(distance)
    torch.testing.assert_close(
        rank, 1 - torch.exp(-distance.double().square() / 2), rtol=0, atol=0.02
    )


def mirrored(n=600, seed=0):
    """Positions, mean places and variances of a tissue with two mirrored halves.

    The side of a third of the cells is known; the mean of the others is on the mirror line.
    """
    rng = np.random.default_rng(seed)
    pos = rng.uniform([-1.5, -1.0], [1.5, 1.0], (n, 2))
    known = rng.random(n) < 1 / 3
    mean = np.where(known[:, None], pos, pos * [0.0, 1.0])
    variance = np.where(known, 0.0, pos[:, 0] ** 2)
    return pos, torch.from_numpy(mean).float(), torch.from_numpy(variance).float()


def test_mirrored_halves_are_laid_out_better_with_distance_correction():
    pos, mean, variance = mirrored()
    relative = relative_variance(mean, variance)
    found = correct_distances(mean, relative)
    before, after = (distance_metrics(x, pos)["distance_spearman"] for x in (mean, found))
    assert after > before + 0.04
    # the correlation with expected ranks, which it maximises, has risen
    index = torch.triu_indices(len(mean), len(mean), 1)
    scale = (1 - relative.mean()).sqrt()
    gap = (gauge_fix(mean) * scale)[index[0]] - (gauge_fix(mean) * scale)[index[1]]
    w = 1 + (relative[index[0]] + relative[index[1]]) / 2
    wanted = 1 - torch.exp(-gap.square().sum(1) / (2 * w)) / w
    rise = [spearmanr(torch.pdist(x), wanted).statistic for x in (mean, found)]
    assert rise[1] > rise[0] + 0.05


def test_certain_places_stay():
    pos = torch.rand(500, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([2.0, 1.0])
    found = correct_distances(pos)
    aligned, _ = align(found, pos)
    scale = np.sqrt(np.square(pos.numpy() - pos.numpy().mean(0)).sum(1).mean())
    assert np.linalg.norm(aligned - pos.numpy(), axis=1).max() < 0.03 * scale


def test_distances_in_the_embedding_count():
    """Cells of one place that differ in a third dimension are moved apart."""
    generator = torch.Generator().manual_seed(0)
    pos = torch.randn(400, 2, generator=generator) * torch.tensor([1.0, 0.05])
    side = (torch.rand(400, generator=generator) > 0.5).float()
    h = torch.cat([pos, 2 * side[:, None]], 1)

    def apart(layout):
        layout = gauge_fix(layout)
        return abs(float(layout[side == 1, 1].mean() - layout[side == 0, 1].mean()))

    assert apart(correct_distances(pos, h=h, similarity=0.5)) > 5 * apart(correct_distances(pos))
    torch.testing.assert_close(
        correct_distances(pos, h=h, similarity=0.0), correct_distances(pos), rtol=0, atol=0
    )


def test_scores_depend_on_neither_frame_nor_order_of_cells():
    """Cells of unknown side may end on either, so layouts differ; their scores do not."""
    pos, mean, variance = mirrored(300)
    relative = relative_variance(mean, variance)
    rotation = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    found = [
        (correct_distances(mean, relative), pos),
        (correct_distances(3 * mean @ rotation + 1, relative), pos),
        (correct_distances(mean[order], relative[order]), pos[order]),
    ]
    scores = [distance_metrics(x, p)["distance_spearman"] for x, p in found]
    assert np.ptp(scores) < 0.05
    before = distance_metrics(mean, pos)["distance_spearman"]
    assert min(scores) > before + 0.03


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_scores_on_a_gpu_are_the_same():
    pos, mean, variance = mirrored()
    relative = relative_variance(mean, variance)
    scores = [
        distance_metrics(correct_distances(mean.to(d), relative.to(d)).cpu(), pos)[
            "distance_spearman"
        ]
        for d in ("cpu", "cuda")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=0.01)


def test_variance_is_relative_to_the_tissue():
    place = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]) + 5
    share = relative_variance(place, torch.full((4,), 3.0))
    torch.testing.assert_close(share, torch.full((4,), 0.75))
    torch.testing.assert_close(relative_variance(7 * place, torch.full((4,), 147.0)), share)
    assert relative_variance(torch.zeros(3, 2), torch.zeros(3)).eq(0).all()


def test_no_steps_and_too_few_cells_leave_a_layout_as_it_is():
    pos = torch.rand(10, 2)
    assert correct_distances(pos, steps=0) is pos
    for n in (0, 1, 2):
        assert torch.equal(correct_distances(pos[:n]), pos[:n])
    odd = torch.full((10, 2), torch.nan)
    assert correct_distances(odd) is odd


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(3, 40),
    copies=st.booleans(),
    level=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_odd_layouts_stay_finite(n, copies, level, seed):
    generator = torch.Generator().manual_seed(seed)
    pos = torch.randn(n, 2, generator=generator)
    if copies:
        pos[: n // 2 + 1] = pos[0]
    found = correct_distances(pos, torch.full((n,), level), torch.ones(n, 3), steps=20)
    assert found.isfinite().all() and found.shape == pos.shape
    torch.testing.assert_close(
        found,
        correct_distances(pos, torch.full((n,), level), torch.ones(n, 3), steps=20),
        rtol=0,
        atol=0,
    )
