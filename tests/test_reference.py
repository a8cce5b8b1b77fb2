"""Positions in the frame and units of a training slide."""

import json
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from small_run import small_config

from ipar_sparse import IPAR, UserError, pl
from ipar_sparse.cli import run_command
from ipar_sparse.data.keys import Keys
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.writers import to_anndata, write_slide
from ipar_sparse.evaluation.scoring import score_slide
from ipar_sparse.geometry.alignment import align
from ipar_sparse.inference.checkpoint import save_checkpoint
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.inference.reference import find_reference
from ipar_sparse.inference.run_folder import BEST, read_meta
from ipar_sparse.report.carried import carrying_genes
from ipar_sparse.train.fit import fit

TURN = np.array([[0.6, 0.8], [0.8, -0.6]])  # a rotation with a reflection


def moved(slide, scale, centre):
    """A slide as another microscope shows it."""
    centred = slide.pos - slide.pos.mean(0)
    return replace(slide, pos=scale * centred @ TURN + centre, digest=None, signatures=None)


@pytest.fixture(scope="module")
def slides():
    """Three to train on, each in its own coordinates, and one of unseen cells."""
    one, two, three, unseen = simulate("cortex", slides=4, spots=300, genes=120)
    return [one, moved(two, 7.0, (5e5, -3e5)), moved(three, 0.01, (2.0, 3.0)), unseen]


@pytest.fixture(scope="module")
def run(slides, tmp_path_factory):
    out = tmp_path_factory.mktemp("frames") / "run"
    settings = ["encoder.steps=30", "train.epochs=1", "graph.k=30", "refine.steps=0"]
    fit(slides[:3], [], small_config(*settings), out)  # begins from principal components
    return out


def in_frame_of(slide, cells):
    """Where cells would lie on a slide, by the coordinates that simulated slides share."""
    tissue = [
        np.stack([one.obs["tissue_x"], one.obs["tissue_y"]], axis=1) for one in (slide, cells)
    ]
    return align(tissue[0], slide.pos)[1](tissue[1])


def test_unseen_cells_lie_where_they_are_in_coordinates_and_units_of_a_slide(run, slides):
    model, cells = IPAR.load(run), to_anndata(slides[3])
    for slide in slides[:3]:
        placed = model.predict(cells, copy=True, reference=to_anndata(slide), keep_foreign=True)
        radius = np.sqrt(np.square(slide.pos - slide.pos.mean(0)).sum(1).mean())
        error = np.linalg.norm(placed.obsm[Keys.REFERENCE] - in_frame_of(slide, slides[3]), axis=1)
        said = placed.uns["ipar"]["reference"]
        assert np.median(error) < 0.5 * radius and said["rms_radius"] == pytest.approx(radius)
        assert 0.5 < np.median(error) / said["median_error"] < 2.0
        assert said["median_error"] == pytest.approx(radius * said["relative_error"])
        stated = placed.obs[Keys.UNCERTAINTY_REFERENCE].to_numpy()
        assert 0.5 < np.sqrt(np.square(stated).mean() / np.square(error).mean()) < 2.0
        assert said["name"] == slide.name and "left out" in said["left_out"]


def test_scores_hold_the_error_in_the_frame_that_positions_were_measured_in(run, slides):
    first, measured = slides[0], replace(slides[3], pos=in_frame_of(slides[0], slides[3]))
    predictor, reference = Predictor.load(run), find_reference(run, first.name)
    found = score_slide(predictor, measured, baselines=False, reference=reference).methods["model"]
    placed = IPAR.load(run).predict(
        to_anndata(slides[3]), copy=True, reference=first.name, keep_foreign=True
    )
    error = np.median(np.linalg.norm(placed.obsm[Keys.REFERENCE] - measured.pos, axis=1))
    radius = np.sqrt(np.square(measured.pos - measured.pos.mean(0)).sum(1).mean())
    assert found["frame_error"] == pytest.approx(error, rel=1e-4)
    assert found["frame_error_radii"] == pytest.approx(error / radius, rel=1e-4)
    with pytest.raises(UserError, match="holds the cells of the reference"):
        score_slide(predictor, first, baselines=False, reference=reference)


