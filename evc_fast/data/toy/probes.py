"""Linear probes: whether a clip's emotion can be guessed without looking at face, posture and motion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from evc_fast.data.toy.faces import EXPRESSIONS
from evc_fast.data.toy.scenes import Scene

_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # of the L2 penalty


def mean_color(frames: Tensor) -> Tensor:
    """uint8 [n, frames, H, W, 3] -> float32 [n, 3]: the mean over frames and pixels, 0..1."""
    return torch.stack([clip.float().mean((0, 1, 2)) for clip in frames]) / 255


def thumbnail(frames: Tensor, size: int = 16) -> Tensor:
    """uint8 [n, frames, H, W, 3] -> float32 [n, 3 size^2]: the middle frame, averaged over blocks, 0..1."""
    middle = frames[:, frames.shape[1] // 2].permute(0, 3, 1, 2).float() / 255
    return F.adaptive_avg_pool2d(middle, size).flatten(1)


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """The test accuracy of softmax regression on features [n, width], standardised by the training set.

    The best of several L2 penalties, chosen on the test set itself: an upper bound for a probe that must not succeed.
    """
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    return max(_fit(train, train_labels, strength, test, test_labels) for strength in _STRENGTHS)


def _fit(train: Tensor, labels: Tensor, strength: float, test: Tensor, test_labels: Tensor) -> float:
    weight = torch.zeros(train.shape[1], int(labels.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(train @ weight + bias, labels) + 0.5 * strength * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        return ((test @ weight + bias).argmax(1) == test_labels).float().mean().item()


def emotion_labels(scenes: Sequence[Scene]) -> Tensor:
    """int64 [n], the emotion's place among the eight."""
    order = list(EXPRESSIONS)
    return torch.tensor([order.index(scene.emotion) for scene in scenes])


def probe_emotions(
    train: Tensor, train_scenes: Sequence[Scene], test: Tensor, test_scenes: Sequence[Scene]
) -> dict[str, float]:
    """Test accuracy of both probes on frames uint8 [n, frames, H, W, 3]; chance is 1/8."""
    labels, test_labels = emotion_labels(train_scenes), emotion_labels(test_scenes)
    return {
        name: linear_probe(features(train), labels, features(test), test_labels)
        for name, features in (("mean_color", mean_color), ("thumbnail", thumbnail))
    }
