"""Builds csrc/cuda/*.cu with a C++ compiler into a library that runs on the CPU: cuda_runtime.h beside this file.

``python tests/cuda_emulation/build.py`` prints its path. It is made once for every state of the sources, in ``build/``.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off"]
FLAGS += ["-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{HERE}", '-DEVC_CUDA_ARCHS="emulation"']


def compiler() -> list[str] | None:
    """The C++ compiler, or None on a machine without one."""
    named = shlex.split(os.environ.get("CXX", "")) or [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
    return named or None


def build(*sources: Path, flags: tuple[str, ...] = ()) -> Path:
    """The library of ``sources`` (none: the shipped ones); RuntimeError with the compiler's words if it fails."""
    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler was found")
    files = sorted(sources or (ROOT / "csrc" / "cuda").glob("*.cu"))
    read = [
        *files,
        *sorted((ROOT / "csrc").glob("*.h")),
        *sorted((ROOT / "csrc/cuda").glob("*.cuh")),
        *HERE.glob("*.h"),
    ]
    state = hashlib.sha256(repr([command, FLAGS, flags]).encode())
    for path in read:
        state.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "cuda_emulation"
    library = folder / f"{state.hexdigest()[:16]}.so"
    if library.exists():
        return library
    work = folder / f"{library.stem}.{os.getpid()}"
    work.mkdir(parents=True, exist_ok=True)
    try:
        objects = [work / f"{path.stem}.o" for path in files]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = [
                pool.submit(_run, [*command, *FLAGS, *flags, "-x", "c++", "-c", str(path), "-o", str(made)])
                for path, made in zip(files, objects, strict=True)
            ]
            for step in compiled:
                step.result()
        _run([*command, *flags, "-shared", *map(str, objects), "-o", str(work / "library.so")])
        (work / "library.so").replace(library)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")


if __name__ == "__main__":
    print(build())
