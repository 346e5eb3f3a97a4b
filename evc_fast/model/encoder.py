"""The FACE-net encoder, equations (10)-(29), batched over the K retrieval groups.

``forward`` is the one skeleton. Its stages stand twice: as printed in :mod:`evc_fast.model.straight`, and at less cost
in :mod:`evc_fast.model.commuted`. The fused parts come from :mod:`evc_fast.ops`; everything else is plain PyTorch.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor, nn

from evc_fast import ops
from evc_fast.model import commuted, straight
from evc_fast.model.attention import MultiHeadAttention
from evc_fast.model.checkpoint import CONFIG_NAME, WEIGHTS_NAME, assign_strictly, read_folder, write_folder
from evc_fast.model.config import FaceNetConfig
from evc_fast.model.dropout import Dropout
from evc_fast.model.folded import FoldedEncoder, SelfFolding, fold
from evc_fast.model.inputs import check_emotion_features, check_inputs
from evc_fast.model.output import EncoderOutput, Explanation
from evc_fast.model.qformer import QFormer
from evc_fast.ops.dispatch import Impl
from evc_fast.reference.emotion_attention import emotion_distribution

_IMPLS = (None, "reference", "cpp", "triton")


class FaceNetEncoder(nn.Module):
    """Video and retrieved triplets in, tokens for the decoder and emotion logits out.

    Weights exist only where they take part. ``video_projection`` needs D_v != d. ``triplet_projection`` (W_T) and
    ``fact_attention`` need retrieval; without it the FFN of (18) reads V alone, because H = 0 silences the other half
    of its input. ``router`` (W_g) needs bias adjustment and K > 1: else its softmax is the constant 1/K. The emotion
    attention, phi_F, phi_V, phi_E, the classification head and the buffer E_0 need emotion augmentation; without it
    the gate of the facts reads the facts alone. Without bias adjustment there are no gates.

    Args:
        config: widths, options and ablations.
        emotion_features: E_0 [W, d_E], the emotion words' frozen vectors, kept as a buffer and saved with the weights.
            None puts random vectors in their place, the same in every process, and sets ``random_emotion_features``:
            they keep the words apart but know nothing of their meaning, so they serve timing and tests.

    Attributes:
        random_emotion_features: True where E_0 is the random stand-in; saved and loaded with the model.

    Raises:
        TypeError, ValueError: ``emotion_features`` is not a finite floating tensor [num_emotions, emotion_dim], or is
            given without emotion augmentation.
    """

    emotion_features: Tensor  # E_0 of (2)

    def __init__(self, config: FaceNetConfig, emotion_features: Tensor | None = None) -> None:
        super().__init__()
        check_emotion_features(emotion_features, config)
        self.config = config
        self.self_folding = SelfFolding()
        d, heads = config.dim, config.num_heads

        # A linear map stands only where widths differ or an equation names it.
        self.video_projection = nn.Identity() if config.video_dim == d else nn.Linear(config.video_dim, d)
        if config.retrieval:
            self.triplet_projection = nn.Linear(config.text_dim, d, bias=False)  # W_T
            self.fact_attention = MultiHeadAttention(d, heads)  # Attn_f
        self.ffn = nn.Sequential(
            nn.Linear(2 * d if config.retrieval else d, config.ffn_hidden_dim),
            nn.GELU(),
            Dropout(config.dropout),
            nn.Linear(config.ffn_hidden_dim, d),
        )
        self.fact_norm = nn.LayerNorm(d)

        self.random_emotion_features = config.emotion_augmentation and emotion_features is None
        if config.emotion_augmentation:
            if emotion_features is None:
                emotion_features = _random_emotion_features(config)
            self.register_buffer("emotion_features", emotion_features.detach().to(torch.get_default_dtype(), copy=True))
            self.emotion_attention = MultiHeadAttention(d, heads, memory_dim=config.emotion_dim)  # Attn_c
            self.phi_f = nn.Linear(d, d)
            self.phi_v = nn.Linear(d, d)
            self.phi_e = nn.Linear(d, d)
            self.emotion_head = nn.Linear(d, config.num_emotions)

        self.router = None
        if config.bias_adjustment:
            if config.num_groups > 1:
                self.router = nn.Linear(config.num_groups * d, config.num_groups, bias=False)  # W_g
            if config.emotion_augmentation:
                self.fact_gate = nn.Linear(2 * d, d)  # [U_f ; R_f], b_f
                self.emotion_gate = nn.Linear(2 * d, d)  # [U_e ; R_e], b_e
            else:
                self.fact_gate = nn.Linear(d, d)  # U_f, b_f

        self.qformer = QFormer(d, heads, config.num_queries, config.output_dim)

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
        """Encode a batch.

        Args:
            video: image features of the sampled frames [B, N, D_v], N >= 1, in the type of the weights.
            triplets: text features of subject, predicate and object [B, K, 3, D_t], same type. None without retrieval.
            similarity: cosine of video and caption [B, K], any floating type. None without retrieval.
            groups: int64 ids [B, K], equal where triplets are identical. Read, and then needed, only with
                ``merge_identical_triplets``.
            explain: also return what explains the caption.
            impl: "reference" computes every product as printed, on plain PyTorch: the oracle, and the baseline of all
                benchmarks. "cpp" and "triton" reorder products, and so does None, with the fastest ops that there are.

        Under autocast the features may have any floating type but float64.

        Raises:
            TypeError, ValueError: an argument is missing, superfluous, or of the wrong type, shape or device;
                before any computing.
        """
        check_inputs(self.config, self.fact_norm.weight, video, triplets, similarity, groups)
        if impl not in _IMPLS:
            raise ValueError(
                f'impl must be "reference", "cpp", "triton" or None; got {impl!r}: a fold takes "cuda" too'
            )
        if impl is None and not self.training and not torch.compiler.is_compiling():
            folded = self.self_folding.get(self, (video, triplets, similarity, groups))
            if folded is not None:
                return folded.run(video, triplets, similarity, groups, explain=explain)
        config = self.config
        stages = straight if impl == "reference" else commuted

        visual = self.video_projection(video)  # V [B, N, d]
        v = visual.unsqueeze(1)  # [B, 1, N, d]: whatever depends on V alone is computed once for all K

        component_weights = triplet_weights = calibrated = None
        if config.retrieval:
            calibrated, component_weights, triplet_weights = ops.entropy_calibration(  # (10)-(16)
                triplets,
                similarity.to(torch.promote_types(triplets.dtype, torch.float32)),
                groups if config.merge_identical_triplets else None,
                self_refine=config.self_refine,
                cross_refine=config.cross_refine,
                impl=impl,
            )
        # (17)-(21), with V as query and residual of the facts (fact first) or with E (emotion first);
        # (22)-(23), and (26)-(27) before the gates.
        if config.order == "fact_first":
            summed, logits = self._factual_semantics(stages, v, v, calibrated, impl)
            facts = self._normalize(summed)
            if config.emotion_augmentation:
                gate = stages.visual_gate(self, summed, facts, visual)
                context, distribution = self._emotional_semantics(facts, *gate, explain, impl)
            else:
                context, distribution = facts.new_zeros(()).expand_as(facts), None  # stride 0, no memory
            routed, pooled, routing_weights = stages.routing(self, facts, context, logits, impl)
        else:
            context, distribution = self._emotional_semantics(v, self.phi_f(v), self.phi_v(visual), explain, impl)
            emotions = self.project_emotions(context)
            summed, logits = self._factual_semantics(stages, v, emotions, calibrated, impl)
            facts = self._normalize(summed)
            routed, pooled, routing_weights = ops.routing_aggregation(
                facts, emotions.expand_as(facts), logits, impl=impl
            )

        num_frames = video.shape[1]
        routed_facts, routed_emotions = routed[:, :num_frames], routed[:, num_frames:]
        fact_gate, emotion_gate = self._gates(pooled)
        emotion_logits = None
        memory = [fact_gate * routed_facts, visual]  # [M ; V], M of (27)
        if config.emotion_augmentation:
            emotion_logits = self.emotion_head(routed_emotions.mean(1))
            memory.insert(1, emotion_gate * routed_emotions)
        tokens = self.qformer(torch.cat(memory, 1), straight=stages is straight)  # (28)-(29)

        explanation = None
        if explain:
            if distribution is not None:
                distribution = distribution.expand(-1, config.num_groups, -1)
            explanation = Explanation(
                component_weights,
                triplet_weights,
                routing_weights,
                distribution,
                fact_gate.detach().squeeze(1),
                emotion_gate.detach().squeeze(1) if emotion_gate is not None else None,
            )
        return EncoderOutput(tokens, emotion_logits, explanation)

    def _factual_semantics(
        self, stages: ModuleType, v: Tensor, query: Tensor, calibrated: Tensor | None, impl: Impl | None
    ) -> tuple[Tensor, Tensor]:
        """v and query [B, 1, N, d], calibrated [B, K, 3, D_t] -> sum that (18) normalizes, logits of (26) [B, N, K]."""
        if calibrated is None:
            update, logits = self.ffn(v), None  # H = 0
        else:
            update, logits = stages.factual_semantics(self, v, query, calibrated, impl)
        if logits is None:  # no router: zeros, whose softmax is 1/K
            logits = update.new_zeros(()).expand(v.shape[0], v.shape[2], self.config.num_groups)
        return update + query, logits

    def _normalize(self, summed: Tensor) -> Tensor:
        """F of (18) in the sum's type: autocast may leave the norm in float32, but facts and emotions share a type."""
        return self.fact_norm(summed).to(summed.dtype)

    def _emotional_semantics(
        self, query: Tensor, gate_query: Tensor, gate_key: Tensor, explain: bool, impl: Impl | None
    ) -> tuple[Tensor, Tensor | None]:
        """query F [B, K, N, d] (or V, K = 1), both sides of (20) -> context [B, K, N, d], distribution [B, K, W].

        Rows of q_i (20) sum to 1, so it may gather what Attn_c reads (19) before the maps of (21) are applied.
        """
        attention = self.emotion_attention
        q = attention.q_proj(query)
        k = attention.k_proj(self.emotion_features)  # [W, d]: the dictionary's keys and values serve the whole batch
        value = attention.v_proj(self.emotion_features)
        context = ops.emotion_attention(q, k, value, gate_query, gate_key, attention.num_heads, impl=impl)  # (19)-(21)
        distribution = None
        if explain:
            with torch.no_grad():
                distribution = emotion_distribution(q, k, gate_query, gate_key, attention.num_heads)
        return context, distribution

    def project_emotions(self, context: Tensor) -> Tensor:
        """Attn_c's output projection (19), then phi_E (21): the last maps on the way to E, on any rows [..., d]."""
        if not self.config.emotion_augmentation:
            return context
        return self.phi_e(self.emotion_attention.o_proj(context))

    def _gates(self, pooled: Tensor) -> tuple[Tensor, Tensor | None]:
        """pooled [F ; E] [B, 2d] -> B_f, B_e [B, 1, d]."""
        config = self.config
        pooled = pooled.unsqueeze(1)
        if not config.emotion_augmentation:
            facts = pooled[..., : config.dim]
            return (self.fact_gate(facts).tanh() if config.bias_adjustment else torch.ones_like(facts)), None
        if not config.bias_adjustment:
            ones = torch.ones_like(pooled[..., : config.dim])
            return ones, ones
        return self.fact_gate(pooled).tanh(), self.emotion_gate(pooled).tanh()  # (24), (25)

    def fold(self, *, dtype: torch.dtype | None = None, num_frames: int | None = None) -> FoldedEncoder:
        """The same function with the weights folded for inference: less than half the products, one compiled call.

        Needs evaluation mode. In that mode, where no gradients are asked for, the encoder itself runs on its fold; this
        method is for another type or number of frames, and for export. A fold is a snapshot: once the encoder's weights
        have changed it refuses to run, as long as the encoder lives (the encoder's own fold is made anew instead).
        Only a change that PyTorch does not count, of few elements (``weight.data[3, 5] = 0``), can pass unnoticed:
        see :class:`~evc_fast.model.stamp.Stamp`.

        Args:
            dtype: of the folded weights, None for the encoder's; whatever it is, the CPU kernels accumulate in float32
                (float64 for float64). float16 off the CPU only.
            num_frames: N of every call, None for the configuration's.

        Raises:
            RuntimeError: the encoder is in training mode, or a submodule is not the one it was built with.
            TypeError, ValueError: ``dtype`` is no floating type or has no kernel, or ``num_frames`` is below 1.
        """
        return fold(self, dtype, num_frames)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors`` (weights and E_0, in their type) into ``folder``."""
        config = {
            "class": type(self).__name__,
            "random_emotion_features": self.random_emotion_features,
            "config": self.config.to_dict(),
        }
        write_folder(folder, config, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> FaceNetEncoder:
        """Read what :meth:`save_pretrained` wrote: on the CPU, in the stored type, in evaluation mode.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError, TypeError: a file is damaged, belongs to another class, or tensors and configuration disagree.
        """
        stored, tensors = read_folder(folder)
        if (
            set(stored) != {"class", "random_emotion_features", "config"}
            or stored["class"] != cls.__name__
            or not isinstance(stored["random_emotion_features"], bool)
            or not isinstance(stored["config"], dict)
        ):
            raise ValueError(f"{os.path.join(folder, CONFIG_NAME)} does not describe a {cls.__name__}")
        config = FaceNetConfig.from_dict(stored["config"])
        with torch.device("meta"):
            encoder = cls(config)
        assign_strictly(encoder, tensors, os.path.join(folder, WEIGHTS_NAME))
        encoder.random_emotion_features = stored["random_emotion_features"]
        return encoder.eval()


def _random_emotion_features(config: FaceNetConfig) -> Tensor:
    """Standard normal [W, d_E] from a generator of its own: the same whatever was seeded, and nothing drawn from it."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(config.num_emotions, config.emotion_dim, generator=generator, device="cpu")
