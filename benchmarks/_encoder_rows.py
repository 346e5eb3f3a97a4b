"""The ways to compute the encoder's tokens that benchmarks/encoder.py times."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _device import Device
from _machine import missing_package
from torch import Tensor

from evc_fast.model import FoldedEncoder
from evc_fast.ops._library import EXTENSION_MISSING
from evc_fast.testing.encoder_cases import build_encoder, encoder_inputs

BASELINE = "eager"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

Inputs = list[Tensor]
Run = Callable[[Inputs], Sequence[Tensor]]


class Subject:
    """One encoder with random weights, biases, norms and gates, in the forms that the rows run.

    ``folder``: where artefacts are exported to, as rows ask for them. ``exact`` is the float64 oracle, on the CPU.
    """

    def __init__(self, sizes: dict, threads: int, folder: Path, device: Device | None = None) -> None:
        self.sizes = sizes
        self.threads = threads
        self.folder = folder
        self.device = device or Device("cpu")
        encoder = build_encoder(**sizes).float().requires_grad_(False)  # values that float32 holds
        self.exact = copy.deepcopy(encoder).double()
        self.encoder = encoder.to(self.device.name)
        self.counted: dict[tuple[str, int], int] = {}  # FLOPs by graph and batch
        self._folds: dict[torch.dtype, FoldedEncoder] = {}
        self._artefacts: dict[str, Path] = {}

    def inputs(self, batch: int) -> Inputs:
        return [x.to(self.device.name) for x in encoder_inputs(self.encoder.config, batch, dtype=F32)[:3]]

    def fold(self, dtype: torch.dtype) -> FoldedEncoder:
        """The encoder's fold in this type, made once."""
        if dtype not in self._folds:
            self._folds[dtype] = self.encoder.fold(dtype=dtype)
        return self._folds[dtype]

    @functools.cached_property
    def on_cpu(self) -> Subject:
        """The same encoder on the CPU, where every product is counted."""
        return self if self.device.kind == "cpu" else Subject(self.sizes, self.threads, self.folder)

    def artefact(self, kind: str, graph: str) -> Path:
        """The float32 export of one graph by `evc_fast.export`, parity check included."""
        from evc_fast.export import ExportOptions, export

        name = f"{kind}-{graph}"
        if name not in self._artefacts:
            source = self.folder / "encoder"
            if not source.exists():
                self.encoder.save_pretrained(source)
            options = ExportOptions(targets=(kind,), dtypes=("fp32",), graphs=(graph,))
            made = export(source, self.folder / name, options)
            suffix = {"tensorrt": ".engine"}.get(kind, f".{kind}")
            (file,) = (entry["name"] for entry in made["artefacts"] if entry["name"].endswith(suffix))
            self._artefacts[name] = self.folder / name / file
        return self._artefacts[name]


def straight(subject: Subject) -> Run:
    return lambda inputs: subject.encoder(*inputs, impl="reference")[:2]


def unfolded(subject: Subject) -> Run:
    return lambda inputs: subject.encoder(*inputs, impl="cpp")[:2]  # asked for by name, the ops run: no fold


def automatic(subject: Subject) -> Run:
    return lambda inputs: subject.encoder(*inputs)[:2]


def folded(subject: Subject, dtype: torch.dtype, impl: str | None) -> Run:
    module = subject.fold(dtype)
    return lambda inputs: module(*inputs, impl=impl)[:2]


def compiled(subject: Subject) -> Run:
    torch._dynamo.reset()
    module = torch.compile(subject.encoder, fullgraph=True, options={"freezing": True})  # weights become constants
    return lambda inputs: module(*inputs, impl="reference")[:2]


def onnxruntime_session(subject: Subject, graph: str) -> Run:
    from evc_fast.export import load

    runner = load(subject.artefact("onnx", graph), threads=subject.threads)
    return lambda inputs: [torch.from_numpy(each) for each in runner.session.run(None, runner.feeds(inputs))]


def aoti_package(subject: Subject) -> Run:
    from evc_fast.export import load

    package = load(subject.artefact("pt2", "folded")).package
    return lambda inputs: package(*inputs)


def tensorrt_engine(subject: Subject) -> Run:
    from evc_fast.export import load

    runner = load(subject.artefact("tensorrt", "folded"))
    return lambda inputs: [each.cpu() for each in runner.run(*inputs)]


def without(*packages: str) -> str:
    """Which of these packages a row needs and does not find, or ""."""
    missing = missing_package(*packages)
    if missing == "evc_fast.export":
        return "needs evc_fast.export, which an installed evc_fast has"
    return f"needs {missing}" if missing else ""


def no_compiler(device: Device) -> str:
    reason = without("evc_fast.export")
    if reason:
        return reason
    from evc_fast.export import ExportError
    from evc_fast.export.aoti import require_compiler

    try:
        require_compiler("cpu")
    except ExportError as error:
        return f"needs a C++ compiler: {error}"
    return ""


@dataclass(frozen=True)
class Row:
    """One way to compute the tokens: `prepare` builds it, `missing` says why it cannot run here.

    `replays`: the row that it captures in a CUDA graph, in the place of `prepare`.
    """

    about: str
    graph: str  # of COUNTED: whose products it executes
    prepare: Callable[[Subject], Run] | None
    missing: Callable[[Device], str] = lambda device: ""
    dtype: torch.dtype = F32
    ours: bool = False
    replays: str = ""


def ours(about: str, graph: str, prepare: Callable[[Subject], Run], dtype: torch.dtype = F32) -> Row:
    return Row(f"ours, {about}", graph, prepare, lambda device: EXTENSION_MISSING, dtype, True)


def engine(about: str, graph: str, prepare: Callable[[Subject], Run], *packages: str) -> Row:
    return Row(f"{about}, {graph} graph", graph, prepare, lambda device: without(*packages, "evc_fast.export"))


COUNTED: dict[str, Callable[[Subject], Run]] = {
    "straight": straight,
    "reordered": unfolded,
    "folded": lambda s: folded(s, F32, None),  # itself: under a counter the encoder makes no fold
}
ONNX = ("onnx", "onnxscript", "onnxruntime")
ROWS = {
    BASELINE: Row("eager PyTorch, straight", "straight", straight),
    "unfolded": ours("not folded", "reordered", unfolded),
    "torch.compile": Row("torch.compile with freezing, straight", "straight", compiled),
    "eager-folded": Row("eager PyTorch, folded", "folded", lambda s: folded(s, F32, "reference")),
    "eager-folded-bf16": Row("eager PyTorch, folded", "folded", lambda s: folded(s, BF16, "reference"), dtype=BF16),
    "ours": ours("encoder.eval(), which folds itself", "folded", automatic),
    "ours-bf16": ours("encoder.fold(dtype=bfloat16)", "folded", lambda s: folded(s, BF16, "cpp"), BF16),
    "onnx": engine("ONNX Runtime", "straight", lambda s: onnxruntime_session(s, "straight"), *ONNX),
    "onnx-folded": engine("ONNX Runtime", "folded", lambda s: onnxruntime_session(s, "folded"), *ONNX),
    "pt2": Row("AOTInductor .pt2, folded graph", "folded", aoti_package, no_compiler),
    "tensorrt": engine("TensorRT on the GPU", "folded", tensorrt_engine, "tensorrt", *ONNX),
}
