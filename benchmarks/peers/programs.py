"""The programs, where they are installed, and how one of them is run."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ADAPTERS = Path(__file__).parent / "adapters"
_INSTALL_MINUTES = 30


PROGRAMS = {
    "moscot": ("moscot==0.5.2",),
    "novosparc": ("novosparc==0.4.4", "scipy<1.14"),
    "tangram": ("tangram-sc==1.0.4", "scipy<1.14", "setuptools<81"),
    "celery": ("CeLEryPy==1.2.1",),
}
"""What pip is asked for, program by program."""


@dataclass(frozen=True)
class Attempt:
    """What a program left behind.

    Args:
        pos: positions (n, 2); None where it failed.
        in_frame: the same in the frame of the slide, where they differ from these.
        state: ``"done"``, ``"did not install"``, ``"did not fit"``, ``"did not end"`` or
            ``"failed"``.
        seconds: from its start to its end, imports included.
        gigabytes: peak of its resident memory.
        error: its last line.
    """

    pos: np.ndarray | None
    state: str
    seconds: float = 0.0
    gigabytes: float = 0.0
    error: str = ""
    in_frame: np.ndarray | None = None


def install(name: str, environments: Path) -> str | None:
    """Makes the environment of a program, if it is missing; an error's last line, or None."""
    folder = environments / name
    if (folder / "installed").is_file():
        return None
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    steps = [
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [*pip, *PROGRAMS[name]],
    ]
    for step in steps:
        try:
            done = subprocess.run(
                step, capture_output=True, text=True, timeout=60 * _INSTALL_MINUTES, check=False
            )
        except subprocess.TimeoutExpired:
            return f"pip took more than {_INSTALL_MINUTES} minutes"
        if done.returncode:
            return _last_line(done.stderr)
    (folder / "installed").write_text("\n".join(PROGRAMS[name]) + "\n")
    return None


def run(name: str, python: Path, job: Path, minutes: float, gigabytes: float) -> Attempt:
    """Runs the adapter of a program on ``slide.h5ad`` and ``cells.h5ad`` of a folder.

    Args:
        name: of the adapter.
        python: interpreter of the program's environment.
        job: the folder; takes ``positions.npy`` and ``log.txt``.
        minutes: after which it is stopped.
        gigabytes: of address space that it may ask for.
    """

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 1e9),) * 2)

    begin, log = time.monotonic(), job / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [str(python), str(ADAPTERS / f"run_{name}.py"), str(job)],
            stdout=stream,
            stderr=stream,
            preexec_fn=limited,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
        )
        peak, state = 0.0, None
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            if time.monotonic() - begin > 60 * minutes:
                process.kill()
                state = "did not end"
            time.sleep(0.1)
    seconds, error = time.monotonic() - begin, _last_line(log.read_text(errors="replace"))
    found = job / "positions.npy"
    if process.returncode == 0 and found.is_file():
        own = job / "positions_in_frame.npy"
        in_frame = np.load(own) if own.is_file() else None
        return Attempt(np.load(found), "done", seconds, peak, in_frame=in_frame)
    if state is None:
        short = "MemoryError" in error or "allocate" in error or process.returncode == -9
        state = "did not fit" if short else "failed"
    return Attempt(None, state, seconds, peak, error)


def _resident(pid: int) -> float:
    """Resident memory of a process in gigabytes."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * resource.getpagesize() / 1e9


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
