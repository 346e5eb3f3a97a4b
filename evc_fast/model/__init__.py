"""FACE-net: configuration and encoder; decoders are in ``decoders``, the whole captioner in ``captioner``."""

from evc_fast.model.config import FaceNetConfig
from evc_fast.model.encoder import FaceNetEncoder
from evc_fast.model.folded import FoldedEncoder
from evc_fast.model.graphed import graph_training
from evc_fast.model.output import EncoderOutput, Explanation

__all__ = ["EncoderOutput", "Explanation", "FaceNetConfig", "FaceNetEncoder", "FoldedEncoder", "graph_training"]
