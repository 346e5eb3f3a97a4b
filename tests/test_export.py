"""`evc_fast.export` to ONNX: the folder and its manifest, parity, the runner, and what is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evc_fast.data.clip import ClipTowers
from evc_fast.export import ExportError, ExportOptions, artefacts, build, export, load, parity
from evc_fast.export.__main__ import main
from evc_fast.export.graph import GRAPHS, encoder_graph
from evc_fast.export.parity import Reference
from evc_fast.testing.encoder_cases import ENCODER_OPTIONS, build_encoder, encoder_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
pytest.importorskip("onnxruntime", reason="needs the export extra")

STRAIGHT = ExportOptions(graphs=("straight",))
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def save(folder: Path, **options) -> Path:
    build_encoder(**options).save_pretrained(folder)
    return folder


def features(encoder, size: int = 2, frames: int | None = None) -> dict[str, torch.Tensor]:
    """Float32 inputs by name."""
    video, *rest = encoder_inputs(encoder.config, size, dtype=torch.float32, seed=size)
    if frames is not None:
        video = video.repeat(1, frames, 1)[:, :frames] * torch.linspace(0.5, 1.5, frames)[:, None]
    named = zip(("video", "triplets", "similarity", "groups"), (video, *rest), strict=True)
    return {name: value for name, value in named if value is not None}


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """The paper's encoder at small widths, its folder, and its straight ONNX export made by the command line."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("paper")
    source = save(root / "encoder")
    assert main([str(source), "--to", "onnx", "--graph", "straight"]) == 0
    return build_encoder().float(), source, root / "encoder-export"


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# The folder and its manifest


def test_manifest(paper):
    encoder, source, folder = paper
    assert listing(folder) == {"manifest.json", "encoder.straight.fp32.onnx"}
    assert listing(folder.parent) == {"encoder", "encoder-export"}  # no staging folder is left
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["models"]["encoder"]["class"] == "FaceNetEncoder"
    assert manifest["models"]["encoder"]["config"] == encoder.config.to_dict()
    assert {"evc_fast", "python", "torch", "onnx", "onnxruntime"} <= set(manifest["versions"])
    assert manifest["machine"]["machine"] and isinstance(manifest["machine"]["extensions"], list)
    assert manifest["left_out"] == []
    (entry,) = manifest["artefacts"]
    data = (folder / entry["name"]).read_bytes()
    assert entry["sha256"] == hashlib.sha256(data).hexdigest() and entry["bytes"] == len(data)
    assert entry["opset"] == {"ai.onnx": 20}
    assert entry["tensorrt_operators"] == {"parser": "TensorRT 10.15", "supported": True, "problems": []}
    shapes = {each["name"]: each["shape"] for side in ("inputs", "outputs") for each in entry["signature"][side]}
    assert shapes == {
        "video": ["batch", "frames", 24],
        "triplets": ["batch", 3, 3, 20],
        "similarity": ["batch", 3],
        "tokens": ["batch", 6, 18],
        "emotion_logits": ["batch", 7],
    }
    found = entry["parity"]
    assert found["inputs"] >= 200 and {1, 2, 17} <= set(found["sizes"]["batch"])
    assert {1, 5, 10} <= set(found["sizes"]["frames"])
    assert all(0 <= each["max_abs"] <= 1e-4 for each in found["outputs"].values())
    assert str(source.parent) not in (folder / "manifest.json").read_text()
    assert str(source.parent).encode() not in data


def test_parity_inputs_are_varied(paper):
    encoder, _, _ = paper
    graph = encoder_graph(encoder, "straight", torch.float32)
    reference = Reference(graph.module, graph.signature, graph.typical, "the encoder")
    cases = list(reference.cases(graph.signature))
    similarity = torch.cat([inputs[2].flatten() for _, inputs, _ in cases])
    assert similarity.min() < -0.3 and similarity.max() > 0.9
    spread = sorted(inputs[0].std().item() for sizes, inputs, _ in cases if sizes["batch"] > 1)
    assert spread[-1] > 10 * spread[0]
    assert len({inputs[0].sum().item() for _, inputs, _ in cases}) == len(cases)


