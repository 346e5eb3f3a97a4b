"""The one list of encoder configurations, every option and ablation at small widths, with random weights and inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from evc_fast.model import FaceNetConfig, FaceNetEncoder
from evc_fast.model.output import EncoderOutput

ENCODER_WIDTHS = {
    "video_dim": 24,
    "text_dim": 20,
    "dim": 16,
    "emotion_dim": 12,
    "num_queries": 6,
    "num_heads": 2,
    "ffn_dim": 40,
    "output_dim": 18,
}
ENCODER_OPTIONS = {
    "paper": {},
    "equal_widths": {"video_dim": 16, "text_dim": 16, "emotion_dim": 16, "output_dim": 16},
    "router_video": {"router": "video"},
    "merge_identical_triplets": {"merge_identical_triplets": True},
    "no_retrieval": {"retrieval": False},
    "no_self_refine": {"self_refine": False},
    "no_cross_refine": {"cross_refine": False},
    "no_calibration": {"self_refine": False, "cross_refine": False},
    "no_emotion": {"emotion_augmentation": False},
    "no_bias_adjustment": {"bias_adjustment": False},
    "no_emotion_no_bias": {"emotion_augmentation": False, "bias_adjustment": False},
    "no_retrieval_no_emotion": {"retrieval": False, "emotion_augmentation": False},
    "baseline": {"retrieval": False, "emotion_augmentation": False, "bias_adjustment": False},
    "emotion_first": {"order": "emotion_first"},
    "emotion_first_video_merge": {"order": "emotion_first", "router": "video", "merge_identical_triplets": True},
    "emotion_first_no_retrieval": {"order": "emotion_first", "retrieval": False},
    "emotion_first_no_bias": {"order": "emotion_first", "bias_adjustment": False},
}
ENCODER_SIZES = [(3, 5, 7), (1, 4, 7), (5, 1, 3), (2, 3, 1), (1, 1, 1)]  # (K, N, W)
# Widths and counts on both sides of what a vector, a panel of packed weights and a block of rows hold.
ODD_WIDTHS = {
    "heads_of_3": {"dim": 24, "num_heads": 8},
    "heads_of_8": {"dim": 32, "num_heads": 4},
    "heads_of_11": {"dim": 33, "num_heads": 3},
    "one_head": {"dim": 35, "num_heads": 1, "ffn_dim": 37},
    "many_heads": {"dim": 65, "num_heads": 13, "video_dim": 65},
    "heads_of_1": {"dim": 4, "num_heads": 4},
    "width_1": {"dim": 1, "num_heads": 1},
    "frames_70": {"n": 70},
    "frames_1": {"n": 1},
    "triplets_1": {"k": 1},
    "triplets_9": {"k": 9, "n": 3},
    "triplets_12_frames_70": {"k": 12, "n": 70},
    "words_1": {"w": 1},
    "words_130": {"w": 130},
    "queries_1": {"num_queries": 1},
    "queries_33": {"num_queries": 33, "num_heads": 4},
    "output_1": {"output_dim": 1},
    "output_37": {"output_dim": 37},
    "ffn_1": {"ffn_dim": 1},
    "ffn_97": {"ffn_dim": 97},
    "text_70": {"text_dim": 70},
    "features_1": {"text_dim": 1, "video_dim": 1, "emotion_dim": 1},
}


def build_encoder(seed: int = 0, *, k: int = 3, n: int = 5, w: int = 7, **options) -> FaceNetEncoder:
    """A float64 encoder in evaluation mode, every weight, bias and norm random and none at its initial value.

    ``k``, ``n``, ``w``: triplets, frames, emotion words. ``options`` override ``ENCODER_WIDTHS`` and the defaults.
    """
    config = FaceNetConfig(**(ENCODER_WIDTHS | {"num_triplets": k, "num_frames": n, "num_emotions": w} | options))
    g = torch.Generator().manual_seed(seed)
    e_0 = None
    if config.emotion_augmentation:
        e_0 = torch.randn(w, config.emotion_dim, generator=g, dtype=torch.float64)
    encoder = FaceNetEncoder(config, e_0).double().eval()
    if e_0 is not None:
        encoder.emotion_features.copy_(e_0)  # the construction rounds to the weights' float32
    with torch.no_grad():
        for parameter in encoder.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) * scale)
        encoder.fact_norm.weight.add_(1.0)
    return encoder


def encoder_inputs(
    config: FaceNetConfig, batch: int = 2, *, dtype: torch.dtype = torch.float64, seed: int = 1
) -> list[Tensor | None]:
    """video, triplets, similarity and groups (None where the configuration reads none) from a standard normal.

    The first triplet's similarity is below 0; the last video's triplets are all identical.
    """
    g = torch.Generator().manual_seed(seed)
    k = config.num_triplets
    video = torch.randn(batch, config.num_frames, config.video_dim, generator=g, dtype=torch.float64)
    if not config.retrieval:
        return [video.to(dtype), None, None, None]
    triplets = torch.randn(batch, k, 3, config.text_dim, generator=g, dtype=torch.float64)
    similarity = torch.rand(batch, k, generator=g, dtype=torch.float64) * 0.8 + 0.2
    similarity[:1, 0] = -0.1
    groups = torch.randint(0, 3, (batch, k), generator=g)
    groups[1:][-1:] = 7
    merge = config.merge_identical_triplets
    return [video.to(dtype), triplets.to(dtype), similarity.to(dtype), groups if merge else None]


def cast_inputs(arguments: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The features of :func:`encoder_inputs` in another type; groups stay as they are."""
    return [x.to(dtype) if x is not None and x.is_floating_point() else x for x in arguments]


def named_outputs(output: EncoderOutput) -> dict[str, Tensor | None]:
    """tokens, emotion_logits and, where asked for, every field of the explanation by name."""
    named = {"tokens": output.tokens, "emotion_logits": output.emotion_logits}
    return named if output.explanation is None else named | output.explanation._asdict()
