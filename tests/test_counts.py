"""Components of counts: the maximum they say they are, and what an encoder makes of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from ipar_sparse.config import load_config
from ipar_sparse.diagnostics import candidate_recall
from ipar_sparse.errors import UserError
from ipar_sparse.expression import Expression
from ipar_sparse.graph import knn
from ipar_sparse.nn import CountComponents
from ipar_sparse.nn.counts import depth_and_mean
from ipar_sparse.simulate import simulate
from ipar_sparse.train import trainer
from ipar_sparse.train.checkpoint import LAST, read_meta
from ipar_sparse.train.components import principal_axes, project
from ipar_sparse.train.counts import fit_counts, read_counts
from ipar_sparse.train.predict import Predictor

SMALL = [
    "train.minisets=6", "train.epochs=2", "train.ramp_epochs=1", "train.gate_steps=3",
    "train.miniset_min=40", "train.miniset_max=60", "encoder.steps=8", "encoder.hidden=[24]",
    "encoder.out=16", "model.dim=16", "model.recycles=2", "model.channels=16",
    "model.head_channels=8", "graph.k=12", "train.device=cpu", "encoder.input=counts",
    "model.start=atlas", "refine.steps=0", "encoder.kept=spatial",
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
