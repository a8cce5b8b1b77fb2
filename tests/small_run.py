"""Settings of a run that trains in a second, of one in ten, and a way to stop between two steps."""

import threading

from ipar_sparse.config import RunConfig, load_config
from ipar_sparse.train.loop import TrainingLoop

SMALL = [
    "encoder.steps=6",
    "encoder.hidden=[24]",
    "encoder.out=16",
    "model.dim=16",
    "model.channels=16",
    "model.heads=2",
    "model.head_channels=8",
    "model.recycles=2",
    "model.init=pca",
    "train.minisets=4",
    "train.miniset_min=40",
    "train.miniset_max=60",
    "train.epochs=3",
    "train.warmup_epochs=1",
    "train.ramp_epochs=1",
    "train.gate_steps=3",
    "train.val_minisets=2",
    "train.device=cpu",
    "graph.k=12",
    "data.max_genes=60",
    "selection.mode=none",
]

TRUST = [
    "encoder.steps=100",
    "encoder.hidden=[64]",
    "encoder.out=32",
    "model.dim=32",
    "model.channels=32",
    "model.heads=2",
    "model.head_channels=8",
    "model.recycles=2",
    "train.minisets=20",
    "train.miniset_min=150",
    "train.miniset_max=250",
    "train.epochs=3",
    "train.warmup_epochs=1",
    "train.ramp_epochs=1",
    "train.gate_steps=20",
    "train.val_minisets=4",
    "train.device=cpu",
    "graph.k=30",
    "selection.mode=none",
]
"""Settings of the run that the tests marked ``trust`` share."""

QUICK = [
    *(one for one in SMALL if not one.startswith(("selection.", "model.init"))),
    "model.init=atlas",
    "refine.distance_correction_steps=0",
    "refine.steps=20",
    "refine.anchor_weight=5",
    "refine.rca_power=0.5",
    "encoder.steps=60",
    "train.gate_steps=20",
    "train.epochs=6",
]
"""Settings of a run that selects, and predicts in a moment: for the tests that kill and mangle."""


def small_config(*overrides: str, preset: str | None = None) -> RunConfig:
    """The settings above, with some changed: ``small_config("train.epochs=1")``."""
    return load_config(overrides=[*SMALL, *overrides], preset=preset)


def stop_after(monkeypatch, stage: str, step: int) -> threading.Event:
    """An event for ``fit(stop=...)`` that is set when so many steps of a stage are done."""
    event, count = threading.Event(), TrainingLoop.count

    def counted(loop, running, losses):
        count(loop, running, losses)
        if (running.name, loop.state.step) == (stage, step):
            event.set()

    monkeypatch.setattr(TrainingLoop, "count", counted)
    return event
