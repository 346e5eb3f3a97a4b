"""The FFN's hidden layer of equation (18) of FACE-net, H in factors."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from evc_fast.ops import dispatch
from evc_fast.ops._contract import autocast_inputs, check_arguments, without_autocast
from evc_fast.ops._library import LIBRARY, NAMESPACE
from evc_fast.reference import factored_hidden as reference


def factored_hidden(weights: Tensor, values: Tensor, visual: Tensor, *, impl: dispatch.Impl | None = None) -> Tensor:
    """GELU of [V ; H_i] W_1 + b_1 where H_i = P_i v_i has low rank: one pass forward, one backward.

    hidden = gelu(weights values + visual), GELU exact. Backward makes the sum anew instead of keeping it.

    Args:
        weights: P [B, K, N, T], attention of each frame over a triplet's T = 3 heads values; float32, bfloat16, float16
            or float64, as all tensors here.
        values: [B, K, T, F], the values through W_o and the H half of W_1.
        visual: [B, N, F], the V half and all constants, the same for all K.
        impl: "reference" (second derivatives and forward mode too), "cpp", or ``None`` for the fastest.

    Returns:
        [B, K, N, F], differentiable in all three tensors.

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, size or device.
        RuntimeError: ``impl`` cannot run here.
    """
    check_arguments(
        "factored_hidden",
        [
            ("weights", weights, ("B", "K", "N", "T")),
            ("values", values, ("B", "K", "T", "F")),
            ("visual", visual, ("B", "N", "F")),
        ],
    )
    tensors = autocast_inputs(weights, values, visual)
    run = dispatch.select("factored_hidden", impl, tensors, _CALLABLES)
    with without_autocast(weights):
        return run(*tensors)


def _compiled(weights: Tensor, values: Tensor, visual: Tensor) -> Tensor:
    return torch.ops.evc_fast.factored_hidden_forward(weights, values, visual)


_CALLABLES = {"cpp": _compiled, "triton": _compiled, "reference": reference}


class _FactoredHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, values, visual):
        with torch._C._AutoDispatchBelowAutograd():
            hidden = _compiled(weights, values, visual)
        ctx.save_for_backward(weights, values, visual)
        return hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_hidden):
        return torch.ops.evc_fast.factored_hidden_backward(grad_hidden, *ctx.saved_tensors)


LIBRARY.impl("factored_hidden_forward", _FactoredHidden.apply, "Autograd")


@functools.partial(torch.library.register_fake, f"{NAMESPACE}::factored_hidden_forward", lib=LIBRARY)
def _forward_fake(weights, values, visual):
    return weights.new_empty(*weights.shape[:3], values.shape[3])


@functools.partial(torch.library.register_fake, f"{NAMESPACE}::factored_hidden_backward", lib=LIBRARY)
def _backward_fake(grad_hidden, weights, values, visual):
    return tuple(t.new_empty(t.shape) for t in (weights, values, visual))


@register_flop_formula(torch.ops.evc_fast.factored_hidden_forward)
def _forward_flops(weights_shape, values_shape, *_, **__) -> int:
    batch, triplets, frames, terms = weights_shape
    return 2 * batch * triplets * frames * terms * values_shape[3]


@register_flop_formula(torch.ops.evc_fast.factored_hidden_backward)
def _backward_flops(_grad_shape, weights_shape, values_shape, *_, **__) -> int:
    return 3 * _forward_flops(weights_shape, values_shape)  # the sum once more, and both factors' gradients
