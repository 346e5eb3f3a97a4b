"""What the toy world's FACE-net is held against: the caption that is retrieved first, and retrieval at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evc_fast.data.repository import CaptionRepository
from evc_fast.model.captioner import FaceNet
from evc_fast.training.dataset import VideoBatches
from evc_fast.training.evaluation import caption_videos

FACE_NET, SHUFFLED, NEAREST = "FACE-net", "FACE-net, shuffled retrieval", "nearest caption"


class ShuffledRetrieval:
    """Videos, each with what was retrieved for another one of them.

    videos: at least two, with a repository; seed: of the order that decides which is whose
    """

    def __init__(self, videos: VideoBatches, seed: int) -> None:
        if len(videos) < 2:
            raise ValueError(f"retrieval can be shuffled among at least 2 videos, not {len(videos)}")
        order = torch.randperm(len(videos), generator=torch.Generator().manual_seed(seed)).tolist()
        # Around a circle, so that none keeps its own.
        self._source = {video: order[place - 1] for place, video in enumerate(order)}
        self._videos = videos
        self.video_ids = videos.video_ids

    def __len__(self) -> int:
        return len(self._videos)

    def inputs(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """As `VideoBatches.inputs`."""
        video = self._videos.inputs(rows)[0]
        return video, *self._videos.inputs([self._source[row] for row in rows])[1:]


def nearest_captions(videos: VideoBatches, repository: CaptionRepository) -> dict[str, str]:
    """Video id -> the caption of the repository that is retrieved first, never one of its own."""
    found = repository.search(videos.video(videos.video_ids), 1, videos.video_ids)
    return {video_id: texts[0] for video_id, texts in zip(videos.video_ids, found.captions, strict=True)}


def caption_test_clips(
    model: FaceNet, videos: VideoBatches, repository: CaptionRepository, *, seed: int = 0
) -> dict[str, dict[str, str]]:
    """Captions of all `videos`, id -> caption, by the model, by the model with shuffled retrieval, and by retrieval
    alone: FACE_NET, SHUFFLED and NEAREST."""
    rows = range(len(videos))
    return {
        NEAREST: nearest_captions(videos, repository),
        FACE_NET: caption_videos(model, videos, rows),
        SHUFFLED: caption_videos(model, ShuffledRetrieval(videos, seed), rows),
    }
