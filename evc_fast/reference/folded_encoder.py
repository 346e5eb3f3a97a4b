"""The folded encoder, equations (10)-(29) of FACE-net with fixed weights, in plain PyTorch.

With fixed weights the same function costs less than half. What :class:`FoldedWeights` holds is made by
:func:`evc_fast.model.folded.fold_weights`; these identities make it exact:

- a bias on keys adds the same to all scores of a row, which a softmax ignores; one on values comes out unchanged,
  because a softmax's weights sum to 1, and joins the next bias;
- H_i (17) has rank heads * 3: it is P_i [N, heads * 3] times the 3 values of each head, so that W_o and the FFN's first
  layer apply to heads * 3 rows of a triplet, not to its N frames; the router's logits come out of the same product;
- phi_F(F) phi_V(V)^T is F (V A)^T plus one number a frame;
- routing (27) and pooling (23) are linear, their weights sum to 1: W_o and phi_E of (21) come after them;
- q' of (28) is constant: the scores of Attn_d are M times one matrix [d, heads * N_q].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evc_fast.reference.emotion_attention import emotion_attention, emotion_distribution
from evc_fast.reference.entropy_calibration import entropy_calibration
from evc_fast.reference.factored_hidden import factored_hidden
from evc_fast.reference.routing_aggregation import routing_aggregation


class FoldedOptions(NamedTuple):
    """What the weights' shapes leave open."""

    num_heads: int
    num_triplets: int
    num_queries: int
    retrieval: bool
    emotion_augmentation: bool
    bias_adjustment: bool
    emotion_first: bool
    video_router: bool
    merge_identical_triplets: bool
    self_refine: bool
    cross_refine: bool
    norm_eps: float

    @property
    def num_groups(self) -> int:
        """K as the encoder sees it: 1 without retrieval."""
        return self.num_triplets if self.retrieval else 1

    @property
    def has_router(self) -> bool:
        """Whether routing weights are anything but 1/K."""
        return self.retrieval and self.bias_adjustment and self.num_triplets > 1


class FoldedWeights(NamedTuple):
    """Matrices [out, in] as of ``nn.Linear``; None where the configuration has no such part. F: the FFN's width."""

    video_weight: Tensor | None
    """[d, D_v] of (2); None where D_v = d."""
    video_bias: Tensor | None
    visual_weight: Tensor
    """[C, d]: all products of V, in the order of :func:`visual_sections`."""
    visual_bias: Tensor
    triplet_weight: Tensor | None
    """[2 d, D_t]: keys and values of Attn_f (17) after W_T, without biases."""
    hidden_weight: Tensor | None
    """[heads, d / heads, F + K K]: each head's rows of W_o, times the H half of the FFN's first layer (18), and times
    the K blocks [d, K] of W_g (26), block of triplet k at F + k K; F alone where no router stands."""
    router_bias: Tensor | None
    """[K]: what the constant part of H adds to the logits."""
    ffn_weight: Tensor
    """[d, F], the second layer of (18)."""
    ffn_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    emotion_query_weight: Tensor | None
    """[d, d] and [d]: Attn_c's q of F; None where V is the query."""
    emotion_query_bias: Tensor | None
    key: Tensor | None
    """[W, d]: the projected dictionary."""
    value: Tensor | None
    emotion_weight: Tensor | None
    """[d, d]: W_o of Attn_c, then phi_E. With emotion first [2 d, d]: E, then Attn_f's q of E."""
    emotion_bias: Tensor | None
    gate_weight: Tensor | None
    """[2 d, 2 d]: both gates (24), (25) of [pooled F ; pooled context]; [d, d] without emotions."""
    gate_bias: Tensor | None
    head_weight: Tensor | None
    """[W, d]: the classification head of the context."""
    head_bias: Tensor | None
    memory_weight: Tensor
    """[heads N_q + d, d]: scores with q' and values of Attn_d, (29)."""
    output_weight: Tensor
    """[d_out, d]: W_o of Attn_d, then phi_M."""
    output_bias: Tensor
    """[N_q, d_out]: q' and all biases through phi_M."""


