"""Small JPEG pictures of a video's frames, for a person to see."""

from __future__ import annotations

import av
from torch import Tensor
from torch.nn import functional as F

from evc_fast.results import Picture

__all__ = ["small_pictures"]

_HEIGHT, _LEAST_WIDTH, _MOST_WIDTH = 120, 16, 480


def small_pictures(frames: Tensor, times: Tensor) -> tuple[Picture, ...]:
    """One of each of N frames, uint8 RGB [N, H, W, 3], shown at `times` [N] seconds; 120 pixels high or less."""
    height, width = frames.shape[1:3]
    new_height = min(_HEIGHT, height)
    # Both even, as the colours of JPEG are stored.
    new_width = min(max(round(width * new_height / height), _LEAST_WIDTH), _MOST_WIDTH)
    new_height, new_width = max(new_height // 2 * 2, 2), max(new_width // 2 * 2, 2)
    small = F.interpolate(
        frames.permute(0, 3, 1, 2).float(),
        (new_height, new_width),
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )
    levels = small.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return tuple(
        Picture(_jpeg(picture), seconds, new_width, new_height)
        for picture, seconds in zip(levels, times.tolist(), strict=True)
    )


def _jpeg(levels) -> bytes:
    """uint8 RGB [H, W, 3] -> a JPEG file."""
    frame = av.VideoFrame.from_ndarray(levels, format="rgb24")
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = frame.width, frame.height, "yuvj420p"
    encoder.options = {"qscale": "3"}
    encoder.framerate = 1
    packets = [*encoder.encode(frame.reformat(format="yuvj420p")), *encoder.encode()]
    return b"".join(bytes(packet) for packet in packets)
