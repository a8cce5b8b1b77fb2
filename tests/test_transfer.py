"""What a run begins from is decided on donors left out, and remembered."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ipar_sparse.config import RunConfig, load_config
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.slide import Slide
from ipar_sparse.errors import UserError
from ipar_sparse.estimators.relevant_components import RelevantComponents
from ipar_sparse.inference.checkpoint import LAST, read_meta
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.layout.distance_correction import relative_variance
from ipar_sparse.train import selection as transfer
from ipar_sparse.train.fit import TRANSFER, build_encoder, fit, fit_encoder, settle
from ipar_sparse.train.selection import (
    ATLAS,
    FIELDS,
    MAP,
    PLANE,
    Transfer,
    _choose,
    _Left,
    trial_steps,
    try_transfer,
)

CPU = torch.device("cpu")
STARTS = PLANE, MAP, ATLAS
OWN = RunConfig().replace(data={"embedding": "obsm:H"}, model={"dim": 8})
SMALL = [
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
]


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
    pairs = [
        slide(f"{d}{i}", [2 * j, 2 * j + 1], 2 * j + i) for j, d in enumerate("ab") for i in (1, 2)
    ]
    donors = {s.name: s.name[0] for s in pairs}
    assert tried(pairs, donors).scores[MAP] < 0.5 < tried(pairs).scores[MAP]
    assert tried(pairs, donors).donors == 2


def test_a_donor_of_many_slides_counts_by_some_of_them():
    many = [slide(f"a{i}", [0, 1], i) for i in range(7)] + [slide("b", [0, 1], 9)]
    donors = {s.name: s.name[0] for s in many}
    first, second = transfer._folds(many, donors, None, CPU)
    assert [s.name for s in first.test] == [s.name for s in second.train] == ["a0", "a3", "a6"]
    assert [s.name for s in second.test] == [s.name for s in first.train] == ["b"]


def test_one_donor_tells_nothing():
    found = tried([slide("a", [0, 1], 0), slide("b", [0, 1], 1)], {"a": "x", "b": "x"})
    assert (found.start, found.donors, found.scores) == ("atlas", 0, None)


@pytest.fixture(scope="module")
def slides():
    return simulate("cortex", slides=3, spots=150, genes=60)


def test_the_encoder_is_tried_too_and_the_same_every_time(slides):
    config = load_config(None, SMALL)
    genes = list(slides[0].genes)
    steps = []
    found = [
        try_transfer(
            slides,
            None,
            config,
            lambda asked: build_encoder(asked, len(genes)),
            genes,
            CPU,
            lambda: steps.append(1),
        )
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert found[0].input == "counts"  # so the fields of genes are tried as well
    starts = *STARTS, FIELDS
    whats = "", " hit", " refined"
    names = {f"{name}{what}" for name in starts for what in whats}
    names |= {*transfer.REFINE, *transfer.ANCHORS, "atlas expected", "fields expected"}
    tried = {"spatial genes", "all genes", "counts", "principal", "spatial"}
    assert set(found[0].scores) == names | tried
    assert len(steps) == 2 * 3 * 4  # half of the steps, for each slide left out
    assert trial_steps(slides, None, config) == 3 * 4
    assert trial_steps(slides[:1], None, config) == 0


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
        model={"start": "mlp"},
        refine={"steps": 200},
        encoder={"standardize": 0.5, "spatial_genes": 0.0, "kept": "spatial"},
    )
    assert settle(settled, {}) is settled


MIDDLE, PLAIN, LEADING = (transfer.REFINE[way] for way in ("middle", "plain", "leading"))
NARROW = transfer.REFINE["narrow"]
PARTS = "steps", "neighbors", "anchor", "whiten", "power", "narrow"
LOOSE, FIRM = (MIDDLE | {"anchor": anchor} for anchor in transfer.ANCHORS.values())
FOUND = Transfer(
    "atlas", 1.0, 0.0, "spatial", {"atlas": MIDDLE | {"steps": 0}, "pca": FIRM}
).as_dict()


def last_step(config):
    return config.refine.model_dump(include=set(PARTS))


def test_what_is_left_open_is_settled_and_nothing_else():
    config = settle(RunConfig(), {TRANSFER: FOUND})
    assert (config.model.start, config.refine.steps) == ("atlas", 0)
    own = config.encoder
    assert (own.standardize, own.spatial_genes, own.kept) == (1.0, 0.0, "spatial")
    assert own.input == "log"
    reads = FOUND | {"input": "counts"}
    assert settle(RunConfig(), {TRANSFER: reads}).encoder.input == "counts"
    asked = {"standardize": 0.2, "kept": "principal"}
    config = settle(RunConfig().replace(model={"start": "pca"}, encoder=asked), {TRANSFER: FOUND})
    assert config.model.start == "pca" and last_step(config) == FIRM
    own = config.encoder
    assert (own.standardize, own.spatial_genes, own.kept) == (0.2, 0.0, "principal")


@pytest.mark.parametrize(
    "asked",
    [
        {"steps": 30},
        {"neighbors": 7},
        {"anchor": 0.5},
        {"whiten": 0.2},
        {"power": 0.5},
        {"narrow": 0.1},
    ],
)
def test_the_last_step_that_is_asked_for_is_taken(asked):
    config = RunConfig().replace(model={"start": "pca"}, refine=asked)
    found = last_step(settle(config, {TRANSFER: FOUND}))
    nothing = dict.fromkeys(PARTS)
    assert found == (nothing if "steps" in asked else FIRM) | asked


@pytest.mark.parametrize(
    "unused",
    [
        {"data": {"embedding": "obsm:H"}},
        {"encoder": {"standardize": 1.0, "spatial_genes": 0.0, "keep": 0.0}},
        {"encoder": {"standardize": 1.0, "spatial_genes": 0.0, "skip": False}},
    ],
)
def test_what_a_run_does_not_use_is_not_tried(unused):
    config = RunConfig().replace(model={"start": "pca"}, refine={"steps": 0})
    with pytest.raises(UserError, match="stopped before its training began"):
        settle(config, {})
    config = config.replace(**unused)
    assert settle(config, {}) is config


def test_expected_distances_are_left_open_where_something_tells_what_is_uncertain():
    given = {"standardize": 1.0, "spatial_genes": 0.0, "keep": 0.0}
    config = RunConfig().replace(refine={"steps": 0}, encoder=given)
    for start in ("pca", "mlp"):
        asked = config.replace(model={"start": start})
        assert settle(asked, {}) is asked
    for start in ("atlas", "fields"):
        asked = config.replace(model={"start": start})
        with pytest.raises(UserError, match="stopped before its training began"):
            settle(asked, {})
        asked = asked.replace(refine={"expected": 0})
        assert settle(asked, {}) is asked


def test_a_run_that_tried_what_to_keep_is_read_as_it_was():
    before = {"start": "atlas", "keep": 0.0, "refine": {"atlas": 0, "pca": 200}}
    config = RunConfig().replace(
        encoder={"standardize": 0.5, "spatial_genes": 0.25, "kept": "principal"}
    )
    config = settle(config, {TRANSFER: before})
    assert (config.model.start, config.encoder.keep, config.refine.steps) == ("atlas", 0.0, 0)


def test_an_encoder_without_a_linear_path_keeps_nothing_to_try(slides):
    config = load_config(None, [*SMALL, "encoder.skip=false", "encoder.spatial_genes=0"])
    genes = list(slides[0].genes)
    found = try_transfer(
        slides, None, config, lambda asked: build_encoder(asked, len(genes)), genes, CPU
    )
    assert found.kept == "principal"
    assert not found.scores.keys() & {"spatial", "all genes", "spatial genes"}


class Scored:
    """A slide left out whose scores are known."""

    def __init__(self, spearman, hit):
        self.values, self.hit = spearman, hit

    def spearman(self, name):
        return self.values[name]

    def embedding_hit(self):
        return self.hit


def scored(hit, *spearman):
    return Scored(dict(zip(STARTS, spearman, strict=True)), hit)


def test_an_embedding_counts_by_its_best_start_and_its_neighbors(monkeypatch):
    monkeypatch.setattr(transfer, "_Left", Scored)
    donors = [
        [scored(0.3, 0.1, 0.4, 0.2), scored(0.1, 0.1, 0.2, 0.2)],
        [scored(0.4, 0.3, 0.4, -0.2)],
    ]
    assert transfer._score(donors) == pytest.approx(np.sqrt((0.3 + 0.4) / 2 * (0.2 + 0.4) / 2))
    nothing = [[scored(0.3, -0.1, -0.4, -0.2)]]
    assert transfer._score(nothing) == 0.0


def noise(fold):
    """Embedding and layouts of the slides left out that say nothing of the place."""
    rng = np.random.default_rng(0)
    return [
        _Left(
            torch.from_numpy(rng.standard_normal((s.num_cells, 4))).float(),
            s.pos,
            {name: rng.standard_normal((s.num_cells, 2)) for name in STARTS},
        )
        for s in fold.test
    ]


@pytest.mark.parametrize("better", ["principal", "spatial"])
def test_what_is_kept_serves_donors_left_out(slides, monkeypatch, better):
    config = load_config(None, SMALL)
    genes = list(slides[0].genes)
    trained = transfer._Fold.trained

    def spoiled(fold, *args):
        found = trained(fold, *args)
        return {kept: left if kept == better else noise(fold) for kept, left in found.items()}

    monkeypatch.setattr(transfer._Fold, "trained", spoiled)
    found = try_transfer(
        slides, None, config, lambda asked: build_encoder(asked, len(genes)), genes, CPU
    )
    other = "spatial" if better == "principal" else "principal"
    assert found.kept == better and found.scores[better] > found.scores[other]


LOG = ("log", 0.5, 0.25)  # an encoder's input and weights of genes
ALIKE = ("log", 1.0, 0.0)
COUNTS = ("counts", 0.5, 0.25)


@pytest.mark.parametrize("better", [LOG, ALIKE, COUNTS])
def test_expression_is_read_as_serves_donors_left_out(slides, monkeypatch, better):
    config = load_config(None, SMALL)
    genes = list(slides[0].genes)
    components, seen = transfer._Fold.components, []

    def way(config):
        own = config.encoder
        return own.input, own.standardize, own.spatial_genes

    def spoiled(fold, config, build):
        return components(fold, config, build) if way(config) == better else noise(fold)

    def trained(fold, config, *args):
        seen.append(way(config))
        return {"principal": noise(fold)}

    monkeypatch.setattr(transfer._Fold, "components", spoiled)
    monkeypatch.setattr(transfer._Fold, "trained", trained)
    found = try_transfer(
        slides, None, config, lambda asked: build_encoder(asked, len(genes)), genes, CPU
    )
    assert (found.input, found.standardize, found.spatial_genes) == better
    assert set(seen) == {better}


@pytest.mark.parametrize(
    ("settings", "normalized", "ways"),
    [
        ([], False, {"spatial genes", "all genes", "counts"}),
        ([], True, {"spatial genes", "all genes"}),  # nothing to count
        (["encoder.input=log"], False, {"spatial genes", "all genes"}),
        (["encoder.input=counts"], False, set()),  # one way is not tried
        (["encoder.standardize=0.5"], False, set()),  # weights are of the logarithm
    ],
)
def test_ways_to_read_expression_that_are_tried(slides, monkeypatch, settings, normalized, ways):
    config = load_config(None, [*SMALL, *settings])
    genes = list(slides[0].genes)
    monkeypatch.setattr(transfer._Fold, "trained", lambda fold, *_: {"principal": noise(fold)})
    found = try_transfer(
        [replace(s, normalized=normalized) for s in slides],
        None,
        config,
        lambda asked: build_encoder(asked, len(genes)),
        genes,
        CPU,
    )
    assert found.scores.keys() & {"spatial genes", "all genes", "counts"} == ways
    if len(ways) < 3:
        assert found.input == ("counts" if "encoder.input=counts" in settings else "log")


def test_a_run_reads_counts_where_donors_left_out_favor_them(slides, monkeypatch, tmp_path):
    components = transfer._Fold.components

    def spoiled(fold, config, build):
        return components(fold, config, build) if config.encoder.input == "counts" else noise(fold)

    monkeypatch.setattr(transfer._Fold, "components", spoiled)
    config = load_config(None, SMALL)
    encoder, run, mixed = (tmp_path / name for name in ("encoder", "run", "mixed"))
    for folder in (encoder, run, mixed):
        folder.mkdir()
        config.save(folder)
    fit_encoder(slides[:2], config, encoder)
    fit(slides[:2], [slides[2]], config, run, encoder=encoder)
    before = Predictor.load(run).predict(slides[2]).pos
    fit(slides[:2], [slides[2]], config, run, resume=True)  # nothing is left to do
    predictor = Predictor.load(run)
    assert predictor.config.encoder.input == "counts" and predictor.encoder.counts is not None
    assert np.array_equal(predictor.predict(slides[2]).pos, before)
    # a validation slide that has none could not be read
    fit(slides[:2], [replace(slides[2], normalized=True)], config, mixed)
    assert Predictor.load(mixed).config.encoder.input == "log"


AS_IT_IS = RunConfig().replace(refine={"expected": 0})
"""Distances of layouts are left as they are."""


def test_the_last_step_is_left_out_where_it_costs_neighbors():
    """An embedding of noise misleads a layout that is right; one of the place sharpens a blur."""
    rng = np.random.default_rng(0)
    pos = rng.uniform(-1, 1, (400, 2))
    blurred = pos + 0.1 * rng.standard_normal(pos.shape)
    h = torch.from_numpy(rng.standard_normal((400, 2))).float()
    noise = _Left(h, pos, dict.fromkeys(STARTS, pos))
    place = _Left(torch.from_numpy(pos).float(), pos, dict.fromkeys(STARTS, blurred))
    for left, steps in ((noise, 0), (place, 400)):
        found = _choose([[left]], AS_IT_IS, Transfer(), {})
        assert {found.refine[start]["steps"] for start in ("pca", "mlp", "atlas")} == {steps}
    asked = AS_IT_IS.replace(refine={"steps": 50})
    found = _choose([[noise]], asked, Transfer(), {}).refine
    assert found == {start: way | {"expected": 0} for start, way in Transfer().refine.items()}


class Refined(Scored):
    """What each last step would make of a slide left out: distances, neighbours."""

    def __init__(self, none, middle, loose=(0.0, 0.0), firm=(0.0, 0.0), **others):
        self.states = {"middle": middle, 2.0: loose, 12.0: firm, **others}
        self.spearman_, self.hit = none

    def errors(self, name):
        return np.ones(3), None

    def refined(self, name, settings):
        ways = {way: {"anchor": 5.0} | own for way, own in transfer.REFINE.items()}
        way = next((way for way, own in ways.items() if own == settings), settings["anchor"])
        state = self.states.get(way, (0.0, 0.0))
        return Refined(state, state)

    def spearman(self, name):
        return self.spearman_

    def layout_hit(self, name):
        return self.hit


@pytest.mark.parametrize(
    ("middle", "loose", "firm", "expected"),
    [
        ((0.5, 0.299), (0.5, 0.29), (0.5, 0.28), MIDDLE),  # a tie with none is for the last step:
        ((0.5, 0.29), (0.5, 0.28), (0.5, 0.28), MIDDLE | {"steps": 0}),  # more cells gain more
        ((0.5, 0.32), (0.49, 0.34), (0.51, 0.31), LOOSE),
        ((0.5, 0.32), (0.4, 0.36), (0.51, 0.31), MIDDLE),  # distances count too
        ((0.5, 0.32), (0.4, 0.36), (0.6, 0.31), FIRM),
        ((0.5, 0.32), (0.4, 0.36), (0.7, 0.29), FIRM | {"steps": 0}),
    ],
)
def test_how_the_last_step_is_taken(monkeypatch, middle, loose, firm, expected):
    monkeypatch.setattr(transfer, "_Left", Refined)
    states = (0.5, 0.3), middle, loose, firm
    found = _choose([[Refined(*states)]], AS_IT_IS, Transfer(), {})
    expected = expected | {"expected": 0}
    assert found.refine == Transfer().refine | dict.fromkeys(("pca", "mlp", "atlas"), expected)
    asked = AS_IT_IS.replace(refine={"neighbors": 10})  # what is asked for is not tried
    found = _choose([[Refined(*states)]], asked, Transfer(), {})
    assert {found.refine[start]["neighbors"] for start in ("pca", "mlp", "atlas")} == {10}
    assert not ({*transfer.REFINE, *transfer.ANCHORS} - {"middle"}) & found.scores.keys()


def test_what_is_near_is_settled_first_and_then_how_far_places_are_kept(monkeypatch):
    monkeypatch.setattr(transfer, "_Left", Refined)
    for hit, way in ((0.319, MIDDLE), (0.321, PLAIN)):
        states = (0.5, 0.3), (0.5, 0.32), (0.5, 0.31), (0.5, 0.33)
        found = _choose([[Refined(*states, plain=(0.5, hit))]], AS_IT_IS, Transfer(), {})
        assert found.refine["pca"] == way | {"anchor": 12.0, "expected": 0}
    found = _choose([[Refined(*states, leading=(0.5, 0.34))]], AS_IT_IS, Transfer(), {})
    assert found.refine["pca"] == LEADING | {"expected": 0}
    found = _choose([[Refined(*states, narrow=(0.5, 0.34))]], AS_IT_IS, Transfer(), {})
    assert found.refine["pca"] == NARROW | {"expected": 0}  # which has an anchor of its own
    assert not transfer.ANCHORS.keys() & found.scores.keys()


def test_leading_components_serve_where_the_others_are_noise():
    """One donor's cells lie by two strong components; in the other forty there is nothing."""
    rng = np.random.default_rng(0)
    pos = rng.uniform(-1, 1, (600, 2))
    h = np.concatenate(
        [pos + 0.1 * rng.standard_normal(pos.shape), 0.15 * rng.standard_normal((600, 40))], 1
    )
    blurred = pos + 0.25 * rng.standard_normal(pos.shape)
    left = _Left(torch.from_numpy(h).float(), pos, dict.fromkeys(STARTS, blurred))
    found = _choose([[left]], AS_IT_IS, Transfer(), {})
    assert found.refine["pca"]["power"] == 1 and found.refine["pca"]["steps"]
    others = [way for way in transfer.REFINE if way != "leading"]
    assert found.scores["leading"] > max(found.scores[way] for way in others)


