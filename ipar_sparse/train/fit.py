"""The run from slides to a folder that predicts, top to bottom."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..config import RunConfig, resolve_device
from ..config.schema import CONFIG, INPUTS, SELECTION
from ..data.copies import record_of, slide_digest
from ..data.dissociated import record_cells
from ..data.expression import Expression, in_memory
from ..data.held import changed, holders_of, of_each
from ..data.input_profile import conform, informative, profile_inputs
from ..data.slide import Slide, log_notes
from ..data.spatial_order import told_of_order
from ..distributed import agree, alike, barrier, from_first, leads, shared_out
from ..errors import UserError
from ..estimators import EmbeddingScaler, RelevantComponents
from ..files import atomic_write
from ..graph import knn_candidates
from ..inference.checkpoint import load_checkpoint
from ..inference.costs import check_training, slide_size
from ..inference.embedding import embed_slide
from ..inference.modules import build_encoder, build_gate_and_model
from ..inference.run_folder import BEST, LAST, REFERENCE, read_meta
from ..metrics.candidates import candidate_recall, sampled_candidate_recall
from ..progress import quiet_stages, stage
from .adapter import fit_adapter
from .atlas import describe_frames, fit_atlas
from .batches import Batches, EmbeddedSlide
from .encoder import train_encoder
from .loop import Loop, TrainingLoop
from .members import check_members, divide, read_inputs
from .model import Trained, train_gate, train_model
from .run_folder import PARTS
from .selection import read_frame_errors, resolve_from_data, select_settings
from .sharing import fill_ranks
from .typicality import fit_typicality

logger = logging.getLogger(__name__)

_REFERENCE_CELLS = 5000
_RECALL_CELLS = 20_000  # of a slide, whose candidates are all looked at; of more, a sample


@dataclass
class FitResult:
    """What :func:`fit` leaves behind.

    Args:
        out: the run directory.
        best_epoch: epoch of the kept weights, counted from 0; None where none was validated.
        best: its validation E_geo.
        config: the settings that the run was computed with.
        metadata: genes, cells, candidate recall of the unseen slides, and the like.
    """

    out: Path
    best_epoch: int | None
    best: float | None
    config: RunConfig
    metadata: dict[str, Any]


def fit(
    slides: Sequence[Slide],
    val: Sequence[Slide] | None = None,
    config: RunConfig | None = None,
    out: str | Path = "run",
    *,
    donors: Mapping[str, str] | None = None,
    cells: Sequence[Slide] = (),
    resume: bool = False,
    encoder: Path | None = None,
    device: str | None = None,
    stop: threading.Event | None = None,
    max_minutes: float | None = None,
    quiet: bool = False,
) -> FitResult:
    """Train encoder, gate and model, and write a run directory that predicts.

    Validation slides decide when to stop and nothing else: genes, encoder, gate and model never
    see them. Without any, all epochs are run and the last weights kept.

    Args:
        slides: slides with positions.
        val: slides with positions, none of them trained on. None keeps one of more than three
            slides for this, of a donor that has most; an empty list keeps none.
        config: what is asked for; open values are decided from the slides. Defaults if left out.
        out: the run directory, made if missing.
        donors: slide name to donor, for cross-validation; every slide is its own donor if left
            out.
        cells: that the run is to place. Genes are chosen among those that all of them have.
        resume: continue the run in ``out``, with its settings, donors and genes of the cells.
        encoder: directory that :func:`fit_encoder` wrote with the same slides, encoder settings
            and seed; its encoder is taken instead of training the same one again.
        device: where to compute, in place of ``train.device``.
        stop: looked at between steps; set, it ends the run after a checkpoint, as ctrl-C does.
        max_minutes: after about so many the best model so far is kept, and ``resume`` goes on.
            Stages that come before the model are cut short where they take too much of it.
        quiet: show warnings alone.

    Raises:
        UserError: on slides that cannot be trained on, or nothing to resume.
        KeyboardInterrupt: after ctrl-C, SIGTERM or ``stop``, once the state is saved.
    """
    out = Path(out)
    request, donors = _request(config, donors, out, resume, device)
    train, val = divide(slides, val, donors)
    if resume:
        check_members(train, val, out)
    loop = _loop(out, request, resume, stop, max_minutes)
    with quiet_stages(quiet), loop:
        train, val, genes = _prepare(train, val, request, donors, loop, resume, cells)
        if encoder is not None and not (out / CONFIG).is_file():
            settings = _take_settings(encoder, train, genes, loop)
        else:
            settings = _decide(train, request, donors, genes, loop, resume)
        parts = _build(settings, genes, loop, [*train, *val])
        loop.restore()
        read: list[Expression | None] = []
        if genes is not None and not loop.finished("encoder"):
            read = _learn_encoder(encoder, train, genes, settings, loop)
        embedded = embed_slides([*train, *val], loop.modules, genes, len(train), loop, read)
        del read
        known, unseen = embedded[: len(train)], embedded[len(train) :]
        with stage("Relevant components"):
            loop.modules["relevant_components"] = RelevantComponents(loop.meta["dim"]).fit(
                [(slide.h, slide.pos) for slide in known]
            )
        fit_typicality(train, donors, genes, settings, loop)
        with stage("Atlas"):
            atlas = loop.modules["atlas"] = fit_atlas(known, unseen, settings, loop)
            describe_frames(atlas, known, donors, read_frame_errors(out), loop)
        fit_adapter(train, atlas, genes, loop)
        with stage("Measuring candidates"):
            _measure_candidates(known, unseen, settings, loop)
        _save_reference(known, out)
        alike(loop.modules)
        _train(parts, known, unseen, settings, loop)
    barrier()  # what rank 0 has written can be read
    state = loop.state
    return FitResult(out, state.best_epoch, state.best, settings, state.metadata)


def fit_encoder(
    slides: Sequence[Slide],
    config: RunConfig,
    out: str | Path,
    *,
    donors: Mapping[str, str] | None = None,
    cells: Sequence[Slide] = (),
    resume: bool = False,
    stop: threading.Event | None = None,
) -> None:
    """Train the encoder alone, for :func:`fit` to take it into several runs.

    Args:
        slides: slides with positions.
        config: of any of these runs.
        out: directory to write to, made if missing.
        donors: slide name to donor; every slide is its own donor if left out.
        cells: as in :func:`fit`.
        resume: continue from its last checkpoint.
        stop: looked at between steps.

    Raises:
        UserError: on slides that cannot be trained on.
        KeyboardInterrupt: after ctrl-C, SIGTERM or ``stop``, once the state is saved.
    """
    out = Path(out)
    request, donors = _request(config, donors, out, resume, None)
    with _loop(out, request, resume, stop) as loop:
        slides, _, genes = _prepare(slides, [], request, donors, loop, resume, cells)
        settings = _decide(slides, request, donors, genes, loop, resume)
        _build(settings, genes, loop, slides)
        loop.restore()
        if not loop.finished("encoder"):
            train_encoder(loop.modules["encoder"], slides, genes, settings, loop)


def _request(
    config: RunConfig | None,
    donors: Mapping[str, str] | None,
    out: Path,
    resume: bool,
    device: str | None,
) -> tuple[RunConfig, Mapping[str, str] | None]:
    """What is asked for, and the donors; of a run that goes on, what its folder says."""
    if resume:
        config = RunConfig.load_request(out)
        donors = read_inputs(out).get("donors")
    request = config or RunConfig()
    return request if device is None else request.replace(train={"device": device}), donors


def _loop(out: Path, request: RunConfig, resume: bool, stop, max_minutes=None) -> TrainingLoop:
    device = resolve_device(request.train.device)
    if leads():
        out.mkdir(parents=True, exist_ok=True)
    return TrainingLoop(out, request.train.seed, device, resume, stop, max_minutes)


def _prepare(
    train: Sequence[Slide],
    val: Sequence[Slide],
    request: RunConfig,
    donors: Mapping[str, str] | None,
    loop: TrainingLoop,
    resume: bool,
    cells: Sequence[Slide] = (),
) -> tuple[list[Slide], list[Slide], list[str] | None]:
    """Writes the request and its inputs.

    Returns:
        The slides in common terms, without cells that hold nothing, and the genes of the encoder,
        if there is one.
    """
    agree("slides", " ".join(slide_digest(slide) for slide in (*train, *val, *cells)))
    if leads() and not resume and any((loop.out / name).exists() for name in (BEST, LAST, PARTS)):
        raise UserError(f"{loop.out} holds a run; resume it, or choose another folder")
    if loop.device.type == "cuda":
        sizes, held = ([slide_size(slide) for slide in members] for members in (train, val))
        check_training(sizes, held, request, True, torch.cuda.mem_get_info(loop.device)[0])
    chosen = read_inputs(loop.out) if resume else record_cells(train, cells, request.data)
    inputs: dict[str, Any] = {
        **chosen,
        "train": [record_of(slide) for slide in train],
        "val": [record_of(slide) for slide in val],
    }
    genes = None
    if request.data.embedding is None:
        for slide in (*train, *val):
            if slide.expression is None:
                raise UserError(f"{slide.name}: no expression to train on; give X or --layer")
        with stage("Comparing slides"):
            train, profile, missing = profile_inputs(train, request.data, chosen.get("cell_genes"))

            def conformed(slide: Slide) -> Slide:
                return informative(in_memory(conform(slide, profile), profile.genes))

            def told(slide: Slide) -> Slide:
                return told_of_order(slide, profile.genes, profile.total)

            train, val = changed(train, told), changed(val, lambda slide: told(conformed(slide)))
        inputs["profile"], genes = profile.as_dict(), list(profile.genes)
        if missing:
            logger.info("%d genes are not on every training slide: left out", len(missing))
    for slide in (*train, *val):
        log_notes(slide, logger)
    if leads() and not resume:
        inputs["donors"] = donors and dict(donors)
        atomic_write(loop.out / INPUTS, json.dumps(inputs, indent=2) + "\n")
        request.save_request(loop.out)
    loop.state.metadata = {
        "genes": len(genes or []),
        "train_cells": sum(slide.num_cells for slide in train),
        "val_cells": sum(slide.num_cells for slide in val),
        "slides": [
            {"name": slide.name, "role": role, "digest": slide_digest(slide)}
            for role, members in (("train", train), ("val", val))
            for slide in members
        ],
    }
    return list(train), list(val), genes


def _decide(
    slides: Sequence[Slide],
    request: RunConfig,
    donors: Mapping[str, str] | None,
    genes: Sequence[str] | None,
    loop: TrainingLoop,
    resume: bool,
) -> RunConfig:
    """The settings of the run: those it has saved, or what cross-validation selects now."""
    if from_first(resume and (loop.out / CONFIG).is_file()):
        config = RunConfig.load(loop.out).replace(train={"device": request.train.device})
    else:
        config, found = select_settings(slides, donors, request, genes, loop)
        config = fill_ranks(config, [slide.num_cells for slide in slides])
        if leads():
            text = json.dumps(found.as_dict(), indent=1)
            atomic_write(loop.out / SELECTION, text + "\n")
            config.save(loop.out)
    if leads():
        shutil.rmtree(loop.out / PARTS, ignore_errors=True)
    return config


def _build(
    config: RunConfig, genes: Sequence[str] | None, loop: TrainingLoop, slides: Sequence[Slide]
) -> Trained:
    """The untrained modules of a run, registered with the loop."""
    torch.manual_seed(config.train.seed)
    modules: dict[str, nn.Module] = {}
    if genes is None:
        dim = embedding_width(slides)
        loop.state.stage = "gate"
    else:
        modules["encoder"] = build_encoder(config, len(genes))
        dim = config.encoder.out
    modules["scaler"] = EmbeddingScaler(dim)
    modules["gate"], modules["model"] = build_gate_and_model(config, dim)
    for name, module in modules.items():
        loop.modules[name] = module.to(loop.device)
    loop.meta = {"dim": dim, "genes": None if genes is None else list(genes)}
    return Trained(modules["gate"], modules["model"], config, loop.device)


def _take_settings(
    trained: Path, slides: Sequence[Slide], genes: Sequence[str] | None, loop: TrainingLoop
) -> RunConfig:
    """What follows from the slides, and the rest as decided where a shared encoder was trained."""
    out = loop.out
    meta = read_meta(Path(trained) / LAST)
    if genes is None or meta["genes"] != list(genes) or meta["stage"] == "encoder":
        raise UserError(
            f"{trained} holds no trained encoder of these slides' genes; train it again"
        )
    decided, request = RunConfig.load(trained), RunConfig.load_request(out)
    asked = RunConfig.load_request(trained)
    same = (asked.data, asked.encoder, asked.train.seed)
    if same != (request.data, request.encoder, request.train.seed):
        raise UserError(f"{trained} was trained with other data, encoder settings or seed")
    config = resolve_from_data(request, slides, loop.device)
    config = config.with_values({key: decided.get(key) for key in config.unresolved()})
    atomic_write(out / SELECTION, (Path(trained) / SELECTION).read_text())
    config.save(out)
    return config


def _learn_encoder(
    trained: Path | None, slides: Sequence[Slide], genes, settings: RunConfig, loop: TrainingLoop
) -> list[Expression | None]:
    """Trains the encoder of the run, or takes a trained one; what is read for it is kept.

    A step is short, and every cell of its batch is a negative of the others: all ranks take the
    same steps, and go on with one result.
    """
    encoder = loop.modules["encoder"]
    read: list[Expression | None] = []
    if trained is None:
        read = train_encoder(encoder, slides, genes, settings, loop)
    else:
        _take_encoder(trained, loop)
    alike({"encoder": encoder})
    return read


def _take_encoder(trained: Path, loop: TrainingLoop) -> None:
    encoder = loop.modules["encoder"]
    load_checkpoint(Path(trained) / LAST, {"encoder": encoder})
    encoder.eval().requires_grad_(False)
    loop.advance("encoder")


def embed_slides(
    slides: Sequence[Slide],
    modules: Mapping[str, nn.Module],
    genes: Sequence[str] | None,
    fitted: int,
    loop: Loop,
    read: Sequence[Expression | None] = (),
) -> list[EmbeddedSlide]:
    """Embed slides once; from here on the encoder is not used.

    Embeddings and positions stay on the device.

    Args:
        slides: of the run.
        modules: ``encoder``, if there is one, and ``scaler``, which is fitted here.
        genes: of the encoder.
        fitted: the scaler is fitted on so many of them, the first.
        loop: device.
        read: expression of the first of the slides as the encoder takes it, where it is known.
    """
    encoder, scaler, device = modules.get("encoder"), modules["scaler"], loop.device
    if encoder is not None:
        encoder.eval().requires_grad_(False)
    holders, pairs = holders_of(slides), list(zip_longest(slides, read))

    def embed(pair: tuple[Slide, Expression | None]) -> Tensor:
        found = embed_slide(pair[0], encoder, genes, device, pair[1])
        task.advance()
        return found if holders is None else found.cpu()

    with stage("Embedding", len(pairs)) as task:
        raw = [h.to(device) for h in of_each(pairs, embed, holders)]
    scaler.fit(raw[:fitted])
    return [
        EmbeddedSlide(slide.name, scaler(h).detach(), torch.from_numpy(slide.pos).to(device))
        for slide, h in zip(slides, raw, strict=True)
    ]


def _measure_candidates(train, unseen, config: RunConfig, loop: TrainingLoop) -> None:
    """How much of space the candidates find, on training slides and on unseen ones."""
    if "candidate_recall" in loop.state.metadata:
        return
    slides = [*train, *unseen]
    recalls, found = shared_out(slides, lambda slide: _recall(slide, config)), {}
    for number, (slide, recall) in enumerate(zip(slides, recalls, strict=True)):
        seen = number < len(train)
        found[f"{'train' if seen else 'val'}:{slide.name}"] = recall
        if not seen:
            logger.info(
                "%s, not trained on: of the 15 cells nearest in the tissue, %.0f %% are "
                "among the %d most alike in expression, %.0f %% by chance",
                slide.name,
                100 * recall["candidate_recall@15"],
                min(config.graph.k, len(slide.h) - 1),
                100 * recall["candidate_recall_chance@15"],
            )
    loop.state.metadata["candidate_recall"] = found


def _recall(slide: EmbeddedSlide, config: RunConfig) -> dict[str, float]:
    """How many of the 15 nearest in the tissue are candidates; of a large slide on a sample."""
    k, metric = config.graph.k, config.graph.metric
    if len(slide.h) <= _RECALL_CELLS:
        return candidate_recall(knn_candidates(slide.h, k, metric=metric), slide.pos, k=15)
    return sampled_candidate_recall(slide.h, slide.pos, k, k=15, metric=metric)


def _save_reference(slides: Sequence[EmbeddedSlide], out: Path) -> None:
    if not leads():
        return
    tensors = {}
    for number, slide in enumerate(slides):
        generator = torch.Generator().manual_seed(0)
        rows = torch.randperm(len(slide.h), generator=generator)[:_REFERENCE_CELLS]
        kept = slide.take(rows.to(slide.h.device))
        tensors[f"{number}.h"], tensors[f"{number}.pos"] = kept.h.cpu(), kept.pos.cpu()
    atomic_write(out / REFERENCE, save(tensors))


def _train(parts: Trained, train, val, config: RunConfig, loop: TrainingLoop) -> None:
    """Gate and model, unless the initial layout is taken as it is."""
    if config.model.recycling is False and config.model.init != "mlp":
        loop.advance("gate")
        loop.save_best()
        return
    with stage("Graphs and targets"):
        batches = Batches(train, val, config, loop.device)
    if not loop.finished("gate"):
        train_gate(parts, batches, loop)
    train_model(parts, batches, loop)


def embedding_width(slides: Sequence[Slide]) -> int:
    """The width of the embedding that slides bring along.

    Raises:
        UserError: one brings none, or two bring different widths.
    """
    widths: dict[int, str] = {}
    for slide in slides:
        if slide.embedding is None:
            raise UserError(f"{slide.name} carries no embedding; check --embedding obsm:KEY")
        widths.setdefault(slide.embedding.shape[1], slide.name)
    if len(widths) > 1:
        (a, one), (b, other) = list(widths.items())[:2]
        raise UserError(
            f"the embeddings of {one} and {other} have {a} and {b} dimensions; "
            "they must come from one model"
        )
    return next(iter(widths))
