"""A slide in memory: its shapes, and slides of some of its cells."""

import numpy as np
import pytest
from scipy import sparse

from ipar_sparse.data.slide import Slide, slide_digest


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


def test_a_digest_tells_cells_and_positions_and_not_the_name():
    names = np.array(["x", "y"])
    pos = np.array([[0.0, 1.0], [2.0, 3.0]])

    def digest(name="a", names=names, pos=pos):
        return slide_digest(Slide(name, None, np.empty(0, str), names, pos=pos))

    assert digest() == digest(name="b") == digest(pos=pos.astype(np.float32))
    assert len({digest(), digest(names=names[::-1]), digest(pos=pos + 1)}) == 3
