"""Backward of progressive emotion augmentation, equations (19)-(21), in Triton: the two kernels.

A program of the first is one head of a chunk of videos, which it takes in order. For each tile of rows it goes back
through the gate to the gradient of X, then through the words twice: once for what the softmax needs, once for the
gradients. Its sums for the dictionary stay in a buffer of its own, which the second kernel adds up chunk by chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evc_fast.kernels.head_tiles import (
    add_product,
    against,
    gather,
    head_products,
    load_head,
    no_head,
    products,
    spread,
    store_head,
    tile_inside,
    tile_rows,
)


@triton.jit
def _gate_tile(
    gate_queries,
    grads,
    inside,
    gate_keys,
    x,
    x_inside,
    frames_inside,
    column_blocks,
    GATE: tl.constexpr,  # strides: of grad_context over K and N, of gate_query over K and N, of gate_key over N
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Scores of rows to frames (20), and the gradient of their softmax: [rows, FRAMES] both. Pointers to first rows."""
    D: tl.constexpr = HEADS[0]
    rows = tile_rows(GATE[0], GATE[1], TILE)
    x_rows = tile_rows(TILE[3] * D, D, TILE)
    grad = gather(products(grads, rows, inside, x, x_rows, x_inside, column_blocks, D, COLUMNS), TILE)
    rows = tile_rows(GATE[2], GATE[3], TILE)
    frames = tl.arange(0, TILE[1]).to(tl.int64) * GATE[4]
    scores = products(gate_queries, rows, inside, gate_keys, frames, frames_inside, column_blocks, D, COLUMNS)
    return tl.where(frames_inside[None, :], scores, float("-inf")), grad


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
def _word_tile(
    queries,
    query_rows,
    x,
    x_rows,
    inside,
    query_main,
    query_tail,
    x_main,
    x_tail,
    keys,
    values,
    words_inside,
    head,
    head_blocks,
    SCALE: tl.constexpr,
    KEY_W: tl.constexpr,
    VALUE_W: tl.constexpr,
    WORDS: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STREAMED: tl.constexpr,
):
    """Scores of rows to words (19), and the gradient of their softmax for gradients x of X."""
    word = tl.arange(0, WORDS).to(tl.int64)
    if STREAMED:
        grad = head_products(x, x_rows, inside, values, word * VALUE_W, words_inside, head, head_blocks, HEADS, COLUMNS)
        scores = head_products(
            queries, query_rows, inside, keys, word * KEY_W, words_inside, head, head_blocks, HEADS, COLUMNS
        )
    else:
        main, tail = load_head(values, word * VALUE_W, words_inside, head, HEADS)
        grad = against(x_main, x_tail, main, tail, HEADS)
        main, tail = load_head(keys, word * KEY_W, words_inside, head, HEADS)
        scores = against(query_main, query_tail, main, tail, HEADS)
    return tl.where(words_inside[None, :], scores * SCALE, float("-inf")), grad


