"""Losses (30)-(32) beside hand-written sums, and emotion words of several pieces."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from evc_fast.model.decoders import TransformerDecoder, TransformerDecoderConfig, Vocabulary
from evc_fast.model.decoders.llm import LLMDecoder, LoraOptions
from evc_fast.testing.training_llm import tiny_llm_folder
from evc_fast.training.losses import Denominators, caption_loss, emotion_loss, face_net_loss
from evc_fast.training.targets import TargetError, encode_targets

WORDS = ("angrily", "happily", "joyful")


def test_caption_loss_is_the_weighted_sum_over_tokens() -> None:
    logits = torch.randn(2, 3, 5)
    ids = torch.tensor([[1, 4, 2], [3, 2, 0]])
    weights = torch.tensor([[1.0, 1.5, 1.0], [1.5, 1.0, 0.0]])
    expected = 0.0
    for row in range(2):
        for place in range(3):
            total = sum(math.exp(value) for value in logits[row, place].tolist())
            expected -= float(weights[row, place]) * math.log(math.exp(logits[row, place, ids[row, place]]) / total)
    assert_close(float(caption_loss(logits, ids, weights, 5)), expected / 5, rtol=1e-5, atol=1e-6)


def test_emotion_loss_sums_over_distinct_words_and_averages_over_captions() -> None:
    logits = torch.randn(3, 4)
    words = torch.tensor([[True, False, True, False], [False] * 4, [False, True, False, False]])
    log = logits.log_softmax(-1)
    expected = -(log[0, 0] + log[0, 2] + log[2, 1]) / 3
    assert_close(emotion_loss(logits, words, 3), expected)


def test_total_weighs_both_and_takes_no_emotion_logits() -> None:
    logits, ids, weights = torch.randn(2, 2, 5), torch.tensor([[1, 2], [3, 2]]), torch.ones(2, 2)
    emotions, words = torch.randn(2, 3), torch.tensor([[True, False, False], [False, True, True]])
    counts = Denominators(tokens=4, captions=2)
    losses = face_net_loss(logits, emotions, ids, weights, words, counts, lambda_e=0.5, lambda_cls=0.2)
    assert_close(losses.total, 0.5 * losses.caption + 0.2 * losses.emotion)
    assert losses.emotion > 0
    without = face_net_loss(logits, None, ids, weights, words, counts)
    assert_close(without.total, losses.caption)
    assert without.emotion == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 16, 500).to(dtype)
    ids, weights = torch.randint(500, (4, 16)), torch.ones(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = caption_loss(logits, ids, weights, 64)
        emotion = emotion_loss(logits[:, 0], ids[:, :1] == torch.arange(500), 4)
    assert loss.dtype == emotion.dtype == torch.float32
    assert_close(loss, caption_loss(logits.float(), ids, weights, 64))
    exact = caption_loss(logits.double(), ids, weights, 64)
    assert exact.dtype == torch.float64
    assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)


def test_pieces_of_a_batch_have_its_loss_and_gradient() -> None:
    logits = torch.randn(6, 4, 9, dtype=torch.float64, requires_grad=True)
    ids, weights = torch.randint(9, (6, 4)), torch.rand(6, 4, dtype=torch.float64)
    whole = caption_loss(logits, ids, weights, 20)
    (expected,) = torch.autograd.grad(whole, logits)
    pieces = [slice(0, 1), slice(1, 4), slice(4, 6)]
    total = torch.zeros_like(whole)
    for piece in pieces:
        part = caption_loss(logits[piece], ids[piece], weights[piece], 20)
        part.backward()
        total += part.detach()
    assert_close(total, whole.detach())
    assert_close(logits.grad, expected)


def small_decoder(captions: list[str]) -> TransformerDecoder:
    vocabulary = Vocabulary.from_captions(captions, WORDS)
    return TransformerDecoder(TransformerDecoderConfig(input_dim=8, num_heads=2, ffn_dim=8, num_layers=1), vocabulary)


def test_targets_of_our_vocabulary() -> None:
    captions = ["A man, HAPPILY singing!", "joyful, joyful dog; angrily"]
    decoder = small_decoder(captions)
    targets = encode_targets(decoder, captions, WORDS)
    words = decoder.vocabulary.words
    assert [words[index] for index in targets.ids[0]] == ["a", "man", "happily", "singing", "<eos>"]
    assert targets.emotional == [[False, False, True, False, False], [True, True, False, True, False]]
    assert targets.words.tolist() == [[False, True, False], [True, False, True]]
    ids, weights, chosen = targets.batch([1, 0], delta=0.2)
    assert_close(weights, torch.tensor([[1.2, 1.2, 1.0, 1.2, 1.0], [1.0, 1.0, 1.2, 1.0, 1.0]]))
    assert_close(ids, decoder.encode([captions[1], captions[0]]))
    assert chosen.tolist() == [[True, False, True], [False, True, False]]
    assert targets.num_tokens([0, 1, 1]) == 15


def test_padding_weighs_nothing_and_captions_are_cut() -> None:
    captions = ["a man", " ".join(["dog"] * 14 + ["happily", "joyful"])]
    targets = encode_targets(small_decoder(captions), captions, WORDS)
    assert len(targets.ids[1]) == 16
    assert targets.words.tolist() == [[False, False, False], [False, True, False]]
    _, weights, _ = targets.batch([0, 1], delta=0.1)
    assert weights[0].tolist() == [1.0] * 3 + [0.0] * 13


@pytest.mark.parametrize("family", ["t5", "opt"])
def test_every_piece_of_an_emotion_word_is_weighted(family: str, tmp_path) -> None:
    decoder = LLMDecoder.from_pretrained(tiny_llm_folder(family, tmp_path), lora=LoraOptions(rank=2))
    captions = ["a man sings happily", "joyful man"]
    targets = encode_targets(decoder, captions, WORDS)
    for caption, ids, emotional in zip(captions, targets.ids, targets.emotional, strict=True):
        assert ids == decoder.encode([caption])[0].tolist()
        marked = decoder.tokenizer.decode([i for i, mark in zip(ids, emotional, strict=True) if mark])
        assert marked.split() == [word for word in caption.split() if word in WORDS]
    pieces = sum(targets.emotional[0])
    assert pieces > 1, "the word should span several pieces"
    _, weights, _ = targets.batch([0], delta=0.5)
    assert (weights[0] == 1.5).sum() == pieces
    assert weights[0, -1] == 1.0


def test_captions_that_cannot_be_taught_are_refused() -> None:
    decoder = small_decoder(["a man"])
    with pytest.raises(TargetError, match=r"caption 1, '!\?', has no words"):
        encode_targets(decoder, ["a man", "!?"], WORDS)
    with pytest.raises(TargetError, match="no tokenizer"):
        encode_targets(LLMDecoder.random("tiny-t5"), ["a man"], WORDS)
    joining = SimpleNamespace(
        has_tokenizer=True, eos_id=1, pad_id=0, encode=lambda texts: torch.tensor([[len(texts[0]), 1]])
    )
    with pytest.raises(TargetError, match="does not cut 'a man' at its spaces"):
        encode_targets(joining, ["a man"], WORDS)
