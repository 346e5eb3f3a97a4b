"""A handful of captioned videos in memory, for tests of training: nothing is decoded, nothing is read."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from evc_fast.data.captions import Caption, CaptionSet, split_by_video
from evc_fast.data.check import Quarantine, Quarantined
from evc_fast.data.emotions import EmotionDictionary
from evc_fast.data.repository import CaptionRepository, distinct_parts
from evc_fast.training.config import RunConfig
from evc_fast.training.preparation import RunData, skip_unusable

__all__ = ["FINGERPRINT", "MemoryFeatures", "training_config", "training_world", "world_dictionary"]

WIDTH, FRAMES = 16, 3
SUBJECTS, VERBS = ("man", "woman", "dog"), ("runs", "sings", "sleeps", "waits")
EMOTIONS = {"joy": ("happily", "joyful"), "anger": ("angrily",), "fear": ("afraid",)}
FINGERPRINT = hashlib.sha256(b"training world").hexdigest()


class MemoryFeatures:
    """What training reads of a feature store."""

    fingerprint = FINGERPRINT

    def __init__(self, features: dict[str, Tensor], failed: Quarantine | None = None) -> None:
        self._features = features
        self.num_frames, self.width = next(iter(features.values())).shape
        self.failed = failed or Quarantine()

    @property
    def video_ids(self) -> tuple[str, ...]:
        return tuple(self._features)

    def __getitem__(self, video_id: str) -> Tensor:
        return self._features[video_id]


def world_dictionary() -> EmotionDictionary:
    return EmotionDictionary(EMOTIONS)


def training_world(
    num_videos: int = 12, *, share: float = 0.25, retrieval: bool = True, corrupt: int = 0, max_skipped: float = 0.1
) -> RunData:
    """`num_videos` videos whose features say what their two captions say; `share` of them for validation.

    The first `corrupt` videos have no features; TooManyBadVideos where that is more than `max_skipped` of them.
    """
    dictionary = world_dictionary()
    captions, features, triplets = [], {}, []
    directions = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1))
    words = (*SUBJECTS, *VERBS, *dictionary.words)
    for number in range(num_videos):
        subject, verb = SUBJECTS[number % 3], VERBS[number % 4]
        emotion = dictionary.words[number % len(dictionary.words)]
        meaning = sum(directions[words.index(word)] for word in (subject, verb, emotion))
        noise = torch.randn(FRAMES, WIDTH, generator=torch.Generator().manual_seed(100 + number))
        features[f"v{number}"] = meaning + 0.1 * noise
        captions += [
            Caption(f"v{number}", f"A {subject} {verb} {emotion}."),
            Caption(f"v{number}", f"the {subject} {verb}"),
        ]
        triplets += [(subject, verb, emotion), (subject, verb, "something")]
    repository = None
    if retrieval:
        generator = torch.Generator().manual_seed(2)
        texts = torch.stack([features[caption.video_id].mean(0) for caption in captions])
        repository = CaptionRepository.from_features(
            [caption.text for caption in captions],
            [caption.video_id for caption in captions],
            triplets,
            texts + 0.3 * torch.randn(texts.shape, generator=generator),
            torch.randn(len(distinct_parts(triplets)[0]), WIDTH, generator=generator),
            encoder_fingerprint=FINGERPRINT,
        )
    bad = [Quarantined(f"v{number}", "", "UnreadableVideo", "made so") for number in range(corrupt)]
    for entry in bad:
        del features[entry.video_id]
    store = MemoryFeatures(features, Quarantine(bad))
    train, skipped = skip_unusable(CaptionSet(captions), store, Quarantine(), max_skipped)
    validation = None
    if share:
        train, validation = split_by_video(train, share, seed=0)
    vectors = torch.randn(len(dictionary.words), 8, generator=torch.Generator().manual_seed(3))
    return RunData(train, validation, store, repository, dictionary, vectors, skipped)


def training_config(output: object, **sections: Any) -> RunConfig:
    """A model of a few thousand parameters, two epochs of five steps; `sections` change the sections' keys."""
    tree: dict[str, Any] = {
        "output": str(output),
        "model": {
            "encoder": {"dim": 16, "num_frames": FRAMES, "num_triplets": 2, "num_queries": 4, "num_heads": 2},
            "decoder": {"name": "transformer", "options": {"num_layers": 1, "num_heads": 2, "ffn_dim": 32}},
        },
        "optimiser": {"lr": 3e-3},
        "trainer": {
            "epochs": 2,
            "batch_size": 4,
            "patience": None,
            "num_beams": 2,
            "max_new_tokens": 8,
            "device": "cpu",
            "tensorboard": False,
        },
    }
    for section, keys in sections.items():
        _lay_over(tree, {section: keys})
    return RunConfig.model_validate(tree)


def _lay_over(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict) and key not in ("decoder", "options"):
            _lay_over(tree[key], value)
        else:
            tree[key] = value
