"""Jobs side by side in worker processes: one that fails or dies costs itself and its followers."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from distributed import Client, Future

Work = Callable[[Any, threading.Event | None], None]
"""What is done for the key of a job. In a worker process it also gets the event that asks it to
save and raise KeyboardInterrupt; in this process ctrl-C does."""

_SAVE_SECONDS = 60  # that a worker has for that
_STOP = threading.Event()  # of this process, where it is a worker


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Args:
        key: what the work function is called with; hashable, and can be pickled.
        after: key of the job that has to be done first, earlier in the list; None for none.
    """

    key: Any
    after: Any = None


def run_jobs(
    work: Work, jobs: Sequence[Job], *, processes: int = 1, threads: int = 1
) -> Iterator[tuple[Any, str | None]]:
    """Runs every job, and yields its key and its error in one line, or None, as each ends.

    A job whose predecessor failed is not run and fails with the same error. With one process the
    work is done in this one. With more it is done by dask workers, so that a script that calls
    this needs ``if __name__ == "__main__":``. When the caller stops early (ctrl-C, ``close()``),
    workers are asked to save and waited for.

    Args:
        work: a function of a module.
        jobs: in the order in which they begin.
        processes: jobs at a time.
        threads: of torch in each worker process.
    """
    waiting, undone = list(jobs), {job.key for job in jobs}
    running: dict[Job, Future] = {}
    failed: dict[Any, str] = {}
    with _workers(processes, threads) if processes > 1 else nullcontext() as client:
        try:
            while waiting or running:
                for job in [job for job in waiting if job.after in failed]:
                    waiting.remove(job)
                    failed[job.key] = failed[job.after]
                    yield job.key, failed[job.key]
                # never more than there are workers: a dying one takes all it was given with it
                ready = [job for job in waiting if job.after not in undone]
                ready = ready[: processes - len(running)]
                waiting = [job for job in waiting if job not in ready]
                if client is None:
                    ended = [(job, _attempt(work, job.key)) for job in ready]
                else:
                    for job in ready:
                        task = partial(_attempt_in_worker, work, job.key, threads)
                        running[job] = client.submit(task, pure=False)
                    ended = _ended(running)
                for job, error in ended:
                    if error is None:
                        undone.discard(job.key)
                    else:
                        failed[job.key] = error
                    yield job.key, error
        finally:
            if client is not None and running:
                _stop(client, list(running.values()))


def one_line(error: BaseException) -> str:
    """An error as one line for a list of failures."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def dask_setup(worker: Any) -> None:
    """Called by dask in every new worker process: ctrl-C is for the parent, which passes it on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _workers(count: int, threads: int) -> Iterator[Client]:
    """A client of so many dask workers on this machine, each a process of one job at a time."""
    import dask
    from distributed import Client, LocalCluster

    settings = {
        "distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": threads},
        "distributed.scheduler.allowed-failures": 0,
        "distributed.scheduler.no-workers-timeout": "5 minutes",
        "distributed.scheduler.worker-ttl": None,  # long steps may hold the interpreter
        "distributed.worker.profile.enabled": False,
    }
    before = dict(os.environ)
    try:
        with (
            dask.config.set(settings),
            LocalCluster(
                n_workers=count,
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",  # any free port: two studies may run
                scheduler_kwargs={"dashboard": False},
                memory_limit=None,
                silence_logs=logging.CRITICAL,
                preload=__name__,
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client
    finally:
        for name in os.environ.keys() - before.keys():  # dask leaves what workers were to see
            del os.environ[name]
        os.environ.update(before)


def _ended(running: dict[Job, Future]) -> list[tuple[Job, str | None]]:
    """Takes out the jobs that have ended, at least one if any is running, with their errors."""
    from distributed import wait

    if running:
        wait(list(running.values()), return_when="FIRST_COMPLETED")
    ended = [job for job, future in running.items() if future.done()]
    return [(job, _error(running.pop(job))) for job in ended]


def _error(future: Future) -> str | None:
    from distributed import KilledWorker

    error = future.exception()
    if isinstance(error, KilledWorker):
        return "its process died; out of memory, perhaps"
    return future.result() if error is None else one_line(error)


def _stop(client: Client, futures: list[Future]) -> None:
    """Asks workers to save, and waits until they have."""
    from distributed import wait

    with suppress(Exception):  # a worker may be gone by now
        client.run(_ask_to_stop)
        wait(futures, timeout=_SAVE_SECONDS)


def _ask_to_stop() -> None:
    _STOP.set()


def _attempt(work: Work, key: Any, stop: threading.Event | None = None) -> str | None:
    try:
        work(key, stop)
    except Exception as error:
        return one_line(error)
    return None


def _attempt_in_worker(work: Work, key: Any, threads: int) -> str | None:
    import torch

    torch.set_num_threads(threads)
    try:
        return _attempt(work, key, _STOP)
    except KeyboardInterrupt:
        return "stopped"
