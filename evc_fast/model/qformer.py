"""The lightweight Q-former, equations (28)-(29)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evc_fast.model.attention import MultiHeadAttention


class QFormer(nn.Module):
    """Learnable queries that read the multimodal representation into tokens of the decoder's width.

    Args:
        dim: d. num_heads: heads of both attentions. num_queries: N_q. output_dim: d_out.
    """

    def __init__(self, dim: int, num_heads: int, num_queries: int, output_dim: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(1, num_queries, dim).normal_(std=0.02))  # q
        self.self_attention = MultiHeadAttention(dim, num_heads)  # Attn_q
        self.cross_attention = MultiHeadAttention(dim, num_heads)  # Attn_d
        self.output_projection = nn.Linear(dim, output_dim)  # phi_M

    def forward(self, memory: Tensor, *, straight: bool = False) -> Tensor:
        """memory [B, S, d], which is [M ; V] -> tokens [B, N_q, d_out].

        ``straight``: every product of (29) as it is printed, for the baseline that is measured against.
        """
        # (28), once for the whole batch: nothing of a video enters before the cross-attention.
        queries = self.self_attention(self.queries, self.queries) + self.queries
        attention = self.cross_attention
        # Keys read by the same queries all over the batch need no projection: it pays while the heads' queries are few.
        shared = not straight and attention.num_heads * queries.shape[1] < attention.dim
        read = attention.read if shared else attention
        return self.output_projection(read(queries, memory) + queries)  # (29)