def test_two_outputs_on_one_reference_can_be_overlaid(run, slides):
    """The layout of each half has a gauge of its own; in the frame, halves lie where they lie."""
    model, whole = IPAR.load(run), to_anndata(slides[3])
    halves = [whole[:150].copy(), whole[150:].copy()]
    placed = [
        model.predict(cells, copy=True, reference="cortex2", keep_foreign=True)
        for cells in (whole, *halves)
    ]
    apart = np.concatenate([half.obsm[Keys.REFERENCE] for half in placed[1:]])
    radius = placed[0].uns["ipar"]["reference"]["rms_radius"]
    distance = np.linalg.norm(apart - placed[0].obsm[Keys.REFERENCE], axis=1) / radius
    assert np.median(distance) < 0.1


def test_cells_that_do_not_belong_to_the_tissue_have_no_position_in_it(run, slides):
    cells, counts = to_anndata(slides[3]), slides[3].expression.toarray()
    counts[:30] = counts[:30, np.random.default_rng(0).permutation(counts.shape[1])]  # foreign
    counts[30:33] = 0
    cells.X = sparse.csr_matrix(counts)
    model = IPAR.load(run)
    placed = model.predict(cells, copy=True, reference="cortex1")
    foreign, p_value = placed.obs[Keys.FOREIGN].to_numpy(), placed.obs[Keys.TYPICALITY].to_numpy()
    empty = placed.obs[Keys.EMPTY].to_numpy()
    np.testing.assert_array_equal(foreign, p_value <= 0.05)
    assert foreign[:30].mean() > 0.5 > 0.2 > foreign[33:].mean() and empty.sum() == 3
    missing = np.isnan(placed.obsm[Keys.REFERENCE]).all(1)
    np.testing.assert_array_equal(missing, foreign | empty)
    np.testing.assert_array_equal(np.isnan(placed.obs[Keys.UNCERTAINTY_REFERENCE]), missing)
    assert placed.uns["ipar"]["reference"]["foreign_cells"] == foreign.sum()
    kept = model.predict(cells, copy=True, reference="cortex1", keep_foreign=True)
    np.testing.assert_array_equal(np.isnan(kept.obsm[Keys.REFERENCE]).all(1), empty)
    np.testing.assert_array_equal(kept.obs[Keys.FOREIGN], foreign)
    np.testing.assert_array_equal(kept.obsm[Keys.PREDICTION], placed.obsm[Keys.PREDICTION])

    model.predict(kept)  # without a reference, nothing of the earlier one is left
    assert Keys.REFERENCE not in kept.obsm and Keys.FOREIGN not in kept.obs
    assert "reference" not in kept.uns["ipar"]


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_the_command_writes_them_and_says_how_far_off_they_are(
    run, slides, tmp_path, capsys, suffix
):
    cells, out = tmp_path / f"cells{suffix}", tmp_path / f"placed{suffix}"
    write_slide(replace(slides[3], pos=None), cells)
    renamed = replace(slides[1], name="other", cell_names=slides[1].cell_names[::-1])
    write_slide(renamed, tmp_path / "other.h5ad")  # known by what it holds
    asked = ["predict", str(run), str(cells), "--reference", str(tmp_path / "other.h5ad")]
    assert run_command([*asked, "--out", str(out)]) == 0
    told = " ".join("".join(capsys.readouterr()).split())
    read = anndata.read_zarr if suffix == ".zarr" else anndata.read_h5ad
    placed = read(out)
    said = placed.uns["ipar"]["reference"]
    assert f"half of its cells lie within {said['median_error']:.4g} of their places" in told
    assert said["name"] == "cortex2" and f"obsm['{Keys.REFERENCE}']" in told
    again = IPAR.load(run).predict(to_anndata(slides[3]), copy=True, reference="cortex2")
    np.testing.assert_allclose(
        placed.obsm[Keys.REFERENCE], again.obsm[Keys.REFERENCE], rtol=1e-4, equal_nan=True
    )
    alone = tmp_path / f"alone{suffix}"
    assert run_command(["predict", str(run), str(out), "--out", str(alone), "--overwrite"]) == 0
    assert Keys.REFERENCE not in read(alone).obsm and Keys.FOREIGN not in read(alone).obs
    if suffix == ".h5ad":
        assert run_command([*asked, "--out", str(tmp_path / "placed.csv")]) == 0
        table = pd.read_csv(tmp_path / "placed.csv", index_col="cell")
        columns = table[["ipar_reference_1", "ipar_reference_2"]]
        np.testing.assert_allclose(columns, placed.obsm[Keys.REFERENCE], rtol=1e-6)


