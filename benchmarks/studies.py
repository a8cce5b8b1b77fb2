"""How fast a study is, by the number of GPUs and of runs that share one.

    python -m benchmarks.studies --gpus 1,1,1,4 --runs-per-gpu 1,2,4,4 --runs 40 --out DIR

Each pair is the command `ipar-sparse experiment` on simulated slides, from its start to its page,
in a folder of its own. Writes ``studies.json``. Pairs are compared within one call only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.writers import write_slide

from . import harness

SLIDES = 5
SHORT = ("encoder.steps=200", "train.epochs=4", "train.gate_steps=100", "train.batch_kind=miniset")
SHORT += ("selection.mode=none", "eval.baselines=false")


def seconds(files: list[Path], out: Path, seeds: int, gpus: int, shared: int, sets) -> float:
    """Seconds of one study; 0 GPUs are the CPU, with so many runs at a time."""
    words = [sys.executable, "-m", "ipar_sparse", "experiment", "v1", "--slides", *map(str, files)]
    words += ["--seeds", f"0-{seeds - 1}", "--out", str(out), "--overwrite"]
    words += ["--runs-per-gpu", str(shared)] if gpus else ["--device", "cpu", "--jobs", str(shared)]
    words += [word for one in sets for word in ("--set", one)]
    seen = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))} if gpus else {}
    began = time.monotonic()
    subprocess.run(words, check=True, env=os.environ | seen, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gpus", default="1", help="of each study; 0 is the CPU")
    parser.add_argument("--runs-per-gpu", default="4", help="of each study")
    parser.add_argument("--runs", type=int, default=40, help=f"of a study, a multiple of {SLIDES}")
    parser.add_argument("--spots", type=int, default=4000, help="cells of a slide")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of all runs")
    parser.add_argument("--out", type=Path, default=Path("studies"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    files = [given.out / f"slide{i}.h5ad" for i in range(SLIDES)]
    slides = simulate("cortex", slides=SLIDES, spots=given.spots, genes=300, seed=0)
    for slide, path in zip(slides, files, strict=True):
        write_slide(slide, path)
    counts = [[int(one) for one in text.split(",")] for text in (given.gpus, given.runs_per_gpu)]
    device = torch.device("cuda" if max(counts[0]) else "cpu")
    record = harness.Record(given.out / "studies.json", device)
    record.more = {"spots": given.spots, "settings": [*SHORT, *given.set]}
    for gpus, shared in zip(*counts, strict=True):
        out = given.out / f"{gpus}x{shared}"
        took = seconds(files, out, given.runs // SLIDES, gpus, shared, [*SHORT, *given.set])
        record.add(
            {
                "gpus": gpus,
                "runs_per_gpu": shared,
                "runs": given.runs,
                "seconds": took,
                "runs_per_minute": 60 * given.runs / took,
            }
        )


if __name__ == "__main__":
    main()