def test_a_narrow_layout_serves_where_units_repeat_along_a_trend():
    """One axis of the place can be told, badly; and how far along its unit a cell lies, well."""
    rng = np.random.default_rng(0)

    def made(seed):
        rng = np.random.default_rng(seed)
        pos = rng.uniform(-1, 1, (1500, 2))
        phase = 0.5 + 0.25 * (np.sin(9 * pos[:, 0]) + np.sin(9 * pos[:, 1]))
        h = np.column_stack(
            [
                pos[:, 0] + 0.3 * rng.standard_normal(1500),
                5 * phase + 0.3 * rng.standard_normal(1500),
                0.3 * rng.standard_normal((1500, 8)),
            ]
        )
        return torch.from_numpy(h).float(), pos

    (h, pos), known = made(0), [made(1), made(2)]
    nearness = RelevantComponents(10).fit(known)
    guessed = np.column_stack([h[:, 0].numpy(), 0.3 * rng.standard_normal(1500)])
    left = _Left(h, pos, dict.fromkeys(STARTS, guessed), nearness=nearness)
    found = _choose([[left]], AS_IT_IS, Transfer(), {})
    assert found.refine["pca"]["narrow"] and found.refine["pca"]["steps"]
    others = [way for way in transfer.REFINE if way != "narrow"]
    assert found.scores["narrow"] > 1.02 * max(found.scores[way] for way in others)


