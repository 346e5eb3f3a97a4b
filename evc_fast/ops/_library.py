"""Every op's schema and the one ``Library`` handle, and the loading of the compiled kernels.

Dropping the handle would remove the ops, so it lives as long as this module. The compiled library
(``_C.abi3.so``, built from ``csrc/``) only registers implementations of the schemas declared here.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

NAMESPACE = "evc_fast"

SCHEMAS = (
    "entropy_calibration_forward(Tensor triplets, Tensor similarity, Tensor? groups, bool self_refine,"
    " bool cross_refine) -> (Tensor calibrated, Tensor component_weights, Tensor triplet_weights)",
    "entropy_calibration_inference(Tensor triplets, Tensor similarity, Tensor? groups, bool self_refine,"
    " bool cross_refine) -> (Tensor calibrated, Tensor component_weights, Tensor triplet_weights)",
    "entropy_calibration_backward(Tensor grad_calibrated, Tensor triplets, Tensor similarity, Tensor? groups,"
    " bool self_refine, bool cross_refine) -> (Tensor grad_triplets, Tensor grad_similarity)",
    "emotion_attention_forward(Tensor query, Tensor key, Tensor value, Tensor gate_query, Tensor gate_key,"
    " int num_heads, bool keep_candidates) -> (Tensor context, Tensor candidates)",
    "emotion_attention_inference(Tensor query, Tensor key, Tensor value, Tensor gate_query, Tensor gate_key,"
    " int num_heads) -> Tensor",
    "emotion_attention_backward(Tensor grad_context, Tensor query, Tensor key, Tensor value, Tensor gate_query,"
    " Tensor gate_key, Tensor candidates, int num_heads)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_gate_query, Tensor grad_gate_key)",
    "routing_aggregation_forward(Tensor facts, Tensor emotions, Tensor logits)"
    " -> (Tensor routed, Tensor pooled, Tensor weights)",
    "routing_aggregation_inference(Tensor facts, Tensor emotions, Tensor logits)"
    " -> (Tensor routed, Tensor pooled, Tensor weights)",
    "routing_aggregation_backward(Tensor grad_routed, Tensor grad_pooled, Tensor facts, Tensor emotions,"
    " Tensor weights) -> (Tensor grad_facts, Tensor grad_emotions, Tensor grad_logits)",
    "factored_hidden_forward(Tensor weights, Tensor values, Tensor visual) -> Tensor",
    "factored_hidden_backward(Tensor grad_hidden, Tensor weights, Tensor values, Tensor visual)"
    " -> (Tensor grad_weights, Tensor grad_values, Tensor grad_visual)",
    "folded_encoder_forward(Tensor video, Tensor? triplets, Tensor? similarity, Tensor? groups, Tensor[] weights,"
    " int[] sizes, float norm_eps, bool explain) -> (Tensor tokens, Tensor emotion_logits, Tensor component_weights,"
    " Tensor triplet_weights, Tensor routing_weights, Tensor emotion_distribution, Tensor fact_gate,"
    " Tensor emotion_gate)",
    "folded_encoder_cuda(Tensor video, Tensor? triplets, Tensor? similarity, Tensor? groups, Tensor[] weights,"
    " int[] sizes, float norm_eps, bool explain) -> (Tensor tokens, Tensor emotion_logits, Tensor component_weights,"
    " Tensor triplet_weights, Tensor routing_weights, Tensor emotion_distribution, Tensor fact_gate,"
    " Tensor emotion_gate)",
    "weight_buffer(Tensor like, int elements) -> Tensor",
    "pack_weight(Tensor weight) -> Tensor",
    "packed_linear(Tensor input, Tensor packed, Tensor? bias, Tensor? residual, int columns, int activation) -> Tensor",
)

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
for _schema in SCHEMAS:
    LIBRARY.define(_schema)

# Triton reads it too. The interpreter's kernels and the compiled ones cannot both serve CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EXTENSION_PATH = Path(__file__).resolve().parent.parent / "_C.abi3.so"


def _load_extension() -> ctypes.CDLL | str:
    """The compiled kernels, or why they are not there."""
    if INTERPRETED:
        return "TRITON_INTERPRET=1 gives CPU tensors to Triton's interpreter: unset it"
    if not EXTENSION_PATH.exists():
        return "the compiled library is absent (built with EVC_FAST_NO_EXTENSION=1, or never built): pip install ."
    try:
        torch.ops.load_library(str(EXTENSION_PATH))
    except OSError as error:
        return f"the compiled library does not load with torch {torch.__version__} ({error}): pip install . rebuilds it"
    extension = ctypes.CDLL(str(EXTENSION_PATH))
    for name in ("cpu_isa", "cpu_isas_supported", "load_cuda", "folded_cuda_obstacle"):
        getattr(extension, f"evc_fast_{name}").restype = ctypes.c_char_p
    extension.evc_fast_digest.restype = ctypes.c_uint64
    if not extension.evc_fast_cpu_isa():
        supported = extension.evc_fast_cpu_isas_supported().decode().replace(",", ", ")
        wanted = os.environ["EVC_FAST_ISA"]
        raise RuntimeError(f"EVC_FAST_ISA is {wanted!r}; name a variant that was built and runs here: {supported}")
    return extension


_extension = _load_extension()
EXTENSION = None if isinstance(_extension, str) else _extension
EXTENSION_MISSING = _extension if isinstance(_extension, str) else ""
