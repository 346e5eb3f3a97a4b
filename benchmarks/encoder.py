"""Time the encoder with its Q-former: ours, folded and not, beside eager PyTorch, compilers and engines.

Every row is held against the straight encoder in float64 before it is timed; a wrong one is reported and not timed. All
are timed in turns within one run, and the least time of many calls counts. The floor is the least that this machine
allows, measured in the same run: the row's matrix products at the highest rate that any product of its type reached,
or its weights read once from memory, whichever takes longer. On a GPU the rows are eager PyTorch, torch.compile and
ours, each as it is called and in a CUDA graph, and the bytes of the floor are weights, inputs and tokens.

    python benchmarks/encoder.py                                  # B = 1 and 32, the paper's sizes, all rows
    python benchmarks/encoder.py --batch 1 --rows ours ours-bf16 onnx-folded --seconds 10
    python benchmarks/encoder.py --device cuda                    # B = 1, 8, 32 and 256
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _bytes import nbytes
from _device import GPU_SLACK, Device, add_arguments, device_of
from _encoder_gpu import GPU_BATCHES, GPU_ROWS, gpu_judgements, gpu_notes, gpu_table, rows_on
from _encoder_parts import measure_parts, parts_table, seconds_of_parts
from _encoder_rows import BASELINE, COUNTED, F32, ROWS, Inputs, Row, Run, Subject
from _machine import best_seconds, describe, dtype_name, measure_ceilings
from _page import publish, terminal
from _report import MISSING, Table, count, milliseconds
from _stages import flop_counter
from efficiency import better_of
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from evc_fast.model import FaceNetConfig
from evc_fast.ops import dispatch
from evc_fast.ops._library import EXTENSION_MISSING
from evc_fast.ops.packed_linear import PackedLinear
from evc_fast.testing.encoder_cases import ENCODER_WIDTHS
from evc_fast.testing.tolerances import FORWARD_FACTOR, error_bound, largest_error

PAPER = {name: getattr(FaceNetConfig(), name) for name in ENCODER_WIDTHS} | {"k": 4, "n": 16, "w": 179}
RIVAL_SLACK = 4  # rivals order sums as they like: they are compared, not judged by our bound
BURST = 0.1  # seconds of a row's turn: threads of the row before spin for half of that (ONNX Runtime's)
ALLOWANCE = 3.0  # a row that takes longer sits turns out, so that all of its calls cost this many times the baseline's
CPU_BATCHES = (1, 32)
COMPILED = ("torch.compile", "torch.compile-graph", "pt2")
NEAR_LIMIT = 1.1  # time over floor that counts as this machine's limit
AHEAD = 0.9  # time over floor that no product can reach


@dataclass(frozen=True)
class Target:
    """What a row shall reach at one batch size: a ratio to eager, or else a share of the matrix peak."""

    name: str
    batch: int
    row: str
    ratio: float
    share: float | None = None


TARGETS = (
    Target("C1", 1, "ours", 3.0),
    Target("C1", 1, "ours-bf16", 5.0),
    Target("C2", 32, "ours", 2.0),
    Target("C2", 32, "ours-bf16", 3.8, 0.9),
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    first, *rest = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog="\n\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", nargs="+", type=int, help="videos in a batch (default: 1 32; on a GPU 1 8 32 256)")
    every = list(dict.fromkeys((*ROWS, *GPU_ROWS)))
    parser.add_argument("--rows", nargs="+", choices=every, help="default: all that the device has")
    add_arguments(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=20.0, help="measuring time of a batch size (default: 20)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile and the .pt2 out")
    parser.add_argument("--compile-batch", nargs="+", type=int, help="torch.compile at these sizes only (default: all)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "local",
        help="folder of encoder.json and encoder.md (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    arguments.on = device_of(arguments, parser)
    arguments.batch = arguments.batch or list(GPU_BATCHES if arguments.on.gpu else CPU_BATCHES)
    arguments.rows = arguments.rows or list(rows_on(arguments.on))
    absent = [name for name in arguments.rows if name not in rows_on(arguments.on)]
    if absent:
        parser.error(f"argument --rows: {', '.join(absent)} is no row of {arguments.device}")
    return arguments


def wrong(name: str, subject: Subject, found: Sequence[Tensor], oracle: Sequence[Tensor], inputs: Inputs) -> str:
    """What strays from float64 further than the project allows, or ""."""
    row = rows_on(subject.device)[name]
    plain_encoder = subject.encoder if row.dtype == F32 else copy.deepcopy(subject.encoder).to(row.dtype)
    plain = plain_encoder(*(x.to(row.dtype) for x in inputs), impl="reference")
    for part, a, p, e in zip(("tokens", "emotion logits"), found, plain, oracle, strict=False):
        a, p = a.cpu(), p.cpu()
        slack = RIVAL_SLACK if not row.ours else GPU_SLACK if subject.device.gpu else 1
        bound = slack * error_bound(a.dtype, p, e, FORWARD_FACTOR)
        error = largest_error(a, e)
        if not error <= bound:
            return f"its {part} err by {error:.3g}, {bound:.3g} is allowed"
    itself = name == "ours" and not subject.device.gpu
    if itself and not torch.equal(found[0], subject.fold(F32)(*inputs).tokens):
        return "the encoder did not fold itself"
    return ""


def relative_error(found: Tensor, oracle: Tensor) -> float:
    return largest_error(found.cpu(), oracle) / oracle.abs().max().item()


def executed_flops(row: Row, subject: Subject, inputs: Inputs) -> int:
    """Matrix products of one call, 2 FLOPs a multiply-add."""
    key = row.graph, len(inputs[0])
    if key not in subject.counted:
        on_cpu = [x.cpu() for x in inputs]
        run = COUNTED[row.graph](subject.on_cpu)
        with flop_counter() as counter:
            run(on_cpu)
        subject.counted[key] = counter.get_total_flops()
    return subject.counted[key]


def weight_bytes(row: Row, subject: Subject) -> int:
    """Bytes of all weights and constants that the row reads."""
    module: nn.Module = subject.fold(row.dtype) if row.graph == "folded" else subject.encoder
    return nbytes(*module.parameters(), *module.buffers())


def unlike(run: Run, inputs: Inputs, threads: int) -> str:
    """Where a video's tokens depend on its place in the batch, on its neighbours or on the threads, or ""."""
    batch = len(inputs[0])
    alone = [x[:1] for x in inputs]
    wanted = run(alone)[0]
    for number in dict.fromkeys((1, 2, threads)):
        torch.set_num_threads(number)
        try:
            together = run(inputs)[0]
            same_video = run([x.expand(batch, *x.shape[1:]).contiguous() for x in alone])[0]
            if not torch.equal(same_video, wanted.expand_as(same_video)):
                return f"the same video at each of {batch} positions differs, {number} threads"
            for position in range(batch):
                single = run([x[position : position + 1] for x in inputs])[0]
                if not torch.equal(single[0], together[position]):
                    return f"position {position} of {batch} differs from the video alone, {number} threads"
        finally:
            torch.set_num_threads(threads)
    return ""


