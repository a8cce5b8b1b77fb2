"""What a run recognises in its input: kinds of values, names of genes, positions, names."""

import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from ipar_sparse.config.schema import DataConfig
from ipar_sparse.data.copies import identified
from ipar_sparse.data.gene_names import kind_of_names, rename_genes, stem
from ipar_sparse.data.input_profile import InputProfile, conform, profile_inputs
from ipar_sparse.data.names import safe_name, safe_names, unique_names
from ipar_sparse.data.notes import Warned
from ipar_sparse.data.positions import as_positions, flatness, stray_cells, stretch
from ipar_sparse.data.readers import read_files
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.slide import Slide
from ipar_sparse.data.spatial_order import neighbor_agreement, told_of_order
from ipar_sparse.data.values import recognize_values
from ipar_sparse.errors import UserError


def counts(cells=200, genes=60, seed=0):
    rng = np.random.default_rng(seed)
    rate = rng.gamma(1.0, 2.0, genes) * rng.gamma(4.0, 0.25, (cells, 1))
    return rng.poisson(rate).astype(np.float64)


def scaled(x, total):
    return x / x.sum(1, keepdims=True) * total


def corrected(x):
    return np.maximum(x - 0.1 * x.sum(1, keepdims=True) * x.sum(0) / x.sum(), 0)


KINDS = {
    "counts": (lambda x: x, "counts"),
    "truth values": (lambda x: x > 1, "counts"),
    "counts off by 1e-5": (lambda x: x * (1 + 1e-5), "counts"),
    "log1p": (lambda x: np.log1p(scaled(x, 1e4)), "log1p of counts scaled to 10,000 a cell"),
    "log1p to 1e6": (lambda x: np.log1p(scaled(x, 1e6)), "log1p of counts scaled to 1e+06 a cell"),
    "log2": (
        lambda x: np.log2(1 + scaled(x, 1e4)),
        "log2(1 + x) of counts scaled to 10,000 a cell",
    ),
    "log10": (
        lambda x: np.log10(1 + scaled(x, 1e4)),
        "log10(1 + x) of counts scaled to 10,000 a cell",
    ),
    "log1p of counts": (np.log1p, "log1p of counts"),
    "roots": (np.sqrt, "square roots of counts"),
    "roots, scaled": (
        lambda x: np.sqrt(scaled(x, 500)),
        "square roots of counts scaled to 500 a cell",
    ),
    "shares of a cell": (lambda x: scaled(x, 1), "counts scaled to 1 a cell"),
    "per million": (lambda x: scaled(x, 1e6), "counts scaled to 1e+06 a cell"),
    "a part of the genes": (
        lambda x: np.log1p(scaled(x, 1e4))[:, ::2],
        "log1p of counts scaled by a factor a cell",
    ),
    "three digits": (
        lambda x: np.round(np.log1p(scaled(x, 1e4)), 3),
        "log1p of counts scaled to 10,000 a cell",
    ),
    "corrected": (corrected, "values, by their size"),
    "corrected, then log1p": (
        lambda x: np.log1p(scaled(corrected(x), 1e4)),
        "log1p of counts scaled to 10,000 a cell",
    ),
    "a part of those": (
        lambda x: np.log1p(scaled(corrected(x), 1e4))[:, ::2],
        "log1p, by their size",
    ),
    "unit variance": (lambda x: (x - x.mean(0)) / x.std(0), "values below zero"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_values_is_recognised(name):
    change, expected = KINDS[name]
    found = recognize_values(sparse.csr_matrix(change(counts()).astype(np.float32)))
    words = re.sub(r"10,000\.\d+", "10,000", str(found))
    assert words == expected
    assert found.guessed == words.endswith("by their size")


def test_nothing_and_few_cells_are_counts():
    assert str(recognize_values(sparse.csr_matrix((3, 4), dtype=np.float32))) == "counts"
    few = recognize_values(sparse.csr_matrix(counts(3).astype(np.float32)))
    assert few.whole and few.scale == "counts"


def slide_of(x, genes=None, name="a", **more):
    matrix = sparse.csr_matrix(np.asarray(x, dtype=np.float32))
    n, count = matrix.shape
    genes = [f"Gene{i}" for i in range(count)] if genes is None else genes
    cells = np.array([f"c{i}" for i in range(n)])
    return Slide(name, matrix, np.array(genes, dtype=str), cells, **more)


ENSEMBL = [f"ENSG{i:011d}" for i in range(60)]


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        ([f"{name}.{i % 7}" for i, name in enumerate(ENSEMBL)], ENSEMBL),
        (ENSEMBL, [f"{name}.3" for name in ENSEMBL]),
        ([f"{name}.2" for name in ENSEMBL], [f"{name}.3" for name in ENSEMBL]),
        ([f"GRCh38_G{i}" for i in range(60)], [f"G{i}" for i in range(60)]),
        ([f"hg19_{name}" for name in ENSEMBL], ENSEMBL),
        ([f"HLA.{i}" for i in range(60)], [f"HLA-{i}" for i in range(60)]),
        ([f" G{i} " for i in range(60)], [f"G{i}" for i in range(60)]),
    ],
)
def test_names_of_one_gene_are_matched_in_any_order(own, wanted):
    order = np.random.default_rng(0).permutation(60)
    slide, said = rename_genes(slide_of(counts(9)[:, order], np.array(own)[order]), wanted, "b")
    assert list(slide.genes) == list(np.array(wanted)[order])
    assert len(said) == 1 and "60 gene names were matched to those of b" in said[0]


