"""What a run records of itself: a CSV history and TensorBoard curves."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_write

HISTORY = "history.csv"
"""Name of the CSV history in a run directory."""
TERM_COLUMNS = {
    "rw_kl": "l_rw",
    "stress_log": "l_stress",
    "multiscale": "l_multiscale",
    "gram": "l_gram",
    "long_range": "l_long",
    "repulsion": "l_rep",
    "entropy_reg": "l_ent",
}
"""Terms of the supervision, and the columns of the history that hold them."""
SCORES = ("e_geo", "l_rw", "l_stress", "lambda_ratio", "median_distance")
"""What a validation measures of a layout."""
_STEP_COLUMNS = "step stage epoch seconds lr w_rw grad_norm loss".split()
_ENCODER_COLUMNS = "infonce distance invariance variance covariance".split()
COLUMNS = (
    *_STEP_COLUMNS,
    *TERM_COLUMNS.values(),
    "l_gate",
    *_ENCODER_COLUMNS,
    *(f"val_{graph}_{name}" for graph in ("tedge", "hgate") for name in SCORES),
    "val_e_geo_floor",
    "best",
)
"""Columns of the history."""


class History:
    """CSV log with one row per logged step; resuming cuts off what came after the checkpoint.

    Args:
        path: the CSV file; can be read while it grows.
        columns: all columns, ``step`` first; values missing from a row are left empty.
        resume_step: continue the file and drop rows of later steps; None starts a new one.
    """

    def __init__(self, path: Path, columns: Sequence[str], resume_step: int | None = None):
        if "step" not in columns:
            raise ValueError(f"a history needs a `step` column; got {list(columns)}")
        self.path, self.columns = Path(path), list(columns)
        kept: list[dict[str, Any]] = []
        if resume_step is not None and self.path.exists():
            kept = [row for row in read_history(self.path) if row["step"] <= resume_step]
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        atomic_write(self.path, text.getvalue())
        self._file = open(self.path, "a", newline="", buffering=1)
        self._writer = csv.DictWriter(self._file, self.columns, lineterminator="\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row and flushes it.

        Raises:
            ValueError: the row has a column that was not declared.
        """
        self._writer.writerow(row)

    def close(self) -> None:
        self._file.close()


def read_history(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV history: numbers as int or float, texts as they are, empty cells left out.

    A last line cut short by a crash is dropped.
    """
    text = Path(path).read_text()
    complete = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(io.StringIO(complete))
    return [{k: _number(v) for k, v in row.items() if v not in ("", None)} for row in rows]


class TensorBoard:
    """TensorBoard curves in ``folder``; steps after ``resume_step`` are purged on resuming."""

    def __init__(self, folder: Path, resume_step: int | None = None):
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=30)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds every finite number in ``values`` at ``step``."""
        for name, value in values.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class RunLog:
    """The history of a run and its TensorBoard curves, opened when something is first written.

    Args:
        out: the run directory.
        resumed: whether they go on where a checkpoint left them.
    """

    def __init__(self, out: Path, resumed: bool):
        self.out, self.resumed = out, resumed and (out / HISTORY).exists()
        self._began = time.monotonic()
        self._writers: tuple[History, TensorBoard] | None = None

    def write(self, stage: str, values: Mapping[str, Any], step: int) -> None:
        """Adds a row, numbered by the finished steps of all stages."""
        if self._writers is None:
            start = step if self.resumed else None
            history = History(self.out / HISTORY, COLUMNS, resume_step=start)
            self._writers = history, TensorBoard(self.out / "tensorboard", resume_step=start)
        history, board = self._writers
        seconds = round(time.monotonic() - self._began, 3)
        row = {"step": step, "stage": stage, "seconds": seconds, **values}
        history.write({name: value for name, value in row.items() if name in COLUMNS})
        board.write(step, {f"{stage}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Closes the files."""
        for writer in self._writers or ():
            writer.close()


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
