"""What a run begins from is decided on donors left out, and remembered."""

import numpy as np
import pytest
import torch

from ipar_sparse.config import RunConfig, load_config
from ipar_sparse.errors import UserError
from ipar_sparse.simulate import simulate
from ipar_sparse.slide import Slide
from ipar_sparse.train.checkpoint import LAST, read_meta
from ipar_sparse.train.predict import Predictor
from ipar_sparse.train.trainer import TRANSFER, build_encoder, fit, fit_encoder, settle
from ipar_sparse.train.transfer import ATLAS, MAP, PLANE, _choose, _Left, try_transfer

CPU = torch.device("cpu")
OWN = RunConfig().replace(data={"embedding": "obsm:H"}, model={"dim": 8})
SMALL = [
    "train.minisets=6", "train.epochs=2", "train.ramp_epochs=1", "train.gate_steps=3",
    "train.miniset_min=40", "train.miniset_max=60", "encoder.steps=8", "encoder.hidden=[24]",
    "encoder.out=16", "model.dim=16", "model.recycles=2", "model.channels=16",
    "model.head_channels=8", "graph.k=12", "train.device=cpu",
]  # fmt: skip


def slide(name, dims, seed, nuisance=0.0, n=300):
    """Cells whose position stands in two dimensions of the embedding, noise in the others."""
    rng = np.random.default_rng(seed)
    pos = rng.uniform(-1, 1, (n, 2)) * [1.0, 0.6]
    h = 0.05 * rng.standard_normal((n, 8))
    h[:, dims] += pos
    h[:, 7] += nuisance * rng.standard_normal(n)  # what cells differ in, wherever they lie
    cells = np.array([f"{name}-{i}" for i in range(n)])
    return Slide(name, None, np.array([]), cells, pos=pos, embedding=h.astype(np.float32))


def tried(slides, donors=None):
    return try_transfer(slides, donors, OWN, None, None, CPU)


def test_a_map_that_holds_on_other_donors_is_the_start():
    found = tried([slide(name, [0, 1], seed, 2.0) for seed, name in enumerate("abc")])
    assert found.start == "mlp" and found.donors == 3
    assert found.scores[MAP] > 0.95 > 0.6 > found.scores[PLANE]


def test_where_every_donor_is_its_own_the_plane_is():
    found = tried([slide(name, [2 * seed, 2 * seed + 1], seed) for seed, name in enumerate("abc")])
    assert found.start == "pca"
    assert found.scores[PLANE] > 0.9 > 0.5 > found.scores[MAP]


def test_slides_of_one_donor_are_left_out_together():
    """Sections of one donor agree, which says nothing of the next donor."""
    pairs = [slide(f"{d}{i}", [2 * j, 2 * j + 1], 2 * j + i) for j, d in enumerate("ab")
             for i in (1, 2)]  # fmt: skip
    donors = {s.name: s.name[0] for s in pairs}
    assert tried(pairs, donors).scores[MAP] < 0.5 < tried(pairs).scores[MAP]
    assert tried(pairs, donors).donors == 2


def test_one_donor_tells_nothing():
    found = tried([slide("a", [0, 1], 0), slide("b", [0, 1], 1)], {"a": "x", "b": "x"})
    assert (found.start, found.donors, found.scores) == ("pca", 0, None)


@pytest.fixture(scope="module")
def slides():
    return simulate("cortex", slides=3, spots=150, genes=60)


def test_the_encoder_is_tried_too_and_the_same_every_time(slides):
    config = load_config(None, SMALL)
    genes = list(slides[0].genes)
    steps = []
    found = [
        try_transfer(
            slides, None, config, lambda: build_encoder(config, len(genes)), genes, CPU,
            lambda: steps.append(1),
        )
        for _ in range(2)
    ]  # fmt: skip
    assert found[0] == found[1]
    names = {f"{name}{what}" for name in (PLANE, MAP, ATLAS) for what in ("", " hit", " refined")}
    assert set(found[0].scores) == names | {"keep 0", "keep 0.5"}
    assert len(steps) == 2 * 3 * 4  # half of the steps, for each slide left out


