"""graph_training without a GPU: what it refuses, and what it hands to the graphs and makes of their results."""

from __future__ import annotations

import pytest
import torch

from evc_fast.model import graph_training, graphed
from evc_fast.testing.encoder_cases import build_encoder, encoder_inputs

pytestmark = pytest.mark.usefixtures("one_thread")


def test_evaluation_mode_and_the_cpu_are_refused():
    encoder = build_encoder()
    inputs = encoder_inputs(encoder.config)[:3]
    with pytest.raises(ValueError, match="needs an encoder in training mode; in evaluation mode use fold"):
        graph_training(encoder, *inputs)
    with pytest.raises(ValueError, match="needs an encoder on a GPU, it is on cpu"):
        graph_training(encoder.train(), *inputs)


@pytest.mark.parametrize("options", [{}, {"emotion_augmentation": False}, {"retrieval": False}], ids=str)
def test_what_is_graphed_is_the_encoder_and_its_parameters(options, monkeypatch):
    encoder = build_encoder(**options, dropout=0.0).train()
    inputs = [x for x in encoder_inputs(encoder.config)[:3] if x is not None]
    wanted = encoder(*inputs)
    given = {}

    def graph(module, sample, **settings):
        given.update(module=module, sample=sample, settings=settings)
        return module

    monkeypatch.setattr(graphed.torch.cuda, "make_graphed_callables", graph)
    monkeypatch.setattr(graphed, "_device_of", lambda encoder: torch.device("cuda"))
    call = graph_training(encoder, *inputs)
    assert {id(p) for p in given["module"].parameters()} == {id(p) for p in encoder.parameters()}
    assert all(map(torch.equal, given["sample"], inputs))
    output = call(*inputs)
    assert torch.equal(output.tokens, wanted.tokens)
    assert output.explanation is None
    assert (output.emotion_logits is None) == (wanted.emotion_logits is None)
    if wanted.emotion_logits is not None:
        assert torch.equal(output.emotion_logits, wanted.emotion_logits)
    output.tokens.sum().backward()
    assert encoder.ffn[0].weight.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match=r"holds gradients of an earlier step.*zero_grad\(set_to_none=True\)"):
        call(*inputs)
    with torch.no_grad():
        assert torch.equal(call(*inputs).tokens, wanted.tokens)
    encoder.zero_grad()
    assert torch.equal(call(*inputs).tokens, wanted.tokens)
