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
        q = self.split_heads(self.q_proj(query)).expand(*lead, -1, -1, -1).flatten(0, -4)
        k = self.split_heads(self.k_proj(memory)).flatten(0, -4)
        v = self.split_heads(self.v_proj(memory)).flatten(0, -4)
        context = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(context.transpose(1, 2).reshape(*lead, length, self.dim))

    def read(self, query: Tensor, memory: Tensor) -> Tensor:
        """:meth:`forward` for one query [1, L, dim] that all of a batch share, and memory [B, S, memory_dim].

        q_h (m W_k,h)^T = (q_h W_k,h^T) m^T: heads L rows meet every memory, and keys are never projected.
        """
        length, head_width = query.shape[-2], self.dim // self.num_heads
        queries = self.split_heads(self.q_proj(query))[0] / head_width**0.5  # [h, L, dim / h]
        readers = queries @ self.k_proj.weight.unflatten(0, (self.num_heads, -1))  # [h, L, memory_dim]
        shift = queries @ self.k_proj.bias.unflatten(0, (self.num_heads, -1)).unsqueeze(-1)  # [h, L, 1]
        scores = F.linear(memory, readers.flatten(0, 1), shift.flatten())  # [B, S, h L]
        weights = scores.mT.unflatten(1, (self.num_heads, length)).softmax(-1)  # [B, h, L, S]
        context = weights @ self.split_heads(self.v_proj(memory))
        return self.o_proj(context.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        """[..., L, dim] -> [..., h, L, dim / h]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
