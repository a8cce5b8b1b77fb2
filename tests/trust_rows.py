"""Inputs that a user may get wrong, each given to the commands as a user gives it.

`python tests/trust_rows.py --record FILE`, run in a checkout of an earlier commit, adds what came
out there to a file. `tests/test_trust_inputs.py` shows what comes out now beside it.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr

CELLS, GENES = 300, 120
SHORT = (
    "selection.mode=none encoder.steps=40 encoder.hidden=[128,64] encoder.out=64 model.dim=64 "
    "encoder.batch_size=256 model.recycling=false train.device=cpu"
).split()
"""Settings of a run that trains in two seconds and places an unseen slide with ρ 0.66."""


@dataclass
class Told:
    """What a command did: its exit code, its lines, and how well it placed the cells."""

    code: int
    lines: list[str]
    rho: float | None = None
    empty: int = 0

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def command(*words: object) -> Told:
    """One command line, in this process."""
    from ipar_sparse.cli.app import run_command

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = run_command([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Told(code, [line for line in out.getvalue().splitlines() if line.strip()])


def rho(predicted: np.ndarray, true: np.ndarray) -> float:
    """Distance Spearman over the cells that have a place."""
    known = np.isfinite(predicted).all(1) & np.isfinite(true).all(1)
    return float(spearmanr(pdist(predicted[known]), pdist(true[known])).statistic)


def save(adata: anndata.AnnData, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.write_h5ad(path)
    return path


def logged(adata: anndata.AnnData, total: float | None = 1e4) -> anndata.AnnData:
    """log1p(x / total of the cell * total); None scales to the median cell, as scanpy does."""
    changed, counts = adata.copy(), adata.X.toarray().astype(np.float64)
    sums = counts.sum(1, keepdims=True)
    total = np.median(sums[sums > 0]) if total is None else total
    changed.X = sparse.csr_matrix(np.log1p(counts / np.maximum(sums, 1) * total), dtype=np.float32)
    return changed


def with_columns(adata: anndata.AnnData, counts: np.ndarray, names: Sequence[str]):
    """More features behind those of a slide."""
    return anndata.AnnData(
        X=sparse.csr_matrix(np.hstack([adata.X.toarray(), counts]).astype(np.float32)),
        obs=adata.obs.copy(),
        var=pd.DataFrame(index=[*adata.var_names, *names]),
        obsm=dict(adata.obsm),
    )


class Bench:
    """A simulated cortex of 300 cells a slide, and runs that are trained on it when asked for."""

    def __init__(self, folder: Path):
        from ipar_sparse.data.simulation import simulate
        from ipar_sparse.data.writers import to_anndata

        self.folder = folder
        self.slides = [
            to_anndata(slide)
            for slide in simulate("cortex", slides=5, spots=CELLS, genes=GENES, seed=1)
        ]
        self._runs: dict[str, Path] = {}

    def train(
        self, name: str, slides: Sequence[anndata.AnnData], *words: str, val: Any = None
    ) -> Told:
        """`ipar-sparse train` on two slides, validated on a third; its run is ``runs/NAME``."""
        where = self.folder / name
        files = [save(one, where / f"s{i}.h5ad") for i, one in enumerate(slides)]
        val = self.slides[2] if val is None else val
        held = save(val, where / "v.h5ad")
        settings = [part for one in SHORT for part in ("--set", one)]
        out = self.folder / "runs" / name
        return command("train", *files, "--val", held, "--out", out, *settings, *words)

    def run(self, name: str) -> Path:
        """A run by name, trained once."""
        if name not in self._runs:
            change, words = {
                "counts": (lambda one: one, ()),
                "log": (logged, ()),
                "log to the median": (lambda one: logged(one, None), ()),
                "normalized": (log_counts, ("--normalized",)),
            }[name]
            changed = [change(one) for one in self.slides[:3]]
            told = self.train(name, changed[:2], *words, val=changed[2])
            assert told.code == 0, told.text
            self._runs[name] = self.folder / "runs" / name
        return self._runs[name]

    def place(
        self, run: str | Path, cells: anndata.AnnData | Path, *words: str, suffix: str = ".h5ad"
    ) -> Told:
        """`ipar-sparse predict`, scored against the measured positions of the cells."""
        where = self.folder / "cells.h5ad"
        path = cells if isinstance(cells, Path) else save(cells, where)
        out = self.folder / f"placed{suffix}"
        run = self.run(run) if isinstance(run, str) else run
        told = command("predict", run, path, "--out", out, "--overwrite", *words)
        if told.code == 0:
            placed = (anndata.read_zarr if out.is_dir() else anndata.read_h5ad)(out)
            inside = np.asarray(placed.obs.get("judged", pd.Series(True, placed.obs_names)))
            told.rho = rho(placed.obsm["X_ipar"][inside], placed.obsm["truth"][inside])
            empty = placed.obs.get("ipar_empty")
            told.empty = 0 if empty is None else int(empty.sum())
        return told

    def unseen(self) -> anndata.AnnData:
        """A slide that no run has seen; its positions are kept as obsm["truth"] alone."""
        adata = self.slides[3].copy()
        adata.obsm["truth"] = adata.obsm.pop("spatial")
        return adata

    def retrained(self, name: str, slides: Sequence[anndata.AnnData], *words: str, **more) -> Told:
        """A training, and if it ends well how its run places the unseen slide."""
        told = self.train(name, slides, *words, **more)
        if told.code == 0:
            placed = self.place(self.folder / "runs" / name, self.unseen())
            told.rho, told.code = placed.rho, placed.code
        return told


def log_counts(adata: anndata.AnnData) -> anndata.AnnData:
    """log1p of counts that are not scaled."""
    changed = adata.copy()
    changed.X = changed.X.log1p()
    return changed


@dataclass
class Row:
    """One input, and what must come of it.

    Args:
        act: gives it to the commands.
        rho: least distance Spearman; None where the input is refused.
        says: words of what is told.
        empty: cells that are flagged.
    """

    act: Callable[[Bench], Told]
    rho: float | None
    says: str
    empty: int = 0


ROWS: dict[str, Row] = {}
"""By the text of the row."""


def row(text: str, rho: float | None = None, says: str = "", empty: int = 0):
    def add(act):
        ROWS[text] = Row(act, rho, says, empty)
        return act

    return add


@row("counts, as the run was trained", rho=0.65)
def _(bench):
    return bench.place("counts", bench.unseen())


@row(
    "run on counts, slide of log1p(x / total * 1e4)",
    rho=0.65,
    says="logarithms turned back, to scale cells as those of the run",
)
def _(bench):
    return bench.place("counts", logged(bench.unseen()))


@row("run on log-normalised slides, slide log-normalised", rho=0.57)
def _(bench):
    return bench.place("log", logged(bench.unseen()))


@row(
    "run on log-normalised slides, slide of counts",
    rho=0.57,
    says="cells scaled to the 10,000 of the run",
)
def _(bench):
    return bench.place("log", bench.unseen())


@row(
    "run on slides log-normalised to the median, slide of counts",
    rho=0.65,
    says="cells scaled to the 136.25 of the run",
)
def _(bench):
    return bench.place("log to the median", bench.unseen())


@row("run by --normalized, slide of the same kind", rho=0.64)
def _(bench):
    return bench.place("normalized", log_counts(bench.unseen()))


@row("run by --normalized, slide of counts", rho=0.64, says="turned into log1p of counts")
def _(bench):
    return bench.place("normalized", bench.unseen())


@row("counts turned back from logarithms", rho=0.65, says="but for rounding: taken as counts")
def _(bench):
    adata = bench.unseen()
    x = adata.X.toarray().astype(np.float64)
    total = x.sum(1, keepdims=True)
    y = np.log1p((x / total * 1e4).astype(np.float32))
    adata.X = sparse.csr_matrix(np.expm1(y) * total / 1e4, dtype=np.float32)
    return bench.place("counts", adata)


@row("ambient-corrected counts", rho=0.65, says="taken as counts that were corrected (--normalized")
def _(bench):
    adata = bench.unseen()
    x = adata.X.toarray().astype(np.float64)
    ambient = 0.1 * x.sum(1, keepdims=True) * (x.sum(0) / x.sum())
    adata.X = sparse.csr_matrix(np.maximum(x - ambient, 0), dtype=np.float32)
    return bench.place("counts", adata)


@row("15 of 315 cells without counts", rho=0.65, says="15 of 315 cells have no counts", empty=15)
def _(bench):
    adata = bench.unseen()
    more = adata[:15].copy()
    more.obs_names = [f"none{i}" for i in range(15)]
    more.X = sparse.csr_matrix(more.shape, dtype=np.float32)
    adata.obs["judged"], more.obs["judged"] = True, False
    return bench.place("counts", anndata.concat([adata, more]))


@row(
    "15 of 315 cells with counts, none in the genes of the run",
    rho=0.65,
    says="none in the genes of the run",
    empty=15,
)
def _(bench):
    adata = bench.unseen()
    more = adata[:15].copy()
    more.obs_names = [f"none{i}" for i in range(15)]
    more.X = sparse.csr_matrix(more.shape, dtype=np.float32)
    adata.obs["judged"], more.obs["judged"] = True, False
    both = anndata.concat([adata, more])
    return bench.place("counts", with_columns(both, np.full((len(both), 1), 5), ["other"]))


@row("control probes on the slide that is placed", rho=0.65)
def _(bench):
    adata = bench.unseen()
    rng = np.random.default_rng(0)
    rate = 2 * np.asarray(adata.X.sum(1)) * rng.random((CELLS, 1))
    probes = rng.poisson(rate)
    return bench.place("counts", with_columns(adata, probes, ["Blank-1"]))


@row("duplicate gene names, columns in another order", rho=0.65, says="their counts were added up")
def _(bench):
    adata = bench.unseen()
    rng = np.random.default_rng(0)
    x = adata.X.toarray()
    part = rng.binomial(x.astype(int), 0.5)
    twice = with_columns(adata, part, adata.var_names)
    twice.X = sparse.csr_matrix(np.hstack([x - part, part]).astype(np.float32))
    return bench.place("counts", twice[:, rng.permutation(2 * GENES)].copy())


def _ensembl(adata: anndata.AnnData, version: bool, same: int = 0) -> anndata.AnnData:
    changed = adata.copy()
    names = [f"ENSG{i:011d}" for i in range(GENES)]
    changed.var_names = [
        f"{name}.{i % 9 + 1}" if version and i >= same else name for i, name in enumerate(names)
    ]
    return changed


@row(
    "two training slides, Ensembl with and without version, 4 of 120 names equal",
    rho=0.65,
    says="gene names were matched to those of s0",
)
def _(bench):
    slides = [_ensembl(bench.slides[0], False), _ensembl(bench.slides[1], True, same=4)]
    told = bench.train("versions", slides, val=_ensembl(bench.slides[2], False))
    if told.code == 0:
        placed = bench.place(bench.folder / "runs" / "versions", _ensembl(bench.unseen(), False))
        told.rho = placed.rho
    return told


@row("two training slides that share 4 of 120 genes", says="shares 4 genes with s0")
def _(bench):
    other = bench.slides[1].copy()
    other.var_names = [name if i < 4 else f"other{i}" for i, name in enumerate(other.var_names)]
    return bench.retrained("four", [bench.slides[0], other])


def _cased(adata: anndata.AnnData, change: Callable[[str], str], same: int) -> anndata.AnnData:
    changed = adata.copy()
    changed.var_names = [
        f"1{i}" if i < same else change(f"gene{i}") for i, _ in enumerate(adata.var_names)
    ]
    return changed


@row("symbols that differ in letter case alone, 6 of 120 equal", says="pass --ignore-case")
def _(bench):
    slides = [_cased(one, str.upper, 6) for one in bench.slides[:3]]
    told = bench.train("case", slides[:2], val=slides[2])
    assert told.code == 0, told.text
    return bench.place(bench.folder / "runs" / "case", _cased(bench.unseen(), str.title, 6))


def _with_zeros(bench: Bench) -> list[anndata.AnnData]:
    slides = [one.copy() for one in bench.slides[:2]]
    for one in slides:
        one.obsm["spatial"] = one.obsm["spatial"] + 30_000
        one.obsm["spatial"][:15] = 0
    return slides


@row("5 % of positions filled with (0, 0)", rho=0, says="pass --drop-outliers")
def _(bench):
    return bench.retrained("zeros", _with_zeros(bench))


@row(
    "three columns of positions (z, y, x), the first constant",
    rho=0.65,
    says="the constant one (number 1) was left out",
)
def _(bench):
    slides = [one.copy() for one in bench.slides[:2]]
    for one in slides:
        one.obsm["spatial"] = np.column_stack([np.full(CELLS, 7.0), one.obsm["spatial"]])
    return bench.retrained("zyx", slides)


@row("two columns of positions, one constant", says="are one line")
def _(bench):
    slides = [one.copy() for one in bench.slides[:2]]
    for one in slides:
        one.obsm["spatial"] = one.obsm["spatial"] * [0.0, 1.0]
    return bench.retrained("line", slides)


@row("a training slide that is all zero", says="all values are zero")
def _(bench):
    other = bench.slides[1].copy()
    other.layers["counts"] = other.X
    other.X = sparse.csr_matrix(other.shape, dtype=np.float32)
    return bench.retrained("zero", [bench.slides[0], other])


@row("a slide label with /", rho=0.62)
def _(bench):
    adata = bench.unseen()
    adata.obs["part"] = np.where(np.arange(CELLS) % 2, "left/1", "left/2")
    return bench.place("counts", adata, "--slide-key", "part")


@row("obs and var as anndata 0.6 stored them", says="older than 0.7")
def _(bench):
    path = save(bench.unseen(), bench.folder / "old.h5ad")
    with h5py.File(path, "r+") as file:
        for name in ("obs", "var"):
            names = [
                f"n{i}".encode()
                for i in range(len(file["obs/_index" if name == "obs" else "var/_index"]))
            ]
            del file[name]
            file[name] = np.array([(one,) for one in names], dtype=[("index", "S8")])
    return bench.place("counts", path)


@row("an HDF5 filter that is not installed", says="compressed by zstandard")
def _(bench):
    path = save(bench.unseen(), bench.folder / "filtered.h5ad")
    with h5py.File(path, "r+") as file:
        count = file["X/data"].shape[0]
        del file["X/data"]
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((count,))
        settings.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
        space = h5py.h5s.create_simple((count,))
        made = h5py.h5d.create(file["X"].id, b"data", h5py.h5t.IEEE_F32LE, space, settings)
        made.write_direct_chunk((0,), b"\x28\xb5\x2f\xfd" + bytes(100), 0)
    return bench.place("counts", path)


@row(
    "the validation slide is a training slide, cells renamed and reordered",
    says="both to train on and to validate on",
)
def _(bench):
    order = np.random.default_rng(0).permutation(CELLS)
    copy = bench.slides[1][order].copy()
    copy.obs_names = [f"c{i}" for i in range(CELLS)]
    return bench.retrained("copy", bench.slides[:2], val=copy)


@row("the second training slide is the first, renamed and reordered", says="hold the same cells")
def _(bench):
    copy = bench.slides[0][::-1].copy()
    copy.obs_names = [f"c{i}" for i in range(CELLS)]
    return bench.retrained("twice", [bench.slides[0], copy])


@row("two sections in one file, without a slide key", rho=0.6, says="pass --slide-key")
def _(bench):
    first, second = bench.unseen(), bench.slides[4].copy()
    second.obsm["truth"] = second.obsm.pop("spatial")
    first.obs["judged"], second.obs["judged"] = True, False
    both = anndata.concat([first, second], label="section", keys=["a", "b"], index_unique="-")
    return bench.place("counts", both)


@row("5 % of positions filled with (0, 0), --drop-outliers", rho=0.64, says="left out")
def _(bench):
    return bench.retrained("dropped", _with_zeros(bench), "--drop-outliers")


@row(
    "symbols that differ in letter case alone, --ignore-case",
    rho=0.65,
    says="gene names were matched",
)
def _(bench):
    cells = _cased(bench.unseen(), str.title, 6)
    return bench.place(bench.folder / "runs" / "case", cells, "--ignore-case")


@row(
    "run on counts, slide of log2(1 + x / total * 1e6)",
    rho=0.65,
    says="log2(1 + x) of counts scaled",
)
def _(bench):
    adata = logged(bench.unseen(), 1e6)
    adata.X = adata.X / np.float32(np.log(2))
    return bench.place("counts", adata)


@row("run on counts, slide of square roots", rho=0.65, says="square roots of counts: squared")
def _(bench):
    adata = bench.unseen()
    adata.X = adata.X.sqrt()
    return bench.place("counts", adata)


@row("run on counts, slide of counts per million", rho=0.65, says="taken as counts")
def _(bench):
    adata = logged(bench.unseen(), 1e6)
    adata.X = adata.X.expm1()
    return bench.place("counts", adata)


@row(
    "run on counts, slide of half the genes, log-normalised before",
    rho=0.43,
    says="lacks 60 of the 120",
)
def _(bench):
    return bench.place("counts", logged(bench.unseen())[:, ::2].copy())


@row("run on counts, slide scaled to unit variance", says="values are negative")
def _(bench):
    adata = logged(bench.unseen())
    x = adata.X.toarray()
    adata.X = (x - x.mean(0)) / x.std(0)
    return bench.place("counts", adata)


@row(
    "gene names in another order", rho=-1, says="genes are not expressed as on the training slides"
)
def _(bench):
    adata = bench.unseen()
    adata.var_names = np.random.default_rng(0).permutation(adata.var_names)
    return bench.place("counts", adata)


@row("gene names with the prefix GRCh38_", rho=0.65, says="120 gene names were matched")
def _(bench):
    adata = bench.unseen()
    adata.var_names = "GRCh38_" + adata.var_names
    return bench.place("counts", adata)


@row("symbols in a column of var", rho=0.65, says="genes are named by var['symbol']")
def _(bench):
    adata = bench.unseen()
    adata.var["symbol"] = list(adata.var_names)
    adata.var_names = [f"ENSG{i:011d}" for i in range(GENES)]
    return bench.place("counts", adata)


@row("positions as a data frame", rho=0.65)
def _(bench):
    slides = [one.copy() for one in bench.slides[:2]]
    for one in slides:
        frame = pd.DataFrame(one.obsm["spatial"], columns=["x", "y"], index=one.obs_names)
        one.obsm["spatial"] = frame
    return bench.retrained("frame", slides)


@row("all positions are one point", says="are one point")
def _(bench):
    slides = [one.copy() for one in bench.slides[:2]]
    slides[1].obsm["spatial"] = np.full((CELLS, 2), 3)
    return bench.retrained("point", slides)


@row("slide labels that are alike but for signs", rho=0.62)
def _(bench):
    adata = bench.unseen()
    adata.obs["part"] = np.where(np.arange(CELLS) % 2, "a/b", "a:b")
    return bench.place("counts", adata, "--slide-key", "part")


@row("the slide key of the run is not in the cells", rho=0.65, says="no obs column 'section'")
def _(bench):
    both = anndata.concat(bench.slides[:2], label="section", keys=["a", "b"], index_unique="-")
    told = bench.train("keyed", [both], "--slide-key", "section", val=_keyed(bench.slides[2]))
    assert told.code == 0, told.text
    return bench.place(bench.folder / "runs" / "keyed", bench.unseen())


def _keyed(adata: anndata.AnnData) -> anndata.AnnData:
    keyed = adata.copy()
    keyed.obs["section"] = "c"
    return keyed


@row("a read-only zarr store is placed", rho=0.65)
def _(bench):
    path = bench.folder / "sealed.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bench.unseen().write_zarr(path)
    inside = [path, *path.rglob("*")]
    for one in inside:
        one.chmod(0o555 if one.is_dir() else 0o444)
    told = bench.place("counts", path, suffix=".zarr")
    out = bench.folder / "placed.zarr"
    if told.code == 0 and not all(one.stat().st_mode & 0o200 for one in (out, *out.rglob("*"))):
        told = Told(1, ["error: the output is read-only"])
    for one in inside:
        one.chmod(0o755)
    return told


@row("the name of the output is too long", says="name too long")
def _(bench):
    where = save(bench.unseen(), bench.folder / "cells.h5ad")
    return command(
        "predict", bench.run("counts"), where, "--out", bench.folder / ("x" * 300 + ".h5ad")
    )


@row("genes in rows and cells in columns", says="give it transposed")
def _(bench):
    return bench.place("counts", bench.unseen().T.copy())


@row("run on counts, slide of shares of a cell", rho=0.65, says="counts scaled to 1 a cell")
def _(bench):
    adata = logged(bench.unseen(), 1.0)
    adata.X = adata.X.expm1()
    return bench.place("counts", adata)


def remade(adata: anndata.AnnData, change: Callable[[np.ndarray], np.ndarray]) -> anndata.AnnData:
    """A slide with values that are made of its counts (n, G)."""
    changed = adata.copy()
    changed.X = sparse.csr_matrix(change(changed.X.toarray().astype(np.float64)), dtype=np.float32)
    return changed


@row("run on counts, slide of logarithms of logarithms", rho=0.5, says="is a guess: give counts")
def _(bench):
    return bench.place("counts", remade(logged(bench.unseen()), np.log1p))


@row("run on counts, logarithms over the largest of their gene", rho=0.5, says="vary otherwise")
def _(bench):
    return bench.place("counts", remade(logged(bench.unseen()), lambda x: x / x.max(axis=0)))


@row("run on counts, slide of counts per length and million", rho=0.5, says="vary otherwise than")
def _(bench):
    length = np.random.default_rng(0).uniform(0.5, 10, GENES)
    return bench.place(
        "counts", remade(logged(bench.unseen(), 1e6), lambda x: np.expm1(x) / length)
    )


@row("run on counts, slide of yes and no", rho=0.45, says="vary otherwise than on the training")
def _(bench):
    return bench.place("counts", remade(bench.unseen(), lambda x: x > 0))


@row(
    "run on counts, slide of half counts, half logarithms", rho=0.5, says="give values of one kind"
)
def _(bench):
    logs = logged(bench.unseen()).X.toarray()
    half = np.arange(CELLS)[:, None] % 2 == 0
    return bench.place("counts", remade(bench.unseen(), lambda x: np.where(half, x, logs)))


@row(
    "30 of 120 genes filled with zeros",
    rho=0.45,
    says="genes that training slides express hold nothing",
)
def _(bench):
    return bench.place("counts", remade(bench.unseen(), lambda x: x * (np.arange(GENES) >= 30)))


@row("the second training slide has its gene names in another order", rho=0, says="leave it out")
def _(bench):
    other = bench.slides[1].copy()
    other.var_names = np.random.default_rng(0).permutation(other.var_names)
    return bench.retrained("unlike", [bench.slides[0], other])


@row(
    "the validation slide is a training slide, log-normalised, of half the genes",
    says="both to train on and to validate on",
)
def _(bench):
    copy = logged(bench.slides[1])[:, ::2].copy()
    return bench.retrained("processed", bench.slides[:2], val=copy)


@row(
    "three columns of positions (number of the cell, x, y)",
    rho=0.65,
    says="the counting one (number 1) was left out",
)
def _(bench):
    slides = [one.copy() for one in bench.slides[:2]]
    for one in slides:
        one.obsm["spatial"] = np.column_stack([np.arange(CELLS), one.obsm["spatial"]])
    return bench.retrained("numbered", slides)


def with_positions(slides, change: Callable[[np.ndarray], np.ndarray]) -> list[anndata.AnnData]:
    """Slides whose positions (n, 2) are changed."""
    changed = [one.copy() for one in slides]
    for one in changed:
        one.obsm["spatial"] = change(one.obsm["spatial"].copy())
    return changed


@row("positions in another order than cells", rho=-1, says="may be in another order than the cells")
def _(bench):
    rng = np.random.default_rng(0)
    return bench.retrained("mixed up", with_positions(bench.slides[:2], rng.permutation))


@row("half of the positions filled with (0, 0)", rho=-1, says="150 of 300 cells")
def _(bench):
    return bench.retrained("half filled", half_filled(bench.slides[:2]))


@row("half of the positions filled with (0, 0), --drop-outliers", rho=0.5, says="left out")
def _(bench):
    return bench.retrained("half dropped", half_filled(bench.slides[:2]), "--drop-outliers")


def half_filled(slides) -> list[anndata.AnnData]:
    return with_positions(slides, lambda pos: pos * (np.arange(len(pos)) % 2)[:, None])


@row("one cell at 1e12", rho=-1, says="times wider: if their positions were filled in")
def _(bench):
    def fill(pos):
        pos[0] = 1e12
        return pos

    return bench.retrained("afar", with_positions(bench.slides[:2], fill))


@row("x in pixels, y in other units", rho=-1, says="times as long as wide")
def _(bench):
    return bench.retrained("stretched", with_positions(bench.slides[:2], lambda pos: pos * [1, 20]))


@row("the second training slide is per length and million", rho=0.5, says="if they were multiplied")
def _(bench):
    length = np.random.default_rng(0).uniform(0.5, 10, GENES)
    other = remade(logged(bench.slides[1], 1e6), lambda x: np.expm1(x) / length)
    return bench.retrained("per length", [bench.slides[0], other])


@row("the second training slide, times a million", rho=0.5, says="if they were multiplied")
def _(bench):
    return bench.retrained("times", [bench.slides[0], remade(bench.slides[1], lambda x: x * 1e6)])


@row("one gene", rho=0, says="1 genes hardly place cells")
def _(bench):
    slides = [one[:, :1].copy() for one in bench.slides[:3]]
    told = bench.train("one gene", slides[:2], val=slides[2])
    told.rho = 0.0  # all cells lie at one point
    return told


@row("positions in columns of obs", says="obs has x and y")
def _(bench):
    slides = [one.copy() for one in bench.slides[:2]]
    for one in slides:
        one.obs["x"], one.obs["y"] = one.obsm.pop("spatial").T
    return bench.retrained("columns", slides)


@row("run and cells swapped", says="is a run; give a run first")
def _(bench):
    run, cells = bench.run("counts"), save(bench.unseen(), bench.folder / "cells.h5ad")
    return command("predict", cells, run, "--out", bench.folder / "swapped.h5ad")


@row("a folder of files", says="is a folder of files; give these themselves")
def _(bench):
    path = save(bench.unseen(), bench.folder / "several" / "cells.h5ad")
    return bench.place("counts", path.parent)


def summary(told: Told) -> str:
    """One cell of the table."""
    if told.code == 0:
        flagged = f", {told.empty} flagged" if told.empty else ""
        said = next(
            (line for line in told.lines if re.match(r"note: |warning: |WARNING", line)), ""
        )
        return f"ρ {told.rho:.3f}{flagged}; {said[:160] or 'no message'}"
    return f"exit {told.code}: {next((one for one in told.lines if 'error: ' in one), '')[:200]}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    target = Path(sys.argv[2]).resolve()
    recorded = json.loads(target.read_text())
    recorded["commit"] = subprocess.check_output(
        ["git", "rev-parse", "--short", "HEAD"], text=True
    ).strip()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch))
        for text, one in ROWS.items():
            recorded["rows"][text] = summary(one.act(bench)).replace(scratch, "")
            print(text, "|", recorded["rows"][text], file=sys.stderr, flush=True)
    target.write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n")
