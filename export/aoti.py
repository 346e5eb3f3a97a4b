"""AOTInductor packages (.pt2): the graph compiled ahead of time; torch alone runs them, and no module of ours."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from evc_fast.export.graph import Graph
from evc_fast.export.manifest import cpu_isa
from evc_fast.export.requirements import ExportError
from evc_fast.export.runner import gpu

DEVICES = ("cpu", "cuda")


def require_device(device: str) -> None:
    """Raises ExportError where torch has no such ``device``."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ExportError("a .pt2 for cuda is compiled on a machine with a GPU, and torch finds none here")


def export_pt2(graph: Graph, path: Path, *, device: str = "cpu") -> dict[str, Any]:
    """Compile ``graph`` for ``device`` into ``path``; what the manifest must know of the machine it runs on.

    On a CPU the compiler uses every instruction of this machine, on a GPU the kernels are for this GPU.

    Raises:
        ExportError: there is no GPU for "cuda", or the compiler failed.
    """
    require_device(device)
    module = graph.module.to(device)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, graph.example(device), dynamic_shapes=graph.dynamic_shapes())
            torch._inductor.aoti_compile_and_package(program, package_path=os.fspath(path))
    except torch._inductor.exc.InductorError as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"AOTInductor cannot compile {graph.name}: {reason}") from error
    finally:
        module.to("cpu")
    return {"device": device} | ({"isa": cpu_isa()} if device == "cpu" else {"gpu": gpu()})
