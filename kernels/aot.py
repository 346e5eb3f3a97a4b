"""Compile every Triton kernel at the paper's sizes without a GPU or a driver, and print what it takes.

    python -m evc_fast.kernels.aot --arch 80 90 --dtype fp32 bf16
    python -m evc_fast.kernels.aot --arch 90 --cases many-frames many-triplets

The launchers run on meta tensors with their launches recorded, so what is compiled is what they would launch there.
Exit code 1 where a kernel spills registers, or does not fit on the architecture's multiprocessors.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from evc_fast.kernels import common, emotion_attention, entropy_calibration, factored_hidden, routing_aggregation
from evc_fast.testing.cases import CASES, Case, benchmark_case

# Shared memory of one program, KiB, and threads of a multiprocessor.
LIMITS = {80: (163, 2048), 86: (99, 1536), 89: (99, 1536), 90: (227, 2048), 100: (227, 2048), 120: (99, 1536)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPS = ("entropy_calibration", "factored_hidden", "emotion_attention", "routing_aggregation")
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
_MATRIX = {"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma"}


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes on one architecture."""

    kernel: str  # its name, and the optional tensors that it goes without
    case: str
    arch: int
    dtype: str
    num_warps: int
    registers: int  # a thread
    shared: int  # bytes a program
    spilled: int  # bytes of stack and local memory a thread
    matrix: str  # the matrix instructions in it, "" for none

    @property
    def programs(self) -> int:
        """Programs that a multiprocessor holds at once, by registers, shared memory and threads: an estimate."""
        kib, limit = LIMITS[self.arch]
        threads = 32 * self.num_warps
        by_registers = 65536 // (-(-self.registers // 8) * 8 * threads)
        by_shared = (kib + 1) * 1024 // (self.shared + 1024)  # a program takes 1 KiB besides its own
        return min(limit // threads, by_registers, by_shared)

    @property
    def refused(self) -> str:
        """Why this kernel must not be used, or ""."""
        if self.spilled:
            return f"spills {self.spilled} bytes a thread"
        return "" if self.programs else "does not fit on a multiprocessor"


def launches(case: Case, dtype: torch.dtype, arch: int) -> list[common.Launch]:
    """What a case launches, forward and backward, with and without optional tensors."""
    features, *others = case.inputs(dtype)
    kept = {"entropy_calibration": 1, "routing_aggregation": 2}.get(case.op)  # similarity and logits are float32
    tensors = [features, *(t.float() if i == kept else t for i, t in enumerate(others, 1))]
    tensors = [t.to("meta") for t in tensors]
    with common.recorded(arch) as recorded:
        if case.op == "entropy_calibration":
            options = [case.options.get(name, True) for name in ("self_refine", "cross_refine")]
            calibration = [*tensors[:2], tensors[2] if len(tensors) > 2 else None, *options]
            entropy_calibration.forward(*calibration)
            entropy_calibration.backward(tensors[0], *calibration)
        elif case.op == "factored_hidden":
            factored_hidden.backward(factored_hidden.forward(*tensors), *tensors)
        elif case.op == "emotion_attention":
            heads = case.options["num_heads"]
            context, candidates = emotion_attention.forward(*tensors, heads, True)
            emotion_attention.forward(*tensors, heads, False)
            emotion_attention.forward(*tensors, heads, False, tensors[-1][..., 0].contiguous())
            emotion_attention.backward(context, *tensors, candidates, heads)
        else:
            routed, pooled, weights = routing_aggregation.forward(*tensors)
            routing_aggregation.backward(routed, pooled, *tensors[:2], weights)
    return recorded


def paper_cases(batch: int = 32) -> list[Case]:
    """All ops at the paper's sizes."""
    cases = [benchmark_case(op, batch) for op in OPS]
    return [*cases, replace(cases[0], groups="random")]


def compile_launch(launch: common.Launch, arch: int) -> triton.compiler.CompiledKernel:
    """What Triton compiles for this launch: pointers and integers specialised by their values, as at run time."""
    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            divisible = True  # allocations are aligned
        elif name in launch.constants or value is None or value == 1:
            signature[name] = "constexpr"
            constants[name] = value
            divisible = False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def measure(launch: common.Launch, arch: int, dtype: str, case: str) -> Compiled:
    """Compile, and read what the machine code takes."""
    compiled = compile_launch(launch, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
    absent = [name for name, value in zip(launch.kernel.arg_names, launch.arguments, strict=False) if value is None]
    return Compiled(
        kernel=" ".join([launch.kernel.__name__, *(f"-{name}" for name in absent)]),
        case=case,
        arch=arch,
        dtype=dtype,
        num_warps=launch.options["num_warps"],
        registers=usage["REG"],
        shared=compiled.metadata.shared,
        spilled=usage["STACK"] + usage["LOCAL"],
        matrix=" ".join(name for instruction, name in _MATRIX.items() if instruction in compiled.asm["ptx"]),
    )


def measure_all(arch: int, dtype: str, names: tuple[str, ...] = ()) -> list[Compiled]:
    """All kernels of one architecture and type: at the paper's sizes, or at the shared cases' of these names."""
    cases = [case for case in CASES if case.name in names] if names else paper_cases()
    return [measure(launch, arch, dtype, case.name) for case in cases for launch in launches(case, DTYPES[dtype], arch)]


def show(rows: list[Compiled]) -> bool:
    """Print the rows; whether all may be used."""
    for row in rows:
        refused = f"  REFUSED: {row.refused}" if row.refused else ""
        print(
            f"{row.kernel:54} {row.case:16} {row.arch:4}  {row.dtype:4}  {row.num_warps:5}  {row.registers:9}"
            f"  {row.shared:6}  {row.spilled:7}  {row.programs:8}  {row.matrix or '-'}{refused}",
            flush=True,
        )
    return not any(row.refused for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evc_fast.kernels.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=LIMITS, default=[80, 90, 100], help="compute capability")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    names = sorted({case.name for case in CASES if case.sizes["B"]})
    parser.add_argument("--cases", nargs="+", choices=names, default=[], help="instead of the paper's sizes")
    options = parser.parse_args()
    jobs = [(arch, dtype, tuple(options.cases)) for arch in options.arch for dtype in options.dtype]
    print(f"Triton {triton.__version__}; shared memory and spills in bytes; programs: estimated, a multiprocessor")
    print(f"{'kernel':54} {'case':16} arch  type  warps  registers  shared  spilled  programs  matrix instructions")
    # Compilers take a core each; a fork would inherit torch's threads.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        shown = [show(rows) for rows in pool.map(measure_all, *zip(*jobs, strict=True))]
    return int(not all(shown))


if __name__ == "__main__":
    sys.exit(main())
