"""Builds evc_fast/_C.abi3.so, the CPU kernels, with a C++ compiler alone, and evc_fast/_cuda.so where nvcc is found.

One library for every torch from 2.11 on and every Python from 3.11 on: it uses torch's stable C shim only, and is
loaded by torch.ops.load_library rather than imported. csrc/*.cpp are compiled once; csrc/cpu/*.cpp once for each
instruction set that the compiler knows (the library picks one by cpuid when it is loaded). `python setup.py build_ext
--inplace` recompiles what changed. The CUDA kernels, csrc/cuda, are a library of their own: it knows no torch, brings
its CUDA runtime along, and is loaded where there is a GPU. What ptxas says of registers and spills stays beside each
object, as .log.

Environment: EVC_FAST_NO_EXTENSION=1 leaves the libraries out, CXX names another compiler, MAX_JOBS bounds the number of
files compiled at a time. EVC_FAST_CUDA=1 insists on the CUDA library, 0 leaves it out; EVC_FAST_CUDA_ARCHS="90" or
"80;90" names the architectures; CUDA_HOME holds the toolkit, and NVCC_CCBIN, which nvcc reads, its host compiler.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

COMPILE_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
]
# The oldest torch whose C shim the library may use, in the encoding of torch/headeronly/version.h: 2.11.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# From the least to the most demanding: the link below relies on this order.
X86_VARIANTS = {
    "default": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "avx512_bf16": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"],
}
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra", "-Xptxas", "-v"]
# As far as the toolkit knows them; newer GPUs translate the PTX of the newest.
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
OLDEST_CUDA_ARCH = 80  # the first whose tensor cores know bfloat16
PTXAS_REPORT = re.compile(r"ptxas info|\s+\d+ bytes stack frame")
WITHOUT_CUDA = "set EVC_FAST_CUDA=0 to build without CUDA kernels"
WITHOUT = "set EVC_FAST_NO_EXTENSION=1 to install the pure-PyTorch package"


def fail(sentence: str) -> None:
    # SystemExit rather than an exception: pip then shows the sentence and no traceback.
    raise SystemExit(f"error: {sentence}")


def switch(name: str, meaning: str) -> str:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        fail(f"{name} is {value!r}, expected 1 ({meaning}), 0 or nothing")
    return value


def extension_wanted() -> bool:
    return switch("EVC_FAST_NO_EXTENSION", "no C++ library") != "1"


def find_nvcc() -> Path | None:
    """nvcc of the toolkit in CUDA_HOME, else of the newest in /usr/local, else on PATH, where it may be a wrapper."""
    named = os.environ.get("CUDA_HOME")
    versions = sorted(Path("/usr/local").glob("cuda-*"), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
    homes = [Path(named)] if named else [Path("/usr/local/cuda"), *reversed(versions)]
    found = [home / "bin" / "nvcc" for home in homes if os.access(home / "bin" / "nvcc", os.X_OK)]
    on_path = shutil.which("nvcc")
    return found[0] if found else Path(on_path) if on_path and not named else None


def cuda_wanted() -> bool:
    value = switch("EVC_FAST_CUDA", "CUDA kernels")
    if value == "1" and find_nvcc() is None:
        sought = os.environ.get("CUDA_HOME", "/usr/local/cuda, /usr/local/cuda-* or PATH")
        fail(f"EVC_FAST_CUDA=1, and no nvcc was found in {sought}: set CUDA_HOME to a CUDA toolkit, or {WITHOUT_CUDA}")
    if value == "1" and not extension_wanted():
        fail("EVC_FAST_CUDA=1 asks for CUDA kernels and EVC_FAST_NO_EXTENSION=1 for none: set one of the two")
    return value != "0" and find_nvcc() is not None


def find_architectures(nvcc: Path) -> list[str]:
    """The compute capabilities to compile for, ascending, as "90"."""
    asked = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    known = [a for a in re.findall(r"^compute_(\d+)$", asked.stdout, flags=re.MULTILINE) if int(a) >= OLDEST_CUDA_ARCH]
    if not known:
        fail(f"{nvcc} names no architectures: install CUDA 12 or later and set CUDA_HOME, or {WITHOUT_CUDA}")
    named = re.split(r"[;,\s]+", os.environ.get("EVC_FAST_CUDA_ARCHS", "").strip())
    if named == [""]:
        return [arch for arch in CUDA_ARCHS if arch in known]
    for arch in named:
        if arch not in known:
            fail(f"EVC_FAST_CUDA_ARCHS names {arch!r}, expected one or more of {';'.join(known)}, which {nvcc} knows")
    return sorted(set(named), key=int)


def find_compiler() -> list[str]:
    if sys.platform == "win32":
        fail(f"evc_fast's C++ library is built with GCC or Clang on Linux and macOS only: {WITHOUT}")
    named = shlex.split(os.environ.get("CXX", ""))
    command = named or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not command or not shutil.which(command[0]):
        sought = f"CXX={named[0]}" if named else "c++, g++ or clang++"
        fail(f"no C++ compiler was found ({sought}): install GCC 10 or Clang 12 or later, or {WITHOUT}")
    if not compiles(command, "#include <version>\n", ["-std=c++20"]):
        fail(f"{shlex.join(command)} does not compile C++20: install GCC 10 or Clang 12 or later, or {WITHOUT}")
    return command


def compiles(compiler: list[str], source: str, flags: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text(source)
        # -Werror: clang only warns about an option that it does not use.
        command = [*compiler, *flags, "-Werror", "-c", str(probe), "-o", str(probe.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def find_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        fail(f"building evc_fast without build isolation needs torch 2.11 or later: install it first, or {WITHOUT}")
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / "include/torch/csrc/stable/library.h").is_file():
        fail(f"the torch in {folder} has no stable ABI headers: install torch 2.11 or later, or {WITHOUT}")
    return folder


def is_current(target: Path, command: list[str]) -> bool:
    """True if `target` was made by this very command and nothing that it was made from is newer."""
    stamp, depfile = target.with_suffix(".cmd"), target.with_suffix(".d")
    if not (target.exists() and stamp.exists() and stamp.read_text() == shlex.join(command)):
        return False
    # A depfile is a make rule: "target: source header \<newline> header"; a space in a name is written "\ ".
    rule = depfile.read_text().replace("\\\n", " ").partition(": ")[2].replace("\\ ", "\0")
    made = target.stat().st_mtime
    inputs = [Path(name.replace("\0", " ")) for name in rule.split()]
    return all(path.exists() and path.stat().st_mtime <= made for path in inputs)


def compile_object(compiler: list[str], source: Path, target: Path, flags: list[str]) -> bool:
    """Compiles unless `target` is current; false if the compiler, whose messages are passed on, failed."""
    files = ["-MD", "-MF", str(target.with_suffix(".d")), "-c", str(source), "-o", str(target)]
    command = [*compiler, *flags, *files]
    if is_current(target, command):
        return True
    target.parent.mkdir(parents=True, exist_ok=True)
    # One write, and the compiler's messages through a pipe: files compiled side by side do not mix theirs.
    print(f"{shlex.join(command)}\n", end="", flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    target.with_suffix(".log").write_text(done.stderr)
    sys.stderr.write("".join(line for line in done.stderr.splitlines(True) if not PTXAS_REPORT.match(line)))
    target.with_suffix(".cmd").write_text(shlex.join(command) if done.returncode == 0 else "")
    return done.returncode == 0


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def compile_objects(compiler: list[str], plan: list[tuple[Path, Path, list[str]]], remedy: str = "") -> list[Path]:
    """Compiles each (source, object, flags) that is not current, several at a time."""
    with ThreadPoolExecutor(jobs()) as pool:
        done = list(pool.map(lambda step: compile_object(compiler, *step), plan))
    if not all(done):
        advice = f", or {remedy}" if remedy else ""
        fail(f"compiling {plan[done.index(False)][0]} failed, see the compiler's message above{advice}")
    return [target for _, target, _ in plan]


class BuildExtension(build_ext):
    """Compiles csrc/ itself: setuptools' own step cannot build one source several times with different flags."""

    def get_ext_filename(self, fullname: str) -> str:
        # No Python module: it has no ABI of Python's in its name.
        if fullname.endswith("_cuda"):
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if ext.name == "evc_fast._cuda":
            self.build_cuda(target)
            return
        compiler, torch = find_compiler(), find_torch()
        objects = self.compile_all(compiler, torch)
        # No rpath: torch is in the process before this library is loaded, and its soname finds it there.
        if sys.platform == "darwin":
            link = ["-undefined", "dynamic_lookup"]
        else:
            link = [f"-L{torch / 'lib'}", "-ltorch_cpu"]
        # The linker keeps the first copy of an inline function that several objects define: objects stand in ascending
        # order of instruction set, so that the copy kept runs wherever any of its callers runs.
        command = [*compiler, "-shared", *map(str, objects), *link, "-o", str(target)]
        print(shlex.join(command), flush=True)
        if subprocess.run(command, check=False).returncode:
            fail("linking evc_fast's C++ library failed, see the linker's message above")

    def compile_all(self, compiler: list[str], torch: Path) -> list[Path]:
        variants: dict[str, list[str]] = {"default": []}
        flags = [*COMPILE_FLAGS, "-Icsrc"]
        if compiles(compiler, "#ifndef __x86_64__\n#error\n#endif\n", []):
            flags.append("-DEVC_HAVE_X86_ISA=1")
            variants = {name: isa for name, isa in X86_VARIANTS.items() if compiles(compiler, "", isa)}
            for name in X86_VARIANTS.keys() - variants.keys():
                print(f"evc_fast: no {name} kernels: {compiler[0]} does not know {shlex.join(X86_VARIANTS[name])}")
        have = [f"-DEVC_HAVE_{name.upper()}=1" for name in variants if name != "default"]
        once = [*flags, *have, TORCH_TARGET, f"-isystem{torch / 'include'}"]

        temp = Path(self.build_temp)
        plan = [(source, temp / f"{source.stem}.o", once) for source in sorted(Path("csrc").glob("*.cpp"))]
        for name, isa in variants.items():
            for source in sorted(Path("csrc/cpu").glob("*.cpp")):
                plan.append((source, temp / name / f"{source.stem}.o", [*flags, f"-DEVC_ISA={name}", *isa]))

        return compile_objects(compiler, plan)

    def build_cuda(self, target: Path) -> None:
        nvcc = find_nvcc()
        architectures = find_architectures(nvcc)
        newest = architectures[-1]
        flags = [*NVCC_FLAGS, f'-DEVC_CUDA_ARCHS="{",".join([*architectures, f"{newest}+PTX"])}"']
        flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
        flags += [f"-gencode=arch=compute_{newest},code=compute_{newest}", f"--threads={jobs()}"]
        temp = Path(self.build_temp, "cuda")
        plan = [(source, temp / f"{source.stem}.o", flags) for source in sorted(Path("csrc/cuda").glob("*.cu"))]
        objects = compile_objects([str(nvcc)], plan, WITHOUT_CUDA)
        # The runtime's symbols stay its own: torch's runtime may be another.
        link = ["-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL"]
        command = [str(nvcc), *link, *map(str, objects), "-o", str(target)]
        print(shlex.join(command), flush=True)
        if subprocess.run(command, check=False).returncode:
            fail(f"linking the CUDA kernels failed, see the linker's message above: {WITHOUT_CUDA}")


class BuildPy(build_py):
    """Starts from an empty folder: a file deleted from the tree must not reach the wheel from an older build."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "evc_fast"), ignore_errors=True)
        super().run()


# kernels/ and export/ stand at the top of the tree and are installed below evc_fast: the name `kernels` is taken.
BELOW = {f"evc_fast.{name}": name for name in ("kernels", "export")}
packages = find_packages(include=["evc_fast", "evc_fast.*"])
packages += [f"evc_fast.{name}" for top in BELOW.values() for name in find_packages(include=[top, f"{top}.*"])]

options = {}
extensions = []
with_cuda = cuda_wanted()
if extension_wanted():
    extensions = [Extension("evc_fast._C", sources=[], py_limited_api=True)]
    if with_cuda:
        extensions.append(Extension("evc_fast._cuda", sources=[], py_limited_api=True))
    options = {"bdist_wheel": {"py_limited_api": "cp311"}}

setup(
    packages=packages,
    package_dir={"evc_fast": "evc_fast", **BELOW},
    ext_modules=extensions,
    options=options,
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPy},
)
