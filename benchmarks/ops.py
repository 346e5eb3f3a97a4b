"""Time each op: forward, backward and both, every implementation beside eager PyTorch and torch.compile.

Every implementation is checked against float64 before it is timed; a wrong one is reported and not timed. All are timed
in turns within one run, and the least of many turns counts. The floor of an op is what this machine allows, measured
in the same run: the larger of its matrix products at the matrix peak, and a copy of the bytes that it must move. On a
GPU each phase is timed as it is called and in a CUDA graph.

    python benchmarks/ops.py                        # float32, B = 1 and 32, the paper's sizes
    python benchmarks/ops.py --dtype bfloat16 --batch 32
    python benchmarks/ops.py --device cuda --dtype float32 bfloat16
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _device import GPU_SLACK, SLACK_SAID, Device, add_arguments, device_of
from _impls import obstacle
from _machine import best_seconds, describe, dtype_name, measure_ceilings, synchronise
from _ops_gpu import copy_seconds, take_turns_on_gpu
from _page import publish, terminal
from _report import MISSING, Table, milliseconds
from rich.progress import Progress
from torch import Tensor

from evc_fast.ops import dispatch
from evc_fast.testing.cases import DIFFERENTIABLE, Case, benchmark_case
from evc_fast.testing.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, error_bound, largest_error, plain_dtype

PHASES = ("forward", "backward", "full")
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
KERNELS = ("cuda", "triton")  # on a GPU
RIVALS = ("eager", "torch.compile")
RIVAL_SLACK = 4  # torch.compile orders sums as it likes: it is compared, not judged by our bound
Run = Callable[..., tuple[Tensor, ...]]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n")[1])
    parser.add_argument("--op", nargs="+", choices=dispatch.OPS, default=list(dispatch.OPS), help="default: all")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32], help="videos in a batch (default: 1 32)")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"])
    add_arguments(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="measuring time of one op and size")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes most of the time)")
    parser.add_argument("--compile-batch", nargs="+", type=int, help="torch.compile at these sizes only (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "local")
    arguments = parser.parse_args(argv)
    arguments.on = device_of(arguments, parser)
    return arguments


def contenders(case: Case, dtype: torch.dtype, device: Device, compiled: bool) -> tuple[dict[str, Run], dict[str, str]]:
    """Everything that can run this case, eager PyTorch first; and why a kernel of this device cannot."""
    runs: dict[str, Run] = {"eager": case.plain}
    skipped: dict[str, str] = {}
    if compiled:
        torch._dynamo.reset()
        runs["torch.compile"] = torch.compile(case.plain, fullgraph=True)
    names = [each.name for each in dispatch.implementations(case.op) if device.kind in each.devices]
    for name in KERNELS if device.kind == "cuda" else names:
        reason = obstacle(case.op, name, device, dtype)
        if reason:
            skipped[name] = reason
        else:
            runs[name] = lambda *t, name=name: case.call(*t, impl=name)
    return runs, skipped


def without_gradients(op: str) -> list[str]:
    """Implementations for inference alone."""
    return [each.name for each in dispatch.implementations(op) if not each.gradients]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]


def evaluate(case: Case, run: Run, tensors: list[Tensor], gradients: list[Tensor] | None) -> list[Tensor]:
    """Outputs, then gradients of the floating inputs, where output gradients are given."""
    if gradients is None:
        with torch.no_grad():
            return list(run(*tensors))
    inputs = leaves(tensors)
    outputs = run(*inputs)
    wanted = [t for t in inputs if t.requires_grad]
    return [*outputs, *torch.autograd.grad(case.differentiable(outputs), wanted, gradients)]


def wrong(case: Case, run: Run, tensors: list[Tensor], gradients: list[Tensor] | None, slack: float) -> str:
    """What strays from float64 further than the project allows, or ""; without gradients, of the outputs alone."""

    def plainly(dtype: torch.dtype) -> list[Tensor]:
        given = None if gradients is None else [g.to(dtype) for g in gradients]
        return evaluate(case, case.plain, [t.to(dtype) for t in tensors], given)

    exact, plain = plainly(torch.float64), plainly(plain_dtype(tensors[0].dtype))
    actual = evaluate(case, run, tensors, gradients)
    outputs = len(DIFFERENTIABLE[case.op])
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        bound = slack * error_bound(a.dtype, p, e, FORWARD_FACTOR if i < outputs else GRADIENT_FACTOR)
        error = largest_error(a, e)
        if error > bound:
            return f"result {i} errs by {error:.3g}, {bound:.3g} is allowed"
    return ""


def one_turn(case: Case, run: Run, tensors: list[Tensor], gradients: list[Tensor], device: str) -> dict[str, float]:
    """Seconds of one forward without gradients, one forward and backward, and the backward within it."""
    inputs = leaves(tensors)
    wanted = [t for t in inputs if t.requires_grad]
    start = time.perf_counter()
    with torch.no_grad():
        run(*tensors)
    synchronise(device)
    forward = time.perf_counter()
    outputs = case.differentiable(run(*inputs))
    synchronise(device)
    middle = time.perf_counter()
    torch.autograd.grad(outputs, wanted, gradients)
    synchronise(device)
    end = time.perf_counter()
    return {"forward": forward - start, "backward": end - middle, "full": end - forward}


def take_turns(case: Case, runs: dict[str, Run], tensors, gradients, device: str, seconds: float) -> dict:
    """Least time of each phase and contender, all in turns for `seconds` (at least five turns)."""
    best = {phase: dict.fromkeys(runs, float("inf")) for phase in PHASES}
    for run in runs.values():
        one_turn(case, run, tensors, gradients, device)
    turns, begin = 0, time.perf_counter()
    while turns < 5 or time.perf_counter() - begin < seconds:
        turns += 1
        for name, run in runs.items():
            for phase, duration in one_turn(case, run, tensors, gradients, device).items():
                best[phase][name] = min(best[phase][name], duration)
    return best


def floors(case: Case, tensors: list[Tensor], peak: float, device: Device) -> dict[str, float]:
    """Seconds below which this machine cannot do each phase: products at `peak`, or a copy of the bytes in and out."""
    outputs = case.plain(*tensors)
    inward, outward = (sum(t.nbytes for t in group) for group in (tensors, outputs))
    differentiable = sum(t.nbytes for t in case.differentiable(outputs))
    moved = {"forward": inward + outward, "backward": 2 * inward + differentiable}
    moved["full"] = moved["forward"] + moved["backward"]
    flops = dict.fromkeys(PHASES, 0)
    if case.op == "emotion_attention":
        s = case.sizes
        pair = 2 * s["B"] * s["K"] * s["N"] * s["d"] * (s["W"] + s["N"])  # one product with words, one with frames
        flops = {"forward": 2 * pair, "backward": 4 * pair, "full": 6 * pair}
    result = {}
    for phase in PHASES:
        source = torch.ones(max(1, moved[phase] // 2), dtype=torch.uint8, device=device.name)
        target = torch.empty_like(source)
        if device.gpu:
            copy = copy_seconds(device, source, target)
        else:
            copy = best_seconds(lambda s=source, t=target: t.copy_(s), device.name, budget=0.1)
        result[phase] = max(copy, flops[phase] / peak)
    return result


def measure(case: Case, dtype: torch.dtype, arguments: argparse.Namespace, peak: float) -> dict:
    """Check, then time every contender of one case."""
    device: Device = arguments.on
    rounded = case.inputs(plain_dtype(dtype))  # float64 is judged on values that float32 holds
    tensors = [t.to(device.name, dtype) for t in rounded]
    torch.manual_seed(1)
    outputs = case.differentiable(case.plain(*rounded))
    gradients = [torch.randn_like(o).to(device.name, dtype) for o in outputs]
    record = {"op": case.op, "batch": case.sizes["B"], "dtype": dtype_name(dtype), "failed": {}}
    sizes = arguments.compile_batch or arguments.batch
    compiled = not arguments.no_compile and case.sizes["B"] in sizes
    runs, record["skipped"] = contenders(case, dtype, device, compiled)
    forward_only = without_gradients(case.op)
    sound: dict[str, Run] = {}
    for name, run in runs.items():
        slack = RIVAL_SLACK if name in RIVALS else GPU_SLACK if device.gpu else 1
        fault = wrong(case, run, tensors, None if name in forward_only else gradients, slack)
        if fault:
            record["failed"][name] = fault
        else:
            sound[name] = run
    record["floor_s"] = floors(case, tensors, peak, device)
    if device.gpu:
        record |= take_turns_on_gpu(device, case, sound, forward_only, tensors, gradients, arguments.seconds)
    else:
        record["seconds"] = take_turns(case, sound, tensors, gradients, device.name, arguments.seconds)
    return record


def tables(records: list[dict]) -> list[Table]:
    """One table a batch size and type."""
    made = []
    for batch, dtype in dict.fromkeys((r["batch"], r["dtype"]) for r in records):
        chosen = [r for r in records if (r["batch"], r["dtype"]) == (batch, dtype)]
        names = list(dict.fromkeys(name for r in chosen for name in r["seconds"]["forward"]))
        ours = [name for name in names if name not in RIVALS]
        rows = []
        for r in chosen:
            for phase, seconds in r["seconds"].items():
                floor = r["floor_s"][phase.partition(",")[0]]  # "full, in a graph" has that of "full"
                row = [f"{r['op']} {phase}", *(milliseconds(seconds.get(n)) for n in names), milliseconds(floor)]
                for name in ours:
                    known = name in seconds
                    row += [f"{seconds['eager'] / seconds[name]:.2f}" if known else MISSING]
                    row += [f"{seconds[name] / floor:.2f}" if known else MISSING]
                rows.append(row)
        columns = ["op", *names, "floor", *(x for name in ours for x in (f"eager / {name}", f"{name} / floor"))]
        notes = [f"{r['op']}: {n} was not timed: {why}" for r in chosen for n, why in r["failed"].items()]
        notes += [f"{r['op']}: {n}: not measured: {why}" for r in chosen for n, why in r["skipped"].items()]
        notes += [
            f"{r['op']}: {n} in a graph: not measured: it cannot be captured: {why}"
            for r in chosen
            for n, why in r.get("uncaptured", {}).items()
        ]
        made.append(Table(f"B = {batch}, {dtype}, milliseconds", columns, rows, notes))
    return made


def gpu_notes(machine: dict) -> list[str]:
    peaks = ", ".join(f"{n} {p / 1e12:,.1f}" for n, p in machine["ceilings"]["matrix_flops_per_s"].items())
    return [
        "The paper's sizes (N=16, K=4, d=300, W=179). Medians between events on the stream, contenders in turns, "
        "inputs in the GPU's cache; as called, and in a CUDA graph, where the host's launching does not count. tf32 is "
        "off. Each was checked against float64 first. " + SLACK_SAID,
        "Floor: a copy of the bytes in and out, in a CUDA graph, or matrix products at the measured peak "
        f"({peaks} TFLOP/s).",
    ]


def notes(machine: dict) -> list[str]:
    peaks = ", ".join(f"{n} {p / 1e9:,.0f}" for n, p in machine["ceilings"]["matrix_flops_per_s"].items())
    return [
        "The paper's sizes (N=16, K=4, d=300, W=179). Minimum of all turns, contenders in turns; each was checked "
        "against float64 first.",
        f"Floor: a copy of the bytes in and out, or matrix products at the measured peak ({peaks} GFLOP/s). It is "
        "the library's peak: a product that beats it shows below 1.",
    ]


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device = arguments.on
    torch.set_num_threads(arguments.threads)
    console = terminal(160 if device.gpu else 120)
    dtypes = [DTYPES[name] for name in arguments.dtype]
    machine = describe(device.name, arguments.threads) | {"kernels_isa": dispatch.cpu_isa()}
    known = list(dict.fromkeys([torch.float32, *dtypes]))
    machine["ceilings"] = measure_ceilings(device.name, known, quick=device.rehearsal)
    peaks = machine["ceilings"]["matrix_flops_per_s"]
    todo = [(op, batch, dtype) for op in arguments.op for dtype in dtypes for batch in arguments.batch]
    records: list[dict] = []
    title, report = device.title("The fused ops, measured"), {"machine": machine, "records": records}
    said = gpu_notes(machine) if device.gpu else notes(machine)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("ops", total=len(todo))
        for op, batch, dtype in todo:
            progress.update(task, description=f"{op} B={batch} {dtype_name(dtype)}")
            records.append(measure(benchmark_case(op, batch), dtype, arguments, peaks[dtype_name(dtype)]))
            progress.advance(task)
            publish(None, arguments.out, "ops", title, report, tables(records), said)
    publish(console, arguments.out, "ops", title, report, tables(records), said)
    return 1 if any(r["failed"] for r in records) else 0


if __name__ == "__main__":
    sys.exit(main())
