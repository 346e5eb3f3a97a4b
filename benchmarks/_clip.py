"""The video that is captioned when the user names none: H.264 in MP4, everything in it moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def moving_frames(count: int, height: int, width: int, seed: int = 0):
    """Yield `count` RGB frames [height, width, 3] uint8: a textured background that pans, and discs that cross it."""
    rng = np.random.default_rng(seed)
    # Smooth texture with a few octaves, so that the encoder codes detail and motion and not one flat block.
    texture = np.zeros((height * 2, width * 2, 3), np.float32)
    for cells in (4, 16, 64):
        coarse = rng.random((cells, cells, 3), dtype=np.float32)
        rows = np.arange(height * 2) * cells // (height * 2)
        columns = np.arange(width * 2) * cells // (width * 2)
        texture += coarse[rows][:, columns] / 3
    texture = (texture * 220).astype(np.uint8)
    centres = rng.random((6, 2)) * (height, width)
    speeds = (rng.random((6, 2)) - 0.5) * (height / 12, width / 12)
    radii = (height * (0.06 + 0.12 * rng.random(6))).astype(int)
    colours = rng.integers(40, 256, (6, 3), dtype=np.uint8)
    for index in range(count):
        top, left = int(height * (0.5 + 0.5 * np.sin(index / 40))), int(width * (0.5 + 0.5 * np.cos(index / 55)))
        frame = texture[top : top + height, left : left + width].copy()
        for (cy, cx), (vy, vx), radius, colour in zip(centres, speeds, radii, colours, strict=True):
            middle, centre = int(cy + vy * index) % height, int(cx + vx * index) % width
            y = np.arange(max(middle - radius, 0), min(middle + radius, height))[:, None]
            x = np.arange(max(centre - radius, 0), min(centre + radius, width))[None, :]
            patch = frame[y[0, 0] : y[-1, 0] + 1, x[0, 0] : x[0, -1] + 1]
            patch[(y - middle) ** 2 + (x - centre) ** 2 < radius**2] = colour
        yield frame


def encode_clip(path: Path, *, seconds: float = 10.0, fps: int = 25, width: int = 640, height: int = 360) -> Path:
    """Write an H.264 MP4 of moving content to `path`. Needs PyAV; width and height must be even (4:2:0 chroma)."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast"}
        for array in moving_frames(round(seconds * fps), height, width):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return path
