"""A video file in, its caption and what explains it out: the one place where data meets model.

Frames -> CLIP features -> retrieved captions and their triplets -> encoder -> decoder -> text. Each stage is a method
of :class:`CaptionPipeline`, so that a benchmark can time it alone. What a stage needs (PyAV, FAISS, transformers) is
imported when that stage is used.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evc_fast.model.captioner import FaceNet
from evc_fast.model.config import FaceNetConfig
from evc_fast.model.encoder import EncoderOutput, Explanation, FaceNetEncoder
from evc_fast.ops.dispatch import Impl

if TYPE_CHECKING:
    from evc_fast.data.clip import ClipTowers
    from evc_fast.data.repository import CaptionRepository, Retrieved
    from evc_fast.data.video import VideoFrames

STAGES = ("video decode", "image tower", "retrieval", "encoder", "decoder")
"""What :attr:`CaptionResult.timings` holds, in the order in which the stages run; "encoder" includes the Q-former."""

REPOSITORY_SIZE = 28_860  # captions of the training split of EVC-Combine


@dataclass(frozen=True)
class RetrievedFact:
    """One retrieved caption, its triplet, and the weights that the encoder gave it."""

    caption: str
    triplet: tuple[str, str, str]
    similarity: float
    """Cosine of the video and the caption, (5)."""
    component_weights: tuple[float, float, float] | None = None
    """alpha of subject, predicate, object, (12)."""
    triplet_weight: float | None = None
    """theta, (15)."""
    routing_weight: float | None = None
    """G of (26), mean over the frames."""
    emotions: tuple[tuple[str, float], ...] = ()
    """The emotion words that this triplet attends to most, (19), and their share."""


@dataclass(frozen=True)
class CaptionResult:
    """A caption, and what explains it."""

    text: str
    """At most 15 words; token ids "<17> <3>" where the decoder has no tokenizer."""
    ids: Tensor
    """[T] int64, on the CPU."""
    retrieved: tuple[RetrievedFact, ...]
    """Best first; empty without retrieval."""
    emotions: tuple[tuple[str, float], ...]
    """The emotion words that the classification head finds most likely, and their probability; empty without one."""
    fact_gate: float | None
    """Mean of |B_f| (24): how much of the facts passes; None where it was not asked for."""
    emotion_gate: float | None
    """Mean of |B_e| (25); None too without emotion augmentation."""
    explanation: Explanation | None
    """The same as tensors, on the CPU, batch of one."""
    timings: dict[str, float]
    """Seconds a stage of STAGES; of the whole batch where several videos were captioned together."""
    notes: tuple[str, ...] = field(default=())
    """What a reader of the caption must know, such as random weights or a damaged file."""

    def __str__(self) -> str:
        return self.describe()

    def describe(self) -> str:
        """The caption and its explanation as plain text."""
        lines = [f"caption: {self.text}"]
        for rank, fact in enumerate(self.retrieved, 1):
            lines.append(f"{rank}. {fact.caption!r}, similarity {fact.similarity:.3f}")
            parts = list(fact.triplet)
            if fact.component_weights is not None:
                parts = [f"{part} {weight:.2f}" for part, weight in zip(parts, fact.component_weights, strict=True)]
            line = f"   triplet ({', '.join(parts)})"
            if fact.triplet_weight is not None:
                line += f", weight {fact.triplet_weight:.2f}"
            if fact.routing_weight is not None:
                line += f", routed {fact.routing_weight:.2f}"
            lines.append(line)
            if fact.emotions:
                lines.append(f"   attends to {_shares(fact.emotions)}")
        if self.emotions:
            lines.append(f"emotions: {_shares(self.emotions)}")
        gates = (("facts", self.fact_gate), ("emotions", self.emotion_gate))
        shown = [f"{name} {value:.2f}" for name, value in gates if value is not None]
        if shown:
            lines.append(f"gates: {', '.join(shown)}")
        lines.append("time: " + ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in self.timings.items()))
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)


class StageClock:
    """Seconds a named stage; on a GPU the queue is drained at a stage's border, so that each pays for its own work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


