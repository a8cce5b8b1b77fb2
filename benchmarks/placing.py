"""`predict` on several devices: how much faster it is, and that positions are the same.

    python -m benchmarks.placing --devices 1,2,4 --cells 3000000 --out DIR

Trains on two small simulated slides that bring an embedding, then places one large slide by the
command, once for each number of devices. ``placing.json`` has the time of the command and of its
stages, and how far positions are from those of the first, at most and in the median.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from anndata import read_h5ad

from ipar_sparse.data.keys import Keys
from ipar_sparse.data.simulation import iter_slides
from ipar_sparse.data.writers import write_slide

from . import harness

SETTINGS = ("selection.mode=none", "train.epochs=4", "train.gate_steps=100")


def command(*words: object) -> None:
    """Runs ``ipar-sparse``."""
    subprocess.run([sys.executable, "-m", "ipar_sparse", *map(str, words)], check=True)


def prepare(folder: Path, cells: int, width: int, device: str, settings: list[str]) -> Path:
    """Trains a run in the folder, and returns the file of cells to place."""
    paths = [folder / "slide1.h5ad", folder / "slide2.h5ad", folder / "cells.h5ad"]
    for number, path in enumerate(paths):
        spots = cells if path == paths[-1] else 5000
        drawn = iter_slides("cortex", slides=1, spots=spots, seed=number, embedding=width)
        write_slide(next(drawn), path, compression=None)
    chosen = [word for one in (*SETTINGS, *settings) for word in ("--set", one)]
    chosen += ["--embedding", "obsm:X_embedding", "--device", device]
    command("train", *paths[:-1], "--out", folder / "run", *chosen)
    return paths[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", default="1,2", help="numbers of devices; 1 comes first")
    parser.add_argument("--cells", type=int, default=3_000_000)
    parser.add_argument("--embedding", type=int, default=64, help="columns")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the training")
    parser.add_argument("--out", type=Path, default=Path("placing"))
    given = parser.parse_args()
    record = harness.Record(given.out / "placing.json", torch.device(given.device))
    record.more = {"cells": given.cells, "settings": [*SETTINGS, *given.set]}
    with tempfile.TemporaryDirectory(dir=given.out) as name:
        folder, first = Path(name), None
        cells = prepare(folder, given.cells, given.embedding, given.device, given.set)
        for devices in map(int, given.devices.split(",")):
            out, profile = folder / f"{devices}.h5ad", folder / f"{devices}.json"
            words = ["predict", folder / "run", cells, "--out", out, "--out-obsm-only"]
            words += ["--device", given.device, "--devices", devices, "--profile", profile]
            began = time.monotonic()
            command(*words)
            row = {"devices": devices, "seconds": time.monotonic() - began}
            pos = read_h5ad(out).obsm[Keys.PREDICTION]
            first = pos if first is None else first
            moved = np.linalg.norm(pos - first, axis=1)  # in tissue radii
            row["farthest_from_first"] = float(moved.max())
            row["median_from_first"] = float(np.median(moved))
            for one in json.loads(profile.read_text())["stages"]:
                row[one["name"]] = one["seconds"]
            record.add(row)


if __name__ == "__main__":
    main()
