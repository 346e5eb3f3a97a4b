"""Running what an artefact folder holds: one interface for ONNX Runtime, AOTInductor and TensorRT.

Needs the manifest, torch and the artefact's own runtime; no model is built.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evc_fast.export import machine, manifest
from evc_fast.export.requirements import ExportError, require
from evc_fast.export.signature import MODELS, Signature


class EncoderResult(NamedTuple):
    """What the encoder's artefacts return."""

    tokens: Tensor | np.ndarray
    """[B, N_q, d_out]"""
    emotion_logits: Tensor | np.ndarray | None
    """[B, W]; None without emotion augmentation."""


class TowerResult(NamedTuple):
    """What the image tower's artefacts return."""

    image_embeds: Tensor | np.ndarray
    """[F, D_v], not L2-normalised."""


_RESULTS = {"encoder": EncoderResult, "image_tower": TowerResult}


class Runner(ABC):
    """One artefact, ready to run. Made by :func:`load`.

    Attributes:
        entry: its entry in the manifest. name: its file. kind: "onnx", "pt2" or "tensorrt".
        signature: inputs and outputs with their types and shapes.
        device: where inputs are moved to, and where outputs lie. backend: what computes, in words.
    """

    kind: str
    device: torch.device = torch.device("cpu")
    backend: str

    def __init__(self, entry: dict[str, Any]) -> None:
        self.entry = entry
        self.name: str = entry["name"]
        self.signature = Signature.from_dict(entry["signature"])
        self._arguments = MODELS[entry["model"]]
        self._read = {spec.name for spec in self.signature.inputs}
        self._result = _RESULTS[entry["model"]]

    def run(self, *features: Tensor | np.ndarray | None, **named: Tensor | np.ndarray | None) -> Any:
        """Compute one batch.

        An encoder takes ``video, triplets=None, similarity=None, groups=None`` as the module does and gives an
        :class:`EncoderResult`; an image tower takes ``pixel_values`` and gives a :class:`TowerResult`. Tensors give
        tensors on :attr:`device`, NumPy arrays give arrays; the two do not mix.

        Raises:
            TypeError, ValueError: an input is missing, superfluous, of the wrong type or shape; before any computing.
        """
        given = self._bind(features, named)
        arrays = isinstance(given[0], np.ndarray)
        specs = self.signature.inputs
        tensors = [_as_tensor(spec.name, value, arrays) for spec, value in zip(specs, given, strict=True)]
        sizes = self.signature.sizes(tensors)
        outputs = self._call([tensor.detach().to(self.device).contiguous() for tensor in tensors], sizes)
        if arrays:
            outputs = [output.cpu().numpy() for output in outputs]
        return self._result(*outputs, *[None] * (len(self._result._fields) - len(outputs)))

    def _bind(self, features: Sequence[Any], named: dict[str, Any]) -> list[Any]:
        if len(features) > len(self._arguments):
            raise TypeError(f"run takes {', '.join(self._arguments)}, got {len(features)} features")
        given = dict(zip(self._arguments, features, strict=False))
        for name, value in named.items():
            if name not in self._arguments or name in given:
                raise TypeError(f"run takes each of {', '.join(self._arguments)} once, got {name}")
            given[name] = value
        for name, value in given.items():
            # As the module does: identity ids are ignored where they are not read.
            if value is not None and name not in self._read and name != "groups":
                raise ValueError(f"{name} must be None: {self.name} was exported without it")
        return [given.get(spec.name) for spec in self.signature.inputs]

    @abstractmethod
    def _call(self, tensors: list[Tensor], sizes: dict[str, int]) -> Sequence[Tensor]:
        """Checked, contiguous inputs on the device, in order -> outputs in order."""


