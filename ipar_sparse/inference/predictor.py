"""From a trained run to positions of cells that have none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from ..config import RunConfig
from ..data.expression import in_memory
from ..data.input_profile import InputProfile, informative
from ..data.records import recorded_inputs
from ..data.slide import Slide, log_notes
from ..errors import UserError
from ..estimators import Adapter, Atlas, EmbeddingScaler, RelevantComponents, Typicality
from ..estimators.adapter import mean_and_variance, mixture
from ..estimators.atlas import nearest_in_lattice
from ..estimators.modes import places_of
from ..geometry.alignment import square_displacement
from ..graph import NeighborTable
from ..layout.uncertainty import ErrorModel, predict_rmse, widen
from ..nn import EdgeGateSoft, IPALiteModel, SharedEncoder
from ..progress import stage, track
from . import steps
from .adapting import shares_of, why_adapted
from .checkpoint import read_checkpoint, states_of
from .embedding import embed_slide
from .input_check import in_terms_of, load_profile
from .modules import build_encoder, build_gate_and_model, build_typicality
from .run_folder import find_checkpoint
from .typicality import UNLIKE, SlideTypicality, check_size, compare

logger = logging.getLogger(__name__)


@dataclass
class Prediction:
    """One slide, predicted.

    Args:
        pos: positions (n, 2), unit-RMS gauge, of the cells that hold information.
        embedding: (n, d), what the model was given.
        refinement_graph: nearest cells that the refinement pulled each cell towards.
        graph: what the model attended to: the candidates, or on a slide larger than a miniset the
            nearest in a random sample.
        settings: the configuration in effect: that of the run, but for what the adapter changes.
        gate_logits: raw gate logits (E,) or (E, heads) on that graph, None without a gate.
        predictive_variance: mean square distance of each cell from its place in the initial layout
            (n,), relative to the variance of the tissue; None where nothing tells it.
        trajectory: layouts (n, 2) before the first recycle and after each.
        uncertainty: predicted root mean square error of each cell (n,), in tissue radii.
        typicality: how like the training cells they are; None for a run that does not tell.
        cautions: lines that whoever reads the map must know.
        adapted: why the adapter placed the cells, in words; None where it did not.
        places: positions (n, 2) by the adapter in the common frame of the training slides, and
            their predictive variance (n,), in RMS radii; None where it did not place the cells.
        shares: what the adapter took the cells by; see
            :func:`~ipar_sparse.inference.adapting.shares_of`.
    """

    pos: np.ndarray
    embedding: np.ndarray
    refinement_graph: NeighborTable
    graph: NeighborTable
    settings: RunConfig
    gate_logits: Tensor | None = None
    predictive_variance: Tensor | None = None
    trajectory: list[np.ndarray] = field(default_factory=list)
    uncertainty: np.ndarray | None = None
    typicality: SlideTypicality | None = None
    cautions: list[str] = field(default_factory=list)
    adapted: str | None = None
    places: tuple[np.ndarray, np.ndarray] | None = None
    shares: tuple[sparse.csr_matrix, np.ndarray] | None = None
    _candidates: Callable[[], NeighborTable] | None = None

    @cached_property
    def candidates(self) -> NeighborTable:
        """Nearest neighbours in the embedding; sought now, where placing the cells needed none."""
        assert self._candidates is not None
        return self._candidates()


@dataclass
class Predictor:
    """A trained run, ready to place cells.

    Args:
        run: the run directory it came from.
        config: the configuration that the run was computed with.
        meta: what its checkpoint says of itself.
        encoder: expression to embedding; None where users bring their own.
        scaler, gate, model: the trained modules, in evaluation mode.
        relevant_components: of the training slides.
        device: where they lie.
        atlas: of the training slides; None for a run of an earlier version that has none.
        recorded: what the run says of its slides; see
            :func:`~ipar_sparse.data.records.recorded_inputs`.
        profile: what it knows of its input; None of a run on an embedding.
        typicality: of the training slides; None for a run of an earlier version.
        adapter: of the training slides; None on an embedding, or for a run of an earlier version.
    """

    run: Path
    config: RunConfig
    meta: dict
    encoder: SharedEncoder | None
    scaler: EmbeddingScaler
    gate: EdgeGateSoft
    model: IPALiteModel
    relevant_components: RelevantComponents
    device: torch.device
    atlas: Atlas | None = None
    recorded: dict = field(default_factory=dict)
    profile: InputProfile | None = None
    typicality: Typicality | None = None
    adapter: Adapter | None = None

    @classmethod
    def load(cls, run: str | Path, device: torch.device | str = "cpu") -> Predictor:
        """Read the best weights of a run.

        Raises:
            UserError: if the folder is no run, or its checkpoint is damaged.
        """
        run, device = Path(run), torch.device(device)
        config = RunConfig.load(run)
        path = find_checkpoint(run)
        document, tensors = read_checkpoint(path)
        meta = document["meta"]
        with torch.device("meta"):  # settings that do not fit may ask for more than fits in memory
            states_of(_modules(config, meta), tensors, path)
        modules = _modules(config, meta)
        for name, state in states_of(modules, tensors, path).items():
            modules[name].load_state_dict(state)
        recorded = recorded_inputs(run)
        for module in modules.values():
            module.to(device).eval().requires_grad_(False)
        return cls(
            run=run,
            config=config,
            meta=meta,
            encoder=modules.get("encoder"),
            scaler=modules["scaler"],
            gate=modules["gate"],
            model=modules["model"],
            relevant_components=modules["relevant_components"],
            device=device,
            atlas=modules.get("atlas"),
            recorded=recorded,
            profile=load_profile(recorded, config, meta),
            typicality=modules.get("typicality"),
            adapter=modules.get("adapter"),
        )

    def conform(self, slide: Slide, ignore_case: bool | None = None) -> Slide:
        """A slide in the terms of the run; what was done and what may be wrong is noted on it.

        Args:
            slide: as it was read.
            ignore_case: whether letter case of gene names is disregarded; as the run did if left
                out.

        Raises:
            UserError: the run cannot place the slide; the line says why.
        """
        return in_terms_of(self.run, self.profile, slide, ignore_case)

    def _prepared(self, slide: Slide) -> Slide:
        """The cells of a slide that hold information, in the terms of the run."""
        found = self.conform(slide)
        if found is not slide:  # whoever conforms a slide beforehand tells its notes
            log_notes(found, logger, first=len(slide.notes))
        return informative(in_memory(found, self.meta["genes"] or ()))

    def embed(self, slide: Slide) -> np.ndarray:
        """Embeddings (n, d) float32 of those of a slide's cells that hold information.

        Raises:
            UserError: if the slide shares no gene with the run, or lacks its embedding.
        """
        return self._embedding(slide).cpu().numpy()

    @torch.no_grad()
    def _embedding(self, slide: Slide) -> Tensor:
        """The same on the device."""
        slide = self._prepared(slide)
        h = embed_slide(slide, self.encoder, self.meta["genes"], self.device)
        if h.size(1) != self.meta["dim"]:
            raise UserError(
                f"{slide.name}: the embedding has {h.size(1)} dimensions, the run was trained on "
                f"{self.meta['dim']}; give the embedding of the same model"
            )
        h = self.scaler(h)
        if not bool(h.isfinite().all()):
            raise UserError(
                f"{slide.name}: its values are too large to be embedded; check them, or say what "
                "they are by --counts or --normalized"
            )
        return h

    @torch.no_grad()
    def predict(
        self, slide: Slide, noise_samples: int = 1, adapt: bool | None = None
    ) -> Prediction:
        """Place the cells of a slide from their expression alone; positions are not looked at.

        Cells without information take no part; ``informative(predictor.conform(slide))`` has the
        others.

        Args:
            slide: its n cells that hold information are placed.
            noise_samples: with more than one, that many layouts are also predicted under the noise
                of training and aligned; cells that move more are more uncertain.
            adapt: whether the adapter places the cells; as ``adapter.mode`` says if left out.

        Raises:
            UserError: the slide has fewer than 15 cells with counts, shares no gene with the run,
                or lacks its embedding.
        """
        config = self.config
        slide = self._prepared(slide)
        check_size(slide)
        with stage("Embedding"):
            h = self._embedding(slide)
        with stage("Typicality"):
            typicality = self.compare(slide)
        candidates = cache(lambda: steps.candidate_graph(h, config))
        with stage("Candidates"):
            graph = steps.attention_graph(h, candidates, config)
        with stage("Initial layout"):
            why, shares = self._adapted(slide, adapt)
            places = None if shares is None else self._adapted_places(shares, h)
            initial, variance = steps.initial_layout(h, config, self.atlas, places)
        if places is None:
            with stage("Passes of attention"):
                bias, logits = steps.gate_bias(self.gate, h, graph, config)
                trajectory = steps.recycle(self.model, h, graph, bias, initial)
        else:  # the passes were trained on what the encoder makes of training cells
            config = config.with_values({"refine.anchor_weight": config.adapter.anchor_weight})
            assert initial is not None
            logits, trajectory = None, [initial]
        with stage("Neighbours for refinement"):
            nearest = steps.refinement_graph(h, candidates, self.relevant_components, config)
        with stage("Distance correction"):
            pos = steps.correct_distances(trajectory[-1], h, variance, config)
        with stage("Refinement"):
            pos = steps.refine(pos, nearest, config)
        layouts = [layout.double().cpu().numpy() for layout in trajectory]
        displacement = None
        if noise_samples > 1 and places is None:
            displacement = self._displacement(h, initial, trajectory[-1], noise_samples)
        return Prediction(
            pos=pos.double().cpu().numpy(),
            embedding=h.cpu().numpy(),
            _candidates=candidates,
            refinement_graph=nearest,
            graph=graph,
            gate_logits=logits,
            predictive_variance=variance,
            trajectory=layouts,
            uncertainty=self.uncertainty_of(len(h), variance, displacement, typicality),
            typicality=typicality,
            settings=config,
            adapted=why,
            places=None if places is None else _on_host(places),
            shares=shares,
        )

    def _adapted(
        self, slide: Slide, adapt: bool | None
    ) -> tuple[str | None, tuple[sparse.csr_matrix, np.ndarray] | None]:
        """Why the adapter takes part in placing these cells, and by what; None if it does not."""
        settings = self.config.adapter
        if adapt is not None:
            settings = settings.model_copy(update={"mode": "always" if adapt else "never"})
        if self.adapter is None or self.profile is None:
            return None, None
        shares = shares_of(slide, self.meta["genes"], self.profile)
        why = why_adapted(self.adapter, slide, shares, self.recorded.get("cells", ()), settings)
        if why is None:
            return None, None
        logger.info("%s: placed with the adapter for other assays, since %s", slide.name, why)
        return why, shares

    def _adapted_places(
        self, shares: tuple[sparse.csr_matrix, np.ndarray], h: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Places of the adapter, averaged with those of the atlas, and their variance.

        Which of the two is better depends on how much the encoder makes of cells that it has not
        seen the like of. The average is about as good as the better one.
        """
        assert self.adapter is not None
        found = [mean_and_variance(self.adapter.posterior(*shares), self.adapter.places)]
        if self.atlas is not None:
            found.append(self.atlas.mean_and_variance(h))
        return mixture(found)

    @torch.no_grad()
    def frame_places(self, prediction: Prediction) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the common frame of the training slides, and their predictive variance.

        Args:
            prediction: of a slide.

        Returns:
            (n, 2) in RMS radii of a slide and (n,) in squared ones, float64.
        """
        if prediction.places is not None:
            return prediction.places
        assert self.atlas is not None
        h = torch.from_numpy(prediction.embedding).to(self.device)
        return _on_host(self.atlas.mean_and_variance(h))

    @torch.no_grad()
    def distribution(
        self, prediction: Prediction, block: int = 1024
    ) -> tuple[Tensor, Iterator[Tensor]]:
        """Where each cell of a prediction may be, as :meth:`Atlas.distribution` says.

        Args:
            prediction: of a slide.
            block: cells at once.
        """
        assert self.atlas is not None
        h = torch.from_numpy(prediction.embedding).to(self.device)
        grid, blocks = self.atlas.distribution(h, block)
        if prediction.shares is None:
            return grid, blocks
        others = self.adapter_distribution(prediction.shares, grid, block)
        return grid, ((own + other) / 2 for own, other in zip(blocks, others, strict=True))

    @torch.no_grad()
    def adapter_distribution(
        self, shares: tuple[sparse.csr_matrix, np.ndarray], grid: Tensor, block: int
    ) -> Iterator[Tensor]:
        """Weights (b, P) of the adapter on a lattice, block of cells by block.

        Args:
            shares: of :func:`~ipar_sparse.inference.adapting.shares_of`.
            grid: lattice (P, 2) of :meth:`Atlas.distribution`.
            block: cells at once.
        """
        assert self.adapter is not None
        seat = nearest_in_lattice(grid, self.adapter.places)
        for rows in self.adapter.posterior(*shares, block):
            yield rows.new_zeros(len(rows), len(grid)).scatter_add_(1, seat.expand_as(rows), rows)

    def top_places(self, prediction: Prediction, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The most probable places of each cell, by :mod:`~ipar_sparse.estimators.modes`.

        Args:
            prediction: of a slide.
            count: places of a cell.

        Returns:
            Places (n, count, 2) in the common frame of the training slides, and weights (n, count).
        """
        return _on_host(places_of(*self.distribution(prediction), count))

    def compare(self, slide: Slide) -> SlideTypicality | None:
        """How like the training slides a slide is; None for a run of an earlier version."""
        if self.typicality is None:
            return None
        config = self.config
        target_sum = config.data.target_sum or 1e4
        return compare(self.typicality, slide, self.meta["genes"], target_sum, config.typicality)

    def uncertainty_of(
        self,
        cells: int,
        variance: Tensor | None,
        displacement: np.ndarray | None = None,
        typicality: SlideTypicality | None = None,
    ) -> np.ndarray:
        """Predicted root mean square error of each cell (n,), in tissue radii.

        Args:
            cells: n.
            variance: predictive variance (n,), None where there is none.
            displacement: mean square distance by which noise moves each cell (n,).
            typicality: with it, the error grows as cells are unlike the training cells.
        """
        law = self.config.uncertainty
        model = ErrorModel(
            law.error_intercept or 0.0, law.error_slide_slope or 0.0, law.error_slope or 0.0
        )
        known = None if variance is None else variance.double().cpu().numpy()
        weight = law.prior_weight if law.calibrated else 1.0
        square = model.square(known, cells, weight, law.prior_exponent)
        rmse = predict_rmse(square, displacement, law.noise_share)
        if typicality is None:
            return rmse
        below, unlike = self.config.typicality.growth_below, typicality.verdict == UNLIKE
        return widen(rmse, typicality.p_value, below, unlike)

    def _displacement(
        self, h: Tensor, initial: Tensor | None, pos: Tensor, samples: int
    ) -> np.ndarray:
        """Mean squared distance by which training noise moves a cell (n,), layouts aligned.

        Before refinement: which cells it draws together differs from draw to draw, and says less
        of how wrong a cell's place is.
        """
        square = torch.zeros(len(pos), dtype=torch.float64, device=pos.device)
        # as in training: no dimension takes more noise than it varies
        level = h.std(0, correction=0).clamp(max=self.config.train.noise_h)
        for seed in track(range(samples), "Noise samples"):
            generator = torch.Generator(self.device).manual_seed(seed)
            noisy = h + level * torch.empty_like(h).normal_(generator=generator)
            graph = steps.attention_graph(noisy, None, self.config)
            if initial is not None:
                initial = steps.initial_layout(noisy, self.config, self.atlas)[0]
            bias, _ = steps.gate_bias(self.gate, noisy, graph, self.config)
            moved = steps.recycle(self.model, noisy, graph, bias, initial)[-1]
            square += square_displacement(moved, pos)
        return (square / samples).cpu().numpy()


def _modules(config: RunConfig, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The untrained modules of a run, by their names in its checkpoint."""
    dim = meta["dim"]
    gate, model = build_gate_and_model(config, dim)
    modules: dict[str, nn.Module] = {
        "scaler": EmbeddingScaler(dim),
        "gate": gate,
        "model": model,
        "relevant_components": RelevantComponents(dim),
    }
    if meta["genes"] is not None:
        modules["encoder"] = build_encoder(config, len(meta["genes"]))
    if "atlas_cells" in meta["metadata"]:  # runs of earlier versions have one by some settings
        modules["atlas"] = Atlas(dim, cells=meta["metadata"]["atlas_cells"])
    if sizes := meta["metadata"].get("adapter"):
        modules["adapter"] = Adapter(len(meta["genes"]), config.adapter.temperature, **sizes)
    if sizes := meta["metadata"].get("typicality"):
        modules["typicality"] = build_typicality(config, sizes)
    return modules


def _on_host(found: tuple[Tensor, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    place, variance = (values.double().cpu().numpy() for values in found)
    return place, variance
