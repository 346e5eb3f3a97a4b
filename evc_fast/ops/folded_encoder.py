"""The folded encoder, equations (10)-(29) of FACE-net with fixed weights, as one call."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from evc_fast.ops import _triton, dispatch
from evc_fast.ops._contract import check_arguments
from evc_fast.ops._library import LIBRARY, NAMESPACE
from evc_fast.ops.entropy_calibration import entropy_calibration
from evc_fast.ops.factored_hidden import factored_hidden
from evc_fast.ops.folded_cuda import pack_folded_encoder_cuda
from evc_fast.ops.packed_linear import pack_weight
from evc_fast.ops.routing_aggregation import routing_aggregation
from evc_fast.reference._dtypes import accumulate_dtype
from evc_fast.reference.folded_encoder import (
    FoldedOptions,
    FoldedOutput,
    FoldedParts,
    FoldedWeights,
    visual_sections,
)
from evc_fast.reference.folded_encoder import folded_encoder as reference

_LINE = 64  # bytes of a cache line
_ALIGNED = 8  # elements: 16 bytes of a 16-bit type
_PAD = 32  # kFoldedPad of csrc/ops.h: the columns of every section, whatever the instruction set


def folded_encoder(
    video: Tensor,
    triplets: Tensor | None,
    similarity: Tensor | None,
    groups: Tensor | None,
    weights: FoldedWeights,
    options: FoldedOptions,
    *,
    packed: list[Tensor] | None = None,
    explain: bool = False,
    impl: dispatch.Impl | None = None,
) -> FoldedOutput:
    """The encoder and Q-former with folded weights.

    Args:
        video: [B, N, D_v]; the weights' type or float32.
        triplets: [B, K, 3, D_t], the type of ``video``; None without retrieval.
        similarity: [B, K], any floating type; None without retrieval.
        groups: int64 [B, K]; read with ``merge_identical_triplets`` only.
        weights, options: of :func:`evc_fast.model.folded.fold_weights`; all weights of one type and device.
        packed: what :func:`pack_folded_encoder` made of them, or
            :func:`~evc_fast.ops.folded_cuda.pack_folded_encoder_cuda` on a GPU, or :func:`align_folded_encoder` for
            "triton"; None packs anew, at many times the cost of a call.
        explain: also return what explains the caption.
        impl: "reference" (plain PyTorch, differentiable in the features); without gradients "cpp", "cuda" (one kernel,
            for few videos), or "triton" (the library's products and the fused ops, for many); or None: the first of
            them that serves the tensors.

    Returns:
        :class:`~evc_fast.reference.folded_encoder.FoldedOutput`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, size or device.
        RuntimeError: ``impl`` cannot run here.
    """
    if isinstance(similarity, Tensor):
        similarity = similarity.to(accumulate_dtype(weights.ffn_weight))
    named = [("video", video, ("B", "N", "D_v"))]
    if options.retrieval:
        named.append(("triplets", triplets, ("B", str(options.num_triplets), "3", "D_t")))
        named.append(("similarity*", similarity, ("B", str(options.num_triplets))))
    if options.retrieval and options.merge_identical_triplets:
        named.append(("groups", groups, ("B", str(options.num_triplets))))
    check_arguments("folded_encoder", named)
    inputs = [video, triplets, similarity]
    run = dispatch.select("folded_encoder", impl, inputs, _CALLABLES, like=weights.ffn_weight)
    groups = groups if options.merge_identical_triplets else None
    return run(video, triplets, similarity, groups, weights, options, packed, explain)


def _reference(
    video,
    triplets,
    similarity,
    groups,
    weights,
    options,
    packed,
    explain,
    parts=FoldedParts(),  # noqa: B008
) -> FoldedOutput:
    dtype = weights.ffn_weight.dtype
    video = video.to(dtype)
    if options.retrieval:
        triplets, similarity = triplets.to(dtype), similarity.to(accumulate_dtype(video))
    return reference(video, triplets, similarity, groups, weights, options, explain=explain, parts=parts)


def _biased_emotion_attention(query, key, value, gate_query, gate_key, num_heads, gate_bias) -> Tensor:
    forward = _triton.launcher("emotion_attention", "forward")
    return forward(query, key, value, gate_query, gate_key, num_heads, False, gate_bias)[0]


@torch.no_grad()
def align_folded_encoder(weights: FoldedWeights, options: FoldedOptions) -> list[Tensor]:
    """``visual_weight`` and ``visual_bias`` with every section padded, so that each product's rows begin aligned.

    gate_bias is one column: without padding it shifts what follows and makes the rows' stride odd, and the fused ops
    would load one element at a time.
    """
    widths = list(visual_sections(weights, options).values())
    parts = zip(weights.visual_weight.split(widths), weights.visual_bias.split(widths), strict=True)
    padded = [(F.pad(w, (0, 0, 0, -len(w) % _ALIGNED)), F.pad(b, (0, -len(b) % _ALIGNED))) for w, b in parts]
    return [torch.cat(each) for each in zip(*padded, strict=True)]


def _aligned_products(packed: list[Tensor], visual: Tensor, w: FoldedWeights, o: FoldedOptions) -> dict[str, Tensor]:
    sections = visual_sections(w, o)
    products = F.linear(visual, *packed).split([width + -width % _ALIGNED for width in sections.values()], -1)
    named = zip(sections.items(), products, strict=True)
    return {name: product[..., :width] for (name, width), product in named}


@torch.no_grad()
def _triton_parts(video, triplets, similarity, groups, weights, options, packed, explain) -> FoldedOutput:
    packed = align_folded_encoder(weights, options) if packed is None else packed
    parts = FoldedParts(
        functools.partial(_aligned_products, packed),
        functools.partial(entropy_calibration, impl="triton"),
        functools.partial(factored_hidden, impl="triton"),
        _biased_emotion_attention,
        functools.partial(routing_aggregation, impl="triton"),
    )
    return _reference(video, triplets, similarity, groups, weights, options, None, explain, parts)


def _compiled(video, triplets, similarity, groups, weights, options, packed, explain) -> FoldedOutput:
    dtype = accumulate_dtype(weights.ffn_weight)
    features = [x if x is None else x.to(dtype) for x in (video, triplets, similarity)]
    packed = pack_folded_encoder(weights, options) if packed is None else packed
    op = torch.ops.evc_fast.folded_encoder_forward
    return _call(op, *features, groups, weights, options, packed, explain)


def _cuda(video, triplets, similarity, groups, weights, options, packed, explain) -> FoldedOutput:
    # The kernel reads float32 or the weights' type: to convert would be a launch of its own.
    if video.dtype not in (torch.float32, weights.ffn_weight.dtype):
        video = video.to(torch.float32)
    if options.retrieval:
        triplets = triplets.to(video.dtype)
    packed = pack_folded_encoder_cuda(weights, options) if packed is None else packed
    op = torch.ops.evc_fast.folded_encoder_cuda
    return _call(op, video, triplets, similarity, groups, weights, options, packed, explain)


def _call(op, video, triplets, similarity, groups, weights, options, packed, explain) -> FoldedOutput:
    tokens, emotion_logits, component, triplet, routing, distribution, fact_gate, emotion_gate = op(
        video,
        triplets,
        similarity,
        groups,
        packed,
        folded_sizes(weights, options),
        options.norm_eps,
        explain,
    )
    emotions = options.emotion_augmentation
    output = FoldedOutput(tokens, emotion_logits if emotions else None)
    if not explain:
        return output
    return output._replace(
        component_weights=component if options.retrieval else None,
        triplet_weights=triplet if options.retrieval else None,
        routing_weights=routing,
        emotion_distribution=distribution if emotions else None,
        fact_gate=fact_gate,
        emotion_gate=emotion_gate if emotions else None,
    )


_CALLABLES = {"cpp": _compiled, "cuda": _cuda, "triton": _triton_parts, "reference": _reference}


def _flags(options: FoldedOptions, projected: bool) -> list[int]:
    o = options
    flags = projected, o.retrieval, o.emotion_augmentation, o.bias_adjustment, o.emotion_first, o.video_router
    return [int(flag) for flag in (*flags, o.self_refine, o.cross_refine)]


def folded_sizes(weights: FoldedWeights, options: FoldedOptions) -> list[int]:
    """Sizes and flags in the order of csrc/folded_encoder.cpp."""
    w, o = weights, options
    d, hidden = w.ffn_weight.shape
    video_width = d if w.video_weight is None else w.video_weight.shape[1]
    words = 0 if w.key is None else w.key.shape[0]
    text_width = 0 if w.triplet_weight is None else w.triplet_weight.shape[1]
    sizes = [o.num_groups, words, d, o.num_heads, hidden, video_width, text_width, o.num_queries, len(w.output_weight)]
    return sizes + _flags(o, w.video_weight is not None)


@torch.no_grad()
def pack_folded_encoder(weights: FoldedWeights, options: FoldedOptions) -> list[Tensor]:
    """The weights in the order of ``FoldedWeight`` in csrc/ops.h: sections padded, matrices in panels; empty if absent.

    Raises:
        RuntimeError: the compiled library is absent.
        TypeError: the weights' type or device is not one that it takes.
    """
    w, o = weights, options
    d, heads = w.ffn_weight.shape[0], o.num_heads
    dtype = w.ffn_weight.dtype
    accumulate = accumulate_dtype(w.ffn_weight)
    visual = list(visual_sections(w, o).values())
    memory = [heads * o.num_queries, d]
    visual[-1:] = memory
    if o.emotion_augmentation:
        visual[-4:-2] = [d + 1]  # gate_key and gate_bias are one right operand

    def matrix(weight: Tensor | None, *sections: int) -> Tensor:
        if weight is None:
            return torch.empty(0, dtype=dtype)
        padded = _pad_rows(weight, sections)
        return pack_weight(padded.reshape(-1, *padded.shape[-2:])).flatten()

    def vector(bias: Tensor | None, *sections: int) -> Tensor:
        if bias is None:
            return torch.empty(0, dtype=accumulate)
        return _pad_rows(bias.to(accumulate)[:, None], sections).flatten()

    hidden = by_word = by_feature = gate = None
    if o.retrieval:
        hidden = w.hidden_weight.mT  # [heads, F + K K, d / heads]
    if o.emotion_augmentation:
        by_word = w.key.unflatten(1, (heads, -1)).transpose(0, 1)  # [heads, W, d / heads]
        by_feature = w.value.unflatten(1, (heads, -1)).permute(1, 2, 0)  # [heads, d / heads, W]
    if w.gate_weight is not None:  # it reads [pooled F ; pooled context], each padded
        gate = _pad_rows(w.gate_weight.T, [d] * (w.gate_weight.shape[1] // d)).T
    words = 0 if w.key is None else len(w.key)
    gates = [d] * (0 if gate is None else len(gate) // d)
    emotions = [d] * (0 if w.emotion_weight is None else len(w.emotion_weight) // d)
    router = [] if w.router_bias is None else [o.num_groups**2]
    parts = [
        matrix(w.video_weight, d),
        vector(w.video_bias, d),
        matrix(w.visual_weight, *visual),
        vector(w.visual_bias, *visual),
        matrix(w.triplet_weight, d, d),
        matrix(hidden, w.ffn_weight.shape[1], *router),
        torch.empty(0, dtype=accumulate) if w.router_bias is None else w.router_bias.to(accumulate),
        matrix(w.ffn_weight, d),
        vector(w.ffn_bias, d),
        vector(w.norm_weight, d),
        vector(w.norm_bias, d),
        matrix(w.emotion_query_weight, d),
        vector(w.emotion_query_bias, d),
        matrix(by_word, words),
        matrix(by_feature, d // heads),
        matrix(w.emotion_weight, *emotions),
        vector(w.emotion_bias, *emotions),
        matrix(gate, *gates),
        vector(w.gate_bias, *gates),
        matrix(w.head_weight, words),
        vector(w.head_bias, words),
        matrix(w.memory_weight, *memory),
        pack_weight(w.output_weight[None]).flatten(),
        w.output_bias.to(accumulate).flatten(),
    ]
    return _together(parts)


def _together(parts: list[Tensor]) -> list[Tensor]:
    """Copies of the parts, those of a type in one buffer: it is large enough for large pages, which no part may be."""
    sizes = [-(-part.nbytes // _LINE) * _LINE // part.element_size() for part in parts]
    copies = []
    totals: dict[torch.dtype, int] = {}
    for part, size in zip(parts, sizes, strict=True):
        totals[part.dtype] = totals.get(part.dtype, 0) + size
    like = parts[0]
    buffers = {dtype: torch.ops.evc_fast.weight_buffer(like.to(dtype), total) for dtype, total in totals.items()}
    used = dict.fromkeys(buffers, 0)
    for part, size in zip(parts, sizes, strict=True):
        begin = used[part.dtype]
        copies.append(buffers[part.dtype][begin : begin + part.numel()].copy_(part))
        used[part.dtype] = begin + size
    return copies


def _pad_rows(x: Tensor, sections: list[int] | tuple[int, ...]) -> Tensor:
    """Each section of the rows [..., rows, columns] followed by rows of zeros up to a multiple of _PAD."""
    parts = x.split(list(sections), -2)
    return torch.cat([F.pad(part, (0, 0, 0, -part.shape[-2] % _PAD)) for part in parts], -2).contiguous()


@functools.partial(torch.library.register_fake, f"{NAMESPACE}::folded_encoder_forward", lib=LIBRARY)
def _forward_fake(video, triplets, similarity, groups, weights, sizes, norm_eps, explain):
    k, words, d, _, _, _, _, queries, output_width, _, retrieval, emotions, *_ = sizes
    batch, frames, _ = video.shape
    stored = weights[7]  # the FFN's, which always exists: its type is that of all weights
    shown = batch if explain else 0
    return (
        stored.new_empty(batch, queries, output_width),
        stored.new_empty(batch if emotions else 0, words),
        video.new_empty(shown if retrieval else 0, k, 3),
        video.new_empty(shown if retrieval else 0, k),
        video.new_empty(shown, frames, k),
        video.new_empty(shown if emotions else 0, k, words),
        stored.new_empty(shown, d),
        stored.new_empty(shown if emotions else 0, d),
    )


@register_flop_formula([torch.ops.evc_fast.folded_encoder_forward, torch.ops.evc_fast.folded_encoder_cuda])
def _forward_flops(video_shape, triplets_shape, similarity_shape, groups_shape, weights_shape, sizes, *_, **__) -> int:
    """Matrix products without their padding, 2 FLOPs a multiply-add.

    The CUDA kernel multiplies W_v in, and executes more than is counted here, in fewer steps.
    """
    k, words, d, heads, hidden, video_width, text_width, queries, output_width, *flags = sizes
    projected, retrieval, emotions, adjusts, emotion_first, *_ = flags
    frames = video_shape[1]
    routed = retrieval and adjusts and k > 1
    rows, terms = k * frames, 3 * heads
    memory = heads * queries + d
    tokens = (2 if emotions else 1) * frames
    products = frames * video_width * d * projected
    products += frames * d * (hidden + memory + (retrieval or emotion_first) * d + emotions * (d + 1))
    if retrieval:
        of_triplet = hidden + k * k * routed
        products += 3 * k * (2 * d * text_width + d * of_triplet) + rows * (3 * d + terms * of_triplet)
    products += rows * hidden * d
    if emotions:
        attending = frames if emotion_first else rows
        products += attending * d * (2 * words + 2 * frames + (0 if emotion_first else d)) + d * words
        products += frames * d * d * (2 if emotion_first and retrieval else 1)
    products += adjusts * d * d * (4 if emotions else 1)
    products += tokens * d * memory + queries * d * (tokens + frames) + queries * d * output_width
    return 2 * video_shape[0] * products
