"""A model in a notebook: AnnData in, AnnData out, and the same as at the command line."""

import inspect

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import typer
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from small_run import SMALL
from test_house import _fresh

import ipar_sparse as ipar
from ipar_sparse import cli
from ipar_sparse.config import RunConfig
from ipar_sparse.data.readers import read_slides
from ipar_sparse.data.writers import to_anndata, write_slide
from ipar_sparse.errors import UserError
from ipar_sparse.pl.colors import label_palette
from ipar_sparse.pl.oklab import color_distances, to_oklab
from ipar_sparse.pl.style import CYCLE, FAINT

IPAR = ipar.IPAR


@pytest.fixture
def model(small_run):
    return IPAR.load(small_run, device="cpu")


@pytest.fixture
def cells(small_slides):
    """The slide that took part in no run."""
    return to_anndata(small_slides[3])


def settings(**more):
    values = dict(text.split("=") for text in SMALL if "[" not in text)
    values = {key: int(v) if v.isdigit() else v for key, v in values.items()}
    return values | {"encoder.hidden": [24], "train.epochs": 1} | more


@pytest.fixture(scope="module")
def trained(small_slides, tmp_path_factory):
    """A run on two objects in memory, validated on a third."""
    slides = [to_anndata(slide) for slide in small_slides[:3]]
    out = tmp_path_factory.mktemp("api") / "run"
    model = IPAR.train(
        slides[:2], val=slides[2], donors=["a", "b"], config=settings(), out=out, seed=4
    )
    return model


def test_options_of_the_commands_are_arguments_of_the_same_name_and_default():
    """But those of a process and its files: what `load`, AnnData and `config` do in a notebook."""
    commands = typer.main.get_command(cli.app).commands
    process = {"run", "device", "log_file", "profile", "quiet", "help"}
    elsewhere = {
        "train": {"overrides", "donor_key", "donor_map", "donor_pattern"},  # config, donors
        "predict": {"out", "obsm_only"},
        "embed": {"out", "overwrite"},
        "evaluate": set(),
    }
    for name, replaced in elsewhere.items():
        ours = inspect.signature(getattr(IPAR, name)).parameters
        for option in commands[name].params:
            if option.name in process | replaced:
                continue
            assert option.name in ours, f"{name} {option.name}"
            default = ours[option.name].default
            if default is not inspect.Parameter.empty:
                assert (option.default or None) == (default or None), f"{name} {option.name}"


def test_the_name_costs_nothing_until_it_is_used():
    code = (
        "import sys, ipar_sparse\n"
        "print({'IPAR', 'pl'} <= set(dir(ipar_sparse)))\n"
        "print(sorted({'torch', 'anndata', 'matplotlib'} & set(sys.modules)))"
    )
    assert _fresh(code).split("\n")[:2] == ["True", "[]"]


def test_training_takes_objects_in_memory(trained, small_slides):
    request = RunConfig.load_request(trained.run)
    assert (request.train.epochs, request.train.seed, request.graph.k) == (1, 4, 12)
    table = trained.info()
    assert "trained on    slide1, 140 cells\n              slide2, 140 cells" in repr(table)
    assert table["trained on"].split("\n") == ["slide1, 140 cells", "slide2, 140 cells"]
    assert table["validated on"] == "slide3, 140 cells"
    assert "slide1, slide2" in repr(trained)


def test_objects_train_to_what_their_files_train_to(trained, small_slides, tmp_path):
    names = ("slide1", "slide2", "slide3")
    files = [tmp_path / f"{name}.h5ad" for name in names]
    for slide, file in zip(small_slides, files, strict=False):
        write_slide(slide, file)
    (tmp_path / "c.yaml").write_text(
        "\n".join(f"{section}: {values}" for section, values in nested(settings()).items())
    )
    argv = ["train", *files[:2], "--val", files[2], "--config", tmp_path / "c.yaml", "--seed", "4"]
    assert cli.run_command([*map(str, argv), "--out", str(tmp_path / "run")]) == 0
    cells = to_anndata(small_slides[3])
    theirs = IPAR.load(tmp_path / "run", "cpu").predict(cells, copy=True)
    ours = IPAR.load(trained.run, "cpu").predict(cells, copy=True)
    np.testing.assert_array_equal(ours.obsm["X_ipar"], theirs.obsm["X_ipar"])
    assert ours.uns["ipar"]["config"] == theirs.uns["ipar"]["config"]


