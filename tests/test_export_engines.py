"""Artefacts with a runtime of their own: AOTInductor packages, and TensorRT engines against a stand-in of its API.

The stand-in records every call, and its engines are ONNX files that ONNX Runtime computes: what is tested is our side
of the documented API, in the order and with the arguments it asks for, and not TensorRT.
"""

from __future__ import annotations

import base64
import ctypes
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evc_fast.export import ExportError, ExportOptions, artefacts, build, export, load, machine, tensorrt
from evc_fast.export.__main__ import main
from evc_fast.export.signature import Signature, TensorSpec
from evc_fast.testing.encoder_cases import ENCODER_OPTIONS, build_encoder, encoder_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

for package in ("onnx", "onnxscript"):
    pytest.importorskip(package, reason="needs the export extra")
ort = pytest.importorskip("onnxruntime", reason="needs the export extra")

GPU = {"name": "Stand-in", "capability": "9.0"}
STREAM = 4711


# TensorRT


class FakeTensorRT(SimpleNamespace):
    """The part of TensorRT 10's Python API that we use. ``calls``: (name, arguments) in order."""

    NetworkDefinitionCreationFlag = SimpleNamespace(EXPLICIT_BATCH=0, STRONGLY_TYPED=1)
    BuilderFlag = SimpleNamespace(TF32="TF32")
    ProfilingVerbosity = SimpleNamespace(DETAILED="DETAILED")
    LayerInformationFormat = SimpleNamespace(JSON="JSON")
    TensorIOMode = SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT")
    DataType = SimpleNamespace(FLOAT="FLOAT", HALF="HALF", BF16="BF16", INT64="INT64")
    __version__ = "10.15.1"

    def __init__(self) -> None:
        super().__init__(calls=[], parser_errors=[], plan_is_none=False, cache_fits=True, bad_plan=False)

        class Logger:
            WARNING = "WARNING"

            def __init__(self, severity):
                self.severity = severity

        self.Logger = Logger
        self.Builder = lambda logger: FakeBuilder(self)
        self.OnnxParser = lambda network, logger: FakeParser(self, network)
        self.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=self._deserialize)

    def record(self, name, *arguments):
        self.calls.append((name, arguments))

    def named(self, name):
        return [arguments for called, arguments in self.calls if called == name]

    def _deserialize(self, plan):
        assert isinstance(plan, bytes)
        return None if self.bad_plan else FakeEngine(self, json.loads(plan))


class FakeParser:
    def __init__(self, trt, network):
        self.trt, self.network = trt, network
        self.num_errors = len(trt.parser_errors)

    def parse_from_file(self, path):
        assert isinstance(path, str)
        self.trt.record("parse_from_file", Path(path).name)
        self.network.onnx = Path(path).read_bytes()
        return not self.trt.parser_errors

    def get_error(self, index):
        return self.trt.parser_errors[index]


class FakeBuilder:
    def __init__(self, trt):
        self.trt = trt

    def create_network(self, flags):
        self.trt.record("create_network", flags)
        return SimpleNamespace(onnx=None)

    def create_builder_config(self):
        return FakeConfig(self.trt)

    def create_optimization_profile(self):
        shapes = {}

        def set_shape(name, least, usual, largest):
            shapes[name] = (least, usual, largest)

        return SimpleNamespace(set_shape=set_shape, shapes=shapes)

    def build_serialized_network(self, network, config):
        self.trt.record("build_serialized_network", config.profiling_verbosity, len(config.profiles))
        config.cache += b"+timed"
        if self.trt.plan_is_none:
            return None
        graph = base64.b64encode(network.onnx).decode()
        return memoryview(json.dumps({"onnx": graph, "profiles": len(config.profiles)}).encode())


