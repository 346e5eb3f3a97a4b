"""One caption taken apart: the time, the FLOPs and the bytes of each stage.

The stages' borders are the methods of :class:`evc_fast.pipeline.CaptionPipeline` and, inside `generate`, forward hooks:
the decoder is split into what reads the prefix (a T5 encoder, the first pass of an OPT) and its steps. The encoder and
its Q-former are one stage, because folded they are one call. At each border a gauge is read: the clock, or a counter of
FLOPs.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from evc_fast.model.captioner import FaceNet
from evc_fast.pipeline import CaptionPipeline

TOWER = "image tower"
ENCODER = "encoder + Q-former"
PREFIX = "LLM encoder"
STEP = "decode step"
STAGES = ("video decode", TOWER, "retrieval", ENCODER, PREFIX, STEP)

Gauge = Callable[[], float]


class Probe:
    """What a gauge gained in each stage of one caption; a stage that runs several times has several entries."""

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge
        self.gained: dict[str, list[float]] = {}

    def add(self, stage: str, amount: float) -> None:
        self.gained.setdefault(stage, []).append(amount)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self.gauge()
        yield
        self.add(stage, self.gauge() - start)


class ProbedPipeline(CaptionPipeline):
    """A pipeline that tells its stages apart as long as a probe is attached; without one it is the plain pipeline."""

    probe: Probe | None = None

    @contextmanager
    def attached(self, gauge: Gauge) -> Iterator[Probe]:
        """Probe all captions inside the `with`."""
        self.probe = Probe(gauge)
        try:
            yield self.probe
        finally:
            self.probe = None

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Inside the `with` an explicit fold runs in the encoder's place: under a counter the encoder makes none."""
        encoder = self.model.encoder
        # A copy does not ask after its encoder, which from here on has a forward of its own.
        encoder.forward = copy.deepcopy(encoder.fold()).forward
        try:
            yield
        finally:
            del encoder.forward

    def read(self, source):
        return self._probed("video decode", super().read, source)

    def encode_frames(self, frames, *, temporal_kernel=1):
        run = partial(super().encode_frames, temporal_kernel=temporal_kernel)
        return self._probed(TOWER, run, frames)

    def retrieve(self, features, video_ids=None):
        return self._probed("retrieval", super().retrieve, features, video_ids)

    def encode(self, features, retrieved, *, explain=False):
        return self._probed(ENCODER, partial(super().encode, explain=explain), features, retrieved)

    def search(self, tokens, **options):
        if self.probe is None:
            return super().search(tokens, **options)
        border = _Border(step_module(self.model), self.probe.gauge)
        start = self.probe.gauge()
        with border:
            found = super().search(tokens, **options)
        for stage, amount in split_steps(self.model, start, border, self.probe.gauge()):
            self.probe.add(stage, amount)
        return found

    def _probed(self, stage, run, *arguments):
        if self.probe is None:
            return run(*arguments)
        with self.probe(stage):
            return run(*arguments)


class _Border:
    """The gauge whenever a module's forward begins and whenever it is done."""

    def __init__(self, module: nn.Module, gauge: Gauge) -> None:
        self.module, self.gauge = module, gauge
        self.begun: list[float] = []
        self.done: list[float] = []

    def __enter__(self) -> None:
        self.handles = (
            self.module.register_forward_pre_hook(lambda *_: self.begun.append(self.gauge())),
            self.module.register_forward_hook(lambda *_: self.done.append(self.gauge())),
        )

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def step_module(model: FaceNet) -> nn.Module:
    """The module that runs once a generated token: the LLM itself, or a small decoder's map to the vocabulary."""
    return model.decoder.base if hasattr(model.decoder, "base") else model.decoder.output


def split_steps(model: FaceNet, start: float, border: _Border, end: float) -> list[tuple[str, float]]:
    """Share out a `generate` from `start` to `end` among the prefix and the steps, bookkeeping of the search included.

    An LLM's forward begins each step, and what comes before the first is T5's encoder. OPT has no encoder: its first
    forward reads the prefix, and gives the first token with it. A small decoder's step ends with its output map.
    """
    if not hasattr(model.decoder, "base"):
        borders = [start, *border.done[:-1], end]
        return [(STEP, after - before) for before, after in itertools.pairwise(borders)]
    borders = [start, *border.begun, end]
    if model.decoder.family == "opt":
        borders = [start, *border.begun[1:], end]
    gains = [after - before for before, after in itertools.pairwise(borders)]
    return [(PREFIX, gains[0]), *((STEP, gain) for gain in gains[1:])]


def clock(device: str) -> Gauge:
    """Seconds; on a GPU read after the queue is drained."""
    if not device.startswith("cuda"):
        return time.perf_counter

    def read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


def attention_flops(query_shape, key_shape, value_shape, *_, **__) -> int:
    """Both products of a scaled dot product attention, [..., L, E] with [..., S, E] and [..., S, E_v]."""
    *leading, rows, width = query_shape
    products = 2 * rows * key_shape[-2] * (width + value_shape[-1])
    for size in leading:
        products *= size
    return products


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter (matrix products, 2 a multiply-add), with the formula that it lacks for attention on a CPU.

    The fused ops of evc_fast register theirs themselves.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={flash: attention_flops})