def visual_sections(weights: FoldedWeights, options: FoldedOptions) -> dict[str, int]:
    """Name and width of each product of V, in the order of ``visual_weight``'s rows."""
    hidden, d = weights.ffn_weight.shape[1], weights.ffn_weight.shape[0]
    sections = {"hidden": hidden}  # the V half of the FFN's first layer, with its bias
    if options.retrieval and not options.emotion_first:
        sections["query"] = d  # Attn_f's q
    if options.emotion_augmentation:
        if options.emotion_first:
            sections["emotion_query"] = d  # Attn_c's q
        sections["gate_key"] = d  # phi_F^T phi_V of (20)
        sections["gate_bias"] = 1
    sections["memory"] = weights.memory_weight.shape[0]  # scores and values of Attn_d
    return sections


class FoldedOutput(NamedTuple):
    """What the encoder computes; the last six, for explanation, only where asked for, float32 (float64 for float64)."""

    tokens: Tensor  # [B, N_q, d_out]
    emotion_logits: Tensor | None  # [B, W]
    component_weights: Tensor | None = None  # [B, K, 3]
    triplet_weights: Tensor | None = None  # [B, K]
    routing_weights: Tensor | None = None  # [B, N, K]
    emotion_distribution: Tensor | None = None  # [B, K, W]
    fact_gate: Tensor | None = None  # [B, d], the type of the weights
    emotion_gate: Tensor | None = None  # [B, d], the type of the weights


def visual_products(visual: Tensor, w: FoldedWeights, o: FoldedOptions) -> dict[str, Tensor]:
    """All products of V [B, N, d] by name, each [B, N, width] of :func:`visual_sections`."""
    sections = visual_sections(w, o)
    products = F.linear(visual, w.visual_weight, w.visual_bias).split(list(sections.values()), -1)
    return dict(zip(sections, products, strict=True))


class FoldedParts(NamedTuple):
    """The functions within that have other forms, each with the arguments and results of its reference."""

    visual_products: Callable[..., dict[str, Tensor]] = visual_products
    entropy_calibration: Callable[..., tuple[Tensor, Tensor, Tensor]] = entropy_calibration
    factored_hidden: Callable[..., Tensor] = factored_hidden
    emotion_attention: Callable[..., Tensor] = emotion_attention
    routing_aggregation: Callable[..., tuple[Tensor, Tensor, Tensor]] = routing_aggregation


