"""What setup.py does with a CUDA toolkit, and that nvcc compiles the shipped kernels without spilling a register."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")
REMEDY = "set EVC_FAST_CUDA=0 to build without CUDA kernels"
# Stands for a toolkit: says what it knows, and writes an object for every source.
FAKE_NVCC = """#!/bin/sh
case "$*" in
  --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_86\\ncompute_90\\n'; exit;;
esac
for word; do case "$before" in -o) target=$word;; -MF) rule=$word;; -c) source=$word;; esac; before=$word; done
case "$source" in *broken*) echo "broken.cu: error: no such thing" >&2; exit 1;; esac
echo made > "$target"
[ -n "$source" ] || exit 0
echo "$target : $source" > "$rule"
echo "ptxas info    : Used 4 registers" >&2
echo "    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads" >&2
"""

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on this machine"
)


def setup(source: Path, *command: str, check: bool = True, **changes: str) -> subprocess.CompletedProcess[str]:
    """setup.py in `source`, whose environment names no option of the build but `changes`."""
    dropped = ("PYTHONPATH", "PYTHONSAFEPATH", "CXX", "MAX_JOBS", "CUDA_HOME")
    clean = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("EVC_FAST_")}
    done = subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=source,
        env={**clean, **changes},
        capture_output=True,
        text=True,
        check=False,
    )
    if check and done.returncode:
        pytest.fail(f"setup.py {' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The tree with the shipped csrc/cuda, and C++ sources that compile at once."""
    tree = tmp_path / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.cpp")
    for name in ("csrc", "evc_fast", "export", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tree / name)
    (tree / "csrc" / "library.cpp").write_text("int nothing() { return 0; }\n")
    return tree


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(FAKE_NVCC)
    nvcc.chmod(0o755)
    return nvcc.parents[1]


