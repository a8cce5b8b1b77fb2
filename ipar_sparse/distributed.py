"""Several processes that compute one thing, one a device: how they start, and what they exchange.

torch's launcher starts them: ``torchrun``, or :func:`launch`, which calls it. Each calls
:func:`joined` before anything else. In a process that was started alone every function here
answers as for one rank of one, so callers need not ask.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

TIME_LIMIT = "IPAR_SPARSE_TIME_LIMIT"
"""Environment variable: seconds that a rank waits for the others before it gives up."""
_SECONDS = 1800.0
_LAUNCHED = "IPAR_SPARSE_LAUNCHED"  # set by :func:`launch`, which tells of ranks that died
_FEW_ROWS = 256  # of a rank; fewer are not worth an exchange
BLOCK_ROWS = 1024
"""Rows of a rank are whole blocks of so many, where it has more."""
LOST = 71
"""Exit code of a rank that lost the others."""


class RankLost(Exception):
    """Another rank died, or did not answer in time."""


class _Group:
    """What this process has joined."""

    rank, size, times = 0, 1, 0
    shares_rows = False  # whether what is computed now is the same on all ranks
    base: Any = None  # where ranks find each other; outlives the group
    store: Any = None


_group = _Group()


def started_rank() -> int:
    """The rank that a launcher gave this process, told without torch; 0 if it was started alone."""
    return int(os.environ.get("RANK", 0)) if is_rank() else 0


def is_rank() -> bool:
    """Whether a launcher started this process as one of several, told without torch."""
    named = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    return named and int(os.environ["WORLD_SIZE"]) > 1


def is_restart() -> bool:
    """Whether torchrun started the ranks anew after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def rank() -> int:
    """The number of this process among those that have joined; 0 alone."""
    return _group.rank


def size() -> int:
    """How many processes have joined; 1 alone."""
    return _group.size


