"""Bad input by machine: no traceback, no hang, no more memory than is honest, one line."""

import json
import multiprocessing
import re
import shutil
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import anndata
import numpy as np
import pytest
from fuzzing import (
    HANG,
    batch,
    flip_bytes,
    mangle_hdf5,
    mangle_run,
    measured,
    odd_anndata,
    wrong_with,
)
from hypothesis import HealthCheck, Phase, given, settings
from small_run import QUICK

from ipar_sparse.cli import run_command
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.writers import write_slide

pytestmark = pytest.mark.trust

children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(["ipar_sparse.api", "ipar_sparse.cli.app", "fuzzing"])
HONEST = 96 << 20  # bytes that placing a few cells takes, beside the file


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a run, and sound cells for it in two formats."""
    folder = tmp_path_factory.mktemp("fuzz")
    *train, cells = simulate("cortex", slides=4, spots=140, genes=60)
    for number, slide in enumerate(train, start=1):
        write_slide(slide, folder / f"s{number}.h5ad")
    write_slide(cells.take(np.arange(60)), folder / "cells.h5ad")
    write_slide(cells.take(np.arange(60)), folder / "cells.zarr")
    words = [word for setting in QUICK for word in ("--set", setting)]
    slides = [str(folder / f"s{number}.h5ad") for number in (1, 2, 3)]
    argv = ["train", *slides[:2], "--val", slides[2], "--out", str(folder / "run"), *words]
    assert run_command([*argv, "--select", "none"]) == 0
    code, said, used = measured(
        ["predict", folder / "run", folder / "cells.h5ad", "--out"] + [folder / "sound.h5ad"]
    )
    assert code == 0 and used < HONEST, (said, used >> 20)
    return folder


def honest_bytes(adata) -> int:
    parts = [adata.X, *adata.layers.values(), *adata.obsm.values()]
    return sum(getattr(part, "data", part).nbytes for part in parts if hasattr(part, "nbytes"))


def silently_lost(path) -> str | None:
    """What is wrong with a prediction; cells without a place have to be flagged."""
    adata = anndata.read_h5ad(path)
    lost = ~np.isfinite(adata.obsm["X_ipar"]).all(axis=1)
    if "ipar_empty" in adata.obs:
        lost &= ~adata.obs["ipar_empty"].to_numpy(dtype=bool)
    return f"{lost.sum()} cells without a place and without a flag" if lost.any() else None


def command_of(command, folder, cells, out, key=None, layer=None):
    more = [] if key is None else ["--slide-key", key]
    more += [] if layer is None else ["--layer", layer]
    if command == "train":
        words = [word for setting in QUICK for word in ("--set", setting)]
        words += ["--set", "train.epochs=1", "--set", "encoder.steps=2", "--select", "none"]
        return ["train", cells, folder / "s1.h5ad", "--out", out / "new", *words, *more]
    if command == "check":
        return ["check", folder / "run", cells]
    if command == "evaluate":
        more += ["--no-baselines"]
        return ["evaluate", folder / "run", cells, "--out", out / "report", *more]
    return [command, folder / "run", cells, "--out", out / "out.h5ad", *more]


def tell(trust_row, name, wrong, count):
    kinds = Counter(re.sub(r"[\d./]+\S*", "#", text)[:160] for text in wrong.values())
    trust_row(name, f"{count} tried: {len(wrong)} with a traceback, a hang, or too much memory")
    assert not wrong, "\n".join([*(f"{n} x {k}" for k, n in kinds.items()), str(wrong)[:3000]])


def test_odd_anndata_files_are_placed_or_refused_in_one_line(run, tmp_path, full, trust_row):
    genes = anndata.read_h5ad(run / "cells.h5ad").var_names
    wrong, tried, placed, unwritable = {}, [], [], Counter()

    @settings(
        max_examples=1000 if full else 100,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(odd_anndata(list(genes)))
    def place(case):
        adata, command, key, layer, suffix = case
        cells, out = tmp_path / f"cells.{suffix}", tmp_path / "out"
        shutil.rmtree(tmp_path)
        out.mkdir(parents=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adata.write_zarr(cells) if suffix == "zarr" else adata.write_h5ad(cells)
        except Exception as error:  # anndata itself does not write all of it
            unwritable[type(error).__name__] += 1
            return
        argv = command_of(command, run, cells, out, key, layer)
        tried.append(command)
        problem = wrong_with(argv, HONEST + honest_bytes(adata))
        if command == "predict" and (out / "out.h5ad").exists():
            placed.append(command)
            problem = problem or silently_lost(out / "out.h5ad")
        if problem:
            wrong[len(tried)] = f"{command} {suffix}: {problem}"

    place()
    assert len(tried) > 0.9 * (1000 if full else 100), unwritable
    assert len(placed) > len(tried) / 5  # they are not all refused for the same reason
    tell(trust_row, "odd AnnData files", wrong, len(tried))


def in_children(work, count, log):
    """Outcomes of numbered cases, done in processes that may die of them."""
    number, wrong = 0, {}
    while number < count:
        process = children.Process(target=batch, args=(work, number, count, log))
        process.start()
        seen, since = 0, time.monotonic()
        while process.is_alive() and time.monotonic() - since < 2 * HANG:
            process.join(1)  # what hangs in a library of C takes no alarm
            size = log.stat().st_size if log.exists() else 0
            seen, since = (size, time.monotonic()) if size != seen else (seen, since)
        process.kill()
        process.join()
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        if process.exitcode == 0:
            break
        number = 1 + max((line["begun"] for line in lines if "begun" in line), default=number)
        wrong[number - 1] = f"its process died ({process.exitcode})"
    done = {line["done"]: line["wrong"] for line in lines if "done" in line}
    wrong |= {seed: text for seed, text in done.items() if text is not None}
    assert len({*done, *wrong}) == count
    return wrong


def damaged_file(folder: Path, sources: list[Path], seed: int) -> str | None:
    rng = np.random.default_rng(seed)
    source = sources[seed % len(sources)]
    out = folder / f"case{seed}"
    out.mkdir()
    cells = out / source.name
    shutil.copy(source, cells)
    (flip_bytes if seed % 2 else mangle_hdf5)(cells, rng)
    command = ["predict", "predict", "evaluate", "check", "train"][int(rng.integers(5))]
    problem = wrong_with(command_of(command, folder, cells, out), HONEST + (64 << 20))
    shutil.rmtree(out)
    return problem and f"{command}: {problem}"


def test_damaged_real_files_are_placed_or_refused_in_one_line(
    run, real_slides, tmp_path, full, trust_row
):
    sources = []
    for name in ("mouse_embryo_seqfish", "human_breast_st"):
        for path in sorted((real_slides / name).glob("*.h5ad"))[:2]:
            adata = anndata.read_h5ad(path)[:60].copy()  # the file as it is, but for its length
            adata.write_h5ad(tmp_path / path.name)
            sources.append(tmp_path / path.name)
    sources.append(run / "cells.h5ad")
    count = 300 if full else 30
    work = partial(damaged_file, run, sources)
    tell(trust_row, "damaged real files", in_children(work, count, tmp_path / "log"), count)


def damaged_run(folder: Path, seed: int) -> str | None:
    rng = np.random.default_rng(seed)
    out = folder / f"run{seed}"
    shutil.copytree(folder / "run", out)
    name = mangle_run(out, rng)
    cells = folder / "cells.h5ad"
    argv = {
        0: ["predict", out, cells, "--out", out / "out.h5ad"],
        1: ["info", out],
        2: ["train", "--resume", "--out", out],
        3: ["check", out, cells],
    }[int(rng.choice(4, p=[0.55, 0.15, 0.15, 0.15]))]
    problem = wrong_with(argv, HONEST + (64 << 20))
    shutil.rmtree(out)
    return problem and f"{name}, {argv[0]}: {problem}"


def test_damaged_runs_are_used_or_refused_in_one_line(run, tmp_path, full, trust_row):
    count = 300 if full else 30
    wrong = in_children(partial(damaged_run, run), count, tmp_path / "log")
    tell(trust_row, "damaged checkpoints and configurations", wrong, count)
