"""From a run's configuration to its data and its untrained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evc_fast.data.captions import (
    CaptionSet,
    check_splits,
    differing_ids,
    merge_captions,
    read_captions,
    split_by_video,
)
from evc_fast.data.check import Quarantine, Quarantined, TooManyBadVideos
from evc_fast.data.emotions import EmotionDictionary, describe_with_clip, read_word_vectors
from evc_fast.model.captioner import FaceNet
from evc_fast.model.decoders.vocabulary import Vocabulary
from evc_fast.model.encoder import FaceNetEncoder
from evc_fast.training.config import CaptionFile, ConfigError, DecoderConfig, RunConfig, small_decoder_config
from evc_fast.training.dataset import DataError, FrameFeatures

if TYPE_CHECKING:
    from evc_fast.data.features import FeatureStore
    from evc_fast.data.repository import CaptionRepository

__all__ = ["RunData", "build_model", "read_data", "skip_unusable"]


@dataclass(frozen=True)
class RunData:
    """What a run learns from."""

    train: CaptionSet
    validation: CaptionSet | None
    """None: no validation."""
    features: FrameFeatures
    repository: CaptionRepository | None
    """None without retrieval."""
    dictionary: EmotionDictionary
    emotion_features: Tensor | None
    """E_0 [W, d_E]; None without emotion augmentation."""
    skipped: Quarantine = dataclasses.field(default_factory=Quarantine)
    """Videos with captions that are not used, and why."""


def read_data(config: RunConfig) -> RunData:
    """Everything that ``config.data`` names, checked against each other.

    Raises:
        ConfigError: a path that is needed is not given.
        DataError: features, repository and the encoder's configuration do not fit together.
        TooManyBadVideos: more videos than ``max_skipped`` are quarantined or have no features.
        CaptionError, EmotionError, RepositoryError, FileNotFoundError and others: of the files themselves.
    """
    from evc_fast.data.features import FeatureStore

    data, encoder = config.data, config.model.encoder
    _require("data.captions", data.captions)
    _require("data.features", data.features)
    if encoder.retrieval:
        _require("data.repository", data.repository)
    elif data.repository is not None:
        raise ConfigError("data.repository must be left out: model.encoder.retrieval is false")
    train = _read_captions(data.captions)
    validation = None
    if data.validation_captions:
        validation = _read_captions(data.validation_captions)
        check_splits(training=train, validation=validation)
    features = FeatureStore.open(data.features)
    quarantine = Quarantine() if data.quarantine is None else Quarantine.read(data.quarantine)
    both = train if validation is None else merge_captions(train, validation)
    try:
        used, skipped = skip_unusable(both, features, quarantine, data.max_skipped)
    except TooManyBadVideos as error:
        hint = differing_ids(both.video_ids, (*features.video_ids, *(entry.video_id for entry in features.failed)))
        raise TooManyBadVideos(
            f"{error}; of the features in {data.features}, allowed by data.max_skipped{hint}"
        ) from None
    train = used.subset([video_id for video_id in train.video_ids if video_id in used])
    if validation is not None:
        validation = used.subset([video_id for video_id in validation.video_ids if video_id in used])
    elif data.validation_share > 0:
        if len(train.video_ids) < 2:
            raise DataError("one video cannot be split for validation: data.validation_share=0 trains without")
        train, validation = split_by_video(train, data.validation_share, data.split_seed)
    repository = None
    if encoder.retrieval:
        from evc_fast.data.repository import CaptionRepository

        repository = CaptionRepository.load(data.repository, features.fingerprint)
    dictionary = EmotionDictionary.default() if data.emotions is None else EmotionDictionary.from_folder(data.emotions)
    emotion_features = None
    if encoder.emotion_augmentation:
        emotion_features = _emotion_features(config, dictionary.words, features)
    return RunData(train, validation, features, repository, dictionary, emotion_features, skipped)


def skip_unusable(
    captions: CaptionSet, features: FrameFeatures, quarantine: Quarantine, max_skipped: float
) -> tuple[CaptionSet, Quarantine]:
    """The captions whose videos can be used, and the videos that cannot: quarantined, or without features.

    The same on every process: it depends on the three lists alone.

    Raises:
        TooManyBadVideos: their share of all videos is above ``max_skipped``; names the first few.
        DataError: no video is left.
    """
    present = set(features.video_ids)
    skipped = []
    for video_id in captions.video_ids:
        if video_id in quarantine:
            skipped.append(quarantine[video_id])
        elif video_id in features.failed:
            skipped.append(features.failed[video_id])
        elif video_id not in present:
            skipped.append(Quarantined(video_id, "", "NoFeatures", "the features have no such video"))
    unusable = Quarantine(skipped)
    unusable.require_at_most(max_skipped, len(captions.video_ids))
    left = [video_id for video_id in captions.video_ids if video_id not in unusable]
    if not left:
        raise DataError("there are no captions of videos that can be used")
    if not skipped:
        return captions, unusable
    return captions.subset(left), unusable


def build_model(config: RunConfig, data: RunData, *, device: torch.device | str = "cpu") -> FaceNet:
    """The untrained model, the same for the same seed and data; PyTorch's generator is left as it was.

    Raises:
        DataError: the features are of another number of frames than the encoder's.
        FileNotFoundError, ValueError, OSError: an LLM's checkpoint cannot be used.
    """
    encoder = config.model.encoder
    if data.features.num_frames != encoder.num_frames:
        raise DataError(
            f"the features have {data.features.num_frames} frames a video, model.encoder.num_frames is "
            f"{encoder.num_frames}"
        )
    widths = {"video_dim": data.features.width, "num_emotions": len(data.dictionary.words)}
    widths["text_dim"] = data.features.width if data.repository is None else data.repository.width
    if data.emotion_features is not None:
        widths["emotion_dim"] = data.emotion_features.shape[1]
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        decoder = _build_decoder(config.model.decoder, encoder.dim, data, device)
        settings = config.encoder_config(**widths, output_dim=decoder.input_dim)
        model = FaceNet(FaceNetEncoder(settings, data.emotion_features).to(device), decoder)
    return model.train()


def _build_decoder(config: DecoderConfig, dim: int, data: RunData, device: torch.device) -> nn.Module:
    if config.name in ("t5", "opt"):
        from evc_fast.model.decoders.llm import LLMDecoder, LoraOptions

        return LLMDecoder.from_pretrained(
            config.checkpoint,
            dtype=getattr(torch, config.dtype),
            lora=LoraOptions(**config.lora.model_dump()),
            prompt=config.prompt,
            device=device,
            family=config.name,
        )
    from evc_fast.model.decoders import LSTMDecoder, TransformerDecoder

    vocabulary = Vocabulary.from_captions(data.train.texts, data.dictionary.words, min_count=config.min_count)
    # A small decoder reads and embeds at the common width d.
    sizes: dict[str, Any] = {"input_dim": dim, "dropout": config.dropout}
    sizes |= {"ffn_dim": 4 * dim} if config.name == "transformer" else {"embedding_dim": dim}
    built = small_decoder_config(config.name).from_dict(sizes | config.options)
    return (LSTMDecoder if config.name == "lstm" else TransformerDecoder)(built, vocabulary).to(device)


def _emotion_features(config: RunConfig, words: Sequence[str], features: FeatureStore) -> Tensor:
    """E_0 (2): word vectors where a file is given, else what CLIP says of the words."""
    data = config.data
    if data.word_vectors is not None:
        return read_word_vectors(data.word_vectors, words, dim=data.word_vector_dim)
    if data.clip is None:
        raise ConfigError("data.word_vectors (a GloVe file) or data.clip (which describes the emotion words) is needed")
    from evc_fast.data.clip import ClipTowers

    towers = ClipTowers.from_pretrained(data.clip)
    if towers.fingerprint != features.fingerprint:
        raise DataError(
            f"data.clip names other towers ({towers.name}) than those that made the features in {data.features} "
            f"({features.encoder})"
        )
    return describe_with_clip(words, towers).float().cpu()


def _read_captions(files: Sequence[CaptionFile]) -> CaptionSet:
    sets = (read_captions(file.path, id_prefix=file.id_prefix) for file in files)
    return merge_captions(*sets, names=[str(file.path) for file in files])


def _require(key: str, value: object) -> None:
    if not value:
        raise ConfigError(f"{key} must be given, in the configuration's file or as --set {key}=...")
