"""Files that mean harm: bombs, absurd headers, paths that lead away, markup, pickles."""

import ast
import json
import os
import shutil
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from fuzzing import measured
from small_run import small_config

from ipar_sparse.cli import run_command
from ipar_sparse.data.writers import write_slide
from ipar_sparse.files import folder_name
from ipar_sparse.train.fit import fit

pytestmark = pytest.mark.trust

ROOT = Path(__file__).resolve().parents[1]
MOST = 400 << 20  # bytes that refusing a bomb of terabytes may take; mostly libraries
MARKUP = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    '"><svg onload=alert(3)>',
    "{{ 7*7 }}",
    "'-alert(4)-'",
]


DEFEATED: list[str] = []


@pytest.fixture(autouse=True)
def _count(request, trust_row):
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed == failed:
        DEFEATED.append(request.node.name)
    trust_row("attacks: bombs, headers, paths, markup, pickles", f"{len(DEFEATED)} tests pass")


@pytest.fixture(scope="module")
def folder(small_slides, tmp_path_factory):
    """A run that was read from files, and sound cells for it."""
    folder = tmp_path_factory.mktemp("attacks")
    for number, slide in enumerate(small_slides, start=1):
        write_slide(slide, folder / f"s{number}.h5ad")
    fit(small_slides[:2], small_slides[2:3], small_config("refine.steps=5"), folder / "run")
    return folder


@pytest.fixture
def cells(folder, tmp_path):
    return Path(shutil.copy(folder / "s4.h5ad", tmp_path / "cells.h5ad"))


@pytest.fixture
def refused(folder, tmp_path):
    """Checks that cells are refused in one line and little memory; returns the line."""

    def check(cells, command="predict"):
        out = ["--out", tmp_path / "out.h5ad"] if command == "predict" else []
        code, said, used = measured([command, folder / "run", cells, *out])
        assert code == 2, (code, said)
        assert said.count("error: ") == 1 and "Traceback" not in said
        assert used < MOST, used >> 20
        assert not (tmp_path / "out.h5ad").exists()
        return said.strip().splitlines()[-1]

    return check


def replace(path, name, **declared):
    """Puts an array that is declared, and not there, in place of another."""
    with h5py.File(path, "r+") as file:
        attrs = dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, **declared)
        file[name].attrs.update(attrs)


@pytest.mark.parametrize(
    "name, shape, dtype",
    [
        ("obs/_index", (10**12,), h5py.string_dtype()),
        ("var/_index", (10**12,), h5py.string_dtype()),
        ("obsm/spatial", (10**12, 2), "f8"),
        ("X/data", (10**13,), "f4"),
        ("X/indices", (10**13,), "i4"),
        ("X/indptr", (10**13,), "i8"),
    ],
)
def test_hdf5_that_declares_terabytes_is_refused(cells, refused, name, shape, dtype):
    replace(cells, name, shape=shape, dtype=dtype, chunks=(65536, *shape[1:]))
    assert cells.stat().st_size < 1 << 20
    line = refused(cells)
    assert "cells.h5ad" in line


def test_a_dense_matrix_of_terabytes_is_refused(cells, refused):
    replace(cells, "X", shape=(10**8, 10**6), dtype="f4", chunks=(1024, 1024))
    refused(cells)


def test_zeros_that_unfold_to_gigabytes_are_refused_unread(cells, refused):
    """Deflate packs zeros a thousandfold; arrays that long belong to no such number of cells."""
    rows = (1 << 31) // 16
    packed = zlib.compress(bytes(1 << 24), 9)
    for name, shape in (("obsm/spatial", (rows, 2)), ("obs/extra", (rows,))):
        path = cells.with_name(name.replace("/", "-") + ".h5ad")
        shutil.copy(cells, path)
        with h5py.File(path, "r+") as file:
            if name in file:
                del file[name]
            step = (1 << 24) // 8 // int(np.prod(shape[1:]))
            data = file.create_dataset(
                name, shape, "f8", chunks=(step, *shape[1:]), compression="gzip"
            )
            for start in range(0, rows, step):
                data.id.write_direct_chunk((start, *(0 for _ in shape[1:])), packed)
            data.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            if name.startswith("obs/"):
                order = [*file["obs"].attrs["column-order"], "extra"]
                file["obs"].attrs["column-order"] = np.array(order, dtype=object)
        assert path.stat().st_size < 4 << 20
        refused(path)


