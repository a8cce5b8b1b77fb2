"""Folds over donors: what one choice of settings reaches on donors that were left out.

Slides of a donor are left out together, an encoder and a model are trained briefly on the rest,
and the cells of the left-out slides are placed by the same steps as in a prediction. Slides that
are held out of the run take no part.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import RunConfig
from ..data.expression import Expression
from ..data.held import of_slides
from ..data.slide import Slide
from ..estimators import Atlas, EmbeddingScaler, RelevantComponents
from ..estimators.frames import FrameError, frame_errors
from ..estimators.regression import ridge_layout
from ..geometry.neighborhoods import TrueNeighborhoods
from ..graph import knn
from ..inference import steps
from ..inference.embedding import embed_slide, read_expression
from ..inference.modules import build_encoder, build_gate_and_model
from ..layout.uncertainty import square_errors
from ..metrics.correlation import pearson
from ..metrics.edges import true_edges
from ..metrics.layout import distance_ranks
from ..nn import SharedEncoder
from ..progress import stage
from .atlas import place_training_slides
from .batches import Batches, EmbeddedSlide
from .brief import BriefTrainings
from .encoder import append_components, train_encoder
from .model import Trained, train_gate, train_model

NEIGHBORS = 15
"""Nearest cells by which layouts are compared."""
_DISTANCE_CELLS = 500  # of a slide, all pairs of which are compared
CORRECTION = "refine.distance_correction_steps"
"""The setting of distance correction."""
_BEFORE_CORRECTION = "encoder.component_kind", "model.init", "model.recycling"


@dataclass(frozen=True)
class Budget:
    """How much a cross-validation may cost, all folds together.

    Args:
        cells: of a slide, at most, drawn at random.
        left_out: slides that a fold leaves out, at most; None for all.
        encoder: share of the encoder steps of the run.
        model: share of its gate steps and of its model steps.
        minisets: share of its minisets; a GPU replays the steps on those that it has seen.
        layout: share of the steps of distance correction and refinement, for each layout.
    """

    cells: int
    left_out: int | None
    encoder: float
    model: float
    minisets: float
    layout: float

    def per_fold(self, folds: int) -> Budget:
        """The share of one of so many folds."""
        shares = {name: getattr(self, name) / folds for name in ("encoder", "model", "minisets")}
        return replace(self, **shares)


# of 12 searches on real slides, layouts of a tenth of the steps scored 0.005 lower, each lower
QUICK = Budget(cells=1000, left_out=2, encoder=0.1, model=0.1, minisets=0.05, layout=0.15)
FULL = Budget(cells=3000, left_out=None, encoder=1.5, model=1.5, minisets=1.5, layout=1.0)


@dataclass(frozen=True)
class Scores:
    """Of the left-out donors of one fold.

    Args:
        distance: Spearman correlation of pairwise distances, of each donor.
        hit: share of the 15 nearest cells that are true neighbours, of each donor.
    """

    distance: tuple[float, ...]
    hit: tuple[float, ...]

    @property
    def balanced(self) -> tuple[float, ...]:
        """sqrt(distance * hit): a relative gain in either counts alike."""
        pairs = zip(self.distance, self.hit, strict=True)
        return tuple(math.sqrt(max(distance, 0.0) * hit) for distance, hit in pairs)


@dataclass
class HeldOutSlide:
    """A left-out slide in the embedding of a fold.

    Args:
        donor: whose it is.
        h: embeddings (n, d), on the device.
        pos: true positions (n, 2).
    """

    donor: str
    h: Tensor
    pos: np.ndarray

    def score(self, layout: Tensor) -> tuple[float, float]:
        """Distance Spearman, of all pairs of some cells, and neighbour hit of a layout (n, 2)."""
        layout = layout.double()
        rows, true = self._pairs
        distance, _ = pearson(distance_ranks(layout[rows.to(layout.device)]), true)
        found = true_edges(knn(layout, NEIGHBORS), self._near, NEIGHBORS)
        return distance, float((found / np.maximum(self._near.size[NEIGHBORS], 1)).mean())

    @cached_property
    def _pairs(self) -> tuple[Tensor, np.ndarray]:
        """Cells between which distances are compared, and the ranks of the true ones."""
        rows = np.random.default_rng(0).permutation(len(self.pos))[:_DISTANCE_CELLS]
        return torch.from_numpy(rows), distance_ranks(self.pos[rows])

    @cached_property
    def _near(self) -> TrueNeighborhoods:
        return TrueNeighborhoods(self.pos, (NEIGHBORS,))


@dataclass
class FoldModel:
    """What is fitted on the slides of a fold, in one embedding.

    Args:
        train: embedded slides that are learned from.
        test: embedded slides of the left-out donors.
        relevant_components: of the first.
        atlas: of the first.
    """

    train: list[EmbeddedSlide]
    test: list[HeldOutSlide]
    relevant_components: RelevantComponents
    atlas: Atlas


class DonorFold:
    """Slides to learn from, those of the left-out donors, and what settings reach on these.

    Args:
        name: of the fold, under which its trainings are kept.
        train: slides of the other donors, of ``budget.cells`` at most; see :func:`sampled`.
        test: slides of the left-out donors, likewise.
        donors: slide name to donor.
        genes: of the encoder; None where embeddings are brought along.
        config: settings of the run, those of the data decided.
        budget: how much this may cost.
        brief: where they are kept.
    """

    def __init__(
        self,
        name: str,
        train: Sequence[Slide],
        test: Sequence[Slide],
        donors: Mapping[str, str],
        genes: Sequence[str] | None,
        config: RunConfig,
        budget: Budget,
        brief: BriefTrainings,
    ):
        self.train, self.test = list(train), list(test)
        self.donors, self.genes, self.budget, self.brief = donors, genes, budget, brief
        self.config = _brief(config, budget, self.train)
        self.batch_kind = config.train.batch_kind
        self._memory: dict[Any, Any] = {}
        # settings that are extended before selection ends make other trainings
        self.name = f"{name}-{_digest(self.config, genes)}"

    def scores(self, values: Mapping[str, Any]) -> Scores:
        """What a choice of settings reaches on the left-out donors.

        Args:
            values: of all settings that are selected, by key.
        """
        return self._once(("scores", _key(values)), lambda: self._scores(values))

    def errors(self, values: Mapping[str, Any]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Square error of every cell (n,) and its predictive variance (n,), slide by slide."""
        found = []
        for number, slide in enumerate(self._fitted(values).test):
            layout = self._layout(number, values)
            variance = self._recycled(number, values)[1]
            known = None if variance is None else variance.double().cpu().numpy()
            found.append((square_errors(layout, slide.pos), known))
        return found

    def frame_errors(self, values: Mapping[str, Any]) -> dict[str, FrameError]:
        """Errors of the left-out slides in their own frames, by name of slide.

        Args:
            values: of all settings that are selected, by key.
        """
        fitted = self._fitted(values)
        known = [(slide.h, slide.pos) for slide in fitted.train]
        left_out = [(slide.h, slide.pos) for slide in fitted.test]
        group = range(len(known), len(known) + len(left_out))
        found = frame_errors([*known, *left_out], [group])
        return {slide.name: error for slide, error in zip(self.test, found, strict=True)}

    def _once(self, key, make, name=None):
        if key not in self._memory:
            with stage(name) if name else nullcontext():
                self._memory[key] = make()
        return self._memory[key]

    def _scores(self, values: Mapping[str, Any]) -> Scores:
        by_donor: dict[str, list[tuple[float, float]]] = {}
        self.brief.run.stop_if_asked()  # there may be nothing to train, where a run can be stopped
        for number, slide in enumerate(self._fitted(values).test):
            pair = slide.score(self._layout(number, values))
            by_donor.setdefault(slide.donor, []).append(pair)
        means = [np.mean(pairs, axis=0) for pairs in by_donor.values()]
        return Scores(tuple(float(m[0]) for m in means), tuple(float(m[1]) for m in means))

    def _layout(self, number: int, values: Mapping[str, Any]) -> Tensor:
        """The final layout of a left-out slide."""
        return self._once(("layout", number, _key(values)), lambda: self._refined(number, values))

    def _refined(self, number: int, values: Mapping[str, Any]) -> Tensor:
        config, fitted = self.config.with_values(values), self._fitted(values)
        settings, share = config.refine, self.budget.layout
        brief = {
            "distance_correction_steps": math.ceil(share * settings.distance_correction_steps),
            "steps": math.ceil(share * settings.steps),
        }
        config = config.replace(refine=brief)
        slide, (layout, variance) = fitted.test[number], self._recycled(number, values)
        before = (
            "corrected",
            number,
            *(values[name] for name in (*_BEFORE_CORRECTION, CORRECTION)),
        )
        layout = self._once(
            before, lambda: steps.correct_distances(layout, slide.h, variance, config)
        )
        if not config.refine.steps:
            return layout
        power = config.refine.rca_power
        key = ("nearest", number, values["encoder.component_kind"], power)
        graph = self._once(key, lambda: self._nearest(slide, fitted, config))
        return steps.refine(layout, graph, config)

    def _nearest(self, slide: HeldOutSlide, fitted: FoldModel, config: RunConfig):
        candidates = steps.candidate_graph(slide.h, config)
        return steps.refinement_graph(slide.h, candidates, fitted.relevant_components, config)

    @torch.no_grad()
    def _recycled(self, number: int, values: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The layout of a left-out slide before correction and refinement, and its variance."""
        chosen = {name: values[name] for name in _BEFORE_CORRECTION}

        def make():
            config, fitted = self.config.with_values(chosen), self._fitted(chosen)
            slide = fitted.test[number]
            if config.model.init == "mlp":
                # a map that is learned in training: ridge regression stands for it here
                known = [(s.h, s.pos) for s in fitted.train]
                layout = torch.from_numpy(ridge_layout(slide.h.cpu(), known)).to(slide.h)
                initial, variance = layout, None
            else:
                initial, variance = steps.initial_layout(slide.h, config, fitted.atlas)
            if not config.model.recycling:
                return initial, variance
            parts = self._trained(chosen)
            as_predicted = config.replace(train={"batch_kind": self.batch_kind})
            graph = steps.attention_graph(slide.h, None, as_predicted)
            bias, _ = steps.gate_bias(parts.gate, slide.h, graph, config)
            given = None if config.model.init == "mlp" else initial
            return steps.recycle(parts.model, slide.h, graph, bias, given)[-1], variance

        return self._once(("recycled", number, _key(chosen)), make)

    def _trained(self, chosen: Mapping[str, Any]) -> Trained:
        """Gate and model, trained briefly on the slides that are learned from."""

        def make():
            config, fitted = self.config.with_values(chosen), self._fitted(chosen)
            torch.manual_seed(config.train.seed)
            modules = build_gate_and_model(config, fitted.train[0].h.size(1))
            gate, model = (module.to(self.brief.device) for module in modules)
            parts = Trained(gate, model, config, self.brief.device)
            name = f"{self.name}-{_digest(chosen)}"
            loop = self.brief.loop(name, "gate", {"gate": gate, "model": model})
            if loop.state.step < config.train.steps_per_epoch or not loop.finished("gate"):
                slides = [replace(slide, initial=None) for slide in fitted.train]
                if config.model.init == "atlas":
                    place_training_slides(fitted.atlas, slides, [], config, loop)
                batches = Batches(slides, [], config, loop.device)
                with torch.enable_grad():
                    if not loop.finished("gate"):
                        train_gate(parts, batches, loop)
                    train_model(parts, batches, loop)
            gate.eval(), model.eval()
            return parts

        return self._once(("trained", _key(chosen)), make, "Gate and model of a fold")

    def _fitted(self, values: Mapping[str, Any]) -> FoldModel:
        kind = values["encoder.component_kind"]
        return self._once(("fitted", kind), lambda: self._fit(kind), "Encoder of a fold")

    def _fit(self, kind: str) -> FoldModel:
        device = self.brief.device
        encoder, read = None, []
        if self.genes is not None:
            encoder = self._encoder(kind)
            read = self._expressions(encoder)
        raw = [
            embed_slide(slide, encoder, self.genes, device, known)
            for slide, known in zip_longest([*self.train, *self.test], read)
        ]
        scaler = EmbeddingScaler(raw[0].size(1)).to(device).fit(raw[: len(self.train)])
        h = [scaler(values).detach() for values in raw]
        train = [
            EmbeddedSlide(slide.name, own, torch.from_numpy(slide.pos).to(device))
            for slide, own in zip(self.train, h, strict=False)
        ]
        test = [
            HeldOutSlide(self.donors[slide.name], own, slide.pos)
            for slide, own in zip(self.test, h[len(self.train) :], strict=True)
        ]
        known = [(slide.h, slide.pos) for slide in train]
        width = raw[0].size(1)
        relevant = RelevantComponents(width).fit(known).to(device)
        return FoldModel(train, test, relevant, Atlas(width).fit(known).to(device))

    def _expressions(self, encoder: SharedEncoder) -> list[Expression]:
        """Expression of all slides as the encoder takes it, which its components do not change."""

        def make() -> list[Expression]:
            return [read_expression(slide, self.genes or [], encoder) for slide in self.test]

        return [*self._once("encoder", self._train_encoder)[1], *self._once("read", make)]

    def _encoder(self, kind: str) -> SharedEncoder:
        """The encoder with components of one kind appended to what it has learned."""
        trained, read = self._once("encoder", self._train_encoder)
        encoder = copy.deepcopy(trained)
        if self.config.encoder.steps:
            settings = self.config.with_values({"encoder.component_kind": kind}).encoder
            append_components(encoder, read, [slide.pos for slide in self.train], settings)
        return encoder.eval().requires_grad_(False)

    def _train_encoder(self):
        torch.manual_seed(self.config.train.seed)
        encoder = build_encoder(self.config, len(self.genes or [])).to(self.brief.device)
        loop = self.brief.loop(f"{self.name}-encoder", "encoder", {"encoder": encoder})
        if loop.finished("encoder"):
            return encoder, [read_expression(slide, self.genes, encoder) for slide in self.train]
        alone = self.config.replace(encoder={"component_weight": 0.0})
        with torch.enable_grad():
            read = train_encoder(encoder, self.train, self.genes, alone, loop)
        return encoder, read


def _brief(config: RunConfig, budget: Budget, slides: Sequence[Slide]) -> RunConfig:
    """Settings of a short training: minisets alone, and the random walk at its cap at once."""
    settings = config.train
    total = settings.epochs * (settings.steps_per_epoch or settings.minisets)
    steps_taken = math.ceil(budget.model * total)
    return config.replace(
        encoder={"steps": math.ceil(budget.encoder * (config.encoder.steps or 0))},
        train={
            "batch_kind": "miniset",
            "minisets": math.ceil(budget.minisets * settings.minisets),
            "miniset_min": min(settings.miniset_min, *(slide.num_cells for slide in slides)),
            "batch_size": 1,
            "epochs": 1,
            "steps_per_epoch": steps_taken,
            "gate_steps": math.ceil(budget.model * settings.gate_steps),
            "warmup_epochs": 0,
            "ramp_epochs": 0,
        },
    )


def donor_folds(
    slides: Sequence[Slide],
    donors: Mapping[str, str] | None,
    groups: int,
    slides_per_donor: int,
    left_out: int | None = None,
) -> list[tuple[list[Slide], list[Slide]]]:
    """Slides to learn from and slides left out, once for each group of donors.

    With fewer than twice as many donors as groups, one donor is left out at a time; else all are,
    in so many groups. Donors that stand side by side are put in different groups.

    Args:
        slides: training slides.
        donors: slide name to donor; every slide is its own donor if left out.
        groups: at most so many.
        slides_per_donor: slides of a donor that take part, at most.
        left_out: slides that a group leaves out, at most; None for all of its donors.

    Returns:
        Nothing where all slides are of one donor.
    """
    by_donor: dict[str, list[Slide]] = {}
    for slide in slides:
        by_donor.setdefault((donors or {}).get(slide.name, slide.name), []).append(slide)
    if len(by_donor) < 2:
        return []
    taken = {name: _spread_out(members, slides_per_donor) for name, members in by_donor.items()}
    names = list(taken)
    held = [[name] for name in _spread_out(names, groups)]
    if len(names) >= 2 * groups:
        held = [names[turn::groups] for turn in range(groups)]
    return [
        (
            [slide for name in names if name not in out for slide in taken[name]],
            _spread_out([slide for name in out for slide in taken[name]], left_out),
        )
        for out in held
    ]


def _key(values: Mapping[str, Any]) -> tuple:
    return tuple(sorted(values.items()))


def _digest(*values: Any) -> str:
    """A short name for values."""
    plain = [v.model_dump(mode="json") if isinstance(v, RunConfig) else v for v in values]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def _spread_out(items: list, count: int | None) -> list:
    """At most so many of them, as far apart in their order as can be; None for all."""
    count = len(items) if count is None else min(len(items), count)
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]


def sampled(groups: Iterable[tuple[Sequence[Slide], Sequence[Slide]]], cells: int) -> dict:
    """At most so many cells of each slide of some groups, drawn at random, by its name.

    Every rank holds them.
    """

    def sample(slide: Slide) -> Slide:
        n = slide.num_cells
        if n > cells:
            slide = slide.take(np.sort(np.random.default_rng(0).choice(n, cells, replace=False)))
        return replace(slide, holder=None)

    members = {slide.name: slide for group in groups for part in group for slide in part}
    return dict(zip(members, of_slides([*members.values()], sample), strict=True))
