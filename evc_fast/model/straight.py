"""Equations (17), (18), (20)-(23), (26) and (27) as the paper prints them, batched over the K retrieval groups.

:mod:`evc_fast.model.commuted` has the same three functions, with the products in an order that costs less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evc_fast import ops
from evc_fast.ops.dispatch import Impl

if TYPE_CHECKING:
    from evc_fast.model.encoder import FaceNetEncoder


def factual_semantics(
    encoder: FaceNetEncoder, v: Tensor, query: Tensor, calibrated: Tensor, impl: Impl | None
) -> tuple[Tensor, Tensor | None]:
    """(17), (18) before the residual and the norm, and what (26) makes of H.

    Args:
        v: V [B, 1, N, d]: what depends on V alone is computed once for all K.
        query: what attends to the triplets, V or E [B, 1, N, d].
        calibrated: the triplets after (13), (16) [B, K, 3, D_t].
        impl: which implementation of the fused ops runs.

    Returns:
        FFN([V ; H]) of (18) [B, K, N, d], and the logits of (26) [B, N, K], None where no router stands.
    """
    hidden = encoder.fact_attention(query, encoder.triplet_projection(calibrated))  # (17) H [B, K, N, d]
    update = encoder.ffn(torch.cat([v.expand_as(hidden), hidden], -1))
    if encoder.router is None:
        return update, None
    if encoder.config.router == "video":
        hidden = hidden.mean(2, keepdim=True)
    logits = encoder.router(hidden.transpose(1, 2).flatten(2))  # [H_1 ; ... ; H_K] W_g
    return update, logits.expand(-1, v.shape[2], -1)


def visual_gate(encoder: FaceNetEncoder, summed: Tensor, facts: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
    """The two sides of (20), whose product is phi_F(F_i) phi_V(V)^T up to what is the same in a row.

    Args:
        summed: what (18) normalizes [B, K, N, d]. facts: F, the normalized [B, K, N, d]. visual: V [B, N, d].

    Returns:
        queries [B, K, N, d] and keys [B, N, d] of the gate.
    """
    return encoder.phi_f(facts), encoder.phi_v(visual)


def routing(
    encoder: FaceNetEncoder, facts: Tensor, context: Tensor, logits: Tensor, impl: Impl | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(21)-(23), (26), and (27) before the gates.

    Args:
        facts: F [B, K, N, d].
        context: what Attn_c reads, gathered by the visual gate, before the maps of (21) [B, K, N, d].
        logits: of (26) [B, N, K].

    Returns:
        routed [B, 2N, d] and pooled [B, 2d], each of the facts first, then of the emotions; weights [B, N, K].
    """
    return ops.routing_aggregation(facts, encoder.project_emotions(context), logits, impl=impl)