@triton.jit
def _add_partial(base, rows, inside, head, weights, main, tail, fresh, HEADS: tl.constexpr):
    """Add weights^T @ rows of the tile to what this program has stored there before, unless it is ``fresh``."""
    sum_main, sum_tail = no_head(weights.shape[1], HEADS)
    sum_main, sum_tail = add_product(tl.trans(weights), main, tail, sum_main, sum_tail, HEADS)
    old_main, old_tail = load_head(base, rows, inside & (fresh == 0), head, HEADS)
    store_head(base, rows, inside, head, old_main + sum_main, old_tail + sum_tail, HEADS)


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
    grad_candidates,  # [B, K, N, D], contiguous: between the two halves of a video
    partials,  # [chunks, 2, W, D] float32: gradients of key / SCALE and of value, each program's own chunk and head
    gates,  # [B, heads, K, N, 3] float32, None where N <= FRAMES: of each row max, sum of exponentials, mean gradient
    B,
    word_blocks,  # at run time, as column_blocks: unrolled, the loops' addresses would take all registers
    column_blocks,
    head_blocks,
    GRAD_B: tl.constexpr,  # strides
    GRAD_K: tl.constexpr,
    GRAD_N: tl.constexpr,
    QUERY_B: tl.constexpr,
    QUERY_K: tl.constexpr,
    QUERY_N: tl.constexpr,
    KEY_W: tl.constexpr,
    VALUE_W: tl.constexpr,
    GATE_QUERY_B: tl.constexpr,
    GATE_QUERY_K: tl.constexpr,
    GATE_QUERY_N: tl.constexpr,
    GATE_KEY_B: tl.constexpr,
    GATE_KEY_N: tl.constexpr,
    SCALE: tl.constexpr,  # 1 / sqrt(HEAD)
    K: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    ALIGN: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    TRIPLETS: tl.constexpr,
    FRAMES: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STREAMED: tl.constexpr,  # whether products over a head read it in blocks of COLUMNS: fewer registers, more loads
):
    ROWS: tl.constexpr = TRIPLETS * FRAMES
    HEADS: tl.constexpr = (D, HEAD, ALIGN, MAIN, TAIL)
    TILE: tl.constexpr = (TRIPLETS, FRAMES, K, N)
    GATE: tl.constexpr = (GRAD_K, GRAD_N, GATE_QUERY_K, GATE_QUERY_N, GATE_KEY_N)
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEAD
    frame = tl.arange(0, FRAMES)
    word = tl.arange(0, WORDS)
    frames = frame.to(tl.int64) * GATE_KEY_N
    words = word.to(tl.int64) * D
    own_rows = tile_rows(N * D, D, TILE)
    grad_rows = tile_rows(GRAD_K, GRAD_N, TILE)
    query_rows = tile_rows(QUERY_K, QUERY_N, TILE)
    gate_rows = tile_rows(GATE_QUERY_K, GATE_QUERY_N, TILE)
    gate_sums = tile_rows(N * 3, 3, TILE)
    none = tl.zeros([ROWS], tl.float32)
    key_sums = partials + chunk * (2 * W * D)
    value_sums = key_sums + W * D
    begin = chunk * B // tl.num_programs(0)
    end = (chunk + 1) * B // tl.num_programs(0)
    for b in tl.range(begin, end, disable_licm=True):
        grads_b = grad_context + b * GRAD_B
        gate_queries_b = gate_query + b * GATE_QUERY_B
        gate_keys_b = gate_key + b * GATE_KEY_B
        if N > FRAMES:  # the gate's rows in blocks of columns: first what their softmax needs, and their own gradient
            gates_b = gates + (b * tl.num_programs(1) + tl.program_id(1)) * (K * N * 3)
            for k in tl.range(0, K, TRIPLETS, disable_licm=True):
                for n in tl.range(0, N, FRAMES, disable_licm=True):
                    inside = tile_inside(k, n, TILE)
                    grads = grads_b + k * GRAD_K + n * GRAD_N
                    gate_queries = gate_queries_b + k * GATE_QUERY_K + n * GATE_QUERY_N
                    top, total, weighted = none + float("-inf"), none, none
                    for m in tl.range(0, N, FRAMES, disable_licm=True):
                        x = candidates + ((b * K + k) * N + m) * D
                        gate_keys = gate_keys_b + m * GATE_KEY_N
                        x_inside = tile_inside(k, m, TILE)
                        scores, grad = _gate_tile(
                            gate_queries, grads, inside, gate_keys, x, x_inside, m + frame < N, column_blocks,
                            GATE, HEADS, TILE, COLUMNS,
                        )  # fmt: skip
                        top, total, weighted = _softmax_sums(scores, grad, top, total, weighted)
                    mean = weighted / total
                    own_main, own_tail = no_head(ROWS, HEADS)
                    for m in tl.range(0, N, FRAMES, disable_licm=True):
                        x = candidates + ((b * K + k) * N + m) * D
                        gate_keys = gate_keys_b + m * GATE_KEY_N
                        x_inside = tile_inside(k, m, TILE)
                        scores, grad = _gate_tile(
                            gate_queries, grads, inside, gate_keys, x, x_inside, m + frame < N, column_blocks,
                            GATE, HEADS, TILE, COLUMNS,
                        )  # fmt: skip
                        _, grad_scores = _softmax_backward(scores, grad, top, total, mean)
                        main, tail = load_head(gate_keys, frames, m + frame < N, head, HEADS)
                        own_main, own_tail = add_product(grad_scores, main, tail, own_main, own_tail, HEADS)
                    target = grad_gate_query + ((b * K + k) * N + n) * D
                    store_head(target, own_rows, inside, head, own_main, own_tail, HEADS)
                    sums = gates_b + (k * N + n) * 3 + gate_sums
                    tl.store(sums, top, mask=inside)
                    tl.store(sums + 1, total, mask=inside)
                    tl.store(sums + 2, mean, mask=inside)
            tl.debug_barrier()  # other threads of this program read them
        for m in tl.range(0, N, FRAMES, disable_licm=True):
            gate_keys = gate_keys_b + m * GATE_KEY_N
            frames_main, frames_tail = no_head(FRAMES, HEADS)
            for k in tl.range(0, K, TRIPLETS, disable_licm=True):
                x_inside = tile_inside(k, m, TILE)
                grad_main, grad_tail = no_head(ROWS, HEADS)
                for n in tl.range(0, N, FRAMES, disable_licm=True):  # (20), (21)
                    inside = tile_inside(k, n, TILE)
                    x = candidates + ((b * K + k) * N + m) * D
                    grads = grads_b + k * GRAD_K + n * GRAD_N
                    gate_queries = gate_queries_b + k * GATE_QUERY_K + n * GATE_QUERY_N
                    scores, grad = _gate_tile(
                        gate_queries, grads, inside, gate_keys, x, x_inside, m + frame < N, column_blocks,
                        GATE, HEADS, TILE, COLUMNS,
                    )  # fmt: skip
                    if N > FRAMES:
                        sums = gates_b + (k * N + n) * 3 + gate_sums
                        top = tl.load(sums, mask=inside, other=0.0)
                        total = tl.load(sums + 1, mask=inside, other=1.0)
                        mean = tl.load(sums + 2, mask=inside, other=0.0)
                    else:
                        top, total, weighted = _softmax_sums(scores, grad, none + float("-inf"), none, none)
                        mean = weighted / total
                    p, grad_scores = _softmax_backward(scores, grad, top, total, mean)
                    if N <= FRAMES:
                        own_main, own_tail = no_head(ROWS, HEADS)
                        main, tail = load_head(gate_keys, frames, m + frame < N, head, HEADS)
                        own_main, own_tail = add_product(grad_scores, main, tail, own_main, own_tail, HEADS)
                        target = grad_gate_query + ((b * K + k) * N + n) * D
                        store_head(target, own_rows, inside, head, own_main, own_tail, HEADS)
                    main, tail = load_head(gate_queries, gate_rows, inside, head, HEADS)
                    frames_main, frames_tail = add_product(
                        tl.trans(grad_scores), main, tail, frames_main, frames_tail, HEADS
                    )
                    main, tail = load_head(grads, grad_rows, inside, head, HEADS)
                    gathered = tl.trans(spread(p, TILE))
                    grad_main, grad_tail = add_product(gathered, main, tail, grad_main, grad_tail, HEADS)
                target = grad_candidates + ((b * K + k) * N + m) * D
                store_head(target, own_rows, x_inside, head, grad_main, grad_tail, HEADS)
            target = grad_gate_key + (b * N + m) * D
            store_head(target, frame.to(tl.int64) * D, m + frame < N, head, frames_main, frames_tail, HEADS)
    tl.debug_barrier()  # other threads of this program read the gradient of X
    # A loop of its own: in one with the gate the compiler keeps that one's addresses for the words, and spills.
    for b in tl.range(begin, end, disable_licm=True):
        for m in tl.range(0, N, FRAMES, disable_licm=True):
            for k in tl.range(0, K, TRIPLETS, disable_licm=True):
                x_inside = tile_inside(k, m, TILE)
                grads = grad_candidates + ((b * K + k) * N + m) * D
                x_main, x_tail = load_head(grads, own_rows, x_inside, head, HEADS)
                queries = query + b * QUERY_B + k * QUERY_K + m * QUERY_N
                query_main, query_tail = load_head(queries, query_rows, x_inside, head, HEADS)
                top, total, weighted = none + float("-inf"), none, none
                for block in tl.range(word_blocks, disable_licm=True):  # (19)
                    w = block * WORDS
                    scores, grad = _word_tile(
                        queries, query_rows, grads, own_rows, x_inside, query_main, query_tail, x_main, x_tail,
                        key + w * KEY_W, value + w * VALUE_W, w + word < W, head, head_blocks, SCALE, KEY_W, VALUE_W,
                        WORDS, HEADS, COLUMNS, STREAMED,
                    )  # fmt: skip
                    top, total, weighted = _softmax_sums(scores, grad, top, total, weighted)
                mean = weighted / total
                fresh = (b == begin) & (m == 0) & (k == 0)
                own_main, own_tail = no_head(ROWS, HEADS)
                for block in tl.range(word_blocks, disable_licm=True):
                    w = block * WORDS
                    scores, grad = _word_tile(
                        queries, query_rows, grads, own_rows, x_inside, query_main, query_tail, x_main, x_tail,
                        key + w * KEY_W, value + w * VALUE_W, w + word < W, head, head_blocks, SCALE, KEY_W, VALUE_W,
                        WORDS, HEADS, COLUMNS, STREAMED,
                    )  # fmt: skip
                    p, grad_scores = _softmax_backward(scores, grad, top, total, mean)
                    keys_main, keys_tail = load_head(
                        key + w * KEY_W, word.to(tl.int64) * KEY_W, w + word < W, head, HEADS
                    )
                    own_main, own_tail = add_product(grad_scores, keys_main, keys_tail, own_main, own_tail, HEADS)
                    _add_partial(value_sums + w * D, words, w + word < W, head, p, x_main, x_tail, fresh, HEADS)
                    _add_partial(
                        key_sums + w * D, words, w + word < W, head, grad_scores, query_main, query_tail, fresh, HEADS
                    )
                tl.debug_barrier()  # before these sums are read again, perhaps by other threads of this program
                target = grad_query + ((b * K + k) * N + m) * D
                store_head(target, own_rows, x_inside, head, own_main * SCALE, own_tail * SCALE, HEADS)


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
