"""An artefact folder from a saved encoder and an image tower: every artefact is run and compared, or none is left."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evc_fast.data.clip import ClipTowers
from evc_fast.export import aoti, machine, manifest, onnx, tensorrt
from evc_fast.export.graph import GRAPHS, Graph, encoder_graph, tower_graph
from evc_fast.export.operators import check_operators
from evc_fast.export.parity import Reference, check_parity
from evc_fast.export.requirements import ExportError, require
from evc_fast.export.runner import OnnxRunner, Pt2Runner
from evc_fast.export.signature import DTYPES, Signature
from evc_fast.model.checkpoint import WEIGHTS_NAME
from evc_fast.model.encoder import FaceNetEncoder

TARGETS = ("onnx", "pt2", "tensorrt")
TIMING_CACHE = "tensorrt.timing"
RANDOM = "random:"


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and for which machine.

    targets: of "onnx", "pt2" and "tensorrt". optional: those of them that are left out, with the reason in the
        manifest, where they cannot be made here. dtypes: of "fp32", "fp16" and "bf16"; None is fp32, and all three for
        TensorRT. graphs: of "straight" and "folded"; None is both as ONNX, and the folded one otherwise. device: of
        the .pt2, "cpu" or "cuda". opset: of ONNX. usual_batch, max_batch, max_frames: of engines; max_frames None is
        twice the encoder's num_frames. timing_cache: a file, read where it exists and brought up to date. overwrite:
        an artefact folder that is there already is replaced.
    """

    targets: tuple[str, ...] = ("onnx",)
    optional: tuple[str, ...] = ()
    dtypes: tuple[str, ...] | None = None
    graphs: tuple[str, ...] | None = None
    device: str = "cpu"
    opset: int = onnx.MIN_OPSET
    usual_batch: int = 32
    max_batch: int = 64
    max_frames: int | None = None
    timing_cache: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        choices = {"targets": TARGETS, "dtypes": tuple(DTYPES), "graphs": GRAPHS}
        for name, known in choices.items():
            unknown = [value for value in getattr(self, name) or () if value not in known]
            if unknown or getattr(self, name) == ():
                raise ExportError(f"{name} must be of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
        if self.device not in aoti.DEVICES:
            raise ExportError(f"device must be one of {', '.join(aoti.DEVICES)}, got {self.device}")
        if not 1 <= self.usual_batch <= self.max_batch:
            raise ExportError(
                f"usual_batch must be from 1 to max_batch, got {self.usual_batch} and max_batch {self.max_batch}"
            )
        if self.timing_cache is not None and not self.timing_cache.parent.is_dir():
            raise ExportError(f"timing_cache must be a file in a folder that exists, got {self.timing_cache}")
        if self.max_frames is not None and self.max_frames < 1:
            raise ExportError(f"max_frames must be at least 1, got {self.max_frames}")


def export(
    folder: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    options: ExportOptions,
    *,
    image_tower: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write the artefact folder ``out`` and return its manifest.

    Args:
        folder: what ``FaceNetEncoder.save_pretrained`` wrote; None exports an image tower alone.
        image_tower: name or local folder of transformers' CLIP, or "random:ViT-B/32" and its like.
        progress: called with a line of text for every step.

    Raises:
        ExportError: an artefact cannot be made or is not the model it was made from; then nothing is left at ``out``
            that was not there before.
    """
    if folder is None and image_tower is None:
        raise ExportError("nothing to export: name an encoder's folder, an image tower, or both")
    targets, left_out = _possible(options, progress)
    with _staged(Path(out), options.overwrite) as staging:
        run = _Export(options, targets, left_out, staging, progress)
        run.read_timing(options.timing_cache, Path(out) / TIMING_CACHE)
        if folder is not None:
            run.encoder(Path(folder))
        if image_tower is not None:
            run.tower(image_tower)
        made = run.finish()
    return made


def _possible(options: ExportOptions, progress: Callable[[str], None]) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """The targets that can be made here, and those that are left out; before anything is loaded or written."""

    def require_onnx() -> None:
        for name in ("onnx", "onnxscript", "onnxruntime"):
            require(name)

    needs: dict[str, tuple[Callable[[], Any], ...]] = {
        "onnx": (require_onnx,),
        "pt2": (lambda: aoti.require_compiler(options.device),),
        "tensorrt": (tensorrt.tensorrt, require_onnx),
    }
    targets, left_out = [], []
    for target in options.targets:
        try:
            for need in needs[target]:
                need()
        except ExportError as error:
            if target not in options.optional:
                raise
            left_out.append({"target": target, "reason": str(error)})
            progress(f"{target} is left out: {error}")
        else:
            targets.append(target)
    if not targets:
        raise ExportError(f"nothing can be exported here: {left_out[0]['reason']}")
    return tuple(targets), left_out


class _Export:
    """One run: what it collects for the manifest, and the folder that it writes into."""

    def __init__(
        self,
        options: ExportOptions,
        targets: tuple[str, ...],
        left_out: list[dict[str, str]],
        folder: Path,
        progress: Callable[[str], None],
    ) -> None:
        self.options = options
        self.targets = targets
        self.left_out = left_out
        self.folder = folder
        self.progress = progress
        self.artefacts: list[dict[str, Any]] = []
        self.files: list[str] = []
        self.models: dict[str, Any] = {}
        self.timing = b""

    def read_timing(self, *files: Path | None) -> None:
        """Start from the first of these timing caches that exists."""
        found = [file for file in files if file is not None and file.is_file()]
        if "tensorrt" in self.targets and found:
            self.timing = found[0].read_bytes()

    def encoder(self, folder: Path) -> None:
        try:
            encoder = FaceNetEncoder.from_pretrained(folder)
        except (OSError, TypeError, ValueError) as error:
            raise ExportError(str(error)) from error
        self.models["encoder"] = {
            "class": type(encoder).__name__,
            "config": encoder.config.to_dict(),
            "random_emotion_features": encoder.random_emotion_features,
            "weights_sha256": manifest.sha256(folder / WEIGHTS_NAME),
        }
        straight = encoder_graph(encoder, "straight", torch.float32)
        name = f"the straight {type(encoder).__name__} in float32 PyTorch"
        reference = Reference(straight.module, straight.signature, straight.typical, name)
        self._export(lambda graph, dtype: encoder_graph(encoder, graph, dtype), GRAPHS, reference)

    def tower(self, name: str) -> None:
        try:
            if name.startswith(RANDOM):
                towers = ClipTowers.random(name.removeprefix(RANDOM), engine="library")
            else:
                towers = ClipTowers.from_pretrained(name, engine="library")
        except (OSError, ValueError) as error:
            raise ExportError(f"the image tower {name} cannot be loaded: {' '.join(str(error).split())}") from error
        self.models["image_tower"] = {
            "class": "CLIPVisionModelWithProjection",
            "name": name if name.startswith(RANDOM) else Path(name).name,
            "config": {"image_size": towers.image_size, "image_dim": towers.image_dim},
            "random_weights": towers.random_weights,
            "fingerprint": towers.fingerprint,
            "preprocessing": repr(towers.preprocess),
        }
        graph = tower_graph(towers, torch.float32)
        reference = Reference(graph.module, graph.signature, graph.typical, "the image tower in float32 PyTorch")
        self._export(lambda _, dtype: tower_graph(towers, dtype), ("straight",), reference)

    def finish(self) -> dict[str, Any]:
        if self.timing:
            (self.folder / TIMING_CACHE).write_bytes(self.timing)
            self.files.append(TIMING_CACHE)
            if self.options.timing_cache is not None:
                cache = self.options.timing_cache
                partial = cache.with_name(f".{cache.name}.{os.getpid()}.partial")
                partial.write_bytes(self.timing)
                partial.replace(cache)
        made = {
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": manifest.versions(),
            "machine": machine.cpu_isa(),
            "models": self.models,
            "artefacts": self.artefacts,
            "files": [self._stored(name) for name in self.files],
            "left_out": self.left_out,
        }
        manifest.write(self.folder, made)
        return made

    def _export(
        self, build: Callable[[str, torch.dtype], Graph], variants: tuple[str, ...], reference: Reference
    ) -> None:
        for variant in variants:
            for dtype in DTYPES:
                targets = [target for target in self.targets if self._wanted(target, variant, dtype, len(variants) > 1)]
                if not targets:
                    continue
                graph = build(variant, DTYPES[dtype])
                stem = f"{graph.name}.{dtype}"
                if "onnx" in targets or "tensorrt" in targets:
                    self._onnx(graph, f"{stem}.onnx", reference, "tensorrt" in targets)
                if "pt2" in targets:
                    self._pt2(graph, f"{stem}.pt2", reference)
                if "tensorrt" in targets:
                    self._tensorrt(graph, f"{stem}.engine", f"{stem}.onnx", reference)

    def _wanted(self, target: str, variant: str, dtype: str, choice: bool) -> bool:
        dtypes = self.options.dtypes or (tuple(DTYPES) if target == "tensorrt" else ("fp32",))
        graphs = self.options.graphs or (GRAPHS if target == "onnx" else ("folded",))
        return dtype in dtypes and (variant in graphs or not choice)

    def _onnx(self, graph: Graph, name: str, reference: Reference, for_tensorrt: bool) -> None:
        self.progress(f"{name}: exporting")
        model = onnx.export_onnx(graph, self.folder / name, opset=self.options.opset)
        report = check_operators(model)
        if report.problems:
            text = f"{name} is not what TensorRT's parser takes: {report.problems[0]}"
            text += f", and {len(report.problems) - 1} more" if len(report.problems) > 1 else ""
            if for_tensorrt:
                raise ExportError(text)
            self.progress(f"warning: {text}")
        entry = self._entry(name, "onnx", graph) | {
            "opset": {used.domain or "ai.onnx": used.version for used in model.opset_import},
            "operators": report.operators,
            "tensorrt_operators": report.to_dict(),
        }
        rounded = graph.dtype == torch.bfloat16
        if rounded:
            wide = _in_float32(graph.signature)
            runner = OnnxRunner(entry | {"signature": wide.to_dict()}, onnx.widened(model).SerializeToString())
            runner.backend += ", bfloat16 widened to float32"
        else:
            runner = OnnxRunner(entry, self.folder / name)
        self._add(entry, check_parity(reference, runner, rounded=rounded))

    def _pt2(self, graph: Graph, name: str, reference: Reference) -> None:
        self.progress(f"{name}: compiling for {self.options.device}")
        made = aoti.export_pt2(graph, self.folder / name, device=self.options.device)
        entry = self._entry(name, "pt2", graph) | made
        self._add(entry, check_parity(reference, Pt2Runner(entry, self.folder / name)))

    def _tensorrt(self, graph: Graph, name: str, onnx_name: str, reference: Reference) -> None:
        self.progress(f"{name}: building")
        options = self.options
        batch = graph.signature.inputs[0].shape[0]
        others = {}
        if "frames" in graph.typical and batch != "frames":
            usual = graph.typical["frames"]
            largest = options.max_frames or 2 * usual
            if largest < usual:
                raise ExportError(f"max_frames must be at least the encoder's num_frames {usual}, got {largest}")
            others["frames"] = (1, usual, largest)
        ranges = tensorrt.profiles(batch, options.usual_batch, options.max_batch, others)
        report, self.timing = tensorrt.build_engine(
            self.folder / onnx_name, self.folder / name, graph.signature, ranges, self.timing
        )
        bounds = {size: (low, high) for size, (low, _, high) in ranges[-1].sizes.items()}
        signature = Signature(graph.signature.inputs, graph.signature.outputs, bounds)
        report_name = f"{name}.json"
        (self.folder / report_name).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        self.files.append(report_name)
        entry = self._entry(name, "tensorrt", graph) | {
            "signature": signature.to_dict(),
            "from": onnx_name,
            "report": report_name,
            **{key: report[key] for key in ("tensorrt", "gpu", "profiles", "seconds", "device_memory_bytes")},
        }
        self._add(entry, check_parity(reference, tensorrt.TensorRtRunner(entry, self.folder / name)))

    def _entry(self, name: str, kind: str, graph: Graph) -> dict[str, Any]:
        return self._stored(name) | {
            "kind": kind,
            "model": graph.model,
            "graph": graph.variant,
            "dtype": str(graph.dtype).removeprefix("torch."),
            "signature": graph.signature.to_dict(),
        }

    def _stored(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return {"name": name, "bytes": path.stat().st_size, "sha256": manifest.sha256(path)}

    def _add(self, entry: dict[str, Any], parity: dict[str, Any]) -> None:
        self.artefacts.append(entry | {"parity": parity})
        figures = "; ".join(
            f"{name} off by {found['max_abs']:.2g}, cosine {found['min_cosine']:.6f}"
            for name, found in parity["outputs"].items()
        )
        self.progress(f"{entry['name']}: {entry['bytes'] / 2**20:.1f} MiB; {parity['inputs']} inputs: {figures}")


def _in_float32(signature: Signature) -> Signature:
    """The signature of a widened graph."""
    values = signature.to_dict()
    for spec in (*values["inputs"], *values["outputs"]):
        spec["dtype"] = "float32" if spec["dtype"] == "bfloat16" else spec["dtype"]
    return Signature.from_dict(values)


@contextlib.contextmanager
def _staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place at the end, and goes without a trace where anything fails."""
    if out.exists():
        if not overwrite:
            raise ExportError(f"{out} exists already: name another folder, or have it replaced (--overwrite)")
        manifest.read(out)  # what is replaced must be an artefact folder
    staging = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise ExportError(f"no folder can be written beside {out}: {error}") from error
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        yield staging
        if out.exists():
            out.rename(old)
        staging.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for folder in (staging, old):
            shutil.rmtree(folder, ignore_errors=True)