def ranks_here() -> int:
    """How many ranks a launcher started on this machine, told without torch; 1 alone."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if is_rank() else 1


def leads() -> bool:
    """Whether this process writes, and talks to the person."""
    return _group.rank == 0


def launch(arguments: Sequence[str], devices: int, device: str | None = None) -> int:
    """Runs ``python`` with some arguments as so many ranks on this machine, by torch's launcher.

    Args:
        arguments: of python, for instance ``["-m", "ipar_sparse", "train", ...]``.
        devices: number of ranks.
        device: where they compute; ranks on GPUs take one each.

    Returns:
        The exit code. A rank that fails tells of it.

    Raises:
        UserError: there are fewer devices.
        RankLost: a rank was killed.
        KeyboardInterrupt: after ctrl-C or SIGTERM, once all ranks have ended.
    """
    check_devices(devices, device)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[_LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=f"ipar_sparse-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        logs_specs=DefaultLogsSpecs(),
        max_restarts=0,
    )
    logging.disable(logging.CRITICAL)  # the launcher's; what failed is told in one line
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        codes = {number: failure.exitcode for number, failure in error.failures.items()}
        return _first_failure(codes)
    finally:
        logging.disable(logging.NOTSET)
        del os.environ[_LAUNCHED]
    return 0


def _first_failure(codes: Mapping[int, int]) -> int:
    """The exit code of the rank that failed of itself.

    Raises:
        RankLost: it was killed.
    """
    # of ranks that ended since another did; threads of gloo and NCCL abort where a peer is gone
    later = (LOST, -signal.SIGTERM, -signal.SIGABRT)
    own = {number: code for number, code in codes.items() if code not in later} or codes
    number, code = min(own.items(), key=lambda one: (one[1] >= 0, one[0]))
    if code >= 0 and code != LOST:
        return code
    how = f"was killed ({signal.Signals(-code).name})" if code < 0 else "lost the others"
    memory = ": host memory was missing, or someone ended it" if code == -signal.SIGKILL else ""
    raise RankLost(f"rank {number} {how}{memory}")


def check_devices(devices: int, device: str | None = None) -> None:
    """Refuses more ranks than this machine has devices.

    Args:
        devices: number of ranks.
        device: ``cpu``, ``cuda`` or None, a GPU where there is one.

    Raises:
        UserError: so it is, one is named by number, or NCCL is missing.
    """
    if device is not None and ":" in device:
        raise UserError(f"--device {device} is one device; with --devices name cuda or cpu")
    import torch

    gpus = device != "cpu" and (torch.cuda.is_available() or device == "cuda")
    there = torch.cuda.device_count() if gpus else os.cpu_count() or 1
    if devices > there:
        kind = "GPU" if gpus else "CPU core"
        advice = "give at most so many" if there else "add --device cpu"
        raise UserError(
            f"--devices {devices}, but this machine has {there} {kind}{'s' * (there != 1)}; "
            f"{advice}"
        )
    if gpus and not torch.distributed.is_nccl_available():
        raise UserError("this torch has no NCCL, which several GPUs need; use --device cpu")


@contextmanager
def joined(device: str | None = None) -> Iterator[str | None]:
    """Joins the ranks that were started together, until the block ends.

    Args:
        device: ``cpu``, ``cuda`` or None, a GPU where there is one.

    Yields:
        The device of this rank; what was given where the process was started alone.

    Raises:
        UserError: a rank has no device of its own, or runs another version.
        RankLost: a rank does not answer.
    """
    if not is_rank() or _group.size > 1:
        yield device
        return
    import torch
    from torch import distributed as dist

    if not dist.is_available():
        raise UserError("this torch is built without torch.distributed; install one with it")
    cards = max(torch.cuda.device_count(), 1)
    local = int(os.environ.get("LOCAL_RANK", int(os.environ["RANK"]) % cards))
    limit = timedelta(seconds=float(os.environ.get(TIME_LIMIT, _SECONDS)))
    with rank_losses():
        if _group.base is None:
            _group.base = next(iter(dist.rendezvous("env://", timeout=limit)))
        base, _group.rank, _group.size = _group.base
        _group.times += 1
        _group.store = dist.PrefixStore(f"ipar_sparse/{_group.times}", base)
    try:
        with rank_losses():
            _compare_versions()
        if device != "cpu":
            check_devices(ranks_here(), device)
        gpu = device != "cpu" and torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(local)
        with rank_losses():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpu else "gloo",
                store=_group.store,
                rank=_group.rank,
                world_size=_group.size,
                timeout=limit,
            )
        yield f"cuda:{local}" if gpu else "cpu"
        barrier()
        dist.destroy_process_group()
    finally:
        _group.size = 1


@contextmanager
def rank_losses() -> Iterator[None]:
    """Turns what torch raises in an exchange, where another rank does not answer.

    Raises:
        RankLost: in its place.
    """
    try:
        yield
    except RuntimeError as error:
        raise RankLost(str(error).partition("\n")[0]) from error


def tells() -> bool:
    """Whether this rank is the one that tells of an error; the first that asks is."""
    if not is_rank() or _group.store is None:
        return started_rank() == 0
    try:
        return _group.store.add("told", 1) == 1
    except RuntimeError:  # the rank that keeps the store is gone
        return True


def leave(code: int = 0) -> None:
    """Ends a rank at once, once its files are closed; does nothing in a process started alone.

    Threads of the exchange may wait for ranks that are gone, or abort while Python winds up.
    """
    if is_rank():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def launcher_tells() -> bool:
    """Whether :func:`launch` waits for this process, and tells of ranks that died or stopped."""
    return _LAUNCHED in os.environ and is_rank()


def _compare_versions() -> None:
    import torch

    from . import __version__

    store, number, count = _group.store, _group.rank, _group.size
    own = {"ipar_sparse": __version__, "torch": torch.__version__}
    own["python"] = f"{sys.version_info.major}.{sys.version_info.minor}"
    store.set(f"version/{number}", json.dumps(own))
    first = json.loads(store.get("version/0"))
    for other in range(1, count):
        found = json.loads(store.get(f"version/{other}"))
        for name in own:
            if found[name] != first[name]:
                raise UserError(
                    f"rank {other} runs {name} {found[name]} and rank 0 {first[name]}; install "
                    "one version on all machines"
                )


def gathered(value: T) -> list[T]:
    """What every rank gives, in the order of ranks; small objects that pickle."""
    if size() == 1:
        return [value]
    from torch import distributed as dist

    found: list[Any] = [None] * size()
    with rank_losses():
        dist.all_gather_object(found, value)
    return found


def from_first(value: T) -> T:
    """What rank 0 gives; small objects that pickle."""
    if size() == 1:
        return value
    from torch import distributed as dist

    held: list[Any] = [value]
    with rank_losses():
        dist.broadcast_object_list(held, src=0)
    return held[0]


def from_rank(values: Tensor, source: int) -> Tensor:
    """A tensor as one rank has it, in place of that of the others."""
    from torch import distributed as dist

    with rank_losses():
        dist.broadcast(values, src=source)
    return values


def barrier() -> None:
    """Waits for all ranks."""
    gathered(None)


def largest(*values: int) -> list[int]:
    """The largest that any rank gives, of each value."""
    if size() == 1:
        return [*values]
    import torch
    from torch import distributed as dist

    found = torch.tensor(values)
    with rank_losses():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def agree(what: str, value: str) -> None:
    """Refuses ranks that hold different things, on all of them.

    Args:
        what: ``"slides"``.
        value: the same text on ranks that agree.

    Raises:
        UserError: a rank differs from rank 0; it is named.
    """
    found = gathered(value)
    if differing := [number for number, one in enumerate(found) if one != found[0]]:
        raise UserError(
            f"rank {differing[0]} has read other {what} than rank 0; give all ranks the same files"
        )


def summed(values: Tensor) -> Tensor:
    """Adds a tensor over all ranks, in place; no gradient runs through it."""
    if size() > 1:
        from torch import distributed as dist

        with rank_losses():
            dist.all_reduce(values)
    return values


def alike(modules: Mapping[str, nn.Module]) -> None:
    """Gives all ranks the weights that rank 0 has, bit for bit."""
    if size() == 1:
        return
    from torch import distributed as dist

    with rank_losses():
        for name in sorted(modules):
            for value in modules[name].state_dict().values():
                dist.broadcast(value, src=0)


def shared_out(
    items: Sequence[Any], compute: Callable[[Any], T], holders: Sequence[int] | None = None
) -> list[T]:
    """The result for each item, computed by the ranks in turn and gathered in order.

    An exception of any rank is raised on all of them. While it computes, each is a rank of one.

    Args:
        items: the same on all ranks.
        compute: gives what pickles.
        holders: rank that computes each, where they are not to take turns.
    """
    own: dict[int, Any] = {}
    failed: BaseException | None = None
    holders = holders or [number % size() for number in range(len(items))]
    numbers = [number for number, holder in enumerate(holders) if holder == rank()]
    try:
        with apart():
            for number in numbers:
                own[number] = compute(items[number])
    except (KeyboardInterrupt, Exception) as error:
        if size() == 1 or isinstance(error, RankLost):
            raise
        failed = error
    everything = gathered((own, failed))
    for _, error in everything:
        if error is not None:
            raise error
    found = {number: one for results, _ in everything for number, one in results.items()}
    return [found[number] for number in range(len(items))]


@contextmanager
def apart() -> Iterator[None]:
    """What this rank computes for itself: in the block it is a rank of one."""
    before = _group.rank, _group.size
    _group.rank, _group.size = 0, 1
    try:
        yield
    finally:
        _group.rank, _group.size = before


def share_of(count: int) -> range:
    """Which of ``count`` items, in a row, are this rank's; the first ranks may have one more."""
    each, more = divmod(count, size())
    start = each * rank() + min(rank(), more)
    return range(start, start + each + (rank() < more))


