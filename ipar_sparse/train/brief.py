"""Short trainings of a cross-validation, each of which can be stopped and gone on with."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..files import atomic_write, parse_json
from .loop import KeptLoop, TrainingLoop
from .run_folder import PARTS

logger = logging.getLogger(__name__)


class BriefTrainings:
    """Short trainings and what came out of them, kept in a folder as they are done.

    Args:
        run: the loop of the run, which says when to stop.
    """

    def __init__(self, run: TrainingLoop):
        self.run, self.folder = run, run.out / PARTS
        self.folder.mkdir(exist_ok=True)

    @property
    def device(self) -> torch.device:
        """Where steps are computed."""
        return self.run.device

    def loop(self, name: str, stage: str, modules: Mapping[str, nn.Module]) -> KeptLoop:
        """The loop of one training, with its modules as they were left.

        Args:
            name: of the training.
            stage: the first, see :data:`STAGES`.
            modules: name to module; restored where the training has begun.
        """
        path, run = self.folder / f"{name}.safetensors", self.run
        loop = KeptLoop(path, run.seed, run.device, run.stop, run.stop_if_late)
        loop.state.stage, loop.modules = stage, dict(modules)
        try:
            loop.restore()
        except UserError as error:
            logger.warning("%s: this part is computed again", str(error).partition(";")[0])
            loop.path.unlink()
        return loop

    def results(self, name: str) -> list[dict[str, Any]]:
        """What :meth:`keep` wrote."""
        try:
            return parse_json((self.folder / f"{name}.json").read_text())
        except (OSError, ValueError):
            return []

    def keep(self, name: str, results: Sequence[Mapping[str, Any]]) -> None:
        """Writes results that JSON can hold."""
        atomic_write(self.folder / f"{name}.json", json.dumps(list(results)))
