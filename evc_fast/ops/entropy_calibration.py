"""Factual calibration via uncertainty estimation, equations (10)-(16) of FACE-net."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from evc_fast.ops import dispatch
from evc_fast.ops._contract import autocast_inputs, check_arguments, without_autocast
from evc_fast.ops._library import LIBRARY, NAMESPACE
from evc_fast.reference import entropy_calibration as reference
from evc_fast.reference._dtypes import accumulate_dtype


def entropy_calibration(
    triplets: Tensor,
    similarity: Tensor,
    groups: Tensor | None = None,
    *,
    self_refine: bool = True,
    cross_refine: bool = True,
    impl: dispatch.Impl | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weigh the components of each triplet, and the triplets of each video, by their uncertainty.

    With p = softmax(T_i^c) over features, h_i^c = -sum p log p and s = max(similarity, 1e-6):
    alpha_i^c = h_i^c / sum_c h_i^c (1/3 where the sum is 0); p_i = the share of i's group in sum s;
    theta_i = p_i log p_i / sum_j p_j log p_j (1/K where all triplets are one group);
    calibrated_i^c = theta_i alpha_i^c T_i^c.

    Args:
        triplets: [B, K, 3, D] features of subject, predicate and object; float32, bfloat16, float16 or float64.
        similarity: [B, K] cosine of video and caption; the type of ``triplets``, or float32 beside 16-bit ones.
        groups: [B, K] int64, equal ids for triplets that say the same; ``None``: all distinct.
        self_refine: weigh components by alpha; else 1/3 each.
        cross_refine: weigh triplets by theta; else 1/K each.
        impl: "reference" (second derivatives and forward mode too), "cpp", "triton", "cuda" (no gradients), or ``None``
            for the fastest.

    Returns:
        calibrated: [B, K, 3, D], the type of ``triplets``; differentiable in ``triplets`` and ``similarity``.
        component_weights: alpha [B, K, 3], float32 (float64 for float64), not differentiable.
        triplet_weights: theta [B, K], likewise.

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, size or device.
        RuntimeError: ``impl`` cannot run here.
    """
    for name, flag in (("self_refine", self_refine), ("cross_refine", cross_refine)):
        if not isinstance(flag, bool):
            raise TypeError(f"entropy_calibration: {name} must be a bool; got {type(flag).__name__}")
    arguments = [("triplets", triplets, ("B", "K", "3", "D")), ("similarity*", similarity, ("B", "K"))]
    if groups is not None:
        arguments.append(("groups", groups, ("B", "K")))
    check_arguments("entropy_calibration", arguments)
    (triplets,) = autocast_inputs(triplets)
    similarity = similarity.to(accumulate_dtype(triplets))
    run = dispatch.select("entropy_calibration", impl, [triplets, similarity], _CALLABLES)
    with without_autocast(triplets):
        return run(triplets, similarity, groups, self_refine=self_refine, cross_refine=cross_refine)


def _compiled(
    triplets: Tensor, similarity: Tensor, groups: Tensor | None, *, self_refine: bool, cross_refine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.evc_fast.entropy_calibration_forward(triplets, similarity, groups, self_refine, cross_refine)


def _inference(
    triplets: Tensor, similarity: Tensor, groups: Tensor | None, *, self_refine: bool, cross_refine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.evc_fast.entropy_calibration_inference(triplets, similarity, groups, self_refine, cross_refine)


_CALLABLES = {"cpp": _compiled, "triton": _compiled, "cuda": _inference, "reference": reference}


class _EntropyCalibration(torch.autograd.Function):
    @staticmethod
    def forward(ctx, triplets, similarity, groups, self_refine, cross_refine):
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _compiled(triplets, similarity, groups, self_refine=self_refine, cross_refine=cross_refine)
        ctx.save_for_backward(triplets, similarity, groups)
        ctx.refine = self_refine, cross_refine
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_calibrated, _component_weights, _triplet_weights):
        grads = torch.ops.evc_fast.entropy_calibration_backward(grad_calibrated, *ctx.saved_tensors, *ctx.refine)
        return *grads, None, None, None


LIBRARY.impl("entropy_calibration_forward", _EntropyCalibration.apply, "Autograd")


@functools.partial(torch.library.register_fake, f"{NAMESPACE}::entropy_calibration_inference", lib=LIBRARY)
@functools.partial(torch.library.register_fake, f"{NAMESPACE}::entropy_calibration_forward", lib=LIBRARY)
def _forward_fake(triplets, similarity, groups, self_refine, cross_refine):
    return (
        torch.empty_like(triplets, memory_format=torch.contiguous_format),
        similarity.new_empty(triplets.shape[:3]),
        similarity.new_empty(similarity.shape),
    )


@functools.partial(torch.library.register_fake, f"{NAMESPACE}::entropy_calibration_backward", lib=LIBRARY)
def _backward_fake(grad_calibrated, triplets, similarity, groups, self_refine, cross_refine):
    return (
        torch.empty_like(triplets, memory_format=torch.contiguous_format),
        similarity.new_empty(similarity.shape),
    )
