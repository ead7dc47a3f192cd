"""Where to compute: processors, their names and their free memory.

Nothing here starts a GPU unless one is asked for.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import psutil
import torch

from ..job import InputError


def resolve(name: str = "auto") -> torch.device:
    """``auto`` (first CUDA GPU, else CPU), ``cpu``, ``cuda`` or ``cuda:N`` as a torch device.

    Raises:
        InputError: unknown name, no CUDA here, or no GPU of that number.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device '{name}' is unknown.", "Choose auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            have = f"This machine has {count} CUDA GPU(s)." if count else "This machine has no usable CUDA GPU."
            raise InputError(f"device '{name}' is not available. {have}", "Choose --device auto or cpu.")
        device = torch.device("cuda", device.index or 0)
    return device


@contextmanager
def run_settings(device: torch.device, threads: int | None, seed: int) -> Iterator[None]:
    """Threads and seed of one run. Afterwards, also after an error, torch's thread count and random state of the CPU
    and of ``device`` are what they were, so that one job of a process does not influence the next.

    Args:
        device: where the run computes.
        threads: CPU threads; None or 0 leaves them.
        seed: of torch's global random numbers.
    """
    before = torch.get_num_threads()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if threads:
            torch.set_num_threads(threads)
        try:
            with kept_pages():
                yield
        finally:
            torch.set_num_threads(before)


#: ``mallopt``'s parameters of glibc's malloc.h, with the values of a run and glibc's own.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = (-1, 2**31 - 1, 128 * 1024), (-4, 0, 65536)


@contextmanager
def kept_pages() -> Iterator[None]:
    """Within, memory that is freed stays with the process for the next tensor; afterwards it is given back.

    glibc returns every large block to the system at once and asks for it again with the next one, page by page: a
    quarter of the processor time of a registration on a busy machine (results/transforms.md). Does nothing where the
    C library is another one.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    for parameter, ours, _ in (_M_TRIM_THRESHOLD, _M_MMAP_MAX):
        mallopt(parameter, ours)
    try:
        yield
    finally:
        for parameter, _, usual in (_M_TRIM_THRESHOLD, _M_MMAP_MAX):
            mallopt(parameter, usual)
        trim(0)


def free_memory(device: torch.device) -> int:
    """Bytes that a run may take now. On Linux a container's limit counts as well as the machine's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(int(psutil.virtual_memory().available), _container_room())


def _container_room() -> int:
    """Bytes left under the cgroup's limit, or a very large number."""
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            top = limit.read().strip()
            return sys.maxsize if top == "max" else max(0, int(top) - int(used.read()))
    except (OSError, ValueError):
        return sys.maxsize


def peak_memory_gb() -> float:
    """Largest resident size of this process so far, in 10^9 bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e9
    import resource  # not on Windows

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024) / 1e9


def listing() -> list[dict]:
    """Every device with its name and memory in GB, CPU first, for the user interface."""
    rows = [
        {
            "name": "cpu",
            "title": f"CPU, {os.cpu_count()} cores",
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "free_gb": round(free_memory(torch.device("cpu")) / 1e9, 1),
        }
    ]
    if torch.cuda.is_available():
        for k in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(k)
            rows.append(
                {"name": f"cuda:{k}", "title": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}
            )
    return rows


@lru_cache(maxsize=4)
def fastest_convolutions(threads: int | None = None) -> tuple[torch.dtype, torch.memory_format]:
    """Precision and memory layout in which this processor convolves volumes fastest, measured at the first call (below
    a second).

    Half precision is only taken where it is a fifth faster: elsewhere it is emulated, or not worth its rounding.

    Args:
        threads: only tells measurements with other numbers of threads apart.
    """
    layouts = (torch.channels_last_3d, torch.contiguous_format)
    seconds = {
        (dtype, layout): _convolution_seconds(dtype, layout)
        for dtype in (torch.float32, torch.bfloat16)
        for layout in layouts
    }
    full, half = (min(layouts, key=lambda layout: seconds[dtype, layout]) for dtype in (torch.float32, torch.bfloat16))
    if seconds[torch.bfloat16, half] < 0.8 * seconds[torch.float32, full]:
        return torch.bfloat16, half
    return torch.float32, full


def half_precision_pays(threads: int | None = None) -> bool:
    """Whether bfloat16 convolutions are faster on this processor; see :func:`fastest_convolutions`."""
    return fastest_convolutions(threads or torch.get_num_threads())[0] is torch.bfloat16


@torch.no_grad()
def _convolution_seconds(dtype: torch.dtype, layout: torch.memory_format) -> float:
    """The fastest of a few runs of a small network's typical convolution; infinite where it cannot be run."""
    try:
        x = torch.zeros(2, 32, 24, 24, 24, dtype=dtype).to(memory_format=layout)
        convolution = torch.nn.Conv3d(32, 32, 3, padding=1).to(dtype=dtype)
        convolution.to(memory_format=layout)  # type: ignore[call-overload]  # missing in torch's stubs
        best = math.inf
        for _ in range(4):
            begun = time.perf_counter()
            convolution(x)
            best = min(best, time.perf_counter() - begun)
        return best
    except RuntimeError:  # a build without this kernel
        return math.inf