def test_a_name_that_may_mean_two_genes_is_left_alone():
    own = [*ENSEMBL[:40], "HLA.A", "HLA_A", *ENSEMBL[40:58]]
    slide, said = rename_genes(slide_of(counts(9), own), [*ENSEMBL[:58], "HLA-A"], "b")
    assert list(slide.genes) == own and not said
    both = [f"{name}.1" for name in ENSEMBL[:30]] + [f"{name}.2" for name in ENSEMBL[:30]]
    x = counts(9)
    summed, _ = rename_genes(slide_of(x, both), ENSEMBL[:30], "b")
    assert list(summed.genes) == ENSEMBL[:30]
    np.testing.assert_array_equal(summed.expression.toarray(), x[:, :30] + x[:, 30:])
    logs, _ = rename_genes(
        slide_of(x, [*ENSEMBL[:59], ENSEMBL[0] + ".2"], normalized=True), ENSEMBL, "b"
    )
    assert ENSEMBL[0] in logs.genes and len(logs.genes) == 60


def test_letter_case_is_never_undone_silently():
    upper = [f"GENE{i}" for i in range(60)]
    with pytest.raises(UserError, match="60 differ in letter case alone.*--ignore-case"):
        rename_genes(slide_of(counts(9)), upper, "b")
    slide, _ = rename_genes(slide_of(counts(9)), upper, "b", ignore_case=True)
    assert list(slide.genes) == upper


def test_too_few_shared_genes_are_refused_with_the_reason():
    def shared(count, genes=300):
        names = [f"Gene{i}" if i < count else f"x{i}" for i in range(genes)]
        wanted = [f"Gene{i}" for i in range(300)]
        return rename_genes(slide_of(counts(5, genes), names), wanted, "b")[1]

    assert shared(30) == [] and shared(12, genes=12) == []
    with pytest.raises(UserError, match="shares 29 genes with b .*too few"):
        shared(29)
    with pytest.raises(UserError, match="shares 19 genes"):
        shared(19, genes=40)
    with pytest.raises(UserError, match="put symbols in place of Ensembl ids into var_names"):
        rename_genes(slide_of(counts(5), ENSEMBL), [f"Gene{i}" for i in range(60)], "b")
    turned = Slide("a", None, np.array(["c1", "c2"]), np.array([f"Gene{i}" for i in range(300)]))
    with pytest.raises(UserError, match="cells are named as genes: give it transposed"):
        rename_genes(turned, [f"Gene{i}" for i in range(300)], "b")
    assert kind_of_names([f"{name}.4" for name in ENSEMBL]) == "Ensembl ids with version"
    assert stem("ENSG00000182378.14_PAR_Y") == "ENSG00000182378"


@pytest.fixture(scope="module")
def members():
    return simulate("cortex", slides=3, spots=150, genes=60, seed=2)


def told(slide):
    return " | ".join(slide.notes)


def as_logs(slide, total=1e4):
    x = slide.expression.toarray().astype(np.float64)
    x = np.log1p(x / np.maximum(x.sum(1, keepdims=True), 1) * total).astype(np.float32)
    matrix = sparse.csr_matrix(x)
    return replace(slide, expression=matrix, normalized=True, values=recognize_values(matrix))


def test_a_profile_survives_its_file_and_says_what_slides_hold(members):
    known, profile, missing = profile_inputs(members[:2], DataConfig(max_genes=40))
    assert InputProfile.from_dict(profile.as_dict()) == profile
    assert (profile.scaling, profile.values, len(profile.genes)) == ("total", "counts", 40)
    assert len(profile.shared) == 60 and not missing and len(known) == 2
    assert len(profile.mean) == len(profile.variance) == 40 and min(profile.variance) >= 0
    assert profile.extent == [float(np.ptp(s.pos, axis=0).max()) for s in members[:2]]


