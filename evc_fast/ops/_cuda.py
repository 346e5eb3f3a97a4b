"""The compiled CUDA kernels: a library of their own (``_cuda.so``), loaded when an op first meets a CUDA tensor."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from evc_fast.ops._library import EXTENSION, EXTENSION_MISSING, EXTENSION_PATH

OPS = ("entropy_calibration", "emotion_attention", "routing_aggregation", "folded_encoder")
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of CudaDtype in csrc/cuda.h
LIBRARY_PATH = EXTENSION_PATH.with_name("_cuda.so")

_emulated = False


@functools.cache
def missing() -> str:
    """Why the CUDA kernels cannot run, and the remedy; "" when they can."""
    if _emulated:
        return ""
    if EXTENSION_MISSING:
        return EXTENSION_MISSING
    if not LIBRARY_PATH.exists():
        return "the CUDA library was not built, as no nvcc was found: install the CUDA toolkit, then pip install ."
    if not torch.cuda.is_available():
        return "no CUDA device is to be found here"
    return unfit()


@functools.cache
def unfit() -> str:
    """Why this GPU, its driver or torch cannot run the library that was built, or ""."""
    if _emulated or EXTENSION_MISSING or not LIBRARY_PATH.exists() or not torch.cuda.is_available():
        return ""
    return _load(LIBRARY_PATH)


def folded_obstacle(sizes: Sequence[int], num_frames: int, like: torch.Tensor) -> str:
    """Why the folded encoder's kernel does not run videos of these sizes on the device of ``like``, or "".

    sizes: of :func:`~evc_fast.ops.folded_encoder.folded_sizes`; like: one of the weights.
    """
    given = (ctypes.c_int64 * len(sizes))(*sizes)
    dtype = GPU_DTYPES.index(like.dtype)
    guard = torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()
    with guard:
        reason = EXTENSION.evc_fast_folded_cuda_obstacle(
            given, len(sizes), ctypes.c_int64(num_frames), dtype, int(not like.is_cuda)
        )
    return reason.decode() if reason else ""


def devices() -> tuple[str, ...]:
    """Types of the devices whose tensors the loaded library takes."""
    return ("cuda", "cpu") if _emulated else ("cuda",)


def load_emulation(path: Path) -> None:
    """Serve CPU tensors by the CUDA kernels' sources compiled for the CPU: what tests do.

    Raises:
        RuntimeError: the library does not load.
    """
    global _emulated
    from evc_fast.ops import dispatch

    reason = _load(path)
    if reason:
        raise RuntimeError(reason)
    _emulated = True
    missing.cache_clear()
    unfit.cache_clear()
    dispatch.implementations.cache_clear()


def _load(path: Path) -> str:
    error = EXTENSION.evc_fast_load_cuda(str(path).encode())
    return error.decode() if error else ""
