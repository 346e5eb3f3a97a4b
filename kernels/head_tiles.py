"""Tiles of attention heads for Triton kernels: their loads, stores and products.

HEADS: (D, HEAD, ALIGN, MAIN, TAIL). A head's width is padded to a sum of two powers of two, 75 to 64 + 16 where one
power would be 128, so its tiles come in pairs, "main" and "tail"; where TAIL is 0 the tail is an unused column. Columns
begin at the head's first feature rounded down to ALIGN, which divides D and the strides of all that is read by heads:
loads are then ALIGN elements wide though heads of 75 begin anywhere, and what they read of the neighbours is set to 0.

TILE: (TRIPLETS, FRAMES, K, N). The rows of a tile are frames of triplets: row = triplet * FRAMES + frame.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evc_fast.kernels import common

# ---- pairs of tiles ----


@triton.jit
def load_columns(base, rows, inside, column, D: tl.constexpr):
    """[rows, columns]: ``rows`` are offsets from ``base``; zeros outside and from column D on."""
    mask = inside[:, None] & (column < D)[None, :]
    return tl.load((base + rows)[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _columns(head, first, WIDTH: tl.constexpr, HEADS: tl.constexpr):
    """Columns of a tile, and which of them are the head's: ``head`` is its first feature."""
    column = head // HEADS[2] * HEADS[2] + first + tl.arange(0, WIDTH)
    return column, (column >= head) & (column < head + HEADS[1])


@triton.jit
def load_head(base, rows, inside, head, HEADS: tl.constexpr):
    """[rows, MAIN] and [rows, TAIL], zeros where the head is not."""
    column, own = _columns(head, 0, HEADS[3], HEADS)
    main = load_columns(base, rows, inside, column, HEADS[0])
    main = tl.where(own[None, :], main, tl.zeros_like(main))
    tail = tl.zeros([rows.shape[0], 1], main.dtype)
    if HEADS[4] > 0:
        column, own = _columns(head, HEADS[3], HEADS[4], HEADS)
        tail = load_columns(base, rows, inside, column, HEADS[0])
        tail = tl.where(own[None, :], tail, tl.zeros_like(tail))
    return main, tail


@triton.jit
def store_head(base, rows, inside, head, main, tail, HEADS: tl.constexpr):
    column, own = _columns(head, 0, HEADS[3], HEADS)
    target = (base + rows)[:, None] + column[None, :]
    tl.store(target, main.to(base.dtype.element_ty), mask=inside[:, None] & own[None, :])
    if HEADS[4] > 0:
        column, own = _columns(head, HEADS[3], HEADS[4], HEADS)
        target = (base + rows)[:, None] + column[None, :]
        tl.store(target, tail.to(base.dtype.element_ty), mask=inside[:, None] & own[None, :])


@triton.jit
def no_head(ROWS: tl.constexpr, HEADS: tl.constexpr):
    """A pair of tiles of zeros, float32."""
    return tl.zeros([ROWS, HEADS[3]], tl.float32), tl.zeros([ROWS, HEADS[4] if HEADS[4] > 0 else 1], tl.float32)


@triton.jit
def _dot(a, b, sum):
    return tl.dot(a, b, sum, input_precision="ieee")  # float32 stays float32


@triton.jit
def against(a_main, a_tail, b_main, b_tail, HEADS: tl.constexpr):
    """a b^T over a head's features: float32 [rows of a, rows of b]."""
    product = tl.zeros([a_main.shape[0], b_main.shape[0]], tl.float32)
    product = _dot(a_main, tl.trans(b_main), product)
    if HEADS[4] > 0:
        product = _dot(a_tail, tl.trans(b_tail), product)
    return product


@triton.jit
def add_product(weights, main, tail, sum_main, sum_tail, HEADS: tl.constexpr):
    """sum + weights @ rows, weights rounded to the rows' type as tensor cores want it."""
    weights = weights.to(main.dtype)
    sum_main = _dot(weights, main, sum_main)
    if HEADS[4] > 0:
        sum_tail = _dot(weights, tail, sum_tail)
    return sum_main, sum_tail


