"""Equations (17), (18), (20)-(23), (26), (27) with linear maps moved past each other, to where they meet fewer rows.

The same three functions as in :mod:`evc_fast.model.straight`, and the same results. No identity here needs the weights
to be fixed: parameters are read as they stand, gradients are exact, and training gains as inference does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from evc_fast import ops
from evc_fast.model.attention import MultiHeadAttention
from evc_fast.ops.dispatch import Impl

if TYPE_CHECKING:
    from evc_fast.model.encoder import FaceNetEncoder


def factual_semantics(
    encoder: FaceNetEncoder, v: Tensor, query: Tensor, calibrated: Tensor, impl: Impl | None
) -> tuple[Tensor, Tensor | None]:
    """Arguments and results of :func:`evc_fast.model.straight.factual_semantics`."""
    hidden = attend_in_factors(encoder.fact_attention, query, encoder.triplet_projection(calibrated))  # (17)
    first, activation, *rest = encoder.ffn
    # (18): [V ; H_i] W_1 = V W_V + H_i W_H, and the first summand is the same for all K.
    visual_weight, hidden_weight = first.weight.split(encoder.config.dim, 1)
    visual = F.linear(v, visual_weight, first.bias + hidden.bias @ hidden_weight.T)
    mapped = hidden.mapped(hidden_weight)
    if type(activation) is nn.GELU and activation.approximate == "none":
        update = ops.factored_hidden(hidden.weights, mapped, visual.squeeze(1), impl=impl)
    else:  # somebody's own
        update = activation(hidden.weights @ mapped + visual)
    for layer in rest:
        update = layer(update)
    if encoder.router is None:
        return update, None
    if encoder.config.router == "video":
        hidden = hidden._replace(weights=hidden.weights.mean(2, keepdim=True))
    return update, hidden.route(encoder.router.weight).expand(-1, v.shape[2], -1)


def visual_gate(encoder: FaceNetEncoder, summed: Tensor, facts: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments and results of :func:`evc_fast.model.straight.visual_gate`."""
    if facts.shape[1] == 1:
        return encoder.phi_f(facts), encoder.phi_v(visual)
    # (20): with F = gamma x + beta, phi_F(F) k = x (gamma W_F k) + phi_F(beta) k: W_F meets V's N rows, and not K N.
    norm, d = encoder.fact_norm, encoder.config.dim
    reader = encoder.phi_f.weight * norm.weight
    # x sums to 0, so x r ignores a shift of r, and (x + 1) r = x r + sum r: rows are shifted to the sum phi_F(beta).
    reader = reader + (encoder.phi_f(norm.bias) / d - reader.mean(1)).unsqueeze(1)
    ones = torch.ones_like(norm.bias)
    query = F.layer_norm(summed, norm.normalized_shape, ones, ones, norm.eps)  # x + 1
    return query.to(summed.dtype), chain(visual, encoder.phi_v, reader.T)


def routing(
    encoder: FaceNetEncoder, facts: Tensor, context: Tensor, logits: Tensor, impl: Impl | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of :func:`evc_fast.model.straight.routing`."""
    routed, pooled, weights = ops.routing_aggregation(facts, context, logits, impl=impl)
    frames, d = facts.shape[2:]
    # (21) in (23) and (27): weights that sum to 1 over K commute with affine maps, so N + 1 rows a video are mapped.
    if not encoder.config.emotion_augmentation:
        return routed, pooled, weights
    emotions = torch.cat([routed[:, frames:], pooled[:, None, d:]], 1)
    emotions = chain(emotions, encoder.emotion_attention.o_proj, encoder.phi_e.weight, encoder.phi_e.bias)
    routed = torch.cat([routed[:, :frames], emotions[:, :frames]], 1)
    return routed, torch.cat([pooled[:, :d], emotions[:, frames]], 1), weights


def chain(x: Tensor, first: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """first(x) W^T + b; where rows of x are many, by x (W W_first)^T. A batch of unknown size counts as large."""
    (out, middle), width = weight.shape, x.shape[-1]
    rows = x.numel() // width
    if statically_known_true(rows * middle * (width + out) <= width * out * (middle + rows)):
        return F.linear(first(x), weight, bias)
    return F.linear(x, weight @ first.weight, F.linear(first.bias, weight, bias))


class FactoredHidden(NamedTuple):
    """H of (17) in factors, P v W_o + b_o: H_i [N, d] has rank 3 heads, so maps meet v's rows before P spreads them."""

    weights: Tensor
    """P [B, K, N, 3 heads]: attention of each frame to the parts of a triplet; sums to 1 over them for each head."""
    values: Tensor
    """v [heads, B, K, 3, d / heads]."""
    output_weight: Tensor
    """W_o [d, d], as the linear layer holds it."""
    bias: Tensor
    """b_o [d]."""

    def mapped(self, weight: Tensor) -> Tensor:
        """v W_o W [B, K, 3 heads, out], for W as a linear layer holds it [out, d]: what P times is (H - b_o) W."""
        heads, batch, num_groups, parts, _ = self.values.shape
        values = self.values.flatten(1, 3)  # [heads, rows, d / heads]
        output = self.output_weight.unflatten(1, (heads, -1)).permute(1, 2, 0)  # [heads, d / heads, d]
        rows, (out, d) = values.shape[1], weight.shape
        # (v W_o) W or v (W_o W), whichever has fewer multiply-adds; a batch of unknown size counts as large.
        if statically_known_true(rows * d * (d + heads * out) < d * out * (d + rows)):
            mapped = (values @ output) @ weight.T
        else:
            mapped = values @ (output @ weight.T)
        return mapped.transpose(0, 1).reshape(batch, num_groups, parts * heads, out)

    def route(self, weight: Tensor) -> Tensor:
        """[H_1 ; ... ; H_K] W_g of (26) [B, N, K], for W_g as a linear layer holds it [K, K d]."""
        heads, _, num_groups, _, _ = self.values.shape
        by_group = weight.unflatten(1, (num_groups, -1))  # [K, K, d]
        readers = (by_group @ self.output_weight).unflatten(2, (heads, -1))  # W_o W_g [K, K, heads, d / heads]
        read = torch.einsum("hbkpe,jkhe->bkphj", self.values, readers).flatten(2, 3)  # [B, K, 3 heads, K]
        return torch.einsum("bknr,bkrj->bnj", self.weights, read) + by_group.sum(1) @ self.bias


def attend_in_factors(attention: MultiHeadAttention, query: Tensor, memory: Tensor) -> FactoredHidden:
    """Attn_f(Q = query [B, 1, N, d], K = V = memory [B, K, 3, d]) of (17), its sums over parts left to be done."""
    query = attention.split_heads(attention.q_proj(query))  # [B, 1, heads, N, d / heads]
    key, value = (attention.split_heads(project(memory)) for project in (attention.k_proj, attention.v_proj))
    weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)  # [B, K, heads, N, 3]
    return FactoredHidden(
        weights.permute(0, 1, 3, 4, 2).flatten(3),
        value.permute(2, 0, 1, 3, 4),
        attention.o_proj.weight,
        attention.o_proj.bias,
    )