def take_turns(runs: dict[str, Run], inputs: Inputs, seconds: float, least: int = 3) -> tuple[dict[str, float], int]:
    """Least seconds of a call of each row, all in turns for `seconds`, and the number of turns.

    In its turn a row is called again and again for BURST seconds, twice at least.
    """
    best, spent = dict.fromkeys(runs, float("inf")), dict.fromkeys(runs, 0.0)
    turns, begin = 0, time.perf_counter()
    while turns < least or time.perf_counter() - begin < seconds:
        turns += 1
        for name, run in runs.items():
            if spent[name] > ALLOWANCE * spent[BASELINE]:
                continue
            calls, start = 0, time.perf_counter()
            now = start
            while calls < 2 or now - start < BURST:
                before = now
                run(inputs)
                now = time.perf_counter()
                best[name] = min(best[name], now - before)
                calls += 1
            spent[name] += now - start
    return best, turns


def prepared(row: Row, subject: Subject, runs: dict[str, Run], inputs: Inputs) -> Run:
    """What the row calls; of a row in a CUDA graph its replay, on these inputs alone."""
    if not row.replays:
        return row.prepare(subject)
    replay = subject.device.captured(functools.partial(runs[row.replays], inputs))
    return lambda _: replay()


def measure(
    batch: int, subject: Subject, names: Sequence[str], seconds: float, say: Callable[[str], None] = lambda _: None
) -> dict:
    """Build and check every row at one batch size, then time all of them."""
    inputs, device = subject.inputs(batch), subject.device
    record: dict = {"batch": batch, "rows": {}, "failed": {}, "skipped": {}, "positions": {}}
    runs: dict[str, Run] = {}
    with torch.inference_mode():
        oracle = subject.exact(*(x.cpu().double() for x in inputs), impl="reference")
        for name in dict.fromkeys((BASELINE, *names)):
            row = rows_on(device)[name]
            reason = row.missing(device)
            if row.replays and row.replays not in runs:
                reason = f"the row {row.replays} was not timed"
            if reason:
                record["skipped"][name] = reason
                continue
            say(f"B={batch}: {name}")
            start = time.perf_counter()
            run = prepared(row, subject, runs, inputs)
            found = run(inputs)
            device.synchronise()
            built = time.perf_counter() - start
            fault = wrong(name, subject, found, oracle, inputs)
            if not fault and not device.gpu and name in ("ours", "ours-bf16"):
                fault = record["positions"][name] = unlike(run, inputs, subject.threads)
            if fault:
                record["failed"][name] = fault
                continue
            runs[name] = run
            record["rows"][name] = {
                "dtype": dtype_name(row.dtype),
                "error": relative_error(found[0], oracle[0]),
                "flops": executed_flops(row, subject, inputs),
                "weight_bytes": weight_bytes(row, subject),
                "build_s": built,
            }
            if device.gpu:
                call = functools.partial(run, inputs)
                record["rows"][name] |= {
                    "moved_bytes": record["rows"][name]["weight_bytes"] + nbytes(*inputs, *found),
                    "launches": device.launches(call),
                    "peak_bytes": device.peak_bytes(call),
                }
        say(f"B={batch}: {len(runs)} rows in turns")
        if device.gpu:
            calls = {name: functools.partial(run, inputs) for name, run in runs.items()}
            times, record["turns"] = device.take_turns(calls, seconds)
        else:
            best, record["turns"] = take_turns(runs, inputs, seconds)
            times = {name: {"seconds": least} for name, least in best.items()}
    for name, taken in times.items():
        record["rows"][name] |= taken
    return record


