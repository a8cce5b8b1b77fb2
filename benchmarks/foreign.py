"""How many foreign cells are flagged: of types, of organs, of tissues that training slides lack.

    python -m benchmarks.foreign SLIDES... --label cell_type --out DIR
    python -m benchmarks.foreign SLIDES... --label cell_type --organ 'Gut tube,Definitive endoderm'
    python -m benchmarks.foreign SLIDES... --cells OTHER.h5ad

Each donor is held out in turn, and a label is left out of the training slides. Cells of the
held-out slide that have it are mixed with the others: a tenth of all, or as many as there are.
Labels of at least ``--least`` cells on every slide are tried; ``--organ`` names some that are left
out together. ``--cells`` are of another tissue, mixed in over the genes that they share with the
slides, whatever their letter case. What flags cells is fitted on expression alone, so nothing is
trained. Writes ``foreign.json``, one row a case and slide. Prints the share flagged at the p-value
of 0.05 that runs go by, the false alarms which that makes, and the share flagged where 5 % of own
cells are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from ipar_sparse.config import RunConfig
from ipar_sparse.data.expression import normalized_expression
from ipar_sparse.data.input_profile import profile_inputs
from ipar_sparse.data.readers import read_files
from ipar_sparse.data.slide import Slide
from ipar_sparse.data.splits import find_donors, plan_folds
from ipar_sparse.files import write_json
from ipar_sparse.inference.typicality import compare
from ipar_sparse.train.typicality import fit_typicality

SHARE = 0.1
ALARMS = 0.05
_TOTAL = 1e4


def mixed(own: Slide, other: Slide, seed: int = 0) -> tuple[Slide, np.ndarray]:
    """Own cells and others, a tenth of all or as many as there are; which are foreign (n,)."""
    wanted = min(other.num_cells, round(own.num_cells * SHARE / (1 - SHARE)))
    chosen = np.random.default_rng(seed).permutation(other.num_cells)[:wanted]
    parts = [
        normalized_expression(slide, [*map(str, own.genes)], _TOTAL)
        for slide in (own, other.take(np.sort(chosen)))
    ]
    foreign = np.arange(own.num_cells + wanted) >= own.num_cells
    names = np.arange(len(foreign)).astype(str)
    matrix = sparse.vstack(parts, format="csr")
    return Slide(own.name, matrix, own.genes, names, normalized=True), foreign


def flagged(
    known: Sequence[Slide], donors: Mapping[str, str], whole: Slide, foreign: np.ndarray
) -> dict[str, float]:
    """Shares of foreign and own cells that are flagged, by what the known slides teach."""
    config = RunConfig()
    known, profile, _ = profile_inputs(known, config.data)
    found = fit_typicality(known, donors, profile.genes, config)
    p_value = compare(found, whole, profile.genes, _TOTAL, config.typicality).p_value
    limit, known_p = config.typicality.foreign_p_value, np.isfinite(p_value)
    own, other = p_value[~foreign & known_p], p_value[foreign & known_p]
    return {
        "genes": len(profile.genes),
        "cells": len(own),
        "foreign": len(other),
        "flagged": float((other <= limit).mean()),
        "false_alarms": float((own <= limit).mean()),
        "flagged_at_5": float((other <= np.quantile(own, ALARMS)).mean()),
    }


def left_out(slides: Sequence[Slide], given: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """What training slides are made to lack: a name, and its labels."""
    if given.organ:
        yield from ((organ, organ.split(",")) for organ in given.organ)
        return
    labels = [np.asarray(slide.obs[given.label]).astype(str) for slide in slides]
    for label in sorted(set(labels[0])):
        if all((one == label).sum() >= given.least for one in labels):
            yield label, [label]


def over_shared_genes(slides: Sequence[Slide], other: Slide) -> list[Slide]:
    """Counts of the genes that all share; of logarithms, what was behind them."""
    data = RunConfig().data.model_copy(update={"max_genes": None, "ignore_case": True})
    known, profile, _ = profile_inputs([*slides, other], data)
    genes, found = np.array(profile.genes), []
    for slide in known:
        order = pd.Index(slide.genes.astype(str)).get_indexer(genes)
        matrix = slide.expression[:, order].tocsr().astype(np.float32)
        matrix = matrix.expm1() if slide.normalized else matrix
        found.append(Slide(slide.name, matrix, genes, slide.cell_names, slide.pos))
    return found


def cases(
    slides: Sequence[Slide], given: argparse.Namespace
) -> Iterator[tuple[str, list[Slide], Slide, Slide]]:
    """Name of what is foreign, training slides, own cells and foreign ones."""
    other = None
    if given.cells is not None:
        (read,) = read_files([given.cells], RunConfig().data, require_pos=False)
        *slides, other = over_shared_genes(slides, read)
    donors = find_donors(slides, None, given.donor_pattern, None)
    for name, labels in [(given.cells.stem, [])] if other else left_out(slides, given):
        has = {s.name: np.isin(np.asarray(s.obs.get(given.label)), labels) for s in slides}
        for fold in plan_folds(donors, "donor")[0]:
            rest = {s.name: s.take(np.flatnonzero(~has[s.name])) if labels else s for s in slides}
            for slide in (s for s in slides if s.name in fold.test):
                foreign = other or slide.take(np.flatnonzero(has[slide.name]))
                yield name, [rest[one] for one in fold.seen], rest[slide.name], foreign


def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slides", nargs="+", type=Path)
    parser.add_argument("--label", default="cell_type", help="obs column of cell types")
    parser.add_argument("--organ", nargs="*", help="labels that are left out together: A,B")
    parser.add_argument("--cells", type=Path, help="cells of another tissue")
    parser.add_argument("--least", type=int, default=50, help="cells of a label on each slide")
    parser.add_argument("--donor-pattern")
    parser.add_argument("--out", type=Path, default=Path("foreign"))
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    slides, rows = read_files(given.slides, RunConfig().data, require_pos=True), []
    donors = find_donors(slides, None, given.donor_pattern, None)
    for name, known, own, other in cases(slides, given):
        row = {"foreign_cells": name, "slide": own.name}
        rows.append(row | flagged(known, donors, *mixed(own, other)))
        print(json.dumps(rows[-1]), flush=True)
    write_json(given.out / "foreign.json", rows)
    shown = ["genes", "cells", "foreign", "flagged", "false_alarms", "flagged_at_5"]
    means = pd.DataFrame(rows).groupby("foreign_cells", sort=False)[shown].mean()
    means.loc["mean"] = means.mean()
    print(means.round(3).to_string())


if __name__ == "__main__":
    main()
