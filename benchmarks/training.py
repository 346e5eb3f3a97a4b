"""Time a training step of the encoder, forward and backward, beside eager PyTorch and torch.compile.

"Eager straight" is the encoder as the paper prints it, batched over the K triplets, in plain PyTorch with PyTorch's own
dropout, and "tuned attention" the same with (19)-(21) written as if profiled; "ours" has the products in a cheaper
order and the fused ops. Outputs and gradients of every contender are held against float64 before it is timed (without
dropout); a wrong one is reported and not timed. All are timed in turns within one run, and the least of many turns
counts. The floor is the time of our own matrix products at the matrix peak measured in the same run. On a GPU steps in
CUDA graphs stand beside them, ours by `evc_fast.model.graph_training` too.

    python benchmarks/training.py                              # float32, B = 32 and 1, with dropout and without
    python benchmarks/training.py --device cuda --batch 32
    python benchmarks/training.py --batch 32 --no-compile --profile
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from _device import GPU_SLACK, Device, add_arguments, device_of
from _machine import describe, measure_ceilings, synchronise
from _page import publish, terminal
from _report import MISSING, Table, count, milliseconds
from _training_gpu import (
    GRAPHED,
    copy_for_graphs,
    gpu_judgements,
    gpu_notes,
    gpu_table,
    graphed,
    in_a_graph,
    split_calls,
    take_turns_on_gpu,
    without_dropout,
)
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from evc_fast.model import FaceNetConfig, FaceNetEncoder
from evc_fast.model.dropout import Dropout
from evc_fast.ops import dispatch
from evc_fast.testing.encoder_cases import ENCODER_WIDTHS
from evc_fast.testing.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, error_bound, largest_error

EAGER, COMPILED_EAGER, OURS, COMPILED_OURS = "eager straight", "torch.compile, straight", "ours", "torch.compile, ours"
TUNED = "eager straight, tuned attention"
RIVAL_SLACK = 4  # torch.compile orders sums as it likes: it is compared, not judged by our bound
TARGET_BATCH, TARGET = 32, 1.6
PHASES = ("forward", "backward", "step")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    first, *rest = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog="\n\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[32, 1], help="videos in a batch (default: 32 1)")
    parser.add_argument(
        "--dropout", nargs="+", type=float, default=[0.0, 0.1], help="of the FFN's hidden layer (default: 0.0 0.1)"
    )
    add_arguments(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="measuring time of one table, all contenders (default: 15)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes minutes)")
    parser.add_argument("--compile-dropout", nargs="+", type=float, help="torch.compile with these only (default: all)")
    parser.add_argument("--profile", action="store_true", help="also tell by operation where our step's time goes")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "local",
        help="folder of training.json and training.md (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    arguments.on = device_of(arguments, parser)
    return arguments


@dataclass
class Contender:
    """An encoder in training mode, and how it is called."""

    run: Callable
    impl: str | None
    parameters: list[Tensor]
    emotion_attention: Callable[..., Tensor] | None = None
    """In place of the op's reference, which broadcasts the dictionary over the batch and so copies it."""

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        module = sys.modules["evc_fast.ops.emotion_attention"]
        patched = contextlib.nullcontext()
        if self.emotion_attention is not None:
            patched = mock.patch.object(module, "reference", self.emotion_attention)
        with patched:
            output = self.run(*inputs, **({} if self.impl is None else {"impl": self.impl}))
        return [output.tokens, output.emotion_logits]

    def backward(self, outputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(outputs, self.parameters, gradients))

    def step(self, inputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Outputs, then the parameters' gradients."""
        outputs = self.forward(inputs)
        return [*outputs, *self.backward(outputs, gradients)]


def tuned_emotion_attention(
    query: Tensor, key: Tensor, value: Tensor, gate_query: Tensor, gate_key: Tensor, num_heads: int
) -> Tensor:
    """(19)-(21) as whoever has profiled them would write them: heads first, one product with each head's words."""
    *lead, d = query.shape
    queries = query.reshape(-1, num_heads, d // num_heads).transpose(0, 1)  # [heads, B K N, d / heads]
    keys, values = (x.unflatten(-1, (num_heads, -1)).transpose(0, 1) for x in (key, value))  # [heads, W, d / heads]
    attention = torch.softmax(queries @ keys.mT * (d // num_heads) ** -0.5, -1)
    candidates = (attention @ values).transpose(0, 1).reshape(*lead, d)
    return torch.softmax(gate_query @ gate_key.mT.unsqueeze(1), -1) @ candidates


def contenders(encoder: FaceNetEncoder, compiled: bool) -> dict[str, Contender]:
    """Everything that is timed, eager PyTorch first; copies of one encoder."""
    straight = copy.deepcopy(encoder)
    for name, layer in straight.ffn.named_children():
        if isinstance(layer, Dropout):
            straight.ffn.register_module(name, nn.Dropout(layer.p))
    runs: dict[str, Contender] = {}
    for name, model, impl in ((EAGER, straight, "reference"), (OURS, encoder, None)):
        parameters = list(model.parameters())
        runs[name] = Contender(model, impl, parameters)
        if compiled:
            module = torch.compile(model, fullgraph=True)
            runs[COMPILED_EAGER if model is straight else COMPILED_OURS] = Contender(module, impl, parameters)
    runs[TUNED] = Contender(straight, "reference", list(straight.parameters()), tuned_emotion_attention)
    return runs


def wrong(
    actual: list[Tensor], encoder: FaceNetEncoder, inputs: list[Tensor], gradients: list[Tensor], slack: float
) -> str:
    """What strays from float64 further than the project allows, or ""; of a contender's step without dropout."""

    def straight(dtype: torch.dtype) -> list[Tensor]:
        model = copy.deepcopy(encoder).to(dtype).eval()
        plain = Contender(model, "reference", list(model.parameters()))
        return plain.step([x.to(dtype) for x in inputs], [g.to(dtype) for g in gradients])

    names = ["tokens", "emotion_logits", *(name for name, _ in encoder.named_parameters())]
    for i, (name, a, p, e) in enumerate(
        zip(names, actual, straight(torch.float32), straight(torch.float64), strict=True)
    ):
        bound = slack * error_bound(a.dtype, p, e, FORWARD_FACTOR if i < 2 else GRADIENT_FACTOR)
        error = largest_error(a, e)
        if error > bound:
            return f"{name} errs by {error:.3g}, {bound:.3g} is allowed"
    return ""


def one_turn(contender: Contender, inputs: list[Tensor], gradients: list[Tensor], device: str) -> dict[str, float]:
    """Seconds of one forward that keeps what backward needs, of the backward, and of both."""
    synchronise(device)
    start = time.perf_counter()
    outputs = contender.forward(inputs)
    synchronise(device)
    middle = time.perf_counter()
    contender.backward(outputs, gradients)
    synchronise(device)
    end = time.perf_counter()
    return {"forward": middle - start, "backward": end - middle, "step": end - start}


def take_turns(runs: dict[str, Contender], inputs, gradients, device: str, seconds: float) -> tuple[dict, int]:
    """Least time of each contender and phase, all in turns for `seconds` (at least five turns); and the turns."""
    best = {name: dict.fromkeys(PHASES, float("inf")) for name in runs}
    for contender in runs.values():
        one_turn(contender, inputs, gradients, device)
    turns, begin = 0, time.perf_counter()
    while turns < 5 or time.perf_counter() - begin < seconds:
        turns += 1
        for name, contender in runs.items():
            for phase, duration in one_turn(contender, inputs, gradients, device).items():
                best[name][phase] = min(best[name][phase], duration)
    return best, turns


def step_flops(contender: Contender, inputs: list[Tensor], gradients: list[Tensor]) -> int:
    """Matrix products of a step, 2 FLOPs a multiply-add; attentions are taken apart, which the counter cannot do."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        torch.autograd.backward(contender.forward(inputs), gradients)  # the counter's hooks bar autograd.grad
    contender.run.zero_grad()
    return counter.get_total_flops()


def step_profile(contender: Contender, inputs, gradients, steps: int = 10) -> list[tuple[str, int, float]]:
    """(operation, calls a step, least seconds a step that it runs itself), longest first; a CPU's time."""
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(steps):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            contender.backward(contender.forward(inputs), gradients)
        for event in profiler.key_averages():
            seconds[event.key, event.count].append(event.self_cpu_time_total / 1e6)
    rows = [(name, calls, min(times)) for (name, calls), times in seconds.items()]
    return sorted(rows, key=lambda row: row[2], reverse=True)


def measure(batch: int, dropout: float, arguments: argparse.Namespace, peak: float) -> dict:
    """Check, then time every contender at one batch size and dropout, at the paper's sizes."""
    torch.manual_seed(0)
    device: Device = arguments.on
    widths = ENCODER_WIDTHS | {"num_frames": 4, "num_emotions": 7} if device.rehearsal else {}
    config = FaceNetConfig(**widths, dropout=dropout)
    encoder = FaceNetEncoder(config).to(device.name)
    inputs = [
        torch.randn(batch, config.num_frames, config.video_dim),
        torch.randn(batch, config.num_triplets, 3, config.text_dim),
        torch.rand(batch, config.num_triplets),
    ]
    gradients = [
        torch.randn(batch, config.num_queries, config.output_dim),
        torch.randn(batch, config.num_emotions),
    ]
    inputs, gradients = ([x.to(device.name) for x in group] for group in (inputs, gradients))
    torch._dynamo.reset()
    record = {"batch": batch, "dropout": dropout, "failed": {}, "flops": {}}
    sound: dict[str, Contender] = {}
    compiled = not arguments.no_compile and dropout in (arguments.compile_dropout or arguments.dropout)
    for name, contender in contenders(encoder, compiled).items():
        contender.run.train(dropout == 0)
        slack = RIVAL_SLACK if name in (COMPILED_EAGER, COMPILED_OURS) else GPU_SLACK if device.gpu else 1
        fault = wrong(contender.step(inputs, gradients), encoder, inputs, gradients, slack)
        contender.run.train()
        if fault:
            record["failed"][name] = fault
            continue
        sound[name] = contender
        if name in (EAGER, OURS):
            record["flops"][name] = step_flops(contender, inputs, gradients)
    if device.gpu:
        record |= times_on_gpu(record, sound, encoder, inputs, gradients, arguments)
    else:
        record["seconds"], record["turns"] = take_turns(sound, inputs, gradients, device.name, arguments.seconds)
    if OURS in sound:
        record["floor_s"] = record["flops"][OURS] / peak
        if arguments.profile:
            record["profile"] = step_profile(sound[OURS], inputs, gradients)
    return record


def times_on_gpu(
    record: dict, sound: dict[str, Contender], encoder: FaceNetEncoder, inputs, gradients, arguments: argparse.Namespace
) -> dict:
    """Check the steps in CUDA graphs, then time all contenders; what that adds to the record."""
    device: Device = arguments.on
    skipped: dict[str, str] = {}
    split, whole = dict(sound), {}

    def attempt(name: str, module: nn.Module, capture: Callable[[], Callable[[], list[Tensor]]]) -> None:
        """Hold the step that `capture` gives against float64, without dropout; then capture it as it is timed."""
        try:
            with without_dropout(module):
                fault = wrong(capture()(), encoder, inputs, gradients, GPU_SLACK)
            if fault:
                record["failed"][name] = fault
            else:
                whole[name] = capture()
        except RuntimeError as error:  # what a capture refuses, PyTorch raises as one
            skipped[name] = f"it cannot be captured: {str(error).splitlines()[0]}"

    for name in (EAGER, OURS):
        if name in sound:
            step = functools.partial(sound[name].step, inputs, gradients)
            attempt(in_a_graph(name), sound[name].run, functools.partial(device.captured, step))
    if OURS in sound:
        model = copy_for_graphs(encoder)

        def by_graph_training() -> Callable[[], list[Tensor]]:
            split[GRAPHED] = Contender(graphed(model, inputs, device), None, list(model.parameters()))
            return functools.partial(split[GRAPHED].step, inputs, gradients)

        attempt(GRAPHED, model, by_graph_training)
        if whole.pop(GRAPHED, None) is None:
            split.pop(GRAPHED, None)
    steps = {name: functools.partial(each.step, inputs, gradients) for name, each in split.items()} | whole
    passes = {name: split_calls(each, inputs, gradients) for name, each in split.items()}
    added = {
        "skipped": skipped,
        "launches": {name: device.launches(step) for name, step in steps.items()},
        "peak_bytes": {name: device.peak_bytes(step) for name, step in steps.items()},
    }
    found, added["turns"] = take_turns_on_gpu(device, passes, whole, arguments.seconds)
    return added | {"seconds": found["least"], "median_s": found["median"]}


def table(record: dict) -> Table:
    """One row a contender, and the floor."""
    floor, eager = record.get("floor_s"), record["seconds"].get(EAGER)
    rows = []
    for name, seconds in record["seconds"].items():
        flops = record["flops"].get(name)
        rows.append(
            [
                name,
                *(milliseconds(seconds[phase]) for phase in PHASES),
                f"{eager['step'] / seconds['step']:.2f}" if eager else MISSING,
                f"{seconds['step'] / floor:.2f}" if floor else MISSING,
                count(flops) if flops else MISSING,
            ]
        )
    if floor:
        ratio = f"{eager['step'] / floor:.2f}" if eager else MISSING
        rows.append(["floor", MISSING, MISSING, milliseconds(floor), ratio, "1.00", MISSING])
    columns = ["encoder", "forward, ms", "backward, ms", "step, ms", "eager / this", "this / floor", "FLOPs"]
    notes = [f"{name} was not timed: {why}" for name, why in record["failed"].items()]
    if eager and OURS in record["seconds"] and record["batch"] == TARGET_BATCH:
        ratio = eager["step"] / record["seconds"][OURS]["step"]
        notes.append(
            f"C3, B = {TARGET_BATCH}, dropout {record['dropout']:g}: target >= {TARGET}x {EAGER}; measured "
            f"{ratio:.2f}x, " + ("reached." if ratio >= TARGET else "missed.")
        )
    title = f"B = {record['batch']}, dropout {record['dropout']:g}, float32"
    return Table(f"{title}, {record['turns']} turns", columns, rows, notes)


def profile_table(record: dict, rows: int = 20) -> Table:
    """Where our step's time goes."""
    kept = [[name, str(calls), milliseconds(seconds)] for name, calls, seconds in record["profile"][:rows]]
    title = f"Our step by operation, B = {record['batch']}, dropout {record['dropout']:g}"
    notes = ["Least of ten profiled steps, each operation's own time; the profiler's cost is in the small ones."]
    return Table(title, ["operation", "calls", "ms"], kept, notes)


def notes(machine: dict) -> list[str]:
    peak = machine["ceilings"]["matrix_flops_per_s"]["float32"]
    return [
        "The paper's sizes (N=16, K=4, d=300, W=179, N_q=32, d_out=2048). Loss: fixed random gradients of tokens and "
        "emotion logits. Gradients of all parameters, none of the features. Minimum of all turns, contenders in turns; "
        "outputs and gradients of each were checked against float64 first.",
        f"Floor: our own matrix products at the float32 matrix peak measured in this run, {peak / 1e9:,.0f} GFLOP/s.",
    ]


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device = arguments.on
    torch.set_num_threads(arguments.threads)
    console = terminal(150 if device.gpu else 120)
    machine = describe(device.name, arguments.threads) | {"kernels_isa": dispatch.cpu_isa()}
    machine["ceilings"] = measure_ceilings(device.name, [torch.float32], quick=device.rehearsal)
    peak = machine["ceilings"]["matrix_flops_per_s"]["float32"]
    todo = [(batch, dropout) for batch in arguments.batch for dropout in arguments.dropout]
    records: list[dict] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("training", total=len(todo))
        for batch, dropout in todo:
            progress.update(task, description=f"B={batch}, dropout {dropout:g}")
            records.append(measure(batch, dropout, arguments, peak))
            progress.advance(task)
            publish_records(None, records, machine, arguments)
    publish_records(console, records, machine, arguments)
    return 1 if any(record["failed"] for record in records) else 0


def publish_records(console: Console | None, records: list[dict], machine: dict, arguments: argparse.Namespace) -> None:
    """Publish what has been measured; without a console it is only written."""
    device = arguments.on
    shown = [gpu_table(record, EAGER) if device.gpu else table(record) for record in records]
    shown += [profile_table(record) for record in records if "profile" in record]
    report = {"machine": machine, "records": records}
    said, reached = notes(machine), []
    if device.gpu:
        said += gpu_notes(device)
        reached = gpu_judgements(records, EAGER, (OURS, GRAPHED), COMPILED_EAGER)
        report["targets"] = reached
    title = device.title("A training step of the encoder, measured")
    publish(console, arguments.out, "training", title, report, shown, said, reached)


if __name__ == "__main__":
    sys.exit(main())
