"""The training objective, equations (30)-(32). Sums run in float32 (float64 for float64 logits) under any autocast."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Denominators", "Losses", "caption_loss", "emotion_loss", "face_net_loss"]


class Denominators(NamedTuple):
    """What the sums over one optimiser step's batch are divided by, however it is cut into pieces."""

    tokens: int
    """Target tokens, <eos> included, without padding."""
    captions: int


class Losses(NamedTuple):
    """Scalars; of a piece of a batch, its share of the batch's losses."""

    total: Tensor
    """L (32)."""
    caption: Tensor
    """L_e (30)."""
    emotion: Tensor
    """L_cls (31); 0 where the model has no emotion logits."""


def caption_loss(logits: Tensor, target_ids: Tensor, weights: Tensor, denominator: int | Tensor) -> Tensor:
    """L_e (30): the sum over target tokens of weight times cross-entropy, divided by ``denominator``.

    Args:
        logits: [B, T, vocabulary].
        target_ids: int64 [B, T].
        weights: [B, T]: 1 + delta where the target is (a piece of) an emotion word, 1 on other targets, <eos>
            included, 0 on padding.
        denominator: number of target tokens of the whole batch; more than those here, where this is a piece of it.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    with torch.autocast(logits.device.type, enabled=False):
        entropies = F.cross_entropy(logits.to(wide).flatten(0, 1), target_ids.flatten(), reduction="none")
        return (entropies * weights.flatten().to(wide)).sum() / denominator


def emotion_loss(emotion_logits: Tensor, words: Tensor, denominator: int | Tensor) -> Tensor:
    """L_cls (31): minus the log-probabilities of the captions' dictionary words, summed, divided by ``denominator``.

    Args:
        emotion_logits: [B, W].
        words: bool [B, W]: the distinct dictionary words of each caption; a row of none adds 0.
        denominator: number of captions of the whole batch.
    """
    wide = torch.promote_types(emotion_logits.dtype, torch.float32)
    with torch.autocast(emotion_logits.device.type, enabled=False):
        log_probabilities = emotion_logits.to(wide).log_softmax(-1)
        return -(log_probabilities * words).sum() / denominator


def face_net_loss(
    logits: Tensor,
    emotion_logits: Tensor | None,
    target_ids: Tensor,
    weights: Tensor,
    words: Tensor,
    denominators: Denominators,
    *,
    lambda_e: float = 1.0,
    lambda_cls: float = 0.1,
) -> Losses:
    """L = lambda_e L_e + lambda_cls L_cls (32); arguments as of the two, ``emotion_logits`` None without emotions.

    Losses and gradients of the pieces of a batch add up to those of the batch, whatever the pieces: give all of them
    the batch's ``denominators``.
    """
    caption = caption_loss(logits, target_ids, weights, denominators.tokens)
    if emotion_logits is None:
        emotion = torch.zeros_like(caption)
    else:
        emotion = emotion_loss(emotion_logits, words, denominators.captions)
    return Losses(lambda_e * caption + lambda_cls * emotion, caption, emotion)
