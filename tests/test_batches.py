"""What a training step sees: minisets, merged minisets, true neighbours, drawn candidates."""

import math

import pytest
import torch
from small_run import small_config

from benchmarks.dense import dense_mask
from ipar_sparse.errors import UserError
from ipar_sparse.geometry.gauge import gauge_fix, principal_plane
from ipar_sparse.supervision.losses import gate_loss, rw_kl_loss
from ipar_sparse.supervision.targets import gate_target
from ipar_sparse.train.batches import (
    Batches,
    EmbeddedSlide,
    MinisetPool,
    build_batch,
    collate,
    sample_minisets,
    subsample_edges,
)


def embedded(slide, rows=None, seed=0):
    """A slide with a random embedding of width 16; the first of its cells, if told how many."""
    pos = torch.from_numpy(slide.pos[:rows])
    h = torch.randn(len(pos), 16, generator=torch.Generator().manual_seed(seed))
    return EmbeddedSlide(slide.name, h, pos)


def batch_of(slides, *overrides, **options):
    config = small_config(*overrides)
    return build_batch(embedded(slides[0]), config, 0, **options), config


def sums_to_one_or_nothing(batch):
    rows = batch.graph.to_table(batch.gate_target).sum(1)
    return bool(((rows - 1).abs() < 1e-5).logical_or(rows == 0).all())


@pytest.fixture
def pool(small_slides):
    config = small_config()
    return MinisetPool([embedded(slide) for slide in small_slides[:2]], 6, config, seed=0)


def test_minisets_are_balanced_random_subsets(pool):
    settings = pool.config.train
    assert [which for which, _ in pool.sets] == [0, 1] * 3
    for _, rows in pool.sets:
        assert settings.miniset_min <= len(rows) <= settings.miniset_max
        assert len(rows.unique()) == len(rows)
    assert not torch.equal(pool.sets[0][1][:40], pool.sets[2][1][:40])


def test_minisets_are_built_once_as_long_as_there_is_room(pool, small_slides):
    assert pool[0] is pool[0]
    slides = [embedded(slide) for slide in small_slides[:2]]
    tight = MinisetPool(slides, 6, pool.config, seed=0, keep_cells=len(pool[0].h))
    assert tight[0] is tight[0] and tight[1] is not tight[1]
    assert torch.equal(tight[1].h, pool[1].h)
    assert torch.equal(tight[1].graph.index, pool[1].graph.index)


def test_a_slide_smaller_than_the_largest_miniset_gives_all_its_cells_at_most(small_slides):
    settings = small_config("train.miniset_min=140", "train.miniset_max=200").train
    (_, rows), *_ = sample_minisets([embedded(small_slides[0])], 3, settings, 0)
    assert torch.equal(rows, torch.arange(140))
    settings = small_config("train.miniset_min=141", "train.miniset_max=200").train
    with pytest.raises(UserError, match=f"{small_slides[0].name} has 140 cells"):
        sample_minisets([embedded(small_slides[0])], 3, settings, 0)


def test_merged_minisets_have_the_losses_of_each(pool):
    parts = [pool[0], pool[1]]
    whole = collate(parts)
    generator = torch.Generator().manual_seed(0)
    pos = torch.randn(len(whole.h), 2, generator=generator, dtype=torch.float64)
    logits = torch.randn(whole.graph.num_edges, generator=generator)
    sizes = [len(p.h) for p in parts]
    each = [rw_kl_loss(x, p.target.walk) for x, p in zip(pos.split(sizes), parts, strict=True)]
    expected = sum(v * n for v, n in zip(each, sizes, strict=True)) / sum(sizes)
    torch.testing.assert_close(rw_kl_loss(pos, whole.target.walk), expected)
    edges = [p.graph.num_edges for p in parts]
    each = [
        gate_loss(x, p.graph, probability=p.gate_target)
        for x, p in zip(logits.split(edges), parts, strict=True)
    ]
    found = gate_loss(logits, whole.graph, probability=whole.gate_target)
    rows = [(p.graph.to_table(p.gate_target) > 0).any(1).sum() for p in parts]
    expected = sum(v * n for v, n in zip(each, rows, strict=True)) / sum(rows)
    torch.testing.assert_close(found, expected)


def test_initial_layouts_follow_their_cells_into_minisets_and_batches(small_slides):
    slide = embedded(small_slides[0])
    slide.initial = slide.h[:, :2] * 3
    pool = MinisetPool([slide], 2, small_config("model.init=atlas"), seed=0)
    whole = collate([pool[0], pool[1]])
    torch.testing.assert_close(whole.initial, whole.h[:, :2] * 3)
    assert collate([pool[0]]) is pool[0]
    own = MinisetPool([slide], 2, small_config("model.init=pca"), seed=0)[0]
    torch.testing.assert_close(own.initial, gauge_fix(principal_plane(own.h)))


