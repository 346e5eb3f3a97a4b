"""TensorRT engines from our ONNX files, and what runs them. The one place that imports `tensorrt`.

Written against the documented Python API of TensorRT 10. Networks are strongly typed: every layer computes in the type
that the ONNX graph gives it, so the graph of a bf16 engine comes from a module in bfloat16.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from evc_fast.export import machine
from evc_fast.export.requirements import ExportError, require
from evc_fast.export.runner import Runner
from evc_fast.export.signature import Signature, dtype_name

MAJOR = 10


@dataclass(frozen=True)
class Ranges:
    """Least, usual and largest value of each size that varies, for which one optimisation profile is tuned."""

    sizes: Mapping[str, tuple[int, int, int]]

    def shapes(self, signature: Signature) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Input name to its least, usual and largest shape."""
        picks = [{name: bounds[which] for name, bounds in self.sizes.items()} for which in range(3)]
        return {spec.name: tuple(signature.shape(spec, pick) for pick in picks) for spec in signature.inputs}


def profiles(batch: str, usual: int, largest: int, others: Mapping[str, tuple[int, int, int]]) -> list[Ranges]:
    """One profile for batches of 1, and one, tuned for the ``usual`` size, up to the ``largest``.

    ``batch``: name of the size that grows with the batch; ``others``: the sizes that vary besides, alike in both.
    """
    return [Ranges({batch: (1, 1, 1), **others}), Ranges({batch: (1, usual, largest), **others})]


def tensorrt() -> ModuleType:
    """Import TensorRT. Raises ExportError where it is missing, of another major version, or without a GPU."""
    trt = require("tensorrt")
    if int(trt.__version__.partition(".")[0]) != MAJOR:
        raise ExportError(f"evc_fast.export is written for TensorRT {MAJOR}, installed is {trt.__version__}")
    machine.gpu()
    return trt


def build_engine(
    onnx_file: Path, engine_file: Path, signature: Signature, ranges: Sequence[Ranges], timing_cache: bytes = b""
) -> tuple[dict[str, Any], bytes]:
    """Build a strongly typed engine with an optimisation profile for each of ``ranges``.

    Returns:
        The build report (versions, profiles, seconds, memory, layers), and the timing cache with what was timed here.

    Raises:
        ExportError: the parser refuses the graph, or the build fails; the message is TensorRT's first.
    """
    trt = tensorrt()
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_file)):
        errors = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise ExportError(f"TensorRT's parser refuses {onnx_file.name}: {'; '.join(errors) or 'no reason given'}")

    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the report lists every layer
    cache = config.create_timing_cache(timing_cache)
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        raise ExportError("TensorRT refuses the timing cache: it is of another version or GPU, delete it")
    for each in ranges:
        profile = builder.create_optimization_profile()
        for name, (least, usual, largest) in each.shapes(signature).items():
            profile.set_shape(name, least, usual, largest)
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(f"TensorRT refuses the optimisation profile {dict(each.sizes)} of {onnx_file.name}")

    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"TensorRT cannot build an engine from {onnx_file.name}: its log says why")
    seconds = time.perf_counter() - start
    engine_file.write_bytes(plan)
    report = {
        "tensorrt": trt.__version__,
        "gpu": machine.gpu(),
        "strongly_typed": True,
        "tf32": False,
        "profiles": [{name: list(bounds) for name, bounds in each.sizes.items()} for each in ranges],
        "seconds": round(seconds, 3),
        **_inspect(trt, logger, plan),
    }
    return report, bytes(config.get_timing_cache().serialize())


def _inspect(trt: ModuleType, logger: Any, plan: Any) -> dict[str, Any]:
    """Memory, tensors and layers of a serialised engine."""
    engine = _deserialize(trt, logger, bytes(plan), "the engine just built")
    layers = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return {
        "device_memory_bytes": engine.device_memory_size_v2,
        "tensors": {name: str(engine.get_tensor_dtype(name)) for name in _tensor_names(engine)},
        "layers": json.loads(layers)["Layers"],
    }


