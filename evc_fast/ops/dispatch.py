"""Which implementation serves an op: ``impl`` to callable, and the reasons that ``python -m evc_fast`` prints.

An explicit ``impl`` that cannot run raises, and says what mends it. The automatic choice (``impl=None``) takes the
fastest one that can serve the tensors' device and type, and logs once where that is not the compiled one.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from evc_fast.ops._library import EXTENSION, EXTENSION_MISSING

Impl = Literal["reference", "cpp"]

OPS = ("entropy_calibration", "factored_hidden", "emotion_attention", "routing_aggregation")
SERVED = (*OPS, "folded_encoder")
FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float64)

_logger = logging.getLogger("evc_fast")


@dataclass(frozen=True)
class Implementation:
    """One implementation of an op, and whether it can run here."""

    name: str
    available: bool
    reason: str  # why it does not run here, and the remedy; "" when it does
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]


def implementations(op: str) -> list[Implementation]:
    """All implementations of ``op``, fastest first.

    Raises:
        ValueError: ``op`` is not one of :data:`SERVED`.
    """
    if op not in SERVED:
        raise ValueError(f"op must be one of {', '.join(SERVED)}; got {op!r}")
    return [
        Implementation("cpp", not EXTENSION_MISSING, EXTENSION_MISSING, ("cpu",), CPP_DTYPES),
        Implementation("reference", True, "", ("any",), FLOATING_DTYPES),
    ]


def select(op: str, impl: Impl | None, tensor: torch.Tensor, compiled: Callable, reference: Callable) -> Callable:
    """The callable that serves ``op`` for tensors like ``tensor``.

    Raises:
        ValueError: ``impl`` is unknown.
        RuntimeError: ``impl`` cannot run here; the message says why and what mends it.
    """
    if impl == "reference":
        return reference
    if impl not in (None, "cpp"):
        raise ValueError(f'impl must be "reference", "cpp" or None; got {impl!r}')
    obstacle = _cpp_obstacle(tensor)
    if not obstacle:
        return compiled
    if impl == "cpp":
        raise RuntimeError(f'{op}: impl="cpp" cannot run: {obstacle}')
    if not torch.compiler.is_compiling():
        _log_once(op, obstacle)
    return reference


def _cpp_obstacle(tensor: torch.Tensor) -> str:
    if EXTENSION_MISSING:
        return EXTENSION_MISSING
    if tensor.device.type != "cpu":
        return f"it serves CPU tensors, these are on {tensor.device}"
    if tensor.dtype not in CPP_DTYPES:
        source = "autocast makes these" if torch.is_autocast_enabled("cpu") else "these are"
        return f"it takes float32, bfloat16 and float64, {source} {tensor.dtype}"
    return ""


@functools.cache
def _log_once(op: str, obstacle: str) -> None:
    _logger.warning("%s runs on its PyTorch reference: cpp: %s", op, obstacle)


def cpu_isa() -> str:
    """The instruction-set variant that the compiled kernels use here, or "none" where they are absent.

    ``EVC_FAST_ISA`` (default, avx2, avx512, avx512_bf16), read when the library loads, forces one that the machine has.
    """
    return EXTENSION.evc_fast_cpu_isa().decode() if EXTENSION else "none"


def cpu_isas_supported() -> list[str]:
    """The variants that were built and that this machine can run, slowest first."""
    return EXTENSION.evc_fast_cpu_isas_supported().decode().split(",") if EXTENSION else []
