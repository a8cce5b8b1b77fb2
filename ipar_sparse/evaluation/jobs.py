"""Jobs side by side: one that fails costs itself and its followers, one that dies goes on."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..progress import where

if TYPE_CHECKING:
    from distributed import Client, Future

Work = Callable[[Any, threading.Event | None], None]
"""What is done for the key of a job. In a worker process it also gets the event that asks it to
save and raise KeyboardInterrupt; in this process ctrl-C does."""

_SAVE_SECONDS = 60  # that a worker has for that
_POLL_SECONDS = 1.0
_DEATHS = 3  # in a row, each soon after the job began, that it is not tried again after
_SOON = 600.0  # seconds; a worker that lived longer did not die of its job
_CARDS = "IPAR_SPARSE_CARDS"  # environment variable: what workers of this machine take in turn
_KEYS: list[Any] = []  # of the job that this process runs, where it is a worker


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Args:
        key: what the work function is called with; hashable, and can be pickled.
        after: key of the job that has to be done first, earlier in the list; None for none.
    """

    key: Any
    after: Any = None


@dataclass(frozen=True)
class Workers:
    """Where jobs run.

    Args:
        processes: of this machine; with one the work is done in this process.
        threads: of torch in each.
        cards: GPUs of this machine, which the processes take in turn.
        scheduler: address of a dask scheduler, or its file; its workers are used instead.
        check: says in a worker of it what keeps it from any job; None if nothing does.
    """

    processes: int = 1
    threads: int = 1
    cards: Sequence[str] = ()
    scheduler: str | None = None
    check: Callable[[], str | None] | None = None


def run_jobs(
    work: Work,
    jobs: Sequence[Job],
    workers: Workers,
    *,
    tell: Callable[[str], None] = lambda line: None,
    show: Callable[[Mapping[Any, str]], None] | None = None,
    show_every: float = 60.0,
) -> Iterator[tuple[Any, str | None]]:
    """Runs every job, and yields its key and its error in one line, or None, as each ends.

    A job whose predecessor failed is not run and fails with the same error. One whose process
    died begins again, in another. Processes are dask workers, so that a script that calls this
    needs ``if __name__ == "__main__":``. When the caller stops early (ctrl-C, ``close()``),
    workers are asked to save and waited for.

    Args:
        work: a function of a module.
        jobs: in the order in which they begin.
        workers: where they run.
        tell: called with what a person should know of workers, in a line.
        show: called in a thread with how far each running job is, in a line.
        show_every: so many seconds.

    Raises:
        UserError: the scheduler does not answer, or is lost, or a worker cannot do the work.
    """
    waiting, undone = list(jobs), {job.key for job in jobs}
    failed: dict[Any, str] = {}
    with _pool(work, workers, tell) as pool, _shown(pool, show, show_every):
        try:
            while waiting or pool.running:
                for job in [job for job in waiting if job.after in failed]:
                    waiting.remove(job)
                    failed[job.key] = failed[job.after]
                    yield job.key, failed[job.key]
                # never more than there are workers: a dying one takes all it was given with it
                ready = [job for job in waiting if job.after not in undone]
                for job, address in zip(ready, pool.idle(), strict=False):
                    waiting.remove(job)
                    pool.begin(job, address)
                ended, died = pool.ended()
                waiting[:0] = died
                for job, error in ended:
                    if error is None:
                        undone.discard(job.key)
                    else:
                        failed[job.key] = error
                    yield job.key, error
        finally:
            pool.stop()


def one_line(error: BaseException) -> str:
    """An error as one line for a list of failures."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def dask_setup(worker: Any) -> None:
    """Called by dask in every new worker process of this machine.

    Ctrl-C is for the parent, which passes it on. Of several GPUs the worker sees one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _CARDS in os.environ:
        cards = os.environ[_CARDS].split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = cards[int(worker.name) % len(cards)]


class _Here:
    """This process, which does one job at a time."""

    def __init__(self, work: Work):
        self.work, self.running = work, dict[Job, str | None]()

    def idle(self) -> list[str]:
        return ["here"]

    def begin(self, job: Job, address: str) -> None:
        _KEYS[:] = [job.key]
        try:
            self.running[job] = _attempt(self.work, job.key)
        finally:
            _KEYS.clear()

    def ended(self) -> tuple[list[tuple[Job, str | None]], list[Job]]:
        return [(job, self.running.pop(job)) for job in list(self.running)], []

    def look(self) -> dict[Any, str]:
        return {key: where() for key in _KEYS}

    def stop(self) -> None:
        pass


