"""Training batches: frame features, retrieval computed beforehand, targets; and the order of the captions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from evc_fast.training.losses import Denominators
from evc_fast.training.targets import Targets

if TYPE_CHECKING:
    from evc_fast.data.captions import Caption
    from evc_fast.data.check import Quarantine
    from evc_fast.data.repository import CaptionRepository

__all__ = ["Batch", "CaptionBatches", "CaptionSampler", "DataError", "FrameFeatures", "VideoBatches"]

_VIDEOS_A_SEARCH = 256


class DataError(ValueError):
    """Training data that do not fit together."""


class FrameFeatures(Protocol):
    """What training needs of :class:`evc_fast.data.features.FeatureStore`."""

    video_ids: Sequence[str]
    fingerprint: str
    num_frames: int
    width: int
    failed: Quarantine
    """Videos that have no features, and why."""

    def __getitem__(self, video_id: str) -> Tensor:
        """Image features of a video, float32 [N, D_v]."""


class Batch(NamedTuple):
    """What one piece of a batch holds, on one device; triplets, similarity and groups are None without retrieval."""

    video: Tensor
    """[B, N, D_v]."""
    triplets: Tensor | None
    """[B, K, 3, D_t]."""
    similarity: Tensor | None
    """[B, K]."""
    groups: Tensor | None
    """int64 [B, K]."""
    target_ids: Tensor
    """int64 [B, T]."""
    weights: Tensor
    """[B, T], of (30)."""
    words: Tensor
    """bool [B, W], of (31)."""

    def to(self, device: torch.device) -> Batch:
        return Batch(*(value if value is None else value.to(device, non_blocking=True) for value in self))


class VideoBatches:
    """The encoder's inputs for some videos; retrieval, which no weight changes, is done once, here.

    Args:
        video_ids: distinct; all are in ``features``.
        features: of the videos' frames.
        repository: searched for each video without its own captions, (3)-(6); None without retrieval.
        num_triplets: K.

    Raises:
        EncoderMismatch: features and repository come from different towers.
        RepositoryTooSmall: fewer than K captions are left to some video.
    """

    def __init__(
        self, video_ids: Sequence[str], features: FrameFeatures, repository: CaptionRepository | None, num_triplets: int
    ) -> None:
        self.video_ids = tuple(video_ids)
        self._features = features
        self._retrieved: tuple[Tensor, Tensor, Tensor] | None = None
        if repository is not None:
            repository.require_encoder(features.fingerprint)
            found = []
            for start in range(0, len(self.video_ids), _VIDEOS_A_SEARCH):
                ids = self.video_ids[start : start + _VIDEOS_A_SEARCH]
                found.append(repository.search(self.video(ids), num_triplets, ids))
            self._retrieved = tuple(
                torch.cat([getattr(each, name) for each in found]) for name in ("triplets", "similarity", "groups")
            )

    def __len__(self) -> int:
        return len(self.video_ids)

    def video(self, ids: Sequence[str]) -> Tensor:
        """[B, N, D_v]."""
        if not ids:
            return torch.zeros(0, self._features.num_frames, self._features.width)
        return torch.stack([self._features[video_id] for video_id in ids])

    def inputs(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Video, triplets, similarity and groups of some videos, by their number."""
        rows = list(rows)
        video = self.video([self.video_ids[row] for row in rows])
        if self._retrieved is None:
            return video, None, None, None
        return video, *(each[rows] for each in self._retrieved)

    def fingerprint(self) -> str:
        """Of the videos, their order, their features, and what was retrieved for them."""
        digest = hashlib.sha256("\n".join(self.video_ids).encode())
        for video_id in self.video_ids:
            digest.update(self._features[video_id].numpy().tobytes())
        if self._retrieved is not None:
            _, similarity, groups = self._retrieved
            digest.update(similarity.numpy().tobytes())
            digest.update(groups.numpy().tobytes())
        return digest.hexdigest()


class CaptionBatches:
    """n training captions as batches.

    Args:
        captions: in their order; each one's video is in ``videos``.
        videos: of all the captions.
        targets: of the captions, in the same order.
        delta: of (30).
    """

    def __init__(self, captions: Sequence[Caption], videos: VideoBatches, targets: Targets, delta: float) -> None:
        numbers = {video_id: number for number, video_id in enumerate(videos.video_ids)}
        self._video_of = [numbers[caption.video_id] for caption in captions]
        self._videos = videos
        self._targets = targets
        self._delta = delta

    def __len__(self) -> int:
        return len(self._video_of)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The captions of these rows, one item each."""
        inputs = self._videos.inputs([self._video_of[row] for row in rows])
        return Batch(*inputs, *self._targets.batch(rows, self._delta))

    def denominators(self, rows: Sequence[int]) -> Denominators:
        """Of the losses of a whole batch, known to every process without asking the others."""
        return Denominators(self._targets.num_tokens(rows), len(rows))

    def videos_of(self, rows: Sequence[int]) -> list[str]:
        """Ids of the videos of these captions, for messages."""
        return [self._videos.video_ids[self._video_of[row]] for row in rows]

    def fingerprint(self) -> str:
        """Of what the batches are made of: videos and their features, what was retrieved for them, targets."""
        digest = hashlib.sha256(self._videos.fingerprint().encode())
        for row, video in enumerate(self._video_of):
            digest.update(f"{self._videos.video_ids[video]} {self._targets.ids[row]}\n".encode())
        return digest.hexdigest()


class CaptionSampler(Iterator[list[int]]):
    """Rows of one optimiser step after another: every caption once an epoch, in an order that the seed decides.

    All processes hold the same one and take their shares of each batch. Its state is two numbers, so that a run that
    was broken off within an epoch goes on with the very batch that was next.

    Args:
        size: number of captions, at least 1.
        batch_size: of a step; the last batch of an epoch holds what is left.
        seed: of all epochs' orders.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        if size < 1:
            raise DataError("there are no captions to train on")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.epoch = self.position = 0
        self._order = self._order_of(0)

    @property
    def batches_an_epoch(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[int]:
        """The next batch's rows; StopIteration at the end of the epoch, until `next_epoch`."""
        if self.position == self.batches_an_epoch:
            raise StopIteration
        start = self.position * self.batch_size
        self.position += 1
        return self._order[start : start + self.batch_size]

    def next_epoch(self) -> None:
        self._go_to(self.epoch + 1, 0)

    def state_dict(self) -> dict[str, Any]:
        """Fit for JSON; ``size``, ``batch_size`` and ``seed`` are there to be checked."""
        return {name: getattr(self, name) for name in ("epoch", "position", "size", "batch_size", "seed")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. DataError where it is of other captions, batches or another seed."""
        for name in ("size", "batch_size", "seed"):
            if state[name] != getattr(self, name):
                raise DataError(f"the sampler's {name} is {getattr(self, name)}, its saved state has {state[name]}")
        self._go_to(state["epoch"], state["position"])

    def _go_to(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._order = self._order_of(epoch)

    def _order_of(self, epoch: int) -> list[int]:
        # One generator an epoch, so that an epoch's order does not depend on what was drawn before it.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.size, generator=generator).tolist()
