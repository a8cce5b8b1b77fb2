"""Short trainings of a cross-validation, each of which can be stopped and gone on with."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from ..config import RunConfig
from ..distributed import apart
from ..errors import UserError
from ..inference.modules import build_gate_and_model
from ..progress import stage
from ..supervision.walk import WalkTarget
from .batches import EmbeddedSlide, Share, build_batch
from .loop import KeptLoop, TrainingLoop
from .model import RecordedSteps, Trained
from .run_folder import PARTS

logger = logging.getLogger(__name__)


def load_kernels(config: RunConfig, width: int, device: torch.device) -> None:
    """Compile and load what a GPU trains with, as a stage of its own, by steps on random numbers.

    Else the first training would wait for it: some seconds, and more where nothing is compiled.

    Args:
        config: without open values.
        width: of the embedding.
        device: where encoder, gate and model are to be trained.
    """
    settings = config.train
    with stage("Loading kernels"), apart():
        torch.linalg.eigh(torch.eye(64, dtype=torch.float64, device=device))
        gate, model = build_gate_and_model(config, width)
        parts = Trained(gate.to(device), model.to(device), config, device)
        steps = RecordedSteps(parts, parts.optimizer(gate, model), parts.grad_scaler())
        generator = torch.Generator().manual_seed(settings.seed)
        few, many = settings.miniset_min, settings.miniset_max
        # walks of each length, and numbers of cells that kernels take for aligned and not
        for n in sorted({few, few + 1, (few + many) // 2, max(few, many - 1), many}):
            pos = torch.rand(n, 2, generator=generator, dtype=torch.float64)
            h = torch.randn(n, width, generator=generator)
            initial = pos.float() if config.model.init == "atlas" else None
            batch = build_batch(EmbeddedSlide("", h, pos, initial), config, settings.seed)
            batch = batch.to(device)
            assert isinstance(batch.target.walk, WalkTarget)
            batch.target.walk.cache_reference()
            steps(Share([batch], [range(1)], n, 1), [[settings.seed]], settings.epochs)


class BriefTrainings:
    """Short trainings, kept in a folder as they are done.

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

    def loop(self, name: str, first: str, modules: Mapping[str, nn.Module]) -> KeptLoop:
        """The loop of one training, with its modules as they were left.

        Args:
            name: of the training.
            first: its first stage, see :data:`STAGES`.
            modules: name to module; restored where the training has begun.
        """
        path, run = self.folder / f"{name}.safetensors", self.run
        loop = KeptLoop(path, run.seed, run.device, run.stop, run.stop_if_late)
        loop.state.stage, loop.modules = first, dict(modules)
        try:
            loop.restore()
        except UserError as error:
            logger.warning("%s: this part is computed again", str(error).partition(";")[0])
            loop.path.unlink()
        return loop
