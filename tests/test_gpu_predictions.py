"""benchmarks/gpu_predictions.py: what it counts, and the bounds that it takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # as Python does for a script there

import gpu_predictions

from evc_fast.ops._library import EXTENSION_MISSING
from evc_fast.testing.launches import Launch

pytestmark = pytest.mark.usefixtures("one_thread")


def test_predictions_count_what_runs():
    """One launch for the folded kernel, fewer for the fused composition than for plain PyTorch, at equal FLOPs."""
    if EXTENSION_MISSING:
        pytest.skip(EXTENSION_MISSING)
    plain = gpu_predictions.forward_launches(2, torch.bfloat16, folded=True, impl="reference")
    fused = gpu_predictions.products_and_ops(2)
    assert len(fused) < len(plain) / 2
    padded = 0.01  # of the aligned sections
    assert sum(each.flops for each in fused) == pytest.approx(sum(each.flops for each in plain), rel=padded)
    assert sum(each.nbytes for each in fused) < sum(each.nbytes for each in plain)
    device = gpu_predictions.Device()
    assert device.seconds(fused, torch.bfloat16) < device.seconds(plain, torch.bfloat16)
    assert device.eager_seconds(plain, torch.bfloat16) >= len(plain) * device.call_s


def test_an_operation_takes_the_longest_of_its_bounds():
    device = gpu_predictions.Device(bandwidth=10, bf16_peak=100, fp32_peak=50, kernel_s=1, call_s=3, launch_s=2)
    launches = [Launch("bytes", 40, 100), Launch("products", 0, 500), Launch("small", 1, 1)]
    assert device.seconds(launches, torch.bfloat16) == 2 + 4 + 5 + 1
    assert device.seconds(launches, torch.float32) == 2 + 4 + 10 + 1
    assert device.eager_seconds([launches[2]] * 9, torch.bfloat16) == 27
