"""Whole commands, each in a process of its own: what a person waits for, stage by stage.

For every size, slides are simulated outside the clock. ``train`` runs on two of them, or as many
as asked for, and validates on a third; ``predict`` places one more, whose layout is scored. Time
and memory of the stages are those that the commands themselves keep (``--profile``); the whole is
timed from outside. Beside the peaks stand the estimates that are made before a command begins. An
exponent b says that the time of a stage grows as n^b.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from ipar_sparse.config import RunConfig, load_config
from ipar_sparse.data.anndata_store import open_store
from ipar_sparse.data.headers import check_headers
from ipar_sparse.data.keys import Keys
from ipar_sparse.data.simulation import iter_slides
from ipar_sparse.data.writers import write_slide
from ipar_sparse.inference.costs import Cost, prediction_cost, training_cost
from ipar_sparse.metrics.layout import distance_metrics
from ipar_sparse.progress import size_text, stage

from . import harness

NAME = "end_to_end"
FITTED = 10_000, 1_000_000
"""Sizes between which exponents are fitted, where at least two of them were measured."""
PLACED = "placed.h5ad"
_SCORED = 5000  # cells of the placed slide
_LEAST_SHARE = 0.02  # of a command at the largest size; stages below it are not drawn


def run(
    sizes: Sequence[int],
    out: Path,
    device: torch.device,
    *,
    genes: int = 300,
    slides: int = 2,
    predict_cells: int | None = None,
    embedding: int | None = None,
    settings: Sequence[str] = (),
    seed: int = 0,
) -> dict:
    """Measures ``train`` and ``predict``; writes ``end_to_end.json`` and ``.png``, prints a table.

    Args:
        sizes: numbers of cells of a slide that is trained on.
        out: folder of the files.
        device: where the commands compute.
        genes: of the simulated slides.
        slides: that are trained on.
        predict_cells: of the slide that is placed; as many as of the others if left out.
        embedding: columns of an embedding that slides bring along in place of expression.
        settings: ``section.key=value`` for ``train``; its defaults if left out.
        seed: of the slides and the training.

    Returns:
        What the JSON file holds: machine, seconds of ``import torch``, one row a size, command and
        stage, and the exponents.
    """
    record = harness.Record(out / f"{NAME}.json", device)
    settings = [*settings, *(["data.embedding=obsm:X_embedding"] if embedding else [])]
    config = load_config(None, settings)
    kinds = {"genes": genes, "embedding": embedding, "slides": slides, "settings": settings}
    record.more |= kinds
    record.more["import_torch_seconds"] = _seconds([sys.executable, "-c", "import torch"])[0]
    print("import torch: {import_torch_seconds:.1f} s".format(**record.more), flush=True)
    for n in sorted(sizes):
        with tempfile.TemporaryDirectory(dir=out) as folder:
            given = {"genes": genes, "embedding": embedding}
            placed = predict_cells or n
            *known, cells = _simulate(Path(folder), slides, n, placed, seed, given)
            commands = _commands(known, cells, Path(folder), settings, seed, device)
            for command, words in commands:
                cost = _estimate(command, known, cells, config, device.type == "cuda")
                size = placed if command == "predict" else n
                for row in _measure(command, size, words, Path(folder), cost):
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
        if len(set(n)) < 2 or seconds.min() <= 0:
            continue
        last = own[int(n.argmax())]
        fit = {"command": command, "stage": name, "share": last["share"]}
        slope = float(np.polyfit(np.log(n), np.log(seconds), 1)[0])
        found.append(fit | {"exponent": slope, "seconds": last["seconds"], "fitted": n.tolist()})
    return found


def _simulate(folder: Path, slides: int, n: int, placed: int, seed: int, given: dict) -> list[Path]:
    """Files of slides to train on, one to validate on, and one of ``placed`` cells."""
    paths = [folder / f"slide{number}.h5ad" for number in range(1, slides + 3)]
    with stage(f"Simulating {n:,} cells", total=len(paths)) as task:
        known = iter_slides("cortex", slides=slides + 1, spots=n, seed=seed, **given)
        # another seed is another slide of the same tissue
        last = iter_slides("cortex", slides=1, spots=placed, seed=seed + 1, **given)
        for path, slide in zip(paths, chain(known, last), strict=True):
            write_slide(slide, path, compression=None)
            task.advance()
    return paths


def _commands(
    known: Sequence[Path], cells: Path, folder: Path, settings, seed: int, device
) -> list[tuple[str, list[str]]]:
    *slides, val = map(str, known)
    run_folder, more = str(folder / "run"), ["--device", str(device)]
    chosen = [word for one in settings for word in ("--set", one)]
    train = ["train", *slides, "--val", val, "--out", run_folder, "--seed", str(seed), *chosen]
    predict = ["predict", run_folder, str(cells), "--out", str(folder / PLACED)]
    return [("train", [*train, *more]), ("predict", [*predict, *more])]


def _estimate(
    command: str, known: Sequence[Path], cells: Path, config: RunConfig, on_gpu: bool
) -> Cost:
    """What the command says beforehand that it will take."""
    if command == "predict":
        sizes = check_headers([cells], config.data, require_pos=False)
        return prediction_cost(sizes, config, on_gpu)
    sizes = check_headers(known, config.data, require_pos=True)
    return training_cost(sizes[:-1], sizes[-1:], config, on_gpu)


def _score(placed: Path) -> dict:
    """How well the placed slide's distances are ranked, over a sample of pairs."""
    with open_store(placed) as store:
        layouts = [store["obsm"][key][:] for key in (Keys.PREDICTION, Keys.SPATIAL)]
    rows = np.random.default_rng(0).permutation(len(layouts[0]))[:_SCORED]
    found = distance_metrics(*(layout[rows] for layout in layouts))
    return {"distance_spearman": found["distance_spearman"]}


def _measure(command: str, n: int, words: list[str], folder: Path, cost: Cost) -> list[dict]:
    """One row for the whole command, then one for each stage."""
    profile = folder / "profile.json"
    argv = [sys.executable, "-m", "ipar_sparse", *words, "--profile", str(profile)]
    seconds, error = _seconds(argv)
    whole = {"command": command, "n": n, "stage": "all"}
    if error:
        return [whole | {"failed": error}]
    kept = json.loads(profile.read_text())
    peaks = {name: kept[name] for name in ("host_peak_bytes", "device_peak_bytes")}
    more = {"device_busy": _busy(kept["stages"])}
    more |= {"host_estimate_bytes": cost.host, "device_estimate_bytes": cost.device}
    if command == "predict":
        more |= _score(folder / PLACED)
    rows = [whole | {"seconds": seconds, "share": 1.0, **peaks, **more}]
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
    for name, key in (("host", "host"), ("GPU", "device")):
        if row.get(f"{key}_peak_bytes"):
            text += f"  {name} {size_text(row[f'{key}_peak_bytes'])}"
        if row.get(f"{key}_estimate_bytes"):
            text += f" (estimate {size_text(row[f'{key}_estimate_bytes'])})"
    if row.get("device_busy") is not None:
        text += f"  GPU busy {row['device_busy']:.0%}"
    if "distance_spearman" in row:
        text += f"  distance Spearman {row['distance_spearman']:.3f}"
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
