"""Time CLIP's image tower on a CPU: every engine beside transformers' own, its floor, and the preprocessing.

Every engine's features are held against transformers' in float32 before it is timed; one whose cosine is below 0.999 is
reported and not timed. All are timed in turns within one run, and the least of many turns counts. The floor is the
least that this machine allows: the engine's matrix products at the highest rate that any product reached in this run.

    python benchmarks/image_tower.py                                    # ViT-B/32, 16 frames
    python benchmarks/image_tower.py --shape ViT-L/14 --engines transformers onednn own onnxruntime
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _clip import moving_frames
from _machine import best_seconds, describe, dtype_name, measure_ceilings, missing_package
from _page import publish, terminal
from _report import MISSING, Table, milliseconds
from torch import Tensor, nn
from torch.nn import functional as F

from evc_fast.data.clip import ClipTowers
from evc_fast.data.image_tower import ImageTower, Product, fastest_dtype, product_obstacle
from evc_fast.data.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from evc_fast.ops import dispatch

SHAPES = ("ViT-B/32", "ViT-L/14")
TARGET = 1.8  # times transformers in float32
COSINE = 0.999  # of every frame, against transformers in float32
BASELINE = "transformers"
HEIGHT, WIDTH = 360, 640  # of the frames that are preprocessed

F32, BF16 = torch.float32, torch.bfloat16

Run = Callable[[], Tensor]


@dataclass
class Inputs:
    """One set of frames in the forms that engines take."""

    clip: nn.Module  # transformers' CLIPModel in float32
    levels: Tensor  # uint8 [n, 3, S, S], channels last in memory
    pixel_values: Tensor  # float32 [n, 3, S, S]
    threads: int
    folder: Path

    @functools.cached_property
    def onnx(self) -> Path:
        """The straight tower as an ONNX file for these frames."""
        path = self.folder / "image_tower.onnx"
        torch.onnx.export(
            _Straight(self.clip).eval(), (self.pixel_values,), path, dynamo=True, opset_version=20, verbose=False
        )
        return path


@dataclass
class Engine:
    """What computes the features: `prepare` builds it and gives what is timed, `missing` says why it cannot run."""

    about: str
    dtype: torch.dtype
    reduced: bool  # computes the last layer for the class token alone
    prepare: Callable[[Inputs], Run]
    missing: Callable[[], str] = lambda: ""


class _Straight(nn.Module):
    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.vision, self.projection = clip.vision_model, clip.visual_projection

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(self.vision(pixel_values=pixel_values).pooler_output)


def transformers_as_it_is(inputs: Inputs, dtype: torch.dtype) -> Run:
    module = _Straight(inputs.clip)
    if dtype != torch.float32:
        module = copy.deepcopy(module).to(dtype)
    pixel_values = inputs.pixel_values.to(dtype)
    return lambda: module(pixel_values)


def own_tower(inputs: Inputs, dtype: torch.dtype, product: str) -> Run:
    tower = ImageTower(inputs.clip, mean=CLIP_MEAN, std=CLIP_STD, dtype=dtype, product=product)
    return lambda: tower.encode_levels(inputs.levels)


def compiled(inputs: Inputs) -> Run:
    torch._dynamo.reset()
    module = torch.compile(_Straight(inputs.clip))
    with torch._inductor.config.patch(freezing=True):  # weights become constants, packed for oneDNN or MKL
        module(inputs.pixel_values)
    return lambda: module(inputs.pixel_values)


def onnxruntime_session(inputs: Inputs) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = inputs.threads
    session = onnxruntime.InferenceSession(inputs.onnx, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: inputs.pixel_values.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino_request(inputs: Inputs) -> Run:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    options |= {"INFERENCE_NUM_THREADS": inputs.threads}
    model = openvino.Core().compile_model(inputs.onnx, "CPU", options)
    request, pixel_values = model.create_infer_request(), inputs.pixel_values.numpy()
    return lambda: torch.from_numpy(request.infer([pixel_values])[model.output(0)].copy())


def no_bfloat16() -> str:
    return "" if fastest_dtype() == torch.bfloat16 else "needs bfloat16 instructions (AVX512-BF16 or AMX)"


def no_packages(*names: str) -> str:
    package = missing_package(*names)
    return f"needs {package}" if package else ""


def own_engine(about: str, dtype: torch.dtype, product: str) -> Engine:
    def missing() -> str:
        return product_obstacle(product, dtype) or (no_bfloat16() if dtype == BF16 else "")

    return Engine(f"ours, {about}", dtype, True, functools.partial(own_tower, dtype=dtype, product=product), missing)


ENGINES = {
    BASELINE: Engine("transformers as it stands", F32, False, lambda i: transformers_as_it_is(i, F32)),
    "torch": own_engine("torch's products", F32, "torch"),
    "onednn": own_engine("oneDNN, weights packed", F32, "onednn"),
    "own": own_engine("evc_fast.ops.packed_linear", F32, "own"),
    "torch.compile": Engine("transformers, compiled with freezing", F32, False, compiled),
    "onnxruntime": Engine(
        "ONNX Runtime, straight graph", F32, False, onnxruntime_session, lambda: no_packages("onnx", "onnxruntime")
    ),
    "openvino": Engine(
        "OpenVINO, straight graph", F32, False, openvino_request, lambda: no_packages("onnx", "openvino")
    ),
    "transformers-bf16": Engine("transformers", BF16, False, lambda i: transformers_as_it_is(i, BF16), no_bfloat16),
    "onednn-bf16": own_engine("oneDNN, weights packed", BF16, "onednn"),
    "own-bf16": own_engine("evc_fast.ops.packed_linear", BF16, "own"),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n")[1])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["ViT-B/32"])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES), help="default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=120.0, help="measuring time of one shape (default: 120)")
    parser.add_argument("--turns", type=int, default=3, help="turns at least, whatever --seconds is (default: 3)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "local")
    return parser.parse_args(argv)


def make_inputs(shape: str, frames: int, threads: int, folder: Path) -> Inputs:
    """A tower with random weights, biases and norms, and frames of a moving scene."""
    clip = ClipTowers.random(shape, dtype=torch.float32, engine="library").model.clip
    torch.manual_seed(0)
    for name, weight in clip.vision_model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            weight.add_(torch.randn_like(weight) * 0.1)
    size = clip.config.vision_config.image_size
    scene = torch.stack([torch.from_numpy(frame) for frame in moving_frames(frames, size, size)])
    levels = scene.permute(0, 3, 1, 2)
    return Inputs(clip, levels, Preprocessing(size, size)(scene), threads, folder)


def tower_flops(config: Any, frames: int) -> dict[str, int]:
    """Matrix products, 2 FLOPs a multiply-add: of the straight tower and of the one with a shorter last layer."""
    d, hidden, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    patches = (config.image_size // config.patch_size) ** 2
    tokens = patches + 1
    row = 2 * (4 * d * d + 2 * d * hidden)  # all products of one layer with its weights, for one token
    layer = tokens * row + 4 * tokens * tokens * d
    last = row + 4 * config.num_attention_heads * tokens * d  # the class token; scores and means in the full width
    rest = 2 * patches * 3 * config.patch_size**2 * d + 2 * d * config.projection_dim
    return {"straight": frames * (rest + layers * layer), "reduced": frames * (rest + (layers - 1) * layer + last)}


def product_rates(config: Any, rows: int, engines: list[str]) -> dict[str, float]:
    """FLOP/s of each kind of product on the largest matrix of a layer, as "kind dtype"."""
    d, hidden = config.hidden_size, config.intermediate_size
    rates = {}
    for name in engines:
        engine = ENGINES[name]
        if not engine.reduced:
            continue
        kind = name.removesuffix("-bf16")
        rate = 0.0
        for inner, outer in ((d, hidden), (hidden, d)):
            product = Product(torch.randn(outer, inner), torch.randn(outer), engine.dtype, kind)
            data = torch.randn(rows, inner).to(torch.float32 if kind == "own" else engine.dtype)
            seconds = best_seconds(functools.partial(product, data), "cpu", budget=1.0)
            rate = max(rate, 2 * rows * inner * outer / seconds)
        rates[f"{kind} {dtype_name(engine.dtype)}"] = rate
    return rates


def take_turns(runs: dict[str, Run], seconds: float, least: int) -> tuple[dict[str, float], int]:
    """Least time of each engine, all in turns; the check before was the warm-up."""
    best = dict.fromkeys(runs, float("inf"))
    turns, begin = 0, time.perf_counter()
    while turns < least or time.perf_counter() - begin < seconds:
        turns += 1
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best, turns


def measure(shape: str, arguments: argparse.Namespace, say: Callable[[str], None]) -> dict:
    """Build and check every engine of one shape, then time all of them."""
    with tempfile.TemporaryDirectory() as folder:
        say(f"{shape}: weights")
        inputs = make_inputs(shape, arguments.frames, arguments.threads, Path(folder))
        config = inputs.clip.config.vision_config
        expected = ENGINES[BASELINE].prepare(inputs)()
        runs: dict[str, Run] = {}
        rows: dict[str, dict] = {}
        failed: dict[str, str] = {}
        skipped: dict[str, str] = {}
        for name in dict.fromkeys((BASELINE, *arguments.engines)):
            reason = ENGINES[name].missing()
            if reason:
                skipped[name] = reason
                continue
            say(f"{shape}: {name}")
            start = time.perf_counter()
            run = ENGINES[name].prepare(inputs)
            built = time.perf_counter() - start
            cosine = F.cosine_similarity(run().double(), expected.double(), dim=-1).min().item()
            if not cosine >= COSINE:  # nor NaN
                failed[name] = f"cosine {cosine:.6f} is below {COSINE}"
                continue
            runs[name], rows[name] = run, {"cosine": cosine, "build_s": built}
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        say(f"{shape}: products")
        rates = product_rates(config, max(1, 1024 // tokens) * tokens, list(runs))
        say(f"{shape}: {len(runs)} engines in turns")
        best, turns = take_turns(runs, arguments.seconds, arguments.turns)
        for name, seconds in best.items():
            rows[name]["seconds"] = seconds
        del runs
        gc.collect()
        return {
            "shape": shape,
            "frames": arguments.frames,
            "turns": turns,
            "flops": tower_flops(config, arguments.frames),
            "product_flops_per_s": rates,
            "engines": rows,
            "failed": failed,
            "skipped": skipped,
            "preprocessing_s": preprocessing(arguments.frames, config.image_size),
        }


def preprocessing(count: int, size: int) -> dict[str, float | str]:
    """Seconds from decoded frames to what a tower takes; the reason for a way that cannot run here."""
    frames = torch.stack([torch.from_numpy(frame) for frame in moving_frames(count, HEIGHT, WIDTH)])
    ours = Preprocessing(size, size)
    seconds: dict[str, float | str] = {
        "to levels, for our tower": best_seconds(lambda: ours.levels(frames), "cpu"),
        "to pixel values, for the others": best_seconds(lambda: ours(frames), "cpu"),
    }
    name = "transformers' image processor (Pillow)"
    if missing_package("PIL"):
        return seconds | {name: "needs PIL"}
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor, pictures = CLIPImageProcessorPil(), list(frames.numpy())
    return seconds | {name: best_seconds(lambda: processor(pictures, return_tensors="pt"), "cpu")}


def peak_of(record: dict, ceilings: dict, dtype: str) -> tuple[float, str]:
    """The highest rate that a product of this type reached in this run, and whose."""
    library = ceilings["matrix_flops_per_s_library"].get(dtype, 0.0)
    rates = {"torch's square products": library}
    rates |= {kind: rate for kind, rate in record["product_flops_per_s"].items() if kind.endswith(dtype)}
    best = max(rates, key=rates.get)
    return rates[best], best


def table(record: dict, ceilings: dict) -> Table:
    """Engines of one shape, fastest first below the baseline."""
    baseline = record["engines"][BASELINE]["seconds"]
    order = sorted(record["engines"], key=lambda name: (name != BASELINE, record["engines"][name]["seconds"]))
    rows = []
    for name in order:
        row, engine = record["engines"][name], ENGINES[name]
        flops = record["flops"]["reduced" if engine.reduced else "straight"]
        floor = flops / peak_of(record, ceilings, dtype_name(engine.dtype))[0]
        rows.append(
            [
                f"{name}: {engine.about}",
                dtype_name(engine.dtype),
                milliseconds(row["seconds"]),
                f"{baseline / row['seconds']:.2f}",
                f"{flops / 1e9:,.1f}",
                f"{flops / row['seconds'] / 1e9:,.0f}",
                milliseconds(floor),
                f"{row['seconds'] / floor:.2f}",
                f"{1 - row['cosine']:.1e}",
                f"{row['build_s']:.1f}",
            ]
        )
    columns = ["engine", "type", "ms", f"{BASELINE} / engine", "GFLOP", "GFLOP/s", "floor, ms", "engine / floor"]
    columns += ["1 - cosine", "build, s"]
    said = [f"{name}: not measured: {reason}" for name, reason in record["skipped"].items()]
    said += [f"{name}: not timed: {reason}" for name, reason in record["failed"].items()]
    rates = ", ".join(f"{kind} {rate / 1e9:,.0f}" for kind, rate in record["product_flops_per_s"].items())
    said.append(f"Products on one layer's largest matrices, GFLOP/s: {rates or MISSING}.")
    ours = [name for name in order if name.startswith("own")]
    if ours:  # the fastest of ours comes first
        ratio = baseline / record["engines"][ours[0]]["seconds"]
        over = float(rows[order.index(ours[0])][7])
        verdict = "reached" if ratio >= TARGET else "missed at this machine's limit" if over <= 1.1 else "missed"
        said.append(
            f"C5: target >= {TARGET:g}x {BASELINE} (with bfloat16 instructions), or within 10 % of the machine's "
            f"limit; measured {ratio:.2f}x by {ours[0]}, {over:.2f} times the floor: {verdict}."
        )
    for dtype in dict.fromkeys(dtype_name(ENGINES[name].dtype) for name in order):
        peak, whose = peak_of(record, ceilings, dtype)
        said.append(f"Floor in {dtype}: {peak / 1e9:,.0f} GFLOP/s, the rate of {whose}.")
    straight, reduced = record["flops"]["straight"], record["flops"]["reduced"]
    said.append(f"The last layer for the class token alone leaves {reduced / straight:.1%} of the straight tower.")
    said.append(f"{record['turns']} turns; each engine's least time.")
    for name, value in record["preprocessing_s"].items():
        result = f"not measured: {value}" if isinstance(value, str) else f"{milliseconds(value)} ms"
        said.append(f"Preprocessing of {record['frames']} frames of {WIDTH} x {HEIGHT} {name}: {result}.")
    return Table(f"{record['shape']}, {record['frames']} frames", columns, rows, said)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    console = terminal(160)
    machine = describe("cpu", arguments.threads) | {"kernels_isa": dispatch.cpu_isa()}
    for package in ("onnxruntime", "openvino"):
        if not missing_package(package):
            machine["versions"][package] = importlib.metadata.version(package)
    dtypes = list({ENGINES[name].dtype for name in arguments.engines if not ENGINES[name].missing()} | {torch.float32})
    with console.status("ceilings") as status:
        machine["ceilings"] = ceilings = measure_ceilings("cpu", dtypes)
        records = [measure(shape, arguments, status.update) for shape in arguments.shape]
    shown = [table(record, ceilings) for record in records]
    said = ["Random weights, biases and norms; time does not depend on them."]
    report = {"machine": machine, "records": records}
    publish(console, arguments.out, "image_tower", "The image tower, measured", report, shown, said)
    return 1 if any(record["failed"] for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
