"""The initial layout of a run: an atlas of its training slides, saved in its checkpoint."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_run import small_config, stop_after

from ipar_sparse.config import load_config
from ipar_sparse.estimators import EmbeddingScaler
from ipar_sparse.estimators.atlas import Atlas
from ipar_sparse.geometry.gauge import gauge_fix
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.inference.run_folder import BEST
from ipar_sparse.layout.distance_correction import relative_variance
from ipar_sparse.layout.uncertainty import widen
from ipar_sparse.metrics.layout import evaluate_layout
from ipar_sparse.train.atlas import fit_atlas
from ipar_sparse.train.batches import EmbeddedSlide
from ipar_sparse.train.fit import fit
from ipar_sparse.train.loop import Loop


def test_a_run_begins_from_an_atlas_and_its_checkpoint_holds_it(small_slides, tmp_path):
    slides = small_slides
    fit(slides[:2], [], small_config("model.init=atlas", "train.epochs=1"), tmp_path)
    predictor = Predictor.load(tmp_path)
    h = torch.from_numpy(predictor.embed(slides[2]))
    prediction = predictor.predict(slides[2])
    place, variance = predictor.atlas.mean_and_variance(h)
    np.testing.assert_allclose(prediction.trajectory[0], gauge_fix(place).numpy(), atol=1e-5)
    relative = relative_variance(place, variance)
    torch.testing.assert_close(prediction.predictive_variance, relative)
    model = predictor.config.uncertainty
    expected = model.error_intercept + model.error_slope * relative.numpy().astype(float)
    expected *= (1 - (1 - relative.numpy().mean()) ** model.prior_exponent) / expected.mean()
    p_value, growth = prediction.typicality.p_value, predictor.config.typicality.growth_below
    np.testing.assert_allclose(
        prediction.uncertainty, widen(np.sqrt(expected), p_value, growth), atol=1e-5
    )
    more = predictor.predict(slides[2], noise_samples=3).uncertainty
    assert not np.allclose(prediction.uncertainty, more)
    assert more.mean() == pytest.approx(prediction.uncertainty.mean(), rel=0.1)
    known = [(torch.from_numpy(predictor.embed(s)), s.pos) for s in slides[:2]]
    np.testing.assert_allclose(Atlas(16).fit(known)(h), predictor.atlas(h), atol=1e-3)


def test_a_resumed_run_fits_its_atlas_again(small_slides, tmp_path, monkeypatch):
    config = small_config("model.init=atlas", "train.epochs=1")
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    fit(small_slides[:2], [], config, whole)
    with pytest.raises(KeyboardInterrupt):
        fit(small_slides[:2], [], config, halved, stop=stop_after(monkeypatch, "model", 2))
    fit(small_slides[:2], [], out=halved, resume=True)
    ours, theirs = (load_file(folder / BEST) for folder in (halved, whole))
    assert any(key.startswith("atlas.") for key in theirs) and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_initial_layouts_hold_where_most_dimensions_of_the_embedding_are_flat():
    """Dimensions that hardly vary must not drown the others in the noise of training."""
    rng, slides = np.random.default_rng(0), []
    for name in "ab":
        pos = rng.uniform(-1, 1, (300, 2)) * [1.0, 0.6]
        h = 1e-3 * rng.standard_normal((300, 32))
        h[:, :2] = pos + 0.05 * rng.standard_normal((300, 2))
        slides.append(EmbeddedSlide(name, torch.from_numpy(h).float(), torch.from_numpy(pos)))
    scaler = EmbeddingScaler(32).fit([slide.h for slide in slides])
    for slide in slides:
        slide.h = scaler(slide.h)
    config = load_config(overrides=["model.init=atlas"])
    fit_atlas(slides[:1], slides[1:], config, Loop(0, torch.device("cpu")))
    for slide in slides:
        found = evaluate_layout(slide.initial.numpy(), slide.pos.numpy())
        assert found["distance_spearman"] > 0.9
