"""Captions as a decoder's target ids, and which of them are pieces of emotion words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evc_fast.model.decoders.vocabulary import MAX_CAPTION_WORDS, caption_words, check_captions, pad_sequences

__all__ = ["TargetError", "Targets", "encode_targets"]


class TargetError(ValueError):
    """Captions that a decoder cannot be taught."""


@dataclass(frozen=True)
class Targets:
    """n captions as targets."""

    ids: list[list[int]]
    """Each ends in <eos>."""
    emotional: list[list[bool]]
    """True on each piece of an emotion word, as long as ``ids``."""
    words: Tensor
    """bool [n, W]: the distinct dictionary words of each caption, for L_cls (31)."""
    pad_id: int

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int], delta: float) -> tuple[Tensor, Tensor, Tensor]:
        """Target ids int64 [B, T], weights of (30) float32 [B, T], words bool [B, W] of some captions."""
        ids = pad_sequences([self.ids[row] for row in rows], self.pad_id)
        weights = torch.zeros(ids.shape)
        for place, row in enumerate(rows):
            emotional = torch.tensor(self.emotional[row], dtype=torch.float32)
            weights[place, : len(emotional)] = 1 + delta * emotional
        return ids, weights, self.words[list(rows)]

    def num_tokens(self, rows: Iterable[int]) -> int:
        """Target tokens of some captions, <eos> included."""
        return sum(len(self.ids[row]) for row in rows)


def encode_targets(decoder: nn.Module, captions: Sequence[str], emotion_words: Sequence[str]) -> Targets:
    """Targets of a decoder for captions, normalised and cut to 15 words as for every metric.

    Args:
        decoder: any of :mod:`evc_fast.model.decoders`.
        captions: n sentences.
        emotion_words: the dictionary's W words, in the order of E_0.

    Raises:
        TargetError: a caption has no words left once normalised, the decoder has no tokenizer, or its tokenizer joins
            words, so that no piece belongs to one word.
    """
    captions = check_captions(captions)
    rows = [caption_words(caption, MAX_CAPTION_WORDS) for caption in captions]
    for number, (caption, row) in enumerate(zip(captions, rows, strict=True)):
        if not row:
            raise TargetError(f"caption {number}, {caption!r}, has no words once punctuation and non-ASCII are deleted")
    if not decoder.has_tokenizer:
        raise TargetError("the decoder has no tokenizer: give it a checkpoint with one, captions cannot be encoded")
    places = {word: place for place, word in enumerate(emotion_words)}
    pieces_of = _Pieces(decoder)
    ids, emotional = [], []
    words = torch.zeros(len(rows), len(places), dtype=torch.bool)
    for number, row in enumerate(rows):
        pieces = [pieces_of(word) for word in row]
        marks = [word in places for word in row]
        ids.append([*(index for piece in pieces for index in piece), decoder.eos_id])
        emotional.append([*(mark for piece, mark in zip(pieces, marks, strict=True) for _ in piece), False])
        words[number, [places[word] for word in row if word in places]] = True
    pieces_of.check(rows, ids)
    return Targets(ids, emotional, words, decoder.pad_id)


class _Pieces:
    """The ids of single words, asked of the decoder once a word.

    Tokenizers of the T5 and OPT families, as our own vocabulary, cut at white space first: a caption's pieces are those
    of its words. `check` holds that against the decoder's own encoding of whole captions.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self._decoder = decoder
        self._known: dict[str, list[int]] = {}

    def __call__(self, word: str) -> list[int]:
        if word not in self._known:
            self._known[word] = self._encode(word)
        return self._known[word]

    def _encode(self, text: str) -> list[int]:
        """Ids without <eos>. One text at a time: a batch's padding could not be told from a pad id in the text."""
        return self._decoder.encode([text])[0].tolist()[:-1]

    def check(self, rows: list[list[str]], ids: list[list[int]]) -> None:
        for row, pieces in zip(rows, ids, strict=True):
            if pieces[:-1] != self._encode(" ".join(row)):
                raise TargetError(
                    f"the decoder's tokenizer does not cut {' '.join(row)!r} at its spaces: the pieces of its emotion "
                    "words cannot be told from others"
                )
