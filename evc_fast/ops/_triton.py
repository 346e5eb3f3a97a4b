"""Registers the Triton kernels of evc_fast.kernels for CUDA; nothing is imported before an op runs on them.

In a process with TRITON_INTERPRET=1, Triton's interpreter runs them on CPU tensors, in the place of the C++ library.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from evc_fast.ops._library import INTERPRETED, LIBRARY

OPS = ("entropy_calibration", "factored_hidden", "emotion_attention", "routing_aggregation")
DEVICES = ("cpu", "cuda") if INTERPRETED else ("cuda",)


@functools.cache
def missing() -> str:
    """Why the Triton kernels cannot run, and the remedy; "" when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if importlib.util.find_spec("evc_fast.kernels") is None:
        return "evc_fast.kernels is absent, as in a checkout that is not installed: pip install ."
    if not INTERPRETED and not torch.cuda.is_available():
        return "no CUDA device is to be found here"
    return unfit()


@functools.cache
def unfit() -> str:
    """Why this GPU cannot run them, or ""."""
    if INTERPRETED or not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the kernels need a GPU of compute capability 8.0 or later, this one has {major}.{minor}"
    return ""


def launcher(op: str, direction: str) -> Callable:
    """``forward`` or ``backward`` of an op's module in evc_fast.kernels, which is imported at the first call."""

    def launch(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"evc_fast.kernels.{op}"), direction)(*arguments)

    return launch


for _op in OPS:
    for _direction in ("forward", "backward"):
        for _device in DEVICES:
            LIBRARY.impl(f"{_op}_{_direction}", launcher(_op, _direction), _device.upper())
