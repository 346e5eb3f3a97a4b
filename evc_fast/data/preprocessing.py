"""CLIP's image preprocessing in torch, for a whole batch of frames at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3  # PIL's number for it, as preprocessor_config.json has it


@dataclass(frozen=True)
class Preprocessing:
    """Bicubic, antialiased resize of the shorter side to `resize`; centre crop to `crop`; (x / 255 - mean) / std."""

    crop: int
    resize: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def from_config(cls, config: Mapping[str, Any], image_size: int) -> Preprocessing:
        """Reads a `preprocessor_config.json` of a CLIP tower whose images are `image_size` pixels wide.

        ValueError for a step that CLIP does not have: this is not a general image processor, and guesses nothing.
        """

        def side(key: str, *names: str) -> int:
            value = config.get(key, image_size)
            if isinstance(value, Mapping):
                found = {value[name] for name in names if value.get(name) is not None}
                value = found.pop() if len(found) == 1 else value
            if not isinstance(value, int):
                raise ValueError(f"the preprocessor's {key} must be one number of pixels, not {value!r}")
            return value

        expected = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True}
        for key, value in (*expected.items(), ("resample", _BICUBIC)):
            if config.get(key, value) not in (value, None):
                raise ValueError(f"the preprocessor's {key} is {config[key]!r}, and CLIP's preprocessing has {value!r}")
        if abs(config.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
            raise ValueError(f"the preprocessor's rescale_factor is {config['rescale_factor']}, and CLIP's is 1 / 255")
        crop = side("crop_size", "height", "width")
        if crop != image_size:
            raise ValueError(f"the preprocessor crops to {crop} pixels, but the image tower takes {image_size}")
        resize = side("size", "shortest_edge")
        if resize < crop:
            raise ValueError(f"the preprocessor resizes to {resize} pixels, less than the {crop} that it crops")
        mean, std = (tuple(map(float, config.get(key) or default)) for key, default in _STATISTICS)
        return cls(crop=crop, resize=resize, mean=mean, std=std)

    def __call__(self, frames: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """frames: uint8 [..., H, W, 3] on any device -> pixel_values [..., 3, crop, crop] of `dtype` on that device."""
        return self.normalise(self.levels(frames), dtype)

    def normalise(self, levels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """levels: 0..255 [..., 3, S, S] of any type and layout -> (x / 255 - mean) / std, contiguous, of `dtype`."""
        mean, std = (
            torch.tensor(values, device=levels.device).mul(255).view(3, 1, 1) for values in (self.mean, self.std)
        )
        # One copy from interleaved bytes to planes, then in place.
        pixel_values = torch.empty(levels.shape, device=levels.device).copy_(levels)
        return pixel_values.sub_(mean).div_(std).to(dtype)

    def levels(self, frames: torch.Tensor) -> torch.Tensor:
        """frames: uint8 [..., H, W, 3] -> what is normalised: whole levels 0..255 [..., 3, crop, crop].

        uint8 on a CPU, else float32, on the frames' device; a view of the resized frames, laid out as the frames are:
        channels last in memory where those are contiguous.
        Raises TypeError and ValueError for anything but such frames.
        """
        if not isinstance(frames, torch.Tensor) or frames.dtype != torch.uint8:
            kind = frames.dtype if isinstance(frames, torch.Tensor) else type(frames).__name__
            raise TypeError(f"frames must be a uint8 tensor [..., H, W, 3], not {kind}")
        if frames.dim() < 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise ValueError(
                f"frames must be [N, H, W, 3] or [B, N, H, W, 3], none of them 0, not {list(frames.shape)}"
            )
        leading, (height, width) = frames.shape[:-3], frames.shape[-3:-1]
        images = frames.reshape(-1, height, width, 3).permute(0, 3, 1, 2)  # channels last in memory: no copy
        scale = self.resize / min(height, width)
        # The longer side is cut to whole pixels, as torchvision and transformers cut it.
        new_height = self.resize if height <= width else int(self.resize * height / width)
        new_width = self.resize if width <= height else int(self.resize * width / height)
        images = images if scale == 1 else _resize(images, new_height, new_width)
        top, left = (new_height - self.crop) // 2, (new_width - self.crop) // 2
        images = images[..., top : top + self.crop, left : left + self.crop]
        return images.unflatten(0, leading)


_INTERPOLATION = {"mode": "bicubic", "antialias": True, "align_corners": False}
_STATISTICS = (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))


def _resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 [n, 3, h, w] -> [n, 3, height, width] in whole levels, uint8 on a CPU, else float32."""
    if images.device.type == "cpu":
        return F.interpolate(images, size=(height, width), **_INTERPOLATION)
    return _resize_by_direction(images, height, width)


def _resize_by_direction(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The same without the 8-bit kernel: rounded to whole levels after each direction, as PIL and that kernel do."""
    images = F.interpolate(images.float(), size=(images.shape[-2], width), **_INTERPOLATION).round_().clamp_(0, 255)
    return F.interpolate(images, size=(height, width), **_INTERPOLATION).round_().clamp_(0, 255)
