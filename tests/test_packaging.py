"""The build and what it ships: sdist, wheels with and without the C++ library, its symbols, and its failures."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import evc_fast
from evc_fast import __main__ as table
from evc_fast.ops import dispatch

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".ci", "benchmarks", "csrc", "evc_fast", "export", "kernels", "tests")
FILES = ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
LIBRARY = Path(evc_fast.__file__).parent / "_C.abi3.so"
REMEDY = "set EVC_FAST_NO_EXTENSION=1 to install the pure-PyTorch package"

COMPILERS = ("c++", "g++", "clang++")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler on this machine")
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="evc_fast was installed without its C++ library")


def copy_tree(target: Path) -> Path:
    """The sources as a fresh clone has them: nothing built, nothing cached."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc", "local", ".*_cache")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=unwanted)
    for name in FILES:
        shutil.copy2(ROOT / name, target / name)
    return target


def environment(**changes: str) -> dict[str, str]:
    dropped = ("PYTHONPATH", "PYTHONSAFEPATH", "CXX", "MAX_JOBS")
    clean = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("EVC_FAST_")}
    # The CUDA kernels are test_cuda_build.py's: they would make every build here minutes longer.
    return {**clean, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "EVC_FAST_CUDA": "0", **changes}


def run(*command: str | Path, cwd: Path, check: bool = True, **changes: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment(**changes), capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        pytest.fail(f"{' '.join(map(str, command))} failed:\n{done.stdout}\n{done.stderr}")
    return done


def build(kind: str, source: Path, target: Path, **changes: str) -> Path:
    """Builds an sdist or a wheel through the standard build interface, in this environment."""
    target.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    run(sys.executable, "-c", code, cwd=source, **changes)
    (made,) = target.iterdir()
    return made


def build_library(source: Path, check: bool = True, **changes: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source, check=check, **changes)


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def modules(source: Path) -> set[str]:
    """Every file of the package in the tree, by its name in a wheel."""
    below = {f"evc_fast/{top}/{name}" for top in ("kernels", "export") for name in tree(source / top)}
    return below | {f"evc_fast/{name}" for name in tree(source / "evc_fast")}


def wheel_modules(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.partition("/")[0].endswith(".dist-info")}


def make_environment(folder: Path) -> Path:
    """A virtual environment that sees every package of this one except evc_fast."""
    venv.create(folder, with_pip=False)
    others = folder / "others"
    others.mkdir()
    for path in [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]:
        for entry in Path(path).iterdir():
            ours = entry.name.startswith(("evc_fast", "__editable__", "__pycache__")) or entry.suffix == ".pth"
            if not ours and not (others / entry.name).exists():
                (others / entry.name).symlink_to(entry)
    scheme = {"base": str(folder), "platbase": str(folder)}
    Path(sysconfig.get_path("purelib", "venv", vars=scheme), "others.pth").write_text(f"{others}\n")
    return folder / "bin" / "python"


def install(python: Path, *what: str | Path, cwd: Path, check: bool = True, **changes: str):
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-build-isolation"]
    return run(*pip, *what, cwd=cwd, check=check, **changes)


def unoptimised_compiler(folder: Path) -> str:
    """The compiler where a test asks only that the library is built and found: two minutes less than at -O3."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)))
    script = folder / "unoptimised"
    script.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copy_tree(tmp_path / "source")


@pytest.fixture
def small_source(source: Path) -> Path:
    """The tree with a csrc of two files, which compile at once and tell how they were compiled."""
    shutil.rmtree(source / "csrc")
    (source / "csrc" / "cpu").mkdir(parents=True)
    (source / "csrc" / "common.h").write_text("#pragma once\n")
    (source / "csrc" / "library.cpp").write_text(
        '#include <torch/csrc/stable/library.h>\n#include "common.h"\n'
        'extern "C" __attribute__((visibility("default"))) const char* built() {\n'
        '  return "default"\n'
        + "".join(f'#ifdef EVC_HAVE_{x}\n" {x.lower()}"\n#endif\n' for x in ("AVX2", "AVX512", "AVX512_BF16"))
        + ";\n}\n"
    )
    (source / "csrc" / "cpu" / "sum.cpp").write_text(
        '#include "common.h"\n#define NAME_(isa) sum_##isa\n#define NAME(isa) NAME_(isa)\n'
        "float NAME(EVC_ISA)(const float* x, int n) {\n"
        "  float total = 0;\n  for (int i = 0; i < n; ++i) total += x[i];\n  return total;\n}\n"
    )
    return source


def test_sdist_holds_the_whole_tree(source: Path, tmp_path: Path) -> None:
    (source / "benchmarks/results/local").mkdir(parents=True)
    (source / "benchmarks/results/local/mine.json").write_text("{}")
    (source / "evc_fast/_C.abi3.so").write_text("of this machine")
    sdist = build("sdist", source, tmp_path / "dist")
    assert sdist.name == f"evc_fast-{evc_fast.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    shipped = {name for name in names if not name.startswith("evc_fast.egg-info/")} - {"PKG-INFO", "setup.cfg"}
    clean = copy_tree(tmp_path / "clean")
    assert shipped == tree(clean)
    assert {"csrc/ops.h", "LICENSE", "README.md", "tests/test_packaging.py", "benchmarks/efficiency.py"} <= shipped


def test_pure_wheel_works_without_the_library(source: Path, tmp_path: Path) -> None:
    # The compiler is out of reach too: a pure-PyTorch build must not ask for one.
    wheel = build("wheel", source, tmp_path / "dist", EVC_FAST_NO_EXTENSION="1", PATH=str(tmp_path))
    assert wheel.name == f"evc_fast-{evc_fast.__version__}-py3-none-any.whl"
    assert wheel_modules(wheel) == modules(copy_tree(tmp_path / "clean"))

    python = make_environment(tmp_path / "venv")
    install(python, wheel, cwd=tmp_path)
    code = """
import torch, evc_fast.kernels, evc_fast.export
from evc_fast.ops import routing_aggregation
x = torch.ones(1, 2, 3, 4, requires_grad=True)
routed, pooled, weights = routing_aggregation(x, x, torch.zeros(1, 3, 2))
routed.sum().backward()
assert torch.equal(routed, torch.ones(1, 6, 4)) and torch.equal(x.grad, torch.ones_like(x))
try:
    routing_aggregation(x, x, torch.zeros(1, 3, 2), impl="cpp")
except RuntimeError as error:
    print(error)
"""
    said = run(python, "-W", "error", "-c", code, cwd=tmp_path).stdout
    assert "cpp" in said and "EVC_FAST_NO_EXTENSION" in said
    report = json.loads(run(python, "-m", "evc_fast", "--json", cwd=tmp_path).stdout)
    assert Path(report["location"]).is_relative_to(tmp_path)
    assert report["isa"] == {"used": "none", "usable": [], "forced": None, "torch": report["isa"]["torch"]}
    for cpp, *_, reference in report["ops"].values():
        assert not cpp["available"] and "EVC_FAST_NO_EXTENSION" in cpp["why_not_the_rest"] and not cpp["serves"]
        assert reference["serves"]["cpu"] == ["float32", "bfloat16", "float16", "float64"]


def test_a_deleted_file_does_not_reach_the_next_wheel(source: Path, tmp_path: Path) -> None:
    extra = source / "evc_fast" / "deleted_later.py"
    extra.write_text("")
    first = build("wheel", source, tmp_path / "first", EVC_FAST_NO_EXTENSION="1")
    extra.unlink()
    second = build("wheel", source, tmp_path / "second", EVC_FAST_NO_EXTENSION="1")
    assert wheel_modules(first) - wheel_modules(second) == {"evc_fast/deleted_later.py"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "no C++ compiler was found (c++, g++ or clang++): install GCC 10 or Clang 12 or later, or"),
        ({"CXX": "no-such-compiler -v"}, "no C++ compiler was found (CXX=no-such-compiler): install GCC 10 or"),
        ({"CXX": sys.executable}, "does not compile C++20: install GCC 10 or Clang 12 or later, or"),
    ],
)
def test_no_compiler_fails_with_one_sentence(source: Path, tmp_path: Path, changes: dict, sentence: str) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = build_library(source, check=False, PATH=str(empty), **changes)
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and sentence in line and line.endswith(REMEDY)


@pytest.mark.parametrize("editable", [False, True])
def test_pip_shows_that_sentence_and_no_traceback(source: Path, tmp_path: Path, editable: bool) -> None:
    python = make_environment(tmp_path / "venv")
    what = ["-e", "."] if editable else ["."]
    done = install(python, *what, cwd=source, check=False, PATH=str(tmp_path))
    shown = done.stdout + done.stderr
    assert done.returncode != 0 and "no C++ compiler was found" in shown and REMEDY in shown
    assert "Traceback" not in shown


def test_wrong_switch_is_refused(source: Path) -> None:
    done = build_library(source, check=False, EVC_FAST_NO_EXTENSION="yes")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines() == [
        "error: EVC_FAST_NO_EXTENSION is 'yes', expected 1 (no C++ library), 0 or nothing"
    ]


@needs_compiler
def test_source_error_is_shown_with_its_file(small_source: Path) -> None:
    (small_source / "csrc/cpu/sum.cpp").write_text("int wrong() { return nothing; }\n")
    done = build_library(small_source, check=False)
    assert done.returncode != 0 and "nothing" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: compiling csrc/cpu/sum.cpp failed")


def compiled(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The objects that a build made anew."""
    objects = re.findall(r" -c \S+ -o (\S+)\.o$", done.stdout, flags=re.MULTILINE)
    return sorted(re.sub(r"^build/temp[^/]*/", "", name) for name in objects)


@needs_compiler
def test_build_is_incremental_and_follows_headers_and_flags(small_source: Path) -> None:
    everything = compiled(build_library(small_source))
    assert "library" in everything and "default/sum" in everything
    assert compiled(build_library(small_source)) == []
    (small_source / "csrc/cpu/sum.cpp").touch()
    assert compiled(build_library(small_source)) == [name for name in everything if name != "library"]
    (small_source / "csrc/common.h").write_text("#pragma once\n#define CHANGED 1\n")
    assert compiled(build_library(small_source)) == everything
    setup = small_source / "setup.py"
    setup.write_text(setup.read_text().replace('"-O3"', '"-O2"'))
    assert compiled(build_library(small_source)) == everything


@needs_compiler
def test_variants_follow_the_compiler(small_source: Path, tmp_path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    old = tmp_path / "old compiler"
    old.write_text(f'#!/bin/sh\ncase "$*" in *avx512bf16*) exit 1;; esac\nexec {compiler} "$@"\n')
    old.chmod(0o755)
    done = build_library(small_source, CXX=f"'{old}'")
    library = ctypes.CDLL(str(small_source / "evc_fast/_C.abi3.so"))
    library.built.restype = ctypes.c_char_p
    built = library.built().decode().split()
    assert [*sorted(f"{name}/sum" for name in built), "library"] == compiled(done)
    # Ascending in the link too: of an inline function in several objects the linker keeps the first.
    (link,) = [line for line in done.stdout.splitlines() if " -shared " in line]
    assert re.findall(r"/(?:(\w+)/sum|library)\.o\b", link) == ["", *built]
    if os.uname().machine == "x86_64":
        assert built == ["default", "avx2", "avx512"]
        assert "no avx512_bf16 kernels" in done.stdout
    else:
        assert built == ["default"]


@needs_library
@pytest.mark.skipif(not shutil.which("nm") or not shutil.which("readelf"), reason="needs binutils")
def test_library_needs_nothing_that_torch_2_11_lacks() -> None:
    """Undefined symbols are the C shim of the oldest torch supported, or versioned ones of the C and C++ run times."""
    shim = {line for line in (ROOT / "tests/abi/torch-2.11.txt").read_text().splitlines() if not line.startswith("#")}
    listed = run("nm", "-D", "--undefined-only", LIBRARY, cwd=ROOT).stdout.splitlines()
    kinds_and_names = [line.split() for line in listed]
    wanted = {name for kind, name in kinds_and_names if kind == "U" and "@" not in name}
    assert "torch_library_impl" in wanted
    assert wanted <= shim, f"not in torch 2.11's shim: {sorted(wanted - shim)}"
    dynamic = run("readelf", "-d", LIBRARY, cwd=ROOT).stdout
    assert "libtorch_cpu.so" in dynamic
    assert not re.search("RPATH|RUNPATH|libpython|libtorch_python|libc10", dynamic)


def test_import_is_lazy(tmp_path: Path) -> None:
    code = """
import sys, evc_fast
assert "torch" not in sys.modules
assert set(evc_fast.__all__) <= set(dir(evc_fast))
import evc_fast.ops
for name in ("transformers", "peft", "av", "faiss", "matplotlib", "rich", "safetensors", "evc_fast.model"):
    assert name not in sys.modules, name
import torch
assert not torch.cuda.is_initialized()
"""
    run(sys.executable, "-c", code, cwd=tmp_path)


def test_every_export_is_there() -> None:
    for name in evc_fast.__all__:
        assert getattr(evc_fast, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        evc_fast.Nonsense  # noqa: B018


def test_unbuilt_checkout_says_so_in_one_sentence(source: Path, tmp_path: Path) -> None:
    code = "import evc_fast, evc_fast.ops; print(evc_fast.__file__)"
    done = run(sys.executable, "-c", code, cwd=source)
    assert Path(done.stdout.strip()) == source / "evc_fast/__init__.py"
    assert done.stderr.count(f"imported from the unbuilt checkout {source}") == 1 and "pip install -e ." in done.stderr
    assert "Traceback" not in done.stderr
    # The table is about the installed package, wherever it is asked for.
    report = json.loads(run(sys.executable, "-m", "evc_fast", "--json", cwd=source).stdout)
    assert Path(report["location"]) == Path(evc_fast.__file__).parent


def test_table_names_what_serves_each_op(tmp_path: Path, capsys, monkeypatch) -> None:
    report = json.loads(run(sys.executable, "-P", "-m", "evc_fast", "--json", cwd=tmp_path).stdout)
    assert report["versions"]["torch"] == torch.__version__ and report["devices"]["cpu"]
    assert set(report["ops"]) == set(dispatch.SERVED)
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    for rows in report["ops"].values():
        for device in {name.partition(":")[0] for name in report["devices"]}:
            served = [dtype for row in rows for dtype in row["serves"].get(device, [])]
            assert sorted(served) == sorted(dtypes), "each type is served by exactly one implementation"
        assert all(row["why_not_the_rest"] for row in rows if row["serves"].get("cpu") != dtypes)

    monkeypatch.setattr(sys, "argv", ["evc_fast"])
    table.main()
    plain = capsys.readouterr().out
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    table.main()
    rich = capsys.readouterr().out
    for text in (plain, rich):
        assert torch.__version__ in text and "routing_aggregation" in text and "reference" in text
    assert "━" in rich and "━" not in plain


@needs_library
def test_table_shows_the_library_and_a_forced_instruction_set(tmp_path: Path) -> None:
    command = (sys.executable, "-P", "-m", "evc_fast", "--json")
    free = json.loads(run(*command, cwd=tmp_path).stdout)
    assert free["isa"]["used"] == free["isa"]["usable"][-1] and free["isa"]["usable"][0] == "default"
    for rows in free["ops"].values():
        on_cpu = {row["implementation"]: row["serves"].get("cpu", []) for row in rows}
        assert {name: dtypes for name, dtypes in on_cpu.items() if dtypes} == {
            "cpp": ["float32", "bfloat16", "float64"],
            "reference": ["float16"],
        }
        assert list(on_cpu)[-1] == "reference"
    forced = json.loads(run(*command, cwd=tmp_path, EVC_FAST_ISA="default").stdout)
    assert forced["isa"]["used"] == "default" and forced["isa"]["forced"] == "default"


USE_THE_LIBRARY = """
import evc_fast.export, evc_fast.kernels, torch
from evc_fast.ops import routing_aggregation
inputs = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.randn(2, 4, 3)
for ours, theirs in zip(routing_aggregation(*inputs, impl="cpp"), routing_aggregation(*inputs, impl="reference")):
    torch.testing.assert_close(ours, theirs)
print(evc_fast.__file__)
"""


@pytest.mark.slow
@needs_compiler
def test_wheel_from_the_sdist_works_in_another_environment(source: Path, tmp_path: Path) -> None:
    sdist = build("sdist", source, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = build("wheel", unpacked, tmp_path / "wheel", CXX=unoptimised_compiler(tmp_path))
    assert re.fullmatch(rf"evc_fast-{evc_fast.__version__}-cp311-abi3-\w+\.whl", wheel.name)
    assert wheel_modules(wheel) == modules(source) | {"evc_fast/_C.abi3.so"}
    python = make_environment(tmp_path / "venv")
    install(python, wheel, cwd=tmp_path)
    shutil.rmtree(tmp_path / "unpacked")
    said = run(python, "-W", "error", "-c", USE_THE_LIBRARY, cwd=tmp_path).stdout
    assert Path(said.strip()).is_relative_to(tmp_path / "venv")


@pytest.mark.slow
@needs_compiler
def test_editable_install_runs_from_the_checkout(source: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv")
    install(python, "-e", ".", cwd=source, CXX=unoptimised_compiler(tmp_path))
    for folder in (source, tmp_path):  # in the checkout itself, too
        said = run(python, "-W", "error", "-c", USE_THE_LIBRARY, cwd=folder).stdout
        assert Path(said.strip()) == source / "evc_fast/__init__.py"
