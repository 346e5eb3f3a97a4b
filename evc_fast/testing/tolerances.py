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


def error_bound(plain: Tensor, oracle: Tensor, factor: float) -> float:
    """``factor`` times what plain PyTorch errs by, at least one rounding of the largest value.

    A largest error is a draw: of few numbers it may be small by luck, so three root mean squares count where they are
    more.
    """
    if oracle.numel() == 0:
        return 0.0
    difference = (plain.double() - oracle).nan_to_num(0, 0, 0)
    typical = 3 * difference.square().mean().sqrt().item()
    largest = oracle.abs().nan_to_num(0, 0, 0).max().item()
    smallest = torch.finfo(plain.dtype).tiny  # the kernels' exp is 0 below it
    rounding = torch.finfo(plain.dtype).eps / 2 * largest
    return factor * max(largest_error(plain, oracle), typical, rounding, 8 * smallest)


def assert_as_good_as_plain(actual: Tensor, plain: Tensor, oracle: Tensor, factor: float, what: str) -> None:
    """Fail where ``actual`` strays from the float64 ``oracle`` more than ``factor`` times what ``plain`` does.

    A float64 ``actual`` is held against plain PyTorch's float32 result for the same values, its error scaled by the
    ratio of the two types' roundings, and doubled: in float64 the oracle itself errs as much.
    """
    assert actual.shape == plain.shape, f"{what}: {list(actual.shape)}, plain PyTorch gives {list(plain.shape)}"
    error, bound = largest_error(actual, oracle), error_bound(plain, oracle, factor)
    if actual.dtype == torch.float64:
        bound *= 2 * torch.finfo(torch.float64).eps / torch.finfo(plain.dtype).eps
    else:
        assert actual.dtype == plain.dtype, f"{what}: {actual.dtype}, plain PyTorch gives {plain.dtype}"
    assert error <= bound, f"{what}: error {error:.3g} against float64, at most {bound:.3g} allowed"
