"""evc_fast: emotional video captioning with FACE-net, measured and fast.

Importing it costs nothing: what it exports is imported on first use. `evc_fast.ops` needs torch alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evc_fast.captioner import Captioner
    from evc_fast.data.clip import ClipTowers
    from evc_fast.data.repository import CaptionRepository
    from evc_fast.model.captioner import FaceNet
    from evc_fast.model.config import FaceNetConfig
    from evc_fast.model.encoder import FaceNetEncoder
    from evc_fast.pipeline import CaptionPipeline

__version__ = "0.1.0"
__all__ = [
    "CaptionPipeline",
    "CaptionRepository",
    "Captioner",
    "ClipTowers",
    "FaceNet",
    "FaceNetConfig",
    "FaceNetEncoder",
]

_HOME = {
    "CaptionPipeline": "evc_fast.pipeline",
    "CaptionRepository": "evc_fast.data.repository",
    "Captioner": "evc_fast.captioner",
    "ClipTowers": "evc_fast.data.clip",
    "FaceNet": "evc_fast.model.captioner",
    "FaceNetConfig": "evc_fast.model.config",
    "FaceNetEncoder": "evc_fast.model.encoder",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'evc_fast' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _in_unbuilt_checkout() -> bool:
    """Whether this file is read from a source tree that nothing was built in.

    There `evc_fast.kernels` does not exist, since `kernels/` gets that name only when it is installed (editable too).
    """
    package = Path(__file__).resolve().parent
    return (
        (package.parent / "setup.py").exists()
        and not (package / "_C.abi3.so").exists()
        and importlib.util.find_spec("evc_fast.kernels") is None
    )


if _in_unbuilt_checkout():
    warnings.warn(
        f"evc_fast is imported from the unbuilt checkout {Path(__file__).resolve().parent.parent}, which hides an"
        " installed evc_fast and has no compiled kernels: run `pip install -e .` there, or start Python elsewhere or"
        " with -P",
        stacklevel=2,
    )
