"""The FFN's hidden layer from its factors, gelu(P values + visual), in Triton: one launch forward, three backward.

Forward reads visual once for each triplet and writes the hidden layer once; the sum before GELU is never stored.
Backward makes it anew twice: for a video's frames, whose gradient sums over triplets, and for a triplet's values, whose
gradient sums over frames. The third launch adds the blocks' shares of P's gradient, in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from evc_fast.kernels import common

OP = "factored_hidden"
MAX_TERMS = 256
FRAMES = 16  # tl.dot multiplies 16 rows and 16 terms at least


@triton.jit
def _sum_before_gelu(weights, weights_n, values, visual, visual_n, n, N, column, F, T, TERMS: tl.constexpr):
    """P values + visual [frames n, features column] in float32, and P [frames, TERMS]. ``values``: [TERMS, columns]."""
    term = tl.arange(0, TERMS)
    p = tl.load(
        weights + n[:, None] * weights_n + term[None, :], mask=(n < N)[:, None] & (term < T)[None, :], other=0.0
    )
    inside = (n < N)[:, None] & (column < F)[None, :]
    v = tl.load(visual + n[:, None] * visual_n + column[None, :], mask=inside, other=0.0)
    return tl.dot(p, values, input_precision="ieee") + v.to(tl.float32), p, inside


@triton.jit
def _slope(z):
    """The derivative of GELU."""
    density = tl.exp(-0.5 * z * z) * 0.3989422804014327
    return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density


@triton.jit
def _values_of(values, values_t, column, F, T, TERMS: tl.constexpr):
    term = tl.arange(0, TERMS)
    inside = (term < T)[:, None] & (column < F)[None, :]
    return tl.load(values + term[:, None] * values_t + column[None, :], mask=inside, other=0.0)


@triton.jit
def _factored_hidden_fwd_kernel(
    weights,  # P [B, K, N, T]
    values,  # [B, K, T, F]
    visual,  # [B, N, F]
    hidden,  # [B, K, N, F], contiguous
    K,
    N,
    T,
    F,
    weights_b,
    weights_k,
    weights_n,
    values_b,
    values_k,
    values_t,
    visual_b,
    visual_n,
    TERMS: tl.constexpr,
    FRAMES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    b, k = pair // K, pair % K
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    weights += b * weights_b + k * weights_k
    visual += b * visual_b
    of_pair = _values_of(values + b * values_b + k * values_k, values_t, column, F, T, TERMS)
    for first in range(0, N, FRAMES):
        n = first + tl.arange(0, FRAMES).to(tl.int64)
        z, _, inside = _sum_before_gelu(weights, weights_n, of_pair, visual, visual_n, n, N, column, F, T, TERMS)
        y = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
        target = hidden + (pair * N + n)[:, None] * F + column[None, :]
        tl.store(target, y.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _factored_hidden_bwd_values_kernel(
    grad,  # [B, K, N, F]
    weights,  # P [B, K, N, T]
    values,  # [B, K, T, F]
    visual,  # [B, N, F]
    grad_values,  # [B, K, T, F], contiguous
    shares,  # of P's gradient: [feature blocks, B, K, N, T] float32, contiguous
    pairs,
    K,
    N,
    T,
    F,
    grad_b,
    grad_k,
    grad_n,
    weights_b,
    weights_k,
    weights_n,
    values_b,
    values_k,
    values_t,
    visual_b,
    visual_n,
    TERMS: tl.constexpr,
    FRAMES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    b, k = pair // K, pair % K
    block = tl.program_id(1).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    term = tl.arange(0, TERMS)
    grad += b * grad_b + k * grad_k
    weights += b * weights_b + k * weights_k
    visual += b * visual_b
    of_pair = _values_of(values + b * values_b + k * values_k, values_t, column, F, T, TERMS)
    total = tl.zeros([TERMS, COLUMNS], tl.float32)
    for first in range(0, N, FRAMES):
        n = first + tl.arange(0, FRAMES).to(tl.int64)
        z, p, inside = _sum_before_gelu(weights, weights_n, of_pair, visual, visual_n, n, N, column, F, T, TERMS)
        source = grad + n[:, None] * grad_n + column[None, :]
        grad_z = tl.load(source, mask=inside, other=0.0).to(tl.float32) * _slope(z)
        total += tl.dot(tl.trans(p.to(tl.float32)), grad_z, input_precision="ieee")
        share = tl.dot(grad_z, tl.trans(of_pair.to(tl.float32)), input_precision="ieee")
        target = shares + ((block * pairs + pair) * N + n)[:, None] * T + term[None, :]
        tl.store(target, share, mask=(n < N)[:, None] & (term < T)[None, :])
    target = grad_values + (pair * T + term)[:, None] * F + column[None, :]
    inside = (term < T)[:, None] & (column < F)[None, :]
    tl.store(target, total.to(grad_values.dtype.element_ty), mask=inside)


@triton.jit
def _factored_hidden_bwd_visual_kernel(
    grad,  # [B, K, N, F]
    weights,  # P [B, K, N, T]
    values,  # [B, K, T, F]
    visual,  # [B, N, F]
    grad_visual,  # [B, N, F], contiguous
    K,
    N,
    T,
    F,
    grad_b,
    grad_k,
    grad_n,
    weights_b,
    weights_k,
    weights_n,
    values_b,
    values_k,
    values_t,
    visual_b,
    visual_n,
    TERMS: tl.constexpr,
    FRAMES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    n = tl.program_id(2) * FRAMES + tl.arange(0, FRAMES).to(tl.int64)
    grad += b * grad_b
    weights += b * weights_b
    values += b * values_b
    visual += b * visual_b
    total = tl.zeros([FRAMES, COLUMNS], tl.float32)
    for _ in range(0, K):
        of_triplet = _values_of(values, values_t, column, F, T, TERMS)
        z, _, inside = _sum_before_gelu(weights, weights_n, of_triplet, visual, visual_n, n, N, column, F, T, TERMS)
        of_hidden = tl.load(grad + n[:, None] * grad_n + column[None, :], mask=inside, other=0.0)
        total += of_hidden.to(tl.float32) * _slope(z)
        grad += grad_k
        weights += weights_k
        values += values_k
    target = grad_visual + (b * N + n)[:, None] * F + column[None, :]
    tl.store(target, total.to(grad_visual.dtype.element_ty), mask=(n < N)[:, None] & (column < F)[None, :])


def forward(weights: Tensor, values: Tensor, visual: Tensor) -> Tensor:
    """hidden [B, K, N, F], as the op's schema says.

    Raises:
        TypeError: float64.
        ValueError: more than 256 terms.
    """
    row, tensors, sizes, constants = _prepare("forward", weights, values, visual)
    batch, count, frames, width = *weights.shape[:3], values.shape[-1]
    hidden = weights.new_empty(batch, count, frames, width)
    common.launch(
        _factored_hidden_fwd_kernel,
        (batch * count, triton.cdiv(width, constants["COLUMNS"])),
        *tensors,
        hidden,
        *sizes,
        *(s for t in tensors for s in t.stride()[:-1]),
        num_warps=row.warps,
        **constants,
    )
    return hidden


def backward(grad_hidden: Tensor, weights: Tensor, values: Tensor, visual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """grad_weights, grad_values and grad_visual; errors as of :func:`forward`."""
    row, tensors, sizes, constants = _prepare("backward", weights, values, visual)
    tensors = [common.with_adjacent_features(grad_hidden), *tensors]
    strides = [s for t in tensors for s in t.stride()[:-1]]
    batch, count, frames, width = grad_hidden.shape
    blocks = triton.cdiv(width, constants["COLUMNS"])
    grad_values, grad_visual = values.new_empty(values.shape), visual.new_empty(visual.shape)
    shares = weights.new_empty(blocks, *weights.shape, dtype=torch.float32)
    common.launch(
        _factored_hidden_bwd_values_kernel,
        (batch * count, blocks),
        *tensors,
        grad_values,
        shares,
        batch * count,
        *sizes,
        *strides,
        num_warps=row.warps,
        **constants,
    )
    common.launch(
        _factored_hidden_bwd_visual_kernel,
        (batch, blocks, triton.cdiv(frames, FRAMES)),
        *tensors,
        grad_visual,
        *sizes,
        *strides,
        num_warps=row.warps,
        **constants,
    )
    return shares.sum(0).to(weights.dtype), grad_values, grad_visual


def _prepare(
    direction: str, weights: Tensor, values: Tensor, visual: Tensor
) -> tuple[common.Row, list[Tensor], tuple[int, ...], dict[str, int]]:
    common.check_dtype(OP, "weights", weights)
    count, frames, terms = weights.shape[1:]
    common.check_at_most(OP, "terms", terms, MAX_TERMS)
    tensors = [common.with_adjacent_features(t) for t in (weights, values, visual)]
    padded = max(16, common.power_of_two(terms))
    row = common.parameters(f"{OP}_{direction}", values.size(-1), weights)
    # TILE elements of a triplet's values are on chip.
    tile = row.blocks["TILE"] // (2 if common.has_odd_strides(*tensors) else 1)
    columns = max(16, tile // padded)
    constants = {"TERMS": padded, "FRAMES": FRAMES, "COLUMNS": columns}
    return row, tensors, (count, frames, terms, values.shape[-1]), constants
