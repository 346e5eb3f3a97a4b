"""Every Triton kernel compiles ahead of time without spilling registers; in processes without the interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("evc_fast.kernels") is None,
    reason="needs triton, and an installed evc_fast",
)

SPILLING = """
import builtins, contextlib, dataclasses, sys
from evc_fast.kernels import aot

fits = aot.Compiled("kernel", "case", 90, "fp32", 4, registers=64, shared=1024, spilled=0, matrix="")
spills = dataclasses.replace(fits, spilled=16)
too_large = dataclasses.replace(fits, shared=300 * 1024)
assert not fits.refused and aot.show([fits])
assert "spills 16 bytes" in spills.refused and not aot.show([fits, spills])
assert "does not fit" in too_large.refused and not aot.show([too_large])
aot.ProcessPoolExecutor = lambda *_: contextlib.nullcontext(builtins)  # whose map runs here
aot.measure_all = lambda *_: [fits, spills]
sys.argv = ["aot", "--arch", "90", "--dtype", "fp32"]
sys.exit(aot.main())
"""


def compiled(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def assert_nothing_spills(*arguments: str) -> None:
    done = compiled("-m", "evc_fast.kernels.aot", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in ("entropy_calibration", "factored_hidden", "emotion_attention", "routing_aggregation"):
        assert f"_{kernel}_fwd_kernel" in done.stdout
        assert f"_{kernel}_bwd_" in done.stdout


def test_a_kernel_that_spills_is_refused():
    done = compiled("-c", SPILLING)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "REFUSED: spills 16 bytes a thread" in done.stdout


@pytest.mark.slow
def test_no_kernel_spills_on_any_architecture():
    assert_nothing_spills("--dtype", "fp32", "bf16")


@pytest.mark.slow
def test_no_kernel_spills_with_many_frames_or_triplets():
    cases = ("many-frames", "many-triplets", "odd")
    done = compiled("-m", "evc_fast.kernels.aot", "--arch", "90", "--dtype", "fp32", "fp16", "--cases", *cases)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "many-triplets" in done.stdout
