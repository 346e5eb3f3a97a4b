"""Factual calibration, equations (10)-(16) of FACE-net, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from evc_fast.reference._dtypes import accumulate_dtype

MIN_SIMILARITY = 1e-6


def entropy_calibration(
    triplets: Tensor,
    similarity: Tensor,
    groups: Tensor | None = None,
    *,
    self_refine: bool = True,
    cross_refine: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of :func:`evc_fast.ops.entropy_calibration`, which states the contract."""
    features = triplets.to(accumulate_dtype(triplets))
    alpha = _component_weights(features) if self_refine else torch.full_like(features[..., 0], 1 / 3)
    similarity = similarity.to(features.dtype)
    theta = (
        _triplet_weights(similarity, groups) if cross_refine else torch.full_like(similarity, 1 / similarity.size(1))
    )
    calibrated = (theta[..., None] * alpha)[..., None] * features  # (13), (16)
    return calibrated.to(triplets.dtype), alpha.detach(), theta.detach()


def _component_weights(features: Tensor) -> Tensor:
    """alpha [B, K, 3]: each component's share of its triplet's feature entropy."""
    shifted = features - features.amax(-1, keepdim=True).detach()  # entropy does not change; 1e4 stays finite
    log_total = shifted.logsumexp(-1, keepdim=True)
    p = (shifted - log_total).exp()  # (10)
    entropy = log_total.squeeze(-1) - (p * shifted).sum(-1)  # (11), as logsumexp(T) - sum p T
    total = entropy.sum(-1, keepdim=True)
    certain = total == 0  # three one-hot components: nothing to weigh, and no gradient
    return torch.where(certain, 1 / 3, entropy / torch.where(certain, 1, total))  # (12)


def _triplet_weights(similarity: Tensor, groups: Tensor | None) -> Tensor:
    """theta [B, K]: each triplet's share of the semantic entropy of its video's retrieved triplets."""
    count = similarity.size(1)
    s = similarity.clamp(min=MIN_SIMILARITY)
    if groups is None:
        same = torch.eye(count, dtype=torch.bool, device=s.device).expand(s.size(0), -1, -1)
        single = torch.full_like(s[:, :1], count == 1, dtype=torch.bool)
    else:
        same = groups[:, :, None] == groups[:, None, :]
        single = (groups == groups[:, :1]).all(1, keepdim=True)
    p = torch.where(same, s[:, None, :], 0).sum(-1) / s.sum(-1, keepdim=True)  # (14)
    p_log_p = p * p.log()
    total = p_log_p.sum(-1, keepdim=True)
    return torch.where(single, 1 / count, p_log_p / torch.where(single, 1, total))  # (15); one group: 1/K, no gradient
