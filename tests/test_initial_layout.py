"""The initial layout of a run: an atlas of its training slides, saved in its checkpoint."""

import numpy as np
import pytest
import torch

from ipar_sparse.config import load_config
from ipar_sparse.data.simulation import simulate
from ipar_sparse.estimators.atlas import Atlas
from ipar_sparse.evaluation.scoring import score_slide
from ipar_sparse.geometry.gauge import gauge_fix
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.layout.distance_correction import relative_variance
from ipar_sparse.train.fit import fit


def test_a_run_begins_from_an_atlas_and_its_checkpoint_holds_it(tmp_path):
    slides = simulate("cortex", slides=3, spots=150, genes=60)
    config = load_config(
        None,
        [
            "model.init=atlas",
            "train.minisets=6",
            "train.epochs=2",
            "train.ramp_epochs=1",
            "train.gate_steps=3",
            "train.miniset_min=40",
            "train.miniset_max=60",
            "encoder.steps=8",
            "encoder.hidden=[24]",
            "encoder.out=16",
            "model.dim=16",
            "model.recycles=2",
            "model.channels=16",
            "model.head_channels=8",
            "graph.k=12",
            "train.device=cpu",
        ],
    )
    fit(slides[:2], [], config, tmp_path / "whole")
    predictor = Predictor.load(tmp_path / "whole")
    h = torch.from_numpy(predictor.embed(slides[2]))
    first = predictor.predict(slides[2]).trajectory[0]
    place, variance = predictor.atlas.mean_and_variance(h)
    np.testing.assert_allclose(first, gauge_fix(place).numpy(), atol=1e-5)
    one, more = (predictor.predict(slides[2], noise_samples=n).uncertainty for n in (1, 3))
    model = predictor.config.uncertainty
    relative = relative_variance(place, variance).numpy()
    expected = model.error_intercept + model.error_slope * relative
    np.testing.assert_allclose(np.square(one), expected, atol=1e-5)
    assert not np.allclose(one, more) and more.mean() == pytest.approx(one.mean(), rel=0.1)
    known = [(torch.from_numpy(predictor.embed(s)), s.pos) for s in slides[:2]]
    np.testing.assert_allclose(Atlas(16).fit(known)(h), predictor.atlas(h), atol=1e-3)
    methods = score_slide(predictor, slides[2], baselines=True).methods
    assert {"initial layout", "atlas"} <= methods.keys()
    expected = methods["atlas"]["distance_spearman"]  # of the same training slides
    assert methods["initial layout"]["distance_spearman"] == pytest.approx(expected, abs=0.02)

    # a resumed run fits it again
    half = config.replace(train={"epochs": 1})
    fit(slides[:2], [], half, tmp_path / "again")
    fit(slides[:2], [], half, tmp_path / "again", resume=True)
    assert Predictor.load(tmp_path / "again").atlas is not None