def test_info_tells_the_error_in_each_frame(run, capsys):
    frames = read_meta(run / BEST)["metadata"]["frames"]
    rows = IPAR.load(run).info()["frame errors"].split("\n")
    assert [row.partition(":")[0] for row in rows] == ["cortex1", "cortex2", "cortex3"]
    for row, frame in zip(rows, frames, strict=True):
        assert f"({frame['median_error']:.2f} of its radius)" in row


def test_what_is_no_reference_is_refused_in_one_line(run, slides, tmp_path, capsys):
    for slide in slides:
        write_slide(slide, tmp_path / f"{slide.name}.h5ad")
    write_slide(replace(slides[0], pos=None), tmp_path / "no_positions.h5ad")
    cells, frame = str(tmp_path / "cortex4.h5ad"), tmp_path / "cortex1.h5ad"
    write_slide(replace(slides[0], pos=None).take(np.arange(200)), tmp_path / "part.h5ad")
    out = tmp_path / "out"
    for given, reference, word in (
        ([cells], cells, "was not trained on it"),
        ([cells], "nowhere.h5ad", "no such file"),
        ([cells], tmp_path / "no_positions.h5ad", "measured positions"),
        ([frame], frame, "holds the cells of the reference cortex1"),
        ([tmp_path / "no_positions.h5ad"], "cortex1", "holds the cells of the reference"),
        ([cells, tmp_path / "part.h5ad"], "cortex1", "holds the cells of the reference"),
    ):
        target = out / "one.h5ad" if len(given) == 1 else out
        words = ["predict", str(run), *map(str, given), "--out", str(target)]
        assert run_command([*words, "--reference", str(reference)]) == 2, word
        told = capsys.readouterr().err.strip().split("\n")[-1]
        assert word in told and len(told) < 400
        assert not out.exists() or not any(out.iterdir())
    assert run_command(["predict", str(run), cells, "--out", str(out), "--keep-foreign"]) == 2
    with pytest.raises(UserError, match="was not trained on it"):
        IPAR.load(run).predict(to_anndata(slides[3]), reference=to_anndata(slides[3]))


def test_a_run_of_an_earlier_version_has_no_frames(run, slides, tmp_path):
    """It predicts as before."""
    model = IPAR.load(run)
    model.save(tmp_path / "old")
    meta = read_meta(tmp_path / "old" / BEST)
    for key in ("frames", "atlas_cells", "adapter"):
        meta["metadata"].pop(key)
    modules = {
        name: getattr(model.predictor, name)
        for name in ("encoder", "scaler", "gate", "model", "relevant_components", "typicality")
    }
    save_checkpoint(tmp_path / "old" / BEST, modules, meta)
    old, cells = IPAR.load(tmp_path / "old"), to_anndata(slides[3])
    with pytest.raises(UserError, match="of an earlier version"):
        old.predict(cells, reference="cortex1")
    found = old.predict(cells, copy=True).obsm[Keys.PREDICTION]
    np.testing.assert_array_equal(found, model.predict(cells, copy=True).obsm[Keys.PREDICTION])