def test_a_run_in_memory_is_extended(trained, small_slides, tmp_path):
    out = tmp_path / "run"
    IPAR.load(trained.run, "cpu").save(out)
    slides = [to_anndata(slide) for slide in small_slides[:3]]
    longer = IPAR.train(slides, out=out, resume=True, config={"train.epochs": 2}, device="cpu")
    assert longer.config.train.epochs == 2 and trained.config.train.epochs == 1
    assert longer.info()["progress"] == "finished"
    with pytest.raises(UserError, match="none of the files holds"):
        IPAR.train(slides[:2], out=out, resume=True)
    with pytest.raises(UserError, match="train.lr cannot be changed"):
        IPAR.train(slides, out=out, resume=True, config={"train.lr": 0.1})
    with pytest.raises(UserError, match="no run to resume"):
        IPAR.train(slides, out=tmp_path / "other", resume=True)
    with pytest.raises(UserError, match="leave the others out"):
        IPAR.train(slides, out=out, resume=True, seed=3)


def nested(values):
    found = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        found.setdefault(section, {})[name] = value
    return found


def test_training_without_a_folder_tells_where_it_went(small_slides, caplog, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    slides = {name: to_anndata(slide) for name, slide in zip("ab", small_slides[:2], strict=True)}
    model = IPAR.train(slides, val=[], config=settings(), donors={"a": "x", "b": "y"}, device="cpu")
    assert model.run.is_relative_to(tmp_path)
    assert str(model.run) in caplog.text
    assert "a, 140 cells" in model.info()["trained on"]


@pytest.mark.parametrize(
    "change, word",
    [
        ({"config": {"train.epoch": 3}}, "train.epochs"),
        ({"donors": ["a"]}, "2 slides, but 1 donors"),
        ({"donors": {"slide1": "a"}}, "slide2"),
        ({"donors": "patient"}, "patient"),
        ({"device": "tpu"}, "tpu"),
        ({"config": RunConfig(), "preset": "v1-rbf"}, "preset"),
    ],
)
def test_wrong_arguments_are_refused_before_training(small_slides, tmp_path, change, word):
    slides = [to_anndata(slide) for slide in small_slides[:2]]
    named = {"config": settings(), **change}
    with pytest.raises(UserError, match=word):
        IPAR.train(slides, out=tmp_path / "run", **named)
    assert not (tmp_path / "run").exists()


def test_a_slide_cannot_validate_its_own_training(small_slides, tmp_path):
    slides = [to_anndata(slide) for slide in small_slides[:2]]
    with pytest.raises(UserError, match="mean nothing"):
        IPAR.train(slides, val=slides[0].copy(), config=settings(), out=tmp_path / "run")


def test_objects_pass_the_checks_of_files(model, cells, small_slides, tmp_path):
    bad = cells.copy()
    bad.X = bad.X.toarray()
    bad.X[3, 2] = -1
    bad.write_h5ad(tmp_path / "bad.h5ad")
    lines = []
    for source in (bad, tmp_path / "bad.h5ad"):
        with pytest.raises(UserError) as error:
            model.predict(source)
        lines.append(str(error.value).partition(": ")[2])
    assert lines[0] == lines[1] and "negative" in lines[0]
    del bad.obsm["spatial"]
    with pytest.raises(UserError, match=r'slide1: has no obsm\["spatial"\]'):
        IPAR.train([bad], config=settings(), out=tmp_path / "run")


def test_what_is_no_anndata_is_refused_in_one_line(model, cells, small_slides):
    table = cells.to_df()
    for given in (table, table.values, cells.X, [cells], None, 3):
        with pytest.raises(UserError, match="as AnnData, or as the path of a file"):
            model.predict(given)
    for given in ([table], table, table.values, 5):
        with pytest.raises(UserError, match="AnnData"):
            IPAR.train(given)
    with pytest.raises(UserError, match="AnnData"):
        IPAR.train([to_anndata(slide) for slide in small_slides[:2]], val=table)


@pytest.mark.parametrize("kind", ["csr", "csc", "dense", "view", "layer", "raw", "backed"])
def test_an_object_is_read_as_its_file_is(cells, tmp_path, kind):
    named = {}
    if kind in ("csc", "dense"):
        cells.X = cells.X.tocsc() if kind == "csc" else cells.X.toarray()
    if kind == "layer":
        cells.layers["mine"], cells.X, named = cells.X, None, {"layer": "mine"}
    if kind == "raw":
        cells.raw, named = cells.copy(), {"layer": "raw"}
        cells = cells[:, :10].copy()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    source = cells
    if kind == "backed":
        source = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    if kind == "view":
        source = cells[np.arange(cells.n_obs)]
    (one,), (other,) = (
        read_slides(given, name="cells", **named) for given in (source, tmp_path / "cells.h5ad")
    )
    assert (one.expression != other.expression).nnz == 0
    assert one.notes == other.notes and list(one.genes) == list(other.genes)
    np.testing.assert_array_equal(one.pos, other.pos)
    assert (one.path, one.obs.keys()) == (None, other.obs.keys())


def test_reading_leaves_the_object_as_it_is(model, cells):
    cells.X.data[:5] = 0  # explicit zeros, which a slide does not keep
    before = cells.copy()
    (slide,) = read_slides(cells)
    assert slide.expression.nnz == cells.X.nnz - 5
    placed = model.predict(cells, copy=True)
    np.testing.assert_array_equal(cells.X.data, before.X.data)
    assert "X_ipar" in placed.obsm and "X_ipar" not in cells.obsm and "ipar" not in cells.uns


def test_predictions_equal_those_of_the_command_line(model, small_run, cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    argv = ["predict", small_run, tmp_path / "cells.h5ad", "--out", tmp_path / "out.h5ad"]
    more = ["--noise-samples", "2", "--device", "cpu"]
    assert cli.run_command([*map(str, argv), *more]) == 0
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert model.predict(cells, noise_samples=2) is None
    for key in ("X_ipar", "X_ipar_embedding"):
        np.testing.assert_array_equal(cells.obsm[key], written.obsm[key])
    np.testing.assert_array_equal(cells.obs["ipar_uncertainty"], written.obs["ipar_uncertainty"])
    assert cells.uns["ipar"]["graphs"] == written.uns["ipar"]["graphs"]
    same = ("version", "run", "config")
    assert all(cells.uns["ipar"][key] == written.uns["ipar"][key] for key in same)
    cells.write_h5ad(tmp_path / "again.h5ad")  # what was added can be stored

    read = model.predict(tmp_path / "cells.h5ad", noise_samples=2)
    np.testing.assert_array_equal(read.obsm["X_ipar"], written.obsm["X_ipar"])
    assert "X_ipar" not in anndata.read_h5ad(tmp_path / "cells.h5ad").obsm


def test_a_prediction_writes_a_page_of_its_own(model, cells, tmp_path):
    gene = str(cells.var_names[0])
    model.predict(cells, report=tmp_path / "page", genes=[gene])
    assert f"Genes: {gene}, as asked for" in (tmp_path / "page" / "report.html").read_text()
    with pytest.raises(UserError, match="another report"):
        model.predict(cells, report=tmp_path / "page")
    with pytest.raises(UserError, match="no gene 'nix'"):
        model.evaluate(cells, genes=["nix"])


def test_an_earlier_uncertainty_does_not_outlive_its_prediction(model, cells):
    model.predict(cells, noise_samples=2)
    earlier = cells.obs["ipar_uncertainty"].to_numpy()
    assert np.isfinite(earlier).all()
    model.predict(cells)
    assert not np.allclose(cells.obs["ipar_uncertainty"], earlier)
    assert cells.obs["ipar_typicality"].between(0, 1).all()
    assert set(cells.uns["ipar"]["verdict"]) == set(cells.uns["ipar"]["graphs"])


def test_slides_of_one_object_are_placed_apart(model, small_slides):
    parts = {str(i): to_anndata(small_slides[i]) for i in (2, 3)}
    both = anndata.concat(parts, label="section", index_unique="-")
    model.predict(both, slide_key="section")
    alone = model.predict(parts["3"], copy=True)
    np.testing.assert_allclose(
        both.obsm["X_ipar"][both.obs["section"] == "3"], alone.obsm["X_ipar"], atol=1e-6
    )
    assert set(both.uns["ipar"]["graphs"]) == {"cells-2", "cells-3"}


def test_cells_are_embedded_without_being_placed(model, cells):
    model.embed(cells)
    placed = model.predict(cells, copy=True)
    np.testing.assert_array_equal(cells.obsm["X_ipar_embedding"], placed.obsm["X_ipar_embedding"])
    assert "X_ipar" not in cells.obsm


def test_predicting_a_slide_of_the_run_says_so(model, small_slides, cells, caplog):
    model.predict(to_anndata(small_slides[0]))
    assert "cells was trained on: its map says nothing about" in caplog.text
    caplog.clear()
    model.predict(to_anndata(small_slides[2]))
    assert "cells decided when training stopped" in caplog.text
    caplog.clear()
    model.predict(cells)
    assert "says nothing" not in caplog.text


def test_evaluation_is_a_small_table(model, cells, tmp_path):
    table = model.evaluate(cells, tmp_path / "report")
    assert isinstance(table, pd.DataFrame) and table.index[0] == "model"
    assert list(table) == ["distance_spearman", "neighbor_hit@15", "procrustes", "E_geo"]
    assert {"PCA", "ridge", "true coordinates"} <= set(table.index)
    assert table.loc["true coordinates", "distance_spearman"] == pytest.approx(1)
    assert table.loc["model", "distance_spearman"] < 1
    assert not {"without gate", "true neighbours"} & set(table.index)  # the report has them
    assert (tmp_path / "report" / "report.html").is_file()
    with pytest.raises(UserError, match="not empty"):
        model.evaluate(cells, tmp_path / "report")
    assert "PCA" not in model.evaluate(cells, baselines=False).index
    del cells.obsm["spatial"]
    with pytest.raises(UserError, match="spatial"):
        model.evaluate(cells)


def test_a_saved_model_places_cells_as_before(small_run, cells, tmp_path):
    model = IPAR.load(small_run, device="cpu")
    before = model.predict(cells, copy=True)
    model.save(tmp_path / "kept")
    assert model.run == tmp_path / "kept"
    after = IPAR.load(tmp_path / "kept", device="cpu").predict(cells, copy=True)
    np.testing.assert_array_equal(before.obsm["X_ipar"], after.obsm["X_ipar"])
    with pytest.raises(UserError, match="exists"):
        IPAR.load(small_run, "cpu").save(tmp_path / "kept")
    IPAR.load(small_run, "cpu").save(tmp_path / "kept", overwrite=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(UserError, match="not a run directory"):
        model.save(tmp_path / "thesis", overwrite=True)
    with pytest.raises(UserError, match="not a run directory"):
        IPAR.load(tmp_path / "thesis")


@pytest.fixture
def placed(cells):
    """Cells with a prediction that is the measured map, turned and mirrored."""
    cells = cells.copy()
    pos = cells.obsm["spatial"] - cells.obsm["spatial"].mean(0)
    cells.obsm["X_ipar"] = pos @ np.array([[0.0, 1.0], [1.0, 0.0]]) / 300
    cells.obs["kind"] = pd.Categorical(np.arange(cells.n_obs) % 3).rename_categories(list("xyz"))
    cells.obs["depth"] = np.arange(cells.n_obs, dtype=float)
    return cells


def drawn(ax):
    """Positions and colours of the cells on some axes."""
    (points,) = ax.collections
    points.update_scalarmappable()
    return np.asarray(points.get_offsets()), points.get_facecolors()[:, :3]


def legend_of(ax):
    legend = ax.get_legend()
    return {
        text.get_text(): to_hex(mark.get_color())
        for text, mark in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }


def test_labels_take_their_stored_colours_as_in_scanpy(placed):
    ax = ipar.pl.layout(placed, "kind", ax=Figure().subplots())
    assert list(legend_of(ax)) == ["x", "y", "z"]
    assert list(legend_of(ax).values()) == [color.lower() for color in CYCLE[:3]]
    placed.uns["kind_colors"] = ["#112233", "red", "#0000ff"]
    ax = ipar.pl.layout(placed, "kind", ax=Figure().subplots())
    assert legend_of(ax) == {"x": "#112233", "y": "#ff0000", "z": "#0000ff"}
    at, shown = drawn(ax)
    red = at[(shown == [1, 0, 0]).all(1)]
    expected = placed.obsm["X_ipar"][placed.obs["kind"] == "y"]
    np.testing.assert_allclose(np.sort(red, axis=0), np.sort(expected, axis=0))
    part = placed[placed.obs["kind"] != "x"].copy()  # a label that is not there has no entry
    part.uns["kind_colors"] = ["#ff0000", "#0000ff"]
    assert list(legend_of(ipar.pl.layout(part, "kind", ax=Figure().subplots()))) == ["y", "z"]


def test_every_key_of_a_list_has_its_map(placed):
    gene = placed.var_names[3]
    axes = ipar.pl.layout(placed, ["kind", "depth", gene], ax=Figure().subplots(1, 3))
    assert [ax.get_title() for ax in axes] == ["kind", "depth", gene]
    assert [ax.get_legend() is None for ax in axes] == [False, True, True]
    values = axes[2].collections[0].get_array()
    assert sorted(values) == sorted(placed.X[:, 3].toarray().ravel())
    for key, near in (("Kind", "kind"), (gene.swapcase(), gene)):
        with pytest.raises(UserError, match=f"no gene is called '{key}'; did you mean '{near}'"):
            ipar.pl.layout(placed, key)
    with pytest.raises(UserError, match="no layer is called 'raw'"):
        ipar.pl.layout(placed, gene, layer="raw")
    del placed.obsm["X_ipar"]
    with pytest.raises(UserError, match=r"call predict\(\) first"):
        ipar.pl.layout(placed)
    ipar.pl.layout(placed, "kind", basis="spatial", ax=Figure().subplots())


@pytest.mark.parametrize("labels", [list("aabbc"), pd.Series(list("aabbc"), dtype="category")])
def test_arrays_of_labels_are_drawn_too(labels):
    pos = np.arange(10.0).reshape(5, 2)
    ax = ipar.pl.layout(pos, labels, palette={"a": "k", "b": "w", "c": "b"}, ax=Figure().subplots())
    assert legend_of(ax) == {"a": "#000000", "b": "#ffffff", "c": "#0000ff"}
    ax = ipar.pl.layout(pos, [True, False, True, True, False], ax=Figure().subplots())
    assert list(legend_of(ax)) == ["False", "True"]
    with pytest.raises(ValueError, match="5 cells, but colours for 4"):
        ipar.pl.layout(pos, list("aabb"))


def test_cells_without_a_value_are_grey():
    pos = np.arange(8.0).reshape(4, 2)
    for color in ([0.0, np.nan, 1.0, 2.0], pd.Series(["a", None, "b", "b"], dtype="category")):
        at, shown = drawn(ipar.pl.layout(pos, color, ax=Figure().subplots()))
        missing = (at == pos[1]).all(1)
        assert to_hex(shown[missing][0]).upper() == FAINT
        assert not (shown[~missing] == shown[missing]).all(1).any()


def test_labels_stay_apart_for_colour_blind_readers():
    for count, least in ((1, 0), (7, 0.07), (12, 0.07), (24, 0.06), (40, 0.04)):
        palette = label_palette(count)
        distances = color_distances(palette, palette)
        np.fill_diagonal(distances, 1.0)
        assert len(palette) == count and distances.min() > least
    black, white = np.zeros((1, 3)), np.ones((1, 3))
    assert color_distances(black, white) == pytest.approx(1.0, abs=1e-3)
    red, green = np.array([[0.8, 0.0, 0.0]]), np.array([[0.37, 0.37, 0.0]])
    assert color_distances(red, green) < 0.5 * np.linalg.norm(to_oklab(red) - to_oklab(green))


def centred(pos):
    pos = pos - pos.mean(0)
    return pos / np.sqrt((pos**2).sum(1).mean())


def test_the_prediction_is_turned_to_match(placed):
    left, right = ipar.pl.compare(placed, "kind", axes=Figure().subplots(1, 2))
    true, pred = drawn(left)[0], drawn(right)[0]
    np.testing.assert_allclose(centred(pred), centred(true), atol=1e-6)
    assert (left.get_title(), right.get_title()) == ("Measured, kind", "Predicted, kind")
    assert left.get_legend() is None and right.get_legend() is not None
    axes = ipar.pl.compare(placed, ["kind", "depth"])
    assert axes.shape == (2, 2)
    plt.close(axes[0, 0].figure)
