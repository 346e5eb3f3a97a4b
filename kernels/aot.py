"""Compile every Triton kernel at the paper's sizes without a GPU or a driver, and print what it takes.

    python -m evc_fast.kernels.aot --arch 80 90 --dtype fp32 bf16

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
from dataclasses import dataclass

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from evc_fast.kernels import common, emotion_attention, entropy_calibration, factored_hidden, routing_aggregation

# Shared memory of one program, KiB, and threads of a multiprocessor.
LIMITS = {80: (163, 2048), 86: (99, 1536), 89: (99, 1536), 90: (227, 2048), 100: (227, 2048), 120: (99, 1536)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
_MATRIX = {"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma"}


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes on one architecture."""

    kernel: str  # its name, and the optional tensors that it goes without
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


def paper_launches(dtype: torch.dtype, arch: int, batch: int = 32) -> list[common.Launch]:
    """The launches of all ops at the paper's sizes, forward and backward, with and without optional tensors."""
    b, k, n, w, d, width, heads, hidden = batch, 4, 16, 179, 300, 512, 4, 1200

    def of(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens, words, logits = of(b, k, n, d), of(w, d), of(b, n, k, dtype=torch.float32)
    triplets, similarity = of(b, k, 3, width), of(b, k, dtype=torch.float32)
    factors = of(b, k, n, 3 * heads), of(b, k, 3 * heads, hidden), of(b, n, hidden)
    attention = tokens, words, words, tokens, of(b, n, d)
    with common.recorded(arch) as launches:
        for groups in (None, of(b, k, dtype=torch.int64)):
            calibration = triplets, similarity, groups, True, True
            entropy_calibration.forward(*calibration)
            entropy_calibration.backward(triplets, *calibration)
        factored_hidden.forward(*factors)
        factored_hidden.backward(of(b, k, n, hidden), *factors)
        emotion_attention.forward(*attention, heads, False)
        emotion_attention.forward(*attention, heads, True)
        emotion_attention.forward(*attention, heads, False, of(b, n))
        emotion_attention.backward(tokens, *attention, tokens, heads)
        routing_aggregation.forward(tokens, tokens, logits)
        routing_aggregation.backward(of(b, 2 * n, d), of(b, 2 * d), tokens, tokens, logits)
    return launches


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
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def measure(launch: common.Launch, arch: int, dtype: str) -> Compiled:
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
        arch=arch,
        dtype=dtype,
        num_warps=launch.num_warps,
        registers=usage["REG"],
        shared=compiled.metadata.shared,
        spilled=usage["STACK"] + usage["LOCAL"],
        matrix=" ".join(name for instruction, name in _MATRIX.items() if instruction in compiled.asm["ptx"]),
    )


def measure_all(arch: int, dtype: str) -> list[Compiled]:
    """All kernels of one architecture and type."""
    return [measure(launch, arch, dtype) for launch in paper_launches(DTYPES[dtype], arch)]


def show(rows: list[Compiled]) -> bool:
    """Print the rows; whether all may be used."""
    for row in rows:
        refused = f"  REFUSED: {row.refused}" if row.refused else ""
        print(
            f"{row.kernel:54} {row.arch:4}  {row.dtype:4}  {row.num_warps:5}  {row.registers:9}  {row.shared:6}"
            f"  {row.spilled:7}  {row.programs:8}  {row.matrix or '-'}{refused}",
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
    options = parser.parse_args()
    jobs = [(arch, dtype) for arch in options.arch for dtype in options.dtype]
    print(f"Triton {triton.__version__}; shared memory and spills in bytes; programs: estimated, a multiprocessor")
    print(f"{'kernel':54} arch  type  warps  registers  shared  spilled  programs  matrix instructions")
    # Compilers take a core each; a fork would inherit torch's threads.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        shown = [show(rows) for rows in pool.map(measure_all, *zip(*jobs, strict=True))]
    return int(not all(shown))


if __name__ == "__main__":
    sys.exit(main())