def test_totals_are_counted_over_the_genes_that_all_slides_share(members):
    probes = np.full((150, 1), 500.0)
    wide = members[1].with_genes(
        sparse.hstack([members[1].expression, probes]).tocsr().astype(np.float32),
        np.append(members[1].genes, "Blank-1"),
    )
    known, profile, _ = profile_inputs([members[0], wide], DataConfig())
    plain, same, _ = profile_inputs(members[:2], DataConfig())
    assert profile.total == same.total and profile.mean == pytest.approx(same.mean)
    placed = conform(wide, profile)
    np.testing.assert_array_equal(placed.totals, np.asarray(members[1].expression.sum(1)).ravel())


@pytest.mark.parametrize("total", [1e4, 1e6])
def test_slides_of_one_training_agree_in_their_values(members, total):
    known, profile, _ = profile_inputs([members[0], as_logs(members[1], total)], DataConfig())
    assert profile.scaling == "total" and not any(slide.normalized for slide in known)
    assert "logarithms turned back" in told(known[1])
    counted = np.asarray(members[0].expression.sum(1))
    assert profile.total == np.median(counted)  # and not the mean of that and 10,000
    _, plain, _ = profile_inputs(members[:2], DataConfig(target_sum=profile.total))
    np.testing.assert_allclose(profile.mean, plain.mean, rtol=1e-4)


def test_logarithms_alike_are_taken_as_they_are(members):
    logs = [as_logs(slide) for slide in members[:2]]
    known, profile, _ = profile_inputs(logs, DataConfig())
    assert (profile.scaling, profile.total, profile.exact) == ("logs", pytest.approx(1e4), True)
    assert all(a.expression is b.expression for a, b in zip(known, logs, strict=True))
    same = conform(as_logs(members[2]), profile)
    other, plain = conform(as_logs(members[2], 1e6), profile), conform(members[2], profile)
    for one in (other, plain):
        np.testing.assert_allclose(one.expression.toarray(), same.expression.toarray(), atol=2e-3)
    assert not any(isinstance(note, Warned) for note in [*other.notes, *plain.notes])


def test_what_cannot_be_undone_is_warned_of(members):
    _, profile, _ = profile_inputs(members[:2], DataConfig())
    x = members[2].expression.toarray()
    centred = slide_of(x - x.mean(0), members[2].genes, normalized=True)
    centred.values = recognize_values(centred.expression)
    warned = [note for note in conform(centred, profile).notes if isinstance(note, Warned)]
    assert len(warned) == 1 and "values below zero, those of the run counts" in warned[0]
    shuffled = replace(members[2], genes=np.random.default_rng(0).permutation(members[2].genes))
    assert "genes are not expressed as on the training slides" in told(conform(shuffled, profile))
    assert not any(isinstance(note, Warned) for note in conform(members[2], profile).notes)


def test_a_warning_gives_the_reason_that_holds(members):
    _, profile, _ = profile_inputs(members[:2], DataConfig())
    rng = np.random.default_rng(0)
    counts = members[2].expression.toarray().astype(int)
    shallow = slide_of(rng.binomial(counts, 0.02), members[2].genes)
    assert "its cells hold fewer counts of these genes" in told(conform(shallow, profile))
    rare = np.argsort(counts.sum(0))[:24]
    part = members[2].with_genes(members[2].expression[:, rare], members[2].genes[rare])
    assert "since cells are scaled over fewer genes" in told(conform(part, profile))
    half = [name.upper() if i % 2 else name for i, name in enumerate(members[2].genes)]
    mixed = replace(members[2], genes=np.array(half))
    assert "30 of them differ in letter case alone: pass" in told(conform(mixed, profile))


def test_a_training_slide_of_other_genes_is_told_of(members):
    genes = np.random.default_rng(0).permutation(members[1].genes)
    shuffled = replace(members[1], genes=genes)
    for slides, odd in (((members[0], shuffled), 1), ((shuffled, members[0], members[2]), 0)):
        known, _, _ = profile_inputs(slides, DataConfig())
        warned = [i for i, slide in enumerate(known) if "not expressed as" in told(slide)]
        assert warned == [odd]


def test_training_slides_of_other_donors_are_not_called_another_tissue(real_slides):
    files = [str(real_slides / "human_breast_st" / name) for name in ("A2.h5ad", "E1.h5ad")]
    known, _, _ = profile_inputs(read_files(files, DataConfig(), require_pos=True), DataConfig())
    assert not any("not expressed as" in told(slide) for slide in known)