@contextmanager
def sharing_rows(count: int) -> Iterator[None]:
    """All ranks compute the same in the block; functions that are made for it split the rows.

    Args:
        count: rows of the smallest thing; few are computed by each rank.
    """
    before, _group.shares_rows = _group.shares_rows, count >= _FEW_ROWS * size()
    try:
        yield
    finally:
        _group.shares_rows = before


def shares_rows() -> bool:
    """Whether the rows of what is computed are split over several ranks."""
    return _group.shares_rows and size() > 1


def rows_of(count: int) -> slice:
    """Which of ``count`` rows this rank computes, for :func:`all_rows`; all of them elsewhere."""
    if not shares_rows():
        return slice(0, count)
    each = _rows_each(count)
    return slice(min(each * rank(), count), min(each * (rank() + 1), count))


def _rows_each(count: int) -> int:
    """Rows of a rank: whole blocks, so that products of matrices round as those of one rank do."""
    each = -(-count // size())
    return each if each < BLOCK_ROWS else -(-each // BLOCK_ROWS) * BLOCK_ROWS


def all_rows(own: Tensor, count: int) -> Tensor:
    """The rows of all ranks (count, ...), from those of :func:`rows_of`; the same bits on all."""
    if not shares_rows():
        return own
    return gathered_rows(own, _rows_each(count))[:count]


def gathered_rows(own: Tensor, each: int) -> Tensor:
    """The rows of all ranks (each * ranks, ...), zero where a rank has fewer than ``each``."""
    padded = own.contiguous()
    if len(own) < each:
        padded = own.new_zeros(each, *own.shape[1:])
        padded[: len(own)] = own
    if size() == 1:
        return padded
    from torch import distributed as dist

    whole = own.new_empty(each * size(), *own.shape[1:])
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its newer name
    with rank_losses():
        gather(whole, padded)
    return whole


def added_rows(values: Tensor) -> Tensor:
    """Adds what ranks wrote to rows of their own, zeros elsewhere, in place."""
    return summed(values) if shares_rows() else values
