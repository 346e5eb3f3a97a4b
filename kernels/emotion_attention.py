"""Progressive emotion augmentation, equations (19)-(21), in Triton: one launch forward, two backward.

A program is one head of some triplets of one video, their frames as the rows of its tiles: at the paper's sizes all
4 x 16 of them, so that each head of the dictionary is read once a video. Scores of rows against words live on chip, a
block of words at a time. The gate's scores need all features: every head computes them again, which costs less than to
keep them (a sixth of the products forward at the paper's sizes) or to give a program all heads.

A head's width is padded to a sum of two powers of two: 75 to 64 + 16, where one power would be 128. Tiles come in such
pairs, "main" and "tail"; where TAIL is 0, the tail is an unused column.

Rows of several triplets meet in one product by block-diagonal operands, [rows, rows] with zeros between triplets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from evc_fast.kernels import common

OP = "emotion_attention"
PROGRAMS = 128  # of the backward, about a GPU's multiprocessors, where the batch has as many heads
MIN_CHUNKS = 16
REDUCED = 256  # numbers of the dictionary's gradients that one program sums


# ---- pairs of tiles ----


@triton.jit
def _load_head(rows, inside, HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """A head of each row: [rows, MAIN] and [rows, TAIL], zeros beyond HEAD. ``rows`` points at its first features."""
    column = tl.arange(0, MAIN)
    main = tl.load(rows[:, None] + column[None, :], mask=inside[:, None] & (column < HEAD)[None, :], other=0.0)
    tail = tl.zeros([rows.shape[0], 1], main.dtype)
    if TAIL > 0:
        column = MAIN + tl.arange(0, TAIL)
        tail = tl.load(rows[:, None] + column[None, :], mask=inside[:, None] & (column < HEAD)[None, :], other=0.0)
    return main, tail


@triton.jit
def _store_head(rows, inside, main, tail, HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    column = tl.arange(0, MAIN)
    dtype = rows.dtype.element_ty
    tl.store(rows[:, None] + column[None, :], main.to(dtype), mask=inside[:, None] & (column < HEAD)[None, :])
    if TAIL > 0:
        column = MAIN + tl.arange(0, TAIL)
        tl.store(rows[:, None] + column[None, :], tail.to(dtype), mask=inside[:, None] & (column < HEAD)[None, :])


@triton.jit
def _no_head(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    return tl.zeros([ROWS, MAIN], tl.float32), tl.zeros([ROWS, TAIL if TAIL > 0 else 1], tl.float32)


@triton.jit
def _dot(a, b, sum):
    return tl.dot(a, b, sum, input_precision="ieee")  # float32 stays float32


@triton.jit
def _against(a_main, a_tail, b_main, b_tail, TAIL: tl.constexpr):
    """a b^T over a head's features: float32 [rows of a, rows of b]."""
    product = tl.zeros([a_main.shape[0], b_main.shape[0]], tl.float32)
    product = _dot(a_main, tl.trans(b_main), product)
    if TAIL > 0:
        product = _dot(a_tail, tl.trans(b_tail), product)
    return product


@triton.jit
def _add_product(weights, main, tail, sum_main, sum_tail, TAIL: tl.constexpr):
    """sum + weights @ rows, weights rounded to the rows' type as tensor cores want it."""
    weights = weights.to(main.dtype)
    sum_main = _dot(weights, main, sum_main)
    if TAIL > 0:
        sum_tail = _dot(weights, tail, sum_tail)
    return sum_main, sum_tail


# ---- triplets of a tile: row = triplet * FRAMES + frame ----


@triton.jit
def _spread(x, TRIPLETS: tl.constexpr, FRAMES: tl.constexpr):
    """[rows, FRAMES], each row's weights over its own triplet's frames -> block-diagonal [rows, rows]."""
    if TRIPLETS == 1:
        return x
    else:
        ROWS: tl.constexpr = TRIPLETS * FRAMES
        own = tl.arange(0, ROWS)[:, None, None] // FRAMES == tl.arange(0, TRIPLETS)[None, :, None]
        return tl.reshape(tl.where(own, x[:, None, :], 0.0), [ROWS, ROWS])


