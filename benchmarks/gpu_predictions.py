"""What the GPU paths should take, worked out without a GPU: a prediction beside each target, and no measurement.

    python benchmarks/gpu_predictions.py

Operations are counted on the CPU as they run. Each is given the longest of three times: its bytes over the memory's
bandwidth, its FLOPs over the matrix peak, and the shortest time of a kernel. Without a CUDA graph the host's own time a
call is a bound too. Registers, shared memory and spills of every kernel come from the compilers: nvcc (where there is
one) and Triton's. benchmarks/gpu.sh measures what this predicts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from _machine import describe
from _page import publish, terminal
from _report import MISSING, Table, count, megabytes

from evc_fast import ops
from evc_fast.model import FaceNetConfig, FaceNetEncoder
from evc_fast.ops import dispatch
from evc_fast.reference.folded_encoder import FoldedParts, FoldedWeights
from evc_fast.reference.folded_encoder import folded_encoder as reference
from evc_fast.testing.encoder_cases import encoder_inputs
from evc_fast.testing.launches import Launch, Launches

ROOT = Path(__file__).resolve().parents[1]
F32, BF16 = torch.float32, torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Device:
    """Assumptions on an H200; benchmarks/ceilings.py measures them."""

    bandwidth: float = 4.3e12  # bytes/s, a copy
    bf16_peak: float = 0.8 * 989e12  # FLOP/s; four fifths of the data sheet's
    fp32_peak: float = 0.8 * 67e12  # tf32 is off
    kernel_s: float = 2.0e-6  # the shortest kernel in a CUDA graph, to the next one's start
    call_s: float = 6e-6  # of the host, an eager operation and its autograd node
    launch_s: float = 3e-6  # the first kernel of a call

    def seconds(self, launches: list[Launch], dtype: torch.dtype) -> float:
        """Of these kernels one after another, in a CUDA graph."""
        peak = self.fp32_peak if dtype == F32 else self.bf16_peak
        times = (max(each.nbytes / self.bandwidth, each.flops / peak, self.kernel_s) for each in launches)
        return self.launch_s + sum(times)

    def eager_seconds(self, launches: list[Launch], dtype: torch.dtype) -> float:
        """Of the same kernels, launched one by one."""
        return max(self.seconds(launches, dtype), len(launches) * self.call_s)


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to compute, what it launches, and its predicted time."""

    target: str
    what: str
    launches: list[Launch]
    seconds: float

    def cells(self, eager: float) -> list[str]:
        flops, nbytes = sum(each.flops for each in self.launches), sum(each.nbytes for each in self.launches)
        micro = f"{self.seconds * 1e6:,.0f}"
        return [
            self.target,
            self.what,
            str(len(self.launches)),
            megabytes(nbytes),
            count(flops),
            micro,
            f"{eager / self.seconds:.1f}",
        ]


def forward_launches(batch: int, dtype: torch.dtype, *, folded: bool, impl: str | None) -> list[Launch]:
    """Of one call at the paper's sizes."""
    encoder = FaceNetEncoder(FaceNetConfig()).eval()
    module = encoder.fold(dtype=dtype) if folded else encoder
    inputs = encoder_inputs(encoder.config, batch, dtype=dtype)[:3]
    with Launches() as found, torch.no_grad():
        module(*inputs, impl=impl)
    return found.launches


def products_and_ops(batch: int) -> list[Launch]:
    """Of a fold's call by the library's products and the fused ops, in bfloat16.

    The CPU's ops stand for Triton's: the same tensors in and out.
    """
    fused = {op: functools.partial(getattr(ops, op), impl="cpp") for op in dispatch.OPS}
    fused["emotion_attention"] = lambda *tensors: ops.emotion_attention(*tensors[:6], impl="cpp")  # without gate_bias
    folded = FaceNetEncoder(FaceNetConfig()).eval().fold(dtype=BF16)
    inputs = encoder_inputs(folded.config, batch, dtype=BF16)
    with Launches() as found, torch.no_grad():
        reference(*inputs, FoldedWeights(**dict(folded.named_buffers())), folded.options, parts=FoldedParts(**fused))
    return found.launches


def step_launches(batch: int, impl: str) -> list[Launch]:
    """Of one training step, forward and backward, without an optimiser."""
    encoder = FaceNetEncoder(FaceNetConfig()).train()
    inputs = encoder_inputs(encoder.config, batch, dtype=F32)[:3]
    with Launches() as found:
        output = encoder(*inputs, impl=impl)
        ones = [torch.ones_like(x) for x in (output.tokens, output.emotion_logits)]
        torch.autograd.backward([output.tokens, output.emotion_logits], ones)
    return found.launches