def test_a_wrong_graph_is_refused_and_nothing_is_left(paper, tmp_path, monkeypatch, capsys):
    _, source, folder = paper

    def perturbed(graph, path, **options):
        model = onnx.load(folder / "encoder.straight.fp32.onnx")
        (bias,) = [each for each in model.graph.initializer if each.name.endswith("output_projection.bias")]
        values = onnx.numpy_helper.to_array(bias).copy()
        values[3] += 1e-3
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        onnx.save_model(model, path)
        return model

    monkeypatch.setattr(build.onnx, "export_onnx", perturbed)
    out = tmp_path / "out"
    assert main([str(source), "--to", "onnx", "--graph", "straight", "--out", str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: encoder.straight.fp32.onnx is not the straight FaceNetEncoder") and "tokens" in line
    assert listing(tmp_path) == set()


def test_nan_is_no_parity(paper):
    encoder, _, folder = paper
    runner = load(folder)
    graph = encoder_graph(encoder, "straight", torch.float32)
    module = torch.nn.Module()
    module.forward = lambda *inputs: tuple(x * float("nan") for x in graph.module(*inputs))
    with pytest.raises(ExportError, match="is not the encoder"):
        parity.check_parity(Reference(module, graph.signature, graph.typical, "the encoder"), runner)


def test_overwrite(paper, tmp_path, monkeypatch):
    _, source, _ = paper
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"exists already"):
        export(source, out, STRAIGHT)
    with pytest.raises(ExportError, match=r"has no manifest\.json"):
        export(source, out, ExportOptions(graphs=("straight",), overwrite=True))
    assert listing(tmp_path) == {"out"} and listing(out) == {"precious.txt"}
    (out / "manifest.json").write_text(json.dumps({"format": "evc_fast.export", "format_version": 1, "artefacts": []}))
    monkeypatch.setattr(build._Export, "encoder", lambda self, folder: None)
    export(source, out, ExportOptions(graphs=("straight",), overwrite=True))
    assert listing(tmp_path) == {"out"} and listing(out) == {"manifest.json"}


# Running


@pytest.mark.parametrize(("size", "frames"), [(1, 5), (2, 1), (7, 5), (3, 12)])
def test_runner_is_the_encoder(paper, size, frames):
    encoder, _, folder = paper
    runner = load(folder, threads=1)
    given = features(encoder, size, frames)
    with torch.no_grad():
        want = encoder(**given, impl="reference")
    got = runner.run(*given.values())
    torch.testing.assert_close(got.tokens, want.tokens, **TOLERANCE)
    torch.testing.assert_close(got.emotion_logits, want.emotion_logits, **TOLERANCE)
    arrays = runner.run(**{name: value.numpy() for name, value in given.items()})
    assert isinstance(arrays.tokens, type(given["video"].numpy()))
    torch.testing.assert_close(torch.from_numpy(arrays.tokens), got.tokens, rtol=0, atol=0)


def test_runner_takes_what_a_module_takes(paper):
    encoder, _, folder = paper
    runner = load(folder)
    given = features(encoder)
    plain = runner.run(**given)
    strided = given["video"].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    for again in (runner.run(**given, groups=None), runner.run(**(given | {"video": strided}))):
        torch.testing.assert_close(again.tokens, plain.tokens, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"video": None}, TypeError, r"video must be a tensor, got NoneType"),
        ({"video": torch.zeros(2, 5, 24, dtype=torch.float64)}, TypeError, r"video must be .* float32, got float64"),
        ({"video": torch.zeros(2, 5, 23)}, ValueError, r"video must be \[batch, frames, 24\] float32, got shape"),
        ({"video": torch.zeros(2, 0, 24)}, ValueError, r"frames must be at least 1"),
        (
            {"triplets": torch.zeros(3, 3, 3, 20)},
            ValueError,
            r"triplets must be .* with batch = 2, got shape \[3, 3, 3",
        ),
        ({"similarity": torch.zeros(2, 3).numpy()}, TypeError, r"similarity must be a tensor, got ndarray"),
        ({"video": torch.zeros(2, 24)}, ValueError, r"video must be"),
        (
            {"speed": torch.zeros(2)},
            TypeError,
            r"run takes each of video, triplets, similarity, groups once, got speed",
        ),
    ],
)
def test_runner_refuses(paper, change, error, message):
    encoder, _, folder = paper
    with pytest.raises(error, match=message) as caught:
        load(folder).run(**(features(encoder) | change))
    assert "\n" not in str(caught.value)