@triton.jit
def _gather(x, TRIPLETS: tl.constexpr, FRAMES: tl.constexpr):
    """[rows, rows] -> [rows, FRAMES], the blocks of the diagonal."""
    if TRIPLETS == 1:
        return x
    else:
        ROWS: tl.constexpr = TRIPLETS * FRAMES
        own = tl.arange(0, ROWS)[:, None, None] // FRAMES == tl.arange(0, TRIPLETS)[None, :, None]
        return tl.sum(tl.where(own, tl.reshape(x, [ROWS, TRIPLETS, FRAMES]), 0.0), 1)


@triton.jit
def _add_scores(sum, rows, rows_inside, others, others_inside, D: tl.constexpr, COLUMNS: tl.constexpr):
    """sum + rows others^T over all D features."""
    for first in range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        wide = (column < D)[None, :]
        a = tl.load(rows[:, None] + column[None, :], mask=rows_inside[:, None] & wide, other=0.0)
        c = tl.load(others[:, None] + column[None, :], mask=others_inside[:, None] & wide, other=0.0)
        sum = _dot(a, tl.trans(c), sum)
    return sum


# ---- forward ----


@triton.jit
def _emotion_attention_fwd_kernel(
    query,  # [B, K, N, D]
    key,  # [W, D]
    value,  # [W, D]
    gate_query,  # [B, K, N, D]
    gate_key,  # [B, N, D]
    context,  # [B, K, N, D], contiguous
    candidates,  # X [B, K, N, D], contiguous, or None
    K,
    N,
    query_b,
    query_k,
    query_n,
    key_w,
    value_w,
    gate_query_b,
    gate_query_k,
    gate_query_n,
    gate_key_b,
    gate_key_n,
    SCALE: tl.constexpr,  # 1 / sqrt(HEAD)
    UNIT: tl.constexpr,  # of the strides
    W: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    TRIPLETS: tl.constexpr,
    FRAMES: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    ROWS: tl.constexpr = TRIPLETS * FRAMES
    blocks = tl.cdiv(K, TRIPLETS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    k = (tl.program_id(0) % blocks) * TRIPLETS + tl.arange(0, ROWS) // FRAMES
    k = k.to(tl.int64)
    head = tl.program_id(1) * HEAD
    first_row = tl.program_id(2) * FRAMES
    n = first_row + (tl.arange(0, ROWS) % FRAMES).to(tl.int64)
    inside = (k < K) & (n < N)
    word = tl.arange(0, WORDS)
    gate_rows = gate_query + (b * gate_query_b + k * gate_query_k + n * gate_query_n) * UNIT
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    main, tail = _no_head(ROWS, MAIN, TAIL)
    for first_frame in range(0, N, FRAMES):  # the frames that the gate gathers from: one block up to 64
        m = first_frame + (tl.arange(0, ROWS) % FRAMES).to(tl.int64)
        m_inside = (k < K) & (m < N)
        rows = query + (b * query_b + k * query_k + m * query_n) * UNIT + head
        query_main, query_tail = _load_head(rows, m_inside, HEAD, MAIN, TAIL)
        word_top = tl.full([ROWS], float("-inf"), tl.float32)
        word_total = tl.zeros([ROWS], tl.float32)
        x_main, x_tail = _no_head(ROWS, MAIN, TAIL)
        for first in range(0, W, WORDS):  # (19): X = softmax(Q K^T / sqrt(d/heads)) V
            w = (first + word).to(tl.int64)
            key_main, key_tail = _load_head(key + w * (key_w * UNIT) + head, w < W, HEAD, MAIN, TAIL)
            value_main, value_tail = _load_head(value + w * (value_w * UNIT) + head, w < W, HEAD, MAIN, TAIL)
            scores = _against(query_main, query_tail, key_main, key_tail, TAIL) * SCALE
            scores = tl.where((w < W)[None, :], scores, float("-inf"))
            new_top = tl.maximum(word_top, tl.max(scores, 1))
            p = tl.exp(scores - new_top[:, None])
            fade = tl.exp(word_top - new_top)
            word_total = word_total * fade + tl.sum(p, 1)
            word_top = new_top
            x_main *= fade[:, None]
            x_tail *= fade[:, None]
            x_main, x_tail = _add_product(p, value_main, value_tail, x_main, x_tail, TAIL)
        x_main = (x_main / word_total[:, None]).to(query.dtype.element_ty)
        x_tail = (x_tail / word_total[:, None]).to(query.dtype.element_ty)
        if candidates is not None:
            rows = candidates + ((b * K + k) * N + m) * D + head
            _store_head(rows, m_inside & (first_frame == first_row), x_main, x_tail, HEAD, MAIN, TAIL)

        frame = first_frame + tl.arange(0, FRAMES)  # (20), (21): softmax(G_q G_k^T) X
        frames = gate_key + (b * gate_key_b + frame * gate_key_n) * UNIT
        scores = tl.zeros([ROWS, FRAMES], tl.float32)
        scores = _add_scores(scores, gate_rows, inside, frames, frame < N, D, COLUMNS)
        scores = tl.where((frame < N)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp(scores - new_top[:, None])
        fade = tl.exp(top - new_top)
        total = total * fade + tl.sum(p, 1)
        top = new_top
        main *= fade[:, None]
        tail *= fade[:, None]
        main, tail = _add_product(_spread(p, TRIPLETS, FRAMES), x_main, x_tail, main, tail, TAIL)
    rows = context + ((b * K + k) * N + n) * D + head
    _store_head(rows, inside, main / total[:, None], tail / total[:, None], HEAD, MAIN, TAIL)


# ---- backward ----


@triton.jit
def _gate_tile(
    gate_rows,  # pointers [ROWS] to rows of gate_query
    grad_rows,  # and of grad_context
    inside,
    frames,  # pointers [FRAMES] to rows of gate_key
    frames_inside,
    x_rows,  # pointers [ROWS] to candidates of those frames
    x_inside,
    D: tl.constexpr,
    TRIPLETS: tl.constexpr,
    FRAMES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gate scores of rows to frames (20), and the gradient of their softmax: [ROWS, FRAMES] both."""
    ROWS: tl.constexpr = TRIPLETS * FRAMES
    scores = tl.zeros([ROWS, FRAMES], tl.float32)
    scores = _add_scores(scores, gate_rows, inside, frames, frames_inside, D, COLUMNS)
    grad = tl.zeros([ROWS, ROWS], tl.float32)
    grad = _add_scores(grad, grad_rows, inside, x_rows, x_inside, D, COLUMNS)
    return tl.where(frames_inside[None, :], scores, float("-inf")), _gather(grad, TRIPLETS, FRAMES)


@triton.jit
def _softmax_sums(scores, grad, top, total, weighted):
    """A row's maximum, sum of exponentials, and sum of these times the gradient, with one more block of scores."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    e = tl.exp(scores - new_top[:, None])
    fade = tl.exp(top - new_top)
    return new_top, total * fade + tl.sum(e, 1), weighted * fade + tl.sum(e * grad, 1)


@triton.jit
def _softmax_backward(scores, grad, top, total, mean):
    """p and the gradient of the scores, p (grad - <p, grad>). Exactly 0 where p is 1: mean came of the same numbers."""
    p = tl.exp(scores - top[:, None]) / total[:, None]
    return p, p * (grad - mean[:, None])


@triton.jit
def _add_partial(rows, inside, main, tail, fresh, HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Add to what this program has stored there before, unless it is ``fresh``."""
    old_main, old_tail = _load_head(rows, inside & (fresh == 0), HEAD, MAIN, TAIL)
    _store_head(rows, inside, old_main + main, old_tail + tail, HEAD, MAIN, TAIL)


@triton.jit
def _emotion_attention_bwd_kernel(
    grad_context,  # [B, K, N, D]
    query,  # [B, K, N, D]
    key,  # [W, D]
    value,  # [W, D]
    gate_query,  # [B, K, N, D]
    gate_key,  # [B, N, D]
    candidates,  # X [B, K, N, D], contiguous
    grad_query,  # [B, K, N, D], contiguous
    grad_gate_query,  # [B, K, N, D], contiguous
    grad_gate_key,  # [B, N, D], contiguous
    partials,  # [chunks, 2, W, D] float32: gradients of key / SCALE and of value, each program's own chunk and head
    gates,  # [B, heads, K, N, 3] float32, or None unless MANY: of each row of the gate max, sum of exponentials, mean
    B,
    K,
    N,
    grad_b,
    grad_k,
    grad_n,
    query_b,
    query_k,
    query_n,
    key_w,
    value_w,
    gate_query_b,
    gate_query_k,
    gate_query_n,
    gate_key_b,
    gate_key_n,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    MANY: tl.constexpr,  # whether there are more frames than FRAMES
    W: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    TRIPLETS: tl.constexpr,
    FRAMES: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    ROWS: tl.constexpr = TRIPLETS * FRAMES
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEAD
    row_k = (tl.arange(0, ROWS) // FRAMES).to(tl.int64)
    row_n = (tl.arange(0, ROWS) % FRAMES).to(tl.int64)
    frame = tl.arange(0, FRAMES).to(tl.int64)
    word = tl.arange(0, WORDS).to(tl.int64)
    none = tl.zeros([ROWS], tl.float32)
    begin = chunk * B // tl.num_programs(0)
    for b in range(begin, (chunk + 1) * B // tl.num_programs(0)):
        grads = grad_context + b * grad_b * UNIT
        queries = query + b * query_b * UNIT + head
        gate_queries = gate_query + b * gate_query_b * UNIT
        gate_keys = gate_key + b * gate_key_b * UNIT
        if MANY:  # rows of the gate in blocks: first what their softmax needs, and their own gradient
            gates_b = gates + (b * tl.num_programs(1) + tl.program_id(1)) * K * N * 3
            for first_k in range(0, K, TRIPLETS):
                k = first_k + row_k
                for first_row in range(0, N, FRAMES):
                    n = first_row + row_n
                    inside = (k < K) & (n < N)
                    gate_rows = gate_queries + (k * gate_query_k + n * gate_query_n) * UNIT
                    grad_rows = grads + (k * grad_k + n * grad_n) * UNIT
                    top, total, weighted = none + float("-inf"), none, none
                    for first in range(0, N, FRAMES):
                        m = first + row_n
                        frames = gate_keys + (first + frame) * gate_key_n * UNIT
                        x_rows = candidates + ((b * K + k) * N + m) * D
                        scores, grad = _gate_tile(
                            gate_rows, grad_rows, inside, frames, first + frame < N, x_rows, (k < K) & (m < N),
                            D, TRIPLETS, FRAMES, COLUMNS,
                        )  # fmt: skip
                        top, total, weighted = _softmax_sums(scores, grad, top, total, weighted)
                    mean = weighted / total
                    main, tail = _no_head(ROWS, MAIN, TAIL)
                    for first in range(0, N, FRAMES):
                        m = first + row_n
                        frames = gate_keys + (first + frame) * gate_key_n * UNIT
                        x_rows = candidates + ((b * K + k) * N + m) * D
                        scores, grad = _gate_tile(
                            gate_rows, grad_rows, inside, frames, first + frame < N, x_rows, (k < K) & (m < N),
                            D, TRIPLETS, FRAMES, COLUMNS,
                        )  # fmt: skip
                        _, grad_scores = _softmax_backward(scores, grad, top, total, mean)
                        keys_main, keys_tail = _load_head(frames + head, first + frame < N, HEAD, MAIN, TAIL)
                        main, tail = _add_product(grad_scores, keys_main, keys_tail, main, tail, TAIL)
                    rows = grad_gate_query + ((b * K + k) * N + n) * D + head
                    _store_head(rows, inside, main, tail, HEAD, MAIN, TAIL)
                    rows = gates_b + (k * N + n) * 3
                    tl.store(rows, top, mask=inside)
                    tl.store(rows + 1, total, mask=inside)
                    tl.store(rows + 2, mean, mask=inside)
            tl.debug_barrier()  # other threads of this program read them
        for first_frame in range(0, N, FRAMES):
            m = first_frame + row_n
            m_inside = first_frame + frame < N
            frames = gate_keys + (first_frame + frame) * gate_key_n * UNIT
            keys_main, keys_tail = _load_head(frames + head, m_inside, HEAD, MAIN, TAIL)
            grad_key_main, grad_key_tail = _no_head(FRAMES, MAIN, TAIL)
            for first_k in range(0, K, TRIPLETS):
                k = first_k + row_k
                x_inside = (k < K) & (m < N)
                x_rows = candidates + ((b * K + k) * N + m) * D
                grad_x_main, grad_x_tail = _no_head(ROWS, MAIN, TAIL)
                for first_row in range(0, N, FRAMES):  # (20), (21)
                    n = first_row + row_n
                    inside = (k < K) & (n < N)
                    gate_rows = gate_queries + (k * gate_query_k + n * gate_query_n) * UNIT
                    grad_rows = grads + (k * grad_k + n * grad_n) * UNIT
                    scores, grad = _gate_tile(
                        gate_rows, grad_rows, inside, frames, m_inside, x_rows, x_inside, D, TRIPLETS, FRAMES, COLUMNS
                    )
                    if MANY:
                        rows = gates_b + (k * N + n) * 3
                        top = tl.load(rows, mask=inside, other=0.0)
                        total = tl.load(rows + 1, mask=inside, other=1.0)
                        mean = tl.load(rows + 2, mask=inside, other=0.0)
                    else:
                        top, total, weighted = _softmax_sums(scores, grad, none + float("-inf"), none, none)
                        mean = weighted / total
                    p, grad_scores = _softmax_backward(scores, grad, top, total, mean)
                    if not MANY:
                        main, tail = _no_head(ROWS, MAIN, TAIL)
                        main, tail = _add_product(grad_scores, keys_main, keys_tail, main, tail, TAIL)
                        rows = grad_gate_query + ((b * K + k) * N + n) * D + head
                        _store_head(rows, inside, main, tail, HEAD, MAIN, TAIL)
                    main, tail = _load_head(grad_rows + head, inside, HEAD, MAIN, TAIL)
                    gathered = tl.trans(_spread(p, TRIPLETS, FRAMES))
                    grad_x_main, grad_x_tail = _add_product(gathered, main, tail, grad_x_main, grad_x_tail, TAIL)
                    main, tail = _load_head(gate_rows + head, inside, HEAD, MAIN, TAIL)
                    grad_key_main, grad_key_tail = _add_product(
                        tl.trans(grad_scores), main, tail, grad_key_main, grad_key_tail, TAIL
                    )
                # (19), with the gradient of X
                grad_x_main = grad_x_main.to(query.dtype.element_ty)
                grad_x_tail = grad_x_tail.to(query.dtype.element_ty)
                rows = queries + (k * query_k + m * query_n) * UNIT
                query_main, query_tail = _load_head(rows, x_inside, HEAD, MAIN, TAIL)
                top, total, weighted = none + float("-inf"), none, none
                for first in range(0, W, WORDS):
                    w = first + word
                    key_main, key_tail = _load_head(key + w * (key_w * UNIT) + head, w < W, HEAD, MAIN, TAIL)
                    value_main, value_tail = _load_head(value + w * (value_w * UNIT) + head, w < W, HEAD, MAIN, TAIL)
                    scores = _against(query_main, query_tail, key_main, key_tail, TAIL) * SCALE
                    scores = tl.where((w < W)[None, :], scores, float("-inf"))
                    grad = _against(grad_x_main, grad_x_tail, value_main, value_tail, TAIL)
                    top, total, weighted = _softmax_sums(scores, grad, top, total, weighted)
                mean = weighted / total
                fresh = (b == begin) & (first_frame == 0) & (first_k == 0)
                grad_query_main, grad_query_tail = _no_head(ROWS, MAIN, TAIL)
                for first in range(0, W, WORDS):
                    w = first + word
                    key_main, key_tail = _load_head(key + w * (key_w * UNIT) + head, w < W, HEAD, MAIN, TAIL)
                    value_main, value_tail = _load_head(value + w * (value_w * UNIT) + head, w < W, HEAD, MAIN, TAIL)
                    scores = _against(query_main, query_tail, key_main, key_tail, TAIL) * SCALE
                    scores = tl.where((w < W)[None, :], scores, float("-inf"))
                    grad = _against(grad_x_main, grad_x_tail, value_main, value_tail, TAIL)
                    p, grad_scores = _softmax_backward(scores, grad, top, total, mean)
                    grad_query_main, grad_query_tail = _add_product(
                        grad_scores, key_main, key_tail, grad_query_main, grad_query_tail, TAIL
                    )
                    sums = partials + (chunk * 2 * W + w) * D + head
                    word_main, word_tail = _no_head(WORDS, MAIN, TAIL)
                    word_main, word_tail = _add_product(
                        tl.trans(grad_scores), query_main, query_tail, word_main, word_tail, TAIL
                    )
                    _add_partial(sums, w < W, word_main, word_tail, fresh, HEAD, MAIN, TAIL)
                    word_main, word_tail = _no_head(WORDS, MAIN, TAIL)
                    word_main, word_tail = _add_product(
                        tl.trans(p), grad_x_main, grad_x_tail, word_main, word_tail, TAIL
                    )
                    _add_partial(sums + W * D, w < W, word_main, word_tail, fresh, HEAD, MAIN, TAIL)
                tl.debug_barrier()  # before these sums are read again, perhaps by other threads of this program
                rows = grad_query + ((b * K + k) * N + m) * D + head
                _store_head(rows, x_inside, grad_query_main * SCALE, grad_query_tail * SCALE, HEAD, MAIN, TAIL)
            rows = grad_gate_key + (b * N + first_frame + frame) * D + head
            _store_head(rows, m_inside, grad_key_main, grad_key_tail, HEAD, MAIN, TAIL)


@triton.jit
def _emotion_attention_reduce_kernel(
    partials,  # [chunks, 2, W D] float32
    grad_key,  # [W D]
    grad_value,  # [W D]
    chunks,
    size,  # W D
    SCALE: tl.constexpr,
    CHUNKS: tl.constexpr,  # read at a time
    BLOCK: tl.constexpr,
):
    of_value = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = (first + tl.arange(0, CHUNKS)).to(tl.int64)
        inside = (chunk < chunks)[:, None] & (i < size)[None, :]
        rows = partials + (chunk * 2 + of_value)[:, None] * size + i[None, :]
        total += tl.sum(tl.load(rows, mask=inside, other=0.0), 0)
    if of_value == 0:
        tl.store(grad_key + i, (total * SCALE).to(grad_key.dtype.element_ty), mask=i < size)
    else:
        tl.store(grad_value + i, total.to(grad_value.dtype.element_ty), mask=i < size)


# ---- launchers ----


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_query: Tensor,
    gate_key: Tensor,
    num_heads: int,
    keep_candidates: bool,
) -> tuple[Tensor, Tensor]:
    """context [B, K, N, d], and the candidates X [B, K, N, d] where ``keep_candidates``, else [0].

    Raises:
        TypeError: float64.
        ValueError: heads wider than 512.
    """
    inputs = [common.with_adjacent_features(t) for t in (query, key, value, gate_query, gate_key)]
    constants, row = _plan(f"{OP}_forward", inputs, query, key, num_heads)
    batch, count, frames, _ = query.shape
    context = query.new_empty(query.shape)
    candidates = query.new_empty(query.shape if keep_candidates else 0)
    common.launch(
        _emotion_attention_fwd_kernel,
        (
            batch * triton.cdiv(count, constants["TRIPLETS"]),
            num_heads,
            triton.cdiv(frames, constants["FRAMES"]),
        ),
        *inputs,
        context,
        candidates if keep_candidates else None,
        count,
        frames,
        *_strides(inputs, constants["UNIT"]),
        num_warps=row.warps,
        num_stages=row.stages,
        **constants,
    )
    return context, candidates


def backward(
    grad_context: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_query: Tensor,
    gate_key: Tensor,
    candidates: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, gate_query and gate_key; errors as of :func:`forward`.

    Videos are summed in chunks, each in order by the programs of its heads, and the chunks in order: the dictionary's
    gradients depend on the batch alone, bit for bit.
    """
    inputs = [common.with_adjacent_features(t) for t in (grad_context, query, key, value, gate_query, gate_key)]
    constants, row = _plan(f"{OP}_backward", inputs, query, key, num_heads)
    batch, count, frames, width = query.shape
    many = frames > constants["FRAMES"]
    chunks = min(batch, max(MIN_CHUNKS, PROGRAMS // num_heads))
    grad_query, grad_gate_query = query.new_empty(query.shape), query.new_empty(query.shape)
    grad_gate_key = gate_key.new_empty(gate_key.shape)
    grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
    partials = key.new_empty(chunks, 2, *key.shape, dtype=torch.float32)
    gates = key.new_empty(batch, num_heads, count, frames, 3, dtype=torch.float32) if many else None
    common.launch(
        _emotion_attention_bwd_kernel,
        (chunks, num_heads),
        *inputs,
        candidates,
        grad_query,
        grad_gate_query,
        grad_gate_key,
        partials,
        gates,
        batch,
        count,
        frames,
        *_strides(inputs, constants["UNIT"]),
        MANY=many,
        num_warps=row.warps,
        num_stages=row.stages,
        **constants,
    )
    size = grad_key.numel()
    common.launch(
        _emotion_attention_reduce_kernel,
        (triton.cdiv(size, REDUCED), 2),
        partials,
        grad_key,
        grad_value,
        chunks,
        size,
        SCALE=constants["SCALE"],
        CHUNKS=8,
        BLOCK=REDUCED,
        num_warps=4,
    )
    return grad_query, grad_key, grad_value, grad_gate_query, grad_gate_key


def _plan(
    kernel: str, inputs: list[Tensor], query: Tensor, key: Tensor, num_heads: int
) -> tuple[dict[str, int | float], common.Row]:
    """The compile-time constants that forward and backward share, and the launch parameters."""
    common.check_dtype(OP, "query", query)
    _, count, frames, width = query.shape
    head = width // num_heads
    row = common.parameters(kernel, head, query)
    main, tail = _padded(head)
    tile_frames = min(max(common.power_of_two(frames), 16), row.blocks["ROWS"])
    return {
        "SCALE": head**-0.5,
        "UNIT": common.stride_unit(*inputs),
        "W": key.size(0),
        "D": width,
        "HEAD": head,
        "MAIN": main,
        "TAIL": tail,
        "TRIPLETS": min(common.power_of_two(count), row.blocks["ROWS"] // tile_frames),
        "FRAMES": tile_frames,
        "WORDS": min(max(common.power_of_two(key.size(0)), 16), row.blocks["WORDS"]),
        "COLUMNS": min(max(common.power_of_two(width), 16), row.blocks["COLUMNS"]),
    }, row


def _padded(head: int) -> tuple[int, int]:
    """Two powers of two, at least 16 each as tl.dot wants them, that hold a head; the second 0 where one does as well."""
    whole = max(common.power_of_two(head), 16)
    half = whole // 2
    tail = max(common.power_of_two(head - half), 16)
    return (half, tail) if half >= 16 and half + tail < whole else (whole, 0)


def _strides(tensors: list[Tensor], unit: int) -> list[int]:
    return [s // unit for t in tensors for s in t.stride()[:-1]]
