"""Has a module changed since? What a copy of its weights must know before it may stand in for them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evc_fast.ops._library import EXTENSION

_SAMPLES = 16  # values read of a tensor


class Stamp:
    """The state of a module's weights at one moment.

    It holds every parameter, buffer and submodule by identity, every tensor's address, strides and PyTorch's count of
    its in-place changes. Writes that PyTorch does not count (through ``.data`` or a NumPy view) are found by their
    values: 16 of each tensor, evenly spaced with both ends; of a tensor without a count (made in inference mode), all
    of them. So what passes is a write around PyTorch's count that leaves those 16 as they were: a few elements, or a
    few rows of a matrix. (To read all values would cost as much as a third of an encoder's call.)
    Values on a GPU are not read, since that would wait for it: there any write around the count passes.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules = list(module.modules())
        self._children = [(m._modules, name, child) for m in self.modules for name, child in m._modules.items()]
        self._slots = [
            (slots, name, tensor)
            for m in self.modules
            for slots in (m._parameters, m._buffers)
            for name, tensor in slots.items()
        ]
        tensors = [tensor for _, _, tensor in self._slots if tensor is not None]
        self._tensors = tensors
        self._counted = [t for t in tensors if not t.is_inference()]
        near = [t for t in tensors if t.device.type == "cpu"]
        counted, rest = ([t for t in near if t.is_inference() == inference] for inference in (False, True))
        self._digests = _Digest(counted), _Digest(rest, every=True)
        self._pointers = [t.data_ptr() for t in tensors]
        self._state = self._read()

    def matches(self) -> bool:
        """Whether the module is as it was; some 40 microseconds for an encoder."""
        for slots, name, tensor in self._slots:
            if slots.get(name) is not tensor:
                return False
        for modules, name, child in self._children:
            if modules.get(name) is not child:
                return False
        return self._read() == self._state

    def _read(self) -> tuple:
        # Addresses first: a digest reads at those that it was made with.
        if [t.data_ptr() for t in self._tensors] != self._pointers:
            return ()
        versions = [t._version for t in self._counted]
        return versions, [t.stride() for t in self._tensors], *(digest() for digest in self._digests)


class _Digest:
    """A number that changes with the sampled values (``every``: with all) of tensors; their addresses are read once."""

    def __init__(self, tensors: Sequence[Tensor], *, every: bool = False) -> None:
        self._samples = [t.numel() if every else _SAMPLES for t in tensors]
        self._tensors = [t.detach() for t in tensors]
        self._arguments: tuple | None = None
        if EXTENSION and all(t.is_contiguous() for t in tensors):
            count = len(tensors)
            self._arguments = (
                ctypes.c_int64(count),
                (ctypes.c_void_p * count)(*(t.data_ptr() for t in tensors)),
                (ctypes.c_int64 * count)(*(t.numel() for t in tensors)),
                (ctypes.c_int64 * count)(*(t.element_size() for t in tensors)),
                (ctypes.c_int64 * count)(*self._samples),
            )

    def __call__(self) -> int | list[int]:
        if self._arguments:
            return EXTENSION.evc_fast_digest(*self._arguments)
        return [x for t, samples in zip(self._tensors, self._samples, strict=True) for x in _picked(t, samples)]


def _picked(tensor: Tensor, samples: int) -> list[int]:
    """The values' bits as float64: a NaN equals itself."""
    flat = tensor.reshape(-1)
    if flat.numel() > samples:
        places = torch.arange(samples, device=flat.device) * (flat.numel() - 1) // (samples - 1)
        flat = flat[places]
    return flat.double().view(torch.int64).tolist()
