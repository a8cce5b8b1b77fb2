"""What the tests of several ranks compute on each: ``python -m tests.rank_work NAME OUT``."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anndata import concat
from safetensors.torch import load_file

from ipar_sparse import distributed as ranks
from ipar_sparse.config import RunConfig, load_config
from ipar_sparse.data.dissociated import read_dissociated
from ipar_sparse.data.held import Elsewhere
from ipar_sparse.data.readers import read_files
from ipar_sparse.data.simulation import simulate
from ipar_sparse.data.writers import to_anndata
from ipar_sparse.errors import UserError
from ipar_sparse.inference.modules import build_gate_and_model
from ipar_sparse.inference.placing import place_cells, read_cells
from ipar_sparse.inference.predictor import Predictor
from ipar_sparse.inference.run_folder import BEST
from ipar_sparse.train import augmentation
from ipar_sparse.train.batches import Batches, EmbeddedSlide
from ipar_sparse.train.fit import fit
from ipar_sparse.train.history import HISTORY, read_history
from ipar_sparse.train.loop import Loop
from ipar_sparse.train.model import Trained, train_gate, train_model
from ipar_sparse.train.sharing import fill_ranks
from tests.small_run import QUICK, SMALL, small_config


def exchange() -> dict[str, Any]:
    """What every exchange gives."""
    number, layer = ranks.rank(), torch.nn.Linear(2, 1)
    layer.weight.data.fill_(float(number))
    ranks.alike({"layer": layer})
    errors = []
    for compute in (lambda: ranks.agree("slides", f"file{number}"), lambda: _fail_on_last()):
        try:
            compute()
        except UserError as error:
            errors.append(str(error))
    asked = ["train.steps_per_epoch=5", "train.gate_steps=4", "train.lr=0.0002"]
    minisets = fill_ranks(small_config(*asked, "train.batch_kind=miniset"), [100, 100]).train
    whole = small_config(*asked, "train.batch_kind=slide")
    return {
        "filled": [minisets.batch_size, minisets.steps_per_epoch, minisets.gate_steps],
        "rate": minisets.lr / 0.0002,
        "slides_per_step": [
            fill_ranks(whole, cells).train.slides_per_step
            for cells in ([100, 100], [100], [9e5] * 2)
        ],
        "gathered": ranks.gathered(number),
        "first": ranks.from_first(number + 7),
        "largest": ranks.largest(number, -number),
        "summed": ranks.summed(torch.tensor([1.0, number])).tolist(),
        "alike": layer.weight.flatten().tolist(),
        "shared_out": ranks.shared_out([10, 11, 12], lambda one: (one, number)),
        "shares": ranks.gathered([*ranks.share_of(3)]),
        "errors": errors,
        "told_by": sum(ranks.gathered(ranks.tells())),
    }


def _fail_on_last() -> None:
    def compute(one: int) -> int:
        if one == 2:
            raise UserError(f"item {one} failed")
        return one

    ranks.shared_out([1, 2], compute)


class _Kept(Loop):
    """A loop that keeps the losses of all steps."""

    def __init__(self):
        super().__init__(0, torch.device("cpu"))
        self.losses: list[float] = []

    def count(self, stage, losses):
        self.losses.append(float(losses["loss"].detach()))
        super().count(stage, losses)


def losses(dtype: torch.dtype, kind: str, *more: str, cells: int = 150) -> list[float]:
    """Of every step of gate and model, on two small slides."""
    settings = ["train.epochs=2", "train.steps_per_epoch=20", "train.gate_steps=10", *TERMS]
    settings += ["train.batch_size=5", "train.slides_per_step=2", f"train.batch_kind={kind}"]
    config, slides = small_config(*settings, *more), []
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        pos = torch.rand(cells + 40 * number, 2, generator=generator, dtype=torch.float64)
        maps = torch.randn(2, 16, generator=generator, dtype=torch.float64)
        slides.append(EmbeddedSlide(f"slide{number}", (pos @ maps).sin().to(dtype), pos))
    torch.manual_seed(0)
    modules = [module.to(dtype) for module in build_gate_and_model(config, 16)]
    parts = Trained(*modules, config, torch.device("cpu"))
    loop, batches = _Kept(), Batches(slides, slides[:1], config, parts.device)
    train_gate(parts, batches, loop)
    train_model(parts, batches, loop)
    return loop.losses


TERMS = [
    "train.lambda_long=0.1",
    "train.lambda_multiscale=0.1",
    "train.vary_augmentation=true",
    "train.k_fraction_range=[0.1,0.2]",
    "train.mutual_prob=0.3",
    "train.minisets=12",
    "train.patience=9",
]
"""Every term of the loss, and all that is drawn at random."""


ROWS = [
    "train.slides_per_step=1",
    "train.k_fraction_range=null",
    "train.mutual_prob=0",
    "train.gate_noise=true",
    "train.probe_rows=50",
    "train.stress_pairs=300",
]
"""Settings with which ranks share the rows of one slide."""


def losses_in_blocks() -> list[float]:
    """Of slides of which 64 cells are drawn at once, and whose walk is a sample."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augmentation, "DRAWN_CELLS", 64)
        return losses(torch.float64, "slide", *ROWS, "train.epochs=1", cells=430)


