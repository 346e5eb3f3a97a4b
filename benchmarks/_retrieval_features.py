"""Synthetic features for retrieval: clustered ones with the geometry of CLIP's, and plain random ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

CAPTIONS_A_VIDEO = 20
_TOPICS_A_THOUSAND = 5  # topics grow with the number of captions, as the subjects of a larger corpus do


def clustered(captions: int, queries: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(captions [n, D], queries [q, D], number of the video of each query [q]), all of length 1.

    As CLIP's: captions lie in a narrow cone (cosine of two of them about 0.5), and images in another one, so that an
    image has a cosine of about 0.2 with any caption and about 0.3 with those that fit. Within the cone, captions
    gather: topic, video within topic, wording within video, each with variance that decays as 1 / rank over the
    directions. A query is the image of a video of the repository: a third of what varies in it is the video's content.
    """
    g = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, width + 1).float().rsqrt()
    spread = spread / spread.norm()  # of length 1 on average
    basis = torch.linalg.qr(torch.randn(width, width, generator=g)).Q

    def draw(count: int) -> Tensor:
        return torch.randn(count, width, generator=g) * spread

    cones = basis[-2:]  # where the content hardly varies
    videos = -(-captions // CAPTIONS_A_VIDEO)
    topics = max(1, captions * _TOPICS_A_THOUSAND // 1000)
    centres = draw(topics)[torch.randint(topics, (videos,), generator=g)]
    content = (math.sqrt(0.5) * centres + math.sqrt(0.3) * draw(videos)) @ basis
    of_video = torch.arange(captions) // CAPTIONS_A_VIDEO
    made = torch.empty(captions, width)
    for start in range(0, captions, 100_000):  # in parts: a million of them would be held four times
        rows = of_video[start : start + 100_000]
        wording = math.sqrt(0.2) * draw(len(rows)) @ basis
        made[start : start + 100_000] = unit(cones[0] + content[rows] + wording)
    chosen = torch.randperm(videos, generator=g)[:queries]
    seen = unit(math.sqrt(1 / 3) * unit(content[chosen]) + math.sqrt(2 / 3) * unit(draw(len(chosen)) @ basis))
    images = unit(0.28 * cones[0] + 0.93 * cones[1] + 0.22 * seen)
    return made, images, chosen


def plain(captions: int, queries: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same of independent directions: nothing is near anything, and there is nothing that lists could divide."""
    g = torch.Generator().manual_seed(seed)
    videos = -(-captions // CAPTIONS_A_VIDEO)
    made = torch.empty(captions, width)
    for start in range(0, captions, 100_000):
        rows = made[start : start + 100_000]
        rows.copy_(unit(torch.randn(len(rows), width, generator=g)))
    return made, unit(torch.randn(queries, width, generator=g)), torch.randperm(videos, generator=g)[:queries]


def unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=1, keepdim=True)


KINDS: dict[str, Callable[[int, int, int, int], tuple[Tensor, Tensor, Tensor]]] = {
    "clustered": clustered,
    "random": plain,
}
