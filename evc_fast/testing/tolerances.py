"""Error bounds relative to what plain PyTorch itself loses in the same type."""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


def largest_error(actual: Tensor, oracle: Tensor) -> float:
    """max |actual - oracle|; inf where only one of them is NaN."""
    if actual.numel() == 0:
        return 0.0
    difference = (actual.double() - oracle).abs()
    difference = torch.where(actual.isnan() & oracle.isnan(), 0, difference)
    return difference.nan_to_num(nan=float("inf")).max().item()


def plain_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the plain PyTorch result that a result in ``dtype`` is held against.

    float32 for float64, on equal values: in float64 itself plain PyTorch is the oracle.
    """
    return torch.float32 if dtype == torch.float64 else dtype


def error_bound(dtype: torch.dtype, plain: Tensor, oracle: Tensor, factor: float) -> float:
    """What a result in ``dtype`` may err by: ``factor`` times what plain PyTorch does.

    A largest error is a draw, of few numbers it may be small by luck: three root mean squares, and one unit in the last
    place of the largest value, count where they are more. For float64 the bound of float32 is scaled by the ratio of
    their roundings, and doubled: the oracle itself errs as much.
    """
    if oracle.numel() == 0:
        return 0.0
    difference = (plain.double() - oracle).nan_to_num(0, 0, 0)
    typical = 3 * difference.square().mean().sqrt().item()
    rounding = torch.finfo(plain.dtype).eps * oracle.abs().nan_to_num(0, 0, 0).max().item()
    smallest = 8 * torch.finfo(plain.dtype).tiny  # the attention's exp is 0 below it
    bound = factor * max(largest_error(plain, oracle), typical, rounding, smallest)
    if dtype == torch.float64:
        bound *= 2 * torch.finfo(torch.float64).eps / torch.finfo(plain.dtype).eps
    return bound


def assert_as_good_as_plain(actual: Tensor, plain: Tensor, oracle: Tensor, factor: float, what: str) -> None:
    """Fail where ``actual`` strays from the float64 ``oracle`` more than ``factor`` times what ``plain`` does.

    ``plain`` is in the type that :func:`plain_dtype` tells.
    """
    assert actual.shape == plain.shape, f"{what}: {list(actual.shape)}, plain PyTorch gives {list(plain.shape)}"
    assert plain_dtype(actual.dtype) == plain.dtype, f"{what}: {actual.dtype}, plain PyTorch gives {plain.dtype}"
    error, bound = largest_error(actual, oracle), error_bound(actual.dtype, plain, oracle, factor)
    assert error <= bound, f"{what}: error {error:.3g} against float64, at most {bound:.3g} allowed"
