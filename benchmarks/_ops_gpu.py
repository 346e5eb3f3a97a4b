"""How benchmarks/ops.py times an op's passes on a GPU: as they are called, and in CUDA graphs."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Collection

import torch
from _device import Device
from torch import Tensor

from evc_fast.testing.cases import Case

COPIES = 20
GRAPH = ", in a graph"


def copy_seconds(device: Device, source: Tensor, target: Tensor) -> float:
    """Of one copy in a CUDA graph of many."""

    def copies() -> None:
        for _ in range(COPIES):
            target.copy_(source)

    run = device.captured(copies)
    calls = device.calls(run)
    return min(device.pace(run, calls) for _ in range(5)) / COPIES


def passes(case: Case, run: Callable, tensors: list[Tensor], gradients: list[Tensor]) -> dict[str, Callable]:
    """The phases that are a call of their own: forward without gradients, and forward with backward."""
    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    wanted = [t for t in inputs if t.requires_grad]

    @torch.no_grad()
    def forward() -> object:
        return run(*tensors)

    def full() -> object:
        return torch.autograd.grad(case.differentiable(run(*inputs)), wanted, gradients)

    return {"forward": forward, "full": full}


def backward_samples(
    device: Device, case: Case, run: Callable, tensors: list[Tensor], gradients: list[Tensor], calls: int
) -> list[float]:
    """Seconds of the backward within each of `calls` steps."""
    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    wanted = [t for t in inputs if t.requires_grad]
    marks = []
    for _ in range(calls):
        outputs = case.differentiable(run(*inputs))
        first = device.mark()
        torch.autograd.grad(outputs, wanted, gradients)
        marks.append((first, device.mark()))
    return [device.between(first, last) for first, last in marks]


def take_turns_on_gpu(
    device: Device,
    case: Case,
    runs: dict[str, Callable],
    forward_only: Collection[str],
    tensors: list[Tensor],
    gradients: list[Tensor],
    seconds: float,
    least: int = 5,
) -> dict:
    """Median and least seconds of each phase and contender, all in turns for `seconds`; what is not captured says why.

    Returns {"seconds": {phase: {contender: median}}, "least_s": ..., "uncaptured": {contender: reason}}.
    """
    timed: dict[tuple[str, str], Callable] = {}
    uncaptured: dict[str, str] = {}
    for name, run in runs.items():
        phases = passes(case, run, tensors, gradients)
        if name in forward_only:
            del phases["full"]
        for phase, call in phases.items():
            timed[phase, name] = call
            try:
                timed[phase + GRAPH, name] = device.captured(call)
            except RuntimeError as error:  # what a capture refuses, PyTorch raises as one
                uncaptured[name] = str(error).splitlines()[0]
    calls = {key: device.calls(call) for key, call in timed.items()}
    samples: dict[str, dict[str, list[float]]] = {
        phase: {} for phase in ("forward", "backward", "full", f"forward{GRAPH}", f"full{GRAPH}")
    }
    turns, begin = 0, time.perf_counter()
    while turns < least or time.perf_counter() - begin < seconds:
        turns += 1
        for (phase, name), call in timed.items():
            samples[phase].setdefault(name, []).append(device.pace(call, calls[phase, name]))
        for name, run in runs.items():
            if name not in forward_only:
                several = min(10, calls["full", name])
                found = backward_samples(device, case, run, tensors, gradients, several)
                samples["backward"].setdefault(name, []).extend(found)
    choose = functools.partial(_of_each, samples)
    return {"seconds": choose(statistics.median), "least_s": choose(min), "uncaptured": uncaptured, "turns": turns}


def _of_each(samples: dict[str, dict[str, list[float]]], choose: Callable[[list[float]], float]) -> dict:
    return {phase: {name: choose(values) for name, values in taken.items()} for phase, taken in samples.items()}