def predicted(device: Device) -> list[list[str]]:
    """The targets' rows, each beside its eager baseline."""
    table = []

    def add(target: str, eager: list[Launch], *rows: tuple[str, list[Launch], torch.dtype]) -> None:
        baseline = device.eager_seconds(eager, F32)
        table.append(Row(target, "eager, float32", eager, baseline).cells(baseline))
        in_a_graph = device.seconds(eager, F32)
        table.append(Row(target, "eager in a CUDA graph, float32", eager, in_a_graph).cells(baseline))
        table.extend(
            Row(target, what, found, device.seconds(found, dtype)).cells(baseline) for what, found, dtype in rows
        )

    eager = forward_launches(1, F32, folded=False, impl="reference")
    add("G2, B = 1", eager)
    # One kernel is no sum of operations: its time is worked out stage by stage at the head of its source.
    stages = (ROOT / "csrc" / "cuda" / "folded_encoder.cu").read_text(encoding="utf-8")
    micro = float(re.search(r"they make (\d+) us", stages).group(1))
    one = [each for each in forward_launches(1, BF16, folded=True, impl="cpp") if each.name.startswith("evc_fast.")]
    baseline = device.eager_seconds(eager, F32)
    table.append(Row("G2, B = 1", "fold(), one kernel, bfloat16", one, micro * 1e-6).cells(baseline))

    plain = forward_launches(256, BF16, folded=True, impl="reference")
    add(
        "G3, B = 256",
        forward_launches(256, F32, folded=False, impl="reference"),
        ("fold(), plain PyTorch in a CUDA graph, bfloat16", plain, BF16),
        ("fold(), products and fused ops in a CUDA graph, bfloat16", products_and_ops(256), BF16),
    )
    ours = step_launches(32, "cpp")
    halved = [dataclasses.replace(each, nbytes=each.nbytes // 2) for each in ours]
    add(
        "G4, B = 32, forward and backward",
        step_launches(32, "reference"),
        ("graph_training, float32", ours, F32),
        ("graph_training, bfloat16 as autocast's products", halved, BF16),
    )
    return table


def cuda_kernels(nvcc: str, architectures: list[int]) -> list[list[str]]:
    """Registers, static shared memory and spills of every compiled CUDA kernel, by nvcc."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            if source.stem == "table":  # its one kernel does nothing
                continue
            for arch in architectures:
                command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
                command += ["-c", str(source), "-o", str(Path(folder) / "kernel.o")]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
                demangled = subprocess.run(["c++filt"], input=said, capture_output=True, text=True, check=True).stdout
                for entry in demangled.split("Compiling entry function ")[1:]:
                    name = re.search(r"'void evc::(?:\w+::|\(anonymous namespace\)::)*(.+?)\(", entry).group(1)
                    registers = int(re.search(r"Used (\d+) registers", entry).group(1))
                    shared = re.search(r"(\d+) bytes smem", entry)
                    spills = sum(int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill)", entry))
                    name = re.sub(r"evc::|\(anonymous namespace\)::", "", name)
                    static = shared.group(1) if shared else "0"
                    rows.append([source.stem, name, f"sm_{arch}", str(registers), static, str(spills)])
    return rows


def triton_kernels(architectures: list[int]) -> list[list[str]]:
    """What every Triton kernel takes at the paper's sizes, by its own compiler."""
    from evc_fast.kernels import aot

    rows = []
    for arch in architectures:
        for dtype in ("fp32", "bf16"):
            for each in aot.measure_all(arch, dtype):
                cells = (each.registers, each.shared, each.spilled, each.programs)
                rows.append([each.kernel, f"sm_{arch}", dtype, *map(str, cells), each.matrix or MISSING])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "local")
    arguments = parser.parse_args()
    device = Device()
    columns = ["target", "row", "launches", "bytes", "FLOPs", "us, predicted", "eager / row"]
    tables = [Table("Targets: predictions for an H200, to be confirmed", columns, predicted(device))]
    tables[0].notes.append(
        "Assumed: "
        + ", ".join(f"{name} {value:.3g}" for name, value in dataclasses.asdict(device).items())
        + " (bytes/s, FLOP/s, seconds). Targets: G2 <= 40 us in <= 3 launches, >= 15x eager, >= 4x eager in a graph;"
        " G3 <= 250 us; G4 >= 3x eager."
    )
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    nvcc = str(home) if home.exists() else shutil.which("nvcc")
    if nvcc:
        columns = ["file", "kernel", "architecture", "registers", "static shared, B", "spills, B"]
        tables.append(Table("CUDA kernels as nvcc compiles them", columns, cuda_kernels(nvcc, arguments.arch)))
    columns = ["kernel", "architecture", "type", "registers", "shared, B", "spills, B", "programs", "matrix"]
    tables.append(Table("Triton kernels at the paper's sizes", columns, triton_kernels(arguments.arch)))
    tables[-1].notes.append("programs: estimated, at once on a multiprocessor.")
    report = {"machine": describe("cpu", torch.get_num_threads()) | {"kernels_isa": "none: counted, not timed"}}
    report["tables"] = [dataclasses.asdict(table) for table in tables]
    said = ["No figure on this page was measured on a GPU."]
    if not nvcc:
        said.append("No nvcc here: the CUDA kernels were not compiled.")
    publish(terminal(), arguments.output, "gpu_predictions", "GPU: predictions", report, tables, said)


if __name__ == "__main__":
    main()
