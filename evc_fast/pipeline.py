"""A video file in, its caption and what explains it out: the one place where data meets model.

Frames -> CLIP features -> retrieved captions and their triplets -> encoder -> decoder -> text. Each stage is a method
of :class:`CaptionPipeline`, so that a benchmark can time it alone. What a stage needs (PyAV, FAISS, transformers) is
imported when that stage is used.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from evc_fast.model.captioner import FaceNet
from evc_fast.model.config import FaceNetConfig
from evc_fast.model.encoder import EncoderOutput, Explanation, FaceNetEncoder
from evc_fast.ops.dispatch import Impl
from evc_fast.results import STAGES, CaptionResult, RetrievedFact

if TYPE_CHECKING:
    from evc_fast.data.clip import ClipTowers
    from evc_fast.data.repository import CaptionRepository, Retrieved
    from evc_fast.data.video import VideoFrames
    from evc_fast.data.video_errors import VideoError

__all__ = ["STAGES", "CaptionPipeline", "CaptionResult", "RetrievedFact", "random_model", "random_repository"]

_Fields = TypeVar("_Fields", bound=tuple)

REPOSITORY_SIZE = 28_860  # captions of the training split of EVC-Combine

NEAR_TIE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By type: distance between scores (sums of log-probabilities) below which another batch size may decide otherwise."""


