"""Factual calibration, equations (10)-(16), in Triton: one launch forward, one backward.

Forward: a program is one triplet. Backward: a program is one video, whose triplets' weights depend on each other.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from evc_fast.kernels import common
from evc_fast.kernels.common import exp_nonpositive, log1p

OP = "entropy_calibration"
MAX_TRIPLETS = 1024
MIN_SIMILARITY = tl.constexpr(1e-6)


@triton.jit
def _clamped(similarity):
    return tl.where(similarity < MIN_SIMILARITY, MIN_SIMILARITY, similarity)  # tl.maximum would lose a NaN


@triton.jit
def _shares(similarity, similarity_stride, groups, groups_stride, K, HAS_GROUPS: tl.constexpr, TRIPLETS: tl.constexpr):
    """(14) for one video: p [TRIPLETS], what is missing from p to 1, p's logarithm, and whether all is one group.

    The rest is summed on its own: where one similarity outweighs all others, 1 - p has lost its digits.
    """
    index = tl.arange(0, TRIPLETS)
    ids = index.to(tl.int64)  # without groups each triplet is its own
    if HAS_GROUPS:
        ids = tl.load(groups + index * groups_stride, mask=index < K, other=0)
    same = ids == 0
    if HAS_GROUPS:
        same = ids == tl.load(groups)
    single = tl.sum((same | (index >= K)).to(tl.int32), 0) == TRIPLETS
    mass = tl.zeros([TRIPLETS], tl.float32)
    others = tl.zeros([TRIPLETS], tl.float32)
    for k in range(K):
        s = _clamped(tl.load(similarity + k * similarity_stride))
        same = ids == k
        if HAS_GROUPS:
            same = ids == tl.load(groups + k * groups_stride)
        mass += tl.where(same, s, 0.0)
        others += tl.where(same, 0.0, s)
    total = mass + others
    p = mass / total
    rest = others / total
    log_p = tl.where(p > 0.5, log1p(-rest), tl.log(p))
    return p, rest, log_p, total, single


@triton.jit
def _triplet_weights(p, log_p, single, K, CROSS_REFINE: tl.constexpr, TRIPLETS: tl.constexpr):
    """theta [TRIPLETS] of (15), 1 / K where all is one group, and the sum of p log p."""
    terms = tl.where(tl.arange(0, TRIPLETS) < K, p * log_p, 0.0)
    total = tl.sum(terms, 0)
    theta = terms / total
    if CROSS_REFINE:
        theta = tl.where(single, 1.0 / K, theta)
    else:
        theta = tl.zeros([TRIPLETS], tl.float32) + 1.0 / K
    return theta, total


@triton.jit
def _entropies(x, inside):
    """Of each row of ``x`` [rows, columns]: e^(x - max), x - max, the sum of the former, and what entropy is made of.

    h = log sum + excess (11), as logsumexp(T) - sum p T; near certainty both are tiny, and keep their digits.
    """
    top = tl.max(tl.where(inside, x, float("-inf")), 1)
    shifted = tl.where(inside, x - top[:, None], float("-inf"))
    e = exp_nonpositive(shifted)
    largest = shifted == 0
    ties = tl.sum(largest.to(tl.float32), 1)
    others = tl.sum(tl.where(largest, 0.0, e), 1)
    excess = -tl.sum(tl.where(e == 0, 0.0, e * shifted), 1) / (ties + others)  # 0 log 0 = 0
    log_total = tl.log(ties) + log1p(others / ties)
    return e, shifted, ties + others, log_total + excess, excess


@triton.jit
def _over_components(x, TRIPLETS: tl.constexpr):
    """The sum of each triplet's four rows of ``x`` [4 TRIPLETS], the fourth 0, beside each of them."""
    by_triplet = tl.reshape(x, [TRIPLETS, 4])
    total = tl.sum(by_triplet, 1)[:, None] + tl.zeros([TRIPLETS, 4], tl.float32)
    return tl.reshape(total, [TRIPLETS * 4])


@triton.jit
def _component_weights(h, total, real, SELF_REFINE: tl.constexpr):
    """alpha of (12); 1 / 3 where nothing is uncertain; 0 in rows that are padding."""
    if SELF_REFINE:
        alpha = tl.where(total == 0, 1.0 / 3, tl.div_rn(h, total))
    else:
        alpha = tl.zeros_like(total) + 1.0 / 3
    return tl.where(real, alpha, 0.0)


