"""From a trained run to positions of cells that have none."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..config import RunConfig
from ..data.expression import match_genes
from ..data.slide import Slide
from ..errors import UserError
from ..estimators.atlas import Atlas, CountAtlas
from ..estimators.relevant_components import RelevantComponents, compared, narrowed
from ..estimators.scaler import EmbeddingScaler
from ..geometry.alignment import align
from ..geometry.gauge import gauge_fix, principal_plane
from ..graph import NeighborTable, knn_candidates, pooled_candidates
from ..layout.distance_correction import correct_distances, relative_variance
from ..layout.refinement import refine_layout
from ..layout.uncertainty import predict_rmse
from ..nn import EdgeGateSoft, IPALiteModel
from ..train.counts import slide_counts
from ..train.fit import TRANSFER, build_encoder, build_gate_and_model, embed_raw, settle
from ..train.selection import EXPECTED, MIDDLE, REFINE, Transfer
from .checkpoint import find_checkpoint, load_checkpoint, read_meta

logger = logging.getLogger(__name__)

_AROUND = 15  # cells by which the last step tells whether a layout is blurred
_NARROWED = (
    "Only along its long axis does this map say where cells lie; across it they stand apart by how "
    "they differ, and the tissue is wider than it shows"
)


@dataclass
class Prediction:
    """One slide, predicted.

    Args:
        pos: positions (n, 2), unit-RMS gauge.
        embedding: (n, d), what the model was given.
        candidates: nearest neighbours in the embedding.
        nearest: candidates that the last step draws a cell to.
        graph: what the model attends to: the candidates, or on a slide larger than a miniset the
            nearest in a random sample.
        gate_logits: raw gate logits (E,) or (E, heads) on that, None without a gate.
        doubt: mean square distance of a cell from where the atlas of the run places it (n,), as a
            share of that of all cells from the middle of the tissue; None without an atlas.
        trajectory: layouts before the first recycle and after each, each (n, 2); of the last,
            :meth:`Predictor.expected` and :meth:`Predictor.refined` make ``pos``.
        uncertainty: how far a cell is to be expected from its place (n,), root mean square, in
            tissue radii (:func:`~ipar_sparse.layout.uncertainty.expected_error`): by what the atlas of the
            run leaves open and by how far noise seeds move the cell, one or both, in the size of
            the errors on donors left out; None for one seed without an atlas.
        cautions: lines that whoever reads the map must know.
    """

    pos: np.ndarray
    embedding: np.ndarray
    candidates: NeighborTable
    nearest: NeighborTable
    graph: NeighborTable
    gate_logits: Tensor | None = None
    doubt: Tensor | None = None
    trajectory: list[np.ndarray] = field(default_factory=list)
    uncertainty: np.ndarray | None = None
    cautions: list[str] = field(default_factory=list)


@dataclass
class Predictor:
    """A trained run, ready to place cells.

    Args:
        run: the run directory it came from.
        config: the run's configuration.
        meta: what its checkpoint says of itself.
        encoder: expression to embedding; None where users bring their own.
        scale, gate, model: the trained modules, in evaluation mode.
        device: where they lie.
        atlas: of the training slides, None where the run does not begin from one.
        spared: settings of ``refine`` whose steps were tried on donors left out and found to gain
            nothing.
        nearness: of the training slides, None in runs saved before there was any.
        errors: how the square error of a cell follows its doubt, as donors left out showed.
    """

    run: Path
    config: RunConfig
    meta: dict
    encoder: nn.Module | None
    scale: EmbeddingScaler
    gate: EdgeGateSoft
    model: IPALiteModel
    device: torch.device
    atlas: Atlas | CountAtlas | None = None
    spared: tuple[str, ...] = ()
    nearness: RelevantComponents | None = None
    errors: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def load(cls, run: Path, device: torch.device | str = "cpu") -> Predictor:
        """Read the best weights of a run.

        Raises:
            UserError: if the folder is no run, or its checkpoint is damaged.
        """
        run, device = Path(run), torch.device(device)
        asked = RunConfig.load(run)
        path = find_checkpoint(run)
        meta = read_meta(path)
        config = settle(asked, meta["facts"])
        modules: dict[str, nn.Module] = {"scale": EmbeddingScaler(meta["dim"])}
        modules["gate"], modules["model"] = build_gate_and_model(config, meta["dim"])
        if meta["genes"] is not None:
            modules["encoder"] = build_encoder(config, len(meta["genes"]))
        if config.model.start == "atlas":
            facts = meta["facts"]
            modules["atlas"] = Atlas(
                meta["dim"],
                cells=facts.get("atlas_cells", 0),
                origins=facts.get("atlas_origins", False),
            )
        elif config.model.start == "fields":
            modules["atlas"] = CountAtlas(len(meta["genes"]))
        if "nearness" in meta.get("modules", ()):
            modules["nearness"] = RelevantComponents(meta["dim"])
        load_checkpoint(path, modules)
        for module in modules.values():
            module.to(device).eval().requires_grad_(False)
        return cls(
            run=run,
            config=config,
            meta=meta,
            encoder=modules.get("encoder"),
            scale=modules["scale"],
            gate=modules["gate"],
            model=modules["model"],
            device=device,
            atlas=modules.get("atlas"),
            spared=tuple(
                name
                for name in ("expected", "steps")
                if getattr(asked.refine, name) is None and getattr(config.refine, name) == 0
            ),
            nearness=modules.get("nearness"),
            errors=_errors(config.model.start, meta["facts"]),
        )

    def embed(self, slide: Slide) -> np.ndarray:
        """Embeddings (n, d) float32 of a slide's cells.

        Raises:
            UserError: if the slide shares no gene with the run, or lacks its embedding.
        """
        genes = self.meta["genes"]
        if genes is not None and slide.expression is not None:
            _, missing = match_genes([slide], genes)
            if missing:
                logger.warning(
                    "%s lacks %d of the %d genes of the run (%s, ...): taken as average",
                    slide.name,
                    len(missing),
                    len(genes),
                    ", ".join(missing[:3]),
                )
        if slide.empty.any():
            logger.warning(
                "%s: %d cells have no counts; they are placed as average cells",
                slide.name,
                int(slide.empty.sum()),
            )
        h = embed_raw(slide, self.encoder, genes, self.device)
        if h.size(1) != self.meta["dim"]:
            raise UserError(
                f"{slide.name}: the embedding has {h.size(1)} dimensions, the run was trained on "
                f"{self.meta['dim']}; give the embedding of the same model"
            )
        return self.scale(h.to(self.device)).cpu().numpy()

    @torch.no_grad()
    def predict(self, slide: Slide, seeds: int = 1) -> Prediction:
        """Place the cells of a slide from their expression alone; positions are not looked at.

        Args:
            slide: n cells.
            seeds: with more than one, that many layouts are also drawn under the noise of
                training and aligned; cells that move more are the more uncertain.
        """
        h = torch.from_numpy(self.embed(slide)).to(self.device)
        candidates = self.candidates(h)
        graph = self.graph(h, candidates)
        bias, logits = self.edge_bias(h, graph)
        start, doubt = self.start(h, slide)
        pos, trajectory = self.model(h, graph, edge_bias=bias, return_trajectory=True, start=start)
        nearest = self.nearest(h, candidates)
        before = self.expected(pos, h, doubt)
        after, cautions = self.refined(before, h, nearest), []
        if self.config.refine.narrow and after is not before:
            cautions.append(f"{_NARROWED} (refine.narrow {self.config.refine.narrow:g})")
        for caution in cautions:
            logger.warning("%s: %s", slide.name, caution)
        result = Prediction(
            pos=after.double().cpu().numpy(),
            embedding=h.cpu().numpy(),
            candidates=candidates,
            nearest=nearest,
            graph=graph,
            gate_logits=logits,
            doubt=doubt,
            trajectory=[step.double().cpu().numpy() for step in trajectory],
            cautions=cautions,
        )
        moved = self._moved(h, slide, start, result.trajectory[-1], seeds) if seeds > 1 else None
        said = None if doubt is None else doubt.double().cpu().numpy()
        result.uncertainty = predict_rmse(self.errors, said, moved)
        return result

    def candidates(self, h: Tensor) -> NeighborTable:
        """Nearest neighbours in the embedding, nearest first.

        Args:
            h: embeddings (n, d).
        """
        settings = self.config.graph
        return knn_candidates(h, settings.k, metric=settings.metric, backend=settings.backend)

    def graph(self, h: Tensor, candidates: NeighborTable | None = None) -> NeighborTable:
        """What the model attends to on the cells of a slide.

        A model that was trained on minisets knows candidates that reach over a good part of the
        tissue. On a whole slide the nearest ones are much nearer, and would refine a layout that
        nothing has unfolded: there they are the nearest in a random sample, which reach as far.
        Those that are nearest of all are left to the last step. A second pass over them, from the
        layout of the first, costs distances and gains no neighbours that the last step does not.

        Args:
            h: embeddings (n, d).
            candidates: their nearest, where they have been found.
        """
        settings = self.config.graph
        if not self.samples(len(h)):
            return self.candidates(h) if candidates is None else candidates
        return pooled_candidates(
            h,
            settings.k,
            settings.pool,
            metric=settings.metric,
            generator=torch.Generator().manual_seed(self.config.train.seed),
        )

    def samples(self, n: int) -> bool:
        """Whether the candidates that the model attends to are sampled on a slide of n cells."""
        settings = self.config
        if settings.model.start == "fields":  # they find neighbours that a far look would blur
            return False
        return settings.train.unit == "miniset" and 2 <= settings.graph.pool < n

    def nearest(self, h: Tensor, candidates: NeighborTable) -> NeighborTable:
        """Candidates for the last step: those of the model, or others where they are sought by
        what neighbours of the training slides have in common, or by leading components.

        Args:
            h: embeddings (n, d).
            candidates: of the model, nearest first.
        """
        settings = REFINE[MIDDLE] | self.config.refine.model_dump(exclude_none=True)
        whiten = settings["whiten"] if self.nearness is not None else 0
        if not (whiten or settings["power"]):
            return candidates
        h = compared(h, self.nearness, whiten, settings["power"])
        return knn_candidates(
            h, max(_AROUND, settings["neighbors"]), backend=self.config.graph.backend
        )

    def expected(
        self, pos: Tensor, h: Tensor, doubt: Tensor | None, always: bool = False
    ) -> Tensor:
        """A layout (n, 2) with distances as they are to be expected, as the configuration says.

        Args:
            pos: layout.
            h: embeddings (n, d).
            doubt: of the cells' places (n,), or None.
            always: also where the run was found to be better without.
        """
        steps = self.config.refine.expected
        if always and "expected" in self.spared:
            steps = EXPECTED
        elif steps is None:  # not tried: nothing tells how uncertain places are
            steps = 0 if doubt is None else EXPECTED
        return correct_distances(pos, doubt, h, steps=steps, seed=self.config.train.seed)

    def refined(
        self, pos: Tensor, h: Tensor, nearest: NeighborTable, always: bool = False
    ) -> Tensor:
        """A layout (n, 2) drawn to its nearest candidates, as the configuration says.

        Args:
            pos: layout.
            h: embeddings (n, d).
            nearest: candidates, nearest first, as :meth:`nearest` has them.
            always: also where the run was found to be better without.
        """
        settings = REFINE[MIDDLE] | self.config.refine.model_dump(
            exclude={"expected"}, exclude_none=True
        )
        del settings["whiten"], settings["power"]  # nearest were found by them
        if always and "steps" in self.spared:
            settings["steps"] = REFINE[MIDDLE]["steps"]
        begin = narrowed(pos, h, self.nearness, settings.pop("narrow"))
        return refine_layout(pos, nearest, **settings, seed=self.config.train.seed, begin=begin)

    def start(self, h: Tensor, slide: Slide) -> tuple[Tensor | None, Tensor | None]:
        """Where the recycles begin (n, 2): an atlas's layout, a plane, or None, which leaves it
        to the model's own MLP of the embedding; and :attr:`Prediction.doubt` of an atlas.

        Args:
            h: embeddings (n, d).
            slide: the same cells.
        """
        if self.atlas is None:
            plane = self.config.model.start == "pca"
            return (gauge_fix(principal_plane(h)) if plane else None), None
        if isinstance(self.atlas, CountAtlas):
            place, variance = self.atlas.posterior(slide_counts(slide, self.meta["genes"]))
        else:
            place, variance = self.atlas.moments(h)
        return gauge_fix(place), relative_variance(place, variance)

    def edge_bias(self, h: Tensor, graph: NeighborTable) -> tuple[Tensor | None, Tensor | None]:
        """The gate's share of the attention logits, and its raw logits; None without a gate."""
        if not self.config.model.gated:
            return None, None
        logits = self.gate(h, graph)
        return self.config.model.gate_weight * logits, logits

    def _moved(
        self, h: Tensor, slide: Slide, start: Tensor | None, pos: np.ndarray, seeds: int
    ) -> np.ndarray:
        """Mean squared distance by which training noise moves a cell (n,), layouts aligned.

        Before the last step: into which clump of neighbours that draws a cell differs from draw
        to draw, and says less of how wrong its place is.
        """
        square = np.zeros(len(pos))
        # as where training starts: no dimension takes more noise than it varies
        noise_h = h.std(0, correction=0).clamp(max=self.config.train.noise_h)
        for seed in range(seeds):
            generator = torch.Generator(self.device).manual_seed(seed)
            noisy = h + noise_h * torch.empty_like(h).normal_(generator=generator)
            graph = self.graph(noisy)
            if not isinstance(self.atlas, CountAtlas):  # which knows nothing of embeddings
                start = self.start(noisy, slide)[0]
            bias, _ = self.edge_bias(noisy, graph)
            aligned, _ = align(self.model(noisy, graph, edge_bias=bias, start=start), pos)
            square += np.square(aligned - pos).sum(-1)
        return square / seeds


def _errors(start: str, facts: dict) -> tuple[float, float]:
    """What donors left out showed of a start's errors; as on other sets where none were."""
    found = Transfer().errors | facts.get(TRANSFER, {}).get("errors", {})
    a, b = found[start]
    return float(a), float(b)