def _deserialize(trt: ModuleType, logger: Any, plan: bytes, what: str) -> Any:
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ExportError(f"TensorRT {trt.__version__} cannot load {what}: export it again here")
    return engine


def _tensor_names(engine: Any) -> list[str]:
    return [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]


class TensorRtRunner(Runner):
    """An engine on the current GPU: outputs are tensors there, ready on the current stream.

    A batch runs in the profile with the narrowest range that holds it.
    """

    kind = "tensorrt"

    def __init__(self, entry: dict[str, Any], path: Path) -> None:
        super().__init__(entry)
        trt = tensorrt()
        machine.check_gpu(entry["gpu"], self.name)
        if entry["tensorrt"] != trt.__version__:
            raise ExportError(
                f"{self.name} was built by TensorRT {entry['tensorrt']}, installed is {trt.__version__}: build it again"
            )
        self.device = machine.cuda_device()
        self.backend = f"TensorRT {trt.__version__}, {entry['gpu']['name']}"
        self._engine = _deserialize(trt, trt.Logger(trt.Logger.WARNING), path.read_bytes(), self.name)
        self._check_tensors(trt)
        # A context each: changing one's profile waits for the device.
        self._contexts = []
        for index in range(len(entry["profiles"])):
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(index, machine.cuda_stream()):
                raise ExportError(f"TensorRT cannot make an execution context for profile {index} of {self.name}")
            self._contexts.append(context)

    def _check_tensors(self, trt: ModuleType) -> None:
        modes = {name: self._engine.get_tensor_mode(name) for name in _tensor_names(self._engine)}
        sides = (self.signature.inputs, trt.TensorIOMode.INPUT), (self.signature.outputs, trt.TensorIOMode.OUTPUT)
        for specs, mode in sides:
            found = {name: self._engine.get_tensor_dtype(name) for name in modes if modes[name] == mode}
            wanted = {spec.name: _trt_dtype(trt, spec.dtype) for spec in specs}
            if found != wanted:
                raise ExportError(f"the engine {self.name} has the tensors {found}, its manifest says {wanted}")

    def _profile(self, sizes: Mapping[str, int]) -> int:
        def width(index: int) -> int:
            return sum(high - low for low, _, high in self.entry["profiles"][index].values())

        fitting = [
            index
            for index, bounds in enumerate(self.entry["profiles"])
            if all(low <= sizes[name] <= high for name, (low, _, high) in bounds.items())
        ]
        if not fitting:
            raise ValueError(f"no optimisation profile of {self.name} holds {dict(sizes)}")
        return min(fitting, key=width)

    def _call(self, tensors: list[Tensor], sizes: dict[str, int]) -> list[Tensor]:
        context = self._contexts[self._profile(sizes)]
        for spec, tensor in zip(self.signature.inputs, tensors, strict=True):
            _succeed(context.set_input_shape(spec.name, tuple(tensor.shape)), f"the shape of {spec.name}")
            _succeed(context.set_tensor_address(spec.name, tensor.data_ptr()), f"the address of {spec.name}")
        outputs = []
        for spec in self.signature.outputs:
            output = torch.empty(self.signature.shape(spec, sizes), dtype=spec.dtype, device=self.device)
            _succeed(context.set_tensor_address(spec.name, output.data_ptr()), f"the address of {spec.name}")
            outputs.append(output)
        # Inputs and outputs belong to this stream, so the allocator does not hand them out before the engine is done.
        _succeed(context.execute_async_v3(machine.cuda_stream()), "the call")
        return outputs


def _succeed(done: bool, what: str) -> None:
    if not done:
        raise RuntimeError(f"TensorRT refuses {what}: its log says why")


def _trt_dtype(trt: ModuleType, dtype: torch.dtype) -> Any:
    names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}
    return getattr(trt.DataType, names[dtype_name(dtype)])
