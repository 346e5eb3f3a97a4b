"""Emotion accuracy of captions, Acc_sw and Acc_c, and the hybrid metrics BFS and CFS.

The reference categories of a video are those of every dictionary word in any of its references; a word of two
categories adds both. In a generated caption a word counts for its first category in alphabetical order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evc_fast.data.emotions import EmotionDictionary

EMOTION_METRICS = ("Acc_sw", "Acc_c")


@dataclass(frozen=True)
class EmotionCount:
    """The distinct categories of one generated caption, in alphabetical order, by whether a reference has them."""

    right: tuple[str, ...]
    wrong: tuple[str, ...]

    def row(self) -> list[int]:
        """[N_r, N_w, N_0, C_r, C_h, 1]: what `accuracies` sums."""
        none = not self.right and not self.wrong
        both = bool(self.right and self.wrong)
        return [len(self.right), len(self.wrong), int(none), int(bool(self.right)), int(both), 1]


def count_emotions(hypothesis: str, references: Sequence[str], dictionary: EmotionDictionary) -> EmotionCount:
    """Categories of a caption against those of its references; words are matched whole, without stemming."""
    expected = {name for text in references for word in dictionary.find(text) for name in dictionary.of(word)}
    found = {dictionary.of(word)[0] for word in dictionary.find(hypothesis)}
    return EmotionCount(tuple(sorted(found & expected)), tuple(sorted(found - expected)))


def accuracies(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Acc_sw and Acc_c in percent of sums over n captions of [N_r, N_w, N_0, C_r, C_h, 1], [..., 6] -> twice [...].

    N_r, N_w: distinct right and wrong categories of each caption; N_0: captions without a word of the dictionary
    C_r: captions with a right category; C_h: captions with both a right and a wrong one
    """
    right, wrong, none, captions_right, captions_both, captions = np.moveaxis(sums.astype(np.float64), -1, 0)
    words = right / (right + wrong + none)
    # C_h <= C_r. Where they are equal the printed exp(C_h / 1e-4) overflows; the limit of C_h towards C_r is 0.
    some_right_only = captions_both < captions_right
    gap = np.where(some_right_only, captions_both - captions_right + 1e-4, -1.0)
    sentences = np.where(some_right_only, np.exp(captions_both / gap) * captions_right / captions, 0.0)
    return 100 * words, 100 * sentences


Number = float | np.ndarray


def bfs(values: Mapping[str, Number]) -> Number:
    """BFS of BLEU-1..4, Acc_sw and Acc_c, all in percent."""
    bleu = 0.1 * values["BLEU-1"] + 0.2 * values["BLEU-2"] + 0.3 * values["BLEU-3"] + 0.4 * values["BLEU-4"]
    return 0.8 * bleu + 0.1 * (values["Acc_sw"] + values["Acc_c"])


def cfs(values: Mapping[str, Number]) -> Number:
    """CFS of CIDEr, Acc_sw and Acc_c, all in percent."""
    return 0.8 * values["CIDEr"] + 0.1 * (values["Acc_sw"] + values["Acc_c"])
