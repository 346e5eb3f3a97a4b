"""The FACE-net encoder, equations (10)-(29), batched over the K retrieval groups.

``forward`` is the one skeleton. Its stages stand twice: as printed in :mod:`evc_fast.model.straight`, and at less cost
in :mod:`evc_fast.model.commuted`. The fused parts come from :mod:`evc_fast.ops`; everything else is plain PyTorch.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evc_fast import ops
from evc_fast.model import commuted, straight
from evc_fast.model.attention import MultiHeadAttention
from evc_fast.model.checkpoint import CONFIG_NAME, WEIGHTS_NAME, assign_strictly, read_folder, write_folder
from evc_fast.model.config import FaceNetConfig
from evc_fast.model.dropout import Dropout
from evc_fast.model.qformer import QFormer
from evc_fast.ops.dispatch import Impl
from evc_fast.reference.emotion_attention import emotion_distribution


class Explanation(NamedTuple):
    """What explains a caption; no gradients. A field is None where an ablation removed what it shows."""

    component_weights: Tensor | None
    """alpha (12) [B, K, 3]: share of subject, predicate, object; sums to 1. None without retrieval."""
    triplet_weights: Tensor | None
    """theta (15) [B, K]: share of each triplet; sums to 1 where all groups are distinct. None without retrieval."""
    routing_weights: Tensor
    """G (26) [B, N, K]: weight of each triplet at each frame; sums to 1 over K."""
    emotion_distribution: Tensor | None
    """[B, K, W]: attention of (19) over the words, mean over heads and over frames weighted by q_i (20); sums to 1."""
    fact_gate: Tensor
    """B_f (24) [B, d], in (-1, 1); ones without bias adjustment."""
    emotion_gate: Tensor | None
    """B_e (25) [B, d], in (-1, 1); ones without bias adjustment, None without emotion augmentation."""


class EncoderOutput(NamedTuple):
    """What :class:`FaceNetEncoder` returns."""

    tokens: Tensor
    """[B, N_q, d_out], what the decoder reads (29)."""
    emotion_logits: Tensor | None
    """[B, W], what L_cls (31) reads; None without emotion augmentation."""
    explanation: Explanation | None
    """Only with ``explain=True``."""


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
        _check_emotion_features(emotion_features, config)
        self.config = config
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
                benchmarks. None and "cpp" reorder products, None with the fastest ops for these tensors.

        Under autocast the features may have any floating type but float64.

        Raises:
            TypeError, ValueError: an argument is missing, superfluous, or of the wrong type, shape or device;
                before any computing.
        """
        self._check_inputs(video, triplets, similarity, groups)
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
            summed, logits = self._factual_semantics(stages, v, v, calibrated)
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
            summed, logits = self._factual_semantics(stages, v, emotions, calibrated)
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
        self, stages: ModuleType, v: Tensor, query: Tensor, calibrated: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """v and query [B, 1, N, d], calibrated [B, K, 3, D_t] -> sum that (18) normalizes, logits of (26) [B, N, K]."""
        if calibrated is None:
            update, logits = self.ffn(v), None  # H = 0
        else:
            update, logits = stages.factual_semantics(self, v, query, calibrated)
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

    def _check_inputs(
        self, video: Tensor, triplets: Tensor | None, similarity: Tensor | None, groups: Tensor | None
    ) -> None:
        config = self.config
        weight = self.fact_norm.weight
        _check_tensor("video", video, ("B", "N", config.video_dim), weight, features=True)
        if video.shape[1] < 1:
            raise ValueError(f"video must have at least one frame, got shape {list(video.shape)}")
        if not config.retrieval:
            for name, value in (("triplets", triplets), ("similarity", similarity), ("groups", groups)):
                if value is not None:
                    raise ValueError(f"{name} must be None: this encoder's configuration has retrieval=False")
            return
        batch, k = video.shape[0], config.num_triplets
        _check_tensor("triplets", triplets, (batch, k, 3, config.text_dim), weight, features=True)
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
    if features and value.dtype != weight.dtype and not _autocast_bridges(value, weight):
        raise TypeError(f"{name} must be {weight.dtype} as the encoder's weights are, got {value.dtype}")
    if value.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device} as the encoder's weights are, it is on {value.device}")


def _brackets(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _autocast_bridges(value: Tensor, weight: Tensor) -> bool:
    """Whether autocast brings the two to one type: it is on, and float64, which it leaves alone, is not among them."""
    return torch.is_autocast_enabled(weight.device.type) and torch.float64 not in (value.dtype, weight.dtype)


def _check_emotion_features(emotion_features: Tensor | None, config: FaceNetConfig) -> None:
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


def _random_emotion_features(config: FaceNetConfig) -> Tensor:
    """Standard normal [W, d_E] from a generator of its own: the same whatever was seeded, and nothing drawn from it."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(config.num_emotions, config.emotion_dim, generator=generator, device="cpu")
