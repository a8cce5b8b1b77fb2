"""Memory and work of this process and its GPU, told by the system; nothing is loaded for it."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path


def proc_bytes(path: str, name: str) -> int:
    """A number of bytes that Linux tells, 0 elsewhere."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith(f"{name}:")), 0)


beside: int | None = None
"""Number of a process that works for this one; its memory is counted, too."""


def _processes() -> list[str]:
    return ["self"] if beside is None else ["self", str(beside)]


def host_peak() -> int:
    """The most bytes of host memory held since the start, or the last :func:`reset_host_peak`."""
    held = sum(proc_bytes(f"/proc/{one}/status", "VmHWM") for one in _processes())
    return held or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_host_peak(trim: bool = False) -> None:
    """Counts the peak anew from what is held now, where the system can.

    Args:
        trim: hand back what was freed before, so that it is not taken from again.
    """
    with suppress(OSError, AttributeError):  # not Linux, or another C library
        if trim:
            ctypes.CDLL(None).malloc_trim(0)
        for one in _processes():
            Path(f"/proc/{one}/clear_refs").write_text("5")


def host_memory() -> int:
    """Bytes of host memory that this process holds now; 0 where nothing tells."""
    return proc_bytes("/proc/self/status", "VmRSS")


def free_host_memory() -> int:
    """Bytes of host memory that can still be taken, in a container of what it may take."""
    free = proc_bytes("/proc/meminfo", "MemAvailable")
    free = free or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with suppress(OSError, ValueError):  # no container, or one without a limit
        folder = Path("/sys/fs/cgroup")
        limit, used = (int((folder / f"memory.{x}").read_text()) for x in ("max", "current"))
        stat = dict(x.split() for x in (folder / "memory.stat").read_text().splitlines())
        used -= int(stat.get("inactive_file", 0))  # of files, and given back when asked for
        free = min(free, max(limit - used, 0))
    return free


def device_peak(reset: bool = False) -> int:
    """The most bytes of GPU memory that torch held; 0 where it has not begun to use a GPU.

    Args:
        reset: count anew from now on.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    peak = torch.cuda.max_memory_allocated()
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return peak


def has_gpu_driver() -> bool:
    """Whether a driver of NVIDIA GPUs is installed."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def load_ahead(gpu: int | None) -> None:
    """Loads torch's libraries, and prepares a GPU, in threads: that needs little of Python.

    Args:
        gpu: its number; None for no GPU.
    """

    def libraries() -> None:
        with suppress(OSError, AttributeError):  # in the order and modes in which torch loads them
            folder = Path(find_spec("torch").origin).parent / "lib"
            ctypes.CDLL(str(folder / "libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
            ctypes.CDLL(str(folder / "libtorch_python.so"))

    def context() -> None:
        with suppress(OSError, AttributeError):  # torch takes it over
            cuda, device, made = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
            if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), gpu) == 0:
                cuda.cuDevicePrimaryCtxRetain(ctypes.byref(made), device)

    def compiler() -> None:
        with suppress(ImportError):
            from triton.runtime.cache import triton_key

            triton_key()  # reads 400 MB, to know whether compiled kernels are those of this version

    if "torch" not in sys.modules and sys.platform == "linux":
        threading.Thread(target=libraries, daemon=True).start()
        if gpu is not None:
            os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch does
            threading.Thread(target=context, daemon=True).start()
            threading.Thread(target=compiler, daemon=True).start()


def seconds_since_start() -> float:
    """Seconds since this process began, where Linux tells; else since this module was loaded."""
    with suppress(OSError, ValueError, IndexError):
        began = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        up = Path("/proc/uptime").read_text().split()[0]
        return float(up) - int(began) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - _LOADED


_LOADED = time.monotonic()


class DeviceSampler:
    """Share of time in which a GPU works, as ``nvidia-smi`` sees it five times a second.

    Without that program, or without a GPU, it has nothing to tell.
    """

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []
        self._process: subprocess.Popen | None = None
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        with suppress(OSError):
            self._process = subprocess.Popen(
                [*command, "-lms", "200"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
                text=True,
            )
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            with suppress(ValueError):
                self._samples.append((time.monotonic(), float(line) / 100))

    def busy(self, begin: float, end: float) -> float | None:
        """Mean share between two times of ``time.monotonic``; None without a sample."""
        found = [share for at, share in list(self._samples) if begin <= at <= end]
        return sum(found) / len(found) if found else None

    def close(self) -> None:
        """Ends the sampling."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
