"""Progressive visual emotion augmentation, equations (19)-(21) of FACE-net."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from evc_fast.ops import dispatch
from evc_fast.ops._contract import autocast_inputs, check_arguments, describe, without_autocast
from evc_fast.ops._library import LIBRARY, NAMESPACE
from evc_fast.reference import emotion_attention as reference


def emotion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_query: Tensor,
    gate_key: Tensor,
    num_heads: int,
    *,
    impl: dispatch.Impl | None = None,
) -> Tensor:
    """Attend from every fact to the emotion dictionary, then gather the candidates by a visual gate over frames.

    X = concat over heads of softmax(query_h key_h^T / sqrt(d / num_heads)) value_h (19);
    context = softmax(gate_query gate_key^T) X, the gate unscaled (20), (21). Scores never reach memory.

    Args:
        query: [B, K, N, d] projected facts; float32, bfloat16, float16 or float64, as all tensors here.
        key, value: [W, d] projected dictionary, shared by the batch.
        gate_query: [B, K, N, d] phi_F of the facts.
        gate_key: [B, N, d] phi_V of the frames.
        num_heads: divides d.
        impl: "reference" (second derivatives and forward mode too), "cpp", "triton", "cuda" (no gradients), or ``None``
            for the fastest.

    Returns:
        context [B, K, N, d], before the output projection and phi_E; differentiable in all five tensors.

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, size or device.
        RuntimeError: ``impl`` cannot run here.
    """
    tokens = ("B", "K", "N", "d")
    check_arguments(
        "emotion_attention",
        [
            ("query", query, tokens),
            ("key", key, ("W", "d")),
            ("value", value, ("W", "d")),
            ("gate_query", gate_query, tokens),
            ("gate_key", gate_key, ("B", "N", "d")),
        ],
    )
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"emotion_attention: num_heads must be an int; got {type(num_heads).__name__}")
    if num_heads < 1 or query.size(-1) % num_heads:
        raise ValueError(f"emotion_attention: num_heads must divide d; got {num_heads} for query {describe(query)}")
    tensors = autocast_inputs(query, key, value, gate_query, gate_key)
    run = dispatch.select("emotion_attention", impl, tensors, _CALLABLES)
    with without_autocast(query):
        return run(*tensors, num_heads)


def _compiled(
    query: Tensor, key: Tensor, value: Tensor, gate_query: Tensor, gate_key: Tensor, num_heads: int
) -> Tensor:
    return torch.ops.evc_fast.emotion_attention_forward(query, key, value, gate_query, gate_key, num_heads, False)[0]


def _inference(
    query: Tensor, key: Tensor, value: Tensor, gate_query: Tensor, gate_key: Tensor, num_heads: int
) -> Tensor:
    return torch.ops.evc_fast.emotion_attention_inference(query, key, value, gate_query, gate_key, num_heads)


_CALLABLES = {"cpp": _compiled, "triton": _compiled, "cuda": _inference, "reference": reference}


class _EmotionAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, gate_query, gate_key, num_heads, keep_candidates):
        with torch._C._AutoDispatchBelowAutograd():
            context, candidates = torch.ops.evc_fast.emotion_attention_forward(
                query, key, value, gate_query, gate_key, num_heads, keep_candidates
            )
        ctx.save_for_backward(query, key, value, gate_query, gate_key, candidates)
        ctx.num_heads = num_heads
        ctx.mark_non_differentiable(candidates)
        return context, candidates

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_context, _candidates):
        grads = torch.ops.evc_fast.emotion_attention_backward(grad_context, *ctx.saved_tensors, ctx.num_heads)
        return *grads, None, None


def _autograd(query, key, value, gate_query, gate_key, num_heads, keep_candidates):
    tensors = query, key, value, gate_query, gate_key
    # Backward reads the candidates X: they are of the inputs' size, the scores they come from are not.
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    context, candidates = _EmotionAttention.apply(*tensors, num_heads, keep_candidates or training)
    return context, candidates.new_empty(0) if training and not keep_candidates else candidates


LIBRARY.impl("emotion_attention_forward", _autograd, "Autograd")


@functools.partial(torch.library.register_fake, f"{NAMESPACE}::emotion_attention_forward", lib=LIBRARY)
def _forward_fake(query, key, value, gate_query, gate_key, num_heads, keep_candidates):
    return query.new_empty(query.shape), query.new_empty(query.shape if keep_candidates else (0,))


@functools.partial(torch.library.register_fake, f"{NAMESPACE}::emotion_attention_inference", lib=LIBRARY)
def _inference_fake(query, key, value, gate_query, gate_key, num_heads):
    return query.new_empty(query.shape)


@functools.partial(torch.library.register_fake, f"{NAMESPACE}::emotion_attention_backward", lib=LIBRARY)
def _backward_fake(grad_context, query, key, value, gate_query, gate_key, candidates, num_heads):
    return tuple(t.new_empty(t.shape) for t in (query, key, value, gate_query, gate_key))


# What FlopCounterMode counts: matrix products, 2 FLOPs a multiply-add. The other two ops hold none.


def _product_flops(query_shape, key_shape) -> tuple[int, int]:
    """One product with the dictionary, and one with the frames."""
    batch, triplets, frames, width = query_shape
    rows = batch * triplets * frames
    return 2 * rows * key_shape[0] * width, 2 * rows * frames * width


@register_flop_formula(torch.ops.evc_fast.emotion_attention_inference)
@register_flop_formula(torch.ops.evc_fast.emotion_attention_forward)
def _forward_flops(query_shape, key_shape, *_, **__) -> int:
    dictionary, gate = _product_flops(query_shape, key_shape)
    return 2 * dictionary + 2 * gate  # Q K^T and P V; G_q G_k^T and G X


@register_flop_formula(torch.ops.evc_fast.emotion_attention_backward)
def _backward_flops(_grad_shape, query_shape, key_shape, *_, **__) -> int:
    dictionary, gate = _product_flops(query_shape, key_shape)
    return 5 * dictionary + 5 * gate  # the scores once more, and four gradients of each pair of products