class _Cluster:
    """Workers of a dask scheduler, each of which does one job at a time.

    Args:
        client: of the scheduler.
        work: what is done.
        workers: how it was asked for.
        tell: called with lines for a person.
    """

    def __init__(self, client: Client, work: Work, workers: Workers, tell: Callable[[str], None]):
        self.client, self.work, self.workers, self.tell = client, work, workers, tell
        self.running: dict[Job, tuple[str, Future, float]] = {}
        self.deaths: dict[Job, int] = {}
        self.checked: set[str] = set()
        self.told_of_none = False

    def idle(self) -> list[str]:
        """Addresses of the workers that have nothing to do, each checked when it is first seen."""
        with self._reached():
            alive = self.client.nthreads()
        if self.workers.check:
            self.checked |= {one for one in alive.keys() - self.checked if self._is_fit(one)}
            alive = {one: threads for one, threads in alive.items() if one in self.checked}
        if self.workers.scheduler and not alive and not self.told_of_none:
            self.tell(f"no worker has joined {self.workers.scheduler} yet; waiting for one")
        self.told_of_none = not alive
        busy = {address for address, _, _ in self.running.values()}
        return [address for address in alive if address not in busy]

    def begin(self, job: Job, address: str) -> None:
        threads = None if self.workers.scheduler else self.workers.threads
        task = partial(_attempt_in_worker, self.work, job.key, threads)
        with self._reached():
            future = self.client.submit(task, pure=False, workers=[address])
        self.running[job] = address, future, time.monotonic()

    def ended(self) -> tuple[list[tuple[Job, str | None]], list[Job]]:
        """Takes out jobs that have ended, with their errors, and jobs whose worker has died."""
        from distributed import KilledWorker, wait

        ended, died = list[tuple[Job, str | None]](), list[Job]()
        with self._reached():
            with suppress(TimeoutError):
                futures = [future for _, future, _ in self.running.values()]
                wait(futures, timeout=_POLL_SECONDS, return_when="FIRST_COMPLETED")
            if not self.running:
                time.sleep(_POLL_SECONDS)
            alive = self.client.nthreads()
            for job, (address, future, began) in list(self.running.items()):
                if future.status == "finished":
                    ended.append((job, future.result()))
                elif future.done():
                    error = future.exception()  # raises where the scheduler was lost
                    if isinstance(error, KilledWorker):
                        self._died(job, address, began, ended, died)
                    else:
                        ended.append((job, one_line(error)))
                elif address not in alive:
                    future.cancel()
                    self._died(job, address, began, ended, died)
                else:
                    continue
                del self.running[job]
        return ended, died

    def look(self) -> dict[Any, str]:
        keys = {address: job.key for job, (address, _, _) in list(self.running.items())}
        found = self.client.run(_where, workers=list(keys), on_error="ignore") if keys else {}
        return {keys[address]: line for address, line in found.items() if line is not None}

    def stop(self) -> None:
        """Asks workers to save, and waits until they have."""
        with suppress(Exception):  # a worker, or the scheduler, may be gone by now
            self.client.cancel([future for _, future, _ in self.running.values()])
            until = time.monotonic() + _SAVE_SECONDS
            while self.look() and time.monotonic() < until:
                time.sleep(0.3)

    def _died(self, job, address, began, ended, died) -> None:
        soon = time.monotonic() - began < _SOON
        self.deaths[job] = self.deaths.get(job, 0) + 1 if soon else 1
        if self.deaths[job] == _DEATHS:
            error = f"its process died, {_DEATHS} times in a row; out of memory, perhaps"
            ended.append((job, error))
        else:
            self.tell(f"worker {address} died; what it did goes on from its last checkpoint")
            died.append(job)

    def _is_fit(self, address: str) -> bool:
        """Whether a worker can do the work; False where it is gone again.

        Raises:
            UserError: it cannot.
        """
        try:
            found = self.client.run(self.workers.check, workers=[address])[address]
        except (OSError, KeyError):
            return False
        except Exception as error:  # it lacks this package, or has an older one
            found = f"{one_line(error)}; start it in the environment of this command"
        if found:
            raise UserError(f"worker {address}: {found}")
        return True

    @contextmanager
    def _reached(self) -> Iterator[None]:
        from distributed import CancelledError
        from distributed.comm import CommClosedError

        try:
            yield
        except (CommClosedError, CancelledError, OSError):
            raise UserError(
                f"the scheduler {self.workers.scheduler} was lost; start one, and the same "
                "command goes on with the study"
            ) from None