def test_whitening_serves_where_neighbours_differ_more_in_some_directions():
    """Ten directions are told apart by the place, two more vary as much for other reasons."""
    rng = np.random.default_rng(0)

    def made(seed):
        rng = np.random.default_rng(seed)
        pos = rng.uniform(-1, 1, (600, 2))
        h = np.concatenate(
            [0.1 * rng.standard_normal((600, 8)), 0.5 * rng.standard_normal((600, 2))], 1
        )
        h[:, :2] += 0.5 * pos
        return torch.from_numpy(h).float(), pos

    (h, pos), known = made(0), [made(1), made(2)]
    blurred = pos + 0.25 * rng.standard_normal(pos.shape)
    left = _Left(h, pos, dict.fromkeys(STARTS, blurred), nearness=RelevantComponents(10).fit(known))
    found = _choose([[left]], AS_IT_IS, Transfer(), {})
    assert found.refine["pca"]["whiten"] == 1 and found.refine["pca"]["steps"]
    assert found.scores["whitened"] > found.scores["middle"] > found.scores["plain"]


@pytest.mark.parametrize(("after", "taken"), [(0.299, False), (0.3, False), (0.301, True)])
def test_after_fields_the_last_step_must_gain(monkeypatch, after, taken):
    """They find neighbours that the embedding does not."""
    monkeypatch.setattr(transfer, "_Left", Refined)
    found = _choose(
        [[Refined((0.5, 0.3), (0.5, after))]],
        AS_IT_IS,
        Transfer(),
        {},
        (*STARTS, FIELDS),
    )
    assert bool(found.refine["fields"]["steps"]) == taken


