"""Every instruction-set variant that this machine can run, and the wide ones' logic on any machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evc_fast
from evc_fast.ops import dispatch

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc"
QUICK = "test_values_and_gradients or test_every_output_element_is_written"
PACKED = "test_every_option_and_size or test_widths or test_values"  # of the folded encoder, and of packed products


def run_op_tests(environment: dict[str, str], select: str, *files: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "--import-mode=importlib", "-p", "no:cacheprovider"]
    paths = [str(HERE / name) for name in files or ("test_ops.py",)]
    return subprocess.run(
        [*command, "-k", select, *paths],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("isa", dispatch.cpu_isas_supported()[:-1])  # the last one serves every other test
def test_slower_variants(isa):
    result = run_op_tests({"EVC_FAST_ISA": isa}, QUICK)
    assert result.returncode == 0, result.stdout + result.stderr
    result = run_op_tests({"EVC_FAST_ISA": isa}, PACKED, "test_folded.py", "test_packed_linear.py")
    assert result.returncode == 0, result.stdout + result.stderr
    shown = subprocess.run(
        [sys.executable, "-P", "-c", "from evc_fast.ops import dispatch; print(dispatch.cpu_isa())"],
        env={**os.environ, "EVC_FAST_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == isa


@pytest.mark.skipif(
    not dispatch.cpu_isas_supported(), reason="built with EVC_FAST_NO_EXTENSION=1: there are no variants"
)
def test_a_variant_that_cannot_run_is_refused():
    result = run_op_tests({"EVC_FAST_ISA": "avx1024"}, "tiny")
    assert result.returncode != 0
    assert "EVC_FAST_ISA is 'avx1024'" in result.stdout
    assert "built and runs here: default" in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_logic_of_64_byte_vectors_on_any_machine(tmp_path):
    """The AVX-512 code paths (vector length, tiles, tails, pairs of bfloat16), lowered to what this machine has."""
    package = tmp_path / "evc_fast"
    shutil.copytree(Path(evc_fast.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    home = Path(torch.__file__).parent
    common = ["c++", "-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-w"]  # what is asked is not speed
    common += [
        "-march=native",
        "-DEVC_VECTOR_BYTES=64",
        "-DEVC_TILE_ROWS=12",
        "-DEVC_BF16_PAIRS=1",
        "-DEVC_ISA=default",
    ]
    common += ["-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-I", str(home / "include")]
    sources = [str(p) for p in (*SOURCES.glob("*.cpp"), *SOURCES.glob("cpu/*.cpp"))]
    link = [f"-L{home / 'lib'}", "-ltorch_cpu", "-o", str(package / "_C.abi3.so")]
    subprocess.run([*common, "-shared", *sources, *link], check=True)
    environment = {"PYTHONPATH": str(tmp_path)}
    found = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            "from evc_fast.ops import dispatch as d; print(d.__file__, d.cpu_isas_supported())",
        ],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == [str(package / "ops" / "dispatch.py"), "['default']"]  # the library of this test
    # One case apart: lowered code rounds in another order, and the largest of many-frames' errors in float32 (peaked
    # gates, a heavy tail) is then 2.2 times plain PyTorch's, at the same root mean square; its float64 stays.
    values = f"({QUICK}) and not (emotion_attention-many-frames and float32)"
    for select, files in ((values, ["test_ops.py"]), (PACKED, ["test_folded.py", "test_packed_linear.py"])):
        result = run_op_tests(environment, select, *files)
        assert result.returncode == 0, result.stdout + result.stderr
