"""Normalisation, gene matching and selection, and the encoder's input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from ipar_sparse.errors import UserError
from ipar_sparse.expression import (
    Expression,
    log_normalize,
    match_genes,
    normalized_expression,
    select_genes,
)
from ipar_sparse.simulate import simulate
from ipar_sparse.slide import Slide


def slide_of(counts, genes=None, name="a", normalized=False):
    counts = np.asarray(counts, dtype=np.float32)
    n, num_genes = counts.shape
    return Slide(
        name=name,
        expression=sparse.csr_matrix(counts),
        genes=np.array([f"g{i}" for i in range(num_genes)] if genes is None else genes, dtype=str),
        cell_names=np.array([f"c{i}" for i in range(n)]),
        normalized=normalized,
    )


def plain_log_normalize(counts, target=1e4):
    counts = np.asarray(counts, dtype=np.float64)
    total = counts.sum(axis=1, keepdims=True)
    return np.log1p(target * counts / np.where(total > 0, total, 1))


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 8),
    num_genes=st.integers(1, 6),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_log_normalize_is_the_plain_definition(n, num_genes, density, seed):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(3, (n, num_genes)) * (rng.random((n, num_genes)) < density)
    matrix = sparse.csr_matrix(counts)
    before = matrix.copy()
    out = log_normalize(matrix)
    assert out.dtype == np.float32 and out.nnz == matrix.nnz
    np.testing.assert_allclose(out.toarray(), plain_log_normalize(counts), rtol=1e-5)
    assert (matrix != before).nnz == 0


def test_match_genes_intersects_in_the_first_order():
    ones = np.ones((2, 3))
    a = slide_of(ones, ["x", "y", "z"], "a")
    b = slide_of(ones, ["z", "q", "x"], "b")
    assert match_genes([a, b]) == (["x", "z"], ["y"])
    assert match_genes([b, a]) == (["z", "x"], ["q"])
    assert match_genes([b], ["y", "x", "w"]) == (["y", "x", "w"], ["y", "w"])


def test_no_shared_genes_says_why():
    ones = np.ones((2, 2))
    a = slide_of(ones, ["Actb", "Gapdh"], "a")
    for genes, word in (
        (["ENSG1", "ENSG2"], "same kind of gene name"),
        (["ACTB", "TP53"], "letter case"),
        (["Actb.2", "Q.1"], "version suffix"),
    ):
        with pytest.raises(UserError, match=f"^b: shares no gene with a .*{word}"):
            match_genes([a, slide_of(ones, genes, "b")])
    with pytest.raises(UserError, match="trained model"):
        Expression.from_slide(a, ["q"])
    b, c = slide_of(ones, ["Actb", "q"], "b"), slide_of(ones, ["Gapdh", "q"], "c")
    with pytest.raises(UserError, match="no gene is present in all of a, b, c"):
        match_genes([a, b, c])


def test_expression_rows_are_centred_over_cells_that_have_counts():
    counts = np.array([[4, 0, 1], [0, 0, 0], [1, 2, 0], [0, 5, 5]])
    e = Expression.from_slide(slide_of(counts), ["g2", "missing", "g0"])
    plain = plain_log_normalize(counts)[:, [2, 0]]
    plain -= plain[[0, 2, 3]].mean(axis=0)
    plain[1] = 0
    rows = e.rows()
    assert rows.dtype == np.float32 and e.shape == (4, 3)
    np.testing.assert_allclose(rows[:, [0, 2]], plain, atol=1e-5)
    assert not rows[:, 1].any() and not rows[1].any()
    np.testing.assert_array_equal(e.rows(np.array([3, 0, 3])), rows[[3, 0, 3]])
    assert e.rows(np.array([], dtype=int)).shape == (0, 3)


def test_library_size_counts_all_genes_of_the_slide():
    counts = np.array([[1, 9], [5, 5]])
    out = normalized_expression(slide_of(counts), ["g0"]).toarray()
    np.testing.assert_allclose(out[:, 0], np.log1p([1000, 5000]), rtol=1e-6)


def test_log_normalised_input_is_used_as_it_is():
    values = np.array([[0.5, 1.5], [2.5, 0.0]])
    out = normalized_expression(slide_of(values, normalized=True), ["g1", "g0"])
    np.testing.assert_array_equal(out.toarray(), values[:, ::-1])


def test_expression_needs_expression():
    bare = Slide("bare", None, np.empty(0, str), np.array(["x"]), embedding=np.zeros((1, 2)))
    with pytest.raises(UserError, match="bare: has no expression"):
        Expression.from_slide(bare, ["g0"])
    with pytest.raises(ValueError, match="repeated"):
        normalized_expression(slide_of(np.ones((2, 2))), ["g0", "g0"])


@pytest.mark.parametrize("normalized", [False, True])
def test_selection_finds_the_variable_genes(normalized):
    rng = np.random.default_rng(0)
    n, num_genes, variable = 500, 200, 20
    rate = np.exp(rng.normal(1.5, 0.5, num_genes)) * np.ones((n, 1))
    chosen = rng.permutation(num_genes)[:variable]
    rate[:, chosen] *= np.exp(1.0 * rng.normal(size=(n, variable)))
    slides = [slide_of(rng.poisson(rate), name=name) for name in "ab"]
    if normalized:
        slides = [
            slide_of(log_normalize(s.expression).toarray(), name=s.name, normalized=True)
            for s in slides
        ]
    genes = list(slides[0].genes)
    found = select_genes(slides, genes, variable)
    assert len(found) == variable == len(set(found))
    assert len(set(found) & {f"g{i}" for i in chosen}) >= 18
    assert found == select_genes(slides[::-1], genes, variable)
    assert found[:5] == select_genes(slides, genes, 5)


def test_selection_ignores_constant_genes_and_small_sets():
    counts = np.zeros((30, 6))
    counts[:, 0] = 1
    counts[:, 1] = np.arange(30)
    s = slide_of(counts)
    assert set(select_genes([s], list(s.genes), 2)) == {"g0", "g1"}  # the others never vary
    levels = np.tile([[0.0, 1, 5], [2, 1, 0]], (4, 1))
    assert select_genes([slide_of(levels, normalized=True)], ["g0", "g1", "g2"], 3) == [
        "g2",
        "g0",
        "g1",
    ]
    assert sorted(select_genes([s], list(s.genes), 100)) == sorted(s.genes)
    assert select_genes([slide_of(np.zeros((3, 2)))], ["g0", "g1"], 1) == ["g0"]
    with pytest.raises(ValueError, match="n_top is 0"):
        select_genes([s], list(s.genes), 0)


def test_column_means_keep_their_digits_over_many_cells():
    n = 400_000
    matrix = sparse.csr_matrix(np.full((n, 1), 0.1, dtype=np.float32))
    assert abs(Expression(matrix, ["g"]).mean[0] - 0.1) < 1e-7


def test_selection_prefers_genes_that_know_the_place():
    slides = simulate("cortex", slides=2, spots=600, genes=400, seed=5)
    depth = [s.obs["tissue_y"] for s in slides]

    def relation(genes):
        x = normalized_expression(slides[0], genes).toarray()
        x = (x - x.mean(0)) / (x.std(0) + 1e-9)
        y = (depth[0] - depth[0].mean()) / depth[0].std()
        return np.abs(x.T @ y / len(y)).mean()

    ranked = select_genes(slides, list(slides[0].genes), 400)
    assert relation(ranked[:100]) > 2 * relation(ranked[-200:])


def test_smoothed_leaves_out_empty_cells():
    matrix = sparse.csr_matrix(np.array([[2.0, 0.0], [0.0, 4.0], [0.0, 0.0], [6.0, 2.0]]))
    plain = Expression(matrix, ["a", "b"], empty=np.array([False, False, True, False]))
    found = plain.smoothed(np.array([[1, 2], [0, 3], [0, 1], [2, 2]])).rows()
    x = plain.rows()
    expected = [(x[0] + x[1]) / 2, x[1] / 2 + (x[0] + x[3]) / 4, 0 * x[2], x[3]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
