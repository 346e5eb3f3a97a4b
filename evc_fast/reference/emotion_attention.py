"""Progressive emotion augmentation, equations (19)-(21) of FACE-net, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from evc_fast.reference._dtypes import accumulate_dtype


def emotion_attention(
    query: Tensor, key: Tensor, value: Tensor, gate_query: Tensor, gate_key: Tensor, num_heads: int
) -> Tensor:
    """Reference of :func:`evc_fast.ops.emotion_attention`, which states the contract."""
    dtype = accumulate_dtype(query)
    head_width = query.size(-1) // num_heads
    queries = query.to(dtype).unflatten(-1, (num_heads, head_width)).transpose(-3, -2)  # [B, K, heads, N, d/heads]
    keys = key.to(dtype).unflatten(-1, (num_heads, head_width)).permute(1, 2, 0)  # [heads, d/heads, W]
    values = value.to(dtype).unflatten(-1, (num_heads, head_width)).transpose(0, 1)  # [heads, W, d/heads]
    attention = torch.softmax(queries @ keys / head_width**0.5, -1)  # over the dictionary's W words
    candidates = (attention @ values).transpose(-3, -2).flatten(-2)  # (19) [B, K, N, d]
    gate = torch.softmax(gate_query.to(dtype) @ gate_key.to(dtype).mT.unsqueeze(1), -1)  # (20) [B, K, N, N]
    return (gate @ candidates).to(query.dtype)  # (21), before the output projection and phi_E
