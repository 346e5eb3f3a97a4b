"""FACE-net: configuration and encoder; decoders are in ``decoders``, the whole captioner in ``captioner``."""

from evc_fast.model.config import FaceNetConfig
from evc_fast.model.encoder import EncoderOutput, Explanation, FaceNetEncoder

__all__ = ["EncoderOutput", "Explanation", "FaceNetConfig", "FaceNetEncoder"]