def ceilings_now(dtypes: list[torch.dtype], device: Device) -> dict:
    """What this machine can do just now: PyTorch's own products, and on a CPU ours with packed weights."""
    ceilings = measure_ceilings(device.name, dtypes, quick=device.rehearsal)
    packed = not device.gpu and not EXTENSION_MISSING
    ceilings["matrix_flops_per_s_packed"] = {dtype_name(d): packed_peak(d) for d in dtypes} if packed else {}
    return ceilings


def packed_peak(dtype: torch.dtype) -> float:
    """FLOP/s of `PackedLinear` at sizes where nothing but the products counts."""
    rates = []
    for rows, inner, outer in ((1024, 1024, 1024), (768, 768, 3072)):
        product, data = PackedLinear(torch.randn(outer, inner).to(dtype)), torch.randn(rows, inner)
        rates.append(2 * rows * inner * outer / best_seconds(functools.partial(product, data), "cpu"))
    return max(rates)


def peak_of(ceilings: dict, dtype: str) -> tuple[float, str]:
    """The highest rate that a product of this type reached in this run, and whose.

    float32's counts for bfloat16 too: such data can be widened in registers.
    """
    rates = {}
    for name in dict.fromkeys((dtype, "float32")):
        rates[f"PyTorch's {name} product"] = ceilings["matrix_flops_per_s_library"].get(name, 0.0)
        rates[f"our packed {name} product"] = ceilings["matrix_flops_per_s_packed"].get(name, 0.0)
    best = max(rates, key=rates.get)
    return rates[best], best


