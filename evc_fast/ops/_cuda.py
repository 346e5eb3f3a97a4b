"""The compiled CUDA kernels: a library of their own (``_cuda.so``), loaded when an op first meets a CUDA tensor."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from evc_fast.ops._library import EXTENSION, EXTENSION_MISSING, EXTENSION_PATH

OPS = ("entropy_calibration", "emotion_attention", "routing_aggregation", "folded_encoder")
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
