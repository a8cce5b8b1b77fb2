"""A slide in memory: its shapes, and slides of some of its cells."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from ipar_sparse.data.copies import (
    find_copies,
    overlap,
    sketch,
    slide_digest,
    telling_cells,
)
from ipar_sparse.data.slide import Slide


def test_slide_checks_its_shapes():
    with pytest.raises(ValueError, match=r"pos has shape \(2, 3\), expected \(2, 2\)"):
        Slide("a", None, np.empty(0, str), np.array(["x", "y"]), pos=np.zeros((2, 3)))
    matrix = sparse.csr_matrix([[0, 1.0], [0, 0]])
    slide = Slide("a", matrix, np.array(["g", "h"]), np.array(["x", "y"]))
    assert list(slide.empty) == [False, True] and list(slide.rows) == [0, 1]
    assert repr(slide) == "Slide('a', 2 cells, 2 genes (counts), without positions)"


def test_cells_taken_from_a_slide_keep_all_their_data():
    matrix = sparse.csr_matrix([[0, 1.0], [0, 0], [2, 0]])
    slide = Slide(
        "a",
        matrix,
        np.array(["g", "h"]),
        np.array(["x", "y", "z"]),
        pos=np.eye(3)[:, :2],
        obs={"layer": np.array([4, 5, 6])},
    )
    part = slide.take(np.array([2, 1]))
    assert list(part.cell_names) == ["z", "y"] and list(part.rows) == [2, 1]
    assert part.expression.toarray().tolist() == [[2, 0], [0, 0]] and part.embedding is None
    assert part.pos.tolist() == [[0, 0], [0, 1]] and list(part.obs["layer"]) == [6, 5]
    assert list(part.empty) == [False, True] and slide.num_cells == 3


@pytest.fixture
def many():
    rng = np.random.default_rng(0)
    return Slide(
        "a",
        sparse.csr_matrix(rng.poisson(1.0, (60, 30)).astype(np.float32)),
        np.array([f"g{i}" for i in range(30)]),
        np.array([f"c{i}" for i in range(60)]),
        pos=rng.random((60, 2)),
    )


def test_a_digest_tells_what_cells_hold_and_not_their_names_or_order(many):
    order, genes = np.random.default_rng(1).permutation(60), np.arange(30)[::-1]
    same = replace(many.take(order), name="b", cell_names=many.cell_names)
    same = same.with_genes(same.expression[:, genes].tocsr(), same.genes[genes])
    other = replace(many, expression=many.expression * 2)
    assert slide_digest(many) == slide_digest(same)
    assert len({slide_digest(one) for one in (many, other, replace(many, pos=many.pos + 1))}) == 3
    assert slide_digest(many) != slide_digest(many.take(np.arange(59)))


def test_copies_are_found_by_most_of_their_cells(many):
    rng = np.random.default_rng(2)
    other = replace(many, expression=sparse.csr_matrix(rng.poisson(1.0, (60, 30)).astype("f4")))
    part = replace(many.take(np.arange(10, 60)[::-1]), pos=None)
    few = many.take(np.arange(20))
    few = replace(
        few,
        expression=sparse.vstack([few.expression, other.expression[:40]]).tocsr(),
        **{key: getattr(many, key) for key in ("cell_names", "pos", "empty", "rows")},
    )
    assert find_copies([many, other]) == [] and find_copies([many, few]) == []
    assert find_copies([other, many, part]) == [(1, 2)]
    assert overlap(sketch(many), telling_cells(part)) == pytest.approx(50 / 60, abs=0.02)
    assert overlap(sketch(many), telling_cells(other)) == 0


def test_copies_are_found_by_where_their_cells_lie():
    rng = np.random.default_rng(0)

    def measured(pos):
        x = sparse.csr_matrix(rng.poisson(1.0, (len(pos), 30)).astype(np.float32))
        names = np.arange(len(pos)).astype(str)
        return Slide("a", x, np.arange(30).astype(str), names, pos=np.asarray(pos, dtype=float))

    places = rng.random((200, 2)) * 1000
    first, again, apart = measured(places), measured(places[::-2]), measured(places + 0.5)
    assert find_copies([first, apart, again]) == [(0, 2)]
    grid = np.stack(np.meshgrid(np.arange(20), np.arange(15)), -1).reshape(-1, 2)
    assert find_copies([measured(grid), measured(grid)]) == []