class FakeConfig:
    def __init__(self, trt):
        self.trt, self.profiles, self.cache, self.profiling_verbosity = trt, [], None, None

    def clear_flag(self, flag):
        self.trt.record("clear_flag", flag)

    def create_timing_cache(self, data):
        assert isinstance(data, bytes)
        return data

    def set_timing_cache(self, cache, ignore_mismatch):
        self.trt.record("set_timing_cache", cache, ignore_mismatch)
        self.cache = cache
        return self.trt.cache_fits

    def get_timing_cache(self):
        return SimpleNamespace(serialize=lambda: memoryview(self.cache))

    def add_optimization_profile(self, profile):
        self.trt.record("add_optimization_profile", profile.shapes)
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1


class FakeEngine:
    device_memory_size_v2 = 1234

    def __init__(self, trt, plan):
        self.trt, self.num_profiles = trt, plan["profiles"]
        self.session = ort.InferenceSession(base64.b64decode(plan["onnx"]), providers=["CPUExecutionProvider"])
        self.modes = {each.name: "INPUT" for each in self.session.get_inputs()}
        self.modes |= {each.name: "OUTPUT" for each in self.session.get_outputs()}
        self.types = {each.name: each.type for each in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.num_io_tensors = len(self.modes)

    def get_tensor_name(self, index):
        return list(self.modes)[index]

    def get_tensor_mode(self, name):
        return self.modes[name]

    def get_tensor_dtype(self, name):
        return {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}[self.types[name]]

    def create_engine_inspector(self):
        layers = json.dumps({"Layers": [{"Name": "one"}, {"Name": "two"}]})
        return SimpleNamespace(get_engine_information=lambda form: layers if form == "JSON" else None)

    def create_execution_context(self):
        return FakeContext(self)


class FakeContext:
    """Reads inputs and writes outputs at the addresses it was given, as TensorRT does."""

    def __init__(self, engine):
        self.engine, self.profile, self.shapes, self.addresses = engine, None, {}, {}

    def set_optimization_profile_async(self, index, stream):
        assert stream == STREAM and index < self.engine.num_profiles
        self.profile = index
        return True

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        self.engine.trt.record("execute_async_v3", self.profile, dict(self.shapes), stream)
        types = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(int64)": torch.int64}
        feeds = {}
        for name, shape in self.shapes.items():
            tensor = torch.empty(shape, dtype=types[self.engine.types[name]])
            ctypes.memmove(tensor.data_ptr(), self.addresses[name], tensor.nbytes)
            feeds[name] = tensor.numpy()
        names = [name for name, mode in self.engine.modes.items() if mode == "OUTPUT"]
        for name, result in zip(names, self.engine.session.run(names, feeds), strict=True):
            ctypes.memmove(self.addresses[name], result.ctypes.data, result.nbytes)
        return True


@pytest.fixture
def trt(monkeypatch):
    fake = FakeTensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(machine, "gpu", lambda: dict(GPU))
    monkeypatch.setattr(machine, "cuda_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(machine, "cuda_stream", lambda: STREAM)
    return fake


def save(folder: Path, option: str) -> Path:
    build_encoder(**ENCODER_OPTIONS[option]).save_pretrained(folder)
    return folder


def test_engines_of_an_encoder(trt, tmp_path):
    source = save(tmp_path / "encoder", "baseline")
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"known")
    options = ExportOptions(
        targets=("tensorrt",),
        graphs=("straight",),
        dtypes=("fp32",),
        usual_batch=4,
        max_batch=9,
        timing_cache=cache,
    )
    made = export(source, tmp_path / "out", options)

    # Strongly typed, float32 as float32, the cache read and brought up to date.
    assert trt.named("create_network") == [(2,)]
    assert trt.named("clear_flag") == [("TF32",)]
    assert trt.named("set_timing_cache") == [(b"known", False)]
    assert trt.named("parse_from_file") == [("encoder.straight.fp32.onnx",)]
    assert trt.named("build_serialized_network") == [("DETAILED", 2)]
    assert cache.read_bytes() == (tmp_path / "out/tensorrt.timing").read_bytes() == b"known+timed"
    latency, throughput = [shapes["video"] for (shapes,) in trt.named("add_optimization_profile")]
    assert latency == ((1, 1, 24), (1, 5, 24), (1, 10, 24))
    assert throughput == ((1, 1, 24), (4, 5, 24), (9, 10, 24))
    order = [name for name, _ in trt.calls if name != "execute_async_v3"][:7]
    assert order == [
        "create_network",
        "parse_from_file",
        "clear_flag",
        "set_timing_cache",
        "add_optimization_profile",
        "add_optimization_profile",
        "build_serialized_network",
    ]

    kinds = {entry["name"]: entry for entry in made["artefacts"]}
    assert list(kinds) == ["encoder.straight.fp32.onnx", "encoder.straight.fp32.engine"]
    entry = kinds["encoder.straight.fp32.engine"]
    assert entry["gpu"] == GPU and entry["tensorrt"] == "10.15.1" and entry["from"] == "encoder.straight.fp32.onnx"
    assert entry["signature"]["dimensions"] == {"batch": [1, 9], "frames": [1, 10]}
    assert entry["parity"]["inputs"] >= 200 and entry["parity"]["allowed"] == {"min_cosine": 0.999}
    assert max(entry["parity"]["sizes"]["batch"]) == 9
    report = json.loads((tmp_path / "out" / entry["report"]).read_text())
    assert report["strongly_typed"] and not report["tf32"] and report["device_memory_bytes"] == 1234
    assert report["profiles"] == [
        {"batch": [1, 1, 1], "frames": [1, 5, 10]},
        {"batch": [1, 4, 9], "frames": [1, 5, 10]},
    ]
    assert [layer["Name"] for layer in report["layers"]] == ["one", "two"]
    assert {each["name"] for each in made["files"]} == {
        "tensorrt.timing",
        *(f"{name}.json" for name in kinds if "engine" in name),
    }

    # The runner: the narrowest profile, shapes and stream at each call, outputs where the manifest says.
    encoder = build_encoder(**ENCODER_OPTIONS["baseline"]).float()
    runner = load(tmp_path / "out", "encoder.straight.fp32.engine")
    for size, profile in ((1, 0), (3, 1)):
        (video, *_) = encoder_inputs(encoder.config, size, dtype=torch.float32)
        trt.calls.clear()
        got = runner.run(video)
        assert trt.calls == [("execute_async_v3", (profile, {"video": (size, 5, 24)}, STREAM))]
        with torch.no_grad():
            want = encoder(video, impl="reference").tokens
        torch.testing.assert_close(got.tokens, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.from_numpy(runner.run(video.numpy()).tokens), got.tokens)
    with pytest.raises(ValueError, match="batch must be from 1 to 9 for this artefact, got 10"):
        runner.run(torch.zeros(10, 5, 24))


SIGNATURE = Signature(
    (TensorSpec("x", torch.float32, ("batch", 3)), TensorSpec("ids", torch.int64, ("batch", 2))),
    (TensorSpec("y", torch.float32, ("batch", 3)),),
    {"batch": (1, None)},
)


@pytest.fixture
def graph(tmp_path):
    import onnx

    x, y = (onnx.helper.make_tensor_value_info(name, 1, ["batch", 3]) for name in "xy")
    ids = onnx.helper.make_tensor_value_info("ids", 7, ["batch", 2])
    made = onnx.helper.make_graph([onnx.helper.make_node("Tanh", ["x"], ["y"])], "g", [x, ids], [y])
    path = tmp_path / "graph.onnx"
    opsets = [onnx.helper.make_opsetid("", 20)]
    onnx.save_model(onnx.helper.make_model(made, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (
            {"parser_errors": ["node 3: no", "node 4: neither"]},
            "refuses graph.onnx: node 3: no; node 4: neither",
        ),
        ({"plan_is_none": True}, "cannot build an engine from graph.onnx"),
        ({"cache_fits": False}, "refuses the timing cache"),
        ({"bad_plan": True}, "TensorRT 10.15.1 cannot load the engine just built"),
        ({"__version__": "8.6.1"}, "written for TensorRT 10, installed is 8.6.1"),
    ],
)
def test_a_failed_build_says_why(trt, graph, tmp_path, trouble, message):
    for name, value in trouble.items():
        setattr(trt, name, value)
    ranges = tensorrt.profiles("batch", 2, 4, {})
    with pytest.raises(ExportError, match=message) as caught:
        tensorrt.build_engine(graph, tmp_path / "graph.engine", SIGNATURE, ranges)
    assert "\n" not in str(caught.value)


def test_profiles_name_the_shape_of_every_input():
    latency, throughput = tensorrt.profiles("batch", 2, 4, {})
    assert latency.shapes(SIGNATURE) == {"x": ((1, 3),) * 3, "ids": ((1, 2),) * 3}
    assert throughput.shapes(SIGNATURE) == {"x": ((1, 3), (2, 3), (4, 3)), "ids": ((1, 2), (2, 2), (4, 2))}


def engine_entry(**changes):
    ranges = [{"batch": [1, 1, 1]}, {"batch": [1, 2, 4]}]
    entry = {"name": "graph.engine", "model": "encoder", "kind": "tensorrt", "signature": SIGNATURE.to_dict()}
    return entry | {"gpu": GPU, "tensorrt": "10.15.1", "profiles": ranges} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": {"name": "Old", "capability": "7.5"}}, r"built for compute capability 7.5 \(Old\), this GPU has 9.0"),
        ({"tensorrt": "10.3.0"}, "was built by TensorRT 10.3.0, installed is 10.15.1"),
        (
            {"signature": SIGNATURE.to_dict() | {"outputs": []}},
            "has the tensors {'y': 'FLOAT'}, its manifest says {}",
        ),
    ],
)
def test_an_engine_of_another_place_is_refused(trt, graph, tmp_path, changes, message):
    file = tmp_path / "graph.engine"
    tensorrt.build_engine(graph, file, SIGNATURE, tensorrt.profiles("batch", 2, 4, {}))
    assert tensorrt.TensorRtRunner(engine_entry(), file).backend == "TensorRT 10.15.1, Stand-in"
    with pytest.raises(ExportError, match=message):
        tensorrt.TensorRtRunner(engine_entry(**changes), file)


