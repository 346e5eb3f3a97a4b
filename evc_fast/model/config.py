"""Configuration of the FACE-net encoder: widths, options and the paper's ablations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

ROUTERS = ("frame", "video")
ORDERS = ("fact_first", "emotion_first")


@dataclass(frozen=True)
class FaceNetConfig:
    """What a :class:`~evc_fast.model.FaceNetEncoder` is built from.

    The defaults are the paper's model with CLIP ViT-B/32 before it and FLAN-T5-XL behind it.

    Widths and counts
        video_dim, text_dim: D_v and D_t, widths of the frozen image and text features.
        dim: d, the common width; a multiple of ``num_heads``.
        emotion_dim: d_E, width of the emotion words' vectors E_0. Attn_c projects keys and values from it: any width.
        num_frames: N, frames sampled a video, for the data side. No weight depends on it: the encoder takes any N >= 1.
        num_triplets: K, retrieved captions, one triplet each. num_emotions: W, words of the emotion dictionary.
        num_queries: N_q, learnable queries of the Q-former. num_heads: heads of every attention.
        ffn_dim: hidden width of the FFN of (18), None for 4 d. output_dim: d_out, the width the decoder reads.
        dropout: probability on the FFN's hidden layer, in training.
    Options
        router: "frame" routes each frame by itself (26); "video" averages H over the frames first.
        merge_identical_triplets: use the ``groups`` ids of identical triplets in (14)-(15); off, all count as distinct.
    Ablations (all on is the paper's model)
        retrieval: off, there are no triplets: one retrieval group with H = 0, routing weight 1.
        self_refine, cross_refine: off, alpha = 1/3 and theta = 1/K.
        emotion_augmentation: off, M holds the N fact tokens only and there are no emotion logits.
        bias_adjustment: off, gates 1 and routing weights 1/K.
        order: "emotion_first" runs (19)-(21) on V, then uses E as query of (17) and as residual of (18).

    Raises ``TypeError`` or ``ValueError`` naming the field.
    """

    video_dim: int = 512
    text_dim: int = 512
    dim: int = 300
    emotion_dim: int = 300
    num_frames: int = 16
    num_triplets: int = 4
    num_emotions: int = 179
    num_queries: int = 32
    num_heads: int = 4
    ffn_dim: int | None = None
    output_dim: int = 2048
    dropout: float = 0.1
    router: str = "frame"
    merge_identical_triplets: bool = False
    retrieval: bool = True
    self_refine: bool = True
    cross_refine: bool = True
    emotion_augmentation: bool = True
    bias_adjustment: bool = True
    order: str = "fact_first"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool":
                if not isinstance(value, bool):
                    raise TypeError(f"{field.name} must be True or False, got {value!r}")
            elif field.type == "int" or (field.type == "int | None" and value is not None):
                if not isinstance(value, int) or isinstance(value, bool):
                    raise TypeError(f"{field.name} must be an integer, got {value!r}")
                if value < 1:
                    raise ValueError(f"{field.name} must be at least 1, got {value}")
        if not isinstance(self.dropout, (int, float)) or isinstance(self.dropout, bool):
            raise TypeError(f"dropout must be a number, got {self.dropout!r}")
        if not (math.isfinite(self.dropout) and 0.0 <= self.dropout < 1.0):
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.dim % self.num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got dim={self.dim} and num_heads={self.num_heads}")
        if self.router not in ROUTERS:
            raise ValueError(f"router must be one of {ROUTERS}, got {self.router!r}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {self.order!r}")
        if self.order == "emotion_first" and not self.emotion_augmentation:
            raise ValueError('order="emotion_first" needs emotion_augmentation=True: it puts E in the place of V')

    @property
    def num_groups(self) -> int:
        """K as the encoder sees it: ``num_triplets``, or 1 where retrieval is off."""
        return self.num_triplets if self.retrieval else 1

    @property
    def ffn_hidden_dim(self) -> int:
        """Hidden width of the FFN of (18)."""
        return 4 * self.dim if self.ffn_dim is None else self.ffn_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary of all fields, fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FaceNetConfig:
        """Inverse of :meth:`to_dict`. Absent fields take their defaults; an unknown field is a ``ValueError``."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"FaceNetConfig has no field named {', '.join(map(repr, unknown))}")
        return cls(**values)
