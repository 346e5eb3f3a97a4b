"""Time a training step of the encoder, forward and backward, beside eager PyTorch and torch.compile.

"Eager straight" is the encoder as the paper prints it, batched over the K triplets, in plain PyTorch with PyTorch's own
dropout, and "tuned attention" the same with (19)-(21) written as if profiled; "ours" has the products in a cheaper
order and the fused ops. Outputs and gradients of every contender are held against float64 before it is timed (without
dropout); a wrong one is reported and not timed. All are timed in turns within one run, and the least of many turns
counts. The floor is the time of our own matrix products at the matrix peak measured in the same run.

    python benchmarks/training.py                              # float32, B = 32 and 1, with dropout and without
    python benchmarks/training.py --batch 32 --no-compile --profile
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from _machine import describe, measure_ceilings, synchronise
from _page import publish, terminal
from _report import MISSING, Table, count, milliseconds
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from evc_fast.model import FaceNetConfig, FaceNetEncoder
from evc_fast.model.dropout import Dropout
from evc_fast.ops import dispatch
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
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="measuring time of one table, all contenders (default: 15)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes minutes)")
    parser.add_argument("--profile", action="store_true", help="also tell by operation where our step's time goes")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "local",
        help="folder of training.json and training.md (default: %(default)s)",
    )
    return parser.parse_args(argv)


@dataclass
class Contender:
    """An encoder in training mode, and how it is called."""

    run: nn.Module
    impl: str | None
    parameters: list[Tensor]
    emotion_attention: Callable[..., Tensor] | None = None
    """In place of the op's reference, which broadcasts the dictionary over the batch and so copies it."""

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        module = sys.modules["evc_fast.ops.emotion_attention"]
        with mock.patch.object(module, "reference", self.emotion_attention or module.reference):
            output = self.run(*inputs, impl=self.impl)
        return [output.tokens, output.emotion_logits]

    def backward(self, outputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(outputs, self.parameters, gradients))


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
    contender: Contender, encoder: FaceNetEncoder, inputs: list[Tensor], gradients: list[Tensor], slack: float
) -> str:
    """What strays from float64 further than the project allows, or ""; of a contender without dropout."""

    def straight(dtype: torch.dtype) -> list[Tensor]:
        model = copy.deepcopy(encoder).to(dtype)
        plain = Contender(model, "reference", list(model.parameters()))
        outputs = plain.forward([x.to(dtype) for x in inputs])
        return [*outputs, *plain.backward(outputs, [g.to(dtype) for g in gradients])]

    outputs = contender.forward(inputs)
    actual = [*outputs, *contender.backward(outputs, gradients)]
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
    device = arguments.device
    config = FaceNetConfig(dropout=dropout)
    encoder = FaceNetEncoder(config).to(device)
    inputs = [
        torch.randn(batch, config.num_frames, config.video_dim),
        torch.randn(batch, config.num_triplets, 3, config.text_dim),
        torch.rand(batch, config.num_triplets),
    ]
    gradients = [
        torch.randn(batch, config.num_queries, config.output_dim),
        torch.randn(batch, config.num_emotions),
    ]
    inputs, gradients = ([x.to(device) for x in group] for group in (inputs, gradients))
    torch._dynamo.reset()
    record = {"batch": batch, "dropout": dropout, "failed": {}, "flops": {}}
    sound: dict[str, Contender] = {}
    for name, contender in contenders(encoder, not arguments.no_compile).items():
        contender.run.eval()
        fault = wrong(contender, encoder, inputs, gradients, 1 if name in (EAGER, TUNED, OURS) else RIVAL_SLACK)
        contender.run.train()
        if fault:
            record["failed"][name] = fault
            continue
        sound[name] = contender
        if name in (EAGER, OURS):
            record["flops"][name] = step_flops(contender, inputs, gradients)
    record["seconds"], record["turns"] = take_turns(sound, inputs, gradients, device, arguments.seconds)
    if OURS in sound:
        record["floor_s"] = record["flops"][OURS] / peak
        if arguments.profile:
            record["profile"] = step_profile(sound[OURS], inputs, gradients)
    return record


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
    torch.set_num_threads(arguments.threads)
    console = terminal()
    machine = describe(arguments.device, arguments.threads) | {"kernels_isa": dispatch.cpu_isa()}
    machine["ceilings"] = measure_ceilings(arguments.device, [torch.float32])
    peak = machine["ceilings"]["matrix_flops_per_s"]["float32"]
    todo = [(batch, dropout) for batch in arguments.batch for dropout in arguments.dropout]
    records = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("training", total=len(todo))
        for batch, dropout in todo:
            progress.update(task, description=f"B={batch}, dropout {dropout:g}")
            records.append(measure(batch, dropout, arguments, peak))
            progress.advance(task)
    shown = [table(record) for record in records]
    shown += [profile_table(record) for record in records if "profile" in record]
    report = {"machine": machine, "records": records}
    title = "A training step of the encoder, measured"
    publish(console, arguments.out, "training", title, report, shown, notes(machine))
    return 1 if any(record["failed"] for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