def halves(known=1 / 3, n=700, seed=0):
    """A slide left out of two like halves; of some cells an atlas can tell the side."""
    rng = np.random.default_rng(seed)
    pos = rng.uniform([-1.5, -1.0], [1.5, 1.0], (n, 2))
    told = rng.random(n) < known
    mean = np.where(told[:, None], pos, pos * [0.0, 1.0])
    variance = torch.from_numpy(np.where(told, 0.0, pos[:, 0] ** 2)).float()
    h = torch.from_numpy(np.abs(pos)).float()
    atlas = relative_variance(torch.from_numpy(mean).float(), variance)
    worse = mean + 0.3 * rng.standard_normal(pos.shape)
    placed = {"plane": worse, "map": worse, "atlas": mean}
    return _Left(h, pos, placed, {"atlas": atlas})


def test_distances_become_what_is_expected_where_donors_left_out_gain_by_it():
    found = _choose([[halves()]], RunConfig(), Transfer(), {})
    assert found.start == "atlas" and found.refine["atlas"]["expected"] == transfer.EXPECTED
    assert found.scores["atlas expected"] > found.scores["atlas"] + 0.03
    for start, name in (("pca", "plane"), ("mlp", "map")):  # which know of no uncertainty
        assert found.refine[start]["expected"] == 0 and f"{name} expected" not in found.scores
    none = _choose([[halves()]], AS_IT_IS, Transfer(), {})
    assert none.refine["atlas"]["expected"] == 0 and "atlas expected" not in none.scores
    asked = _choose(
        [[halves()]], RunConfig().replace(refine={"expected": 7}), Transfer(), {}
    ).refine  # is not tried
    assert {asked[start]["expected"] for start in ("pca", "mlp", "atlas")} == {7}


