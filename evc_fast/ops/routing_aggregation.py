"""Dynamic bias routing, equations (22), (23), (26) and the sums of (27) of FACE-net."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from evc_fast.ops import dispatch
from evc_fast.ops._contract import autocast_inputs, check_arguments, without_autocast
from evc_fast.ops._library import LIBRARY, NAMESPACE
from evc_fast.reference import routing_aggregation as reference
from evc_fast.reference._dtypes import accumulate_dtype


def routing_aggregation(
    facts: Tensor, emotions: Tensor, logits: Tensor, *, impl: dispatch.Impl | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum facts and emotions over triplets by routing weights, and pool them for the gates, in one pass.

    weights = softmax(logits) over K (26); routed = [sum_k weights_k F_k ; sum_k weights_k E_k] on tokens (27), before
    the gates; pooled = [mean over K and N of F ; the same of E] (22), (23).

    Args:
        facts, emotions: [B, K, N, d]; float32, bfloat16, float16 or float64.
        logits: [B, N, K]; the type of ``facts``, or float32 beside bfloat16 and float16.
        impl: "reference" (second derivatives and forward mode too), "cpp", "triton", "cuda" (no gradients), or ``None``
            for the fastest.

    Returns:
        routed: [B, 2N, d], facts first, the type of ``facts``; differentiable in all three tensors.
        pooled: [B, 2d], facts first, likewise.
        weights: [B, N, K], float32 (float64 for float64), not differentiable.

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, size or device.
        RuntimeError: ``impl`` cannot run here.
    """
    tokens = ("B", "K", "N", "d")
    check_arguments(
        "routing_aggregation",
        [("facts", facts, tokens), ("emotions", emotions, tokens), ("logits*", logits, ("B", "N", "K"))],
    )
    facts, emotions = autocast_inputs(facts, emotions)
    logits = logits.to(accumulate_dtype(facts))
    run = dispatch.select("routing_aggregation", impl, [facts, emotions, logits], _CALLABLES)
    with without_autocast(facts):
        return run(facts, emotions, logits)


def _compiled(facts: Tensor, emotions: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.evc_fast.routing_aggregation_forward(facts, emotions, logits)


def _inference(facts: Tensor, emotions: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.evc_fast.routing_aggregation_inference(facts, emotions, logits)


_CALLABLES = {"cpp": _compiled, "triton": _compiled, "cuda": _inference, "reference": reference}


class _RoutingAggregation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, facts, emotions, logits):
        with torch._C._AutoDispatchBelowAutograd():
            routed, pooled, weights = _compiled(facts, emotions, logits)
        ctx.save_for_backward(facts, emotions, weights)
        ctx.mark_non_differentiable(weights)
        return routed, pooled, weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_routed, grad_pooled, _weights):
        return torch.ops.evc_fast.routing_aggregation_backward(grad_routed, grad_pooled, *ctx.saved_tensors)


LIBRARY.impl("routing_aggregation_forward", _RoutingAggregation.apply, "Autograd")


@functools.partial(torch.library.register_fake, f"{NAMESPACE}::routing_aggregation_inference", lib=LIBRARY)
@functools.partial(torch.library.register_fake, f"{NAMESPACE}::routing_aggregation_forward", lib=LIBRARY)
def _forward_fake(facts, emotions, logits):
    batch, _, frames, width = facts.shape
    return (
        facts.new_empty(batch, 2 * frames, width),
        facts.new_empty(batch, 2 * width),
        logits.new_empty(logits.shape),
    )


@functools.partial(torch.library.register_fake, f"{NAMESPACE}::routing_aggregation_backward", lib=LIBRARY)
def _backward_fake(grad_routed, grad_pooled, facts, emotions, weights):
    return facts.new_empty(facts.shape), facts.new_empty(facts.shape), weights.new_empty(weights.shape)
