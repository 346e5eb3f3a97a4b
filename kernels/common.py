"""What the kernels share: launching, launch parameters, and the arithmetic that hardware approximations would spoil."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as :func:`recorded` gives it back."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]  # of the compiler: num_warps, num_stages, maxnreg


@dataclass
class Recording:
    arch: int
    launches: list[Launch] = field(default_factory=list)


_recording: Recording | None = None


@contextlib.contextmanager
def recorded(arch: int) -> Iterator[list[Launch]]:
    """Within it launches are listed instead of run, with the parameters of an architecture such as 90.

    So meta tensors will do, and what is compiled ahead of time is what would be launched.
    """
    global _recording
    outer, _recording = _recording, Recording(arch)
    try:
        yield _recording.launches
    finally:
        _recording = outer


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int,
    num_stages: int = 1,
    registers: int | None = None,
    **constants: Any,
) -> None:
    """Run ``kernel`` on the device of its first argument, on the current stream; nothing where the grid is empty."""
    if 0 in grid:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if registers is not None:
        options["maxnreg"] = registers
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, arguments, constants, options))
        return
    device = arguments[0].device
    guard = contextlib.nullcontext()
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        guard = torch.cuda.device(device)
    with guard:
        kernel[grid](*arguments, **options, **constants)


def architecture(tensor: Tensor) -> int:
    """Compute capability, such as 90, of what will run on ``tensor``; the interpreter is taken for Hopper."""
    if _recording is not None:
        return _recording.arch
    return _capability(tensor.device.index) if tensor.device.type == "cuda" else 90


@functools.cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def check_dtype(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{op}: the Triton kernels take float32, bfloat16 and float16; {name} is {tensor.dtype}")


def check_at_most(op: str, what: str, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(
            f'{op}: the Triton kernels take at most {limit} {what}, impl="reference" any number; got {size}'
        )


def with_adjacent_features(tensor: Tensor) -> Tensor:
    """The tensor itself, whatever its strides, where the last dimension's is 1; else a contiguous copy.

    The kernels take every other stride as it is. Features that are not adjacent would cost a memory transaction each,
    in several kernels: one copy costs less.
    """
    return tensor if tensor.stride(-1) == 1 or tensor.size(-1) == 1 else tensor.contiguous()


def stride_unit(*tensors: Tensor) -> int:
    """A number of elements, at most 16, that divides all strides but the last.

    The compiler knows of an argument only whether it is divisible by 16, and d = 300 is not. Kernels take strides in
    this unit, a constant, and so load rows of 300 floats 16 bytes at a time.
    """
    return math.gcd(16, *(s for t in tensors for s in t.stride()[:-1]))


def has_odd_strides(*tensors: Tensor) -> bool:
    """Whether rows are so placed that elements are loaded one by one: each address is in a register of its own then,
    and tiles have to be smaller."""
    return stride_unit(*tensors) * tensors[0].element_size() < 8


def power_of_two(n: int) -> int:
    """The smallest power of two from ``n`` on."""
    return triton.next_power_of_2(max(n, 1))


@dataclass(frozen=True)
class Row:
    """One row of :data:`TABLE`: up to which sizes it serves, and the launch parameters."""

    width: int  # of features, or of a head
    warps: int
    blocks: dict[str, int] = field(default_factory=dict)
    stages: int = 1
    itemsize: int = 4  # of the stored type, up to
    arch: int = 0  # from which compute capability on
    registers: int | None = None  # a thread may take; None: as the compiler sees fit, spills for more programs included


ANY = 2**31

# The first row that fits serves.
TABLE = {
    "entropy_calibration_forward": (Row(1024, 4), Row(4096, 8), Row(8192, 16)),
    "entropy_calibration_backward": (
        Row(512, 16, {"TILE": 4}),
        Row(1024, 16, {"TILE": 2}),
        Row(4096, 16, {"TILE": 1}),
        Row(8192, 32, {"TILE": 1}),
    ),
    "emotion_attention_forward": (
        Row(128, 4, {"ROWS": 64, "WORDS": 64, "COLUMNS": 64}, itemsize=2, arch=90),
        Row(128, 4, {"ROWS": 64, "WORDS": 32, "COLUMNS": 64}, itemsize=2),
        Row(96, 8, {"ROWS": 32, "WORDS": 32, "COLUMNS": 32}),
        Row(128, 8, {"ROWS": 32, "WORDS": 16, "COLUMNS": 32}),
        Row(512, 8, {"ROWS": 16, "WORDS": 16, "COLUMNS": 32}),
    ),
    "emotion_attention_backward": (
        Row(128, 8, {"ROWS": 64, "WORDS": 16, "COLUMNS": 64, "STREAMED": 1}, itemsize=2, arch=120),
        Row(128, 8, {"ROWS": 64, "WORDS": 64, "COLUMNS": 64, "STREAMED": 0}, itemsize=2, arch=90),
        Row(128, 8, {"ROWS": 64, "WORDS": 16, "COLUMNS": 64, "STREAMED": 1}, itemsize=2),
        Row(128, 8, {"ROWS": 32, "WORDS": 16, "COLUMNS": 32, "STREAMED": 1}),
        Row(512, 8, {"ROWS": 16, "WORDS": 16, "COLUMNS": 32, "STREAMED": 1}),
    ),
    "factored_hidden_forward": (Row(ANY, 4, {"TILE": 2048}),),
    "factored_hidden_backward": (Row(ANY, 4, {"TILE": 2048}, itemsize=2), Row(ANY, 8, {"TILE": 2048})),
    "routing_aggregation_forward": (
        Row(32, 4, {"TRIPLETS": 4, "FRAMES": 16, "COLUMNS": 64}, registers=224),
        Row(ANY, 4, {"TRIPLETS": 4, "FRAMES": 16, "COLUMNS": 64}),
    ),
    "routing_aggregation_backward": (Row(ANY, 4, {"TILE": 4096, "TRIPLETS": 8, "COLUMNS": 2048}),),
}


def parameters(kernel: str, width: int, like: Tensor) -> Row:
    """The launch parameters of ``kernel`` for tensors like ``like``.

    Raises:
        ValueError: no row of the table is so wide.
    """
    arch = architecture(like)
    for row in TABLE[kernel]:
        if width <= row.width and like.element_size() <= row.itemsize and arch >= row.arch:
            return row
    limit = TABLE[kernel][-1].width
    raise ValueError(f'{kernel}: the Triton kernels take widths up to {limit}, impl="reference" any; got {width}')


@triton.jit
def log1p(x):
    """log(1 + x) of a float32 x > -1 that keeps its digits near 0; NaN stays."""
    total = 1 + x
    return tl.where(total == 1, x, tl.log(total) * (x / (total - 1)))


@triton.jit
def exp_nonpositive(x):
    """exp(x) of float32 x <= 0 to 2 units in the last place, also where it is subnormal; 0 below 2^-150; NaN stays.

    tl.exp rounds x log2(e), so its relative error grows as |x|.
    """
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(n, -0.693145751953125, x)  # ln 2 in two parts, the first of 15 bits: n times it is exact
    r = tl.fma(n, -1.42860677e-06, r)
    half = tl.floor(n * 0.5)  # 2^n itself may be subnormal, which exp2 flushes to 0
    return tl.where(x < -104.0, 0.0, tl.exp(r) * tl.exp2(half) * tl.exp2(n - half))
