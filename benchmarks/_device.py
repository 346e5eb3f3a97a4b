"""How work is timed, captured and counted on a GPU; and the same steps on a CPU, to rehearse them.

Times are those between two events on the stream, so that a row which launches more slowly than the GPU computes shows
the launching. In a rehearsal a clock stands in for events and a plain call for a graph; what has no stand-in on a CPU,
launches and GPU memory, is None.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _machine import synchronise
from efficiency import check_device

REGION = 2e-3  # seconds between two events: far above their resolution of half a microsecond
BURST = 0.02  # seconds of a row's turn
COUNTED_CALLS = 4
# Before ours is timed on a GPU its errors may be this many times what tests/test_on_gpu.py allows: a draw that only
# just leaves the bound costs the test, not the measurement.
GPU_SLACK = 4
SLACK_SAID = f"A row is timed where its errors are at most {GPU_SLACK} times those that the GPU tests allow."
ON_THE_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # what the profiler's trace calls the work of one launch

Run = Callable[[], object]


class Device:
    """Where a benchmark runs.

    Args:
        name: "cpu", "cuda" or "cuda:N".
        rehearsal: measure as on a GPU, although this is a CPU.

    Attributes:
        kind: "cpu" or "cuda". gpu: whether rows, tables and timing are a GPU's.
    """

    def __init__(self, name: str, *, rehearsal: bool = False) -> None:
        self.name, self.rehearsal = name, rehearsal
        self.kind = name.partition(":")[0]
        self.gpu = rehearsal or self.kind == "cuda"
        self._filler: torch.Tensor | None = None
        if self.kind == "cuda":
            torch.cuda.set_device(torch.device(name).index or 0)

    def title(self, title: str) -> str:
        """The title of a page of results."""
        return f"{title}: a rehearsal on a CPU, no figure means anything" if self.rehearsal else title

    def synchronise(self) -> None:
        """Wait until all work is done."""
        synchronise(self.name)

    def mark(self) -> torch.cuda.Event | float:
        """A moment on the stream, for :meth:`between`."""
        if self.kind != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: torch.cuda.Event | float, last: torch.cuda.Event | float) -> float:
        """Seconds from one mark to a later one; waits for the later one."""
        if isinstance(first, float):
            return last - first
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def pace(self, run: Run, calls: int) -> float:
        """Seconds a call, of `calls` calls one behind the other."""
        first = self.mark()
        for _ in range(calls):
            run()
        return self.between(first, self.mark()) / calls

    def calls(self, run: Run) -> int:
        """How many calls fill a region between two events; warms up."""
        self.pace(run, 2)
        return min(1000, max(1, math.ceil(REGION / max(self.pace(run, 3), 1e-9))))

    def cold(self, run: Run) -> float:
        """Seconds of one call whose weights and inputs are no longer in the GPU's cache."""
        if self.kind == "cuda":
            if self._filler is None:
                cache = torch.cuda.get_device_properties(self.name).L2_cache_size
                self._filler = torch.empty(4 * cache, dtype=torch.uint8, device=self.name)
            self._filler.fill_(1)
        first = self.mark()
        run()
        return self.between(first, self.mark())

    def latency(self, run: Run) -> float:
        """Seconds of the host from a call to its finished result."""
        self.synchronise()
        start = time.perf_counter()
        run()
        self.synchronise()
        return time.perf_counter() - start

    def captured(self, run: Run) -> Run:
        """`run` in a CUDA graph: each call replays it on the tensors it was captured with, and gives its results."""
        if self.kind != "cuda":
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, allocates and chooses library kernels before the capture
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()

        def replay() -> object:
            graph.replay()
            return results

        return replay

    def launches(self, run: Run) -> float | None:
        """Kernels, copies and fills that one call puts on the GPU, by PyTorch's profiler."""
        if self.kind != "cuda":
            return None
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=activities):  # the first one sets the profiler up, and may miss what runs meanwhile
            run()
            self.synchronise()
        with profile(activities=activities) as profiler:
            for _ in range(COUNTED_CALLS):
                run()
            self.synchronise()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        return sum(event.get("cat") in ON_THE_GPU for event in events) / COUNTED_CALLS

    def peak_bytes(self, run: Run) -> int | None:
        """GPU memory that one call takes at its peak, results included, beyond what was taken before."""
        if self.kind != "cuda":
            return None
        self.synchronise()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.synchronise()
        return torch.cuda.max_memory_allocated() - before

    def take_turns(self, runs: dict[str, Run], seconds: float, least: int = 5) -> tuple[dict[str, dict], int]:
        """Times of each of `runs`, all in turns for `seconds`, and the number of turns.

        Of each: "seconds", the least of all samples (a sample is the mean of as many calls as fill a region), and the
        medians: "median_s" of the same samples, "cold_s" of single calls out of the cache, "latency_s" of single calls
        waited for.
        """
        calls = {name: self.calls(run) for name, run in runs.items()}
        samples: dict[str, dict[str, list[float]]] = {
            name: {"median_s": [], "cold_s": [], "latency_s": []} for name in runs
        }
        turns, begin = 0, time.perf_counter()
        while turns < least or time.perf_counter() - begin < seconds:
            turns += 1
            for name, run in runs.items():
                taken, start = samples[name], time.perf_counter()
                self.pace(run, calls[name])  # back to the cache, and to the GPU's clock rate
                while True:
                    taken["median_s"].append(self.pace(run, calls[name]))
                    if time.perf_counter() - start > BURST:
                        break
                taken["cold_s"].append(self.cold(run))
                taken["latency_s"].append(self.latency(run))
        times = {
            name: {"seconds": min(taken["median_s"])}
            | {kind: statistics.median(values) for kind, values in taken.items()}
            for name, taken in samples.items()
        }
        return times, turns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--device` and `--rehearse`, which :func:`device_of` reads."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="do on the CPU, in small sizes, what --device cuda does: a trial, no figure of it means anything",
    )


def device_of(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> Device:
    """The device that the command line names; ends with one sentence where there is none."""
    try:
        check_device(arguments.device)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    if arguments.rehearse and arguments.device != "cpu":
        parser.error("argument --rehearse: it runs on the CPU, not on " + arguments.device)
    return Device(arguments.device, rehearsal=arguments.rehearse)
