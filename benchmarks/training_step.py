"""Time a whole training step, encoder and Transformer decoder, beside the same step with the straight encoder.

A step is what the trainer does with a batch: put it together, forward, loss, backward, clip, Adam. The two steps differ
in the encoder alone: "straight" is the encoder as the paper prints it, in plain PyTorch with PyTorch's own dropout.
Losses and gradients of both are held against float64 before they are timed (without dropout); a wrong one is reported
and not timed. Both are timed in turns within one run, and the least of many turns counts. Beside the times stands
Amdahl's limit: how much faster the straight step would be if its encoder took no time at all.

    python benchmarks/training_step.py                         # float32, B = 32, 15 words a caption, dropout 0.1
    python benchmarks/training_step.py --batch 32 1 --words 9
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from _machine import describe
from _page import publish, terminal
from _report import MISSING, Table, milliseconds
from rich.progress import Progress
from torch import Tensor, nn

from evc_fast.data.captions import Caption
from evc_fast.data.repository import CaptionRepository, distinct_parts
from evc_fast.model.captioner import FaceNet
from evc_fast.model.config import FaceNetConfig
from evc_fast.model.decoders import TransformerDecoder, TransformerDecoderConfig, Vocabulary
from evc_fast.model.decoders.vocabulary import PAPER_VOCABULARY_SIZE, SPECIALS
from evc_fast.model.dropout import Dropout
from evc_fast.model.encoder import FaceNetEncoder
from evc_fast.ops import dispatch
from evc_fast.testing.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, error_bound, largest_error
from evc_fast.testing.training_world import FINGERPRINT, MemoryFeatures
from evc_fast.training.dataset import Batch, CaptionBatches, VideoBatches
from evc_fast.training.losses import Denominators, Losses, face_net_loss
from evc_fast.training.targets import encode_targets

STRAIGHT, OURS = "straight encoder", "ours"
TARGET_BATCH, TARGET = 32, 1.15
PARTS = (
    "batch",
    "encoder forward",
    "decoder forward",
    "losses",
    "decoder backward",
    "encoder backward",
    "clipping",
    "Adam",
)
ENCODER_PARTS = ("encoder forward", "encoder backward")
NUM_VIDEOS, CLIP_NORM, DELTA = 64, 5.0, 0.1


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    first, *rest = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog="\n\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[32], help="captions in a batch (default: 32)")
    parser.add_argument("--words", type=int, default=15, help="of each caption (default: 15, the most there are)")
    parser.add_argument("--dropout", type=float, default=0.1, help="of encoder and decoder (default: 0.1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=30.0, help="measuring time of one table (default: 30)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "local",
        help="folder of training_step.json and training_step.md (default: %(default)s)",
    )
    return parser.parse_args(argv)


@dataclass
class Contender:
    """A model in training, its optimiser, and which implementation its encoder runs on."""

    model: FaceNet
    impl: str | None
    optimiser: torch.optim.Adam = field(init=False)

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=7e-4, fused=True)

    def losses(self, batch: Batch, denominators: Denominators) -> Losses:
        """In one go, for the check."""
        impl = self.impl
        output = self.model(batch.video, batch.triplets, batch.similarity, batch.target_ids, impl=impl)
        return loss_of(output.logits, output.emotion_logits, batch, denominators)

    def step(self, batches: CaptionBatches, rows: list[int]) -> dict[str, float]:
        """A step, cut where the decoder reads the encoder's tokens; seconds of each part."""
        clock = Clock()
        batch, denominators = batches.batch(rows), batches.denominators(rows)
        clock("batch")
        encoded = self.model.encoder(batch.video, batch.triplets, batch.similarity, impl=self.impl)
        clock("encoder forward")
        tokens, emotions = (x.detach().requires_grad_() for x in encoded[:2])
        logits = self.model.decoder(tokens, batch.target_ids)
        clock("decoder forward")
        total = loss_of(logits, emotions, batch, denominators).total
        clock("losses")
        total.backward()
        clock("decoder backward")
        torch.autograd.backward(encoded[:2], (tokens.grad, emotions.grad))
        clock("encoder backward")
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        clock("clipping")
        self.optimiser.step()
        self.optimiser.zero_grad()
        clock("Adam")
        return clock.seconds | {"step": clock.last - clock.start}


