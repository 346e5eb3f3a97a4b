"""Checks of what the encoder is given, before any computing."""

from __future__ import annotations

import torch
from torch import Tensor

from evc_fast.model.config import FaceNetConfig


def check_inputs(
    config: FaceNetConfig,
    weight: Tensor,
    video: Tensor,
    triplets: Tensor | None,
    similarity: Tensor | None,
    groups: Tensor | None,
    *,
    widen: bool = False,
) -> None:
    """Raise one sentence on the first argument of :meth:`FaceNetEncoder.forward` that does not fit.

    ``weight``: any of the module's, for its type and device. ``widen``: features may be float32 beside 16-bit weights.
    """
    _check_tensor("video", video, ("B", "N", config.video_dim), weight, features=True, widen=widen)
    if video.shape[1] < 1:
        raise ValueError(f"video must have at least one frame, got shape {list(video.shape)}")
    if not config.retrieval:
        for name, value in (("triplets", triplets), ("similarity", similarity), ("groups", groups)):
            if value is not None:
                raise ValueError(f"{name} must be None: this encoder's configuration has retrieval=False")
        return
    batch, k = video.shape[0], config.num_triplets
    _check_tensor("triplets", triplets, (batch, k, 3, config.text_dim), weight, features=True, widen=widen)
    _check_tensor("similarity", similarity, (batch, k), weight)
    if config.merge_identical_triplets:
        _check_tensor("groups", groups, (batch, k), weight, dtype=torch.int64)


def _check_tensor(
    name: str,
    value: Tensor | None,
    shape: tuple[int | str, ...],
    weight: Tensor,
    *,
    features: bool = False,
    widen: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise one sentence on what is wrong. A letter in ``shape`` is any size; ``features`` have the weight's type."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {_brackets(shape)}, got {type(value).__name__}")
    if value.dim() != len(shape) or any(
        not isinstance(want, str) and have != want for have, want in zip(value.shape, shape, strict=True)
    ):
        raise ValueError(f"{name} must be {_brackets(shape)}, got shape {list(value.shape)}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
    if dtype is None and not value.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {value.dtype}")
    wide = widen and value.dtype == torch.float32 and weight.element_size() == 2
    if features and value.dtype != weight.dtype and not wide and not _autocast_bridges(value, weight):
        raise TypeError(f"{name} must be {weight.dtype} as the encoder's weights are, got {value.dtype}")
    if value.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device} as the encoder's weights are, it is on {value.device}")


def _brackets(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _autocast_bridges(value: Tensor, weight: Tensor) -> bool:
    """Whether autocast brings the two to one type: it is on, and float64, which it leaves alone, is not among them."""
    return torch.is_autocast_enabled(weight.device.type) and torch.float64 not in (value.dtype, weight.dtype)


def check_emotion_features(emotion_features: Tensor | None, config: FaceNetConfig) -> None:
    if emotion_features is None:
        return
    if not config.emotion_augmentation:
        raise ValueError("emotion_features must be None: the configuration has emotion_augmentation=False")
    shape = [config.num_emotions, config.emotion_dim]
    if not isinstance(emotion_features, Tensor) or not emotion_features.is_floating_point():
        found = emotion_features.dtype if isinstance(emotion_features, Tensor) else type(emotion_features).__name__
        raise TypeError(f"emotion_features must be a floating tensor {shape}, got {found}")
    if list(emotion_features.shape) != shape:
        raise ValueError(
            f"emotion_features must be [num_emotions, emotion_dim] = {shape}, got shape {list(emotion_features.shape)}"
        )
    if emotion_features.device.type != "meta" and not bool(emotion_features.isfinite().all()):
        words = (~emotion_features.isfinite()).any(dim=1).nonzero()[:, 0].tolist()
        raise ValueError(f"emotion_features must be finite, rows {words[:10]} hold NaN or infinity")
