"""All metrics of generated captions, per video and overall, as numbers, JSON and a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evc_fast.data.emotions import EmotionDictionary
from evc_fast.data.text_files import listed
from evc_fast.metrics.captions import CAPTION_METRICS, CaptionScores, plain_text, score_captions
from evc_fast.metrics.emotions import EMOTION_METRICS, EmotionCount, accuracies, bfs, cfs, count_emotions
from evc_fast.metrics.meteor import Meteor, MeteorUnavailable, start_meteor
from evc_fast.metrics.published import METRICS, TABLE_1, recognise

__all__ = ["METRICS", "MetricsError", "Scores", "evaluate"]


class MetricsError(ValueError):
    """Captions and references that cannot be compared; the message names the videos."""


@dataclass(frozen=True)
class Scores:
    """Metrics of n captions, one a video, in percent, as the paper prints them (CIDEr 169.4, not 1.694).

    overall: metric -> value, in the order of `METRICS`; None: not computed, `notes` says why
    per_video: id -> the metrics of this caption alone (BLEU, METEOR, Acc_c and the hybrids of the corpus are not their
        means), "hypothesis" as it was given, and its emotion categories, "right" and "wrong"
    dataset: the EmVidCap test split that this is, else None
    """

    overall: dict[str, float | None]
    per_video: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    dataset: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What `to_json` writes."""
        return {
            "unit": "percent",
            "videos": len(self.per_video),
            "dataset": self.dataset,
            "overall": self.overall,
            "notes": self.notes,
            "per_video": self.per_video,
        }

    def to_json(self) -> str:
        """JSON text; `read_hypotheses` finds the captions in it again."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    def table(self) -> str:
        """Plain text: the metrics in percent; where the data is EmVidCap, below the rows of the paper's Table 1."""
        rows = [(f"ours, {len(self.per_video)} videos", self.overall)]
        title = "in percent"
        if self.dataset is not None:
            rows = [*TABLE_1[self.dataset].items(), *rows]
            title = f"{self.dataset}, in percent; all rows but the last as published (FACE-net, Table 1)"
        cells = [[name, *(_cell(row[metric]) for metric in METRICS)] for name, row in rows]
        return "\n".join([title, *align([["", *METRICS], *cells]), *self.notes])


def _cell(value: float | None) -> str:
    return "not computed" if value is None else f"{value:.1f}"


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(pairs)
        ).rstrip()
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]


@dataclass(frozen=True)
class Counts:
    """What all metrics of n captions are made of, videos in the order of the references."""

    captions: CaptionScores
    emotions: list[EmotionCount]

    @property
    def emotion_rows(self) -> np.ndarray:
        """int64 [n, 6], what `accuracies` sums."""
        return np.array([count.row() for count in self.emotions])


def evaluate(
    hypotheses: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    dictionary: EmotionDictionary,
    *,
    meteor: bool = True,
) -> Scores:
    """All metrics of generated captions.

    hypotheses: video id -> its caption, which may be empty; references: the same ids -> at least one caption each
    meteor: False leaves METEOR out, whose Java program takes about 10 s to start

    Raises MetricsError where ids lack a caption or are unknown, naming them, where there is no video, and for
    references that are none; ImportError without pycocoevalcap.
    """
    check(hypotheses, references)
    with start_meteor(meteor) as program:
        counts = count(hypotheses, references, dictionary, program)
    captions, rows = counts.captions, counts.emotion_rows
    overall = with_hybrids(captions.overall, rows.sum(axis=0))
    each = with_hybrids(captions.per_video, rows)
    per_video = {
        video_id: {
            "hypothesis": hypotheses[video_id],
            **{metric: None if each[metric] is None else float(each[metric][place]) for metric in METRICS},
            "right": list(counts.emotions[place].right),
            "wrong": list(counts.emotions[place].wrong),
        }
        for place, video_id in enumerate(references)
    }
    overall = {metric: None if overall[metric] is None else float(overall[metric]) for metric in METRICS}
    return Scores(overall, per_video, captions.notes, recognise(references))


def count(
    hypotheses: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    dictionary: EmotionDictionary,
    meteor: Meteor | MeteorUnavailable,
) -> Counts:
    """What `evaluate` and `compare` are made of; the arguments have passed `check`."""
    emotions = [count_emotions(hypotheses[video_id], texts, dictionary) for video_id, texts in references.items()]
    return Counts(score_captions(hypotheses, references, meteor), emotions)


def with_hybrids(captions: Mapping[str, Any], emotion_sums: np.ndarray) -> dict[str, Any]:
    """All of `METRICS` from those of words, numbers or arrays [...], and from sums of emotion counts [..., 6]."""
    words = {metric: captions[metric] for metric in CAPTION_METRICS}
    values = {**words, **dict(zip(EMOTION_METRICS, accuracies(emotion_sums), strict=True))}
    values |= {"BFS": bfs(values), "CFS": cfs(values)}
    return {metric: values[metric] for metric in METRICS}


def check(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    """Raises MetricsError unless the ids agree, and every video has references with words."""
    if not references:
        raise MetricsError("there are no references to compare with")
    missing = [video_id for video_id in references if video_id not in hypotheses]
    if missing:
        raise MetricsError(f"{len(missing)} of {len(references)} videos have no caption: {listed(missing)}")
    unknown = [video_id for video_id in hypotheses if video_id not in references]
    if unknown:
        raise MetricsError(f"{len(unknown)} captions are of videos without references: {listed(unknown)}")
    for video_id, texts in references.items():
        if isinstance(texts, str) or not texts:
            raise MetricsError(f"the references of video {video_id!r} must be a list of at least one caption")
        for text in texts:
            if not plain_text(text):
                raise MetricsError(f"video {video_id!r} has a reference without words: {text!r}")
