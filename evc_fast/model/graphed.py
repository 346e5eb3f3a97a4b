"""The encoder's training step as CUDA graphs: forward and backward launched as one each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from evc_fast.model.output import EncoderOutput

if TYPE_CHECKING:
    from evc_fast.model.encoder import FaceNetEncoder


class _Tensors(nn.Module):
    """The encoder from tensors to tensors, as a graph has them."""

    def __init__(self, encoder: FaceNetEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        return tuple(x for x in self.encoder(*features)[:2] if x is not None)


def _device_of(encoder: FaceNetEncoder) -> torch.device:
    return encoder.fact_norm.weight.device


def graph_training(encoder: FaceNetEncoder, *features: Tensor) -> Callable[..., EncoderOutput]:
    """An encoder on a GPU in training, as a callable that replays its forward and its backward pass.

    At the sizes of a caption model most of a training step is launching some 250 small kernels: a replay launches them
    as one. Parameters stay the encoder's own: optimisers, clipping and schedules see nothing of it. Dropout draws anew
    at every replay.

    Args:
        encoder: in training mode, on a GPU; must keep its parameters' addresses, its mode and its hooks afterwards.
        features: video, triplets, similarity and, where the configuration reads them, groups, as the encoder takes
            them: every later call must have their shapes and types.

    Returns:
        A callable of the same features; results as of :class:`FaceNetEncoder`, without explanation. A call's outputs
        and gradients stand in memory that the next call overwrites: one backward pass a call, and gradients set to None
        (``zero_grad()``'s default) before the next. A call that finds gradients raises RuntimeError; accumulate over
        several batches without a graph.

    Raises:
        ValueError: ``encoder`` is in evaluation mode (fold it: a fold needs no graph of its own), or not on a GPU.
    """
    if not encoder.training:
        raise ValueError("graph_training needs an encoder in training mode; in evaluation mode use fold()")
    device = _device_of(encoder)
    if device.type != "cuda":
        raise ValueError(f"graph_training needs an encoder on a GPU, it is on {device}")
    replay = torch.cuda.make_graphed_callables(_Tensors(encoder), features, allow_unused_input=True)

    def call(*features: Tensor) -> EncoderOutput:
        if torch.is_grad_enabled() and any(p.grad is not None for p in encoder.parameters()):
            raise RuntimeError(
                "graph_training: the encoder holds gradients of an earlier step, which a replay overwrites: call "
                "zero_grad(set_to_none=True) first; to accumulate gradients call the encoder itself"
            )
        tokens, *logits = replay(*features)
        return EncoderOutput(tokens, logits[0] if logits else None, None)

    return call
