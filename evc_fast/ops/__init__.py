"""The fused operations of FACE-net. Needs torch alone, and initialises no CUDA."""

from evc_fast.ops.emotion_attention import emotion_attention
from evc_fast.ops.entropy_calibration import entropy_calibration
from evc_fast.ops.routing_aggregation import routing_aggregation

__all__ = ["emotion_attention", "entropy_calibration", "routing_aggregation"]
