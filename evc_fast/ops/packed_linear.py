"""Products with fixed weights, packed once for this machine: activation(x W^T + b) + residual in one pass."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from evc_fast.ops._contract import check_arguments, describe
from evc_fast.ops._library import EXTENSION_MISSING, LIBRARY, NAMESPACE
from evc_fast.ops.dispatch import CPP_DTYPES
from evc_fast.reference._dtypes import accumulate_dtype

Activation = Literal["none", "gelu", "quick_gelu"]
_ACTIVATIONS = ("none", "gelu", "quick_gelu")  # the order of csrc/ops.h


class PackedLinear:
    """A linear map with fixed weights, for inference on the CPU; ``F.linear`` and the activation say what it means.

    Unlike the ops it has no reference to fall back on: packed weights exist for the compiled kernel alone.

    Args:
        weight: [out, in]; float32, bfloat16 or float64, on the CPU. Its type is the storage of the packed weights;
            inputs, bias and outputs have the type it accumulates in: float32, float64 for float64. Where the processor
            multiplies bfloat16 (AVX512-BF16), inputs of bfloat16 weights are rounded to it first.
        bias: [out] or None, any floating type.
        activation: applied to product and bias: "none", "gelu" (exact) or "quick_gelu" (x sigmoid(1.702 x)).

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, size or device.
        RuntimeError: the compiled library is absent.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, activation: Activation = "none") -> None:
        check_arguments("packed_linear", [("weight", weight, ("out", "in"))])
        if activation not in _ACTIVATIONS:
            raise ValueError(f"packed_linear: activation must be one of {_ACTIVATIONS}; got {activation!r}")
        self.out_features, self.in_features = weight.shape
        self.packed = pack_weight(weight.detach()[None])
        self.dtype = accumulate_dtype(weight)
        if bias is not None:
            _check("bias", bias, (self.out_features,), None)
            bias = bias.detach().to(self.dtype, copy=True)
        self.bias = bias
        self.activation = _ACTIVATIONS.index(activation)

    @torch.no_grad()
    def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input [..., in] -> [..., out]; ``residual`` [..., out] is added last. No gradients.

        Raises:
            TypeError, ValueError: type, size or device do not fit.
        """
        lead = input.shape[:-1] if isinstance(input, Tensor) else ()
        _check("input", input, (*lead, self.in_features), self.dtype)
        rows = input.reshape(-1, self.in_features)
        if residual is not None:
            _check("residual", residual, (*lead, self.out_features), self.dtype)
            residual = residual.reshape(-1, self.out_features)
        output = torch.ops.evc_fast.packed_linear(
            rows, self.packed, self.bias, residual, self.out_features, self.activation
        )
        return output.view(*lead, self.out_features)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """Raise one sentence where ``tensor`` is not of this shape and type (None: any floating one) on the CPU."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"packed_linear: {name} must be a tensor {list(shape)}; got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"packed_linear: {name} must be {list(shape)}; got {describe(tensor)}")
    if tensor.device.type != "cpu":
        raise ValueError(f"packed_linear: {name} must be on the CPU; it is on {tensor.device}")
    if not tensor.is_floating_point() or (dtype is not None and tensor.dtype != dtype):
        raise TypeError(f"packed_linear: {name} must be {dtype or 'floating'}; got {describe(tensor)}")


def pack_weight(weight: Tensor) -> Tensor:
    """[groups, out, in] on the CPU -> [groups, n], panels in the layout of this machine's instruction set.

    Raises:
        RuntimeError: the compiled library is absent; the message says what mends it.
        TypeError, ValueError: wrong type, rank, size or device.
    """
    if EXTENSION_MISSING:
        raise RuntimeError(f"packed weights need the compiled library: {EXTENSION_MISSING}")
    check_arguments("pack_weight", [("weight", weight, ("groups", "out", "in"))])
    if weight.device.type != "cpu" or weight.dtype not in CPP_DTYPES:
        raise TypeError(
            f"pack_weight: weight must be float32, bfloat16 or float64 on the CPU; got {describe(weight)} on "
            f"{weight.device}"
        )
    return torch.ops.evc_fast.pack_weight(weight)


@functools.partial(torch.library.register_fake, f"{NAMESPACE}::packed_linear", lib=LIBRARY)
def _linear_fake(input, packed, bias, residual, columns, activation):
    return input.new_empty(input.shape[0], columns)


@register_flop_formula(torch.ops.evc_fast.packed_linear)
def _linear_flops(input_shape, packed_shape, bias_shape, residual_shape, columns, *_, **__) -> int:
    return 2 * input_shape[0] * input_shape[1] * columns
