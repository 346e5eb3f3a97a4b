"""The encoder with its weights folded for inference: the same function, (10)-(29), with less than half the products."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from evc_fast import ops
from evc_fast.model.encoder import EncoderOutput, Explanation, _check_tensor
from evc_fast.ops.dispatch import CPP_DTYPES, Impl
from evc_fast.reference.folded_encoder import FoldedOptions, FoldedWeights

if TYPE_CHECKING:
    from evc_fast.model.config import FaceNetConfig
    from evc_fast.model.encoder import FaceNetEncoder


class FoldedEncoder(nn.Module):
    """What :meth:`FaceNetEncoder.fold` gives: a snapshot for inference, called as the encoder is.

    Its buffers are products of the encoder's weights (:class:`~evc_fast.reference.folded_encoder.FoldedWeights`).

    Args:
        weights: made by :func:`fold_weights`.
        config: the encoder's configuration.
        num_frames: N, the number of frames that every call must have.

    Attributes:
        config, num_frames: as given. dtype: of the weights, and of tokens, logits and gates.
    """

    def __init__(self, weights: FoldedWeights, config: FaceNetConfig, num_frames: int) -> None:
        super().__init__()
        self.config = config
        self.num_frames = num_frames
        self.options = folded_options(config)
        for name, weight in weights._asdict().items():
            self.register_buffer(name, weight)
        self._packed: ops.PackedEncoder | None = None
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.ffn_weight.dtype

    @property
    def weights(self) -> FoldedWeights:
        """The buffers, as the op takes them."""
        return FoldedWeights(*(getattr(self, name) for name in FoldedWeights._fields))

    def train(self, mode: bool = True) -> FoldedEncoder:
        """Evaluation mode only.

        Raises:
            RuntimeError: ``mode`` is True.
        """
        if mode:
            raise RuntimeError("a folded encoder cannot be trained: train the encoder that it was folded from")
        return super().train(False)

    def forward(
        self,
        video: Tensor,
        triplets: Tensor | None = None,
        similarity: Tensor | None = None,
        groups: Tensor | None = None,
        *,
        explain: bool = False,
        impl: Impl | None = None,
    ) -> EncoderOutput:
        """Encode a batch; arguments and result as of :meth:`FaceNetEncoder.forward`.

        Features may be float32 whatever the type of the weights. Tokens, logits and gates have the weights' type.

        Args:
            impl: "reference" is plain PyTorch, differentiable in the features; "cpp" one compiled call without
                gradients; None takes the compiled one where it serves the features and no gradient is asked for.

        Raises:
            TypeError, ValueError: an argument is missing, superfluous, or of the wrong type, shape or device;
                the number of frames or of triplets is not the folded one.
            RuntimeError: ``impl`` cannot run here.
        """
        self._check_inputs(video, triplets, similarity, groups)
        if triplets is not None:
            triplets, similarity = triplets.to(video.dtype), similarity.to(ops.accumulate_dtype(self.ffn_weight))
        inputs = video, triplets, similarity, groups if self.config.merge_identical_triplets else None
        tokens, emotion_logits, *shown = ops.folded_encoder(
            *inputs, self.weights, self.options, self._pack, explain=explain, impl=impl
        )
        return EncoderOutput(tokens, emotion_logits, Explanation(*shown) if explain else None)

    def _apply(self, fn, recurse=True):
        self._packed = None
        return super()._apply(fn, recurse)

    def _check_inputs(
        self, video: Tensor, triplets: Tensor | None, similarity: Tensor | None, groups: Tensor | None
    ) -> None:
        raise NotImplementedError


def folded_options(config: FaceNetConfig) -> FoldedOptions:
    """The configuration as the op takes it."""
    return FoldedOptions(
        num_heads=config.num_heads,
        num_triplets=config.num_triplets,
        num_queries=config.num_queries,
        retrieval=config.retrieval,
        emotion_augmentation=config.emotion_augmentation,
        bias_adjustment=config.bias_adjustment,
        emotion_first=config.order == "emotion_first",
        video_router=config.router == "video",
        merge_identical_triplets=config.merge_identical_triplets,
        self_refine=config.self_refine,
        cross_refine=config.cross_refine,
    )


@torch.no_grad()
def fold_weights(encoder: FaceNetEncoder, dtype: torch.dtype) -> FoldedWeights:
    """All products of weights that :class:`FoldedWeights` names, made in float64 and rounded once to ``dtype``."""
    options = folded_options(encoder.config)
    e = copy.deepcopy(encoder).double()
    d, heads = e.config.dim, e.config.num_heads
    scale = (d // heads) ** -0.5  # of every attention, moved into its q
    w: dict[str, Tensor | None] = dict.fromkeys(FoldedWeights._fields)
    first, second = e.ffn[0], e.ffn[3]
    w["ffn_weight"], w["ffn_bias"] = second.weight, second.bias
    w["norm_weight"], w["norm_bias"] = e.fact_norm.weight, e.fact_norm.bias
    if isinstance(e.video_projection, nn.Linear):
        w["video_weight"], w["video_bias"] = e.video_projection.weight, e.video_projection.bias

    visual: list[tuple[Tensor, Tensor]] = []  # in the order of visual_sections
    hidden_bias = first.bias
    if options.retrieval:
        attn, of_h = e.fact_attention, first.weight[:, d:]  # W_o and the H half of the FFN's first layer
        constant = attn.o_proj.weight @ attn.v_proj.bias + attn.o_proj.bias  # what every H holds
        hidden_bias = hidden_bias + of_h @ constant
        readers = [of_h]
        if options.has_router:
            blocks = e.router.weight.unflatten(1, (options.num_triplets, d)).transpose(0, 1)  # W_g, [K, K, d]
            readers.append(blocks.flatten(0, 1))
            w["router_bias"] = (blocks @ constant).sum(0)
        by_head = attn.o_proj.weight.unflatten(1, (heads, -1)).permute(1, 2, 0)  # [heads, d / heads, d]
        w["hidden_weight"] = by_head @ torch.cat(readers).T
        w["triplet_weight"] = torch.cat([attn.k_proj.weight, attn.v_proj.weight]) @ e.triplet_projection.weight
        fact_query = scale * attn.q_proj.weight, scale * attn.q_proj.bias
    visual.append((first.weight[:, :d], hidden_bias))
    if options.retrieval and not options.emotion_first:
        visual.append(fact_query)

    if options.emotion_augmentation:
        attn = e.emotion_attention
        emotion_query = attn.q_proj.weight, attn.q_proj.bias
        if options.emotion_first:
            visual.append(emotion_query)
        else:
            w["emotion_query_weight"], w["emotion_query_bias"] = emotion_query
        # (phi_F F_i) . (phi_V V_j): what does not depend on j drops out of the softmax
        visual.append((e.phi_f.weight.T @ e.phi_v.weight, first.bias.new_zeros(d)))
        visual.append((e.phi_f.bias[None] @ e.phi_v.weight, first.bias.new_zeros(1)))
        w["key"], w["value"] = attn.k_proj(e.emotion_features), attn.v_proj(e.emotion_features)
        weight = e.phi_e.weight @ attn.o_proj.weight
        bias = e.phi_e.weight @ attn.o_proj.bias + e.phi_e.bias
        w["head_weight"] = e.emotion_head.weight @ weight
        w["head_bias"] = e.emotion_head.weight @ bias + e.emotion_head.bias
        if options.bias_adjustment:
            gates = torch.cat([e.fact_gate.weight, e.emotion_gate.weight])
            w["gate_bias"] = torch.cat([e.fact_gate.bias, e.emotion_gate.bias]) + gates[:, d:] @ bias
            w["gate_weight"] = torch.cat([gates[:, :d], gates[:, d:] @ weight], 1)
        if options.emotion_first and options.retrieval:
            bias = torch.cat([bias, fact_query[0] @ bias + fact_query[1]])
            weight = torch.cat([weight, fact_query[0] @ weight])
        w["emotion_weight"], w["emotion_bias"] = weight, bias
    elif options.bias_adjustment:
        w["gate_weight"], w["gate_bias"] = e.fact_gate.weight, e.fact_gate.bias

    queries = (e.qformer.self_attention(e.qformer.queries, e.qformer.queries) + e.qformer.queries)[0]  # (28)
    attn, output = e.qformer.cross_attention, e.qformer.output_projection
    by_head = attn.q_proj(queries).unflatten(1, (heads, -1)).transpose(0, 1)  # [heads, N_q, d / heads]
    scores = scale * by_head @ attn.k_proj.weight.unflatten(0, (heads, -1))
    w["memory_weight"] = torch.cat([scores.flatten(0, 1), attn.v_proj.weight])
    visual.append((w["memory_weight"], w["memory_weight"].new_zeros(len(w["memory_weight"]))))
    w["output_weight"] = output.weight @ attn.o_proj.weight
    w["output_bias"] = output(queries + attn.o_proj.weight @ attn.v_proj.bias + attn.o_proj.bias)  # (29)

    w["visual_weight"], w["visual_bias"] = (torch.cat(parts) for parts in zip(*visual, strict=True))
    made = {name: None if t is None else t.to(dtype).contiguous() for name, t in w.items()}
    return FoldedWeights(**made)