def add_floors(record: dict, ceilings: dict) -> None:
    """Write the floor of each row beside its time, and what sets it."""
    for row in record["rows"].values():
        peak, whose = peak_of(ceilings, row["dtype"])
        moved, kind = (row["moved_bytes"], "copy") if "moved_bytes" in row else (row["weight_bytes"], "read")
        bandwidth = ceilings[f"{kind}_bytes_per_s"]
        by_products, by_bytes = row["flops"] / peak, moved / bandwidth
        row["floor_s"] = max(by_products, by_bytes)
        rate = f"{peak / 1e9:,.0f} GFLOP/s of {whose}"
        reading = f"the {kind} bandwidth, {bandwidth / 1e9:.1f} GB/s"
        row["floor_from"] = rate if by_products >= by_bytes else reading


def judged(target: Target, record: dict, parts: list[dict]) -> str:
    """One line on a target: reached, or how far the row is from this machine's limit and from its parts' time."""
    wanted = f">= {target.ratio:g}x eager" + (f" or >= {target.share:.0%} of the peak" if target.share else "")
    line = f"{target.name}, B = {target.batch}, {dtype_name(ROWS[target.row].dtype)}: target {wanted}; "
    row = record["rows"].get(target.row)
    if row is None or BASELINE not in record["rows"]:
        return line + "not measured"
    ratio, over = record["rows"][BASELINE]["seconds"] / row["seconds"], row["seconds"] / row["floor_s"]
    line += f"measured {ratio:.2f}x, "
    if ratio >= target.ratio or (target.share and 1 / over >= target.share):
        line += "reached; "
    else:
        line += "missed; " if over > NEAR_LIMIT else "missed at this machine's limit; "
    distance = "below" if over < 1 else f"within {over - 1:.0%} of" if over < 2 else f"{over:.1f} times"
    line += f"{distance} this machine's limit, {milliseconds(row['floor_s'])} ms from {row['floor_from']}"
    alone = seconds_of_parts(parts, target.batch)
    return line + f"; its float32 parts alone, at their own shapes, take {alone / row['seconds']:.0%} of its time"


def judgements(records: list[dict], parts: list[dict]) -> list[str]:
    by_batch = {record["batch"]: record for record in records}
    return [judged(target, by_batch[target.batch], parts) for target in TARGETS if target.batch in by_batch]


def table(record: dict) -> Table:
    """One row a contender, in the order of ROWS."""
    eager = record["rows"][BASELINE]["seconds"]
    rows = []
    for name, row in record["rows"].items():
        rows.append(
            [
                f"{name}: {ROWS[name].about}",
                row["dtype"],
                milliseconds(row["seconds"]),
                f"{eager / row['seconds']:.2f}",
                count(row["flops"]),
                f"{row['flops'] / row['seconds'] / 1e9:,.0f}",
                milliseconds(row["floor_s"]),
                f"{row['seconds'] / row['floor_s']:.2f}",
                f"{row['error']:.1e}",
            ]
        )
    for name in record["skipped"]:
        rows.append([f"{name}: {ROWS[name].about}", dtype_name(ROWS[name].dtype), "not measured", *[MISSING] * 6])
    columns = ["row", "type", "ms", "eager / row", "FLOPs", "GFLOP/s", "floor, ms", "row / floor", "error"]
    said = [f"{name}: not measured: {reason}" for name, reason in record["skipped"].items()]
    said += [f"{name}: not timed: {reason}" for name, reason in record["failed"].items()]
    batch = record["batch"]
    where = f"alone, beside other videos and at each of {batch} positions, " if batch > 1 else ""
    said += [
        f"{name}: a video's tokens are the same to the bit {where}with 1 and 2 threads."
        for name, fault in record["positions"].items()
        if not fault
    ]
    return Table(f"Encoder and Q-former, B = {batch}, {record['turns']} turns", columns, rows, said)


def disturbances(records: list[dict], machine: dict) -> list[str]:
    """What tells that something else was running, so that no figure of the run is worth keeping."""
    found = []
    load, cores = machine["load"], machine["cores"]
    if load > cores / 2:
        found.append(f"The machine was busy when the run began: load {load:.1f} on {cores} cores.")
    ahead = [
        f"{name} at B = {record['batch']}"
        for record in records
        for name, row in record["rows"].items()
        if row["seconds"] < AHEAD * row["floor_s"]
    ]
    if ahead:
        found.append(f"The peak was measured while something else was running: {', '.join(ahead)} beat the floor.")
    return found


