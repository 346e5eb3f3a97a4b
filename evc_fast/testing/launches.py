"""What a GPU would be asked to launch: the operations that compute, counted on any device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_LAUNCH_NOTHING = (
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.scalar_tensor.default,  # a Python number
    torch.ops.aten.promote_types.default,
)


@dataclass(frozen=True)
class Launch:
    """One operation: the bytes of its tensors, each read or written once, and its matrix products' FLOPs."""

    name: str
    nbytes: int
    flops: int


class Launches(TorchDispatchMode):
    """Inside the `with`, `launches` grows by every operation that computes; views launch nothing.

    A fused operation counts as one, as does an attention or a sum that PyTorch runs in one kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view and func not in _LAUNCH_NOTHING:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            nbytes = sum(t.numel() * t.element_size() for t in tensors if 0 not in t.stride() or t.numel() == 1)
            formula = flop_registry.get(func._overloadpacket)
            flops = formula(*args, **kwargs, out_val=result) if formula else 0
            self.launches.append(Launch(str(func), nbytes, int(flops)))
        return result
