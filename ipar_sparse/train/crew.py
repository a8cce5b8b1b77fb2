"""Jobs side by side in processes of their own: one that fails or dies takes nothing with it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from typing import Any

import torch

from ..errors import UserError

_SAVING = 60.0  # seconds a worker has to save its state once it is asked to stop


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Args:
        key: what the work function is called with; can be pickled.
        after: key of the job that has to be done first.
    """

    key: Hashable
    after: Hashable | None = None


def run_jobs(
    work: Callable[[Any], None],
    jobs: Sequence[Job],
    *,
    processes: int = 1,
    threads: int | None = None,
) -> Iterator[tuple[Hashable, str | None]]:
    """Runs every job and tells, as each ends, its key and the one-line error if it failed.

    A job whose forerunner failed is not run and fails with the same error. With one process the
    work is done here. When the caller stops early (ctrl-C, ``close()``), workers are asked to
    stop as by ctrl-C and waited for.

    Args:
        work: a function of a module, called with the key of each job.
        jobs: in the order in which they start; ``after`` names one of them.
        processes: jobs at a time.
        threads: threads of torch in each process; None = as here.
    """
    crew = [_Worker(work, threads) for _ in range(processes)] if processes > 1 else []
    waiting, failed, done = list(jobs), {}, set()
    known = {job.key for job in jobs}
    try:
        while waiting or any(worker.job for worker in crew):
            for job in [job for job in waiting if job.after in failed]:
                waiting.remove(job)
                failed[job.key] = failed[job.after]
                yield job.key, failed[job.key]
            ready = [job for job in waiting if job.after not in known or job.after in done]
            ended: list[tuple[Hashable, str | None]] = []
            if not crew and ready:
                waiting.remove(ready[0])
                ended.append((ready[0].key, _attempt(work, ready[0].key)))
            for worker, job in zip([w for w in crew if w.job is None], ready, strict=False):
                waiting.remove(job)
                worker.start(job)
            if busy := {worker.line: worker for worker in crew if worker.job}:
                ended += [busy[line].end() for line in connection.wait(list(busy))]
            for key, error in ended:
                done.add(key)
                if error is not None:
                    done.discard(key)
                    failed[key] = error
                yield key, error
    finally:
        for worker in crew:
            worker.interrupt()
        for worker in crew:
            worker.close()


def one_line(error: BaseException) -> str:
    """An error as one line for a list of failures."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


@dataclass
class _Worker:
    """A process that does one job at a time, and is replaced if it dies."""

    work: Callable[[Any], None]
    threads: int | None
    job: Job | None = None
    line: connection.Connection | None = None
    process: Any = field(default=None, repr=False)

    def start(self, job: Job) -> None:
        if self.process is None:
            context = get_context("spawn")
            self.line, theirs = context.Pipe()
            self.process = context.Process(
                target=_serve, args=(theirs, self.work, self.threads), daemon=True
            )
            with _threads_of_children(self.threads):
                self.process.start()
            theirs.close()
        self.job = job
        self.line.send(job.key)

    def end(self) -> tuple[Hashable, str | None]:
        job, self.job = self.job, None
        try:
            return job.key, self.line.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            self.process = None
            hint = " (killed: out of memory?)" if code == -signal.SIGKILL else ""
            return job.key, f"its process died with exit code {code}{hint}"

    def interrupt(self) -> None:
        if self.process is not None and self.job is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        if self.process is None:
            return
        self.line.close()
        self.process.join(_SAVING)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _attempt(work, key) -> str | None:
    try:
        work(key)
    except Exception as error:
        return one_line(error)
    return None


def _serve(line, work, threads) -> None:
    if hasattr(os, "setsid"):
        os.setsid()  # ctrl-C on the terminal reaches the parent alone, which passes it on once
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        while True:
            line.send(_attempt(work, line.recv()))
    except (EOFError, OSError, KeyboardInterrupt):
        return


def _die_with_parent() -> None:
    parent_process().join()
    os._exit(1)


class _threads_of_children:
    """Lets BLAS and OpenMP of processes started inside use so many threads."""

    def __init__(self, threads: int | None):
        self.threads = threads

    def __enter__(self):
        self.before = os.environ.get("OMP_NUM_THREADS")
        if self.threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(self.threads)

    def __exit__(self, *exception):
        if self.before is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = self.before
