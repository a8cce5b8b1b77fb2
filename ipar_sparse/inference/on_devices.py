"""Prediction on several devices from a script: the command does it, in processes of its own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from anndata import AnnData, read_h5ad

from ..data.keys import Keys
from ..data.sources import Cells
from ..data.writers import write_anndata
from ..distributed import RankLost, launch
from ..errors import UserError
from ..progress import console
from .placing import Additions

_OFF = {"normalized": "--counts", "ignore_case": "--match-case", "adapt": "--no-adapt"}


def place_on_devices(
    run: Path, cells: Cells, devices: int, device: str, **options: Any
) -> Additions:
    """What ``ipar-sparse predict --devices`` finds of an object or a file.

    Args:
        run: folder of the run.
        cells: AnnData, or a file.
        devices: number of GPUs, or of processes on the CPU.
        device: ``"cuda"`` or ``"cpu"``.
        **options: of the command, by their names in :meth:`ipar_sparse.IPAR.predict`.

    Raises:
        UserError: in a notebook, with fewer devices, a reference in memory, or what the command
            refuses.
    """
    shown = f"ipar-sparse predict {run} CELLS.h5ad --out PLACED.h5ad --devices {devices}"
    if console.is_jupyter:
        raise UserError(f"devices= works in scripts; beside this notebook, run `{shown}`")
    if isinstance(options.get("reference"), AnnData):
        raise UserError("with devices=, name the reference as the run does, or give its file")
    with tempfile.TemporaryDirectory(prefix="ipar_sparse-") as folder:
        out, source = Path(folder) / "placed.h5ad", cells
        if isinstance(cells, AnnData):
            source = Path(folder) / "cells.h5ad"
            write_anndata(cells, source)
        words = ["-m", "ipar_sparse", "predict", str(run), os.fspath(source), "--out", str(out)]
        words += ["--out-obsm-only", "--device", device, *_words(options)]
        try:
            code = launch(words, devices, device)
        except RankLost as error:
            raise UserError(f"{error}; nothing was filled") from None
        if code:
            raise UserError(f"nothing was filled; the line above says why (`{shown}`)")
        return _additions(read_h5ad(out))


def _words(options: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is False and name in _OFF:
            words.append(_OFF[name])
        elif value is True:
            words.append(flag)
        elif value is not None and value is not False and value != ():
            several = isinstance(value, list | tuple)
            words += [flag, ",".join(value) if several else str(value)]
    return words


def _additions(placed: AnnData) -> Additions:
    obsm = {key: placed.obsm[key] for key in placed.obsm}
    pos, embedding = obsm.pop(Keys.PREDICTION), obsm.pop(Keys.EMBEDDING)
    obs = {key: placed.obs[key].to_numpy() for key in placed.obs}
    return Additions(embedding, obs, placed.uns[Keys.UNS], pos, obsm)
