"""What holds on another donor? Tried before it is relied on.

Some tissues share a plan: layers of a cortex, the axes of an embryo. A map from expression to
position that was learned on other animals holds there, and is the best start. Others do not:
where every tumour is its own, a map from other patients misleads, and the cells are better placed
by how they differ from one another. In some, faint genes tell neighbours apart, in others they are
noise; in some, the noise of counts drowns what they say unless it is modelled, in others the model
is wrong; in some, a last step gathers cells that were well apart. Donors of the training slides are
therefore left out in turn, embeddings are made from the rest, and what serves the donors left out
better is what the run does. Slides that are held out of the run take no part.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import EncoderConfig, RunConfig
from ..data.slide import Slide
from ..estimators.atlas import Atlas
from ..estimators.components import project, spatial_axes
from ..estimators.regression import ridge_layout
from ..estimators.relevant_components import RelevantComponents, compared, narrowed
from ..geometry.gauge import principal_plane
from ..graph import NeighborTable, knn
from ..layout.distance_correction import correct_distances, relative_variance
from ..layout.refinement import refine_layout
from ..layout.uncertainty import fit_error_model, square_errors
from ..metrics.diagnostics import candidate_recall
from ..metrics.layout import distance_metrics
from ..nn import SharedEncoder
from .counts import GeneFields, count_atlas, fit_fields, have_counts, slide_counts
from .encoder import ContrastiveSlide, begin, encode, encoder_loss, finish, read_expression

EXPECTED = 200
"""Steps towards expected distances where they are taken, ``refine.expected``."""

MIDDLE = "middle"
_LAST = {"steps": 400, "neighbors": 15, "anchor": 5.0, "whiten": 0.5, "power": 0.0, "narrow": 0.0}
REFINE: dict[str, dict[str, int | float]] = {
    MIDDLE: _LAST,
    "plain": _LAST | {"whiten": 0.0},
    "whitened": _LAST | {"whiten": 1.0},
    "leading": _LAST | {"whiten": 0.0, "power": 1.0},
    "narrow": _LAST | {"anchor": 20.0, "whiten": 1.0, "power": 2.0, "narrow": 0.05},
}
"""The last step where it is taken, ``refine``, the usual first: by distances in which a cell's
nearest are sought, and one that keeps no more of a layout than its first axis."""
ANCHORS = {"loose": 2.0, "firm": 12.0}
"""Tried beside the usual one with the best of those, if that has it: the firmer, the more of the
places is kept, and the fewer of the candidates become neighbours."""
_ERRORS = {"pca": (0.75, 0.0), "mlp": (0.75, 0.0), "atlas": (0.1, 1.1), "fields": (0.0, 1.0)}
"""Square error of a cell by its doubt, as on slides of other donors of four real sets."""

logger = logging.getLogger(__name__)

_CELLS = 3000  # of a slide; more do not change a mean over slides
_FOLDS = 3  # in which donors are left out: one in each, or all in as many groups
_SLIDES = 3  # of a donor, at most
_PART = 0.5  # of the steps of stage A
_TIE = 0.01  # of neighbours that the last step may cost: it gains where cells are dense, which
# those of a slide of more than _CELLS are not here
_GAIN = 0.02  # of distances, by which expected ones must be better: they cost places

PLANE, MAP, ATLAS, FIELDS = "plane", "map", "atlas", "fields"
_STARTS = {PLANE: "pca", MAP: "mlp", ATLAS: "atlas", FIELDS: "fields"}
_OF_EMBEDDINGS = PLANE, MAP, ATLAS
_DOUBTING = ATLAS, FIELDS  # starts that tell how far a cell may lie from where they place it
_NEIGHBORS = 15  # by which embeddings and layouts are compared
_WEIGHTS = {"spatial genes": (0.5, 0.25), "all genes": (1.0, 0.0)}
"""Powers ``encoder.standardize`` and ``encoder.spatial_genes`` that are tried, the usual first."""
_COUNTS = "counts"  # tried beside them
_KEPT = "principal", "spatial"
"""What an embedding keeps, ``encoder.kept``, the usual first."""


@dataclass(frozen=True)
class Transfer:
    """What a run begins from, and why.

    Args:
        start: ``"mlp"``, ``"atlas"`` or ``"fields"`` where a learned map, an atlas or the fields of
            genes hold on other donors, ``"pca"`` where none does; ``"atlas"`` where nothing was
            tried.
        standardize, spatial_genes: how genes are weighted, as in ``encoder``.
        input: what the encoder reads, ``encoder.input``.
        kept: what the embedding keeps beside what it has learned, ``encoder.kept``.
        refine: the last two steps after each of the starts: ``expected``, and ``steps``,
            ``neighbors``, ``anchor``, ``whiten``, ``power`` and ``narrow`` of ``refine``.
        errors: after each of the starts, how the square error of a cell follows what the start says
            of it: a and b of :func:`~ipar_sparse.layout.uncertainty.fit_error_law`.
        donors: how many were left out in turn; with one donor nothing is tried.
        scores: means over donors left out. Distance Spearman: ``plane`` (principal plane of the
            embedding), ``map`` (ridge regression from it), ``atlas`` (of it) and, where counts are
            read, ``fields``; ``atlas expected`` and ``fields expected`` with distances as they are
            to be expected. Neighbour hit @15: ``plane hit`` and ``plane refined`` (before and after
            the last step), and so for the others. Of last steps after the best, the geometric
            mean of distance Spearman and hit @15: ``middle``, ``plain``, ``whitened``, ``leading``,
            ``narrow``, ``loose`` and ``firm``. Of embeddings, that of the best distance Spearman
            and the hit @15 of their nearest cells: ``spatial genes`` and ``all genes`` (spatial
            components under either weights), ``counts`` (spatial components of those of counts)
            and, trained, by what they keep, ``principal`` and ``spatial``.
    """

    start: str = _STARTS[ATLAS]
    standardize: float = _WEIGHTS["spatial genes"][0]
    spatial_genes: float = _WEIGHTS["spatial genes"][1]
    kept: str = _KEPT[0]
    refine: dict[str, dict[str, int | float]] = field(
        default_factory=lambda: {
            # fields find more neighbours than the embedding, which is all that a last step knows
            # of, and an atlas alone tells how far cells may lie from where it places them
            start: REFINE[MIDDLE]
            | {"expected": EXPECTED if name == ATLAS else 0}
            | ({"steps": 0} if name == FIELDS else {})
            for name, start in _STARTS.items()
        }
    )
    errors: dict[str, tuple[float, float]] = field(default_factory=lambda: dict(_ERRORS))
    donors: int = 0
    scores: dict[str, float] | None = None
    input: str = "log"

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def weigh(self, config: RunConfig) -> RunConfig:
        """A configuration with these weights of genes and this input where it leaves them open."""
        return weigh(config, self.standardize, self.spatial_genes, self.input)


def try_transfer(
    slides: Sequence[Slide],
    donors: Mapping[str, str] | None,
    config: RunConfig,
    build: Callable[[RunConfig], SharedEncoder] | None,
    genes: Sequence[str] | None,
    device: torch.device,
    step_done: Callable[[], None] = lambda: None,
) -> Transfer:
    """Leave donors of the training slides out in turn, and see what places their cells.

    One in each of three turns; from six donors on, a third of them, so that all have their say.

    Args:
        slides: training slides with positions.
        donors: slide name to donor; every slide is its own donor if left out.
        config: the run's; its seed, steps and losses of stage A.
        build: makes the untrained encoder of a configuration; None where embeddings are brought
            along.
        genes: of the encoder.
        device: where encoders are trained.
        step_done: called after every step, :func:`trial_steps` times; may raise to stop.
    """
    folds = _folds(slides, donors, genes, device)
    if not folds:
        return Transfer()
    count = sum(fold.donors for fold in folds)
    if build is None:
        return _choose([fold.brought() for fold in folds], config, Transfer(donors=count), {})
    settings, scores, chosen = config.encoder, {}, Transfer()
    if settings.standardize is None and settings.spatial_genes is None:
        ways = {
            name: Transfer(standardize=standardize, spatial_genes=spatial_genes)
            for name, (standardize, spatial_genes) in _WEIGHTS.items()
            if settings.input != _COUNTS
        }
        if settings.input != "log" and have_counts(slides, genes):
            ways[_COUNTS] = Transfer(input=_COUNTS)
        if len(ways) > 1:
            for name, way in ways.items():
                asked = way.weigh(config)
                scores[name] = _score([fold.components(asked, build) for fold in folds])
            chosen = ways[max(scores, key=scores.__getitem__)]
    config = chosen.weigh(config)
    chosen = replace(
        chosen,
        donors=count,
        input=config.encoder.input,
        standardize=config.encoder.standardize,
        spatial_genes=config.encoder.spatial_genes,
    )
    embeddings: dict[str, list[list[_Left]]] = {}
    for number, fold in enumerate(folds):
        seed = config.train.seed * _FOLDS + number
        for kept, left in fold.trained(config, build, seed, step_done).items():
            embeddings.setdefault(kept, []).append(left)
    tried = {name: _score(found) for name, found in embeddings.items()}
    kept = max(tried, key=tried.__getitem__)
    starts = _OF_EMBEDDINGS
    if config.encoder.input == _COUNTS or config.model.start == _STARTS[FIELDS]:
        starts = tuple(_STARTS)
        for fold, left in zip(folds, embeddings[kept], strict=True):
            fold.place_by_fields(left)
    return _choose(embeddings[kept], config, replace(chosen, kept=kept), scores | tried, starts)


def trial_steps(
    slides: Sequence[Slide], donors: Mapping[str, str] | None, config: RunConfig
) -> int:
    """Optimiser steps that :func:`try_transfer` takes where it trains encoders.

    Args:
        slides: training slides.
        donors: slide name to donor.
        config: of the run.
    """
    return sum(fold.steps(config) for fold in _folds(slides, donors, None, torch.device("cpu")))


def _folds(slides, donors, genes, device) -> list[_Fold]:
    """One for each turn in which donors are left out; none where there is one donor only."""
    groups: dict[str, list[Slide]] = {}
    for slide in slides:
        groups.setdefault((donors or {}).get(slide.name, slide.name), []).append(slide)
    if len(groups) < 2:
        return []
    small = {
        name: [_sample(slide) for slide in _spread_out(group, _SLIDES)]
        for name, group in groups.items()
    }
    names = list(small)
    turns = [[name] for name in _spread_out(names, _FOLDS)]
    if len(names) >= 2 * _FOLDS:  # every third: slides of one animal, left in, stand side by side
        turns = [names[turn::_FOLDS] for turn in range(_FOLDS)]
    folds = []
    for turn in turns:
        rest = [slide for name in names if name not in turn for slide in small[name]]
        left_out = [slide for name in turn for slide in small[name]]
        folds.append(_Fold(rest, left_out, genes, device, len(turn)))
    return folds


def weigh(
    config: RunConfig, standardize: float, spatial_genes: float, read: str = "log"
) -> RunConfig:
    """A configuration with these weights of genes, and this input of the encoder, where it leaves
    them open; one that weighs genes itself reads their logarithms."""
    own = config.encoder
    if own.input is not None:
        read = own.input
    elif own.standardize is not None or own.spatial_genes is not None:
        read = "log"
    if own.standardize is not None:
        standardize = own.standardize
    if own.spatial_genes is not None:
        spatial_genes = own.spatial_genes
    return config.replace(
        encoder={"input": read, "standardize": standardize, "spatial_genes": spatial_genes}
    )


def _choose(
    donors: list[list[_Left]],
    config: RunConfig,
    chosen: Transfer,
    tried: dict[str, float],
    starts: Sequence[str] = _OF_EMBEDDINGS,
) -> Transfer:
    """Start and last step by what each donor left out showed in the embedding that was chosen."""
    scores = {name: _mean(donors, partial(_Left.spearman, name=name)) for name in starts}
    errors = chosen.errors | {
        _STARTS[name]: fit_error_model(
            [[left.errors(name) for left in slides] for slides in donors]
        )
        for name in starts
    }
    steps, after = _expectations(donors, starts, config, scores)
    best = max(starts, key=lambda name: scores[f"{name} expected" if steps[name] else name])
    start, refine = _STARTS[best], dict(chosen.refine)
    if config.refine.steps is None:
        refine |= _last_steps(after, best, config, scores)
    for name in starts:
        value = _STARTS[name]
        refine[value] = refine[value] | {"expected": steps[name]}
    found = replace(
        chosen,
        start=start,
        refine=refine,
        errors=errors,
        scores=scores | tried,
        donors=chosen.donors or len(donors),
    )
    logger.info(
        "%d donors left out in turn: a learned map places their cells with distance Spearman "
        "%.3f, an atlas with %.3f, the plane of the embedding with %.3f%s; model.start is %s",
        found.donors,
        scores[MAP],
        scores[ATLAS],
        scores[PLANE],
        f", fields of genes with {scores[FIELDS]:.3f}" if FIELDS in scores else "",
        start,
    )
    if config.refine.expected is None:
        logger.info(
            "distances as they are to be expected: an atlas with %.3f%s; refine.expected is %d",
            scores[f"{ATLAS} expected"],
            f", fields with {scores[f'{FIELDS} expected']:.3f}" if FIELDS in scores else "",
            steps[best],
        )
    if config.refine.steps is None:
        last = refine[start]
        logger.info(
            "refine.steps is %d, refine.neighbors %d, refine.anchor %g, refine.whiten %g, "
            "refine.power %g, refine.narrow %g",
            last["steps"],
            last["neighbors"],
            last["anchor"],
            last["whiten"],
            last["power"],
            last["narrow"],
        )
    if tried:
        logger.info(
            "encoder.input is %s, encoder.standardize %g, encoder.spatial_genes %g, "
            "encoder.kept %s",
            found.input,
            found.standardize,
            found.spatial_genes,
            found.kept,
        )
    return found


def _expectations(
    donors: list[list[_Left]], starts: Sequence[str], config: RunConfig, scores: dict[str, float]
) -> tuple[dict[str, int], list[list[_Left]]]:
    """Steps towards expected distances after each start, and the slides left out with what becomes
    of their layouts.

    What is tried stands in ``scores`` afterwards.
    """
    asked = config.refine.expected
    tried = EXPECTED if asked is None else asked
    if not tried:
        return dict.fromkeys(starts, 0), donors
    steps = {name: tried if asked is not None or name in _DOUBTING else 0 for name in starts}
    names = [name for name in starts if steps[name]]
    after = [[left.expected(names, tried) for left in slides] for slides in donors]
    for name in names:
        scores[f"{name} expected"] = _mean(after, partial(_Left.spearman, name=name))
        if asked is None and scores[f"{name} expected"] <= (1 + _GAIN) * scores[name]:
            steps[name] = 0
    for slides, before in zip(after, donors, strict=True):
        for left, own in zip(slides, before, strict=True):
            left.layouts |= {name: own.layouts[name] for name in starts if not steps[name]}
    return steps, after


def _last_steps(
    donors: list[list[_Left]], best: str, config: RunConfig, scores: dict[str, float]
) -> dict[str, dict[str, int | float]]:
    """The last step after each start, if any: how, by places and neighbours after the best of them;
    whether, by neighbours after each.

    What is found stands in ``scores`` afterwards.
    """
    own = config.refine.model_dump(include=_LAST.keys() - {"steps"}, exclude_none=True)
    ways = dict(REFINE)
    if own:
        ways = {MIDDLE: REFINE[MIDDLE] | own}  # what is asked for is not tried
    after = {way: _refined(donors, best, settings) for way, settings in ways.items()}
    tried = {way: _balance(left, best) for way, left in after.items()}
    way = max(tried, key=tried.__getitem__)
    if not own and ways[way]["anchor"] == _LAST["anchor"]:
        ways |= {name: ways[way] | {"anchor": anchor} for name, anchor in ANCHORS.items()}
        for name in ANCHORS:
            after[name] = _refined(donors, best, ways[name])
            tried[name] = _balance(after[name], best)
        way = max(tried, key=tried.__getitem__)
    scores |= tried
    found = {}
    for name in [name for name in _STARTS if name in scores]:
        value = _STARTS[name]
        left = after[way] if name == best else _refined(donors, name, ways[way])
        hit = partial(_Left.layout_hit, name=name)
        scores[f"{name} hit"], scores[f"{name} refined"] = _mean(donors, hit), _mean(left, hit)
        least = scores[f"{name} hit"] * (1 if name == FIELDS else 1 - _TIE)
        taken = scores[f"{name} refined"] > least
        found[value] = ways[way] if taken else ways[way] | {"steps": 0}
    return found


def _refined(donors: list[list[_Left]], name: str, settings) -> list[list[_Left]]:
    return [[left.refined(name, settings) for left in slides] for slides in donors]


def _mean(donors: list[list[_Left]], score: Callable[[_Left], float]) -> float:
    return float(np.mean([np.mean([score(left) for left in slides]) for slides in donors]))


def _balance(donors: list[list[_Left]], name: str) -> float:
    """Of a layout: distances and neighbours, gains of which count alike, relative to either."""
    far = _mean(donors, partial(_Left.spearman, name=name))
    return float(np.sqrt(max(far, 0.0) * _mean(donors, partial(_Left.layout_hit, name=name))))


def _score(donors: list[list[_Left]]) -> float:
    """The same of an embedding, by the best start that can be made of it."""
    far = max(_mean(donors, partial(_Left.spearman, name=name)) for name in _OF_EMBEDDINGS)
    return float(np.sqrt(max(far, 0.0) * _mean(donors, _Left.embedding_hit)))


class _Left:
    """A slide left out, its embedding, and where each start would place its cells.

    Args:
        h: embedding (n, d).
        pos: true positions (n, 2).
        placed: start to layout (n, 2).
        doubt: start to how uncertain its places are (n,), as :func:`correct_distances` takes it; of
            starts that can tell.
        nearness: of the slides that were learned from.
    """

    def __init__(
        self,
        h: Tensor,
        pos,
        placed: Mapping[str, np.ndarray],
        doubt: Mapping[str, Tensor] | None = None,
        nearness: RelevantComponents | None = None,
    ):
        self.nearness = nearness
        self.pos, self.layouts, self.doubt = np.asarray(pos), dict(placed), dict(doubt or {})
        self.h, self.graph = h, knn(h, _NEIGHBORS)

    def spearman(self, name: str) -> float:
        return distance_metrics(self.layouts[name], self.pos)["distance_spearman"]

    def errors(self, name: str) -> tuple[np.ndarray, Tensor | None]:
        """Square error of every cell where a start places it, and what the start says of it."""
        return square_errors(self.layouts[name], self.pos), self.doubt.get(name)

    def embedding_hit(self) -> float:
        return self._hit(self.graph)

    def layout_hit(self, name: str) -> float:
        layout = torch.from_numpy(np.asarray(self.layouts[name], dtype=np.float64))
        return self._hit(knn(layout, _NEIGHBORS))

    def expected(self, names: Sequence[str], steps: int) -> _Left:
        """The same slide, some layouts with distances as they are to be expected."""
        after = copy.copy(self)
        after.layouts = self.layouts | {
            name: correct_distances(self._layout(name), self.doubt.get(name), self.h, steps=steps)
            .double()
            .numpy()
            for name in names
        }
        return after

    def _layout(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.layouts[name], dtype=np.float64)).float()

    def refined(self, name: str, settings: Mapping[str, int | float]) -> _Left:
        """The same slide after a last step from one of the starts."""
        layout = self._layout(name)
        after = copy.copy(self)
        settings, graph = dict(settings), self.graph
        whiten, power = settings.pop("whiten"), settings.pop("power")
        settings["begin"] = narrowed(layout, self.h, self.nearness, settings.pop("narrow"))
        if whiten or power:
            graph = knn(compared(self.h, self.nearness, whiten, power), _NEIGHBORS)
        after.layouts = {name: refine_layout(layout, graph, **settings).double().numpy()}
        return after

    def _hit(self, graph: NeighborTable) -> float:
        return candidate_recall(graph, self.pos, _NEIGHBORS)[f"candidate_recall@{_NEIGHBORS}"]


@dataclass
class _Fold:
    """Slides to learn from, and those of the donors left out.

    Args:
        train: slides of the other donors.
        test: slides of these.
        genes: of the encoder.
        device: where it is trained.
        donors: how many are left out.
    """

    train: list[Slide]
    test: list[Slide]
    genes: Sequence[str] | None
    device: torch.device
    donors: int = 1

    @cached_property
    def fields(self) -> GeneFields:
        """Of the genes, on the slides to learn from."""
        return fit_fields(self.train, self.genes, self.device)

    def place_by_fields(self, left: Sequence[_Left]) -> None:
        """Add the layout of the fields to those of the slides left out."""
        atlas = count_atlas(self.train, self.genes, self.device, self.fields)
        for slide, found in zip(self.test, left, strict=True):
            place, variance = atlas.posterior(slide_counts(slide, self.genes))
            found.layouts[FIELDS] = place.double().cpu().numpy()
            found.doubt[FIELDS] = relative_variance(place, variance).cpu()

    def _begin(self, encoder: SharedEncoder, config: RunConfig) -> list:
        fields = self.fields if encoder.counts is not None else None
        return begin(encoder, self.train, self.genes, config, fields)

    def steps(self, config: RunConfig) -> int:
        """Of its stage A."""
        return round(_PART * config.encoder.steps_for(sum(s.num_cells for s in self.train)))

    def brought(self) -> list[_Left]:
        """The slides left out in the embedding that came with them."""
        h = [torch.from_numpy(s.embedding).float() for s in (*self.train, *self.test)]
        return self._look(h)

    def components(
        self, config: RunConfig, build: Callable[[RunConfig], SharedEncoder]
    ) -> list[_Left]:
        """The slides left out in nothing but spatial components: quick, and by which genes weigh
        what, better or worse as an embedding trained on them is."""
        encoder = build(config).to(self.device)
        read = self._begin(encoder, config)
        axes, _ = spatial_axes(read, [slide.pos for slide in self.train], config.encoder.out)
        read = read + [read_expression(slide, self.genes, encoder) for slide in self.test]
        return self._look([torch.from_numpy(project(x, axes)).float() for x in read])

    def trained(
        self, config: RunConfig, build: Callable[[RunConfig], SharedEncoder], seed: int, step_done
    ) -> dict[str, list[_Left]]:
        """The slides left out after a short stage A, by what the embedding keeps beside it."""
        settings = config.encoder
        torch.manual_seed(seed)
        encoder = build(config).to(self.device)
        read = self._begin(encoder, config)
        positions = [slide.pos for slide in self.train]
        steps = self.steps(config)
        if steps:
            fit = [
                ContrastiveSlide(expression, pos, settings.neighbors, settings.far_quantile)
                for expression, pos in zip(read, positions, strict=True)
            ]
            _train(encoder, fit, settings, steps, seed, self.device, step_done)
        tried = _KEPT if steps and settings.skip and settings.keep else _KEPT[:1]
        found = {}
        for kept in tried if settings.kept is None else (settings.kept,):
            finished = copy.deepcopy(encoder)
            if steps:
                asked = settings.model_copy(update={"kept": kept})
                finish(finished, read, positions, asked)
            found[kept] = self._embed(finished, read)
        return found

    def _embed(self, encoder: SharedEncoder, read: list) -> list[_Left]:
        read = read + [read_expression(slide, self.genes, encoder) for slide in self.test]
        return self._look([encode(encoder, expression, self.device) for expression in read])

    def _look(self, h: list[Tensor]) -> list[_Left]:
        known = [(own.numpy(), s.pos) for own, s in zip(h, self.train, strict=False)]
        h = h[len(self.train) :]
        together = torch.cat(h)  # what is learned of the others is learned once
        atlas = Atlas(together.size(1)).fit(known)
        nearness = RelevantComponents(together.size(1)).fit(known)
        mapped = ridge_layout(together.numpy(), known)
        ends = np.cumsum([len(own) for own in h])[:-1]
        left = []
        for own, slide, layout in zip(h, self.test, np.split(mapped, ends), strict=True):
            place, variance = atlas.moments(own)  # slide by slide: each has others that are like it
            placed = {
                MAP: layout,
                ATLAS: place.double().numpy(),
                PLANE: principal_plane(own).numpy(),
            }
            doubt = {ATLAS: relative_variance(place, variance)}
            left.append(_Left(own, slide.pos, placed, doubt, nearness))
        return left


def _train(
    encoder: nn.Module,
    slides: Sequence[ContrastiveSlide],
    settings: EncoderConfig,
    steps: int,
    seed: int,
    device: torch.device,
    step_done: Callable[[], None],
) -> None:
    optimizer = torch.optim.AdamW(
        encoder.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, settings.lr * 0.01)
    generator = torch.Generator().manual_seed(seed)
    encoder.train()
    for step in range(steps):
        loss = encoder_loss(encoder, slides[step % len(slides)], settings, generator, device)
        optimizer.zero_grad(set_to_none=True)
        loss["loss"].backward()
        optimizer.step()
        schedule.step()
        step_done()
    encoder.eval()


def _spread_out(items: list, count: int) -> list:
    """At most so many of them, as far apart in their order as can be."""
    count = min(len(items), count)
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]


def _sample(slide: Slide) -> Slide:
    """At most so many cells of a slide, drawn at random."""
    n = slide.num_cells
    if n <= _CELLS:
        return slide
    return slide.take(np.sort(np.random.default_rng(0).choice(n, _CELLS, replace=False)))
