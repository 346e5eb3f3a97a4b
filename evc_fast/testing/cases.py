"""The one list of cases of every op: sizes, values, options and layouts. Tests and benchmarks draw from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evc_fast import ops, reference

# The paper's sizes: K triplets, N frames, W emotion words, width d, heads, text features D, T = 3 heads, FFN's width F.
PAPER = {"K": 4, "N": 16, "W": 179, "d": 300, "heads": 4, "D": 512, "T": 12, "F": 1200}

# Which outputs of an op have gradients.
DIFFERENTIABLE = {
    "entropy_calibration": (True, False, False),
    "factored_hidden": (True,),
    "emotion_attention": (True,),
    "routing_aggregation": (True, True, False),
}
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")


@dataclass(frozen=True)
class Case:
    """One call of one op: its sizes, the values that matter, and its options."""

    op: str
    name: str
    sizes: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0  # of the features that a softmax reads
    special: str = ""  # "one_hot", "tiny_entropy", "negative_similarity", "dominant_similarity"
    groups: str = ""  # "random", "same", "distinct"

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"

    def inputs(self, dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0) -> list[Tensor]:
        """The op's tensor arguments in order: values drawn in float64, rounded to ``dtype``, laid out as asked."""
        generator = torch.Generator().manual_seed(seed)
        tensors = _MAKERS[self.op](self, generator)
        return [_lay_out(t.to(dtype) if t.is_floating_point() else t, layout) for t in tensors]

    def call(self, *tensors: Tensor, impl: str | None = None) -> tuple[Tensor, ...]:
        """Run the public op; always a tuple."""
        outputs = getattr(ops, self.op)(*tensors, **self.options, impl=impl)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def plain(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the reference; always a tuple."""
        outputs = getattr(reference, self.op)(*tensors, **self.options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def differentiable(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Those of the outputs that have gradients."""
        return [o for o, has_gradient in zip(outputs, DIFFERENTIABLE[self.op], strict=True) if has_gradient]


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _entropy_inputs(case: Case, generator: torch.Generator) -> list[Tensor]:
    batch, count, width = (case.sizes[s] for s in ("B", "K", "D"))
    triplets = case.scale * _normal(generator, batch, count, 3, width)
    similarity = torch.rand(batch, count, dtype=torch.float64, generator=generator) * 0.3 + 0.05
    if case.special == "one_hot":
        triplets = torch.zeros_like(triplets)
        triplets[..., 0] = 1e4
    elif case.special == "tiny_entropy":  # certain but for shares of e^-87 to e^-103: subnormal in float32
        triplets = -95 - 8 * torch.rand(triplets.shape, dtype=torch.float64, generator=generator)
        triplets[..., 0] = 0
        triplets[:, 0, 0, 1] = -88
    elif case.special == "negative_similarity":
        similarity = torch.linspace(-1, 0.3, count, dtype=torch.float64).expand(batch, count).clone()
        similarity[:, 0] = 0
    elif case.special == "dominant_similarity":
        similarity[:, 1:] = -1
    tensors = [triplets, similarity]
    if case.groups:
        ids = torch.arange(count).expand(batch, count) * (case.groups != "same")
        tensors.append(torch.randint(0, 2, (batch, count), generator=generator) if case.groups == "random" else ids)
    return tensors


def _emotion_inputs(case: Case, generator: torch.Generator) -> list[Tensor]:
    batch, count, frames, words, width = (case.sizes[s] for s in ("B", "K", "N", "W", "d"))
    gate_scale = case.scale / width**0.25  # gate logits of order `scale`^2, as the attention's
    return [
        case.scale * _normal(generator, batch, count, frames, width),
        case.scale * _normal(generator, words, width),
        _normal(generator, words, width),
        gate_scale * _normal(generator, batch, count, frames, width),
        gate_scale * _normal(generator, batch, frames, width),
    ]


def _routing_inputs(case: Case, generator: torch.Generator) -> list[Tensor]:
    batch, count, frames, width = (case.sizes[s] for s in ("B", "K", "N", "d"))
    return [
        _normal(generator, batch, count, frames, width),
        _normal(generator, batch, count, frames, width) + 0.5,
        case.scale * _normal(generator, batch, frames, count),
    ]


def _hidden_inputs(case: Case, generator: torch.Generator) -> list[Tensor]:
    batch, count, frames, terms, width = (case.sizes[s] for s in ("B", "K", "N", "T", "F"))
    return [
        _normal(generator, batch, count, frames, terms).softmax(-1),
        case.scale * _normal(generator, batch, count, terms, width),
        case.scale * _normal(generator, batch, frames, width),
    ]


_MAKERS: dict[str, Callable[[Case, torch.Generator], list[Tensor]]] = {
    "entropy_calibration": _entropy_inputs,
    "factored_hidden": _hidden_inputs,
    "emotion_attention": _emotion_inputs,
    "routing_aggregation": _routing_inputs,
}


def _lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values (but for "expanded", which repeats the first entry) behind other strides."""
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        padded = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.size(-1) + 1)
        view = padded[..., 1::2]
        view.copy_(tensor)
        return view
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    return tensor


def _entropy(name: str, B: int, K: int, D: int, **rest: Any) -> Case:
    return Case("entropy_calibration", name, {"B": B, "K": K, "D": D}, **rest)


def _emotion(name: str, B: int, K: int, N: int, W: int, d: int, heads: int, **rest: Any) -> Case:
    sizes = {"B": B, "K": K, "N": N, "W": W, "d": d}
    return Case("emotion_attention", name, sizes, {"num_heads": heads}, **rest)


def _hidden(name: str, B: int, K: int, N: int, T: int, F: int, **rest: Any) -> Case:
    return Case("factored_hidden", name, {"B": B, "K": K, "N": N, "T": T, "F": F}, **rest)


def _routing(name: str, B: int, K: int, N: int, d: int, **rest: Any) -> Case:
    return Case("routing_aggregation", name, {"B": B, "K": K, "N": N, "d": d}, **rest)


CASES = (
    _entropy("paper", 2, 4, 512),
    _entropy("paper-one", 1, 4, 512),
    _entropy("large", 7, 5, 768),
    _entropy("odd", 3, 3, 37),
    _entropy("tiny", 1, 1, 1),
    _entropy("one-triplet", 3, 1, 65),
    _entropy("narrow", 2, 2, 3),
    _entropy("empty", 0, 4, 512),
    _entropy("no-self", 2, 4, 40, options={"self_refine": False}),
    _entropy("no-cross", 2, 4, 40, options={"cross_refine": False}),
    _entropy("neither", 2, 4, 40, options={"self_refine": False, "cross_refine": False}),
    _entropy("groups", 4, 5, 40, groups="random"),
    _entropy("groups-same", 2, 4, 40, groups="same"),
    _entropy("groups-distinct", 2, 4, 40, groups="distinct"),
    _entropy("peaked", 2, 4, 129, scale=8.0),
    _entropy("logits-1e4", 2, 4, 129, scale=1e4),
    _entropy("one-hot", 2, 4, 48, special="one_hot"),
    _entropy("tiny-entropy", 2, 4, 19, special="tiny_entropy"),
    _entropy("negative-similarity", 2, 4, 48, special="negative_similarity"),
    _entropy("dominant-similarity", 2, 4, 48, special="dominant_similarity"),
    _hidden("paper", 2, 4, 16, 12, 1200),
    _hidden("paper-one", 1, 4, 16, 12, 1200),
    _hidden("odd", 3, 3, 7, 9, 37),
    _hidden("tiny", 1, 1, 1, 1, 1, scale=0.05),
    _hidden("one-triplet", 3, 1, 5, 3, 64),
    _hidden("one-frame", 2, 4, 1, 6, 21),
    _hidden("many-frames", 2, 2, 67, 4, 33),
    _hidden("many-terms", 2, 2, 5, 101, 19),
    _hidden("saturated", 2, 2, 5, 6, 40, scale=30.0),
    _hidden("empty", 0, 4, 16, 12, 1200),
    _emotion("paper", 2, 4, 16, 179, 300, 4),
    _emotion("paper-one", 1, 4, 16, 179, 300, 4),
    _emotion("chunks", 9, 2, 5, 21, 24, 2),
    _emotion("odd", 3, 3, 7, 13, 33, 3),
    _emotion("tiny", 1, 1, 1, 1, 1, 1),
    _emotion("one-frame", 2, 4, 1, 19, 12, 2),
    _emotion("one-word", 2, 3, 5, 1, 12, 3),
    _emotion("one-wide-heads", 2, 2, 6, 17, 5, 5),
    _emotion("many-frames", 2, 2, 67, 30, 20, 1),
    _emotion("power-of-two", 2, 2, 64, 256, 64, 2),
    _emotion("empty", 0, 4, 16, 179, 300, 4),
    _emotion("logits-1e4", 2, 2, 7, 21, 24, 2, scale=100.0),
    _routing("paper", 2, 4, 16, 300),
    _routing("paper-one", 1, 4, 16, 300),
    _routing("odd", 3, 3, 7, 33),
    _routing("tiny", 1, 1, 1, 1),
    _routing("one-triplet", 2, 1, 5, 20),
    _routing("one-frame", 2, 4, 1, 20),
    _routing("many-frames", 2, 5, 67, 19),
    _routing("thousand-frames", 1, 3, 1000, 9),
    _routing("many-triplets", 2, 64, 3, 21),
    _routing("empty", 0, 4, 16, 300),
    _routing("logits-1e4", 2, 4, 5, 20, scale=1e4),
)


def cases(op: str) -> list[Case]:
    """The cases of one op."""
    return [case for case in CASES if case.op == op]


def benchmark_case(op: str, batch: int) -> Case:
    """An op at the paper's sizes."""
    sizes = {"B": batch, **PAPER}
    options = {"num_heads": sizes["heads"]} if op == "emotion_attention" else {}
    return Case(op, f"B={batch}", sizes, options)