@contextmanager
def _pool(work: Work, workers: Workers, tell: Callable[[str], None]) -> Iterator[_Here | _Cluster]:
    if workers.scheduler is None and workers.processes == 1:
        yield _Here(work)
        return
    with standing(workers.scheduler) if workers.scheduler else _local(workers) as client:
        yield _Cluster(client, work, workers, tell)


@contextmanager
def standing(scheduler: str) -> Iterator[Client]:
    """A client of a scheduler that somebody started.

    Raises:
        UserError: it does not answer, or is another version of dask.
    """
    import distributed

    for name in ("distributed", "distributed.client"):  # dask gives each a level of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)
    file = Path(scheduler).is_file()
    if not file and "://" not in scheduler and (os.sep in scheduler or ".json" in scheduler):
        raise UserError(
            f"--scheduler {scheduler}: no such file; `dask scheduler --scheduler-file {scheduler}` "
            "writes it, or give an address, e.g. tcp://HOST:8786"
        )
    with ExitStack() as opened:
        try:
            with warnings.catch_warnings(action="ignore"):
                given = {"scheduler_file": scheduler} if file else {"address": scheduler}
                client = opened.enter_context(distributed.Client(**given, timeout=10))
                theirs = client.get_versions()["scheduler"]["packages"]["distributed"]
        except Exception as error:
            raise UserError(
                f"--scheduler {scheduler}: no dask scheduler answers ({one_line(error)}); start "
                "one with `dask scheduler`, and give its address, e.g. tcp://HOST:8786"
            ) from None
        if theirs != distributed.__version__:
            raise UserError(
                f"--scheduler {scheduler}: it runs distributed {theirs}, and this command "
                f"{distributed.__version__}; start it in the same environment"
            )
        yield client


@contextmanager
def _local(workers: Workers) -> Iterator[Client]:
    """A client of dask workers on this machine, each a process of one job at a time."""
    import dask
    from distributed import Client, LocalCluster

    variables: dict[str, Any] = {"OMP_NUM_THREADS": workers.threads}
    if workers.cards:
        variables[_CARDS] = ",".join(workers.cards)
    settings = {
        "distributed.nanny.pre-spawn-environ": variables,
        "distributed.scheduler.allowed-failures": 0,
        "distributed.scheduler.worker-ttl": None,  # long steps may hold the interpreter
        "distributed.worker.profile.enabled": False,
    }
    before = dict(os.environ)
    try:
        with (
            dask.config.set(settings),
            LocalCluster(
                n_workers=workers.processes,
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


@contextmanager
def _shown(
    pool: _Here | _Cluster, show: Callable[[Mapping[Any, str]], None] | None, every: float
) -> Iterator[None]:
    """Shows how far each running job is, in a thread."""
    ended = threading.Event()

    def watch():
        while not ended.wait(every):
            found: dict[Any, str] = {}
            with suppress(Exception):  # a worker may die while it is asked
                found = pool.look()
            show(found)

    if show is not None:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


class _Asked(threading.Event):
    """Set where nobody waits for a task of this worker any longer, or the worker closes."""

    def __init__(self) -> None:
        super().__init__()
        from distributed import get_worker

        self.worker = get_worker()
        self.task = self.worker.get_current_task()

    def is_set(self) -> bool:
        task = self.worker.state.tasks.get(self.task)
        wanted = task is not None and task.state != "cancelled"
        open_ = self.worker.status.name in ("running", "paused", "init")
        return super().is_set() or not (wanted and open_)

    def wait(self, timeout: float | None = None) -> bool:
        until = None if timeout is None else time.monotonic() + timeout
        while not self.is_set() and (until is None or time.monotonic() < until):
            super().wait(0.05)
        return self.is_set()


def _where() -> str | None:
    """How far the job is that this process runs; None where it runs none."""
    return where() if _KEYS else None


def _attempt(work: Work, key: Any, stop: threading.Event | None = None) -> str | None:
    try:
        work(key, stop)
    except Exception as error:
        return one_line(error)
    return None


def _attempt_in_worker(work: Work, key: Any, threads: int | None) -> str | None:
    import torch

    stop = _Asked()
    torch.set_num_threads(threads or stop.worker.state.nthreads)
    _KEYS.append(key)
    try:
        return _attempt(work, key, stop)
    except KeyboardInterrupt:
        return "stopped"
    finally:
        _KEYS.remove(key)
