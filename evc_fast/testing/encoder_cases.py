"""The one list of encoder configurations, every option and ablation at small widths, with random weights and inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from evc_fast.model import FaceNetConfig, FaceNetEncoder

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