def test_a_run_remembers_what_it_began_from(slides, tmp_path):
    config = load_config(None, SMALL)
    encoder, run, other = (tmp_path / name for name in ("encoder", "run", "other"))
    for folder in (encoder, run, other):
        folder.mkdir()
        config.save(folder)
    fit_encoder(slides[:2], config, encoder)
    fit(slides[:2], [slides[2]], config, run, encoder=encoder)
    fit(slides[:2], [slides[2]], config, other)
    metas = [read_meta(folder / LAST)["facts"][TRANSFER] for folder in (encoder, run, other)]
    assert metas[0] == metas[1] == metas[2] and metas[0]["donors"] == 2
    predictor = Predictor.load(run)
    assert predictor.config.model.start == metas[0]["start"]
    assert RunConfig.load(run).model.start == "auto"


def test_a_run_stopped_before_the_choice_cannot_predict():
    with pytest.raises(UserError, match="stopped before its training began"):
        settle(RunConfig(), {"genes": 10})
    settled = RunConfig().replace(
        model={"start": "mlp"}, encoder={"keep": 0.0}, refine={"steps": 200}
    )
    assert settle(settled, {}) is settled


def test_what_is_left_open_is_settled_and_nothing_else():
    found = {TRANSFER: {"start": "atlas", "keep": 0.0, "refine": {"atlas": 0, "pca": 200}}}
    config = settle(RunConfig(), found)
    assert (config.model.start, config.encoder.keep, config.refine.steps) == ("atlas", 0.0, 0)
    config = settle(RunConfig().replace(model={"start": "pca"}, encoder={"keep": 1.0}), found)
    assert (config.model.start, config.encoder.keep, config.refine.steps) == ("pca", 1.0, 200)
    config = settle(RunConfig().replace(encoder={"skip": False}), found)
    assert config.encoder.keep == 0.0


def told_apart(seed, kept, n=300):
    """What a trained encoder left (h), and places; one of them in a dimension it dropped."""
    rng = np.random.default_rng(seed)
    pos = rng.uniform(-1, 1, (n, 2))
    h = np.concatenate([pos[:, : 1 + kept], 0.01 * rng.standard_normal((n, 2 - kept))], axis=1)
    return torch.from_numpy(h).float(), pos


@pytest.mark.parametrize("better", [0.0, 0.5])
def test_components_are_kept_where_they_find_more_neighbors(better):
    found = {}
    for keep in (0.0, 0.5):
        known = [told_apart(0, keep == better)]
        left = _Left(*told_apart(1, keep == better), [(h.numpy(), x) for h, x in known])
        found[keep] = [[left]]
    assert _choose(found, RunConfig()).keep == better


def test_the_last_step_is_left_out_where_it_costs_neighbors():
    """An embedding of noise misleads a layout that is right; one of the place sharpens a blur."""
    rng = np.random.default_rng(0)
    pos = rng.uniform(-1, 1, (400, 2))
    known = [(rng.standard_normal((100, 2)), rng.standard_normal((100, 2)))]
    noise = _Left(torch.from_numpy(rng.standard_normal((400, 2))).float(), pos, known)
    place = _Left(torch.from_numpy(pos).float(), pos, known)
    noise.layouts = dict.fromkeys((PLANE, MAP, ATLAS), pos)
    place.layouts = dict.fromkeys((PLANE, MAP, ATLAS), pos + 0.1 * rng.standard_normal(pos.shape))
    assert set(_choose({0.0: [[noise]]}, RunConfig()).refine.values()) == {0}
    assert set(_choose({0.0: [[place]]}, RunConfig()).refine.values()) == {200}
    asked = RunConfig().replace(refine={"steps": 50})
    assert set(_choose({0.0: [[noise]]}, asked).refine.values()) == {50}
