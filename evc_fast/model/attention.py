"""The "Attn" of the paper: multi-head attention with query, key, value and output projections."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class MultiHeadAttention(nn.Module):
    """Attn(Q, K = V): softmax(q k^T / sqrt(dim / num_heads)) v on heads, between q/k/v/o projections with biases.

    Args:
        dim: width of queries, of the heads together, and of the output; a multiple of ``num_heads``.
        num_heads: number of heads.
        memory_dim: width of what keys and values are projected from, ``dim`` if None.
    """

    def __init__(self, dim: int, num_heads: int, memory_dim: int | None = None) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got dim={dim} and num_heads={num_heads}")
        memory_dim = dim if memory_dim is None else memory_dim
        self.dim = dim
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(memory_dim, dim)
        self.v_proj = nn.Linear(memory_dim, dim)
        self.o_proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """query [..., L, dim] attends to memory [..., S, memory_dim] -> [..., L, dim].

        Both have the same rank, at least 3. The query's leading axes broadcast to the memory's, after the projection:
        a query with an axis of 1 is projected once for all that read it.
        """
        *lead, _, _ = memory.shape
        length = query.shape[-2]
        # [..., h, L, dim / h]; one batch axis, because only four-dimensional inputs reach the fused attention kernels.
        q = self._split_heads(self.q_proj(query)).expand(*lead, -1, -1, -1).flatten(0, -4)
        k = self._split_heads(self.k_proj(memory)).flatten(0, -4)
        v = self._split_heads(self.v_proj(memory)).flatten(0, -4)
        context = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(context.transpose(1, 2).reshape(*lead, length, self.dim))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
