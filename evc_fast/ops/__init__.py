"""The fused operations of FACE-net. Needs torch alone, and initialises no CUDA."""

from evc_fast.ops.emotion_attention import emotion_attention
from evc_fast.ops.entropy_calibration import entropy_calibration
from evc_fast.ops.factored_hidden import factored_hidden
from evc_fast.ops.folded_encoder import folded_encoder, pack_folded_encoder
from evc_fast.ops.packed_linear import PackedLinear
from evc_fast.ops.routing_aggregation import routing_aggregation

__all__ = [
    "PackedLinear",
    "emotion_attention",
    "entropy_calibration",
    "factored_hidden",
    "folded_encoder",
    "pack_folded_encoder",
    "routing_aggregation",
]
