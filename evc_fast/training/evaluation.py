"""Captions of held-out videos while training, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from evc_fast.model.captioner import FaceNet
from evc_fast.training.dataset import VideoBatches

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["caption_videos", "caption_videos_together"]


def caption_videos(
    model: FaceNet,
    videos: VideoBatches,
    rows: Sequence[int],
    *,
    batch_size: int = 32,
    num_beams: int = 5,
    max_new_tokens: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Video id -> caption by beam search, for some videos by their number; without dropout, whatever the mode.

    progress: `progress(done, total)` before the first batch and after each, in videos.
    """
    device = next(model.encoder.parameters()).device
    captions: dict[str, str] = {}
    if progress is not None:
        progress(0, len(rows))
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        inputs = videos.inputs(chosen)
        ids = [videos.video_ids[row] for row in chosen]
        inputs = tuple(value if value is None else value.to(device) for value in inputs)
        generated = model.generate(*inputs, num_beams=num_beams, max_new_tokens=max_new_tokens)
        captions.update(zip(ids, model.decoder.decode(generated.ids), strict=True))
        if progress is not None:
            progress(len(captions), len(rows))
    return captions


def caption_videos_together(
    model: FaceNet, videos: VideoBatches, accelerator: Accelerator, **options: Any
) -> dict[str, str]:
    """All captions, on every process, each of which makes its share; options as of `caption_videos`."""
    from accelerate.utils import gather_object

    rows = range(accelerator.process_index, len(videos), accelerator.num_processes)
    share = caption_videos(model, videos, rows, **options)
    together = dict(gather_object(list(share.items())))
    return {video_id: together[video_id] for video_id in videos.video_ids}