class Clock:
    """Seconds between its calls, by the name of what has just ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.start = self.last = time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part], self.last = now - self.last, now


def loss_of(logits: Tensor, emotions: Tensor, batch: Batch, denominators: Denominators) -> Losses:
    return face_net_loss(logits, emotions, batch.target_ids, batch.weights, batch.words, denominators)


def build(dropout: float, sizes: dict[str, dict]) -> FaceNet:
    """The paper's encoder, 4 d wide FFN and all, before a Transformer decoder with EVC-Combine's number of words."""
    torch.manual_seed(0)
    config = FaceNetConfig(**{"output_dim": 300, "dropout": dropout} | sizes.get("encoder", {}))
    words = sizes.get("words", PAPER_VOCABULARY_SIZE) - len(SPECIALS)
    decoder = TransformerDecoder(
        TransformerDecoderConfig(**{"input_dim": config.output_dim, "dropout": dropout} | sizes.get("decoder", {})),
        Vocabulary(f"word{number}" for number in range(words)),
    )
    return FaceNet(FaceNetEncoder(config), decoder)


def make_batches(model: FaceNet, words: int) -> CaptionBatches:
    """Captions of random words, one a video, and random features; one word in twelve is of the dictionary."""
    config, generator = model.encoder.config, random.Random(0)
    features = {f"v{number}": torch.randn(config.num_frames, config.video_dim) for number in range(NUM_VIDEOS)}
    vocabulary = model.decoder.vocabulary.words[len(SPECIALS) :]
    dictionary, others = vocabulary[: config.num_emotions], vocabulary[config.num_emotions :]

    def sentence() -> str:
        return " ".join(generator.choice(dictionary if generator.random() < 1 / 12 else others) for _ in range(words))

    captions = [Caption(video_id, sentence()) for video_id in features]
    triplets = [tuple(generator.choices(others, k=3)) for _ in captions]
    repository = CaptionRepository.from_features(
        [caption.text for caption in captions],
        [caption.video_id for caption in captions],
        triplets,
        torch.randn(len(captions), config.text_dim),
        torch.randn(len(distinct_parts(triplets)[0]), config.text_dim),
        encoder_fingerprint=FINGERPRINT,
        random_weights=True,
    )
    videos = VideoBatches(list(features), MemoryFeatures(features), repository, config.num_triplets)
    targets = encode_targets(model.decoder, [caption.text for caption in captions], dictionary)
    return CaptionBatches(captions, videos, targets, DELTA)


def contenders(model: FaceNet) -> dict[str, Contender]:
    """Copies of one model."""
    straight = copy.deepcopy(model)
    for name, layer in straight.encoder.ffn.named_children():
        if isinstance(layer, Dropout):
            straight.encoder.ffn.register_module(name, nn.Dropout(layer.p))
    return {STRAIGHT: Contender(straight, "reference"), OURS: Contender(model, None)}


def wrong(contender: Contender, batch: Batch, denominators: Denominators) -> str:
    """What strays from float64 further than the project allows, or ""; without dropout."""

    def step(model: FaceNet, impl: str | None, dtype: torch.dtype) -> list[Tensor]:
        cast = Batch(*(x.to(dtype) if x is not None and x.is_floating_point() else x for x in batch))
        probe = copy.deepcopy(model).to(dtype).train()
        for layer in probe.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        losses = Contender(probe, impl).losses(cast, denominators)
        losses.total.backward()
        return [*(x.detach() for x in losses), *(parameter.grad for parameter in probe.parameters())]

    actual = step(contender.model, contender.impl, torch.float32)
    plain = step(contender.model, "reference", torch.float32)
    oracle = step(contender.model, "reference", torch.float64)
    names = ["loss", "caption loss", "emotion loss", *(name for name, _ in contender.model.named_parameters())]
    for place, (name, a, p, e) in enumerate(zip(names, actual, plain, oracle, strict=True)):
        bound = error_bound(a.dtype, p, e, FORWARD_FACTOR if place < 3 else GRADIENT_FACTOR)
        if largest_error(a, e) > bound:
            return f"{name} errs by {largest_error(a, e):.3g}, {bound:.3g} is allowed"
    return ""


def measure(batch_size: int, arguments: argparse.Namespace, sizes: dict[str, dict]) -> dict:
    """Check, then time both, in turns for ``seconds`` and at least five turns."""
    model = build(arguments.dropout, sizes)
    batches = make_batches(model, arguments.words)
    rows = list(range(batch_size))
    record: dict = {"batch": batch_size, "words": arguments.words, "dropout": arguments.dropout, "failed": {}}
    sound: dict[str, Contender] = {}
    for name, contender in contenders(model).items():
        fault = wrong(contender, batches.batch(rows), batches.denominators(rows))
        if fault:
            record["failed"][name] = fault
            continue
        contender.model.train()
        contender.step(batches, rows)
        sound[name] = contender
    best = {name: dict.fromkeys((*PARTS, "step"), float("inf")) for name in sound}
    turns, begin = 0, time.perf_counter()
    while sound and (turns < 5 or time.perf_counter() - begin < arguments.seconds):
        turns += 1
        for name, contender in sound.items():
            for part, seconds in contender.step(batches, rows).items():
                best[name][part] = min(best[name][part], seconds)
    record |= {"turns": turns, "seconds": best}
    if STRAIGHT in best:
        record["amdahl_limit"] = amdahl_limit(best[STRAIGHT])
    return record


def amdahl_limit(straight: dict[str, float]) -> float:
    """Times that a step would be faster if its encoder, forward and backward, took no time."""
    whole = sum(straight[part] for part in PARTS)
    return whole / (whole - sum(straight[part] for part in ENCODER_PARTS))


def table(record: dict) -> Table:
    """One row a part, both contenders beside each other, and what the target says."""
    seconds = record["seconds"]
    rows = []
    for part in (*PARTS, "step"):
        times = [seconds[name][part] if name in seconds else None for name in (STRAIGHT, OURS)]
        share = MISSING if times[0] is None else f"{times[0] / sum(seconds[STRAIGHT][each] for each in PARTS):.0%}"
        ratio = MISSING if None in times else f"{times[0] / times[1]:.2f}"
        rows.append([part, milliseconds(times[0]), share, milliseconds(times[1]), ratio])
    notes = [f"{name} was not timed: {why}" for name, why in record["failed"].items()]
    if "amdahl_limit" in record:
        limit = record["amdahl_limit"]
        notes.append(f"Amdahl's limit: with an encoder that takes no time the straight step would be {limit:.2f}x.")
    if not record["failed"] and record["batch"] == TARGET_BATCH:
        ratio = seconds[STRAIGHT]["step"] / seconds[OURS]["step"]
        said = "reached" if ratio >= TARGET else "missed"
        notes.append(f"Target: a step >= {TARGET}x that with the straight encoder; measured {ratio:.2f}x, {said}.")
    columns = ["part", f"{STRAIGHT}, ms", "share", f"{OURS}, ms", f"{STRAIGHT} / {OURS}"]
    title = f"B = {record['batch']}, {record['words']} words, dropout {record['dropout']:g}, float32"
    return Table(f"{title}, {record['turns']} turns", columns, rows, notes)


SAID = [
    "The paper's sizes (N=16, K=4, d=300, W=179, N_q=32), a Transformer decoder of 3 layers and 14,034 words. Both "
    "steps share decoder, losses, clipping and PyTorch's fused Adam. Least of all turns for each part and for the "
    "whole step, so the parts may add up to less than the step; contenders in turns; losses and all gradients of each "
    "were checked against float64 first.",
]


def main(argv: list[str] | None = None, sizes: dict[str, dict] | None = None) -> int:
    """`sizes`: other ones, for the tests."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    console = terminal()
    machine = describe("cpu", arguments.threads) | {"kernels_isa": dispatch.cpu_isa()}
    records: list[dict] = []
    with Progress(console=console, transient=True) as progress:
        for batch_size in progress.track(arguments.batch, description="training step"):
            records.append(measure(batch_size, arguments, sizes or {}))
    report = {"machine": machine, "records": records}
    tables = [table(record) for record in records]
    publish(console, arguments.out, "training_step", "A whole training step, measured", report, tables, SAID)
    return 1 if any(record["failed"] for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
