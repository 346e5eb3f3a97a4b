"""What each op means, in plain PyTorch: oracle, default kernel, benchmark baseline and export decomposition."""

from evc_fast.reference.emotion_attention import emotion_attention
from evc_fast.reference.entropy_calibration import entropy_calibration
from evc_fast.reference.factored_hidden import factored_hidden
from evc_fast.reference.folded_encoder import folded_encoder
from evc_fast.reference.routing_aggregation import routing_aggregation

__all__ = ["emotion_attention", "entropy_calibration", "factored_hidden", "folded_encoder", "routing_aggregation"]
