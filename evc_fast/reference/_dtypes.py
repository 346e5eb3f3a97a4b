"""The one rule of precision: every op accumulates in float32, and in float64 for float64 inputs."""

from __future__ import annotations

import torch


def accumulate_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The type that an op on ``tensor`` computes in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