def test_tensorrt_without_a_gpu(trt, monkeypatch, tmp_path):
    def none():
        raise ExportError("this needs a GPU, and torch finds none here")

    monkeypatch.setattr(machine, "gpu", none)
    with pytest.raises(ExportError, match="needs a GPU"):
        export(tmp_path, tmp_path / "out", ExportOptions(targets=("tensorrt",)))


@pytest.mark.slow
def test_engines_in_every_type_from_one_timing_cache(trt, tmp_path, monkeypatch):
    class Skipped:
        kind, signature, name, backend = "tensorrt", None, "engine", "none"

    source = save(tmp_path / "encoder", "baseline")
    # ONNX Runtime, which the stand-in computes with, has no bfloat16 products: engines are built and not run.
    monkeypatch.setattr(build.tensorrt, "TensorRtRunner", lambda entry, file: Skipped)
    real = build.check_parity
    skipped = {"outputs": {}, "inputs": 0}
    monkeypatch.setattr(
        build,
        "check_parity",
        lambda reference, runner, **options: skipped if runner is Skipped else real(reference, runner, **options),
    )
    monkeypatch.setattr(tensorrt, "_inspect", lambda trt, logger, plan: {"device_memory_bytes": 0})
    made = export(source, tmp_path / "out", ExportOptions(targets=("tensorrt",)))
    names = [f"encoder.folded.{dtype}" for dtype in ("fp32", "fp16", "bf16")]
    assert [entry["name"] for entry in made["artefacts"]] == [
        f"{name}.{end}" for name in names for end in ("onnx", "engine")
    ]
    assert [cache for cache, _ in trt.named("set_timing_cache")] == [b"", b"+timed", b"+timed+timed"]
    types = [entry["signature"]["inputs"][0]["dtype"] for entry in made["artefacts"] if entry["kind"] == "tensorrt"]
    assert types == ["float32", "float16", "bfloat16"]
    assert all(entry["tensorrt_operators"]["supported"] for entry in made["artefacts"] if entry["kind"] == "onnx")


