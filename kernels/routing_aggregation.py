"""Dynamic bias routing, equations (22), (23), (26) and the sums of (27), in Triton: one launch forward, one backward.

Forward: a program is some features of the facts or of the emotions of one video, for all its triplets and frames, so
that both are read once. Backward: a program is some frames of one video, with all features.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from evc_fast.kernels import common

OP = "routing_aggregation"


@triton.jit
def _routing_aggregation_fwd_kernel(
    facts,  # [B, K, N, D]
    emotions,  # [B, K, N, D]
    logits,  # [B, N, K] float32
    routed,  # [B, 2N, D], contiguous
    pooled,  # [B, 2D], contiguous
    weights,  # [B, N, K] float32, contiguous
    N,
    K,
    facts_b,
    facts_k,
    facts_n,
    emotions_b,
    emotions_k,
    emotions_n,
    logits_b,
    logits_n,
    logits_k,
    D: tl.constexpr,
    UNIT: tl.constexpr,  # of the strides of facts and emotions
    MANY: tl.constexpr,  # whether there are more frames than FRAMES
    TRIPLETS: tl.constexpr,
    FRAMES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    of_emotions = tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    wide = column < D
    if of_emotions == 0:
        x = facts + b * facts_b * UNIT
        x_k, x_n = facts_k, facts_n
    else:
        x = emotions + b * emotions_b * UNIT
        x_k, x_n = emotions_k, emotions_n
    logits += b * logits_b
    routed += (2 * b + of_emotions) * N * D
    keeps_weights = (of_emotions == 0) & (tl.program_id(2) == 0)
    pool = tl.zeros([FRAMES, COLUMNS], tl.float32)
    lost = tl.zeros([FRAMES, COLUMNS], tl.float32)
    for first_frame in range(0, N, FRAMES):
        n = (first_frame + tl.arange(0, FRAMES)).to(tl.int64)
        top = tl.full([FRAMES], float("-inf"), tl.float32)
        for first in range(0, K, TRIPLETS):
            k = first + tl.arange(0, TRIPLETS)
            real = (k < K)[:, None] & (n < N)[None, :]
            scores = tl.load(logits + k[:, None] * logits_k + n[None, :] * logits_n, mask=real, other=float("-inf"))
            top = tl.maximum(top, tl.max(scores, 0))
        top = tl.where(n < N, top, 0.0)
        total = tl.zeros([FRAMES], tl.float32)
        for first in range(0, K, TRIPLETS):
            k = first + tl.arange(0, TRIPLETS)
            real = (k < K)[:, None] & (n < N)[None, :]
            scores = tl.load(logits + k[:, None] * logits_k + n[None, :] * logits_n, mask=real, other=float("-inf"))
            total += tl.sum(tl.exp(scores - top[None, :]), 0)
        total = tl.where(n < N, total, 1.0)
        sums = tl.zeros([FRAMES, COLUMNS], tl.float32)
        weighted = tl.zeros([FRAMES, COLUMNS], tl.float32)
        for first in range(0, K, TRIPLETS):
            k = (first + tl.arange(0, TRIPLETS)).to(tl.int64)
            real = (k < K)[:, None] & (n < N)[None, :]
            scores = tl.load(logits + k[:, None] * logits_k + n[None, :] * logits_n, mask=real, other=float("-inf"))
            w = tl.exp(scores - top[None, :]) / total[None, :]  # (26)
            tl.store(weights + b * N * K + n[None, :] * K + k[:, None], w, mask=real & keeps_weights)
            source = x + (k[:, None] * x_k + n[None, :] * x_n)[:, :, None] * UNIT + column[None, None, :]
            tile = tl.load(source, mask=real[:, :, None] & wide[None, None, :], other=0.0).to(tl.float32)
            sums += tl.sum(tile, 0)
            weighted += tl.sum(w[:, :, None] * tile, 0)
        target = routed + n[:, None] * D + column[None, :]
        tl.store(target, weighted.to(routed.dtype.element_ty), mask=(n < N)[:, None] & wide[None, :])  # (27)
        if MANY:  # Kahan's sum
            more = sums - lost
            next_pool = pool + more
            lost = (next_pool - pool) - more
            pool = next_pool
        else:
            pool = sums
    mean = tl.sum(pool, 0) / (K * N)  # (22), (23)
    tl.store(pooled + (2 * b + of_emotions) * D + column, mean.to(pooled.dtype.element_ty), mask=wide)


@triton.jit
def _routing_aggregation_bwd_kernel(
    grad_routed,  # [B, 2N, D]
    grad_pooled,  # [B, 2D]
    facts,  # [B, K, N, D]
    emotions,  # [B, K, N, D]
    weights,  # [B, N, K] float32, sums to 1 over K
    grad_facts,  # [B, K, N, D], contiguous
    grad_emotions,  # [B, K, N, D], contiguous
    grad_logits,  # [B, N, K] float32, contiguous
    N,
    K,
    grad_routed_b,
    grad_routed_n,
    grad_pooled_b,
    facts_b,
    facts_k,
    facts_n,
    emotions_b,
    emotions_k,
    emotions_n,
    weights_b,
    weights_n,
    weights_k,
    D: tl.constexpr,
    UNIT: tl.constexpr,  # of the strides of grad_routed, grad_pooled, facts and emotions
    BLOCKS: tl.constexpr,  # of TRIPLETS
    TRIPLETS: tl.constexpr,
    FRAMES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    n = (tl.program_id(1) * FRAMES + tl.arange(0, FRAMES)).to(tl.int64)
    mean = tl.zeros([FRAMES], tl.float32)
    weights += b * weights_b
    grad_logits += b * N * K
    for block in range(BLOCKS):
        k = (block * TRIPLETS + tl.arange(0, TRIPLETS)).to(tl.int64)
        real = (k < K)[:, None] & (n < N)[None, :]
        w = tl.load(weights + k[:, None] * weights_k + n[None, :] * weights_n, mask=real, other=0.0)
        grad_w = tl.zeros([TRIPLETS, FRAMES], tl.float32)
        # Hoisted, the addresses of x and grad_x would take all registers.
        for first in tl.range(0, D, COLUMNS, disable_licm=True):
            column = first + tl.arange(0, COLUMNS)
            wide = column < D
            inside = real[:, :, None] & wide[None, None, :]
            for of_emotions in tl.static_range(2):
                if of_emotions == 0:
                    x = facts + (b * facts_b + k[:, None] * facts_k + n[None, :] * facts_n)[:, :, None] * UNIT
                    grad_x = grad_facts
                else:
                    rows = b * emotions_b + k[:, None] * emotions_k + n[None, :] * emotions_n
                    x = emotions + rows[:, :, None] * UNIT
                    grad_x = grad_emotions
                row = grad_routed + (b * grad_routed_b + (of_emotions * N + n) * grad_routed_n)[:, None] * UNIT
                grad = tl.load(row + column[None, :], mask=(n < N)[:, None] & wide[None, :], other=0.0).to(tl.float32)
                pool = grad_pooled + b * grad_pooled_b * UNIT + of_emotions * D + column
                shared = tl.load(pool, mask=wide, other=0.0).to(tl.float32) / (K * N)
                tile = tl.load(x + column[None, None, :], mask=inside, other=0.0).to(tl.float32)
                grad_w += tl.sum(tile * grad[None, :, :], 2)
                grad_tile = w[:, :, None] * grad[None, :, :] + shared[None, None, :]
                target = grad_x + ((b * K + k)[:, None] * N + n[None, :])[:, :, None] * D + column[None, None, :]
                tl.store(target, grad_tile.to(grad_x.dtype.element_ty), mask=inside)
        mean += tl.sum(w * grad_w, 0)
        target = grad_logits + n[None, :] * K + k[:, None]
        if BLOCKS == 1:
            tl.store(target, w * (grad_w - mean[None, :]), mask=real)
        else:
            tl.store(target, grad_w, mask=real)
    if BLOCKS > 1:
        tl.debug_barrier()  # other threads of this program read them
        for block in range(BLOCKS):
            k = (block * TRIPLETS + tl.arange(0, TRIPLETS)).to(tl.int64)
            real = (k < K)[:, None] & (n < N)[None, :]
            w = tl.load(weights + k[:, None] * weights_k + n[None, :] * weights_n, mask=real, other=0.0)
            target = grad_logits + n[None, :] * K + k[:, None]
            grad_w = tl.load(target, mask=real, other=0.0)
            tl.store(target, w * (grad_w - mean[None, :]), mask=real)


def forward(facts: Tensor, emotions: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """routed [B, 2N, d], pooled [B, 2d] and weights [B, N, K], as the op's schema says.

    Raises:
        TypeError: float64.
    """
    common.check_dtype(OP, "facts", facts)
    facts, emotions = map(common.with_adjacent_features, (facts, emotions))
    batch, count, frames, width = facts.shape
    row = common.parameters(f"{OP}_forward", width, facts)
    routed = facts.new_empty(batch, 2 * frames, width)
    pooled = facts.new_empty(batch, 2 * width)
    weights = logits.new_empty(logits.shape)
    unit = common.stride_unit(facts, emotions)
    tile_frames = min(common.power_of_two(frames), row.blocks["FRAMES"])
    columns = min(common.power_of_two(width), row.blocks["COLUMNS"])
    common.launch(
        _routing_aggregation_fwd_kernel,
        (batch, 2, triton.cdiv(width, columns)),
        facts,
        emotions,
        logits,
        routed,
        pooled,
        weights,
        frames,
        count,
        *(s // unit for t in (facts, emotions) for s in t.stride()[:-1]),
        *logits.stride(),
        D=width,
        UNIT=unit,
        MANY=frames > tile_frames,
        TRIPLETS=min(common.power_of_two(count), row.blocks["TRIPLETS"]),
        FRAMES=tile_frames,
        COLUMNS=columns,
        num_warps=row.warps,
        registers=row.registers,
    )
    return routed, pooled, weights


def backward(
    grad_routed: Tensor, grad_pooled: Tensor, facts: Tensor, emotions: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_facts and grad_emotions [B, K, N, d], grad_logits [B, N, K].

    Raises:
        TypeError: float64.
    """
    common.check_dtype(OP, "facts", facts)
    batch, count, frames, width = facts.shape
    row = common.parameters(f"{OP}_backward", width, facts)
    wide = grad_routed, grad_pooled, facts, emotions = [
        common.with_adjacent_features(t) for t in (grad_routed, grad_pooled, facts, emotions)
    ]
    grad_facts, grad_emotions = facts.new_empty(facts.shape), facts.new_empty(facts.shape)
    grad_logits = weights.new_empty(weights.shape)
    unit = common.stride_unit(*wide)
    triplets = min(common.power_of_two(count), row.blocks["TRIPLETS"])
    columns = min(common.power_of_two(width), max(row.blocks["COLUMNS"] // triplets, 16))
    tile = row.blocks["TILE"] // (4 if common.has_odd_strides(*wide) else 1)
    tile_frames = min(common.power_of_two(frames), max(tile // (triplets * columns), 1))
    common.launch(
        _routing_aggregation_bwd_kernel,
        (batch, triton.cdiv(frames, tile_frames)),
        *wide,
        weights,
        grad_facts,
        grad_emotions,
        grad_logits,
        frames,
        count,
        *(s // unit for t in wide for s in t.stride()[:-1]),
        *weights.stride(),
        D=width,
        UNIT=unit,
        BLOCKS=triton.cdiv(count, triplets),
        TRIPLETS=triplets,
        FRAMES=tile_frames,
        COLUMNS=columns,
        num_warps=row.warps,
    )
    return grad_facts, grad_emotions, grad_logits
