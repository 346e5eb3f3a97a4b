"""Progressive emotion augmentation, equations (19)-(21) of FACE-net, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from evc_fast.reference._dtypes import accumulate_dtype


def emotion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_query: Tensor,
    gate_key: Tensor,
    num_heads: int,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """Reference of :func:`evc_fast.ops.emotion_attention`, which states the contract.

    ``gate_bias`` [B, N] is added to every gate score of a frame: a folded gate has one.
    """
    values = _heads(value, num_heads).transpose(0, 1)  # [heads, W, d/heads]
    attention = _word_attention(query, key, num_heads)
    candidates = (attention @ values).transpose(-3, -2).flatten(-2)  # (19) [B, K, N, d]
    return (_gate(gate_query, gate_key, gate_bias) @ candidates).to(query.dtype)  # (21), before W_o and phi_E


def emotion_distribution(
    query: Tensor,
    key: Tensor,
    gate_query: Tensor,
    gate_key: Tensor,
    num_heads: int,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """[B, K, W], sums to 1: attention of (19) over the words, mean over heads and over frames weighted by q_i (20).

    Arguments as of :func:`emotion_attention`; accumulates and returns float32 (float64 for float64).
    """
    attention = _word_attention(query, key, num_heads).mean(-3)  # [B, K, N, W]
    return (_gate(gate_query, gate_key, gate_bias).mean(-2, keepdim=True) @ attention).squeeze(-2)


def _word_attention(query: Tensor, key: Tensor, num_heads: int) -> Tensor:
    """The softmax of (19) over the dictionary's W words: [B, K, heads, N, W]."""
    queries = _heads(query, num_heads).transpose(-3, -2)  # [B, K, heads, N, d/heads]
    keys = _heads(key, num_heads).permute(1, 2, 0)  # [heads, d/heads, W]
    return torch.softmax(queries @ keys / queries.size(-1) ** 0.5, -1)


def _gate(gate_query: Tensor, gate_key: Tensor, gate_bias: Tensor | None) -> Tensor:
    """q_i of (20): [B, K, N, N], rows sum to 1."""
    dtype = accumulate_dtype(gate_query)
    scores = gate_query.to(dtype) @ gate_key.to(dtype).mT.unsqueeze(1)
    if gate_bias is not None:
        scores = scores + gate_bias.to(dtype)[:, None, None, :]
    return torch.softmax(scores, -1)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[..., d] -> [..., heads, d/heads] in the type that accumulates."""
    return x.to(accumulate_dtype(x)).unflatten(-1, (num_heads, -1))
