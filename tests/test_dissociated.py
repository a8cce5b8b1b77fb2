"""Cells of another assay: a run is trained on the genes that they have."""

import json
from dataclasses import replace

import anndata
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_run import SMALL, small_config, stop_after

import ipar_sparse as ipar
from ipar_sparse.cli import run_command
from ipar_sparse.config import DataConfig
from ipar_sparse.data.dissociated import record_cells
from ipar_sparse.data.input_profile import conform, profile_inputs
from ipar_sparse.data.notes import Warned
from ipar_sparse.data.writers import to_anndata, write_slide
from ipar_sparse.errors import UserError
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.inference.run_folder import BEST, LAST, read_meta
from ipar_sparse.inference.summary import summarize_run
from ipar_sparse.train.fit import fit


def panel(slide, genes, name="cells"):
    """Cells of a slide with some of its genes, and without positions."""
    keep = np.flatnonzero(np.isin(slide.genes, genes))
    cells = slide.with_genes(slide.expression[:, keep], slide.genes[keep])
    return replace(cells, name=name, pos=None, empty=np.diff(cells.expression.indptr) == 0)


def same_tensors(a, b):
    ours, theirs = load_file(a), load_file(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


def with_versions(slide, digits=".7"):
    """The cells with genes under other versions, as another annotation names them."""
    return replace(slide, genes=np.array([f"{gene}{digits}" for gene in slide.genes]))


@pytest.fixture(scope="module")
def other(small_slides):
    """Two panels of the slide that no run takes: genes 1 to 50, and 21 to 80."""
    genes = small_slides[3].genes
    return panel(small_slides[3], genes[:50], "one"), panel(small_slides[3], genes[20:], "two")


@pytest.fixture(scope="module")
def run(small_slides, other, tmp_path_factory):
    out = tmp_path_factory.mktemp("cells") / "run"
    fit(small_slides[:2], small_slides[2:3], small_config(), out, cells=other)
    return out


def test_genes_are_chosen_among_those_that_all_cells_have(small_slides, other, run):
    genes = set(read_meta(run / BEST)["genes"])
    assert genes == set(small_slides[0].genes[20:50])
    recorded = json.loads((run / "inputs.json").read_text())
    assert [(one["name"], one["genes"]) for one in recorded["cells"]] == [("one", 50), ("two", 60)]
    assert set(recorded["cell_genes"]) == set(recorded["profile"]["shared"]) == genes
    placed = Predictor.load(run).conform(panel(small_slides[3], small_slides[3].genes))
    assert not any("lacks" in note for note in placed.notes)
    # totals are counted over the genes that serve
    columns = np.isin(small_slides[3].genes, list(genes))
    np.testing.assert_array_equal(
        placed.totals, np.asarray(small_slides[3].expression[:, columns].sum(1)).ravel()
    )
    assert summarize_run(run)["trained for"].splitlines()[0] == "one, 140 cells, 50 shared genes"


def test_positions_of_the_cells_change_nothing(small_slides, other, run, tmp_path):
    somewhere = replace(other[0], pos=np.random.default_rng(0).normal(size=(140, 2)))
    fit(small_slides[:2], small_slides[2:3], small_config(), tmp_path, cells=[somewhere, other[1]])
    assert same_tensors(tmp_path / BEST, run / BEST)
    assert (tmp_path / "inputs.json").read_bytes() == (run / "inputs.json").read_bytes()


def test_a_stopped_run_goes_on_with_the_genes_of_its_cells(
    small_slides, other, run, tmp_path, monkeypatch
):
    event = stop_after(monkeypatch, "model", 5)
    with pytest.raises(KeyboardInterrupt):
        fit(small_slides[:2], small_slides[2:3], small_config(), tmp_path, cells=other, stop=event)
    assert (tmp_path / LAST).is_file()
    fit(small_slides[:2], small_slides[2:3], out=tmp_path, resume=True)
    assert same_tensors(tmp_path / BEST, run / BEST)


def test_names_of_the_cells_genes_are_matched_as_in_prediction(small_slides):
    ensembl = np.array([f"ENSG{i:011d}" for i in range(80)])
    slide = replace(small_slides[0], genes=ensembl)
    cells = with_versions(panel(replace(small_slides[3], genes=ensembl), ensembl[:30]))
    assert record_cells([slide], [cells], DataConfig())["cell_genes"] == list(ensembl[:30])
    lower = replace(cells, genes=np.array([name[:15].lower() for name in cells.genes]))
    with pytest.raises(UserError, match="30 differ in letter case alone.*--ignore-case"):
        record_cells([slide], [lower], DataConfig())
    found = record_cells([slide], [lower], DataConfig(ignore_case=True))
    assert found["cell_genes"] == list(ensembl[:30])


def test_cells_that_cannot_be_trained_for_are_refused(small_slides, other, tmp_path):
    train, few = small_slides[:2], panel(small_slides[3], small_slides[3].genes[:19])
    others = np.array([f"Other{i}" for i in range(61)])
    few = replace(few.with_genes(few.expression, few.genes), name="few")
    wide = np.concatenate([few.expression.toarray(), np.ones((140, 61))], axis=1)
    few = few.with_genes(
        type(few.expression)(wide.astype(np.float32)), np.append(few.genes, others)
    )
    apart = [
        panel(small_slides[3], small_slides[3].genes[part]) for part in (slice(45), slice(30, 80))
    ]
    refused = [
        ([few], small_config(), "few: shares 19 genes with the training slides"),
        (apart, small_config(), "15 genes"),
        ([replace(train[1], pos=None)], small_config(), "are those of the training slide cortex2"),
        (other, small_config("data.embedding=obsm:X"), "leave out --cells or --embedding"),
    ]
    for cells, config, words in refused:
        with pytest.raises(UserError, match=words) as error:
            fit(train, [], config, tmp_path / "run", cells=cells)
        assert "\n" not in str(error.value)


def test_a_run_says_what_cells_lost_and_how_to_train_for_them(small_slides):
    _, profile, _ = profile_inputs(small_slides[:2], DataConfig())
    by_variance = np.array(profile.genes)[np.argsort(profile.variance)]
    share = np.sort(profile.variance).cumsum() / np.sum(profile.variance)

    def warned(lost):
        slide = panel(small_slides[3], by_variance[lost:])
        slide.path = "panel.h5ad"
        (text,) = [
            n for n in conform(slide, profile).notes if isinstance(n, Warned) and "lacks" in n
        ]
        return text

    little = int(np.searchsorted(share, 0.2))  # a fifth of the variance is in many more genes
    assert little > 20 and "--cells" not in warned(little)
    lost = f"{100 * share[little + 4]:.0f} % of the variance"
    assert lost in warned(little + 5)
    assert "`ipar-sparse train SLIDE... --cells panel.h5ad --out RUN`" in warned(little + 5)


def test_the_command_and_the_class_train_for_cells(small_slides, other, run, tmp_path, capfd):
    for number in (0, 1, 2):
        write_slide(small_slides[number], tmp_path / f"{small_slides[number].name}.h5ad")
    one, two, val = (str(tmp_path / f"cortex{i}.h5ad") for i in (1, 2, 3))
    files = []
    for cells in other:
        adata = to_anndata(cells)
        adata.obsm["spatial"] = np.full((140, 2), np.nan)  # would be refused if it were read
        adata.write_h5ad(tmp_path / f"{cells.name}.h5ad")
        files += ["--cells", str(tmp_path / f"{cells.name}.h5ad")]
    settings = [word for setting in SMALL for word in ("--set", setting)]
    command = ["train", one, two, "--val", val, "--out", str(tmp_path / "run"), *settings]
    assert run_command([*command, *files]) == 0
    assert read_meta(tmp_path / "run" / BEST)["genes"] == read_meta(run / BEST)["genes"]
    objects = [anndata.read_h5ad(path) for path in files[1::2]]
    model = ipar.IPAR.train([one, two], val, config=small_config(), cells=objects)
    assert model.predictor.meta["genes"] == read_meta(run / BEST)["genes"]
    assert "trained for" in model.info()

    def refused(*argv):
        capfd.readouterr()
        assert run_command([*argv]) == 2
        (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
        return line

    assert "both to train on and as --cells" in refused("train", one, "--cells", one, "--out", "x")
    again = ["train", "--out", str(tmp_path / "run"), "--resume", *files]
    assert "leave out --cells" in refused(*again)