@triton.jit
def products(
    base, rows, inside, other_base, others, others_inside, column_blocks, D: tl.constexpr, COLUMNS: tl.constexpr
):
    """rows others^T over all D features: float32 [rows, others]."""
    product = tl.zeros([rows.shape[0], others.shape[0]], tl.float32)
    for block in tl.range(column_blocks, disable_licm=True):
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        a = load_columns(base, rows, inside, column, D)
        product = _dot(a, tl.trans(load_columns(other_base, others, others_inside, column, D)), product)
    return product


@triton.jit
def head_products(
    base, rows, inside, other_base, others, others_inside, head, head_blocks, HEADS: tl.constexpr, COLUMNS: tl.constexpr
):
    """rows others^T over a head's features, read in blocks: what :func:`against` computes of tiles that are on chip."""
    product = tl.zeros([rows.shape[0], others.shape[0]], tl.float32)
    for block in tl.range(head_blocks, disable_licm=True):
        column, own = _columns(head, block * COLUMNS, COLUMNS, HEADS)
        a = load_columns(base, rows, inside, column, HEADS[0])
        b = load_columns(other_base, others, others_inside, column, HEADS[0])
        a = tl.where(own[None, :], a, tl.zeros_like(a))
        b = tl.where(own[None, :], b, tl.zeros_like(b))
        product = _dot(a, tl.trans(b), product)
    return product


# ---- rows of a tile ----


@triton.jit
def tile_rows(K_STRIDE: tl.constexpr, N_STRIDE: tl.constexpr, TILE: tl.constexpr):
    """Offsets of a tile's rows from its first one: with constant strides a thread's addresses share one register."""
    row = tl.arange(0, TILE[0] * TILE[1])
    return (row // TILE[1]).to(tl.int64) * K_STRIDE + (row % TILE[1]).to(tl.int64) * N_STRIDE


@triton.jit
def tile_inside(k, n, TILE: tl.constexpr):
    """Which rows exist of the tile whose first one is frame ``n`` of triplet ``k``."""
    row = tl.arange(0, TILE[0] * TILE[1])
    return (k + row // TILE[1] < TILE[2]) & (n + row % TILE[1] < TILE[3])


@triton.jit
def _own_triplet(TILE: tl.constexpr):
    """[rows, TRIPLETS, 1]: whether a row is of the triplet."""
    row = tl.arange(0, TILE[0] * TILE[1])
    return row[:, None, None] // TILE[1] == tl.arange(0, TILE[0])[None, :, None]


@triton.jit
def spread(x, TILE: tl.constexpr):
    """[rows, FRAMES], each row's weights over its own triplet's frames -> block-diagonal [rows, rows]."""
    if TILE[0] == 1:
        return x
    else:
        return tl.reshape(tl.where(_own_triplet(TILE), x[:, None, :], 0.0), [x.shape[0], x.shape[0]])


@triton.jit
def gather(x, TILE: tl.constexpr):
    """[rows, rows] -> [rows, FRAMES], the blocks of the diagonal."""
    if TILE[0] == 1:
        return x
    else:
        blocks = tl.reshape(x, [x.shape[0], TILE[0], TILE[1]])
        return tl.sum(tl.where(_own_triplet(TILE), blocks, 0.0), 1)


# ---- on the host ----


def padded(width: int) -> tuple[int, int]:
    """MAIN and TAIL: powers of two, 16 or more as tl.dot wants them, that hold ``width``; TAIL is 0 where MAIN does."""
    whole = max(common.power_of_two(width), 16)
    half = whole // 2
    tail = max(common.power_of_two(width - half), 16)
    return (half, tail) if half >= 16 and half + tail < whole else (whole, 0)