@pytest.mark.parametrize("way", ["link", "values", "view"])
def test_what_lies_in_another_file_is_not_read(cells, refused, tmp_path, way):
    other = Path(shutil.copy(cells, tmp_path / "other.h5ad"))
    with h5py.File(cells, "r+") as file:
        count = len(file["obs/_index"])
        if way == "link":
            del file["obs"]
            file["obs"] = h5py.ExternalLink(other.name, "obs")
        elif way == "values":  # any file on the disk, byte by byte
            file.create_dataset("obsm/secret", (count, 2), "u1", external=[(str(other), 0, 2**20)])
        else:
            layout = h5py.VirtualLayout((count, 2), "f8")
            layout[:] = h5py.VirtualSource(str(other), "obsm/spatial", (count, 2))
            file.create_virtual_dataset("obsm/secret", layout)
    assert "lies in another file" in refused(cells)


def test_a_heap_of_texts_without_end_is_refused(cells, refused):
    """HDF5 never gets over a gap of no length at the end of a heap."""
    data, start, gaps = bytearray(cells.read_bytes()), -1, 0

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], "little")

    while (start := data.find(b"GCOL", start + 1)) >= 0:
        place, end = start + 16, start + number(start + 8, 8)
        while place + 16 <= end and number(place, 2):
            place += 16 + -(-number(place + 8, 8) // 8) * 8
        if place + 16 <= end:
            data[place + 8 : place + 16], gaps = bytes(8), gaps + 1
    cells.write_bytes(data)
    assert gaps and "its texts never end" in refused(cells)


def test_groups_that_hold_themselves_are_refused(cells, refused):
    with h5py.File(cells, "r+") as file:
        file["obs/self"] = file["obs"]
    refused(cells)


def zarr_of(cells):
    path = cells.with_suffix(".zarr")
    anndata.read_h5ad(cells).write_zarr(path)
    return path


def edit_zarr(path, **values):
    """Changes the metadata of a zarr array, of format 2 or 3."""
    file = next(p for p in (path / ".zarray", path / "zarr.json") if p.is_file())
    document = json.loads(file.read_text())
    if file.name == "zarr.json" and "chunks" in values:
        chunks = values.pop("chunks")
        document["chunk_grid"]["configuration"]["chunk_shape"] = chunks
    file.write_text(json.dumps(document | values))


@pytest.mark.parametrize("name, columns", [("obsm/spatial", 2), ("X/data", 0), ("X/indptr", 0)])
def test_zarr_that_declares_terabytes_is_refused(cells, refused, name, columns):
    more = [columns] if columns else []
    grown, chunked = zarr_of(cells), cells.with_name("chunked.zarr")
    shutil.copytree(grown, chunked)
    edit_zarr(grown / name, shape=[10**12, *more])
    refused(grown)
    edit_zarr(chunked / name, chunks=[10**12, *more])
    refused(chunked)


def test_headers_of_absurd_size_are_refused(folder, cells, tmp_path):
    for number, head in enumerate([2**63 - 1, 2**62, 10**9, 3]):
        run = tmp_path / f"run{number}"
        shutil.copytree(folder / "run", run)
        path = run / "model.safetensors"
        path.write_bytes(struct.pack("<Q", head) + path.read_bytes()[8:])
        code, said, used = measured(["predict", run, cells, "--out", tmp_path / "o.h5ad"])
        assert code == 2 and "model.safetensors" in said and used < MOST


def test_settings_of_absurd_size_are_refused(folder, cells, tmp_path):
    for key, value in (("hidden", [9_000_000, 9_000_000]), ("out", 9_000_000), ("steps", 10**18)):
        run = tmp_path / f"run-{key}"
        shutil.copytree(folder / "run", run)
        config = json.loads((run / "config.json").read_text())
        config["encoder"][key] = value
        if key == "out":
            config["model"]["dim"] = value
        (run / "config.json").write_text(json.dumps(config))
        code, said, used = measured(["predict", run, cells, "--out", tmp_path / "o.h5ad"])
        assert code == 2 and used < MOST, said


def test_yaml_that_unfolds_without_end_is_refused(folder, tmp_path):
    bomb = tmp_path / "bomb.yaml"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for one, other in zip("abcdefghi", "bcdefghij", strict=True):
        lines.append(f"{other}: &{other} [{', '.join(['*' + one] * 9)}]")
    bomb.write_text("\n".join(lines))
    for argv in (
        ["train", folder / "s1.h5ad", "--out", tmp_path / "r", "--config", bomb],
        ["train", folder / "s1.h5ad", "--out", tmp_path / "r", "--set", "a=" + "[" * 5000],
    ):
        code, said, used = measured(argv)
        assert code == 2 and used < MOST, said


@pytest.mark.parametrize(
    "name",
    ["..", ".", "", "../../evil", "/etc", "a/../../evil", "a\\b", "x" * 500, "\0", "a", "A.b=3"],
)
def test_a_name_makes_a_folder_and_leads_nowhere_else(name):
    safe = folder_name(name)
    assert Path(safe).name == safe and safe[0] != "." and len(safe) < 120
    assert (safe == name) == (name in ("a", "A.b=3"))


def test_records_of_slides_lead_to_no_device(folder, tmp_path):
    pipe = tmp_path / "pipe.h5ad"
    os.mkfifo(pipe)
    for number, place in enumerate(["/dev/zero", str(pipe), "/dev/stdin", "/", "\0"]):
        run = tmp_path / f"run{number}"
        shutil.copytree(folder / "run", run)
        inputs = json.loads((run / "inputs.json").read_text())
        for one in (*inputs["train"], *inputs["val"]):
            one["path"] = place
        (run / "inputs.json").write_text(json.dumps(inputs))
        code, said, used = measured(["train", "--resume", "--out", run])
        assert code == 2 and used < MOST, said
    code, said, _ = measured(["predict", folder / "run", pipe, "--out", tmp_path / "o.h5ad"])
    assert code == 2 and "no regular file" in said


class Harm(HTMLParser):
    """Elements and attributes of a page that came from names."""

    def __init__(self):
        super().__init__()
        self.found, self.script = [], False

    def handle_starttag(self, tag, attrs):
        self.script = tag == "script"
        self.found += [
            (tag, key) for key, value in attrs if "alert(" in (value or "") and key[:2] == "on"
        ]

    def handle_data(self, data):
        if self.script and data.strip() in ("alert(2)", "alert(1)"):
            self.found.append(("script", data))


def test_markup_and_paths_in_names_stay_text_in_every_page(folder, tmp_path):
    """Gene, slide and label names; the page of a slide, of a prediction and of a study."""
    pages = []
    for number in (1, 2, 3, 4):
        adata = anndata.read_h5ad(folder / f"s{number}.h5ad")
        names = adata.var_names.to_numpy().astype(object)
        names[: len(MARKUP)] = [name.replace("/", "|") for name in MARKUP]
        adata.var_names = names
        adata.obs[MARKUP[0]] = pd.Categorical(np.resize(MARKUP, adata.n_obs))
        adata.obs["who"] = pd.Categorical([MARKUP[number % 4]] * adata.n_obs)
        adata.write_h5ad(tmp_path / f"s<img src=x onerror=alert({number})>.h5ad")
    one, two, three, four = sorted(tmp_path.glob("*.h5ad"))
    words = [word for setting in SMALLEST for word in ("--set", setting)]
    run = tmp_path / "[bold]run[/red]"
    assert (
        run_command(["train", str(one), str(two), "--out", str(run), "--slide-key", "who", *words])
        == 0
    )
    assert run_command(["info", str(run)]) == 0
    adata = anndata.read_h5ad(three)
    adata.obs["who"] = pd.Categorical(np.resize(["..", "../../../evil"], adata.n_obs))
    adata.write_h5ad(three)
    out, before = tmp_path / "in" / "out", {*tmp_path.iterdir()}
    argv = ["evaluate", run, three, "--out", out, "--slide-key", "who"]
    code, said, _ = measured([*argv, "--no-baselines"])
    assert code == 0, said
    assert {*tmp_path.iterdir()} == before | {out.parent} and [*out.parent.iterdir()] == [out]
    assert len(list(out.glob("*/metrics.json"))) == 2
    code, said, _ = measured(
        ["predict", run, four, "--out", tmp_path / "p.h5ad", "--report", tmp_path / "page"]
    )
    assert code == 0, said
    code, said, _ = measured(
        ["experiment", "v1", "--slides", one, two, four, "--hold-out", "slide", "--jobs", "1"]
        + ["--out", tmp_path / "study", *words]
    )
    assert code == 0, said
    pages = [*tmp_path.rglob("*.html")]
    assert len(pages) >= 4
    for page in pages:
        parser = Harm()
        parser.feed(page.read_text())
        assert parser.found == [], page
        assert "49" not in page.read_text().split("{{ 7*7 }}")[0][-20:]


SMALLEST = [
    "encoder.steps=2",
    "encoder.hidden=[8]",
    "encoder.out=8",
    "model.dim=8",
    "model.channels=8",
    "model.heads=1",
    "model.head_channels=8",
    "model.recycles=1",
    "train.minisets=1",
    "train.miniset_min=40",
    "train.miniset_max=60",
    "train.epochs=1",
    "train.gate_steps=1",
    "train.device=cpu",
    "graph.k=8",
    "refine.steps=2",
    "refine.distance_correction_steps=2",
    "selection.mode=none",
    "eval.baselines=false",
]


class _Bait:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_is_unpickled(folder, cells, refused, tmp_path):
    import numcodecs
    import torch
    import zarr

    sprung = tmp_path / "sprung"
    path = zarr_of(cells)
    shutil.rmtree(path / "obsm" / "spatial")
    old = zarr.open_group(str(tmp_path / "v2.zarr"), mode="w", zarr_format=2)
    bait = np.array([_Bait(sprung)], dtype=object)
    packed = numcodecs.Pickle().encode(bait)
    array = path / "obsm" / "spatial"
    array.mkdir()
    (array / ".zarray").write_text(
        json.dumps(
            {
                "zarr_format": 2,
                "shape": [1],
                "chunks": [1],
                "dtype": "|O",
                "compressor": None,
                "fill_value": None,
                "order": "C",
                "filters": [{"id": "pickle", "protocol": 5}],
            }
        )
    )
    (array / ".zattrs").write_text(json.dumps({"encoding-type": "array"}))
    (array / "0").write_bytes(packed)
    assert old is not None and "pickle" in refused(path)

    with h5py.File(cells, "r+") as file:
        import pickle

        file["uns"].attrs["harm"] = np.void(pickle.dumps(_Bait(sprung)))
        file["obs"].attrs["harm"] = np.void(pickle.dumps(_Bait(sprung)))
    assert (
        run_command(["predict", str(folder / "run"), str(cells), "--out", f"{tmp_path}/a.h5ad"])
        == 0
    )

    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    torch.save({"model": _Bait(sprung)}, run / "model.safetensors")
    code, said, _ = measured(["predict", run, folder / "s4.h5ad", "--out", tmp_path / "o.h5ad"])
    assert code == 2 and "not a checkpoint" in said
    assert not sprung.exists()


def test_no_module_can_unpickle():
    """Of files; processes of one call pass each other their work.

    ``train/launched.py`` does so by a file in a folder of its own, which only its user can open.
    """
    given_up = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    found = []
    for path in [*(ROOT / "ipar_sparse").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.name}: {n}" for n in names if n.partition(".")[0] in given_up]
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
                found.append(f"{path.name}: {node.arg}")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "torch.load",
                "eval",
                "exec",
            ):
                found.append(f"{path.name}: {ast.unparse(node)}")
    assert found == ["launched.py: pickle"]
