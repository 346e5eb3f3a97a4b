"""Dynamic bias routing, equations (22), (23), (26) and the sums of (27) of FACE-net, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from evc_fast.reference._dtypes import accumulate_dtype


def routing_aggregation(facts: Tensor, emotions: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of :func:`evc_fast.ops.routing_aggregation`, which states the contract."""
    dtype = accumulate_dtype(facts)
    semantics = facts.to(dtype), emotions.to(dtype)
    weights = torch.softmax(logits.to(dtype), -1)  # (26) [B, N, K]
    by_triplet = weights.transpose(1, 2).unsqueeze(-1)  # [B, K, N, 1]
    routed = torch.cat([(by_triplet * x).sum(1) for x in semantics], 1)  # (27), before the gates
    pooled = torch.cat([x.mean((1, 2)) for x in semantics], 1)  # (22), (23)
    return routed.to(facts.dtype), pooled.to(facts.dtype), weights.detach()
