"""What the tests that need a GPU share.

With EVC_FAST_GPU_REHEARSAL=1 these tests run on a CPU by the C++ kernels, or the reference where these take no float16,
so that a machine without a GPU shows that they test what they say; what only CUDA has is skipped.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evc_fast.ops import dispatch

REHEARSAL = os.environ.get("EVC_FAST_GPU_REHEARSAL") == "1"
ON = "cpu" if REHEARSAL else "cuda"
BACKEND = "aot_eager" if REHEARSAL else "inductor"
needs_cuda = pytest.mark.skipif(not REHEARSAL and not torch.cuda.is_available(), reason="needs CUDA")
cuda_alone = pytest.mark.skipif(REHEARSAL, reason="needs CUDA")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def here(impl: str, dtype: torch.dtype = torch.float32) -> str:
    """The implementation itself; in a rehearsal that of a CPU."""
    if not REHEARSAL:
        return impl
    (cpp,) = [each for each in dispatch.implementations(dispatch.OPS[0]) if each.name == "cpp"]
    return "cpp" if cpp.available and dtype in cpp.dtypes else "reference"


def moved(tensor: Tensor) -> Tensor:
    """The same values on the GPU, behind the same strides."""
    storage = tensor.new_empty(0).set_(tensor.untyped_storage()).to(ON)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Recorder(TorchDispatchMode):
    """The calls of evc_fast's ops inside the `with`, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "evc_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def opcheck(calls: list[tuple[torch._ops.OpOverload, tuple]], *, trained: bool) -> set[str]:
    """PyTorch's own checks of each op on the very arguments that it was called with; the ops' names."""
    for func, args in calls:
        forward = func.name().endswith("_forward")
        given = [
            a.detach().requires_grad_(trained and forward and a.is_floating_point()) if isinstance(a, Tensor) else a
            for a in args
        ]
        torch.library.opcheck(func, tuple(given))
    return {func.name().removeprefix("evc_fast::") for func, _ in calls}