def test_the_only_slide_of_a_run_on_an_embedding_is_a_reference(slides, tmp_path):
    """Its own cells are left out by quarters, which is said."""
    rng = np.random.default_rng(0)

    def embedded(slide):
        tissue = np.stack([slide.obs["tissue_x"], slide.obs["tissue_y"]], axis=1)
        h = np.hstack([tissue, 0.1 * rng.standard_normal((len(tissue), 4))]).astype(np.float32)
        return replace(slide, expression=None, genes=np.array([], str), embedding=h, digest=None)

    one, unseen = embedded(slides[1]), embedded(slides[3])
    config = small_config("data.embedding=obsm:X_embedding", "model.recycling=false")
    fit([one], [], config, tmp_path / "run")
    frame = read_meta(tmp_path / "run" / BEST)["metadata"]["frames"][0]
    assert "quarters" in frame["left_out"] and frame["median_error"] < 0.2
    model = IPAR.load(tmp_path / "run")
    placed = model.predict(to_anndata(unseen), copy=True, reference=one.name, keep_foreign=True)
    error = np.linalg.norm(placed.obsm[Keys.REFERENCE] - in_frame_of(slides[1], slides[3]), axis=1)
    assert np.median(error) < 0.3 * frame["radius"]


def test_errors_are_those_of_cross_validation_where_there_is_one(slides, tmp_path):
    small = [slide.take(np.arange(120)) for slide in slides[:3]]
    config = small_config("selection.mode=quick", "train.epochs=1", "model.recycling=false")
    fit(small, [], config, tmp_path, donors={"cortex1": "a", "cortex2": "a", "cortex3": "b"})
    kept = json.loads((tmp_path / "selection.json").read_text())["frame_errors"]
    frames = {one["name"]: one for one in read_meta(tmp_path / BEST)["metadata"]["frames"]}
    assert set(kept) <= set(frames) and "cortex3" in kept
    for name, (median, ratio) in kept.items():
        assert (frames[name]["median_error"], frames[name]["variance_ratio"]) == (median, ratio)
        assert "cross-validation" in frames[name]["left_out"] and 0 < median < 3


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_the_command_writes_the_most_probable_places(run, slides, tmp_path, suffix):
    cells, out = tmp_path / f"cells{suffix}", tmp_path / f"placed{suffix}"
    write_slide(replace(slides[3], pos=None), cells)
    asked = ["predict", str(run), str(cells), "--reference", "cortex2", "--top", "3"]
    assert run_command([*asked, "--keep-foreign", "--out", str(out)]) == 0
    placed = anndata.read_zarr(out) if suffix == ".zarr" else anndata.read_h5ad(out)
    places, weights = placed.obsm[Keys.TOP], placed.obsm[Keys.TOP_WEIGHT]
    assert places.shape == (300, 3, 2) and weights.shape == (300, 3)
    np.testing.assert_array_equal(np.isnan(places).any(2), weights == 0)
    assert (weights.sum(1) <= 1 + 1e-6).all() and (np.diff(weights, axis=1) <= 0).all()
    said, radius = placed.uns["ipar"]["top"], placed.uns["ipar"]["reference"]["rms_radius"]
    assert said["ambiguous_cells"] == (weights[:, 0] < said["ambiguous_below"]).sum()
    true = in_frame_of(slides[1], slides[3])
    error = np.linalg.norm(places - true[:, None], axis=2) / radius
    assert np.median(np.nanmin(error, axis=1)) < 0.9 * np.median(error[:, 0]) < 0.5
    apart = np.linalg.norm(places[:, 0] - placed.obsm[Keys.REFERENCE], axis=1) / radius
    sure = weights[:, 0] > np.quantile(weights[:, 0], 0.9)  # then the place is the position
    assert np.median(apart[sure]) < min(0.3, np.median(apart))


def test_without_a_reference_places_are_in_the_gauge_of_the_map(run, slides):
    placed = IPAR.load(run).predict(to_anndata(slides[3]), copy=True, top=1)
    pos, places = placed.obsm[Keys.PREDICTION], placed.obsm[Keys.TOP][:, 0]
    found = ~np.isnan(places).any(1)
    _, move = align(places[found], pos[found])
    assert placed.uns["ipar"]["top"]["frame"] == Keys.PREDICTION
    assert not move.reflects and move.rotation[0, 0] > 0.9 and Keys.REFERENCE not in placed.obsm


