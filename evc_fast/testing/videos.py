"""Small video files for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

__all__ = ["write_video"]


def write_video(path: Path, *, seed: int = 0, frames: int = 6, width: int = 48, height: int = 32) -> Path:
    """An H.264 clip of coloured squares that move."""
    import av

    colours = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    picture = colours.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for shift in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 3 * shift, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
