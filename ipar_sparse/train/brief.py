"""Short trainings of a cross-validation, each of which can be stopped and gone on with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from ..config import RunConfig
from ..data.slide import Slide
from ..distributed import apart
from ..errors import UserError
from ..estimators import Atlas, RelevantComponents
from ..inference import steps
from ..inference.modules import build_encoder, build_gate_and_model
from ..progress import stage
from ..supervision.walk import WalkTarget
from .batches import EmbeddedSlide, Share, build_batch
from .encoder import train_encoder
from .loop import KeptLoop, Loop, TrainingLoop
from .model import RecordedSteps, Trained
from .run_folder import PARTS

logger = logging.getLogger(__name__)

_CELLS = 1000  # of the slide of random numbers
_STEPS = 3  # the second is recorded, and the third replayed


def load_kernels(
    config: RunConfig, width: int, device: torch.device, genes: Sequence[str] | None = None
) -> None:
    """Compile and load what a GPU trains and places with, as a stage of its own, by steps on
    random numbers.

    Else the first training would wait for it: some seconds, and more where nothing is compiled.

    Args:
        config: without open values.
        width: of the embedding.
        device: where encoder, gate and model are to be trained.
        genes: of the encoder; None where embeddings are brought along.
    """
    settings = config.train
    with stage("Loading kernels"), apart():
        if genes is not None:
            _learn(config, genes, device)
        gate, model = build_gate_and_model(config, width)
        parts = Trained(gate.to(device), model.to(device), config, device)
        take = RecordedSteps(parts, parts.optimizer(gate, model), parts.grad_scaler())
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
            take(Share([batch], [range(1)], n, 1), [[settings.seed]], settings.epochs)
        gate.eval(), model.eval()
        _place(parts, torch.randn(_CELLS, width, generator=generator).to(device))


def _learn(config: RunConfig, genes: Sequence[str], device: torch.device) -> None:
    """Train an encoder for some steps, with all that is computed before them and after."""
    rng, shape = np.random.default_rng(0), (_CELLS, len(genes))
    counts = sparse.random(*shape, 0.05, "csr", dtype=np.float32, random_state=rng)
    names = np.arange(_CELLS).astype(str)
    slide = Slide("", counts, np.asarray(genes), names, pos=rng.random((_CELLS, 2)))
    encoder = build_encoder(config, len(genes)).to(device)
    brief = config.replace(encoder={"steps": _STEPS})
    train_encoder(encoder, [slide], genes, brief, Loop(config.train.seed, device))


@torch.no_grad()
def _place(parts: Trained, h: Tensor) -> None:
    """Place cells by their embeddings (n, d), with the steps of a prediction."""
    config = parts.config.replace(
        refine={"distance_correction_steps": _STEPS, "steps": _STEPS, "skip_if_overlap": 2.0}
    )
    known = [(h, torch.rand(len(h), 2, dtype=torch.float64).to(h.device))]
    atlas, relevant = (
        fitted(h.size(1)).fit(known).to(h.device) for fitted in (Atlas, RelevantComponents)
    )
    initial, variance = steps.initial_layout(h, config, atlas)
    graph = steps.attention_graph(h, None, config)
    bias, _ = steps.gate_bias(parts.gate, h, graph, config)
    layout = steps.recycle(parts.model, h, graph, bias, initial)[-1]
    layout = steps.correct_distances(layout, h, variance, config)
    candidates = steps.candidate_graph(h, config)
    steps.refine(layout, steps.refinement_graph(h, candidates, relevant, config), config)


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