@pytest.mark.parametrize("top", ["0", "11", "-1"])
def test_a_number_of_places_that_makes_no_sense_is_refused(run, slides, tmp_path, capsys, top):
    write_slide(slides[3], tmp_path / "cells.h5ad")
    asked = ["predict", str(run), str(tmp_path / "cells.h5ad"), "--out", str(tmp_path / "o.h5ad")]
    assert run_command([*asked, "--top", top]) == 2
    assert "1 to 10 places" in capsys.readouterr().err and not (tmp_path / "o.h5ad").exists()


def test_genes_carried_the_placement_that_cells_express_where_the_reference_does():
    """Three genes have a pattern on the reference; cells follow the first and third of them."""
    rng = np.random.default_rng(0)
    spots, pos = rng.random((400, 2)), rng.random((300, 2))

    def noise(where):
        return rng.normal(size=len(where))

    wave, rise = np.sin(6 * spots[:, 0]), spots[:, 1]
    known = np.stack([wave, rise, 4 * rise, noise(spots)], axis=1)
    wave, rise = np.sin(6 * pos[:, 0]), pos[:, 1]
    own = np.stack([wave, noise(pos), rise + 0.3 * noise(pos), noise(pos)], axis=1)
    found = carrying_genes(
        sparse.csr_matrix(own), pos, sparse.csr_matrix(known), spots, ["a", "lost", "c", "noise"]
    )
    assert list(found.genes) == ["a", "c"] and list(found.lost) == ["lost"]
    assert found.genes["a"] > 0.95 > found.genes["c"] > 0.4 and abs(found.lost["lost"]) < 0.1
    assert "carried the placement: a (" in found.sentence()
    shuffled = rng.permutation(pos)
    nothing = carrying_genes(
        sparse.csr_matrix(own), shuffled, sparse.csr_matrix(known), spots, ["a", "b", "c", "noise"]
    )
    assert not nothing.genes and "do not rely on the places" in nothing.sentence()


def test_the_page_shows_the_cells_over_the_reference_and_beside_it(run, slides, tmp_path):
    cells, reference, page = (tmp_path / name for name in ("c.h5ad", "r.h5ad", "page"))
    write_slide(replace(slides[3], pos=None), cells)
    write_slide(slides[1], reference)
    asked = ["predict", str(run), str(cells), "--out", str(tmp_path / "o.h5ad")]
    gene = str(slides[3].genes[5])
    framed = [*asked, "--reference", str(reference), "--report", str(page), "--genes", gene]
    assert run_command(framed) == 0
    html = (page / "report.html").read_text()
    said = anndata.read_h5ad(tmp_path / "o.h5ad").uns["ipar"]["reference"]
    assert "On cortex2" in html and f"lie within {said['median_error']:.4g}" in html
    assert f"Expression of {gene} on the reference" in html
    assert len(list((page / "figures").glob("frame*.png"))) == 5
    named = html.split("These genes carried the placement: ")[1].split(" (")[0]
    assert named in slides[3].genes
    other = IPAR.load(run).predict(
        to_anndata(slides[3]), copy=True, reference="cortex1", report=tmp_path / "other"
    )
    html = (tmp_path / "other" / "report.html").read_text()
    assert "Give the file of the reference" in html and other is not None


def test_a_map_leaves_out_cells_without_a_position(run, slides):
    placed = IPAR.load(run).predict(to_anndata(slides[3]), copy=True, reference="cortex1")
    found = ~placed.obs[Keys.FOREIGN].to_numpy()
    assert 0 < found.sum() < len(found)
    values = np.arange(300.0)
    for color in ("layer", ["layer", Keys.UNCERTAINTY], values):
        axes = pl.layout(placed, color, basis="ipar_reference")
        for ax in np.atleast_1d(axes):
            assert len(ax.collections[0].get_offsets()) == found.sum()
    np.testing.assert_array_equal(np.sort(ax.collections[0].get_array()), values[found])