def notes(ceilings: dict) -> list[str]:
    groups = {"PyTorch's": "matrix_flops_per_s_library", "our packed": "matrix_flops_per_s_packed"}
    peaks = "; ".join(
        f"{whose} {name} {rate / 1e9:,.0f}" for whose, key in groups.items() for name, rate in ceilings[key].items()
    )
    return [
        "The paper's sizes (N=16, K=4, d=300, W=179, N_q=32, D_v=D_t=512, d_out=2048); random weights, biases, norms "
        "and gates; float32 features. Each row was held against the straight encoder in float64 first; error: the "
        "largest of the tokens, relative to the largest token.",
        "Least time of a call, all rows in turns, in inference mode. ONNX Runtime's session and the .pt2 are called "
        "without our runner around them. A row much slower than eager has fewer turns.",
        "FLOPs: matrix products that are executed, 2 a multiply-add; of compilers and engines those of their graph, "
        "before they fold constants.",
        "Floor: the larger of FLOPs / matrix peak and weights / read bandwidth, measured before and after the rows, "
        f"the better counts: read {ceilings['read_bytes_per_s'] / 1e9:.1f} GB/s; products in GFLOP/s: {peaks}; the "
        "highest of a type is its peak, and bfloat16's is at least float32's.",
    ]


def main(argv: list[str] | None = None, sizes: dict | None = None) -> int:
    """`sizes`: options of `build_encoder` other than the paper's, for a trial."""
    arguments = parse_arguments(argv)
    device = arguments.on
    torch.set_num_threads(arguments.threads)
    console = terminal(190 if device.gpu else 160)
    if device.rehearsal and sizes is None:
        sizes = {}
    names = [n for n in arguments.rows if not (arguments.no_compile and n in COMPILED)]
    dtypes = list(dict.fromkeys([F32, *(rows_on(device)[name].dtype for name in names)]))
    machine = describe(device.name, arguments.threads) | {"kernels_isa": dispatch.cpu_isa()}
    machine["load"] = os.getloadavg()[0]
    page = functools.partial(publish_records, device=device, out=arguments.out)
    records: list[dict] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(console=console, transient=True) as progress,
    ):
        task = progress.add_task("ceilings", total=2 + len(arguments.batch))
        machine["ceilings"] = ceilings_now(dtypes, device)
        subject = Subject(PAPER if sizes is None else sizes, arguments.threads, Path(folder), device)
        for batch in arguments.batch:
            progress.advance(task)
            say = functools.partial(progress.update, task, description=f"B={batch}")
            left_out = COMPILED if batch not in (arguments.compile_batch or arguments.batch) else ()
            rows = [name for name in names if name not in left_out]
            records.append(
                measure(batch, subject, rows, arguments.seconds, lambda text, say=say: say(description=text))
            )
            page(None, records, machine, [])
        progress.update(task, description="ceilings, once more", advance=1)
        machine = better_of(machine, {"ceilings": ceilings_now(dtypes, device)})
    page(console, records, machine, [] if device.gpu else measure_parts(arguments.batch))
    return 1 if any(record["failed"] for record in records) else 0


def publish_records(
    console: Console | None, records: list[dict], machine: dict, parts: list[dict], *, device: Device, out: Path
) -> None:
    """Add the floors, and publish what has been measured; without a console it is only written."""
    for record in records:
        add_floors(record, machine["ceilings"])
    said = disturbances(records, machine)
    report = {"machine": machine, "records": records}
    if device.gpu:
        shown, reached = [gpu_table(record) for record in records], gpu_judgements(records)
        said += gpu_notes(machine["ceilings"])
    else:
        report["parts"] = parts
        shown = [table(record) for record in records]
        shown += [parts_table(parts, batch) for batch in dict.fromkeys(part["batch"] for part in parts)]
        reached = judgements(records, parts)
        said += notes(machine["ceilings"])
    report["targets"] = reached
    publish(console, out, "encoder", device.title("The encoder, measured"), report, shown, said, reached)


if __name__ == "__main__":
    sys.exit(main())
