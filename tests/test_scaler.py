"""The scale of embeddings."""

import torch

from ipar_sparse.estimators.scaler import EmbeddingScaler


def test_embeddings_get_zero_mean_and_unit_mean_variance_and_keep_their_neighbours():
    parts = [torch.randn(50, 6) * torch.tensor([9.0, 1, 1, 1, 1, 1]) + 4, torch.randn(30, 6)]
    scaler = EmbeddingScaler(6).fit(parts)
    scaled = [scaler(part) for part in parts]
    ratio = torch.pdist(torch.cat(scaled)) / torch.pdist(torch.cat(parts))
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    mean = sum(part.mean(0) for part in scaled) / 2  # slides have equal weight
    variance = sum(part.square().mean() for part in scaled) / 2
    torch.testing.assert_close(mean, torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(variance, torch.ones(()))


def test_constant_embeddings_stay_finite():
    scaler = EmbeddingScaler(3).fit([torch.full((5, 3), 2.0)])
    assert bool((scaler(torch.full((4, 3), 2.0)) == 0).all())
