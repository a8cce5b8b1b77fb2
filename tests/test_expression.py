"""Normalisation, gene matching and selection, and the encoder's input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from ipar_sparse.data.expression import (
    Expression,
    gene_weights,
    log_normalize,
    match_genes,
    median_total,
    morans_i,
    normalized_expression,
    select_genes,
)
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.slide import Slide
from ipar_sparse.errors import UserError


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
    with pytest.raises(UserError, match="^b: shares no gene with a; .*same kind of gene name"):
        match_genes([a, slide_of(ones, ["ENSG1", "ENSG2"], "b")])
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


def test_counts_are_scaled_to_the_target_and_genes_weighted_after_the_logarithm():
    counts = np.array([[1, 9], [5, 5], [0, 4]])
    weight = np.array([2.0, 0.5])
    e = Expression.from_slide(slide_of(counts), ["g0", "g1"], target_sum=20.0, weight=weight)
    plain = np.log1p(20.0 * counts / counts.sum(1, keepdims=True)) * weight
    np.testing.assert_allclose(e.rows(), plain - plain.mean(0), atol=1e-5)


def test_median_total_is_a_median_over_cells_then_over_slides():
    def slide(*totals, **more):
        return slide_of(np.array([[total, 0] for total in totals]), **more)

    assert median_total([slide(2, 4, 9), slide(0, 0, 7), slide(100, 300)]) == 7.0
    assert median_total([slide(2, 4), slide(0.5, 0.25, normalized=True)]) == 3.0
    assert median_total([slide(0.5, normalized=True), slide(0, 0)]) == 1e4


def test_morans_i_is_the_correlation_with_the_neighbours():
    rng = np.random.default_rng(0)
    values = rng.poisson(1.0, (60, 5)).astype(np.float32)
    values[:, 3] = np.repeat(np.arange(6), 10)  # the same in ten cells that are neighbours
    values[:, 4] = 2.0
    block = np.arange(60) // 10 * 10
    neighbors = np.array([[j for j in range(b, b + 10) if j != i] for i, b in enumerate(block)])
    found = morans_i(sparse.csr_matrix(values), neighbors)
    around = values.astype(np.float64)[neighbors].mean(1)
    for gene in range(4):
        x, y = values[:, gene].astype(np.float64), around[:, gene]
        assert found[gene] == pytest.approx(np.mean((x - x.mean()) * (y - y.mean())) / x.var())
    assert found[3] == pytest.approx(1.0) and found[4] == 0.0
    rows = np.arange(0, 60, 3)
    x, y = values[rows, 0].astype(np.float64), around[rows, 0]
    part = morans_i(sparse.csr_matrix(values), neighbors, rows)
    assert part[0] == pytest.approx(np.mean((x - x.mean()) * (y - y.mean())) / x.var())


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_gene_weights_even_out_the_variance(power):
    rng = np.random.default_rng(0)
    genes = [f"g{i}" for i in range(6)]
    slides = [Expression(rng.normal(0, [0.1, 0.5, 1, 2, 4, 0], (80, 6)), genes) for _ in range(2)]
    variance = np.mean([slide.rows().var(0, dtype=np.float64) for slide in slides], axis=0)
    weight = gene_weights(slides, power)
    assert (weight**2 * variance).mean() == pytest.approx(1.0, rel=1e-4)
    slope = np.diff(np.log(weight[1:5])) / np.diff(np.log(np.sqrt(variance[1:5])))
    np.testing.assert_allclose(slope, -power, atol=1e-3)
    assert np.isfinite(weight).all()
    morans = np.array([0.0, 0.04, 0.16, 0.64, 0.01, 0.0])
    spatial = gene_weights(slides, power, morans, 0.5) / weight
    np.testing.assert_allclose(spatial / spatial[4], [1, 2, 4, 8, 1, 1], rtol=1e-4)


def test_genes_that_never_vary_have_weight_one():
    flat = Expression(np.ones((5, 3)), ["a", "b", "c"])
    np.testing.assert_array_equal(gene_weights([flat], 0.5), np.ones(3))


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
