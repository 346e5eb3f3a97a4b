"""Has a module changed since? What a copy of its weights must know before it may stand in for them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evc_fast.ops._library import EXTENSION

_SAMPLES = 8  # values a tensor


class Stamp:
    """The state of a module's weights at one moment.

    It holds every parameter, buffer and submodule by identity, every tensor's address and PyTorch's count of its
    in-place changes. Writes that PyTorch does not count (through ``.data`` or a NumPy view) are found by their values:
    8 of each tensor, evenly spaced with both ends; of a tensor without a count (made in inference mode), all of them.
    So the one change that passes is a write around PyTorch's count that leaves those 8 values of its tensor as they
    were.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        self._children = [(m._modules, name, child) for m in self._modules for name, child in m._modules.items()]
        self._slots = [
            (slots, name, tensor)
            for m in self._modules
            for slots in (m._parameters, m._buffers)
            for name, tensor in slots.items()
        ]
        tensors = [tensor for _, _, tensor in self._slots if tensor is not None]
        self._tensors = tensors
        self._counted = [t for t in tensors if not t.is_inference()]
        self._digests = _Digest(self._counted, _SAMPLES), _Digest([t for t in tensors if t.is_inference()], 0)
        self._state = self._read()

    def matches(self) -> bool:
        """Whether the module is as it was; some 20 microseconds for an encoder."""
        for slots, name, tensor in self._slots:
            if slots.get(name) is not tensor:
                return False
        for modules, name, child in self._children:
            if modules.get(name) is not child:
                return False
        return self._read() == self._state

    def hooked(self) -> bool:
        """Whether any module has a forward hook, which only the module's own forward runs."""
        return any(m._forward_hooks or m._forward_pre_hooks for m in self._modules)

    def _read(self) -> tuple:
        # Addresses first: a digest reads at those that it was made with.
        pointers = [t.data_ptr() for t in self._tensors]
        if pointers != getattr(self, "_pointers", pointers):
            return ()
        self._pointers = pointers
        return [t._version for t in self._counted], *(digest() for digest in self._digests)


class _Digest:
    """A number that changes with ``samples`` values of each tensor (0: with all of them); addresses are read once."""

    def __init__(self, tensors: Sequence[Tensor], samples: int) -> None:
        self._samples = samples
        plain = [t for t in tensors if EXTENSION and t.device.type == "cpu" and t.is_contiguous()]
        self._others = [t for t in tensors if not any(t is p for p in plain)]
        count = len(plain)
        self._arguments = (
            ctypes.c_int64(count),
            (ctypes.c_void_p * count)(*(t.data_ptr() for t in plain)),
            (ctypes.c_int64 * count)(*(t.numel() for t in plain)),
            (ctypes.c_int64 * count)(*(t.element_size() for t in plain)),
            ctypes.c_int64(samples),
        )

    def __call__(self) -> tuple:
        values = [value for t in self._others for value in self._picked(t)]
        return EXTENSION.evc_fast_digest(*self._arguments) if EXTENSION else 0, values

    def _picked(self, tensor: Tensor) -> list[float]:
        flat = tensor.detach().reshape(-1)
        if self._samples and flat.numel() > self._samples:
            flat = flat[
                torch.linspace(0, flat.numel() - 1, self._samples, dtype=torch.float64, device=flat.device).long()
            ]
        return flat.double().tolist()
