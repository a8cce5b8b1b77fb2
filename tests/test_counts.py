"""Components of counts: the maximum they say they are, and what an encoder makes of them."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from ipar_sparse.atlas import atlas_layout
from ipar_sparse.config import load_config
from ipar_sparse.diagnostics import candidate_recall
from ipar_sparse.errors import UserError
from ipar_sparse.expression import Expression
from ipar_sparse.gauge import gauge_fix
from ipar_sparse.graph import knn
from ipar_sparse.metrics import evaluate_layout
from ipar_sparse.nn import CountComponents
from ipar_sparse.nn.counts import depth_and_mean
from ipar_sparse.simulate import simulate
from ipar_sparse.train import trainer
from ipar_sparse.train.checkpoint import LAST, read_meta
from ipar_sparse.train.components import principal_axes, project
from ipar_sparse.train.counts import count_atlas, fit_counts, read_counts
from ipar_sparse.train.evaluate import score_slide
from ipar_sparse.train.predict import Predictor

SMALL = [
    "train.minisets=6", "train.epochs=2", "train.ramp_epochs=1", "train.gate_steps=3",
    "train.miniset_min=40", "train.miniset_max=60", "encoder.steps=8", "encoder.hidden=[24]",
    "encoder.out=16", "model.dim=16", "model.recycles=2", "model.channels=16",
    "model.head_channels=8", "graph.k=12", "train.device=cpu", "encoder.input=counts",
    "model.start=atlas", "refine.expected=0", "refine.steps=0", "encoder.kept=spatial",
]  # fmt: skip


@pytest.fixture(scope="module")
def slides():
    return simulate("cortex", slides=3, spots=500, genes=300, seed=4)


@pytest.fixture(scope="module")
def fitted(slides):
    components = CountComponents(300)
    fit_counts(components, slides[:2], list(slides[0].genes))
    return components


def test_factors_are_where_the_posterior_is_highest():
    generator = torch.Generator().manual_seed(0)
    components = CountComponents(40).double()
    loading = 0.3 * torch.randn(components.channels, 40, generator=generator).double()
    components.loading.copy_(loading)
    components.size.copy_(torch.rand(40, generator=generator).double() * 3 + 0.5)
    drawn = torch.poisson(torch.full((25, 40), 2.0), generator=generator)
    counts = sparse.csr_matrix(drawn.numpy())
    z, filled = components.factors(counts)
    assert filled.all()

    depth, log_mean = depth_and_mean(counts, loading)
    z = z.requires_grad_()
    rate = (z @ loading + log_mean + depth.log()[:, None]).exp()
    likelihood = torch.distributions.NegativeBinomial(
        components.size, logits=rate.log() - components.size.log()
    ).log_prob(torch.from_numpy(counts.toarray()))
    (likelihood.sum() - z.square().sum() / 2).backward()
    assert float(z.grad.abs().max()) < 1e-3 * float(z.detach().abs().max())


def test_neighbours_of_an_unseen_slide(slides, fitted):
    """Better told by a model of the counts than by principal components of their logarithm."""
    genes, unseen = list(slides[0].genes), slides[2]
    h = torch.from_numpy(read_counts(unseen, genes, fitted).rows())
    read = [Expression.from_slide(slide, genes, 200.0) for slide in slides]
    axes, _ = principal_axes(read[:2], 30)
    plain = torch.from_numpy(project(read[2], axes))
    hit, least = (
        candidate_recall(knn(x, 15), unseen.pos)["candidate_recall@15"] for x in (h, plain)
    )
    assert hit > 1.15 * least > 0.1


def test_the_same_every_time(slides, fitted):
    again = CountComponents(300)
    fit_counts(again, slides[:2], list(slides[0].genes))
    assert all(torch.equal(a, b) for a, b in zip(again.buffers(), fitted.buffers(), strict=True))
    variance = torch.stack([fitted(s.expression).var(0).mean() for s in slides[:2]]).mean()
    assert 0.99 < float(variance) < 1.01


def test_a_gene_that_is_always_seen_more_often_changes_little(slides, fitted):
    genes, counts = list(slides[0].genes), slides[2].expression
    strong = counts @ sparse.diags(np.where(np.arange(300) % 2, 1.0, 3.0))
    before, after = fitted(counts), fitted(sparse.csr_matrix(strong))
    nearest = [knn(h, 15).index.numpy() for h in (before, after)]
    rest = np.mean([len(set(a) & set(b)) / 15 for a, b in zip(*nearest, strict=True)])
    moved = read_counts(replace(slides[2], genes=np.array(genes)[::-1]), genes, fitted).rows()
    other = knn(torch.from_numpy(moved), 15).index.numpy()
    chance = np.mean([len(set(a) & set(b)) / 15 for a, b in zip(nearest[0], other, strict=True)])
    assert rest > 0.4 > 3 * chance


def test_empty_cells_and_missing_genes(slides, fitted):
    genes, counts = list(slides[0].genes), slides[2].expression.tolil()
    counts[3] = 0
    counts = sparse.csr_matrix(counts)
    values = fitted(counts)
    assert values.isfinite().all() and (values[3] == 0).all() and (values[4] != 0).any()
    fewer = replace(
        slides[2], expression=slides[2].expression[:, :250], genes=slides[2].genes[:250], empty=None
    )
    found = read_counts(fewer, genes, fitted).rows()
    assert np.isfinite(found).all() and found.std() > 0.5
    assert fitted(counts[:0]).shape == (0, fitted.channels)


def test_a_run_that_reads_counts(slides, tmp_path):
    config = load_config(None, SMALL)
    config.save(tmp_path)
    trainer.fit(slides[:2], [slides[2]], config, tmp_path)
    assert trainer.TRANSFER not in read_meta(tmp_path / LAST)["facts"]  # nothing is left open
    predictor = Predictor.load(tmp_path)
    assert predictor.encoder.counts.loading.abs().sum() > 0
    found = predictor.predict(slides[2])
    assert np.isfinite(found.pos).all() and found.embedding.shape == (500, 16)
    normalized = replace(slides[2], normalized=True)
    with pytest.raises(UserError, match="cortex3: has no counts.*--layer"):
        predictor.predict(normalized)


def test_slides_that_cannot_be_read_are_refused(slides, tmp_path):
    config = load_config(None, SMALL)
    with pytest.raises(UserError, match="cortex2: has no counts"):
        trainer.fit([slides[0], replace(slides[1], normalized=True)], [], config, tmp_path)
    few = [
        replace(s, expression=s.expression[:, :2], genes=s.genes[:2], empty=None) for s in slides
    ]
    with pytest.raises(UserError, match="2 genes are too few"):
        trainer.fit(few, [], config, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="need 3 genes"):
        CountComponents(2)


@pytest.fixture(scope="module")
def atlas(slides):
    return count_atlas(slides[:2], list(slides[0].genes), torch.device("cpu"))


def test_places_are_the_mean_of_the_posterior(slides, atlas):
    """Against the distribution as torch has it, cell by cell, in float64."""
    counts, rows = slides[2].expression[:60], np.arange(0, 60, 3)
    plain = copy.deepcopy(atlas).double()
    mean, variance = plain.posterior(counts)

    tissue = plain.log_density.isfinite()
    grid, prior = plain.grid[tissue], plain.log_density[tissue]
    field = plain.height[tissue] @ plain.loading
    depth = torch.from_numpy(np.asarray(counts.sum(1)).ravel()).double()
    depth, seen = depth / depth.mean(), torch.from_numpy(np.asarray(counts.sum(0)).ravel()) + 0.5
    dense = torch.from_numpy(counts.toarray()).double()

    def posterior(log_mean, cells):
        found = []
        for cell in cells:
            # cells of about one depth are placed as if they had the same
            level = (depth.log() / 0.1).round()
            middle = depth.log()[level == level[cell]].mean()
            rate = (field + log_mean + middle).exp()
            drawn = torch.distributions.NegativeBinomial(
                plain.size, logits=rate.log() - plain.size.log(), validate_args=False
            )
            found.append((drawn.log_prob(dense[cell]).sum(1) + prior).softmax(0))
        return torch.stack(found)

    weight = prior.softmax(0) * depth.sum()
    for _ in range(2):
        log_mean = seen.log() - (weight @ field.exp()).log()
        weight = depth @ posterior(log_mean, range(60))
    found = posterior(seen.log() - (weight @ field.exp()).log(), rows)
    expected = found @ grid
    torch.testing.assert_close(mean[rows], expected, atol=1e-6, rtol=0)
    apart = (grid - expected.unsqueeze(1)).square().sum(-1)
    torch.testing.assert_close(variance[rows], (found * apart).sum(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(atlas(counts)[rows].double(), expected, atol=1e-3, rtol=0)


def test_fields_place_an_unseen_slide(slides, atlas, fitted):
    """Where genes are independent given the place, more closely than an atlas of an embedding."""
    genes, unseen = list(slides[0].genes), slides[2]
    placed = evaluate_layout(atlas(unseen.expression).double().numpy(), unseen.pos)
    h = [torch.from_numpy(read_counts(slide, genes, fitted).rows()) for slide in slides]
    known = [(own, slide.pos) for own, slide in zip(h[:2], slides, strict=False)]
    other = evaluate_layout(atlas_layout(h[2], known), unseen.pos)
    assert placed["distance_spearman"] > other["distance_spearman"] > 0.7
    assert placed["procrustes"] < other["procrustes"]


def test_fields_do_not_mind_batches_and_empty_cells(slides, atlas):
    counts = slides[2].expression
    before = atlas(counts)
    factor = np.exp(0.5 * np.random.default_rng(0).standard_normal(300))
    drawn = sparse.csr_matrix(np.random.default_rng(1).poisson(counts.toarray() * factor))
    score = {
        name: evaluate_layout(atlas(c).double().numpy(), slides[2].pos)["distance_spearman"]
        for name, c in (("as it is", counts), ("another batch", drawn.astype(np.float32)))
    }
    assert score["another batch"] > score["as it is"] - 0.05
    counts = counts.tolil()
    counts[3] = 0
    mean, variance = atlas.posterior(sparse.csr_matrix(counts))
    tissue = atlas.log_density.isfinite()
    middle = atlas.log_density[tissue].softmax(0) @ atlas.grid[tissue]
    torch.testing.assert_close(mean[3], middle)
    assert variance[3] > 2 * variance[4]
    torch.testing.assert_close(mean[4:], before[4:], atol=0.05, rtol=0)
    assert atlas(counts.tocsr()[:0]).shape == (0, 2)
    with pytest.raises(ValueError, match="needs counts \\(n, 300\\)"):
        atlas(counts.tocsr()[:, :9])


def test_a_run_that_begins_from_fields(slides, tmp_path):
    config = load_config(None, [*SMALL, "model.start=fields", "encoder.input=log"])
    for name in ("whole", "again"):
        (tmp_path / name).mkdir()
        config.save(tmp_path / name)
    trainer.fit(slides[:2], [slides[2]], config, tmp_path / "whole")
    predictor = Predictor.load(tmp_path / "whole")
    assert predictor.encoder.counts is None  # fields need no encoder of counts
    found = predictor.predict(slides[2])
    own = gauge_fix(predictor.atlas(slides[2].expression)).numpy()
    np.testing.assert_allclose(found.trajectory[0], own, atol=1e-5)
    assert not predictor.samples(10**6)
    more = predictor.predict(slides[2], seeds=3).uncertainty
    assert (more > 0).all() and not np.allclose(more, found.uncertainty)
    scored = score_slide(predictor, slides[2], baselines=False).methods["first layout"]
    expected = evaluate_layout(own, slides[2].pos)
    assert scored["procrustes"] == pytest.approx(expected["procrustes"], abs=1e-6)

    half = config.replace(train={"epochs": 1})
    trainer.fit(slides[:2], [slides[2]], half, tmp_path / "again")
    trainer.fit(slides[:2], [slides[2]], half, tmp_path / "again", resume=True)
    again = Predictor.load(tmp_path / "again").predict(slides[2]).trajectory[0]
    np.testing.assert_allclose(again, own, atol=1e-5)
    with pytest.raises(UserError, match="no counts.*model.start=fields.*model.start=atlas"):
        trainer.fit([slides[0], replace(slides[1], normalized=True)], [], config, tmp_path)
    with pytest.raises(UserError, match="model.start=fields reads counts"):
        load_config(None, ["model.start=fields", "data.embedding=obsm:H"])
