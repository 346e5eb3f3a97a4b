"""Keeps a torchvision without its C++ part from breaking the import of transformers' models and of open_clip.

A torchvision built for CUDA does not load its library beside a CPU build of torch. Its import then fails on the missing
operators, and transformers, which imports torchvision wherever it is installed, fails with it. Neither needs those
operators: declaring the two whose shapes torchvision registers at import is enough.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

_declared: torch.library.Library | None = None  # the operators live as long as this object


def make_torchvision_importable() -> None:
    """To be called before transformers or open_clip are imported; does nothing where torchvision is absent or whole."""
    global _declared
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if _declared is not None or "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declared = torch.library.Library("torchvision", "DEF")
        _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
