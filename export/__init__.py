"""Exporters of the encoder and of CLIP's image tower: ONNX, AOTInductor and TensorRT, installed as `evc_fast.export`.

`python -m evc_fast.export --help` writes an artefact folder; :func:`load` runs what is in one. Importing this costs
nothing, and running an artefact imports no model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evc_fast.export.build import ExportOptions, export
    from evc_fast.export.requirements import ExportError
    from evc_fast.export.runner import Runner, artefacts, load

__all__ = ["ExportError", "ExportOptions", "Runner", "artefacts", "export", "load"]

_HOME = {
    "ExportError": "evc_fast.export.requirements",
    "ExportOptions": "evc_fast.export.build",
    "Runner": "evc_fast.export.runner",
    "artefacts": "evc_fast.export.runner",
    "export": "evc_fast.export.build",
    "load": "evc_fast.export.runner",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'evc_fast.export' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
