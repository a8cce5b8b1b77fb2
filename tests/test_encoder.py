"""The encoder: how expression is read, its losses, its initial values and appended components."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.spatial.distance import pdist
from small_run import small_config
from torch import nn

from ipar_sparse.config import load_config
from ipar_sparse.data.expression import Expression, match_genes
from ipar_sparse.estimators.components import principal_axes, spatial_axes
from ipar_sparse.geometry.gauge import gauge_fix
from ipar_sparse.inference.embedding import encode, read_expression
from ipar_sparse.inference.modules import build_encoder
from ipar_sparse.inference.run_folder import LAST, read_meta
from ipar_sparse.nn import SharedEncoder
from ipar_sparse.train.encoder import (
    ContrastiveSlide,
    append_components,
    encoder_loss,
    initialize_encoder,
)
from ipar_sparse.train.fit import fit_encoder
from ipar_sparse.train.selection import resolve_from_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def genes(small_slides):
    return match_genes(small_slides)[0]


@pytest.fixture(scope="module")
def plain(small_slides, genes):
    """Expression of two slides, weighted in no way."""
    return [Expression.from_slide(slide, genes) for slide in small_slides[:2]]


def contrastive(x, pos, neighbors=15, far_quantile=0.5):
    matrix = np.asarray(x, dtype=np.float32)
    expression = Expression(matrix, [f"g{i}" for i in range(matrix.shape[1])])
    return ContrastiveSlide(expression, pos, neighbors, far_quantile)


def loss_of(name, slide, encoder=None, **settings):
    """One loss on all cells of a slide, without noise; the embedding is the expression itself."""
    weights = {"infonce_weight": 0.0, "distance_weight": 0.0} | {f"{name}_weight": 1.0}
    quiet = {"gene_dropout": 0.0, "noise": 0.0, "gene_log_std": 0.0}
    config = load_config().replace(encoder=quiet | weights | settings).encoder
    generator = torch.Generator().manual_seed(3)
    losses = encoder_loss(encoder or nn.Identity(), slide, config, generator, CPU)
    assert losses.keys() == {"loss", name}
    return losses[name]


def test_infonce_is_its_formula():
    rng = np.random.default_rng(0)
    slide = contrastive(rng.normal(size=(9, 8)), rng.normal(size=(9, 2)), neighbors=1)
    z, pos = slide.rows(torch.arange(9)), slide.pos
    positive = slide.neighbors[:, 0].tolist()
    expected, numbers = 0.0, range(9)
    for i in numbers:
        similarity = [float(torch.cosine_similarity(z[i], z[positive[j]], dim=0)) for j in numbers]
        far = [float((pos[i] - pos[positive[j]]).norm()) > slide.far for j in numbers]
        negatives = sorted(similarity[j] / 0.1 for j in numbers if far[j])
        negatives += negatives[-2:]  # the hardest once more
        total = math.exp(similarity[i] / 0.1) + sum(map(math.exp, negatives))
        expected -= similarity[i] / 0.1 - math.log(total)
    found = loss_of("infonce", slide, temperature=0.1, hard_negatives=2)
    assert float(found) == pytest.approx(expected / 9, rel=1e-4)


def test_the_distance_loss_is_zero_on_any_scaled_copy_and_nowhere_else():
    rng = np.random.default_rng(0)
    pos = rng.normal(size=(40, 2))
    turned = 7 * pos @ [[0.6, -0.8, 0.0], [0.8, 0.6, 0.0]] + 3
    assert float(loss_of("distance", contrastive(turned, pos))) < 1e-6
    other = rng.normal(size=(40, 5))
    tissue = pdist(gauge_fix(torch.from_numpy(pos)).numpy()).clip(0.02)  # nearer ones say nothing
    expected = np.var(np.log(pdist(other)) - np.log(tissue))
    assert float(loss_of("distance", contrastive(other, pos))) == pytest.approx(expected, rel=1e-4)


def test_cells_that_coincide_leave_the_distance_loss_finite():
    rng = np.random.default_rng(0)
    pos, x = rng.normal(size=(20, 2)), rng.normal(size=(20, 5))
    slide, encoder = contrastive(np.tile(x, (2, 1)), np.tile(pos, (2, 1))), nn.Linear(5, 4)
    loss_of("distance", slide, encoder).backward()
    assert all(bool(p.grad.isfinite().all()) for p in encoder.parameters() if p.grad is not None)


@pytest.mark.parametrize("preset", ["v1", "spec"])
def test_the_loss_is_the_weighted_sum_of_those_that_have_a_weight(small_slides, genes, preset):
    config = small_config(preset=preset)
    expression = Expression.from_slide(small_slides[0], genes)
    slide = ContrastiveSlide(expression, small_slides[0].pos, 15, 0.5)
    encoder = SharedEncoder(len(genes), (24,), 16, skip=preset == "v1")
    generator = torch.Generator().manual_seed(0)
    losses = encoder_loss(encoder, slide, config.encoder, generator, CPU)
    weights = {"infonce": 0.3, "distance": 1.0}
    if preset == "spec":
        weights = {"infonce": 1.0, "invariance": 25.0, "variance": 50.0, "covariance": 1.0}
    assert losses.keys() == {"loss", *weights}
    torch.testing.assert_close(losses["loss"], sum(w * losses[k] for k, w in weights.items()))
    losses["loss"].backward()
    behind = {"mlp.0.weight", "mlp.0.bias", "mlp.1.weight", "mlp.1.bias"}  # a last layer of zeros
    for name, weight in encoder.named_parameters():
        learns = bool(weight.grad.abs().sum() > 0)
        assert learns == (preset == "spec" or name not in behind), name


def test_an_untrained_encoder_with_a_linear_path_is_pca(plain, genes):
    axes, scale = principal_axes(plain, 32)
    encoder = SharedEncoder(len(genes), (24,), 16, skip=True).eval()
    encoder.init_linear(axes, scale)
    x = torch.from_numpy(plain[0].rows())
    torch.testing.assert_close(encoder(x), scale * x @ axes[:, :16])


def test_smoothing_averages_with_the_nearest_in_expression(small_slides, plain, genes):
    encoder = SharedEncoder(len(genes), (24,), 16, smooth=4)
    encoder.init_linear(*principal_axes(plain[:1], 30))
    smoothed = read_expression(small_slides[0], genes, encoder)
    x = plain[0].rows().astype(np.float64)
    place = x @ encoder.axes.double().numpy()
    gap = np.square(place[:, None] - place[None]).sum(-1)
    np.fill_diagonal(gap, np.inf)
    near = np.argsort(gap, axis=1)[:, :4]
    np.testing.assert_allclose(smoothed.rows(), (x + x[near].mean(1)) / 2, atol=1e-4)
    rows = np.array([7, 3])
    np.testing.assert_allclose(smoothed.rows(rows), smoothed.rows()[rows], atol=1e-5)


def test_genes_are_scaled_and_weighted_before_anything_else(small_slides, genes):
    config = resolve_from_data(small_config("encoder.knn_smoothing=0"), small_slides[:2])
    encoder = build_encoder(config, len(genes))
    initialize_encoder(encoder, small_slides[:2], genes, config)
    assert float(encoder.target_sum) == pytest.approx(config.data.target_sum)
    weight = encoder.gene_weight.numpy()
    assert weight.std() > 0.05 and (weight >= 0).all()
    found = read_expression(small_slides[2], genes, encoder)
    total = float(encoder.target_sum)
    unweighted = Expression.from_slide(small_slides[2], genes, total)
    np.testing.assert_allclose(found.rows(), unweighted.rows() * weight, atol=1e-5)
    assert build_encoder(load_config(preset="spec"), len(genes)).gene_weight is None


@pytest.mark.parametrize("kind", ["principal", "spatial"])
def test_the_final_embedding_is_the_best_projection_of_what_was_learned_beside_the_components(
    small_slides, plain, genes, kind
):
    encoder = SharedEncoder(len(genes), (24,), 16, skip=True).eval()
    nn.init.normal_(encoder.linear.weight, std=0.01)
    nn.init.normal_(encoder.mlp[-1].weight, std=0.1)
    nn.init.normal_(encoder.mlp[-1].bias)
    positions = [slide.pos for slide in small_slides[:2]]
    settings = load_config(overrides=[f"encoder.component_kind={kind}"]).encoder
    if kind == "principal":
        axes, _ = principal_axes(plain, 16)
    else:
        axes, _ = spatial_axes(plain, positions, 16)

    def covariance(parts):
        return sum(torch.cov(x.T, correction=0) for x in parts) / len(parts)

    learned = [encode(encoder, x, CPU).double() for x in plain]
    appended = [torch.from_numpy(x.rows()).double() @ axes.double() for x in plain]
    factors = [
        weight / covariance(parts).trace().sqrt()
        for weight, parts in ((1.0, learned), (settings.component_weight, appended))
    ]
    pairs = zip(learned, appended, strict=True)
    both = [torch.cat([factors[0] * h, factors[1] * p], 1) for h, p in pairs]
    values, vectors = torch.linalg.eigh(covariance(both))
    append_components(encoder, plain, positions, settings)
    after = [encode(encoder, x, CPU).double() for x in plain]
    expected = both[1] @ vectors[:, -16:]
    torch.testing.assert_close(torch.pdist(after[1]), torch.pdist(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        covariance(after).diagonal(), values[-16:].flip(0), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("skip, weight", [(False, 0.5), (True, 0.0)])
def test_nothing_is_appended_without_a_linear_path_or_a_weight(
    small_slides, plain, genes, skip, weight
):
    encoder = SharedEncoder(len(genes), (24,), 16, skip=skip).eval()
    learned = encode(encoder, plain[0], CPU)
    settings = load_config(overrides=[f"encoder.component_weight={weight}"]).encoder
    append_components(encoder, plain, [slide.pos for slide in small_slides[:2]], settings)
    assert torch.equal(encode(encoder, plain[0], CPU), learned)


def test_an_encoder_of_no_steps_is_its_initial_components(small_slides, tmp_path):
    config = small_config("encoder.steps=0")
    fit_encoder(small_slides[:2], config, tmp_path)
    genes = read_meta(tmp_path / LAST)["genes"]
    config = resolve_from_data(config, small_slides[:2])
    initial = build_encoder(config, len(genes))
    initialize_encoder(initial, small_slides[:2], genes, config)
    saved = load_file(tmp_path / LAST)
    assert torch.equal(saved["encoder.linear.weight"], initial.linear.weight)
    assert torch.equal(saved["encoder.gene_weight"], initial.gene_weight)
    assert not saved["encoder.mlp.4.weight"].any()


def test_encoding_in_blocks_keeps_the_mode_of_the_encoder(plain, genes):
    encoder = SharedEncoder(len(genes), (24,), 16, dropout=0.5).train()
    first, second = (encode(encoder, plain[0], CPU) for _ in range(2))
    assert torch.equal(first, second) and encoder.training
