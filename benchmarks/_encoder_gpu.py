"""The rows of benchmarks/encoder.py on a GPU, their table, and the targets that they are held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from _device import SLACK_SAID, Device
from _encoder_rows import (
    BASELINE,
    BF16,
    F16,
    F32,
    ROWS,
    Row,
    Run,
    Subject,
    automatic,
    compiled,
    folded,
    straight,
)
from _impls import obstacle, stand_in
from _report import MISSING, Table, count, megabytes, milliseconds

GPU_BATCHES = (1, 8, 32, 256)
BASELINE_GRAPH = "eager-graph"
OP = "folded_encoder"


def ours(about: str, dtype: torch.dtype, *, by_kernel: bool = False) -> Row:
    """A fold, as it is called or by the CUDA kernel whatever the batch."""

    def prepare(subject: Subject) -> Run:
        return folded(subject, dtype, stand_in("cuda", subject.device) if by_kernel else None)

    def missing(device: Device) -> str:
        return obstacle(OP, stand_in("cuda", device), device, dtype)

    return Row(f"ours, {about}", "folded", prepare, missing, dtype, True)


def in_a_graph(name: str, row: Row) -> Row:
    return Row("the same in a CUDA graph", row.graph, None, dtype=row.dtype, ours=row.ours, replays=name)


def _rows() -> dict[str, Row]:
    called = {
        BASELINE: Row("eager PyTorch, straight", "straight", straight),
        "torch.compile": Row("torch.compile with freezing, straight", "straight", compiled),
        "eager-folded": Row("eager PyTorch, folded", "folded", lambda s: folded(s, F32, "reference")),
        "eager-folded-bf16": Row("eager PyTorch, folded", "folded", lambda s: folded(s, BF16, "reference"), dtype=BF16),
        "automatic": Row("ours, encoder.eval(), not folded", "reordered", automatic, ours=True),
        "ours": ours("encoder.fold()", F32),
        "ours-bf16": ours("encoder.fold(dtype=bfloat16)", BF16),
        "ours-fp16": ours("encoder.fold(dtype=float16)", F16),
        "kernel": ours('encoder.fold() with impl="cuda"', F32, by_kernel=True),
        "kernel-bf16": ours('encoder.fold(dtype=bfloat16) with impl="cuda"', BF16, by_kernel=True),
    }
    rows = {}
    for name, row in called.items():
        rows[name] = row
        if name not in ("automatic", "ours-fp16"):
            rows[f"{name}-graph"] = in_a_graph(name, row)
    return rows


GPU_ROWS = _rows()


def rows_on(device: Device) -> dict[str, Row]:
    """The rows of this kind of device, in the order of the table."""
    return GPU_ROWS if device.gpu else ROWS


@dataclass(frozen=True)
class GpuTarget:
    """What a row and its graph shall reach at one batch size; None: no such condition."""

    name: str
    batch: int
    row: str
    seconds: float
    launches: int | None = None
    eager: float | None = None
    eager_graph: float | None = None


GPU_TARGETS = (
    GpuTarget("G2", 1, "ours-bf16", 40e-6, 3, 15.0, 4.0),
    GpuTarget("G2", 1, "ours", 40e-6, 3, 15.0, 4.0),
    GpuTarget("G3", 256, "ours-bf16", 0.25e-3),
)


def gpu_judged(target: GpuTarget, record: dict) -> list[str]:
    """One line for the row as it is called and one for its graph: every condition, and whether all are reached."""
    lines = []
    for name, how in ((target.row, "as called"), (f"{target.row}-graph", "in a CUDA graph")):
        rows = record["rows"]
        row, eager, graph = rows.get(name), rows.get(BASELINE), rows.get(BASELINE_GRAPH)
        line = f"{target.name}, B = {target.batch}, {str(GPU_ROWS[name].dtype).removeprefix('torch.')}, {how}: "
        if row is None or eager is None:
            why = record["skipped"].get(name) or record["failed"].get(name) or "the row was left out"
            lines.append(f"{line}not measured: {why}")
            continue
        seconds = row["median_s"]
        met = [seconds <= target.seconds]
        said = [f"{seconds * 1e6:.1f} us (target <= {target.seconds * 1e6:g})"]
        if target.launches is not None:
            launches = row["launches"]
            met.append(launches is not None and launches <= target.launches)
            said.append(f"{'uncounted' if launches is None else f'{launches:g}'} launches (<= {target.launches})")
        for other, factor, what in ((eager, target.eager, "eager"), (graph, target.eager_graph, "eager in a graph")):
            if factor is not None:
                ratio = other["median_s"] / seconds if other else None
                met.append(ratio is not None and ratio >= factor)
                said.append(f"{'unknown' if ratio is None else f'{ratio:.1f}x'} {what} (>= {factor:g}x)")
        verdict = "reached" if all(met) else "missed"
        floor = row["floor_s"]
        over = f"{seconds / floor:.1f} times the floor, {floor * 1e6:.1f} us from {row['floor_from']}"
        lines.append(f"{line}{', '.join(said)}: {verdict}; {over}")
    return lines


def gpu_judgements(records: list[dict]) -> list[str]:
    by_batch = {record["batch"]: record for record in records}
    judged = [gpu_judged(target, by_batch[target.batch]) for target in GPU_TARGETS if target.batch in by_batch]
    return [line for lines in judged for line in lines]


def gpu_table(record: dict) -> Table:
    """One row a contender, in the order of GPU_ROWS."""
    eager = record["rows"][BASELINE]["median_s"]
    rows = []
    for name, row in record["rows"].items():
        seconds = row["median_s"]
        rows.append(
            [
                f"{name}: {GPU_ROWS[name].about}",
                row["dtype"],
                milliseconds(seconds),
                milliseconds(row["seconds"]),
                milliseconds(row["cold_s"]),
                milliseconds(row["latency_s"]),
                f"{eager / seconds:.2f}",
                MISSING if row["launches"] is None else f"{row['launches']:g}",
                count(row["flops"]),
                f"{row['flops'] / seconds / 1e12:.3g}",
                milliseconds(row["floor_s"]),
                f"{seconds / row['floor_s']:.1f}",
                megabytes(row["peak_bytes"]),
                f"{row['error']:.1e}",
            ]
        )
    for name in record["skipped"]:
        row = GPU_ROWS[name]
        kind = str(row.dtype).removeprefix("torch.")
        rows.append([f"{name}: {row.about}", kind, "not measured", *[MISSING] * 11])
    columns = ["row", "type", "median, ms", "least", "cold", "latency", "eager / row", "launches", "FLOPs", "TFLOP/s"]
    columns += ["floor, ms", "row / floor", "MB", "error"]
    said = [f"{name}: not measured: {reason}" for name, reason in record["skipped"].items()]
    said += [f"{name}: not timed: {reason}" for name, reason in record["failed"].items()]
    return Table(f"Encoder and Q-former, B = {record['batch']}, {record['turns']} turns", columns, rows, said)


def gpu_notes(ceilings: dict) -> list[str]:
    rates = ceilings["matrix_flops_per_s_library"].items()
    return [
        "The paper's sizes (N=16, K=4, d=300, W=179, N_q=32, D_v=D_t=512, d_out=2048); random weights, biases, norms "
        "and gates; float32 features on the GPU. Each row was held against the straight encoder in float64 on the CPU "
        "first; error: the largest of the tokens, relative to the largest token. tf32 is off. " + SLACK_SAID,
        "Median and least: between two events around calls one behind the other, 2 ms of them and more, all rows in "
        "turns, in inference mode; weights and inputs stay in the GPU's cache. Cold: single calls after the cache was "
        "overwritten, median. Latency: the host's clock from a call to its finished result, median. Ratios and targets "
        "are of medians.",
        "Ours is as called: it takes the kernel for few videos, for many the library's products in a CUDA graph of its "
        "own, inputs and results copied.",
        "Launches: kernels, copies and fills on the GPU a call, by PyTorch's profiler; a graph's are those inside. MB: "
        "GPU memory that a call takes beyond weights and inputs, results included.",
        "Floor: the larger of FLOPs / matrix peak and (weights + inputs + tokens) / copy bandwidth, measured before "
        f"and after the rows, the better counts: copy {ceilings['copy_bytes_per_s'] / 1e9:,.0f} GB/s (read and "
        "written); products in TFLOP/s: " + ", ".join(f"{name} {rate / 1e12:,.1f}" for name, rate in rates) + ".",
    ]
