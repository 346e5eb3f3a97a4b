"""BLEU-1..4, METEOR, ROUGE-L and CIDEr as pycocoevalcap computes them, on words as captions are read everywhere here.

The text is that of `caption_words` (ASCII, lower case, no punctuation, 15 words), of references too; no PTB tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from evc_fast.metrics.meteor import Meteor, MeteorUnavailable, summable
from evc_fast.model.decoders.vocabulary import caption_words

BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
CAPTION_METRICS = (*BLEU, "METEOR", "ROUGE-L", "CIDEr")

_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap's, which keep its quotients defined


@dataclass
class CaptionScores:
    """Scores of n captions, in percent; None: not computed, `notes` says why.

    overall: metric -> that of the corpus; per_video: metric -> float64 [n]
    bleu_counts: float64 [n, 10]: length of the caption, of the closest reference, n-grams of it for n = 1..4, and how
        many of them are in a reference. The corpus' BLEU is made of their sums.
    meteor_statistics: float64 [n, 23], METEOR's, whose sums make that of the corpus
    """

    overall: dict[str, float | None] = field(default_factory=dict)
    per_video: dict[str, np.ndarray | None] = field(default_factory=dict)
    bleu_counts: np.ndarray = field(default_factory=lambda: np.empty((0, 10)))
    meteor_statistics: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)


def plain_text(caption: str) -> str:
    """A caption as every metric reads it."""
    return " ".join(caption_words(caption))


def score_captions(
    hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]], meteor: Meteor | MeteorUnavailable
) -> CaptionScores:
    """Scores of captions against references of the same ids; without METEOR where that is not available.

    Raises ImportError without pycocoevalcap.
    """
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ImportError(f"the metrics need pycocoevalcap ({error}): pip install 'evc-fast[metrics]'") from error
    generated = {video_id: [plain_text(hypotheses[video_id])] for video_id in references}
    written = {video_id: [plain_text(text) for text in texts] for video_id, texts in references.items()}
    scores = CaptionScores()

    bleu = BleuScorer(n=4)
    for video_id, texts in written.items():
        bleu += (generated[video_id][0], texts)
    overall, each = bleu.compute_score(option="closest")
    scores.bleu_counts = np.array([_bleu_counts(counts) for counts in bleu.ctest])
    for name, value, values in zip(BLEU, overall, each, strict=True):
        scores.overall[name], scores.per_video[name] = 100 * value, 100 * np.array(values)

    scores.overall["METEOR"] = scores.per_video["METEOR"] = None
    try:
        _add_meteor(scores, generated, written, meteor)
    except MeteorUnavailable as error:
        scores.notes.append(f"METEOR: not computed ({error})")

    for name, scorer in (("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        value, values = scorer.compute_score(written, generated)
        scores.overall[name], scores.per_video[name] = 100 * float(value), 100 * np.array(values)
    if len(written) == 1:
        scores.notes.append("CIDEr: 0 for a single video, as every n-gram is in all of the references")
    return scores


def _bleu_counts(counts: Mapping[str, int | list[int]]) -> list[float]:
    length = counts["testlen"]
    closest = min(counts["reflen"], key=lambda reference: (abs(reference - length), reference))
    return [length, closest, *counts["guess"], *counts["correct"]]


def _add_meteor(
    scores: CaptionScores,
    generated: Mapping[str, Sequence[str]],
    written: Mapping[str, Sequence[str]],
    meteor: Meteor | MeteorUnavailable,
) -> None:
    if isinstance(meteor, MeteorUnavailable):
        raise meteor
    statistics = np.array([meteor.statistics(generated[video_id][0], texts) for video_id, texts in written.items()])
    each, corpus = meteor.scores(statistics)
    scores.per_video["METEOR"], scores.overall["METEOR"] = 100 * each, 100 * corpus
    scores.meteor_statistics = summable(statistics)


def corpus_bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU-1..4 in percent of sums of `bleu_counts`, [..., 10] -> [..., 4], as pycocoevalcap has it."""
    length, reference, guesses, matches = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    precision = np.cumprod((matches + _TINY) / (guesses + _SMALL), axis=-1) ** (1 / np.arange(1, 5))
    ratio = (length + _TINY) / (reference + _SMALL)
    brevity = np.exp(np.minimum(1 - 1 / ratio, 0))
    return 100 * precision * brevity[..., None]


def resampled(scores: CaptionScores, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Each metric but METEOR of R resamples of the videos, metric -> float64 [R] in percent.

    weights: int64 [R, n], how often a resample holds a video. CIDEr keeps the document frequencies of the whole set.
    """
    found: dict[str, np.ndarray] = dict(zip(BLEU, corpus_bleu(weights @ scores.bleu_counts).T, strict=True))
    for name in ("ROUGE-L", "CIDEr"):
        found[name] = weights @ scores.per_video[name] / weights.sum(axis=1)
    return found