def test_cells_without_information_are_flagged_and_move_no_other(members):
    _, profile, _ = profile_inputs(members[:2], DataConfig())
    x = np.vstack([members[2].expression.toarray(), np.zeros((3, 60))])
    slide = slide_of(np.hstack([x, np.ones((153, 1))]), [*members[2].genes, "other"])
    found = conform(slide, profile)
    assert list(np.flatnonzero(found.empty)) == [150, 151, 152]
    assert "3 cells have counts, but none in the genes of the run" in told(found)
    with pytest.raises(UserError, match="no cell has counts in the genes of the run"):
        conform(slide.take(np.arange(150, 153)), profile)


def test_positions_in_another_order_than_the_cells_are_told_of():
    slide = simulate("cortex", slides=1, spots=300, genes=60, seed=2)[0]
    order = np.random.default_rng(0).permutation(300)
    mixed = replace(slide, pos=slide.pos[order])
    assert neighbor_agreement(slide, slide.genes) > 8 > 4 > neighbor_agreement(mixed, slide.genes)
    assert "another order than the cells" in told(told_of_order(mixed, slide.genes, 1e4))
    assert told_of_order(slide, slide.genes, 1e4) is slide


def test_cells_that_occur_more_than_once_are_told_of(members):
    slide = members[0]
    assert not any("another cell holds" in note for note in identified(slide).notes)
    rows = np.concatenate([np.arange(slide.num_cells), np.arange(slide.num_cells // 4)])
    found = identified(replace(slide.take(rows), digest=None))
    told = [note for note in found.notes if "another cell holds" in note]
    assert len(told) == 1 and isinstance(told[0], Warned)
    assert told[0].startswith(f"{slide.num_cells // 4} of {len(rows)} cells")
    assert identified(replace(found, digest=None)).notes == found.notes


def test_positions_are_taken_from_the_columns_that_vary():
    cells = np.array([f"c{i}" for i in range(50)])
    xy = np.random.default_rng(0).random((50, 2))
    for column in range(3):
        pos, problem, said = as_positions(np.insert(xy, column, 4.0, axis=1), "spatial", cells)
        np.testing.assert_array_equal(pos, xy)
        assert problem is None and f"the constant one (number {column + 1})" in said[0]
    numbers = np.random.default_rng(1).permutation(50) + 7.0
    pos, _, said = as_positions(np.column_stack([numbers, xy]), "spatial", cells)
    np.testing.assert_array_equal(pos, xy)
    assert "the counting one (number 1)" in said[0]
    pos, _, _ = as_positions(xy.astype(object), "spatial", cells)
    np.testing.assert_array_equal(pos, xy)
    assert "expected 50 x 2 numbers" in as_positions(xy.astype(str), "spatial", cells)[1]
    assert flatness(xy) is None and flatness(xy * 1e-30 + 5e-30) is None
    assert flatness(xy * 0 + 1e6) == "one point"
    for line in (xy * [0, 1], np.column_stack([xy[:, 0], 2 * xy[:, 0] + 7])):
        assert flatness(line) == "one line"


def test_cells_that_stretch_the_tissue_are_found():
    xy = np.random.default_rng(0).random((300, 2))
    assert not stray_cells(xy).any()
    filled, far = xy + 50, xy.copy()
    filled[:15] = 0
    far[:3] = [[40, 2], [-9, 7], [1, 1e4]]
    assert list(np.flatnonzero(stray_cells(filled))) == list(range(15))
    assert list(np.flatnonzero(stray_cells(far))) == [0, 1, 2]
    assert stretch(filled, stray_cells(filled)) > 40
    inside = xy.copy()
    inside[:15] = 0.5  # filled in, within the tissue
    assert list(np.flatnonzero(stray_cells(inside))) == list(range(15))
    assert not stray_cells(np.round(xy * 5)).any()  # coarse positions


def test_names_that_are_made_up_are_unique():
    assert unique_names(["a", "b"]) == ["a", "b"]
    found = unique_names(["a", "a", "a-1", "A"])
    assert len({name.casefold() for name in found}) == 4 and found[2] == "a-1"
    assert safe_name("../../etc/passwd") == "_.._etc_passwd" and safe_name(" . ") == "slide"
    assert safe_name("Präparat 7 (links)") == "Präparat 7 (links)"
    odd = ["a/b", "a:b", "a\nb", "", "x" * 300, "<script>", "con\0"]
    made = safe_names(odd)
    assert len({name.casefold() for name in made}) == len(odd)
    assert not any(set(name) & set("/\\:\n\0<>") or len(name) > 110 for name in made)
