"""AOTInductor packages (.pt2): the graph compiled ahead of time; torch alone runs them, and no module of ours."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InductorError, InvalidCxxCompiler

from evc_fast.export import machine
from evc_fast.export.graph import Graph
from evc_fast.export.requirements import ExportError

DEVICES = ("cpu", "cuda")


def require_compiler(device: str) -> None:
    """Raises ExportError where nothing can be compiled here for ``device``."""
    if device == "cuda":
        machine.gpu()
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ExportError("AOTInductor needs a C++ compiler, and finds none here: install GCC or Clang") from error


def export_pt2(graph: Graph, path: Path, *, device: str = "cpu") -> dict[str, Any]:
    """Compile ``graph`` for ``device`` into ``path``; what the manifest must know of the machine it runs on.

    On a CPU the compiler uses every instruction of this machine, on a GPU the kernels are for this GPU.

    Raises:
        ExportError: there is no GPU for "cuda", or the compiler failed.
    """
    made = {"device": device, **({"isa": machine.cpu_isa()} if device == "cpu" else {"gpu": machine.gpu()})}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = graph.program(device)
            torch._inductor.aoti_compile_and_package(program, package_path=os.fspath(path))
    except InductorError as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"AOTInductor cannot compile {graph.name}: {reason}") from error
    finally:
        graph.module.to("cpu")
    return made
