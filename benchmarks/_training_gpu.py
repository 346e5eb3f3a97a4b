"""What benchmarks/training.py adds on a GPU: steps in CUDA graphs, their times, and the target."""

from __future__ import annotations

import contextlib
import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from _device import SLACK_SAID, Device
from _impls import serving
from _report import MISSING, Table, count, megabytes, milliseconds
from torch import Tensor, nn

from evc_fast.model import FaceNetEncoder, graph_training
from evc_fast.ops import dispatch

GRAPHED = "ours, graph_training"
TARGET_BATCH, TARGET = 32, 3.0
CALLS = 10  # steps of a contender's turn

Step = Callable[[], list[Tensor]]


def in_a_graph(name: str) -> str:
    return f"{name}, in a CUDA graph"


@contextlib.contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Inside the `with` no dropout layer of a module in training mode drops anything."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Dropout)]
    kept = [layer.p for layer in layers]
    for layer in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, p in zip(layers, kept, strict=True):
            layer.p = p


def graphed(encoder: FaceNetEncoder, inputs: list[Tensor], device: Device) -> Callable:
    """The encoder as `graph_training` gives it; a rehearsal has the encoder itself."""
    return graph_training(encoder, *inputs) if device.kind == "cuda" else encoder


def copy_for_graphs(encoder: FaceNetEncoder) -> FaceNetEncoder:
    """A copy in training mode with gradients of its own."""
    return copy.deepcopy(encoder).train()


def take_turns_on_gpu(
    device: Device, split: dict[str, tuple[Callable, Callable]], whole: dict[str, Step], seconds: float, least: int = 5
) -> tuple[dict[str, dict[str, dict[str, float]]], int]:
    """Times of all contenders in turns for `seconds`, and the turns.

    split: forward() and backward(outputs) of those whose passes are told apart. whole: the others' steps. Returns the
    least and the median of each phase, as {"least": {name: {phase: seconds}}, "median": ...}.
    """
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in (*split, *whole)}
    turns, begin = 0, time.perf_counter()
    while turns <= least or time.perf_counter() - begin < seconds:
        for name, (forward, backward) in split.items():
            marks = []
            for _ in range(CALLS):
                first = device.mark()
                outputs = forward()
                middle = device.mark()
                backward(outputs)
                marks.append((first, middle, device.mark()))
            for first, middle, last in marks:
                for phase, (a, b) in {
                    "forward": (first, middle),
                    "backward": (middle, last),
                    "step": (first, last),
                }.items():
                    samples[name].setdefault(phase, []).append(device.between(a, b))
        for name, step in whole.items():
            samples[name].setdefault("step", []).append(device.pace(step, CALLS))
        if turns == 0:  # it warmed up
            samples = {name: {} for name in samples}
        turns += 1
    found = {
        kind: {name: {phase: choose(values) for phase, values in phases.items()} for name, phases in samples.items()}
        for kind, choose in (("least", min), ("median", statistics.median))
    }
    return found, turns - 1


def served(device: Device) -> str:
    """Which implementation of each op our step runs."""
    names = {op: serving(op, device, torch.float32, gradients=True) for op in dispatch.OPS}
    return "Ours runs " + ", ".join(f"{op} by {name}" for op, name in names.items()) + "."


def gpu_table(record: dict, eager: str) -> Table:
    """One row a contender, and the floor."""
    floor, baseline = record.get("floor_s"), record["median_s"].get(eager)
    rows = []
    for name, medians in record["median_s"].items():
        flops, launches = record["flops"].get(name), record["launches"].get(name)
        step = medians["step"]
        rows.append(
            [
                name,
                *(milliseconds(medians.get(phase)) for phase in ("forward", "backward", "step")),
                milliseconds(record["seconds"][name]["step"]),
                f"{baseline['step'] / step:.2f}" if baseline else MISSING,
                f"{step / floor:.2f}" if floor else MISSING,
                MISSING if launches is None else f"{launches:g}",
                megabytes(record["peak_bytes"].get(name)),
                count(flops) if flops else MISSING,
            ]
        )
    if floor:
        ratio = f"{baseline['step'] / floor:.2f}" if baseline else MISSING
        rows.append(["floor", MISSING, MISSING, milliseconds(floor), MISSING, ratio, "1.00", *[MISSING] * 3])
    columns = ["encoder", "forward, ms", "backward, ms", "step, ms", "least", "eager / this", "this / floor"]
    columns += ["launches", "MB", "FLOPs"]
    said = [f"{name} was not timed: {why}" for name, why in record["failed"].items()]
    said += [f"{name}: not measured: {why}" for name, why in record["skipped"].items()]
    title = f"B = {record['batch']}, dropout {record['dropout']:g}, float32"
    return Table(f"{title}, {record['turns']} turns", columns, rows, said)


def gpu_judgements(records: list[dict], eager: str, ours: tuple[str, ...], rival: str) -> list[str]:
    """G4 for each of `ours` at the target's batch size, torch.compile's ratio beside it."""
    lines = []
    for record in (record for record in records if record["batch"] == TARGET_BATCH):
        steps = {name: medians["step"] for name, medians in record["median_s"].items()}
        for name in ours:
            line = f"G4, B = {TARGET_BATCH}, dropout {record['dropout']:g}, {name}: target >= {TARGET:g}x {eager}; "
            if name not in steps or eager not in steps:
                why = record["failed"].get(name) or record["skipped"].get(name) or "the row was left out"
                lines.append(f"{line}not measured: {why}")
                continue
            ratio = steps[eager] / steps[name]
            line += f"measured {ratio:.2f}x, " + ("reached" if ratio >= TARGET else "missed")
            if rival in steps:
                line += f"; {rival} {steps[eager] / steps[rival]:.2f}x"
            lines.append(line)
    return lines


def gpu_notes(device: Device) -> list[str]:
    return [
        "On the GPU: times between events on the stream, medians over all steps of all turns, and the least; in a "
        "graph the whole step is one. Launches: kernels, copies and fills a step. MB: GPU memory that a step takes "
        f"beyond weights and inputs, gradients included. tf32 is off. {SLACK_SAID}",
        served(device),
    ]


def split_calls(contender: object, inputs: list[Tensor], gradients: list[Tensor]) -> tuple[Callable, Callable]:
    """A contender's two passes without their arguments."""
    return functools.partial(contender.forward, inputs), lambda outputs: contender.backward(outputs, gradients)
