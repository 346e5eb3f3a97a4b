"""What the encoder returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Explanation(NamedTuple):
    """What explains a caption; no gradients. A field is None where an ablation removed what it shows."""

    component_weights: Tensor | None
    """alpha (12) [B, K, 3]: share of subject, predicate, object; sums to 1. None without retrieval."""
    triplet_weights: Tensor | None
    """theta (15) [B, K]: share of each triplet; sums to 1 where all groups are distinct. None without retrieval."""
    routing_weights: Tensor
    """G (26) [B, N, K]: weight of each triplet at each frame; sums to 1 over K."""
    emotion_distribution: Tensor | None
    """[B, K, W]: attention of (19) over the words, mean over heads and over frames weighted by q_i (20); sums to 1."""
    fact_gate: Tensor
    """B_f (24) [B, d], in (-1, 1); ones without bias adjustment."""
    emotion_gate: Tensor | None
    """B_e (25) [B, d], in (-1, 1); ones without bias adjustment, None without emotion augmentation."""


class EncoderOutput(NamedTuple):
    """What :class:`FaceNetEncoder` returns."""

    tokens: Tensor
    """[B, N_q, d_out], what the decoder reads (29)."""
    emotion_logits: Tensor | None
    """[B, W], what L_cls (31) reads; None without emotion augmentation."""
    explanation: Explanation | None
    """Only with ``explain=True``."""
