"""What this machine is and what it can do: the ceilings that a stage's time is held against.

Bandwidth and matrix peak are measured here, each as the best of many runs of plain PyTorch on buffers far larger than
the caches; no data sheet is quoted.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "transformers", "peft", "av", "faiss-cpu", "faiss-gpu-cu12", "numpy", "evc-fast")


def describe(device: str, threads: int) -> dict:
    """Device, instruction set, threads, versions and date: everything a figure needs beside it."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = gpu_properties(device) if device.startswith("cuda") else {}
    return gpu | {
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if gpu else processor_name(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "memory_bytes": total_memory(),
        "versions": versions,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def gpu_properties(device: str) -> dict:
    """What a figure of a GPU needs beside its name."""
    found = torch.cuda.get_device_properties(device)
    return {
        "gpu": {
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "cache_bytes": found.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    }


def processor_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def total_memory() -> int | None:
    """Bytes of physical memory; None where the system does not tell."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_memory(device: str) -> int | None:
    """Bytes that may still be taken: free GPU memory, or the system's estimate cut by the control group's limit.

    None where the system does not tell.
    """
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    # A container may be held to less than the machine has free.
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if Path(limit).exists() and Path(used).exists():
            text = Path(limit).read_text().strip()
            if text.isdigit():
                available = min(available, int(text) - int(Path(used).read_text()))
    return max(available, 0)


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far.

    Linux: VmHWM, which starts anew with the program; getrusage's ru_maxrss would also hold what the parent had resident
    when it started this process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def missing_package(*names: str) -> str | None:
    """The first of these import names that is not installed, or None."""
    return next((name for name in names if importlib.util.find_spec(name) is None), None)


def synchronise(device: str) -> None:
    """Wait for the device's queue, so that the clock reads finished work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def best_seconds(
    run: Callable[[], object], device: str, *, budget: float = 0.8, least: int = 3, most: int = 200
) -> float:
    """Minimum time of one `run()` over as many runs as fit into `budget` seconds.

    The first run warms up; it counts where it alone takes longer than the budget.
    """
    begin = time.perf_counter()
    run()
    synchronise(device)
    first = time.perf_counter() - begin
    if first > budget:
        return first
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < least or (len(times) < most and time.perf_counter() - begin < budget):
        start = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times)


def measure_ceilings(device: str, dtypes: list[torch.dtype], *, quick: bool = False) -> dict:
    """Read and copy bandwidth in bytes/s and matrix peak in FLOP/s (2 a multiply-add) by dtype name.

    A matrix product is timed in both weight layouts ([K, N] and the [N, K] of a linear layer) and at several sizes; the
    best counts. On a CPU the peak of a 16-bit type is at least float32's, since such data can be widened in registers
    and multiplied there, whatever the library does: otherwise a slow library would pass for a low ceiling.
    """
    budget = 0.05 if quick else 0.8
    buffer_bytes = 64 * 2**20 if quick else 512 * 2**20
    if device.startswith("cuda") and not quick:
        buffer_bytes, budget = 4 * 2**30, 0.2  # each run takes a millisecond or two
    source = torch.ones(buffer_bytes // 4, device=device)
    target = torch.empty_like(source)
    reads = (source.sum, source.amax, source.view(torch.int64).sum)
    read = max(buffer_bytes / best_seconds(run, device, budget=budget) for run in reads)
    copy = 2 * buffer_bytes / best_seconds(functools.partial(target.copy_, source), device, budget=budget)
    del source, target, reads

    sizes = (256,) if quick else (4096, 8192) if device.startswith("cuda") else (512, 1024)
    measured: dict[str, float] = {}
    for dtype in dtypes:
        rates = []
        for size in sizes:
            left = torch.randn(size, size, device=device).to(dtype)
            right = torch.randn(size, size, device=device).to(dtype)
            for weight in (right, right.T):
                seconds = best_seconds(functools.partial(torch.matmul, left, weight), device, budget=budget)
                rates.append(2 * size**3 / seconds)
        measured[dtype_name(dtype)] = max(rates)
    peaks = dict(measured)
    if not device.startswith("cuda"):
        peaks |= {name: max(rate, measured["float32"]) for name, rate in measured.items() if "16" in name}
    return {
        "read_bytes_per_s": read,
        "copy_bytes_per_s": copy,
        "matrix_flops_per_s": peaks,
        "matrix_flops_per_s_library": measured,
    }


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")
