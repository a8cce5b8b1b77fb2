"""Reading of expression for ``train``: time and peak memory of a file of any size.

    python -m benchmarks.reading --cells 25000,100000,1000000 --genes 20000 --out DIR

The file is written block by block, outside the clock: random counts, of which ``--density`` are
stored. Reading checks them and counts totals; choosing takes the variance of each gene and the
selected genes. Each file is read in a process of its own; ``--in-memory`` reads all of it at once.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import closing
from pathlib import Path

import h5py
import numpy as np
import torch

from ipar_sparse import usage
from ipar_sparse.config import RunConfig
from ipar_sparse.data import on_disk
from ipar_sparse.data.input_profile import profile_inputs
from ipar_sparse.data.readers import read_files
from ipar_sparse.data.slide import Slide
from ipar_sparse.data.writers import write_slide
from ipar_sparse.progress import size_text

from . import harness

_BLOCK = 10_000  # cells written at a time


def write_random(path: Path, cells: int, genes: int, density: float, seed: int = 0) -> int:
    """Writes a slide of random counts, one gene of every 1 / ``density``; returns values stored."""
    rng = np.random.default_rng(seed)
    step = round(1 / density)
    first = np.arange(0, genes - step + 1, step)
    slide = Slide(
        name=path.stem,
        expression=None,
        genes=np.empty(0, dtype=str),
        cell_names=np.array([f"cell{number:08d}" for number in range(cells)]),
        pos=rng.uniform(0, 1000, (cells, 2)),
    )
    write_slide(slide, path, compression=None)
    with h5py.File(path, "r+") as file:
        for name in ("X", "var"):
            file.pop(name, None)
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        group.attrs["shape"] = (cells, genes)
        stored = cells * len(first)
        group["indptr"] = np.arange(0, stored + 1, len(first))
        chunks = (min(stored, 1 << 20),)
        data = group.create_dataset("data", (stored,), np.float32, chunks=chunks)
        indices = group.create_dataset("indices", (stored,), np.int32, chunks=chunks)
        for start in range(0, cells, _BLOCK):
            shape = (min(_BLOCK, cells - start), len(first))
            part = slice(start * len(first), (start + shape[0]) * len(first))
            indices[part] = (first + rng.integers(0, step, shape)).ravel()
            data[part] = rng.integers(1, 9, shape).ravel()
        var = file.create_group("var")
        var.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0"})
        var.attrs.update({"_index": "_index", "column-order": np.empty(0, dtype="S1")})
        names = [f"Gene{number:05d}" for number in range(genes)]
        var.create_dataset("_index", data=names, dtype=h5py.string_dtype())
        var["_index"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    return stored


def measure(job: dict) -> dict:
    """Seconds and peak bytes of reading a file, and of choosing and taking its genes."""
    if job["in_memory"]:
        on_disk.STREAM_VALUES = 1 << 62
    found: dict[str, float] = {"before_bytes": usage.host_memory()}
    usage.reset_host_peak()
    start = time.perf_counter()
    slides = read_files([job["path"]], RunConfig().data, require_pos=True)
    found |= {"reading_seconds": time.perf_counter() - start, "reading_bytes": usage.host_peak()}
    usage.reset_host_peak()
    start = time.perf_counter()
    _, profile, _ = profile_inputs(slides, RunConfig().data)
    found |= {"choosing_seconds": time.perf_counter() - start, "choosing_bytes": usage.host_peak()}
    return found | {"genes_taken": len(profile.genes)}


def main(argv: list[str] | None = None) -> None:
    """``python -m benchmarks.reading``; writes ``reading.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default="25000,100000,1000000")
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--in-memory", action="store_true", help="not through the disk")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    record = harness.Record(given.out / "reading.json", torch.device("cpu"))
    for cells in (int(float(text)) for text in given.cells.split(",")):
        with tempfile.TemporaryDirectory(dir=given.out) as folder, closing(harness.Worker()) as one:
            path = Path(folder) / "slide.h5ad"
            stored = write_random(path, cells, given.genes, given.density)
            row = {"cells": cells, "stored": stored, "file_bytes": path.stat().st_size}
            record.add(row | one.call(measure, {"path": path, "in_memory": given.in_memory}))
    head = ["cells", "values", "before", "reading", "choosing", "reading s", "choosing s"]
    sizes = ("before_bytes", "reading_bytes", "choosing_bytes")
    table = (
        [f"{row['cells']:,}", f"{row['stored']:,}", *(size_text(row[key]) for key in sizes)]
        + [f"{row[key]:.1f}" for key in ("reading_seconds", "choosing_seconds")]
        if "failed" not in row
        else [f"{row['cells']:,}", f"{row['stored']:,}", row["failed"]]
        for row in record.rows
    )
    print(harness.markdown(head, table))


if __name__ == "__main__":
    main()
