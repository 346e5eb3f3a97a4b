"""Which implementation of an op a benchmark's row can ask for by name, and why not."""

from __future__ import annotations

import torch
from _device import Device

from evc_fast.ops import dispatch


def obstacle(op: str, impl: str, device: Device, dtype: torch.dtype) -> str:
    """Why `impl` does not serve `op` for tensors of this device and type, or ""."""
    found = next((each for each in dispatch.implementations(op) if each.name == impl), None)
    if found is None:
        return f"{op} has no implementation named {impl}"
    return found.obstacle(torch.empty(0, dtype=dtype, device=device.name))


def stand_in(impl: str, device: Device) -> str:
    """The implementation that a row runs which asks for `impl`: itself, but in a rehearsal that of a CPU."""
    return "cpp" if device.rehearsal else impl


def serving(op: str, device: Device, dtype: torch.dtype, *, gradients: bool) -> str:
    """The implementation that runs where none is asked for."""
    return next(
        each.name
        for each in dispatch.implementations(op)
        if each.gradients >= gradients and not obstacle(op, each.name, device, dtype)
    )