def test_distances_stay_where_expectations_mislead():
    """Cells whose places are known, said to be uncertain the more so the nearer to the middle."""
    left = halves(known=1.0)
    middle = torch.from_numpy(np.exp(-3 * np.square(left.pos).sum(1))).float()
    left.h, left.doubt = torch.zeros_like(left.h), {"atlas": middle}
    found = _choose([[left]], RunConfig(), Transfer(), {})
    assert found.refine["atlas"]["expected"] == 0
    assert found.scores["atlas expected"] < found.scores["atlas"]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"expected": 200, "steps": 400, "neighbors": 15}),
        ({"steps": 30}, {"expected": 200, "steps": 30, "neighbors": None}),
        ({"expected": 0}, {"expected": 0, "steps": 400, "neighbors": 15}),
        ({"expected": 5, "steps": 0}, {"expected": 5, "steps": 0, "neighbors": None}),
    ],
)
def test_what_is_asked_of_the_last_steps_is_kept(asked, expected):
    config = RunConfig().replace(refine=asked)
    found = settle(config, {"transfer": Transfer().as_dict()}).refine
    assert {name: getattr(found, name) for name in expected} == expected


def test_donors_that_are_tried_are_spread_over_the_order(slides):
    many = [replace(slides[0], name=f"s{i}") for i in range(5)]
    folds = transfer._folds(many, None, None, CPU)
    assert [[s.name for s in fold.test] for fold in folds] == [["s0"], ["s2"], ["s4"]]


def test_all_of_many_donors_are_left_out_in_three_turns(slides):
    names = [f"{donor}{i}" for donor in "abcd" for i in (1, 2)]
    many = [replace(slides[0], name=name) for name in names]
    folds = transfer._folds(many, None, None, CPU)
    left_out = [[s.name for s in fold.test] for fold in folds]
    assert left_out == [["a1", "b2", "d1"], ["a2", "c1", "d2"], ["b1", "c2"]]
    for fold, out in zip(folds, left_out, strict=True):
        assert [s.name for s in fold.train] == [name for name in names if name not in out]
        assert len({name[0] for name in out}) == fold.donors  # a sister of each is left in
    assert sum(fold.donors for fold in folds) == 8