def test_every_epoch_sees_each_miniset_once_in_a_new_order(small_slides):
    slides = [embedded(slide) for slide in small_slides[:2]]
    batches = Batches(slides, [], small_config(), torch.device("cpu"))
    epochs = [
        [batches.at("model", step).alone.h for step in range(4 * e, 4 * e + 4)] for e in range(3)
    ]
    orders = [tuple(float(h[0, 0]) for h in epoch) for epoch in epochs]
    assert len({frozenset(order) for order in orders}) == 1 and len(set(orders)) > 1
    assert torch.equal(batches.at("model", 1).alone.h, epochs[0][1])
    assert not batches.val


def test_slides_come_in_turn_and_mixed_batches_alternate(small_slides):
    slides = [embedded(slide) for slide in small_slides[:2]]
    whole = Batches(slides, slides[:1], small_config("train.batch_kind=slide"), torch.device("cpu"))
    assert all(torch.equal(whole.at("model", i).alone.h, slides[i % 2].h) for i in range(4))
    assert whole.val[0].whole and len(whole.val[0].h) == 140
    two = small_config("train.batch_kind=slide", "train.slides_per_step=2")
    share = Batches(slides, [], two, torch.device("cpu")).at("model", 0)
    assert [len(piece.h) for piece in share.pieces] == [140, 140] and share.alone is None
    mixed = Batches(slides, [], small_config("train.batch_kind=mixed"), torch.device("cpu"))
    assert [mixed.at("model", step).alone.whole for step in range(4)] == [False, True, False, True]


def test_an_oracle_attends_on_the_true_neighbours(small_slides):
    overrides = ["model.beta=0", "train.attention_graph=target"]
    batch, _ = batch_of(small_slides, *overrides, oracle=True)
    distance = torch.cdist(*[torch.from_numpy(small_slides[0].pos)] * 2).fill_diagonal_(math.inf)
    nearest = distance.topk(batch.graph.k, largest=False).values[:, -1:]
    held = distance.gather(1, batch.graph.index.long())
    assert batch.graph.k > 10 and bool((held <= nearest + 1e-9).all())


def test_the_target_of_the_gate_mixes_walks_as_stated(small_slides):
    found = {}
    for weights in ("[1]", "[0, 1]", "[0.25, 0.75]"):
        batch, _ = batch_of(small_slides, f"train.gate_target_weights={weights}")
        found[weights] = batch.gate_target
        assert sums_to_one_or_nothing(batch)
    one, two = (gate_target(batch.graph, batch.target.walk, step).float() for step in (1, 2))
    torch.testing.assert_close(found["[1]"], one)
    torch.testing.assert_close(found["[0, 1]"], two)
    both = (batch.graph.to_table(one).sum(1) > 0)[batch.graph.edge_index[1]]
    mixed = 0.25 * one + 0.75 * two
    torch.testing.assert_close(found["[0.25, 0.75]"][both], mixed[both])
    assert not torch.allclose(one, two)


def test_a_step_keeps_the_nearest_candidates_in_the_range_asked_for(small_slides):
    batch, config = batch_of(small_slides, "graph.k=40", "train.k_fraction_range=[0.12, 0.18]")
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(60):
        drawn = subsample_edges(batch, config.train, generator)
        assert torch.equal(drawn.graph.index, batch.graph.index[:, : drawn.graph.k])
        seen.add(drawn.graph.k)
    assert min(seen) == round(0.12 * 140) and max(seen) == round(0.18 * 140)
    assert sums_to_one_or_nothing(drawn)


def test_a_step_on_mutual_candidates_keeps_the_nearest_of_every_cell(small_slides):
    batch, config = batch_of(small_slides, "graph.k=40", "train.mutual_prob=0.999")
    drawn = subsample_edges(batch, config.train, torch.Generator().manual_seed(0))
    mask = dense_mask(batch.graph)
    expected = mask & mask.T
    expected[torch.arange(140), batch.graph.index[:, 0].long()] = True
    assert torch.equal(dense_mask(drawn.graph), expected)
    assert drawn.graph.padded and drawn.graph.num_edges == int(expected.sum())
    assert sums_to_one_or_nothing(drawn)
    all_of_them = small_config().train
    assert subsample_edges(batch, all_of_them, torch.Generator()) is batch


def test_drawn_candidates_of_a_batch_follow_the_size_of_each_graph(small_slides):
    config = small_config("graph.k=20", "train.k_fraction_range=[0.2, 0.2001]")
    parts = [build_batch(embedded(small_slides[0], rows), config, 0) for rows in (30, 80)]
    drawn = subsample_edges(collate(parts), config.train, torch.Generator().manual_seed(0))
    degree = (drawn.graph.index >= 0).sum(1)
    assert degree[:30].unique().tolist() == [6]
    assert degree[30:].unique().tolist() == [16]