def equal() -> dict[str, list[float]]:
    """Losses in both precisions, and of batches that are smaller than the number of ranks."""
    return {
        "float64": losses(torch.float64, "mixed"),
        "float32": losses(torch.float32, "mixed", "train.epochs=1"),
        "rows": losses(torch.float64, "slide", *ROWS),
        "rows in blocks": losses_in_blocks(),
        "one miniset": losses(torch.float64, "miniset", "train.batch_size=1", "train.epochs=1"),
    }


def selected() -> dict[str, Any]:
    """The settings of a run that selects, and its losses; ranks divide five files."""
    return _fitted([*QUICK, "train.batch_size=2", "selection.folds=3"])


def joined() -> dict[str, Any]:
    """The losses of a run whose slides are in one file, with components that follow the tissue."""
    more = ["data.slide_key=slide", "encoder.component_kind=spatial"]
    return _fitted([*SMALL, "train.batch_size=2", *more])


def _fitted(settings: list[str]) -> dict[str, Any]:
    out = Path(ranks.from_first(tempfile.mkdtemp())) / "run"
    config = load_config(overrides=settings)
    if ranks.leads():
        slides = simulate("cortex", slides=5, spots=140, genes=80, seed=3)
        tables = {slide.name: to_anndata(slide) for slide in slides}
        if config.data.slide_key is None:
            for name, table in tables.items():
                table.write_h5ad(out.parent / f"{name}.h5ad")
        else:
            table = concat(tables, label="slide", index_unique="-")
            table.write_h5ad(out.parent / "all.h5ad")
    ranks.barrier()
    reading = {"require_pos": True, "divided": True}
    files = sorted(out.parent.glob("*.h5ad"))
    slides = read_files(files, config.data, **reading)
    held = sum(not isinstance(slide.expression, Elsewhere) for slide in slides)
    assert held == len(ranks.share_of(5)), "a rank holds the expression of other ranks' slides"
    cells = read_dissociated([files[-1]], config.data) if len(files) > 1 else []
    fit(slides[:3], slides[3:4], config, out, cells=cells, device="cpu")
    losses = [row["loss"] for row in read_history(out / HISTORY) if "loss" in row]
    settings = RunConfig.load(out)
    decided = {key: settings.get(key) for key in RunConfig.load_request(out).unresolved()}
    parts = load_file(out / BEST)  # those that are fitted; losses tell of gate and model
    fitted = [name for name in parts if name.partition(".")[0] not in ("gate", "model")]
    norms = {name: float(parts[name].double().norm()) for name in fitted}
    return {"decided": decided, "losses": losses, "norms": norms}


def predict() -> dict[str, Any]:
    """Positions by every run of the folder, rows split over the ranks."""
    folder, found, split = Path(sys.argv[2]).parent, {}, {}
    for run in sorted((folder / "runs").iterdir()):
        predictor = Predictor.load(run)
        slides = read_cells(predictor, folder / "cells0.h5ad", predictor.config.data)
        with ranks.sharing_rows(slides[0].num_cells):
            split[run.name] = ranks.rows_of(1000) != slice(0, 1000)
            found[run.name] = place_cells(predictor, slides).pos.tolist()
    return found | {"split": split}


WORK: dict[str, Callable[[], Any]] = {"exchange": exchange, "equal": equal}
WORK |= {"selected": selected, "joined": joined, "predict": predict}


if __name__ == "__main__":
    name, out = sys.argv[1:]
    with ranks.joined("cpu"):
        found = ranks.gathered(WORK[name]())
    if ranks.leads():
        Path(out).write_text(json.dumps(found))
    ranks.leave()
