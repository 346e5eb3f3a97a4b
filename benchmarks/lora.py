"""Time a training step of FACE-net whole: the encoder, and a frozen LLM through its LoRA adapter.

Forward with teacher forcing, loss, backward, clipped gradients, Adam: as the paper trains, batch 32, with the LLM's
gradient checkpointing and without. Random weights in the true shape and random captions; a time does not depend on
them. Loss and gradients of every row are held against those with the reference ops before it is timed. The floor is the
time of the step's matrix products at the matrix peak measured in the same run.

    python benchmarks/lora.py --device cuda                       # FLAN-T5-XL in bfloat16
    python benchmarks/lora.py --decoder opt-2.7b --device cuda --batch 8
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from _device import Device, add_arguments, device_of
from _machine import available_memory, describe, measure_ceilings
from _page import publish, terminal
from _parts import LLMS, TINY, TINY_CONFIG
from _report import MISSING, Table, count, milliseconds, scaled
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evc_fast.model.captioner import FaceNet
from evc_fast.ops import dispatch
from evc_fast.pipeline import random_model

PHASES = ("forward", "backward", "update")
LEARNING_RATE, CLIP, LAMBDA_CLS = 7e-4, 5.0, 0.2  # of the paper and its preset for EVC-Combine
# Of the loss, relative; and how far a gradient may turn, 1 - cosine: the LLM reads the tokens in bfloat16.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-2, 5e-2
CALLS = 3


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    first, *rest = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog="\n\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decoder", choices=LLMS, default=LLMS[0], help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--length", type=int, default=16, help="tokens of a caption (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time of a row (default: %(default)s)")
    add_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "local",
        help="folder of lora.json and lora.md (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    arguments.on = device_of(arguments, parser)
    return arguments


class Training:
    """A model, one batch, and the three parts of a step.

    ``impl``: of the encoder's ops; "reference" is the encoder as the paper prints it.
    """

    def __init__(self, model: FaceNet, arguments: argparse.Namespace, vocabulary: int) -> None:
        self.model, self.impl = model, None
        config, device = model.encoder.config, arguments.on.name
        g = torch.Generator().manual_seed(0)
        batch = arguments.batch
        self.inputs = [
            torch.randn(batch, config.num_frames, config.video_dim, generator=g).to(device),
            torch.randn(batch, config.num_triplets, 3, config.text_dim, generator=g).to(device),
            torch.rand(batch, config.num_triplets, generator=g).to(device),
        ]
        self.targets = torch.randint(3, vocabulary, (batch, arguments.length), generator=g).to(device)
        self.emotions = torch.randint(0, config.num_emotions, (batch,), generator=g).to(device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=LEARNING_RATE)

    def forward(self) -> Tensor:
        """L of (32), every target weighted alike."""
        outputs = self.model(*self.inputs, self.targets, impl=self.impl)
        caption = F.cross_entropy(outputs.logits.flatten(0, 1).float(), self.targets.flatten())
        return caption + LAMBDA_CLS * F.cross_entropy(outputs.emotion_logits, self.emotions)

    def backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()

    def step(self) -> None:
        self.backward(self.forward())
        self.update()

    def gradients(self) -> tuple[float, list[Tensor]]:
        """The loss and the encoder's gradients, in evaluation mode: without dropout."""
        self.model.eval()
        loss = self.forward()
        found = torch.autograd.grad(loss, list(self.model.encoder.parameters()))
        self.model.train()
        return loss.item(), [g.float() for g in found]


@contextmanager
def checkpointing(model: FaceNet, wanted: bool) -> Iterator[None]:
    """Inside the `with`, where that is wanted, the LLM's layers are computed again in backward instead of kept."""
    llm = model.decoder.base
    if wanted:
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if wanted:
            llm.gradient_checkpointing_disable()


def strays(actual: tuple[float, list[Tensor]], wanted: tuple[float, list[Tensor]]) -> str:
    """Where loss or gradients are not those of the reference ops, or ""."""
    (loss, gradients), (other, others) = actual, wanted
    if not abs(loss - other) <= LOSS_TOLERANCE * abs(other):
        return f"its loss is {loss:.4f}, with the reference ops {other:.4f}"
    ours, theirs = (torch.cat([g.flatten() for g in group]) for group in (gradients, others))
    turned = 1 - F.cosine_similarity(ours.double(), theirs.double(), dim=0).item()
    if not turned <= GRADIENT_TOLERANCE:
        return f"the encoder's gradient turns by {turned:.2e} from that with the reference ops"
    return ""


def timed(device: Device, training: Training, seconds: float) -> tuple[dict[str, list[float]], int]:
    """Seconds of each phase and of the step in every timed step, and the number of steps."""
    samples: dict[str, list[float]] = {name: [] for name in (*PHASES, "step")}

    def steps() -> None:
        marks = []
        for _ in range(CALLS):
            taken = [device.mark()]
            loss = training.forward()
            taken.append(device.mark())
            training.backward(loss)
            taken.append(device.mark())
            training.update()
            marks.append([*taken, device.mark()])
        for taken in marks:
            for phase, first, last in zip(PHASES, taken[:-1], taken[1:], strict=True):
                samples[phase].append(device.between(first, last))
            samples["step"].append(device.between(taken[0], taken[-1]))

    steps()  # warms up
    for values in samples.values():
        values.clear()
    begin = time.perf_counter()
    while not samples["step"] or time.perf_counter() - begin < seconds:
        steps()
    return samples, len(samples["step"])