class OnnxRunner(Runner):
    """An ONNX file in ONNX Runtime, on the CPU.

    ``session`` and ``feeds`` serve a caller that wants ONNX Runtime and nothing around it.
    """

    kind = "onnx"

    def __init__(self, entry: dict[str, Any], model: Path | bytes, threads: int | None = None) -> None:
        super().__init__(entry)
        ort = require("onnxruntime")
        if any(spec.dtype == torch.bfloat16 for spec in self.signature.inputs):
            raise ExportError(
                f"{self.name} cannot run: ONNX Runtime has no bfloat16 products on a CPU, it is there for TensorRT; "
                "run a float32 file"
            )
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors: it warns of initializers that it folds away
        if threads is not None:
            options.intra_op_num_threads = threads
        source = model if isinstance(model, bytes) else os.fspath(model)
        self.session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self.backend = f"ONNX Runtime {ort.__version__}, CPU"
        self._names = [spec.name for spec in self.signature.outputs]

    def feeds(self, tensors: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """What ``session.run`` takes."""
        return {spec.name: tensor.numpy() for spec, tensor in zip(self.signature.inputs, tensors, strict=True)}

    def _call(self, tensors: list[Tensor], sizes: dict[str, int]) -> list[Tensor]:
        return [torch.from_numpy(output) for output in self.session.run(self._names, self.feeds(tensors))]


class Pt2Runner(Runner):
    """An AOTInductor package, on the device that it was compiled for; on a CPU it uses torch's threads."""

    kind = "pt2"

    def __init__(self, entry: dict[str, Any], path: Path) -> None:
        super().__init__(entry)
        if entry["device"] == "cpu":
            machine.check_isa(entry["isa"], self.name)
        else:
            machine.check_gpu(entry["gpu"], self.name)
        self.device = torch.device(entry["device"])
        self.backend = f"AOTInductor, torch {torch.__version__}, {entry['device']}"
        self.package = torch._inductor.aoti_load_package(os.fspath(path))

    def _call(self, tensors: list[Tensor], sizes: dict[str, int]) -> Sequence[Tensor]:
        with torch.no_grad():
            return self.package(*tensors)


def artefacts(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The manifest's entries of what can be loaded from ``folder``: name, kind, model, graph, dtype, parity, ..."""
    return manifest.read(Path(folder))["artefacts"]


def load(path: str | os.PathLike[str], name: str | None = None, *, threads: int | None = None) -> Runner:
    """Load an artefact, after its file was held against the manifest's checksum.

    Args:
        path: an artefact folder, or a file in one.
        name: which of the folder's artefacts, where it holds several.
        threads: for ONNX Runtime; None leaves the choice to it. A .pt2 uses torch's (``torch.set_num_threads``).

    Raises:
        ExportError: no manifest, no such artefact, a file that was changed, or a machine that cannot run it.
        ValueError: ``threads`` for an artefact that does not take it.
    """
    folder = Path(path)
    if folder.is_file():
        if name is not None:
            raise ValueError(f"name must be None where path is a file, got {name!r}")
        folder, name = folder.parent, folder.name
    entries = {entry["name"]: entry for entry in artefacts(folder)}
    if name is None:
        if len(entries) != 1:
            raise ExportError(f"{folder} holds several artefacts, name one of them: {', '.join(entries)}")
        (name,) = entries
    if name not in entries:
        raise ExportError(f"{folder} has no artefact {name}, it has {', '.join(entries)}")
    entry = entries[name]
    file = manifest.check_file(folder, entry)
    kind = entry.get("kind")
    if threads is not None and kind != "onnx":
        raise ValueError(f"threads must be None for {name}: only ONNX Runtime takes its own number of threads")
    if kind == "onnx":
        return OnnxRunner(entry, file, threads)
    if kind == "pt2":
        return Pt2Runner(entry, file)
    if kind == "tensorrt":
        from evc_fast.export.tensorrt import TensorRtRunner

        return TensorRtRunner(entry, file)
    raise ExportError(f"{name} is of kind {kind!r}, this evc_fast runs onnx, pt2 and tensorrt")


def _as_tensor(name: str, value: Any, array: bool) -> Tensor:
    wanted = np.ndarray if array else Tensor
    if not isinstance(value, wanted):
        kind = "a NumPy array" if array else "a tensor"
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")
    if array:
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    return value