def folded_encoder(
    video: Tensor,
    triplets: Tensor | None,
    similarity: Tensor | None,
    groups: Tensor | None,
    weights: FoldedWeights,
    options: FoldedOptions,
    *,
    explain: bool = False,
    parts: FoldedParts = FoldedParts(),  # noqa: B008  (immutable)
) -> FoldedOutput:
    """Reference of :func:`evc_fast.ops.folded_encoder`, which states the contract; with other ``parts`` it is fused."""
    w, o = weights, options
    d, heads = w.ffn_weight.shape[0], o.num_heads
    batch, frames, _ = video.shape
    visual = video if w.video_weight is None else F.linear(video, w.video_weight, w.video_bias)  # V
    of_v = parts.visual_products(visual, w, o)
    # Without emotions the routed and pooled ones are never read.
    residual, context, distribution = visual, video.new_zeros(()).expand(batch, 1, frames, d), None
    if o.emotion_augmentation:
        gate = of_v["gate_key"], heads, of_v["gate_bias"].squeeze(-1)

        def augment(query: Tensor, facts: Tensor) -> tuple[Tensor, Tensor | None]:  # (19)-(21), before W_o and phi_E
            key = query, w.key, facts, *gate
            shown = emotion_distribution(*key) if explain else None
            return parts.emotion_attention(query, w.key, w.value, facts, *gate), shown

    if o.emotion_first:
        context, distribution = augment(of_v["emotion_query"].unsqueeze(1), visual.unsqueeze(1))
        emotions = F.linear(context.squeeze(1), w.emotion_weight, w.emotion_bias)
        residual = emotions[..., :d]  # E in place of V

    if not o.retrieval:
        hidden = F.gelu(of_v["hidden"]).unsqueeze(1)  # [B, 1, N, F]
    logits = video.new_zeros(()).expand(batch, frames, o.num_groups)
    component_weights = triplet_weights = None
    if o.retrieval:
        calibrated, component_weights, triplet_weights = parts.entropy_calibration(  # (10)-(16)
            triplets,
            similarity,
            groups if o.merge_identical_triplets else None,
            self_refine=o.self_refine,
            cross_refine=o.cross_refine,
        )
        query = emotions[..., d:] if o.emotion_first else of_v["query"]
        attention, of_values = _factors_of_triplets(query, calibrated.to(video.dtype), w, heads)
        width = w.ffn_weight.shape[1]
        hidden = parts.factored_hidden(attention, of_values[..., :width], of_v["hidden"])  # [B, K, N, F]
        if o.has_router:  # (26): each triplet's H through its own block of W_g
            of_h = attention @ of_values[..., width:]  # [B, K, N, K K]
            blocks = [of_h[:, k, :, k * o.num_groups :][..., : o.num_groups] for k in range(o.num_groups)]
            logits = torch.stack(blocks).sum(0) + w.router_bias
            if o.video_router:
                logits = logits.mean(1, keepdim=True).expand_as(logits)
    update = F.linear(hidden, w.ffn_weight, w.ffn_bias)
    facts = F.layer_norm(update + residual.unsqueeze(1), (d,), w.norm_weight, w.norm_bias, o.norm_eps)  # (18)
    if o.emotion_augmentation and not o.emotion_first:
        context, distribution = augment(F.linear(facts, w.emotion_query_weight, w.emotion_query_bias), facts)

    routed, pooled, routing_weights = parts.routing_aggregation(  # (22)-(23), (26)-(27)
        facts, context.expand_as(facts), logits
    )
    routed_facts, routed_context = routed[:, :frames], routed[:, frames:]
    gates = torch.ones_like(pooled)
    if o.bias_adjustment:  # (24), (25)
        gates = F.linear(pooled if o.emotion_augmentation else pooled[:, :d], w.gate_weight, w.gate_bias).tanh()
    fact_gate, emotion_gate, emotion_logits = gates[:, :d], None, None
    fused = fact_gate.unsqueeze(1) * routed_facts  # M of (27)
    if o.emotion_augmentation:
        if not o.emotion_first:
            emotions = F.linear(routed_context, w.emotion_weight, w.emotion_bias)
        emotion_gate = gates[:, d:]
        emotion_logits = F.linear(routed_context.mean(1), w.head_weight, w.head_bias)
        fused = torch.cat([fused, emotion_gate.unsqueeze(1) * emotions[..., :d]], 1)

    memory = torch.cat([F.linear(fused, w.memory_weight), of_v["memory"]], 1)  # [M ; V] through Attn_d's maps
    scores, values = memory.split([heads * o.num_queries, d], -1)
    scores = scores.unflatten(-1, (heads, o.num_queries)).permute(0, 2, 3, 1)  # [B, heads, N_q, S]
    read = scores.softmax(-1) @ values.unflatten(-1, (heads, -1)).transpose(1, 2)
    tokens = F.linear(read.transpose(1, 2).flatten(2), w.output_weight) + w.output_bias  # (29)
    if not explain:
        return FoldedOutput(tokens, emotion_logits)
    if distribution is not None:
        distribution = distribution.expand(-1, o.num_groups, -1)
    shown = component_weights, triplet_weights, routing_weights, distribution, fact_gate, emotion_gate
    return FoldedOutput(tokens, emotion_logits, *shown)


def _factors_of_triplets(query: Tensor, calibrated: Tensor, w: FoldedWeights, heads: int) -> tuple[Tensor, Tensor]:
    """H through the FFN and the router, [B, K, N, F + K K], as two factors.

    query: [B, N, d], scaled; calibrated: [B, K, 3, D_t]. Returns P of (17) [B, K, N, h 3] and [B, K, h 3, F + K K].
    """
    batch, k, components, _ = calibrated.shape
    keys, values = F.linear(calibrated, w.triplet_weight).unflatten(-1, (2, heads, -1)).unbind(-3)  # [B, K, 3, h, d/h]
    q = query.unflatten(-1, (heads, -1)).transpose(1, 2).unsqueeze(1)  # [B, 1, h, N, d/h]
    attention = (q @ keys.permute(0, 1, 3, 4, 2)).softmax(-1)  # P of (17) [B, K, h, N, 3]
    rows = values.permute(3, 0, 1, 2, 4).reshape(heads, batch * k * components, values.shape[-1])
    of_values = (rows @ w.hidden_weight).unflatten(1, (batch, k, components))  # [h, B, K, 3, F + K K]
    return attention.transpose(2, 3).flatten(3), of_values.permute(1, 2, 0, 3, 4).flatten(2, 3)