def compiled(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The CUDA sources that a build compiled."""
    return sorted(re.findall(r" -c csrc/cuda/(\w+)\.cu ", done.stdout))


def test_a_toolkit_that_is_found_is_used_unless_forbidden(source: Path, toolkit: Path) -> None:
    everything = sorted(path.stem for path in (source / "csrc/cuda").glob("*.cu"))
    home = {"CUDA_HOME": str(toolkit)}
    done = setup(source, "build_ext", "--inplace", EVC_FAST_CUDA="0", **home)
    assert compiled(done) == []
    assert not (source / "evc_fast/_cuda.so").exists()
    done = setup(source, "build_ext", "--inplace", **home)
    assert compiled(done) == everything
    assert (source / "evc_fast/_cuda.so").exists() and (source / "evc_fast/_C.abi3.so").exists()
    known = [flag for flag in done.stdout.split() if flag.startswith("-gencode")]
    per_file = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 86, 90)]
    assert known == [*per_file, "-gencode=arch=compute_90,code=compute_90"] * len(everything)
    assert "80,86,90,90+PTX" in done.stdout
    assert compiled(setup(source, "build_ext", "--inplace", **home)) == []
    (source / "csrc/cuda/table.cu").touch()
    assert compiled(setup(source, "build_ext", "--inplace", **home)) == ["table"]
    done = setup(source, "build_ext", "--inplace", EVC_FAST_CUDA_ARCHS="90;80", **home)
    assert compiled(done) == everything and "80,90,90+PTX" in done.stdout and "sm_86" not in done.stdout


def test_what_ptxas_reports_stays_beside_the_object(source: Path, toolkit: Path) -> None:
    done = setup(source, "build_ext", "--inplace", CUDA_HOME=str(toolkit))
    assert "ptxas" not in done.stderr and "stack frame" not in done.stderr
    (log,) = source.glob("build/temp*/cuda/table.log")
    assert "8 bytes stack frame, 4 bytes spill stores" in log.read_text()


def test_the_wheel_holds_the_library(source: Path, toolkit: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EVC_FAST_") and k != "PYTHONPATH"}
    environment["CUDA_HOME"] = str(toolkit)
    subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp311-abi3-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"evc_fast/_C.abi3.so", "evc_fast/_cuda.so"} == {name for name in names if name.endswith(".so")}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"EVC_FAST_CUDA": "yes"}, "EVC_FAST_CUDA is 'yes', expected 1 (CUDA kernels), 0 or nothing"),
        ({"EVC_FAST_CUDA": "1", "CUDA_HOME": "/no/toolkit"}, "no nvcc was found in /no/toolkit: set CUDA_HOME"),
        ({"EVC_FAST_CUDA": "1", "EVC_FAST_NO_EXTENSION": "1"}, "EVC_FAST_NO_EXTENSION=1 for none: set one of the two"),
        ({"EVC_FAST_CUDA_ARCHS": "90;95"}, "EVC_FAST_CUDA_ARCHS names '95', expected one or more of 80;86;90"),
        ({"EVC_FAST_CUDA_ARCHS": "75"}, "EVC_FAST_CUDA_ARCHS names '75', expected one or more of 80;86;90"),
    ],
)
def test_wrong_switches_are_refused_with_one_sentence(
    source: Path, toolkit: Path, changes: dict[str, str], sentence: str
) -> None:
    done = setup(source, "build_ext", "--inplace", check=False, **{"CUDA_HOME": str(toolkit), **changes})
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and sentence in line


def test_a_toolkit_that_does_not_work_names_the_way_out(source: Path, toolkit: Path) -> None:
    (source / "csrc/cuda/broken.cu").write_text("")
    done = setup(source, "build_ext", "--inplace", check=False, CUDA_HOME=str(toolkit))
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "broken.cu: error: no such thing" in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: compiling csrc/cuda/broken.cu failed") and last.endswith(REMEDY)
    (toolkit / "bin/nvcc").write_text("#!/bin/sh\nexit 1\n")
    last = setup(source, "build_ext", "--inplace", check=False, CUDA_HOME=str(toolkit)).stderr.strip().splitlines()[-1]
    assert "names no architectures: install CUDA 12 or later" in last and last.endswith(REMEDY)


def build_for(source: Path, architectures: str) -> dict[str, list[str]]:
    """Builds the kernels; what ptxas says of each entry of each file."""
    setup(source, "build_ext", "--inplace", EVC_FAST_CUDA="1", EVC_FAST_CUDA_ARCHS=architectures)
    reports = {}
    for log in source.glob("build/temp*/cuda/*.log"):
        reports[log.stem] = log.read_text().split("Compiling entry function ")[1:]
        assert "warning" not in log.read_text()
    assert sorted(reports) == sorted(path.stem for path in (source / "csrc/cuda").glob("*.cu"))
    return reports


def check_no_spills(reports: dict[str, list[str]], architectures: int) -> None:
    for name, entries in reports.items():
        assert entries and len(entries) % architectures == 0, name
        for entry in entries:
            assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in entry, f"{name}: {entry}"


needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no CUDA toolkit on this machine")


def ops_alone(source: Path) -> Path:
    """Without the folded encoder, which takes minutes to compile, and the table that names it."""
    for path in [*source.glob("csrc/cuda/folded*.cu"), source / "csrc/cuda/table.cu"]:
        path.unlink()
    return source


@needs_nvcc
@pytest.mark.slow
def test_ops_compile_for_every_architecture_without_spills(source: Path) -> None:
    asked = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    architectures = [arch for arch in ("80", "86", "89", "90", "100", "120") if f"compute_{arch}\n" in asked]
    reports = build_for(ops_alone(source), ";".join(architectures))
    check_no_spills(reports, len(architectures))
    each = 3 * len(architectures)  # of every type
    assert len(reports["entropy_calibration"]) == len(reports["routing_aggregation"]) == each
    assert len(reports["emotion_attention"]) == 3 * each


@needs_nvcc
@pytest.mark.slow
def test_the_whole_library_compiles_for_hopper_without_spills_and_exports_its_table_alone(source: Path) -> None:
    check_no_spills(build_for(source, "90"), 1)
    library = source / "evc_fast/_cuda.so"
    assert ctypes.CDLL(str(library)).evc_fast_cuda_kernels  # it loads without torch and without a driver
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[-1] for line in listed.splitlines()] == ["evc_fast_cuda_kernels"]
