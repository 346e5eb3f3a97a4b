"""Progressive emotion augmentation, equations (19)-(21), in Triton: one launch forward, two backward.

A program is one head of some triplets of one video, their frames as the rows of its tiles: at the paper's sizes all
4 x 16 of them, so that each head of the dictionary is read once a video. Scores of rows against words live on chip, a
block of words at a time. The gate's scores need all features: every head computes them again, which costs less than to
keep them (a sixth of the products forward at the paper's sizes) or to give a program all heads. Rows of several
triplets meet in one product by block-diagonal operands, [rows, rows] with zeros between triplets.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from evc_fast.kernels import common
from evc_fast.kernels.emotion_attention_backward import _emotion_attention_bwd_kernel, _emotion_attention_reduce_kernel
from evc_fast.kernels.head_tiles import (
    add_product,
    against,
    load_head,
    no_head,
    padded,
    products,
    spread,
    store_head,
    tile_inside,
    tile_rows,
)

OP = "emotion_attention"
PROGRAMS = 128  # of the backward, about a GPU's multiprocessors, where the batch has as many heads
MIN_CHUNKS = 16
REDUCED = 256  # numbers of the dictionary's gradients that one program sums


@triton.jit
def _emotion_attention_fwd_kernel(
    query,  # [B, K, N, D]
    key,  # [W, D]
    value,  # [W, D]
    gate_query,  # [B, K, N, D]
    gate_key,  # [B, N, D]
    gate_bias,  # [B, N], or None
    context,  # [B, K, N, D], contiguous
    candidates,  # X [B, K, N, D], contiguous, or None
    word_blocks,  # at run time, as column_blocks: unrolled, the loops' addresses would take all registers
    column_blocks,
    gate_bias_b,
    gate_bias_n,
    QUERY_B: tl.constexpr,  # strides
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
    ALIGN: tl.constexpr,  # divides D and the strides of query, key and value
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    TRIPLETS: tl.constexpr,
    FRAMES: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    ROWS: tl.constexpr = TRIPLETS * FRAMES
    HEADS: tl.constexpr = (D, HEAD, ALIGN, MAIN, TAIL)
    TILE: tl.constexpr = (TRIPLETS, FRAMES, K, N)
    tiles = tl.cdiv(K, TRIPLETS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    k = (tl.program_id(0) % tiles) * TRIPLETS
    head = tl.program_id(1) * HEAD
    n = tl.program_id(2) * FRAMES
    frame = tl.arange(0, FRAMES)
    word = tl.arange(0, WORDS)
    own_rows = tile_rows(N * D, D, TILE)
    inside = tile_inside(k, n, TILE)
    query += b * QUERY_B + k * QUERY_K
    gate_query += b * GATE_QUERY_B + k * GATE_QUERY_K + n * GATE_QUERY_N
    gate_key += b * GATE_KEY_B
    first_token = (b * K + k) * (N * D)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    main, tail = no_head(ROWS, HEADS)
    for m in tl.range(0, N, FRAMES, disable_licm=True):  # the frames that the gate gathers from: one block up to 64
        m_inside = tile_inside(k, m, TILE)
        query_main, query_tail = load_head(
            query + m * QUERY_N, tile_rows(QUERY_K, QUERY_N, TILE), m_inside, head, HEADS
        )
        word_top = tl.full([ROWS], float("-inf"), tl.float32)
        word_total = tl.zeros([ROWS], tl.float32)
        x_main, x_tail = no_head(ROWS, HEADS)
        for block in tl.range(word_blocks, disable_licm=True):  # (19): X = softmax(Q K^T / sqrt(d/heads)) V
            w = block * WORDS
            words_inside = w + word < W
            keys_main, keys_tail = load_head(key + w * KEY_W, word.to(tl.int64) * KEY_W, words_inside, head, HEADS)
            values_main, values_tail = load_head(
                value + w * VALUE_W, word.to(tl.int64) * VALUE_W, words_inside, head, HEADS
            )
            scores = against(query_main, query_tail, keys_main, keys_tail, HEADS) * SCALE
            scores = tl.where(words_inside[None, :], scores, float("-inf"))
            new_top = tl.maximum(word_top, tl.max(scores, 1))
            p = tl.exp(scores - new_top[:, None])
            fade = tl.exp(word_top - new_top)
            word_total = word_total * fade + tl.sum(p, 1)
            word_top = new_top
            x_main, x_tail = add_product(
                p, values_main, values_tail, x_main * fade[:, None], x_tail * fade[:, None], HEADS
            )
        x_main = (x_main / word_total[:, None]).to(query.dtype.element_ty)
        x_tail = (x_tail / word_total[:, None]).to(query.dtype.element_ty)
        if candidates is not None:
            target = candidates + first_token + m * D
            store_head(target, own_rows, m_inside & (m == n), head, x_main, x_tail, HEADS)
        frames_inside = m + frame < N  # (20), (21): softmax(G_q G_k^T) X
        scores = products(
            gate_query, tile_rows(GATE_QUERY_K, GATE_QUERY_N, TILE), inside,
            gate_key + m * GATE_KEY_N, frame.to(tl.int64) * GATE_KEY_N, frames_inside, column_blocks, D, COLUMNS,
        )  # fmt: skip
        if gate_bias is not None:
            bias = tl.load(gate_bias + b * gate_bias_b + (m + frame) * gate_bias_n, mask=frames_inside, other=0.0)
            scores += bias.to(tl.float32)[None, :]
        scores = tl.where(frames_inside[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp(scores - new_top[:, None])
        fade = tl.exp(top - new_top)
        total = total * fade + tl.sum(p, 1)
        top = new_top
        main, tail = add_product(spread(p, TILE), x_main, x_tail, main * fade[:, None], tail * fade[:, None], HEADS)
    main /= total[:, None]
    tail /= total[:, None]
    store_head(context + first_token + n * D, own_rows, inside, head, main, tail, HEADS)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_query: Tensor,
    gate_key: Tensor,
    num_heads: int,
    keep_candidates: bool,
    gate_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """context [B, K, N, d], and the candidates X [B, K, N, d] where ``keep_candidates``, else [0].

    gate_bias: [B, N], added to every gate score of a frame: a folded gate has one.

    Raises:
        TypeError: float64.
        ValueError: heads wider than 512.
    """
    query, key, value, gate_query, gate_key = tensors = [
        common.with_adjacent_features(t) for t in (query, key, value, gate_query, gate_key)
    ]
    row = common.parameters(f"{OP}_forward", query.size(-1) // num_heads, query)
    constants = _constants(row, tensors[:3], query, key, value, gate_query, gate_key, num_heads)
    batch, count, frames, width = query.shape
    context = query.new_empty(query.shape)
    candidates = query.new_empty(query.shape if keep_candidates else 0)
    common.launch(
        _emotion_attention_fwd_kernel,
        (batch * triton.cdiv(count, constants["TRIPLETS"]), num_heads, triton.cdiv(frames, constants["FRAMES"])),
        *tensors,
        gate_bias,
        context,
        candidates if keep_candidates else None,
        triton.cdiv(key.size(0), constants["WORDS"]),
        triton.cdiv(width, constants["COLUMNS"]),
        *(gate_bias.stride() if gate_bias is not None else (0, 0)),
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
    grad_context, query, key, value, gate_query, gate_key = tensors = [
        common.with_adjacent_features(t) for t in (grad_context, query, key, value, gate_query, gate_key)
    ]
    row = common.parameters(f"{OP}_backward", query.size(-1) // num_heads, query)
    constants = _constants(row, tensors, query, key, value, gate_query, gate_key, num_heads)
    batch, count, frames, width = query.shape
    chunks = min(batch, max(MIN_CHUNKS, PROGRAMS // num_heads))
    grad_query, grad_gate_query = query.new_empty(query.shape), query.new_empty(query.shape)
    grad_gate_key = gate_key.new_empty(gate_key.shape)
    grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
    partials = key.new_empty(chunks, 2, *key.shape, dtype=torch.float32)
    many = frames > constants["FRAMES"]
    if query.element_size() == 4 and (many or constants["ALIGN"] == 1):  # more addresses at a time
        constants["COLUMNS"] = 16
    elif constants["ALIGN"] == 1:
        constants["COLUMNS"] = min(constants["COLUMNS"], 32)
    gates = key.new_empty(batch, num_heads, count, frames, 3, dtype=torch.float32) if many else None
    common.launch(
        _emotion_attention_bwd_kernel,
        (chunks, num_heads),
        *tensors,
        candidates,
        grad_query,
        grad_gate_query,
        grad_gate_key,
        torch.empty_like(grad_query),
        partials,
        gates,
        batch,
        triton.cdiv(key.size(0), constants["WORDS"]),
        triton.cdiv(width, constants["COLUMNS"]),
        triton.cdiv(constants["MAIN"] + constants["TAIL"], constants["COLUMNS"]),
        GRAD_B=grad_context.stride(0),
        GRAD_K=grad_context.stride(1),
        GRAD_N=grad_context.stride(2),
        STREAMED=bool(row.blocks["STREAMED"]) or constants["TRIPLETS"] * constants["FRAMES"] < 64,
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


def _constants(
    row: common.Row,
    by_head: list[Tensor],  # what is read a head at a time
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_query: Tensor,
    gate_key: Tensor,
    num_heads: int,
) -> dict[str, int | float]:
    """What forward and backward know at compile time: all but the batch, so that needless masks and loops vanish."""
    common.check_dtype(OP, "query", query)
    _, count, frames, width = query.shape
    head = width // num_heads
    align = math.gcd(common.stride_unit(*by_head), width, 16 // query.element_size())
    main, tail = padded(head + max(head * h % align for h in range(num_heads)))
    tile_frames = min(max(common.power_of_two(frames), 16), row.blocks["ROWS"])
    return {
        "QUERY_B": query.stride(0),
        "QUERY_K": query.stride(1),
        "QUERY_N": query.stride(2),
        "KEY_W": key.stride(0),
        "VALUE_W": value.stride(0),
        "GATE_QUERY_B": gate_query.stride(0),
        "GATE_QUERY_K": gate_query.stride(1),
        "GATE_QUERY_N": gate_query.stride(2),
        "GATE_KEY_B": gate_key.stride(0),
        "GATE_KEY_N": gate_key.stride(1),
        "SCALE": head**-0.5,
        "K": count,
        "N": frames,
        "W": key.size(0),
        "D": width,
        "HEAD": head,
        "ALIGN": align,
        "MAIN": main,
        "TAIL": tail,
        "TRIPLETS": min(common.power_of_two(count), row.blocks["ROWS"] // tile_frames),
        "FRAMES": tile_frames,
        "WORDS": min(max(common.power_of_two(key.size(0)), 16), row.blocks["WORDS"]),
        "COLUMNS": min(max(common.power_of_two(width), 16), row.blocks["COLUMNS"]),
    }