class CaptionPipeline:
    """Captions video files.

    Args:
        towers: frozen CLIP towers; their image width must be the encoder's ``video_dim``.
        repository: captions to retrieve from, built with the same towers; None only where the encoder's configuration
            has ``retrieval=False``.
        model: encoder and decoder.
        emotion_words: the dictionary's W words in the order of E_0, for explanations; None prints "emotion 17".
        impl: which implementation of the fused ops runs; None chooses.
        temporal_kernel: t of the 3D patch projection, (1), by which the encoder's video features are made; 1 is CLIP's
            own. Retrieval always uses CLIP's own, so that another t costs a second pass through the image tower.

    Captions are made as in evaluation mode (no dropout), whatever mode the model is in; its mode is left as it is.

    Raises:
        ValueError: widths that do not fit, a missing or superfluous repository, a wrong number of emotion words, or a
            ``temporal_kernel`` below 1.
        TypeError: ``emotion_words`` is one string.
        EncoderMismatch: the repository was built with other towers.
    """

    def __init__(
        self,
        towers: ClipTowers,
        repository: CaptionRepository | None,
        model: FaceNet,
        *,
        emotion_words: Sequence[str] | None = None,
        impl: Impl | None = None,
        temporal_kernel: int = 1,
    ) -> None:
        config = model.encoder.config
        if towers.image_dim != config.video_dim:
            raise ValueError(
                f"towers must write features of width video_dim = {config.video_dim}, got {towers.image_dim}"
            )
        if (repository is None) == config.retrieval:
            wanted = "be given" if config.retrieval else "be None"
            raise ValueError(f"repository must {wanted}: the encoder's configuration has retrieval={config.retrieval}")
        if repository is not None:
            repository.require_encoder(towers.fingerprint)
            if repository.width != config.text_dim:
                raise ValueError(
                    f"repository must hold features of width text_dim = {config.text_dim}, got {repository.width}"
                )
        if isinstance(emotion_words, str):
            raise TypeError(f"emotion_words must be a sequence of words, got one string {emotion_words!r}")
        if emotion_words is not None and len(emotion_words) != config.num_emotions:
            raise ValueError(
                f"emotion_words must be the {config.num_emotions} words of the encoder's dictionary, "
                f"got {len(emotion_words)}"
            )
        if isinstance(temporal_kernel, bool) or not isinstance(temporal_kernel, int) or temporal_kernel < 1:
            raise ValueError(f"temporal_kernel must be an integer of at least 1, got {temporal_kernel!r}")
        self.towers = towers
        self.repository = repository
        self.model = model
        self.emotion_words = None if emotion_words is None else tuple(emotion_words)
        self.impl = impl
        self.temporal_kernel = temporal_kernel

    @property
    def random_weights(self) -> bool:
        """True where any part has random weights: times and memory mean something then, words do not."""
        parts = (self.towers, self.repository, self.model, self.model.decoder)
        return any(part.random_weights for part in parts if part is not None)

    @property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        return self.model.encoder.fact_norm.weight.device

    @classmethod
    def random(
        cls,
        decoder: str = "flan-t5-xl",
        clip: str = "ViT-B/32",
        repository_size: int = REPOSITORY_SIZE,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        impl: Impl | None = None,
        *,
        config: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> CaptionPipeline:
        """Every part in its true shape with random weights, for timing and for tests; an LLM's LoRA adapter is merged.

        Args:
            decoder: "flan-t5-xl", "opt-2.7b", "lstm", "transformer" ("tiny-t5", "tiny-opt").
            clip: shape of the towers, "ViT-B/32", "ViT-L/14" ("tiny").
            repository_size: entries of the repository, random unit vectors behind a real FAISS index.
            dtype: of an LLM decoder; towers, encoder and small decoders are float32.
            device: where towers, encoder and decoder run.
            impl: which implementation of the fused ops runs.
            config: fields of the encoder's configuration other than the widths, which follow from the other parts.
            seed: of the encoder's and the repository's random numbers.
        """
        from evc_fast.data.clip import ClipTowers

        towers = ClipTowers.random(clip, device=device, seed=seed)
        widths = {"video_dim": towers.image_dim, "text_dim": towers.text_dim}
        model = random_model(decoder, **widths, dtype=dtype, device=device, config=config, seed=seed)
        if hasattr(model.decoder, "merge_lora"):
            model.decoder.merge_lora()
        repository = None
        if model.encoder.config.retrieval:
            repository = random_repository(towers, repository_size, seed=seed)
        return cls(towers, repository, model, impl=impl)

    def __call__(self, source: str | os.PathLike[str], *, video_id: str | None = None, **options: Any) -> CaptionResult:
        """Caption one video file; ``options`` as of :meth:`caption_batch`."""
        return self.caption_batch([source], video_ids=[video_id], **options)[0]

    @torch.inference_mode()
    def caption_batch(
        self,
        sources: Sequence[str | os.PathLike[str]],
        *,
        video_ids: Sequence[str | None] | None = None,
        explain: bool = True,
        num_beams: int = 5,
        max_new_tokens: int = 32,
        min_new_tokens: int = 0,
        length_penalty: float = 1.0,
        num_emotions: int = 5,
    ) -> list[CaptionResult]:
        """Caption several video files together.

        Args:
            sources: video files, one caption each.
            video_ids: ids under which these videos' own captions stand in the repository: those are not retrieved.
            explain: also return what explains the captions.
            num_beams, max_new_tokens, min_new_tokens, length_penalty: as of the decoder's ``generate``; the text is cut
                to 15 words.
            num_emotions: how many emotion words an explanation names.

        Raises:
            VideoError: a file cannot be read.
            ValueError: ``video_ids`` of another length, ``num_emotions`` that is no integer of at least 0, features or
                tokens that are not finite, or too few captions to retrieve.
            TypeError: ``sources`` is one path, or ``video_ids`` one string.
        """
        if isinstance(sources, (str, os.PathLike)):
            raise TypeError("sources must be a list of video files, got one path: call the pipeline itself with it")
        if isinstance(video_ids, str):
            raise TypeError(f"video_ids must be a list of ids, one a source, got one string {video_ids!r}")
        if isinstance(num_emotions, bool) or not isinstance(num_emotions, int) or num_emotions < 0:
            raise ValueError(f"num_emotions must be an integer of at least 0, got {num_emotions!r}")
        if video_ids is not None and len(video_ids) != len(sources):
            raise ValueError(f"video_ids must be as many as sources, {len(sources)}, got {len(video_ids)}")
        if not sources:
            return []
        clock = StageClock(self.device)
        with clock("video decode"):
            videos = [self.read(source) for source in sources]
        frames = [video.frames for video in videos]
        with clock("image tower"):
            features = self.encode_frames(frames, temporal_kernel=self.temporal_kernel)  # V, (1)
        retrieved = None
        if self.repository is not None:
            plain = features
            if self.temporal_kernel != 1:
                with clock("image tower"):
                    plain = self.encode_frames(frames)
            with clock("retrieval"):
                retrieved = self.retrieve(plain, video_ids)
        with clock("encoder"):
            encoded = self.encode(features, retrieved, explain=explain)
        with clock("decoder"):
            ids = self.generate(
                encoded.tokens,
                num_beams=num_beams,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                length_penalty=length_penalty,
            )
        texts = self.model.decoder.decode(ids)
        return [
            self._result(index, texts[index], ids, encoded, retrieved, videos[index], clock.seconds, num_emotions)
            for index in range(len(sources))
        ]

    def read(self, source: str | os.PathLike[str]) -> VideoFrames:
        """The encoder's number of frames, sampled from a video file."""
        try:
            from evc_fast.data.video import read_frames
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"reading a video file needs {error.name}", name=error.name) from error
        return read_frames(source, self.model.encoder.config.num_frames)

    def encode_frames(self, frames: Sequence[Tensor], *, temporal_kernel: int = 1) -> Tensor:
        """Image features, float32 [B, N, D_v] as the towers give them, of B videos' frames, each uint8 [N, H, W, 3].

        ``temporal_kernel`` is t of (1); 1 gives CLIP's own features, which retrieval needs. ValueError where a feature
        is not finite.
        """
        if len({clip.shape for clip in frames}) == 1:
            features = self.towers.encode_frames(torch.stack(list(frames)), temporal_kernel=temporal_kernel)
        else:  # another picture size, another resize
            each = [self.towers.encode_frames(clip, temporal_kernel=temporal_kernel) for clip in frames]
            features = torch.stack(each)
        if not bool(features.isfinite().all()):
            raise ValueError("image features must be finite: the image tower gave NaN or infinity")
        return features

    def retrieve(self, features: Tensor, video_ids: Sequence[str | None] | None = None) -> Retrieved:
        """The K captions nearest to each of the videos with ``features`` [B, N, D_v], by cosine, (3)-(6).

        Captions of the video itself, by ``video_ids``, are left out.
        """
        k = self.model.encoder.config.num_triplets
        return self.repository.search(features, k=k, exclude_video_ids=None if video_ids is None else list(video_ids))

    def encode(self, features: Tensor, retrieved: Retrieved | None, *, explain: bool = False) -> EncoderOutput:
        """Tokens for the decoder, emotion logits, and on request what explains them, (10)-(29)."""
        encoder = self.model.encoder
        features = features.to(self.device, encoder.fact_norm.weight.dtype)
        inputs: tuple[Tensor, ...] = ()
        if retrieved is not None:
            inputs = (
                retrieved.triplets.to(self.device, features.dtype),
                retrieved.similarity.to(self.device),
                retrieved.groups.to(self.device),
            )
        with _evaluation_mode(encoder):
            return encoder(features, *inputs, explain=explain, impl=self.impl)

    def generate(self, tokens: Tensor, **options: Any) -> Tensor:
        """Caption ids [B, T] of ``tokens`` [B, N_q, d_out]; ``options`` as of the decoder's ``generate``.
        ValueError where a token is not finite: a search over NaN would end in words all the same.
        """
        if not bool(tokens.isfinite().all()):
            raise ValueError("tokens must be finite: the encoder gave NaN or infinity")
        with _evaluation_mode(self.model.decoder):
            return self.model.decoder.generate(tokens, **options)

    def _result(
        self,
        index: int,
        text: str,
        ids: Tensor,
        encoded: EncoderOutput,
        retrieved: Retrieved | None,
        video: VideoFrames,
        seconds: dict[str, float],
        num_emotions: int,
    ) -> CaptionResult:
        """One video's part of what the stages gave for the batch."""
        explanation = None
        if encoded.explanation is not None:
            explanation = Explanation(
                *(None if value is None else value[index : index + 1].cpu() for value in encoded.explanation)
            )
        facts = () if retrieved is None else self._facts(index, retrieved, explanation, num_emotions)
        emotions: tuple[tuple[str, float], ...] = ()
        if encoded.emotion_logits is not None:
            emotions = self._top_emotions(encoded.emotion_logits[index].float().softmax(-1), num_emotions)
        gates: list[float | None] = [None, None]
        if explanation is not None:
            for position, gate in enumerate((explanation.fact_gate, explanation.emotion_gate)):
                gates[position] = None if gate is None else gate.float().abs().mean().item()
        notes = []
        if self.random_weights:
            notes.append("random weights: the words mean nothing, time and memory do not depend on them")
        if self.model.encoder.random_emotion_features:
            notes.append("the emotion words' vectors are random")
        if video.damaged:
            notes.append(f"{video.damaged} packets or frames of the video are damaged")
        return CaptionResult(
            text=text,
            ids=ids[index].cpu(),
            retrieved=facts,
            emotions=emotions,
            fact_gate=gates[0],
            emotion_gate=gates[1],
            explanation=explanation,
            timings=dict(seconds),
            notes=tuple(notes),
        )

    def _facts(
        self, index: int, retrieved: Retrieved, explanation: Explanation | None, num_emotions: int
    ) -> tuple[RetrievedFact, ...]:
        facts = []
        for rank, (caption, triplet) in enumerate(
            zip(retrieved.captions[index], retrieved.triplet_texts[index], strict=True)
        ):
            weights: dict[str, Any] = {}
            if explanation is not None:
                weights["component_weights"] = tuple(explanation.component_weights[0, rank].tolist())
                weights["triplet_weight"] = explanation.triplet_weights[0, rank].item()
                weights["routing_weight"] = explanation.routing_weights[0, :, rank].mean().item()
                if explanation.emotion_distribution is not None:
                    weights["emotions"] = self._top_emotions(explanation.emotion_distribution[0, rank], num_emotions)
            similarity = retrieved.similarity[index, rank].item()
            facts.append(RetrievedFact(caption, tuple(triplet), similarity, **weights))
        return tuple(facts)

    def _top_emotions(self, shares: Tensor, count: int) -> tuple[tuple[str, float], ...]:
        """The `count` largest of shares [W], largest first, by name."""
        values, indices = shares.topk(min(count, len(shares)))
        words = self.emotion_words
        return tuple(
            (f"emotion {index}" if words is None else words[index], value)
            for index, value in zip(indices.tolist(), values.tolist(), strict=True)
        )


