"""What a training or a prediction takes of memory, told from sizes before it begins.

Every number below is bytes for one of something, fitted to the peaks that commands measured on one
core (``--profile``); docs/sizes.md has them beside the estimates, and the test compares both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import RunConfig
from ..data.headers import STREAM_VALUES, Size
from ..data.slide import Slide
from ..distributed import ranks_here
from ..distributed import size as ranks
from ..errors import UserError
from ..progress import size_text
from ..usage import free_host_memory, host_memory

_START = 0.48e9  # Python, torch and what a prediction loads
_TRAINING = 0.22e9  # what a training loads beside it, optimisers, logs, blocks of fixed size
_BLOCK_CELL = 20_000  # a cell of a prediction, up to so many that fill a block
_BLOCK_CELLS = 10_000
_BLOCK = 1 << 23  # values in memory of a matrix that goes through the disk
_READ = 8  # a stored value, as it is read
_DENSER = 2.5  # genes of large variance hold so many times more values than others
_USED = 24  # a stored value of the genes that are used, while it is normalised and weighted
_TABLE = 1 << 26  # expression values of a training slide that are kept dense
_CELL = 8_500  # a cell of the slide that is worked on: searches, embeddings, layouts
_DEVICE_CELL = 6_400  # the same on a GPU, in a prediction: 18.0 GiB for 3 million cells
_DEVICE_PREDICTION, _DEVICE_TRAINING = 0.6e9, 1.8e9  # blocks of fixed size on a GPU
_KEPT_CELL = 1_400  # a cell of every other slide: embedding, positions, names
_MINISET_CELL = 20_000  # a cell of a miniset that is kept
MINISET_CELLS = 500_000
"""Most cells of minisets that are kept."""
WHOLE_CELL = 10_000
"""A cell of a whole slide that is trained on: embedding, graph both ways, targets; k = 100."""
SHARED_CELLS = 200_000
"""Cells of a whole slide; several devices share the rows of a larger one."""
_SHARED_CELL = 1_000  # of it on each device that shares it: embedding, positions, walks
_STEP_CELL = 24_000  # and while a step runs; a third where recycles are computed again
_HEADROOM = 0.95  # share of the free memory that may be taken
KIND_FROM_CELLS: dict[str, dict[int, str]] = {"cpu": {0: "miniset"}, "cuda": {0: "miniset"}}
"""``train.batch_kind=auto``, by device: least cells of the largest slide, in rising order, and
what a step then sees. docs/sizes.md has the scores behind it."""


@dataclass(frozen=True)
class Cost:
    """Bytes at the peak.

    Args:
        host: of the host.
        device: of the GPU; 0 without one.
    """

    host: float
    device: float = 0.0


def slide_size(slide: Slide) -> Size:
    """How large a slide in memory is."""
    stored = 0 if slide.expression is None else int(slide.expression.nnz)
    return Size(slide.num_cells, stored, len(slide.genes))


def prediction_cost(sizes: Sequence[Size], config: RunConfig, on_gpu: bool = False) -> Cost:
    """What placing the slides of one file takes.

    Args:
        sizes: of the slides.
        config: of the run.
        on_gpu: whether a GPU computes.
    """
    largest = max(size.cells for size in sizes)
    host = _START + _expression(sizes, config, dense=False)
    host += sum(_KEPT_CELL * size.cells for size in sizes)
    if on_gpu:
        return Cost(host, _DEVICE_PREDICTION + _DEVICE_CELL * _width(config) * largest)
    work = _CELL * _width(config) * largest + _BLOCK_CELL * min(largest, _BLOCK_CELLS)
    return Cost(host + work)


def training_cost(
    train: Sequence[Size], val: Sequence[Size], config: RunConfig, on_gpu: bool = False
) -> Cost:
    """What a training takes.

    Args:
        train: sizes of the slides that are trained on.
        val: sizes of the slides that decide when to stop.
        config: what is asked for.
        on_gpu: whether a GPU computes.
    """
    sizes, settings = [*train, *val], config.train
    kind = choose_batch_kind(train, val, config, on_gpu)[0]
    parts = 1 if config.data.embedding is not None else ranks()  # which divide the expression
    host = _START + _TRAINING
    host += max(
        sum(_expression(some[i::parts], config, dense=True) for some in (train, val))
        for i in range(parts)
    )
    host += sum(_KEPT_CELL * size.cells for size in sizes)
    work = _CELL * _width(config) * max(size.cells for size in sizes)
    if kind != "slide":
        cells = settings.minisets * (settings.miniset_min + settings.miniset_max) / 2
        host += _MINISET_CELL * min(cells, MINISET_CELLS)
    if kind != "miniset":
        largest = max(size.cells for size in train)
        devices = ranks() if largest > SHARED_CELLS else 1
        step = _STEP_CELL / (3 if config.model.checkpoint_recycles else 1) / devices
        kept = WHOLE_CELL if devices == 1 else _SHARED_CELL + WHOLE_CELL / devices
        work += _width(config) * sum(kept * size.cells for size in train)
        work += _width(config) * sum(WHOLE_CELL * size.cells for size in val)
        work += _width(config) * step * largest
    return Cost(host, _DEVICE_TRAINING + work) if on_gpu else Cost(host + work)


def choose_batch_kind(
    train: Sequence[Size],
    val: Sequence[Size],
    config: RunConfig,
    on_gpu: bool,
    device_bytes: float | None = None,
) -> tuple[str, str]:
    """What ``train.batch_kind`` means for some slides, and why in a few words.

    Args:
        train, val, config, on_gpu, device_bytes: as in :func:`check_training`.
    """
    if config.train.batch_kind != "auto":
        return config.train.batch_kind, "as asked for"
    largest = max((size.cells for size in train), default=0)
    by_size = KIND_FROM_CELLS["cuda" if on_gpu else "cpu"]
    kind = [kind for least, kind in by_size.items() if least <= largest][-1]
    why = f"best for slides of {largest:,} cells on {'a GPU' if on_gpu else 'the CPU'}"
    if kind != "miniset":
        found = training_cost(train, val, config.replace(train={"batch_kind": kind}), on_gpu)
        if not _fits(found, device_bytes):
            return "miniset", f"whole slides of {largest:,} cells do not fit into memory"
    return kind, why


def check_training(
    train: Sequence[Size],
    val: Sequence[Size],
    config: RunConfig,
    on_gpu: bool,
    device_bytes: float | None = None,
) -> None:
    """Refuses a training that will not fit, and names the setting that makes it fit.

    Args:
        train, val, config, on_gpu: as in :func:`training_cost`.
        device_bytes: free on the GPU; left out where it is not known yet.

    Raises:
        UserError: it will not fit.
    """
    if train:
        kind = choose_batch_kind(train, val, config, on_gpu, device_bytes)[0]
        config = config.replace(train={"batch_kind": kind})
        _check_memory(
            f"training on {sum(size.cells for size in train):,} cells",
            lambda asked: training_cost(train, val, asked, on_gpu),
            config,
            _REMEDIES,
            device_bytes,
        )


def check_prediction(
    sizes: Sequence[Size],
    config: RunConfig,
    on_gpu: bool,
    what: str,
    device_bytes: float | None = None,
) -> None:
    """Refuses a prediction that will not fit.

    Args:
        sizes, config, on_gpu: as in :func:`prediction_cost`.
        what: is placed.
        device_bytes: free on the GPU; left out where it is not known yet.

    Raises:
        UserError: it will not fit.
    """
    if sizes:
        cells = sum(size.cells for size in sizes)
        _check_memory(
            f"{what}: placing {cells:,} cells",
            lambda asked: prediction_cost(sizes, asked, on_gpu),
            config,
            (),
            device_bytes,
        )


def _check_memory(
    what: str,
    cost: Callable[[RunConfig], Cost],
    config: RunConfig,
    remedies: Iterable[Mapping[str, Any]],
    device_bytes: float | None,
) -> None:
    free, needed = _free(), cost(config)
    if _fits(needed, device_bytes):
        return
    if needed.host > _HEADROOM * free:
        lacks = f"{size_text(needed.host)} of memory, and {size_text(free)} are free"
    else:
        lacks = f"{size_text(needed.device)} of GPU memory, and {size_text(device_bytes)} are free"
    remedy = "give fewer cells at a time, or use a machine with more memory"
    if needed.host + needed.device <= _HEADROOM * free:
        remedy = "it fits with --device cpu"
    for values in remedies:
        if _fits(cost(config.with_values(values)), device_bytes):
            chosen = " ".join(f"--set {key}={_text(value)}" for key, value in values.items())
            remedy = f"it fits with {chosen}"
            break
    raise UserError(f"{what} takes about {lacks}; {remedy}")


def _free() -> float:
    """Bytes of the host; what this process holds already is a part of what it takes.

    Each of several ranks on this machine may take its part.
    """
    return free_host_memory() / ranks_here() + host_memory()


def _fits(found: Cost, device_bytes: float | None) -> bool:
    on_device = device_bytes is None or found.device <= _HEADROOM * device_bytes
    return found.host <= _HEADROOM * _free() and on_device


_REMEDIES: tuple[dict[str, Any], ...] = (  # the mildest first
    {"model.checkpoint_recycles": True},
    {"train.batch_kind": "miniset"},
    {"train.batch_kind": "miniset", "data.max_genes": 500},
    {"train.batch_kind": "miniset", "data.max_genes": 500, "train.minisets": 200},
)


def _expression(sizes: Sequence[Size], config: RunConfig, dense: bool) -> float:
    """Bytes of expression at the peak: all of it as it was read, and the part that is used."""
    if config.data.embedding is not None:
        return sum(4 * config.model.dim * size.cells for size in sizes)
    most, read, used = config.data.max_genes, 0.0, 0.0
    for size in sizes:
        share = 1.0 if most is None else min(1.0, _DENSER * most / max(size.genes, 1))
        read += _READ * (_BLOCK if size.stored > STREAM_VALUES else size.stored)
        used += _USED * share * size.stored
        genes = size.genes if most is None else min(most, size.genes)
        if dense and size.cells * genes <= _TABLE:
            used += 4 * size.cells * genes
    return read + used


def _width(config: RunConfig) -> float:
    """Neighbours of a cell, relative to the default."""
    return 0.4 + 0.6 * config.graph.k / 100


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
