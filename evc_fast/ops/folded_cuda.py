"""The folded encoder on CUDA: its weights packed for csrc/cuda/folded_encoder.cu, and the op's fake."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from evc_fast.ops._library import LIBRARY, NAMESPACE
from evc_fast.reference.folded_encoder import FoldedOptions, FoldedWeights, visual_sections

# kColumns and kDeep of csrc/cuda/folded_layout.cuh: columns of a tile, and the depth that it takes at a time.
_TILE, _DEEP = 8, 32
_ALIGNMENT = 64  # elements


@torch.no_grad()
def pack_folded_encoder_cuda(weights: FoldedWeights, options: FoldedOptions) -> list[Tensor]:
    """The weights in the order of ``FoldedCudaWeight`` in csrc/cuda_folded.h; empty where there is no such part.

    W_v and Attn_c's q are multiplied into what reads them, in float64. Matrices share one buffer, biases another.

    Raises:
        TypeError: the weights' type is not float32, bfloat16 or float16.
    """
    dtype = weights.ffn_weight.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"pack_folded_encoder_cuda: weights must be float32, bfloat16 or float16, got {dtype}")
    packer = _Packer(weights, options)
    matrices, vectors = packer.matrices(), packer.vectors()
    stored = _together([_tiles(_pad(x, 1).to(dtype)) for x in matrices.values()], dtype, weights.ffn_weight.device)
    kept = _together([x.float().flatten() for x in vectors.values()], torch.float32, weights.ffn_weight.device)
    made = dict(zip(matrices, stored, strict=True)) | dict(zip(vectors, kept, strict=True))
    empty = {True: weights.ffn_weight.new_empty(0, dtype=torch.float32), False: weights.ffn_weight.new_empty(0)}
    return [made.get(name, empty[name.endswith(("_bias", "norm_weight"))]) for name in _NAMES]


_NAMES = (
    "visual",
    "visual_bias",
    "triplet",
    "hidden",
    "router_bias",
    "ffn",
    "ffn_bias",
    "norm_weight",
    "norm_bias",
    "words",
    "words_bias",
    "value",
    "emotion",
    "emotion_bias",
    "gate",
    "gate_bias",
    "head",
    "head_bias",
    "memory",
    "output",
    "output_bias",
)


class _Packer:
    """Matrices [out, in] with padded sections, and vectors, in float64."""

    def __init__(self, weights: FoldedWeights, options: FoldedOptions) -> None:
        self.w = FoldedWeights(*(None if x is None else x.double() for x in weights))
        self.o = options
        self.d = len(self.w.ffn_weight)
        self.visual_weight, self.visual_bias = self._visual()

    def matrices(self) -> dict[str, Tensor]:
        w, o, d = self.w, self.o, self.d
        scores = o.num_heads * o.num_queries
        memory = [_pad(w.memory_weight[:scores], 0, _TILE), self._by_head(w.memory_weight[scores:])]
        made = {
            "visual": self.visual_weight,
            "ffn": _pad(w.ffn_weight, 0),
            "memory": torch.cat(memory),
            "output": _pad(self._by_head(w.output_weight, 1), 0, _TILE),
        }
        if o.retrieval:
            made["triplet"] = torch.cat([self._by_head(x) for x in w.triplet_weight.split(d)])
            of_h = self._by_head(w.hidden_weight.permute(2, 0, 1).flatten(1), 1)  # [F + K K, d]
            blocks = of_h[w.ffn_weight.shape[1] :].split(o.num_groups)  # each triplet's own of W_g
            made["hidden"] = torch.cat([_pad(of_h[: w.ffn_weight.shape[1]], 0), *(_pad(x, 0, _TILE) for x in blocks)])
        if o.emotion_augmentation:
            made["value"] = self._by_head(w.value.T)
            made["emotion"] = self._by_head(self._emotions(w.emotion_weight), 1)
            made["head"] = _pad(self._by_head(w.head_weight, 1), 0)
            if not o.emotion_first:
                made["words"] = self._words(w.emotion_query_weight)
        if o.bias_adjustment:
            inputs = [_pad(w.gate_weight[:, :d], 1)]  # [pooled F ; pooled context]
            if o.emotion_augmentation:
                inputs.append(self._by_head(w.gate_weight[:, d:], 1))
            made["gate"] = _sections(torch.cat(inputs, 1), d)
        return made

    def vectors(self) -> dict[str, Tensor]:
        w, o, d = self.w, self.o, self.d
        made = {
            "visual_bias": self.visual_bias,
            "ffn_bias": _pad(w.ffn_bias, 0),
            "norm_weight": _pad(w.norm_weight, 0),
            "norm_bias": _pad(w.norm_bias, 0),
            "output_bias": w.output_bias,
        }
        if o.has_router:
            made["router_bias"] = w.router_bias
        if o.emotion_augmentation:
            made["emotion_bias"] = self._emotions(w.emotion_bias)
            made["head_bias"] = _pad(w.head_bias, 0)
            if not o.emotion_first:
                made["words_bias"] = self._words(w.emotion_query_bias)
        if o.bias_adjustment:
            made["gate_bias"] = _sections(w.gate_bias, d)
        return made

    def _visual(self) -> tuple[Tensor, Tensor]:
        """All products of the video: V, then the products of V with W_v multiplied in."""
        w, o, d = self.w, self.o, self.d
        widths = visual_sections(w, o)
        parts = {
            name: _columns(weight, bias)
            for name, weight, bias in zip(
                widths,
                w.visual_weight.split(list(widths.values())),
                w.visual_bias.split(list(widths.values())),
                strict=True,
            )
        }
        scores = o.num_heads * o.num_queries
        eye = torch.eye(d, d + 1, dtype=torch.float64, device=w.ffn_weight.device)
        sections = [_pad(eye, 0), _pad(parts["hidden"], 0)]
        if "query" in parts:
            sections.append(self._by_head(parts["query"]))
        if "emotion_query" in parts:
            sections.append(self._words(parts["emotion_query"]))
        if "gate_key" in parts:
            sections += [_pad(parts["gate_key"], 0), _pad(parts["gate_bias"], 0, _TILE)]
        sections += [_pad(parts["memory"][:scores], 0, _TILE), self._by_head(parts["memory"][scores:])]
        stacked = torch.cat(sections)
        weight, bias = stacked[:, :d], stacked[:, d]
        if w.video_weight is None:
            return weight, bias
        return weight @ w.video_weight, bias + weight @ w.video_bias

    def _words(self, query: Tensor) -> Tensor:
        """Rows [d, ...] of Attn_c's q -> the scores of (19) [heads W, ...], each head's padded."""
        heads = self.o.num_heads
        key = self.w.key.unflatten(1, (heads, -1)).transpose(0, 1)  # [heads, W, d / heads]
        by_head = query.reshape(heads, self.d // heads, -1)
        scores = key @ by_head * (self.d // heads) ** -0.5
        return _pad(scores, 1).flatten(0, 1).reshape(-1, *query.shape[1:])

    def _emotions(self, rows: Tensor) -> Tensor:
        """Rows [E | Attn_f's q?, ...]."""
        parts = [_pad(rows[: self.d], 0)]
        if len(rows) > self.d:
            parts.append(self._by_head(rows[self.d :]))
        return torch.cat(parts)

    def _by_head(self, x: Tensor, dim: int = 0) -> Tensor:
        """A dimension of d: each head's to whole tiles, all to a whole step of the depth."""
        parts = _pad(x.unflatten(dim, (self.o.num_heads, -1)), dim + 1, _TILE)
        return _pad(parts.flatten(dim, dim + 1), dim)


def _columns(weight: Tensor, bias: Tensor) -> Tensor:
    """[out, in + 1]: what is made of the rows of a matrix is made of its bias, too."""
    return torch.cat([weight, bias[:, None]], 1)


def _sections(x: Tensor, d: int) -> Tensor:
    return torch.cat([_pad(part, 0) for part in x.split(d)])


def _pad(x: Tensor, dim: int, to: int = _DEEP) -> Tensor:
    """Zeros behind a dimension, up to a multiple."""
    after = [0, 0] * (x.dim() - 1 - dim)
    return F.pad(x, [*after, 0, -x.shape[dim] % to])


def _tiles(x: Tensor) -> Tensor:
    """[out, in], multiples of a tile's sizes, in the order in which a warp's lanes read it."""
    neighbours = 4 if x.dtype == torch.float32 else _DEEP
    return x.unflatten(1, (-1, neighbours)).unflatten(0, (-1, _TILE)).transpose(1, 2).flatten()


def _together(parts: list[Tensor], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    begins = [0]
    for part in parts:
        begins.append(begins[-1] + -(-part.numel() // _ALIGNMENT) * _ALIGNMENT)
    buffer = torch.zeros(begins[-1], dtype=dtype, device=device)
    views = [buffer[begin : begin + part.numel()] for begin, part in zip(begins, parts, strict=False)]
    for view, part in zip(views, parts, strict=True):
        view.copy_(part)
    return views


@functools.partial(torch.library.register_fake, f"{NAMESPACE}::folded_encoder_cuda", lib=LIBRARY)
def _cuda_fake(video, triplets, similarity, groups, weights, sizes, norm_eps, explain):
    k, words, d, _, _, _, _, queries, output_width, _, retrieval, emotions, *_ = sizes
    batch, frames, _ = video.shape
    stored = weights[_NAMES.index("ffn")]
    shown = batch if explain else 0
    return (
        stored.new_empty(batch, queries, output_width),
        stored.new_empty(batch if emotions else 0, words),
        stored.new_empty(shown if retrieval else 0, k, 3, dtype=torch.float32),
        stored.new_empty(shown if retrieval else 0, k, dtype=torch.float32),
        stored.new_empty(shown, frames, k, dtype=torch.float32),
        stored.new_empty(shown if emotions else 0, k, words, dtype=torch.float32),
        stored.new_empty(shown, d),
        stored.new_empty(shown if emotions else 0, d),
    )
