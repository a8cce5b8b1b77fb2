"""Published programs, naive matches and this package on the same slides, scored alike.

    python -m benchmarks.peers SLIDES... --hold-out donor --donor-pattern '^.' --out DIR
    python -m benchmarks.peers SLIDES... --cells CELLS.h5ad --same-frame --out DIR

Held-out slides, or the cells, are placed from expression alone. A program that takes one slide is
given the one most alike: whose mean expression correlates most with that of the cells. Each program
runs with its own defaults in an environment of its own, which is made in ``--environments``, or by
an interpreter that has all, ``--python``. Writes ``peers.json``, one row a program and slide, the
positions as ``SLIDE.PROGRAM.npz``, and prints a table. A row that is there is not made again.
With ``--study DIR`` of ``experiment --cells`` it also prints by how much that exceeds them, with
standard errors.
``--only SLIDE`` splits the work over processes; ``--merge`` adds the rows that they wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from ipar_sparse.config import DataConfig
from ipar_sparse.data.input_profile import profile_inputs
from ipar_sparse.data.readers import read_files
from ipar_sparse.data.slide import Slide
from ipar_sparse.data.splits import find_donors, plan_folds
from ipar_sparse.errors import UserError
from ipar_sparse.evaluation.block_bootstrap import CELLS, study_gains
from ipar_sparse.evaluation.naive import NAIVE, closest, log_normalized
from ipar_sparse.evaluation.study_plan import load_plan
from ipar_sparse.files import write_json
from ipar_sparse.metrics.layout import evaluate_layout
from ipar_sparse.report.study import print_gains

from .programs import PROGRAMS, Attempt, install, run

OWN = "ipar_sparse"
SCORES = {
    "distance_spearman": "distances",
    "neighbor_hit@15": "neighbours",
    "procrustes": "Procrustes error",
    "median_error": "median error",
}


def cases(given: argparse.Namespace) -> Iterator[tuple[str, list[Slide], Slide]]:
    """Name, training slides and cells to place, of every fold."""
    data = DataConfig(spatial_key=given.spatial_key)
    slides = read_files(given.slides, data, require_pos=True)
    if given.cells is not None:
        (cells,) = read_files([given.cells], data, require_pos=True)
        yield cells.name, slides, cells
        return
    donors = find_donors(slides, given.donor_key, given.donor_pattern, None)
    for fold in plan_folds(donors, given.hold_out)[0]:
        known = [slide for slide in slides if slide.name in (*fold.train, fold.val)]
        for slide in slides:
            if slide.name in fold.test and (not given.only or slide.name in given.only):
                yield slide.name, known, slide


def in_common_terms(slides: Sequence[Slide], cells: Slide) -> list[anndata.AnnData]:
    """Counts of the genes that all share; of logarithms, what was behind them."""
    known, profile, _ = profile_inputs([*slides, cells], DataConfig(max_genes=None))
    found = []
    for slide in known:
        order = pd.Index(slide.genes.astype(str)).get_indexer(list(profile.genes))
        matrix = slide.expression[:, order].tocsr().astype(np.float32)
        one = anndata.AnnData(
            matrix.expm1() if slide.normalized else matrix,
            obs=pd.DataFrame(index=pd.Index(slide.cell_names.astype(str))),
            var=pd.DataFrame(index=pd.Index(list(profile.genes))),
            obsm={"spatial": slide.pos},
        )
        one.uns["name"] = slide.name
        found.append(one)
    return found


def most_alike(slides: Sequence[anndata.AnnData], cells: anndata.AnnData) -> anndata.AnnData:
    """The slide whose mean expression correlates most with that of the cells."""
    mean = log_normalized(cells.X).mean(axis=0)
    return slides[closest([log_normalized(one.X).mean(axis=0) for one in slides], mean)]


def attempts(
    slides: Sequence[anndata.AnnData],
    cells: anndata.AnnData,
    done: set[str],
    given: argparse.Namespace,
) -> Iterator[tuple[str, str, Attempt]]:
    """Program, slide that it was given, and what it left behind."""
    slide = most_alike(slides, cells)
    name = slide.uns["name"]
    for label, match in NAIVE.items():
        if label not in done:
            logs = log_normalized(slide.X), slide.obsm["spatial"], log_normalized(cells.X)
            begin = time.monotonic()
            yield label, name, Attempt(match(*logs), "done", time.monotonic() - begin)
    for label in given.programs:
        if label in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            job = Path(folder)
            (job / "slides").mkdir()
            for i, one in enumerate(slides):
                one.write_h5ad(job / "slides" / f"{i:03d}.h5ad")
            slide.write_h5ad(job / "slide.h5ad")
            unplaced = cells.copy()
            del unplaced.obsm["spatial"]
            unplaced.write_h5ad(job / "cells.h5ad")
            python = Path(sys.executable if label == OWN else given.python or "")
            if label != OWN and not given.python:
                if error := install(label, given.environments):
                    yield label, name, Attempt(None, "did not install", error=error)
                    continue
                python = given.environments / label / "bin" / "python"
            yield label, name, run(label, python, job, given.minutes, given.gigabytes)


def scored(found: Attempt, true: np.ndarray, same_frame: bool) -> dict[str, float]:
    """Scores of positions, and their median distance from the truth where both share a frame."""
    if found.pos is None:
        return {}
    values = evaluate_layout(found.pos, true)
    if same_frame:
        frame = found.pos if found.in_frame is None else found.in_frame
        error = np.linalg.norm(frame - true, axis=1)
        values["median_error"] = float(np.nanmedian(error))
    return {name: float(values[name]) for name in SCORES if name in values}


def table(rows: Sequence[dict]) -> str:
    """Means over slides, program by program; how many slides each placed."""
    lines = [["program", "placed", *SCORES.values(), "seconds", "GB", ""]]
    for program in dict.fromkeys(row["program"] for row in rows):
        own = [row for row in rows if row["program"] == program]
        placed = [row for row in own if row["state"] == "done"]
        cells = [program, f"{len(placed)} of {len(own)}"]
        for name in (*SCORES, "seconds", "gigabytes"):
            values = [row[name] for row in placed if row.get(name) is not None]
            cells.append(f"{np.mean(values):.3g}" if values else "-")
        failed = dict.fromkeys(row["state"] for row in own if row["state"] != "done")
        lines.append([*cells, ", ".join(failed)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def gathered(paths: Iterable[Path]) -> list[dict]:
    """Rows of these files, the first of each slide and program; a missing file has none."""
    rows: dict[tuple[str, str], dict] = {}
    for path in paths:
        for row in json.loads(path.read_text()) if path.is_file() else []:
            rows.setdefault((row["slide"], row["program"]), row)
    return list(rows.values())


def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slides", nargs="*", type=Path, help="slides with positions")
    parser.add_argument("--cells", type=Path, help="cells to place; positions only to score")
    parser.add_argument("--same-frame", action="store_true", help="cells lie in the slide's frame")
    parser.add_argument("--hold-out", default="slide", help="slide, donor, or names")
    parser.add_argument("--donor-key")
    parser.add_argument("--donor-pattern")
    parser.add_argument("--spatial-key", default="spatial")
    names = [OWN, *PROGRAMS]
    parser.add_argument("--programs", nargs="*", default=names, choices=names, metavar="NAME")
    parser.add_argument("--only", nargs="*", default=[], help="place these of the held-out slides")
    parser.add_argument("--environments", type=Path, default=Path("peer-environments"))
    parser.add_argument("--python", help="an interpreter that has the programs; none is installed")
    parser.add_argument(
        "--merge", nargs="*", type=Path, default=[], help="add rows of these peers.json"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="that a program may take")
    parser.add_argument("--gigabytes", type=float, default=16.0, help="of memory, likewise")
    parser.add_argument("--out", type=Path, default=Path("peers"))
    parser.add_argument("--study", type=Path, help="of experiment --cells on the same cells")
    given = parser.parse_args(argv)
    given.environments = given.environments.absolute()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "peers.json"
    rows = gathered([path, *given.merge])
    write_json(path, rows)
    try:
        for name, slides, target in cases(given):
            members = in_common_terms(slides, target)
            true = np.asarray(members[-1].obsm["spatial"])
            done = {row["program"] for row in rows if row["slide"] == name}
            for program, onto, found in attempts(members[:-1], members[-1], done, given):
                row = {"slide": name, "program": program, "onto": onto, "cells": len(true)}
                row |= {"genes": members[-1].n_vars, "state": found.state, "error": found.error}
                row |= {"seconds": round(found.seconds, 1), "gigabytes": found.gigabytes or None}
                rows.append(row | scored(found, true, given.same_frame))
                if found.pos is not None:
                    kept = given.out / f"{name}.{program.replace(' ', '_')}.npz"
                    names = members[-1].obs_names.to_numpy(str)
                    np.savez_compressed(kept, **{CELLS: names, "pos": found.pos})
                write_json(path, rows)
                print(json.dumps(rows[-1]), flush=True)
    except UserError as error:
        parser.error(str(error))
    print(table(rows))
    if given.study is not None:
        folders = [one.parent for one in (path, *given.merge)]
        further = [found for folder in folders for found in sorted(folder.glob("*.npz"))]
        study = load_plan(given.study)
        print_gains(study_gains(given.study, study, further), study.reference)


if __name__ == "__main__":
    main()