def random_model(
    decoder: str,
    *,
    video_dim: int = 512,
    text_dim: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    config: dict[str, Any] | None = None,
    seed: int = 0,
) -> FaceNet:
    """Encoder and decoder in their true shape with random weights; arguments as of :meth:`CaptionPipeline.random`.

    Leaves PyTorch's random number generator as it was. ValueError where ``config`` names a width or no field at all.
    """
    from evc_fast.model.decoders import build_decoder

    given = sorted({"video_dim", "text_dim", "output_dim"} & set(config or ()))
    if given:
        raise ValueError(f"config must leave the widths to the other parts, got {', '.join(given)}")
    settings = FaceNetConfig.from_dict({**(config or {}), "video_dim": video_dim, "text_dim": text_dim})
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if decoder in ("lstm", "transformer"):
            d = settings.dim  # a small decoder reads the common width
            sizes = {"input_dim": d, "ffn_dim": 4 * d} if decoder == "transformer" else {"input_dim": d}
            built = build_decoder(decoder, dtype=torch.float32, device=device, seed=seed, **sizes)
        else:
            built = build_decoder(decoder, dtype=dtype, device=device, seed=seed)
        torch.manual_seed(seed)
        encoder = FaceNetEncoder(dataclasses.replace(settings, output_dim=built.input_dim)).to(device)
    return FaceNet(encoder, built).eval()


def random_repository(towers: ClipTowers, size: int, *, seed: int = 0) -> CaptionRepository:
    """A repository of `size` numbered captions whose features are random, searched as a real one is."""
    from evc_fast.data.repository import CaptionRepository, distinct_parts

    numbers = range(size)
    triplets = [(f"subject {number % 997}", f"verb {number % 499}", f"object {number % 1499}") for number in numbers]
    generator = torch.Generator().manual_seed(seed)
    return CaptionRepository.from_features(
        [f"caption {number}" for number in numbers],
        [f"video {number // 20}" for number in numbers],
        triplets,
        torch.randn(size, towers.text_dim, generator=generator),
        torch.randn(len(distinct_parts(triplets)[0]), towers.text_dim, generator=generator),
        encoder_fingerprint=towers.fingerprint,
        random_weights=True,
    )


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    """No dropout inside; afterwards every submodule is in the mode that it was in."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _shares(pairs: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{word} {value:.3f}" for word, value in pairs)
