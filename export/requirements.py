"""The one error that an export or a load ends with, and the packages that only they need."""

from __future__ import annotations

import importlib
from types import ModuleType

_EXTRA = "pip install 'evc-fast[export]'"
_REMEDIES = {
    "onnx": _EXTRA,
    "onnxscript": _EXTRA,
    "onnxruntime": _EXTRA,
    "tensorrt": "install TensorRT 10 for Python from NVIDIA's package index",
}


class ExportError(RuntimeError):
    """What stopped an export, or the loading of an artefact, in one sentence."""


def require(name: str) -> ModuleType:
    """Import ``name``. Raises ExportError, which says what installs it, where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f"{name} cannot be imported ({error}): {_REMEDIES[name]}") from error