@dataclass
class _Made:
    """What the stages gave for one video, each a batch of one."""

    video: VideoFrames
    retrieved: Retrieved | None
    encoded: EncoderOutput
    ids: Tensor
    margin: float


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
        notes: what everybody who reads a caption must know; every result carries them.

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
        notes: Sequence[str] = (),
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
        self.notes = tuple(notes)

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
        pictures: bool = False,
        failed: Callable[[str | os.PathLike[str], VideoError], None] | None = None,
    ) -> list[CaptionResult]:
        """Caption several video files together, each as it is captioned alone.

        What is computed for several videos at once rounds differently than for one. So frames are encoded and searched
        with video by video, and a caption that rounding may have decided (`NEAR_TIE`) is made again alone; its notes
        say so.

        Args:
            sources: video files, one caption each.
            video_ids: ids under which these videos' own captions stand in the repository: those are not retrieved.
            explain: also return what explains the captions.
            num_beams, max_new_tokens, min_new_tokens, length_penalty: as of the decoder's ``generate``; the text is cut
                to 15 words.
            num_emotions: how many emotion words an explanation names.
            pictures: also keep small pictures of the frames, for a report.
            failed: is given each file that cannot be read, and why, and the file has no result; None raises.

        Raises:
            VideoError: a file cannot be read, and ``failed`` is None.
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
        clock = StageClock(self.device)
        with clock("video decode"):
            sources, video_ids, videos = self._read_all(sources, video_ids, failed)
        if not videos:
            return []
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
        options = {
            "num_beams": num_beams,
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens,
            "length_penalty": length_penalty,
        }
        with clock("decoder"):
            ids, margins = self.search(encoded.tokens, **options)
        made = []
        for index, margin in enumerate(margins.tolist()):
            own = _Made(
                videos[index],
                None if retrieved is None else _row(retrieved, index),
                encoded._replace(
                    tokens=encoded.tokens[index : index + 1],
                    emotion_logits=None
                    if encoded.emotion_logits is None
                    else encoded.emotion_logits[index : index + 1],
                    explanation=None if encoded.explanation is None else _row(encoded.explanation, index),
                ),
                ids[index : index + 1],
                margin,
            )
            if margin < self.near_tie and len(videos) > 1:
                with clock("encoder"):
                    own.encoded = self.encode(features[index : index + 1], own.retrieved, explain=explain)
                with clock("decoder"):
                    own.ids, _ = self.search(own.encoded.tokens, **options)
            made.append(own)
        results = []
        for source, own in zip(sources, made, strict=True):
            result = self._result(own, num_emotions)
            if pictures:
                from evc_fast.data.pictures import small_pictures

                result = dataclasses.replace(result, pictures=small_pictures(own.video.frames, own.video.times))
            results.append(
                dataclasses.replace(result, source=str(source), timings=dict(clock.seconds), batch_size=len(videos))
            )
        return results

    @property
    def near_tie(self) -> float:
        """Below this distance between two captions' scores rounding may decide, in the types of this model."""
        return max(NEAR_TIE[self.model.encoder.fact_norm.weight.dtype], NEAR_TIE[self.model.decoder.dtype])

    def read(self, source: str | os.PathLike[str]) -> VideoFrames:
        """The encoder's number of frames, sampled from a video file."""
        try:
            from evc_fast.data.video import read_frames
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"reading a video file needs {error.name}", name=error.name) from error
        return read_frames(source, self.model.encoder.config.num_frames)

    def _read_all(
        self,
        sources: Sequence[str | os.PathLike[str]],
        video_ids: Sequence[str | None] | None,
        failed: Callable[[str | os.PathLike[str], VideoError], None] | None,
    ) -> tuple[list[str | os.PathLike[str]], list[str | None] | None, list[VideoFrames]]:
        """The sources that can be read, their ids, their frames."""
        from evc_fast.data.video_errors import VideoError

        read: list[tuple[str | os.PathLike[str], str | None, VideoFrames]] = []
        for source, video_id in zip(sources, video_ids or [None] * len(sources), strict=True):
            try:
                read.append((source, video_id, self.read(source)))
            except VideoError as error:
                if failed is None:
                    raise
                failed(source, error)
        ids = None if video_ids is None else [video_id for _, video_id, _ in read]
        return [source for source, _, _ in read], ids, [frames for _, _, frames in read]

    def encode_frames(self, frames: Sequence[Tensor], *, temporal_kernel: int = 1) -> Tensor:
        """Image features, float32 [B, N, D_v] as the towers give them, of B videos' frames, each uint8 [N, H, W, 3].

        ``temporal_kernel`` is t of (1); 1 gives CLIP's own features, which retrieval needs. ValueError where a feature
        is not finite.
        """
        # Video by video: N frames keep a processor busy, and no feature depends on the videos beside it.
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

    def search(self, tokens: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Caption ids [B, T] of ``tokens`` [B, N_q, d_out] and their margins [B]; ``options`` as of the decoder's
        ``search``. ValueError where a token is not finite: a search over NaN would end in words all the same.
        """
        if not bool(tokens.isfinite().all()):
            raise ValueError("tokens must be finite: the encoder gave NaN or infinity")
        with _evaluation_mode(self.model.decoder):
            return self.model.decoder.search(tokens, **options)

    def _result(self, made: _Made, num_emotions: int) -> CaptionResult:
        """All of a result but what belongs to its batch and its file."""
        encoded, explanation = made.encoded, None
        if encoded.explanation is not None:
            explanation = Explanation(*(None if value is None else value.cpu() for value in encoded.explanation))
        facts = () if made.retrieved is None else self._facts(made.retrieved, explanation, num_emotions)
        emotions: tuple[tuple[str, float], ...] = ()
        if encoded.emotion_logits is not None:
            emotions = self._top_emotions(encoded.emotion_logits[0].float().softmax(-1), num_emotions)
        gates: list[float | None] = [None, None]
        if explanation is not None:
            for position, gate in enumerate((explanation.fact_gate, explanation.emotion_gate)):
                gates[position] = None if gate is None else gate.float().abs().mean().item()
        notes = list(self.notes)
        if self.random_weights:
            notes.append("random weights: the words mean nothing, time and memory do not depend on them")
        if self.model.encoder.random_emotion_features:
            notes.append("the emotion words' vectors are random")
        if made.video.damaged:
            notes.append(f"{made.video.damaged} packets or frames of the video are damaged")
        if made.margin < self.near_tie:
            notes.append(
                f"a near-tie: another outcome of the search was within {self.near_tie:g} of this one, so that rounding "
                "may decide between them"
            )
        ids = made.ids[0].cpu()
        ids = ids[: int((ids != self.model.decoder.pad_id).sum())]  # padded as long as the longest of its batch
        return CaptionResult(
            text=self.model.decoder.decode(made.ids)[0],
            ids=ids,
            retrieved=facts,
            emotions=emotions,
            fact_gate=gates[0],
            emotion_gate=gates[1],
            explanation=explanation,
            timings={},
            notes=tuple(notes),
            emotion_words=self.emotion_words,
        )

    def _facts(
        self, retrieved: Retrieved, explanation: Explanation | None, num_emotions: int
    ) -> tuple[RetrievedFact, ...]:
        facts = []
        for rank, (caption, triplet) in enumerate(zip(retrieved.captions[0], retrieved.triplet_texts[0], strict=True)):
            weights: dict[str, Any] = {}
            if explanation is not None:
                weights["component_weights"] = tuple(explanation.component_weights[0, rank].tolist())
                weights["triplet_weight"] = explanation.triplet_weights[0, rank].item()
                weights["routing_weight"] = explanation.routing_weights[0, :, rank].mean().item()
                if explanation.emotion_distribution is not None:
                    weights["emotions"] = self._top_emotions(explanation.emotion_distribution[0, rank], num_emotions)
            similarity = retrieved.similarity[0, rank].item()
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


def _row(fields: _Fields, index: int) -> _Fields:
    """Row `index` of each field of a batch, a tensor, a list or None, as a batch of one."""
    return type(fields)(*(None if value is None else value[index : index + 1] for value in fields))


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
