"""Which implementation serves an op: ``impl`` to callable, and the reasons that ``python -m evc_fast`` prints.

- "reference": plain PyTorch, on any device, differentiable any number of times.
- "cpp": the compiled CPU kernels.
- "triton": Triton kernels for CUDA, forward and backward: training.
- "cuda": compiled CUDA kernels without gradients: inference.

An explicit ``impl`` that cannot run raises, and says what mends it. The automatic choice (``impl=None``) takes the
fastest one that can serve the tensors' device and type, and logs once where that is the reference. Where kernels are
there but this GPU or its driver cannot run them, it raises too, unless EVC_FAST_ALLOW_REFERENCE=1.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from evc_fast.ops import _cuda, _triton
from evc_fast.ops._library import EXTENSION, EXTENSION_MISSING

Impl = Literal["reference", "cpp", "triton", "cuda"]
IMPLS = ("reference", "cpp", "triton", "cuda")

OPS = ("entropy_calibration", "factored_hidden", "emotion_attention", "routing_aggregation")
SERVED = (*OPS, "folded_encoder")
FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
GPU_DTYPES = _cuda.GPU_DTYPES

# Asked once, here: in torch 2.11 torch.compile cannot trace the question.
_AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu") if torch.amp.is_autocast_available(kind)
)

_logger = logging.getLogger("evc_fast")


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for this kind of device (some, as meta, have none)."""
    return device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)


@dataclass(frozen=True)
class Implementation:
    """One implementation of an op, and whether it can run here."""

    name: str
    missing: Callable[[], str]
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    gradients: bool = True
    unfit: Callable[[], str] = str  # why kernels that are there cannot run on this GPU, and the remedy

    @property
    def reason(self) -> str:
        """Why it does not run here, and the remedy; "" when it does."""
        return self.missing()

    @property
    def available(self) -> bool:
        return not self.missing()

    def obstacle(self, tensor: Tensor) -> str:
        """Why it cannot serve such a tensor, or "". Looks for a GPU only where the tensor is on one."""
        if "any" not in self.devices and tensor.device.type not in self.devices:
            return f"it serves {' and '.join(map(str.upper, self.devices))} tensors, these are on {tensor.device}"
        if tensor.dtype not in self.dtypes:
            kind = tensor.device.type
            source = "autocast makes these" if autocasts(kind) else "these are"
            *most, last = (str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"it takes {', '.join(most)} and {last}, {source} {tensor.dtype}"
        return self.missing()


def _outside_graphs(question: Callable[[], str]) -> Callable[[], str]:
    """``question`` for torch.compile too: it is asked while a graph is traced, and its answer is the graph's constant.

    To find out about libraries and GPUs calls what cannot be traced.
    """

    @torch.compiler.assume_constant_result
    def ask() -> str:
        return question()

    return ask


_cuda_missing, _cuda_unfit, _triton_missing, _triton_unfit = map(
    _outside_graphs, (_cuda.missing, _cuda.unfit, _triton.missing, _triton.unfit)
)


@functools.cache
def implementations(op: str) -> tuple[Implementation, ...]:
    """All implementations of ``op``, fastest first on each device.

    Raises:
        ValueError: ``op`` is not one of :data:`SERVED`.
    """
    if op not in SERVED:
        raise ValueError(f"op must be one of {', '.join(SERVED)}; got {op!r}")
    found = [Implementation("cpp", lambda: EXTENSION_MISSING, ("cpu",), CPP_DTYPES, gradients=op in OPS)]
    if op in _cuda.OPS:
        found.append(Implementation("cuda", _cuda_missing, _cuda.devices(), GPU_DTYPES, False, _cuda_unfit))
    if op in (*_triton.OPS, "folded_encoder"):
        trains = op in OPS
        found.append(Implementation("triton", _triton_missing, _triton.DEVICES, GPU_DTYPES, trains, _triton_unfit))
    return *found, Implementation("reference", str, ("any",), FLOATING_DTYPES)


def select(
    op: str,
    impl: Impl | None,
    tensors: Sequence[Tensor | None],
    callables: dict[str, Callable],
    *,
    like: Tensor | None = None,
) -> Callable:
    """The callable among ``callables``, by name of the implementation, that serves ``op`` for these tensors.

    Args:
        tensors: those that gradients may be asked for; the first one's device and type decide.
        like: decides in its place.

    Raises:
        ValueError: ``impl`` is unknown, or ``op`` has no such implementation.
        RuntimeError: ``impl`` cannot run here; the message says why and what mends it.
    """
    if impl == "reference":
        return callables[impl]
    if impl not in (None, *IMPLS):
        raise ValueError(f"impl must be {', '.join(map(_quoted, IMPLS))} or None; got {impl!r}")
    if impl is not None and impl not in callables:
        raise ValueError(f"{op} has no impl={_quoted(impl)}: it has {', '.join(map(_quoted, callables))}")
    deciding = tensors[0] if like is None else like
    wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    obstacles, unfit = [], []
    for each in implementations(op):
        if impl not in (None, each.name):
            continue
        obstacle = each.obstacle(deciding)
        if not obstacle and wants_gradient and not each.gradients:
            obstacle = "it has no gradients: use another impl, or torch.no_grad()"
        if not obstacle:
            if each.name == "reference":
                if unfit and os.environ.get("EVC_FAST_ALLOW_REFERENCE") != "1":
                    raise RuntimeError(
                        f'{op}: {"; ".join(unfit)}; impl="reference", or EVC_FAST_ALLOW_REFERENCE=1, computes it in '
                        "plain PyTorch"
                    )
                if not torch.compiler.is_compiling():
                    no_kernel = f"it has no kernel for {deciding.device.type.upper()} tensors"
                    _log_once(op, "; ".join(obstacles) or no_kernel)
            return callables[each.name]
        if deciding.device.type in each.devices:
            obstacles.append(f"{each.name}: {obstacle}")
            if impl is None and each.unfit() == obstacle:
                unfit.append(f"{each.name} cannot run: {obstacle}")
    raise RuntimeError(f"{op}: impl={_quoted(impl)} cannot run: {obstacle}")


def _quoted(name: str) -> str:
    return f'"{name}"'


@functools.cache
def _log_once(op: str, obstacles: str) -> None:
    _logger.warning("%s runs on its PyTorch reference: %s", op, obstacles)


def cpu_isa() -> str:
    """The instruction-set variant that the compiled kernels use here, or "none" where they are absent.

    ``EVC_FAST_ISA`` (default, avx2, avx512, avx512_bf16), read when the library loads, forces one that the machine has.
    """
    return EXTENSION.evc_fast_cpu_isa().decode() if EXTENSION else "none"


def cpu_isas_supported() -> list[str]:
    """The variants that were built and that this machine can run, slowest first."""
    return EXTENSION.evc_fast_cpu_isas_supported().decode().split(",") if EXTENSION else []
