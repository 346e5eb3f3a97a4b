"""What every op does before a kernel runs: check the arguments, and apply autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from evc_fast.ops.dispatch import FLOATING_DTYPES, autocasts
from evc_fast.reference._dtypes import accumulate_dtype

_INTEGER_DTYPE = torch.int64


def check_arguments(op: str, arguments: Sequence[tuple[str, Tensor, tuple[str, ...]]]) -> None:
    """Check rank, sizes, types and devices of an op's tensors against each other.

    ``arguments`` holds (name, tensor, dimension names). Equal names must have equal sizes, digits are sizes themselves;
    every size but the batch's, "B", is at least 1. All tensors share the first one's device and type (under autocast:
    the type that it casts to), except that a name that ends in "*" may also have the type the op accumulates in.

    Raises:
        TypeError: an argument is no tensor, or has a type that the op does not take.
        ValueError: rank, size or device do not match.
    """
    first_name, first, _ = arguments[0]
    sizes: dict[str, int] = {}
    for name, tensor, dims in arguments:
        label = name.rstrip("*")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {label} must be a tensor [{', '.join(dims)}]; got {type(tensor).__name__}")
        if tensor.dim() != len(dims):
            raise ValueError(f"{op}: {label} must be [{', '.join(dims)}]; got {describe(tensor)}")
        for dim, size in zip(dims, tensor.shape, strict=True):
            expected = int(dim) if dim.isdigit() else sizes.setdefault(dim, size)
            if size != expected:
                where = "" if dim.isdigit() else f" with {dim} = {expected}"
                raise ValueError(f"{op}: {label} must be [{', '.join(dims)}]{where}; got {describe(tensor)}")
            if size < 1 and dim != "B":
                raise ValueError(
                    f"{op}: {label} must be [{', '.join(dims)}] with {dim} of 1 or more; got {describe(tensor)}"
                )
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {label} must be a dense tensor; got {tensor.layout}")
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {label} is on {tensor.device}, {first_name} on {first.device}: one device is expected"
            )
        if label == "groups":
            if tensor.dtype != _INTEGER_DTYPE:
                raise TypeError(f"{op}: groups must be int64; got {describe(tensor)}")
        elif tensor is first:
            if tensor.dtype not in FLOATING_DTYPES:
                raise TypeError(f"{op}: {label} must be float32, bfloat16, float16 or float64; got {describe(tensor)}")
        elif cast_dtype(tensor) != cast_dtype(first) and not (
            name.endswith("*") and tensor.dtype == accumulate_dtype(first)
        ):
            accepted = str(cast_dtype(first))
            if name.endswith("*") and accumulate_dtype(first) != cast_dtype(first):
                accepted += f", or {accumulate_dtype(first)}"
            raise TypeError(f"{op}: {label} must have the type of {first_name}, {accepted}; got {describe(tensor)}")


def describe(tensor: Tensor) -> str:
    """Shape and type of a tensor as error messages show them."""
    return f"{list(tensor.shape)} {tensor.dtype}"


def cast_dtype(tensor: Tensor) -> torch.dtype:
    """The type in which an op stores ``tensor``: its own, or autocast's where that is on (float64 stays)."""
    device_type = tensor.device.type
    if not tensor.is_floating_point() or tensor.dtype == torch.float64 or not autocasts(device_type):
        return tensor.dtype
    return torch.get_autocast_dtype(device_type)


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's type where autocast is on; unchanged where it is off."""
    return tuple(t.to(cast_dtype(t)) for t in tensors)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Ops accumulate in float32 whatever autocast says: products inside them must not be cast again."""
    device_type = tensor.device.type
    if not autocasts(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
