"""Which slides are held out, validated on and trained on, and whose slides they are."""

from dataclasses import replace

import numpy as np
import pytest

from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.splits import choose_validation, find_donors, plan_folds
from ipar_sparse.errors import UserError

DONORS = {"A1": "A", "A2": "A", "A3": "A", "B1": "B", "C1": "C", "C2": "C"}


@pytest.fixture(scope="module")
def slides():
    made = simulate("cortex", slides=2, spots=20, genes=50, seed=5)
    return [replace(slide, name=name) for slide, name in zip(made, ("A1", "B7"), strict=True)]


def test_each_slide_is_held_out_once():
    folds, notes = plan_folds(DONORS, "slide")
    assert [fold.test for fold in folds] == [(name,) for name in DONORS] and not notes
    for fold in folds:
        assert {*fold.test, *fold.train, fold.val} == set(DONORS)
        assert len(fold.train) == 4 and fold.val not in fold.train
        # the only slide of B is always trained on, and so are those of a held-out slide's donor
        assert fold.val != "B1" and DONORS[fold.val] not in {DONORS[name] for name in fold.test}
    assert {fold.val for fold in folds[3:]} == {"A1", "A2", "A3"}  # A has most
    assert {fold.val for fold in folds[:3]} == {"C1", "C2"}
    alone, _ = plan_folds(dict.fromkeys(DONORS, "A"), "slide")
    assert len({fold.val for fold in alone}) > 3


def test_a_donor_is_held_out_with_all_its_slides():
    folds, _ = plan_folds(DONORS, "donor")
    assert [fold.test for fold in folds] == [("A1", "A2", "A3"), ("B1",), ("C1", "C2")]
    for fold in folds:
        held = {DONORS[name] for name in fold.test}
        assert not held & {DONORS[name] for name in fold.seen}
    # three slides are too few to take one away from training, five are not
    assert [fold.val is None for fold in folds] == [True, False, False]
    named, _ = plan_folds(DONORS, "C, A2")
    assert [fold.test for fold in named] == [("C1", "C2"), ("A2",)]


def test_what_cannot_be_held_out_is_said():
    with pytest.raises(UserError, match="one donor"):
        plan_folds({"a": "x", "b": "x"}, "donor")
    with pytest.raises(UserError, match="D: no such slide or donor"):
        plan_folds(DONORS, "A1,D")
    with pytest.raises(UserError, match="leaves no slide"):
        plan_folds({"a": "x"}, "slide")
    with pytest.raises(UserError, match="b cannot be held out"):
        plan_folds({"b1": "b", "b2": "b"}, "b")
    folds, notes = plan_folds({"a": "x", "b": "y"}, "slide")
    assert [fold.train for fold in folds] == [("b",), ("a",)] and not notes


@pytest.mark.parametrize(
    ("donors", "chosen"),
    [
        ({"a": "a", "b": "b", "c": "c"}, None),
        ({"a": "a", "b": "b", "c": "c", "d": "d"}, "d"),
        (DONORS, "A3"),
        ({"a": "x", "b": "y", "c": "x", "d": "z"}, "c"),
    ],
)
def test_the_validation_slide_is_one_that_training_can_best_do_without(donors, chosen):
    assert choose_validation(donors) == chosen


def test_donors_are_found_by_name_column_or_file(slides, tmp_path):
    assert find_donors(slides) == {"A1": "A1", "B7": "B7"}
    assert find_donors(slides, pattern="^.") == {"A1": "A", "B7": "B"}
    assert find_donors(slides, pattern=r"\D(\d)") == {"A1": "1", "B7": "7"}
    table = tmp_path / "donors.yaml"
    table.write_text("A1: x\nB7: 3\n")
    assert find_donors(slides, table=table) == {"A1": "x", "B7": "3"}
    marked = [replace(slide, obs={"animal": np.full(20, 1)}) for slide in slides]
    assert find_donors(marked, key="animal") == {"A1": "1", "B7": "1"}
    for wrong in ({"key": "animal"}, {"pattern": "^C"}, {"pattern": "("}):
        with pytest.raises(UserError, match="animal|does not match|regular"):
            find_donors(slides, **wrong)
    mixed = [replace(slide, obs={"animal": np.arange(20)}) for slide in slides]
    with pytest.raises(UserError, match="20 donors on one slide"):
        find_donors(mixed, key="animal")
    table.write_text("A1: x\n")
    with pytest.raises(UserError, match="B7"):
        find_donors(slides, table=table)
    with pytest.raises(UserError, match="one of"):
        find_donors(slides, key="animal", pattern="^.")
