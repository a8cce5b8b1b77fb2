"""Whole commands, each in a process of its own: what a person waits for, stage by stage.

For every size, slides are simulated outside the clock. ``train`` runs on two of them and validates
on a third, ``predict`` places a fourth. Time and memory of the stages are those that the commands
themselves keep (``--profile``); the whole is timed from outside. An exponent b says that the time
of a stage grows as n^b.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ipar_sparse.data.simulation import iter_slides
from ipar_sparse.data.writers import write_slide
from ipar_sparse.progress import size_text, stage

from . import harness

NAME = "end_to_end"
FITTED = 10_000, 1_000_000
"""Sizes between which exponents are fitted, where at least two of them were measured."""
_LEAST_SHARE = 0.02  # of a command at the largest size; stages below it are not drawn


def run(
    sizes: Sequence[int],
    out: Path,
    device: torch.device,
    *,
    genes: int = 300,
    settings: Sequence[str] = (),
    seed: int = 0,
) -> dict:
    """Measures ``train`` and ``predict``; writes ``end_to_end.json`` and ``.png``, prints a table.

    Args:
        sizes: numbers of cells of a slide.
        out: folder of the files.
        device: where the commands compute.
        genes: of the simulated slides.
        settings: ``section.key=value`` for ``train``; its defaults if left out.
        seed: of the slides and the training.

    Returns:
        What the JSON file holds: machine, seconds of ``import torch``, one row a size, command and
        stage, and the exponents.
    """
    record = harness.Record(out / f"{NAME}.json", device)
    record.more["genes"], record.more["settings"] = genes, list(settings)
    record.more["import_torch_seconds"] = _seconds([sys.executable, "-c", "import torch"])[0]
    print("import torch: {import_torch_seconds:.1f} s".format(**record.more), flush=True)
    for n in sorted(sizes):
        with tempfile.TemporaryDirectory(dir=out) as folder:
            slides = _simulate(Path(folder), n, genes, seed)
            for command, words in _commands(slides, Path(folder), settings, seed, device):
                for row in _measure(command, n, words, Path(folder)):
                    record.add(row, _line(row))
    record.more["exponents"] = exponents(record.rows)
    record.save()
    print("\n" + "\n".join(_table(record.more["exponents"])))
    drawn = [
        {"task": row["command"], "implementation": row["stage"], **row}
        for row in record.rows
        if " / " not in row["stage"] and _is_drawn(row, record.more["exponents"])
    ]
    title = f"time of whole commands; {record.machine['device']}"
    harness.plot(out / f"{NAME}.png", title, drawn, {"seconds": "seconds"}, "log")
    return {"machine": record.machine, "rows": record.rows, **record.more}


def exponents(rows: Sequence[dict]) -> list[dict]:
    """How the time of each stage grows with the number of cells.

    Args:
        rows: with ``command``, ``stage``, ``n`` and ``seconds``; the stage ``all`` is the command.

    Returns:
        One row a command and stage that was measured at two sizes or more: ``exponent`` b of the
        least-squares fit of log t = a + b log n, the sizes ``fitted``, and at the largest size
        ``seconds`` and ``share`` of the command.
    """
    within = [row for row in rows if FITTED[0] <= row["n"] <= FITTED[1] and "seconds" in row]
    if len({row["n"] for row in within}) < 2:
        within = [row for row in rows if "seconds" in row]
    found = []
    for command, name in dict.fromkeys((row["command"], row["stage"]) for row in within):
        own = [row for row in within if (row["command"], row["stage"]) == (command, name)]
        n = np.array([row["n"] for row in own])
        seconds = np.array([row["seconds"] for row in own])
        if len(n) < 2 or seconds.min() <= 0:
            continue
        last = own[int(n.argmax())]
        fit = {"command": command, "stage": name, "share": last["share"]}
        slope = float(np.polyfit(np.log(n), np.log(seconds), 1)[0])
        found.append(fit | {"exponent": slope, "seconds": last["seconds"], "fitted": n.tolist()})
    return found


def _simulate(folder: Path, n: int, genes: int, seed: int) -> list[Path]:
    paths = [folder / f"slide{number}.h5ad" for number in range(1, 5)]
    with stage(f"Simulating {n:,} cells", total=len(paths)) as task:
        made = iter_slides("cortex", slides=len(paths), spots=n, genes=genes, seed=seed)
        for path, slide in zip(paths, made, strict=True):
            write_slide(slide, path, compression=None)
            task.advance()
    return paths


def _commands(slides, folder: Path, settings, seed: int, device) -> list[tuple[str, list[str]]]:
    a, b, val, cells = map(str, slides)
    run_folder, more = str(folder / "run"), ["--device", str(device)]
    chosen = [word for one in settings for word in ("--set", one)]
    train = ["train", a, b, "--val", val, "--out", run_folder, "--seed", str(seed), *chosen]
    predict = ["predict", run_folder, cells, "--out", str(folder / "placed.h5ad")]
    return [("train", [*train, *more]), ("predict", [*predict, *more])]


def _measure(command: str, n: int, words: list[str], folder: Path) -> list[dict]:
    """One row for the whole command, then one for each stage."""
    profile = folder / "profile.json"
    argv = [sys.executable, "-m", "ipar_sparse", *words, "--profile", str(profile)]
    seconds, error = _seconds(argv)
    whole = {"command": command, "n": n, "stage": "all"}
    if error:
        return [whole | {"failed": error}]
    kept = json.loads(profile.read_text())
    peaks = {name: kept[name] for name in ("host_peak_bytes", "device_peak_bytes")}
    busy = {"device_busy": _busy(kept["stages"])}
    rows = [whole | {"seconds": seconds, "share": 1.0, **peaks, **busy}]
    for one in kept["stages"]:
        name, share = one.pop("name"), one["seconds"] / seconds
        rows.append({"command": command, "n": n, "stage": name, "share": share, **one})
    top = [row for row in rows[1:] if " / " not in row["stage"]]
    rest = seconds - sum(row["seconds"] for row in top)
    left = {"seconds": rest, "share": rest / seconds}
    return [*rows, whole | {"stage": "between stages"} | left]


def _busy(stages: Sequence[dict]) -> float | None:
    """Share of the time of all stages in which the device worked."""
    known = [(one["seconds"], one["device_busy"]) for one in stages if " / " not in one["name"]]
    known = [(seconds, busy) for seconds, busy in known if busy is not None]
    total = sum(seconds for seconds, _ in known)
    return sum(seconds * busy for seconds, busy in known) / total if total else None


def _seconds(argv: list[str]) -> tuple[float, str | None]:
    """How long a process takes, and the last line of what it says if it fails."""
    began = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode == 0:
        return seconds, None
    return seconds, (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1][:200]


def _line(row: dict) -> str:
    text = f"n = {row['n']:<10,} {row['command']:<8} {row['stage']:<44}"
    if "failed" in row:
        return text + row["failed"]
    text += f"{row['seconds']:>9.2f} s {row['share']:>6.1%}"
    if "host_peak_bytes" in row:
        text += f"  host {size_text(row['host_peak_bytes'])}"
    if row.get("device_peak_bytes"):
        text += f"  GPU {size_text(row['device_peak_bytes'])}"
    if row.get("device_busy") is not None:
        text += f"  GPU busy {row['device_busy']:.0%}"
    return text


def _table(fits: Sequence[dict]) -> list[str]:
    lines = [f"{'command':<9}{'stage':<46}{'exponent':>9}{'seconds':>10}{'share':>8}"]
    for fit in fits:
        if fit["share"] >= _LEAST_SHARE:
            line = f"{fit['command']:<9}{fit['stage']:<46}{fit['exponent']:>9.2f}"
            lines.append(f"{line}{fit['seconds']:>10.1f}{fit['share']:>8.1%}")
    return lines


def _is_drawn(row: dict, fits: Sequence[dict]) -> bool:
    shares = {(fit["command"], fit["stage"]): fit["share"] for fit in fits}
    key = (row["command"], row["stage"])
    return "seconds" in row and shares.get(key, 1.0) >= _LEAST_SHARE