def test_a_process_that_runs_an_artefact_builds_no_model(paper):
    _, _, folder = paper
    code = f"""
import sys, numpy
from evc_fast.export import artefacts, load
(entry,) = artefacts({str(folder)!r})
out = load({str(folder)!r}, entry["name"]).run(
    numpy.ones((1, 4, 24), "float32"), numpy.ones((1, 3, 3, 20), "float32"), numpy.ones((1, 3), "float32"))
assert out.tokens.shape == (1, 6, 18) and numpy.isfinite(out.tokens).all()
assert not {{"transformers", "evc_fast.model", "evc_fast.ops"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_load_refuses(paper, tmp_path):
    _, _, folder = paper
    name = "encoder.straight.fp32.onnx"
    with pytest.raises(ExportError, match="there is no folder"):
        load(tmp_path / "nowhere")
    changed = copied(folder, tmp_path / "changed")
    data = bytearray((changed / name).read_bytes())
    data[len(data) // 2] ^= 1
    (changed / name).write_bytes(data)
    with pytest.raises(ExportError, match="SHA-256 differs"):
        load(changed / name)
    (changed / name).unlink()
    with pytest.raises(ExportError, match=f"has no {name}, which its manifest"):
        load(changed)
    with pytest.raises(ExportError, match=f"has no artefact x.onnx, it has {name}"):
        load(folder, "x.onnx")
    with pytest.raises(ValueError, match="name must be None where path is a file"):
        load(folder / name, name)
    (changed / "manifest.json").unlink()
    with pytest.raises(ExportError, match=r"has no manifest\.json"):
        load(changed)
    for text, message in (("{", "is not JSON"), ("[]", "is not a manifest"), ('{"format": "x"}', "is not a manifest")):
        (changed / "manifest.json").write_text(text)
        with pytest.raises(ExportError, match=message):
            load(changed)
    (changed / "manifest.json").write_text('{"format": "evc_fast.export", "format_version": 9}')
    with pytest.raises(ExportError, match="format_version 9"):
        load(changed)


# Options, types and the image tower


def check_option(option: str, folder: Path, graphs: tuple[str, ...], dtypes: tuple[str, ...]) -> None:
    options = ENCODER_OPTIONS[option]
    encoder = build_encoder(**options).float()
    made = export(save(folder / "encoder", **options), folder / "out", ExportOptions(graphs=graphs, dtypes=dtypes))
    assert len(made["artefacts"]) == len(graphs) * len(dtypes)
    for entry in made["artefacts"]:
        assert entry["tensorrt_operators"]["supported"], entry["tensorrt_operators"]["problems"]
        assert entry["parity"]["inputs"] >= 200
        if entry["dtype"] != "float32":
            continue
        given = features(encoder, 4)
        with torch.no_grad():
            want = encoder(**given, impl="reference")
        got = load(folder / "out" / entry["name"]).run(**given)
        torch.testing.assert_close(got.tokens, want.tokens, **TOLERANCE)
        assert (got.emotion_logits is None) == (want.emotion_logits is None)
        if entry["graph"] == "folded":
            with pytest.raises(ValueError, match=r"video must be \[batch, 5, "):
                load(folder / "out" / entry["name"]).run(**features(encoder, 4, frames=6))


def test_folded(tmp_path):
    check_option("merge_identical_triplets", tmp_path, ("folded",), ("fp32",))


@pytest.mark.slow
@pytest.mark.parametrize("option", ENCODER_OPTIONS)
def test_every_option(option, tmp_path):
    check_option(option, tmp_path, GRAPHS, ("fp32",))


@pytest.mark.slow
def test_types_of_sixteen_bits(tmp_path):
    check_option("merge_identical_triplets", tmp_path, GRAPHS, ("fp16", "bf16"))
    with pytest.raises(ExportError, match="ONNX Runtime has no bfloat16 products"):
        load(tmp_path / "out", "encoder.straight.bf16.onnx")
    runner = load(tmp_path / "out", "encoder.folded.fp16.onnx")
    encoder = build_encoder(merge_identical_triplets=True).half()
    given = {
        name: value.half() if name in ("video", "triplets") else value for name, value in features(encoder).items()
    }
    assert runner.run(**given).tokens.dtype == torch.float16


def test_image_tower(tmp_path):
    towers = ClipTowers.random("tiny", seed=3, engine="library")
    towers.model.clip.save_pretrained(tmp_path / "clip")
    made = export(None, tmp_path / "out", ExportOptions(), image_tower=str(tmp_path / "clip"))
    assert made["models"]["image_tower"]["name"] == "clip" and "encoder" not in made["models"]
    assert made["models"]["image_tower"]["fingerprint"] == towers.fingerprint
    (entry,) = made["artefacts"]
    assert entry["name"] == "image_tower.fp32.onnx" and entry["tensorrt_operators"]["supported"]
    pixel_values = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    got = load(tmp_path / "out").run(pixel_values=pixel_values)
    torch.testing.assert_close(got.image_embeds, towers.encode_pixels(pixel_values), **TOLERANCE)


# What is refused before anything is exported


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere", "--to", "onnx"], "no folder {tmp}/nowhere"),
        (["{tmp}", "--to", "onnx", "--out", "{tmp}/out"], "has no config.json"),
        (["--to", "onnx"], "nothing to export"),
        (["--to", "onnx", "--image-tower", "random:huge", "--out", "{tmp}/out"], "shape must be one of"),
        (["--to", "onnx", "--image-tower", "{tmp}/clip", "--out", "{tmp}/out"], "there is no CLIP folder"),
        (["{paper}", "--to", "tensorrt", "--out", "{tmp}/out"], "tensorrt cannot be imported"),
        (["{paper}", "--to", "onnx", "--opset", "17", "--out", "{tmp}/out"], "the opset must be from 20 to"),
        (["{paper}", "--to", "onnx", "--batch", "65", "--out", "{tmp}/out"], "usual_batch must be from 1 to max_batch"),
    ],
)
def test_command_line_refuses(paper, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    where = {"tmp": str(tmp_path), "paper": str(paper[1])}
    assert main([argument.format(**where) for argument in arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message.format(**where) in line
    assert listing(tmp_path) == set()


@pytest.mark.parametrize("arguments", [["x", "--to", "onnx", "--dtype", "fp8"], ["x"], ["x", "--to", "mnn"]])
def test_command_line_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: python -m evc_fast.export" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for option in ("--to", "--out", "--dtype", "--graph", "--image-tower", "--device", "--timing-cache", "--overwrite"):
        assert option in text


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_its_remedy(package, paper, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"{package} cannot be imported .*: pip install 'evc-fast\[export\]'"):
        export(paper[1], tmp_path / "out", STRAIGHT)
    assert listing(tmp_path) == set()


def test_what_cannot_be_made_here_is_left_out_and_said(paper, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(build._Export, "encoder", lambda self, folder: None)
    lines = []
    options = ExportOptions(targets=("onnx", "tensorrt"), optional=("tensorrt",), graphs=("straight",))
    made = export(paper[1], tmp_path / "out", options, progress=lines.append)
    (left_out,) = made["left_out"]
    assert left_out["target"] == "tensorrt" and "tensorrt cannot be imported" in left_out["reason"]
    assert any(line.startswith("tensorrt is left out: ") for line in lines)
    assert json.loads((tmp_path / "out/manifest.json").read_text())["left_out"] == [left_out]
    assert artefacts(tmp_path / "out") == []
    with pytest.raises(ExportError, match="nothing can be exported here"):
        export(paper[1], tmp_path / "none", ExportOptions(targets=("tensorrt",), optional=("tensorrt",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("onnx", "mnn")}, "targets must be of onnx, pt2, tensorrt, got mnn"),
        ({"dtypes": ("fp64",)}, "dtypes must be of fp32, fp16, bf16, got fp64"),
        ({"graphs": ()}, "graphs must be of straight, folded, got none"),
        ({"device": "tpu"}, "device must be one of cpu, cuda, got tpu"),
        ({"timing_cache": Path("nowhere/timing.cache")}, "timing_cache must be a file in a folder that exists"),
        ({"max_frames": 0}, "max_frames must be at least 1, got 0"),
    ],
)
def test_options_refuse(options, message):
    with pytest.raises(ExportError, match=message):
        ExportOptions(**options)