def step_flops(training: Training) -> int:
    """Matrix products of a step as they are executed, 2 FLOPs a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        training.backward(training.forward())
    return counter.get_total_flops()


def peak_memory(device: Device, run: Callable[[], object]) -> int | None:
    """The most GPU memory that is taken while a step runs, weights included."""
    held = torch.cuda.memory_allocated() if device.kind == "cuda" else 0
    beyond = device.peak_bytes(run)
    return None if beyond is None else held + beyond


def measure(training: Training, arguments: argparse.Namespace, say: Callable[[str], object]) -> list[dict]:
    """A record a row: both encoders, with checkpointing and without; all are checked before a step changes a weight."""
    device = arguments.on
    records, found = [], {}
    say("checking")
    for impl in ("reference", None):
        training.impl = impl
        found[impl] = training.gradients()
    for impl in ("reference", None):
        fault = strays(found[impl], found["reference"])
        for recompute in (True, False):
            name = "reference ops" if impl else "ours"
            record = {"row": name, "checkpointing": recompute, "loss": found[impl][0], "fault": fault, "skipped": ""}
            records.append(record)
            if fault:
                continue
            say(f"{name}, checkpointing {'on' if recompute else 'off'}")
            training.impl = impl
            try:
                with checkpointing(training.model, recompute):
                    record["flops"] = step_flops(training)
                    samples, record["steps"] = timed(device, training, arguments.seconds)
                    record["gpu_bytes"] = peak_memory(device, training.step)
                record["seconds"] = {phase: statistics.median(values) for phase, values in samples.items()}
                record["least_s"] = min(samples["step"])
            except torch.OutOfMemoryError as error:
                record["skipped"] = str(error).splitlines()[0]
            training.optimizer.zero_grad(set_to_none=True)
            gc.collect()
    return records


def table(records: list[dict], arguments: argparse.Namespace, peak: float) -> Table:
    rows, said = [], []
    for record in records:
        name = f"{record['row']}, checkpointing {'on' if record['checkpointing'] else 'off'}"
        why = f"not timed: {record['fault']}" if record["fault"] else f"not measured: {record['skipped']}"
        if "seconds" not in record:
            said.append(f"{name}: {why}")
            continue
        seconds, floor = record["seconds"], record["flops"] / peak
        rows.append(
            [
                name,
                *(milliseconds(seconds[phase]) for phase in (*PHASES, "step")),
                milliseconds(record["least_s"]),
                f"{arguments.batch / seconds['step']:.1f}",
                count(record["flops"]),
                milliseconds(floor),
                f"{seconds['step'] / floor:.2f}",
                MISSING if record["gpu_bytes"] is None else scaled(record["gpu_bytes"], ((1e9, "GB"), (1e6, "MB"))),
            ]
        )
    columns = ["encoder", *(f"{phase}, ms" for phase in (*PHASES, "step")), "least step", "captions/s", "FLOPs"]
    columns += ["floor, ms", "step / floor", "GPU memory"]
    title = f"{arguments.decoder}, bfloat16, B = {arguments.batch}, {arguments.length} tokens a caption"
    return Table(title, columns, rows, said)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device = arguments.on
    torch.set_num_threads(arguments.threads)
    console = terminal(160)
    machine = describe(device.name, arguments.threads) | {"kernels_isa": dispatch.cpu_isa()}
    machine["ceilings"] = measure_ceilings(device.name, [torch.float32, torch.bfloat16], quick=device.rehearsal)
    peak = machine["ceilings"]["matrix_flops_per_s_library"]["bfloat16"]
    free = available_memory(device.name)
    with console.status("weights") as status:
        shape = TINY[arguments.decoder] if device.rehearsal else arguments.decoder
        config = TINY_CONFIG if device.rehearsal else None
        model = random_model(shape, dtype=torch.bfloat16, device=device.name, config=config).train()
        vocabulary = model.decoder.base.get_input_embeddings().num_embeddings
        training = Training(model, arguments, vocabulary)
        records = measure(training, arguments, status.update)
    trained = model.trainable_parameters()
    said = [
        f"Random weights. {count(trained)} parameters are trained, of {count(model.all_parameters())}; LLM bfloat16, "
        "LoRA (rank 16, on q and v) and encoder float32; Adam, gradients clipped. Loss and the encoder's gradients of "
        "every row are those with the reference ops before it is timed. Medians of all timed steps.",
        f"Floor: the step's matrix products at the bfloat16 peak measured in this run, {peak / 1e12:,.1f} TFLOP/s.",
    ]
    if free is not None:
        said.append(f"{free / 1e9:.0f} GB were free before. GPU memory: the most that PyTorch took in a step, weights "
                    "included.")  # fmt: skip
    report = {"machine": machine, "trained": trained, "records": records}
    title = device.title("A training step with LoRA, measured")
    publish(console, arguments.out, "lora", title, report, [table(records, arguments, peak)], said)
    return 1 if any(record["fault"] for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