# AOTInductor


def test_instructions_that_are_missing_are_named():
    here = machine.cpu_isa()
    machine.check_isa(here, "x.pt2")
    with pytest.raises(ExportError, match=r"x\.pt2 was compiled for a CPU with amx_tomorrow, avx9000, which this"):
        machine.check_isa(here | {"extensions": ["avx9000", *here["extensions"], "amx_tomorrow"]}, "x.pt2")
    with pytest.raises(ExportError, match=r"x\.pt2 was compiled for vax, this machine is"):
        machine.check_isa(here | {"machine": "vax"}, "x.pt2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_cuda_package_without_a_gpu(tmp_path):
    with pytest.raises(ExportError, match="needs a GPU"):
        export(tmp_path, tmp_path / "out", ExportOptions(targets=("pt2",), device="cuda"))


LOADS_WITH_TORCH_ALONE = """
import sys, torch
package, inputs, outputs = sys.argv[1:]
model = torch._inductor.aoti_load_package(package)
with torch.no_grad():
    results = [model(*each) for each in torch.load(inputs)]
torch.save([tuple(each) for each in results], outputs)
found = sorted(name for name in sys.modules if name.partition(".")[0] in ("evc_fast", "transformers", "onnx"))
assert not found, found
"""


@pytest.mark.slow
def test_everything_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    source = save(tmp_path / "encoder", "paper")
    out = tmp_path / "out"
    assert main([str(source), "--to", "all", "--out", str(out), "--image-tower", "random:tiny"]) == 0
    printed = capsys.readouterr().out
    assert "left out: tensorrt, because tensorrt cannot be imported" in printed
    entries = {entry["name"]: entry for entry in artefacts(out)}
    assert list(entries) == [
        "encoder.straight.fp32.onnx",
        "encoder.folded.fp32.onnx",
        "encoder.folded.fp32.pt2",
        "image_tower.fp32.onnx",
        "image_tower.fp32.pt2",
    ]
    for entry in entries.values():
        assert entry["parity"]["inputs"] >= 200
        assert all(found["max_abs"] <= 1e-4 for found in entry["parity"]["outputs"].values())
    name = "encoder.folded.fp32.pt2"
    assert entries[name]["device"] == "cpu" and entries[name]["isa"] == machine.cpu_isa()

    encoder = build_encoder().float()
    given = [encoder_inputs(encoder.config, size, dtype=torch.float32, seed=size)[:3] for size in (1, 2, 9)]
    with torch.no_grad():
        want = [encoder(*each, impl="reference")[:2] for each in given]
    torch.save(given, tmp_path / "inputs.pt")
    arguments = [str(out / name), str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")]
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOADS_WITH_TORCH_ALONE, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    alone = torch.load(tmp_path / "outputs.pt")
    runner = load(out, name)
    for inputs, expected, single in zip(given, want, alone, strict=True):
        for got in (tuple(single), tuple(runner.run(*inputs))):
            torch.testing.assert_close(got, tuple(expected), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="threads must be None"):
        load(out, name, threads=1)
    with pytest.raises(ExportError, match=r"holds several artefacts, name one of them: encoder\.straight"):
        load(out)

    manifest = json.loads((out / "manifest.json").read_text())
    for entry in manifest["artefacts"]:
        if entry["name"] == name:
            entry["isa"]["extensions"].append("avx9000")
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match="was compiled for a CPU with avx9000"):
        load(out, name)
