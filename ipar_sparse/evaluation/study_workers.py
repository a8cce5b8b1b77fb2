"""Where the runs of a study are computed: how many fit here, and what workers elsewhere need."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..config import resolve_device
from ..data.paths import Source
from ..errors import UserError
from ..inference.costs import slide_size, training_cost
from ..usage import free_host_memory
from .jobs import Workers
from .study_plan import PLAN, Study, read_all, read_scored_cells

RUNS_PER_GPU = 4
"""Runs that share a GPU."""
_HEADROOM = 0.95  # share of the free memory that runs may take together


def local_workers(
    study: Study, runs: int, jobs: int | None = None, runs_per_gpu: int | None = None
) -> Workers:
    """As many processes as cores, memory and GPUs of this machine allow.

    A run on the CPU has two cores at least, one on a GPU has a core.

    Args:
        study: the plan.
        runs: that are left to do.
        jobs: processes asked for, whatever there is.
        runs_per_gpu: that share a GPU, while its memory allows.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = {config.train.device for config in study.variants.values()}
    on_gpu = any(resolve_device(name).type == "cuda" for name in names)
    cards = _cards() if on_gpu and names <= {"auto", "cuda"} else []
    if jobs is None:
        host, device = _largest(study, on_gpu)
        jobs = min(cores if on_gpu else cores // 2, int(_HEADROOM * free_host_memory() / host))
        if on_gpu:
            fit = min(int(_HEADROOM * free / device) for free in _free_device_memory(names))
            jobs = min(jobs, max(1, len(cards)) * max(1, min(runs_per_gpu or RUNS_PER_GPU, fit)))
    processes = max(1, min(jobs, runs))
    return Workers(processes, threads_per_job(cores // processes), tuple(cards))


def threads_per_job(cores: int) -> int:
    """Threads of a job that has so many cores, no more than ``OMP_NUM_THREADS`` allows.

    Threads beyond the cores wait for each other by spinning.
    """
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(allowed)) if allowed.isdigit() else cores)


def cluster_workers(scheduler: str, study: Study, out: Path) -> Workers:
    """The workers of a dask scheduler, which see the folders that this process sees.

    Args:
        scheduler: its address, or its file.
        study: the plan, as it lies in ``out``.
        out: folder of the study.
    """
    paths = {str(Source.parse(Path(file)).path) for file in (*study.files, *study.cells)}
    files = tuple((path, _size(path)) for path in sorted(paths))
    devices = tuple(sorted({config.train.device for config in study.variants.values()}))
    out = Path(out).absolute()
    check = _Check(_versions(), files, devices, out, _digest(out / PLAN))
    return Workers(scheduler=scheduler, check=check)


@dataclass(frozen=True)
class _Check:
    """What keeps a worker from the runs of a study, in a line; None if nothing does."""

    versions: dict[str, str]
    files: tuple[tuple[str, int | None], ...]
    devices: tuple[str, ...]
    out: Path
    plan: str | None

    def __call__(self) -> str | None:
        own = _versions()
        for name, version in self.versions.items():
            if own[name] != version:
                return (
                    f"it has {name} {own[name]}, and this command {version}; start it in the "
                    "same environment"
                )
        if _digest(self.out / PLAN) != self.plan:
            return f"it does not see {self.out}; choose an --out that all machines share"
        if not os.access(self.out, os.W_OK):
            return f"it cannot write to {self.out}; choose another --out"
        for path, size in self.files:
            if not Path(path).exists():
                return f"it does not see {path}; keep slides where all machines see them"
            if _size(path) != size:
                return f"it sees another {path}; keep slides where all machines see them"
        try:
            for name in self.devices:
                resolve_device(name)
        except UserError as error:
            return str(error)
        return None


def _versions() -> dict[str, str]:
    import distributed
    import torch

    found = {"ipar_sparse": __version__, "python": ".".join(map(str, sys.version_info[:2]))}
    torch_version = str(torch.__version__).partition("+")[0]  # the rest names the build
    return found | {"torch": torch_version, "distributed": distributed.__version__}


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _size(path: str) -> int | None:
    """Bytes of a file; None of a folder."""
    return os.path.getsize(path) if os.path.isfile(path) else None


def _largest(study: Study, on_gpu: bool) -> tuple[float, float]:
    """Bytes of host and GPU that a run takes at most."""
    costs = []
    for config in study.variants.values():
        slides = [*read_all(study.files, config), *read_scored_cells(study.cells, config)]
        costs.append(training_cost([slide_size(one) for one in slides], [], config, on_gpu))
    return max(cost.host for cost in costs), max(cost.device for cost in costs)


def _cards() -> list[str]:
    """Names of the GPUs that this process sees."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def _free_device_memory(names: Iterable[str]) -> list[int]:
    """Bytes that are free on each GPU that runs may use."""
    import torch

    devices = {resolve_device(name) for name in names}
    found = {i for i in range(torch.cuda.device_count()) if torch.device("cuda") in devices}
    found |= {one.index for one in devices if one.type == "cuda" and one.index is not None}
    return [torch.cuda.mem_get_info(index)[0] for index in sorted(found)]