@triton.jit
def _entropy_calibration_fwd_kernel(
    triplets,  # [B, K, 3, D]
    similarity,  # [B, K] float32
    groups,  # [B, K] int64, or None
    calibrated,  # [B, K, 3, D], contiguous
    component_weights,  # [B, K, 3] float32, contiguous
    triplet_weights,  # [B, K] float32, contiguous
    K,
    triplets_b,
    triplets_k,
    triplets_c,
    similarity_b,
    similarity_k,
    groups_b,
    groups_k,
    D: tl.constexpr,
    UNIT: tl.constexpr,  # of the strides of triplets
    SELF_REFINE: tl.constexpr,
    CROSS_REFINE: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    TRIPLETS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    task = tl.program_id(0).to(tl.int64)
    b = task // K
    k = task % K
    component = tl.arange(0, 4)
    column = tl.arange(0, COLUMNS)
    real = component < 3
    inside = real[:, None] & (column < D)[None, :]
    source = triplets + (b * triplets_b + k * triplets_k) * UNIT
    x = tl.load(source + component[:, None] * (triplets_c * UNIT) + column[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    h = tl.zeros([4], tl.float32)
    if SELF_REFINE:
        _, _, _, h, _ = _entropies(x, inside)
        h = tl.where(real, h, 0.0)
    alpha = _component_weights(h, _over_components(h, 1), real, SELF_REFINE)
    if HAS_GROUPS:
        groups += b * groups_b
    p, _, log_p, _, single = _shares(
        similarity + b * similarity_b, similarity_k, groups, groups_k, K, HAS_GROUPS, TRIPLETS
    )
    theta, _ = _triplet_weights(p, log_p, single, K, CROSS_REFINE, TRIPLETS)
    theta = tl.sum(tl.where(tl.arange(0, TRIPLETS) == k, theta, 0.0), 0)
    y = (theta * alpha)[:, None] * x  # (13), (16)
    target = calibrated + task * (3 * D)
    tl.store(target + component[:, None] * D + column[None, :], y.to(calibrated.dtype.element_ty), mask=inside)
    tl.store(component_weights + task * 3 + component, alpha, mask=real)
    tl.store(triplet_weights + task, theta)


# With r_c = <grad, T_c>: grad_theta = sum_c alpha_c r_c, grad_alpha_c = theta r_c, grad_h from the quotient (12), and
# dh/dT = -p (log p + h).
@triton.jit
def _entropy_calibration_bwd_kernel(
    grad_calibrated,  # [B, K, 3, D]
    triplets,  # [B, K, 3, D]
    similarity,  # [B, K] float32
    groups,  # [B, K] int64, or None
    grad_triplets,  # [B, K, 3, D], contiguous
    grad_similarity,  # [B, K] float32, contiguous
    K,
    grad_b,
    grad_k,
    grad_c,
    triplets_b,
    triplets_k,
    triplets_c,
    similarity_b,
    similarity_k,
    groups_b,
    groups_k,
    D: tl.constexpr,
    UNIT: tl.constexpr,  # of the strides of grad_calibrated and triplets
    SELF_REFINE: tl.constexpr,
    CROSS_REFINE: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    TRIPLETS: tl.constexpr,  # K, padded
    TILE: tl.constexpr,  # triplets at a time
    COLUMNS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, TRIPLETS)
    similarity += b * similarity_b
    if HAS_GROUPS:
        groups += b * groups_b
    p, rest, log_p, mass, single = _shares(similarity, similarity_k, groups, groups_k, K, HAS_GROUPS, TRIPLETS)
    theta, sum_p_log_p = _triplet_weights(p, log_p, single, K, CROSS_REFINE, TRIPLETS)
    grad_theta = tl.zeros([TRIPLETS], tl.float32)
    row = tl.arange(0, 4 * TILE)
    component = row % 4
    column = tl.arange(0, COLUMNS)
    for first in range(0, K, TILE):
        k = (first + row // 4).to(tl.int64)
        real = (component < 3) & (k < K)
        inside = real[:, None] & (column < D)[None, :]
        source = triplets + (b * triplets_b + k * triplets_k + component * triplets_c)[:, None] * UNIT + column[None, :]
        x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        source = grad_calibrated + (b * grad_b + k * grad_k + component * grad_c)[:, None] * UNIT + column[None, :]
        grad = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        r = tl.sum(x * grad, 1)
        theta_of_row = tl.sum(tl.where(k[:, None] == index[None, :], theta[None, :], 0.0), 1)
        h = tl.zeros([4 * TILE], tl.float32)
        if SELF_REFINE:
            e, shifted, sum_e, h, excess = _entropies(x, inside)
            h = tl.where(real, h, 0.0)
        total = _over_components(h, TILE)
        alpha = _component_weights(h, total, real, SELF_REFINE)
        grad_theta_of_row = _over_components(alpha * r, TILE)
        owned = (k[:, None] == index[None, :]) & (component == 0)[:, None]
        grad_theta += tl.sum(tl.where(owned, grad_theta_of_row[:, None], 0.0), 0)
        grad_x = (theta_of_row * alpha)[:, None] * grad
        if SELF_REFINE:
            grad_h = theta_of_row * (r - grad_theta_of_row)  # times the sum of entropies
            # Near certainty p (log p + h) and the sum of entropies vanish, their quotient does not.
            slope = e * (shifted + excess[:, None]) / (total * sum_e)[:, None] * grad_h[:, None]
            grad_x -= tl.where((e == 0) | (total == 0)[:, None], 0.0, slope)
        target = grad_triplets + ((b * K + k) * (3 * D) + component * D)[:, None] + column[None, :]
        tl.store(target, grad_x.to(grad_triplets.dtype.element_ty), mask=inside)

    real = index < K
    # Large and nearly equal where all is certain: their differences count.
    grad_theta -= tl.max(tl.where(real, grad_theta, float("-inf")), 0)
    mean = tl.sum(tl.where(real, theta * grad_theta, 0.0), 0)
    grad_p = (grad_theta - mean) / sum_p_log_p * (log_p + 1) / mass
    ids = index.to(tl.int64)
    if HAS_GROUPS:
        ids = tl.load(groups + index * groups_k, mask=real, other=0)
    for k in range(K):
        s = tl.load(similarity + k * similarity_k)
        same = ids == k
        if HAS_GROUPS:
            same = ids == tl.load(groups + k * groups_k)
        grad_s = tl.sum(tl.where(real, grad_p * tl.where(same, rest, -p), 0.0), 0)
        if CROSS_REFINE:
            grad_s = tl.where(single | (s < MIN_SIMILARITY), 0.0, grad_s)
        else:
            grad_s = tl.zeros_like(grad_s)
        tl.store(grad_similarity + b * K + k, grad_s)


def _constants(triplets: Tensor, groups: Tensor | None, self_refine: bool, cross_refine: bool) -> dict[str, int | bool]:
    """The kernels' compile-time constants, or the reason why they cannot run."""
    common.check_dtype(OP, "triplets", triplets)
    count, width = triplets.size(1), triplets.size(3)
    common.check_at_most(OP, "triplets a video", count, MAX_TRIPLETS)
    return {
        "D": width,
        "SELF_REFINE": self_refine,
        "CROSS_REFINE": cross_refine,
        "HAS_GROUPS": groups is not None,
        "TRIPLETS": common.power_of_two(count),
        "COLUMNS": common.power_of_two(width),
    }


def forward(
    triplets: Tensor, similarity: Tensor, groups: Tensor | None, self_refine: bool, cross_refine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """calibrated [B, K, 3, D], component_weights [B, K, 3] and triplet_weights [B, K], as the op's schema says.

    Raises:
        TypeError: float64.
        ValueError: more than 1024 triplets a video, or features wider than 8192.
    """
    constants = _constants(triplets, groups, self_refine, cross_refine)
    row = common.parameters(f"{OP}_forward", triplets.size(3), triplets)
    triplets = common.with_adjacent_features(triplets)
    batch, count = similarity.shape
    calibrated = triplets.new_empty(triplets.shape)
    component_weights = similarity.new_empty(batch, count, 3)
    triplet_weights = similarity.new_empty(batch, count)
    unit = common.stride_unit(triplets)
    common.launch(
        _entropy_calibration_fwd_kernel,
        (batch * count,),
        triplets,
        similarity,
        groups,
        calibrated,
        component_weights,
        triplet_weights,
        count,
        *(s // unit for s in triplets.stride()[:-1]),
        *similarity.stride(),
        *(groups.stride() if groups is not None else (0, 0)),
        UNIT=unit,
        num_warps=row.warps,
        **constants,
    )
    return calibrated, component_weights, triplet_weights


def backward(
    grad_calibrated: Tensor,
    triplets: Tensor,
    similarity: Tensor,
    groups: Tensor | None,
    self_refine: bool,
    cross_refine: bool,
) -> tuple[Tensor, Tensor]:
    """grad_triplets [B, K, 3, D] and grad_similarity [B, K]; errors as of :func:`forward`."""
    constants = _constants(triplets, groups, self_refine, cross_refine)
    row = common.parameters(f"{OP}_backward", triplets.size(3), triplets)
    grad_calibrated, triplets = map(common.with_adjacent_features, (grad_calibrated, triplets))
    batch, count = similarity.shape
    grad_triplets = triplets.new_empty(triplets.shape)
    grad_similarity = similarity.new_empty(batch, count)
    unit = common.stride_unit(grad_calibrated, triplets)
    common.launch(
        _entropy_calibration_bwd_kernel,
        (batch,),
        grad_calibrated,
        triplets,
        similarity,
        groups,
        grad_triplets,
        grad_similarity,
        count,
        *(s // unit for t in (grad_calibrated, triplets) for s in t.stride()[:-1]),
        *similarity.stride(),
        *(groups.stride() if groups is not None else (0, 0)),
        UNIT=unit,
        num_warps=row.warps,
        **constants,
        **row.blocks,
    )
    return grad_triplets, grad_similarity
